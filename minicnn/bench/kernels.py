"""The kernels that can be timed: what each reads, how it is called, and what it has to compute and to move at the least.

Everything goes through the public operations, so that what is timed is what a model runs. A backward that is no operation of its
own is asked of the tape, whose forward is run before, untimed.

operations: those of the definition (a convolution's multiplications and additions, whatever the algorithm saves of them).
bytes: every input read once, every output written once. No cache is that large, no kernel does better.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import minicnn as mc
from minicnn.backend import Array
from minicnn.bench.cases import Case, Shape
from minicnn.kernels.windows import Windows

Arrays = Mapping[str, Array]
Call = Callable[[], Any]


class Kernel(NamedTuple):
    """One kernel. `start(case, arrays)` prepares it and returns the call to time."""

    reads: tuple[str, ...]                          # the names of the arrays that are made for it, see `shape_of`
    moves: tuple[str, ...]                          # those that must be read or written, its result among them
    start: Callable[[Case, Arrays], Call]
    operations: Callable[[Case], int]


# ---------------------------------------------------------------- arrays
def shape_of(name: str, case: Case) -> Shape:
    """The shape of the array that a kernel of this case calls by this name."""
    inside, outside = (case.batch, *case.in_shape), (case.batch, *case.out_shape)
    if name == "columns":
        return case.batch, case.in_shape[0] * _taps(case), math.prod(case.out_shape[1:])
    if name == "weight":
        window = () if case.windows is None else case.windows.kernel_size
        return case.out_shape[0], case.in_shape[0], *window
    return {"x": inside, "other": inside, "y": outside, "dy": outside, "scale": case.in_shape[:1], "shift": case.in_shape[:1]}[name]


def arrays(case: Case) -> dict[str, np.ndarray[Any, Any]]:
    """Random float32 inputs, the same in every run, as they lie in memory when layers hand them on."""
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(shape_of(name, case), dtype=np.float32) for name in KERNELS[case.kernel].reads}
    return {name: laid_out(name, array) for name, array in made.items()}


def laid_out(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same numbers in the layers' order: images and filters channels-last, pictures (three channels) as they are stored."""
    if array.ndim != 4 or (name != "weight" and array.shape[1] == 3):
        return array
    order, back = ((2, 3, 1, 0), (3, 2, 0, 1)) if name == "weight" else ((0, 2, 3, 1), (0, 3, 1, 2))
    return np.ascontiguousarray(array.transpose(order)).transpose(back)


# ---------------------------------------------------------------- costs
def operations(case: Case) -> int:
    """Floating-point operations of the definition, for the whole batch; 0 for what only copies."""
    return KERNELS[case.kernel].operations(case)


def least_bytes(case: Case) -> int:
    """Bytes that must move in float32: every input once, the output once."""
    return 4 * sum(_numbers(name, case) for name in KERNELS[case.kernel].moves)


def _taps(case: Case) -> int:
    assert case.windows is not None
    return math.prod(case.windows.kernel_size)


def _product(case: Case) -> int:
    """Of a convolution or a matrix product: a multiplication and an addition for each weight at each output position."""
    return 2 * case.batch * math.prod(shape_of("weight", case)) * math.prod(case.out_shape[1:])


def _numbers(name: str, case: Case) -> int:
    return math.prod(shape_of(name, case))


def _each(name: str, count: int) -> Callable[[Case], int]:
    """So many operations for each number of an array."""
    return lambda case: count * _numbers(name, case)


# ---------------------------------------------------------------- calls
def _windows(case: Case) -> Windows:
    assert case.windows is not None
    return case.windows


def _steps(case: Case) -> dict[str, Any]:
    windows = _windows(case)
    return {"stride": windows.stride, "padding": windows.padding, "dilation": windows.dilation}


def _im2col(case: Case, a: Arrays) -> Call:
    return lambda: mc.im2col(a["x"], _windows(case).kernel_size, **_steps(case))


def _col2im(case: Case, a: Arrays) -> Call:
    return lambda: mc.col2im(a["columns"], case.in_shape[1:], _windows(case).kernel_size, **_steps(case))


def _conv2d(case: Case, a: Arrays) -> Call:
    return lambda: mc.ops.conv2d(a["x"], a["weight"], **_steps(case))


def _conv2d_input_grad(case: Case, a: Arrays) -> Call:
    return lambda: mc.ops.conv2d_input_grad(a["dy"], a["weight"], case.in_shape[1:], **_steps(case))


def _conv2d_weight_grad(case: Case, a: Arrays) -> Call:
    return lambda: mc.ops.conv2d_weight_grad(a["x"], a["dy"], _windows(case).kernel_size, **_steps(case))


def _pool(case: Case, x: Any) -> Any:
    windows = _windows(case)
    return mc.ops.max_pool2d(x, windows.kernel_size, windows.stride, windows.padding, windows.ceil_mode)


def _normalize(case: Case, a: Mapping[str, Any]) -> Any:
    scale = a["scale"].data if isinstance(a["scale"], mc.Tensor) else a["scale"]
    return mc.ops.batch_norm(a["x"], a["scale"], a["shift"], scale * 0.0, scale * 0.0, train=True)     # running ones, on its device


def _linear(case: Case, a: Mapping[str, Any]) -> Any:
    return mc.ops.linear(a["x"], a["weight"])


def _backward(forward: Callable[[Case, Mapping[str, Any]], Any], *of: str) -> Callable[[Case, Arrays], Call]:
    """The gradients of forward(case, tensors) in the named inputs; the forward is run now, and its graph kept."""
    def start(case: Case, a: Arrays) -> Call:
        tensors = {name: mc.Tensor(array, requires_grad=name in of) for name, array in a.items() if name != "dy"}
        y, wanted = forward(case, tensors), [tensors[name] for name in of]

        def call() -> Array:
            return mc.grad(y, wanted, a["dy"], retain_graph=True)[0].data
        return call
    return start


KERNELS: dict[str, Kernel] = {
    "im2col": Kernel(("x",), ("x", "columns"), _im2col, lambda case: 0),
    "col2im": Kernel(("columns",), ("columns", "x"), _col2im, _each("columns", 1)),
    "conv2d": Kernel(("x", "weight"), ("x", "weight", "y"), _conv2d, _product),
    "conv2d_input_grad": Kernel(("dy", "weight"), ("dy", "weight", "x"), _conv2d_input_grad, _product),
    "conv2d_weight_grad": Kernel(("x", "dy"), ("x", "dy", "weight"), _conv2d_weight_grad, _product),
    # a comparison for each tap but the first; which pixel won could be told in two bits, so x need not be read again
    "max_pool2d": Kernel(("x",), ("x", "y"), lambda case, a: lambda: _pool(case, a["x"]),
                         lambda case: (_taps(case) - 1) * _numbers("y", case)),
    "max_pool2d_grad": Kernel(("x", "dy"), ("dy", "x"), _backward(lambda case, t: _pool(case, t["x"]), "x"), _each("dy", 1)),
    # sum; centre, square, sum; scale, shift
    "batch_norm": Kernel(("x", "scale", "shift"), ("x", "y"), lambda case, a: lambda: _normalize(case, a), _each("x", 6)),
    # sum; centre, times dy, sum; two terms taken from dy, the second times x_hat, and the scale
    "batch_norm_grad": Kernel(("x", "dy", "scale", "shift"), ("x", "dy", "x"), _backward(_normalize, "x", "scale", "shift"),
                              _each("x", 9)),
    "linear": Kernel(("x", "weight"), ("x", "weight", "y"), lambda case, a: lambda: _linear(case, a), _product),
    "linear_input_grad": Kernel(("x", "dy", "weight"), ("dy", "weight", "x"), _backward(_linear, "x"), _product),
    "linear_weight_grad": Kernel(("x", "dy", "weight"), ("dy", "x", "weight"), _backward(_linear, "weight"), _product),
    "residual_add": Kernel(("x", "other"), ("x", "other", "y"), lambda case, a: lambda: mc.ops.add(a["x"], a["other"]),
                           _each("x", 1)),
}
