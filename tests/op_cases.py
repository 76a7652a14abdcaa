"""The table of operations: each at work on small arrays, beside an oracle that computes the same from its definition.

`test_every_op.py` and `test_backends.py` run every line through value, gradients, gradients of gradients, dtypes and devices,
and fail where an operation of `minicnn.ops` has a backward that no line reaches.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from witnesses import (
    Device,
    naive_adaptive_avg_pool,
    naive_avg_pool,
    naive_batch_norm,
    naive_cross_entropy,
    naive_log_softmax,
    naive_matmul,
    naive_max_pool,
    naive_simam,
    naive_softmax,
    pool_windows,
)

import minicnn as mc
from minicnn import backend, ops
from minicnn.kernels import direct
from minicnn.kernels.pooling import max_pool2d, winners
from minicnn.kernels.windows import Windows


class Case(NamedTuple):
    """fn(*inputs, *constants) on Tensors and arrays of a device; oracle(the same) on NumPy arrays."""

    name: str
    fn: Callable[..., Any]
    oracle: Callable[..., Any]
    inputs: list[np.ndarray[Any, Any]]
    constants: list[np.ndarray[Any, Any]] = []

    def on(self, device: Device, dtype: Any = float) -> Callable[..., Any]:
        """fn of the inputs alone, with its constants on the device, the real ones among them in `dtype`."""
        constants = [device.put(c.astype(dtype) if c.dtype.kind == "f" else c) for c in self.constants]
        return lambda *tensors: self.fn(*tensors, *constants)

    def expected(self, *arrays: Any) -> np.ndarray[Any, Any]:
        return np.asarray(self.oracle(*arrays, *self.constants))


# ---------------------------------------------------------------- numbers to compute with

_rng = np.random.default_rng(2024)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.asarray(_rng.standard_normal(shape))


def positive(*shape: int) -> np.ndarray[Any, Any]:
    return np.asarray(_rng.uniform(1.0, 2.0, shape))


def distinct(*shape: int) -> np.ndarray[Any, Any]:
    """Numbers of both signs, far enough from each other and from 0 that a small step crosses no kink."""
    count = math.prod(shape)
    return (_rng.permutation(count) - count // 2 + 0.5).reshape(shape) * (4.0 / max(count, 4))


def loop(f: Callable[..., float]) -> Callable[..., Any]:
    """A function of Python numbers, applied to one element after another (of several arrays, broadcast)."""
    return np.vectorize(f, otypes=[float])


def positive_part(v: Any) -> Any:
    return (v + abs(v)) / 2


def per_channel(v: Any) -> Any:
    return v[:, None, None]


def shift_off_zero(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A number for each channel of (N, K, P, Q) that, added, leaves numbers of both signs there, none of them near ReLU's kink."""
    candidates = _rng.uniform(-1.5, 1.5, 500) * abs(y).mean()
    return np.array([max(candidates, key=lambda shift: abs(y[:, k] + shift).min()) for k in range(y.shape[1])])


# ---------------------------------------------------------------- arithmetic

def arithmetic() -> Iterator[Case]:
    """The four operations, broadcasting on either side, with numbers and plain arrays, and with one Tensor twice."""
    shapes = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1), (3,)), ((), (2, 3)), ((1, 3), (4, 1, 1)), ((), ()), ((0, 3), (3,))]
    operators: list[tuple[str, Any, Any]] = [
        ("add", ops.add, lambda a, b: a + b), ("sub", ops.sub, lambda a, b: a - b), ("mul", ops.mul, lambda a, b: a * b),
        ("div", ops.div, lambda a, b: a / b)]

    def with_operator(name: str, op: Any, f: Any) -> Iterator[Case]:        # f uses the operator: of NumPy, or of Tensor
        for a, b in shapes:
            yield Case(f"{name} {a} {b}", op, f, [normal(*a), positive(*b)])
        yield Case(f"{name}, a number right", lambda x: f(x, 2.5), lambda x: f(x, 2.5), [normal(2, 3)])
        yield Case(f"{name}, a number left", lambda x: f(2.5, x), lambda x: f(2.5, x), [positive(2, 3)])
        yield Case(f"{name}, an array left", lambda x, k: f(k, x), lambda x, k: f(k, x), [positive(2, 3)], [normal(3)])
        yield Case(f"{name}, with itself", lambda x: op(x, x), lambda x: f(x, x), [positive(2, 3)])

    for operator in operators:
        yield from with_operator(*operator)


def powers(exponent: float) -> Case:
    return Case(f"power {exponent!r}", lambda x: x ** exponent, loop(lambda v: v ** exponent), [positive(2, 3)])


def elementwise() -> Iterator[Case]:
    yield Case("neg", lambda x: -x, loop(lambda v: -v), [normal(2, 3)])
    yield from map(powers, (0, 1, 2, 3, -2, 0.5, -1.5, 0.0))
    yield Case("power of negative numbers", lambda x: x ** 3, loop(lambda v: v * v * v), [normal(2, 3)])
    yield Case("power of a Tensor", ops.power, loop(lambda v, e: v ** e), [positive(2, 3), normal(3)])
    yield Case("power of a number", lambda e: 2.0 ** e, loop(lambda e: 2.0 ** e), [normal(2, 3)])
    yield Case("exp", ops.exp, loop(math.exp), [normal(2, 3)])
    yield Case("log", ops.log, loop(math.log), [positive(2, 3)])
    yield Case("sqrt", ops.sqrt, loop(math.sqrt), [positive(2, 3)])
    yield Case("tanh", ops.tanh, loop(math.tanh), [normal(2, 3)])
    yield Case("tanh of a scalar", ops.tanh, loop(math.tanh), [normal()])


# ---------------------------------------------------------------- choosing

def choosing() -> Iterator[Case]:
    mask = np.array([[True, False, True], [False, False, True]])
    yield Case("where", lambda a, b, m: ops.where(m, a, b), lambda a, b, m: np.where(m, a, b), [normal(2, 3), normal(2, 3)], [mask])
    yield Case("where, broadcast", lambda a, b, m: ops.where(m, a, b), lambda a, b, m: np.where(m, a, b), [normal(3), normal(2, 1)],
               [mask])
    yield Case("where, with numbers", lambda a, m: ops.where(m, a, 0.5) + ops.where(m, 2.0, a),
               lambda a, m: np.where(m, a + 2.0, a + 0.5), [normal(2, 3)], [mask])
    yield from larger_or_smaller("maximum", ops.maximum, max)
    yield from larger_or_smaller("minimum", ops.minimum, min)
    for axis, keepdims in ((None, False), (0, False), (-1, True), ((0, 2), False), ((0, 2), True)):
        yield extreme("max", ops.max, np.max, axis, keepdims)
        yield extreme("min", ops.min, np.min, axis, keepdims)
    yield Case("max_of_last", lambda x: ops.max_of_last(x)[0], lambda x: np.vectorize(max, signature="(n)->()")(x),
               [distinct(2, 3, 4)])


def larger_or_smaller(name: str, op: Any, pick: Callable[..., float]) -> Iterator[Case]:
    yield Case(name, op, loop(pick), np.split(distinct(4, 3), 2))
    yield Case(f"{name}, broadcast", op, loop(pick), [distinct(2, 4), distinct(4) + 0.1])
    yield Case(f"{name}, 0 right", lambda x: op(x, 0.0), loop(lambda v: pick(v, 0.0)), [distinct(2, 3)])
    yield Case(f"{name}, 0 left", lambda x: op(0.0, x), loop(lambda v: pick(v, 0.0)), [distinct(2, 3)])


def extreme(name: str, op: Any, numpys: Any, axis: Any, keepdims: bool) -> Case:
    return Case(f"{name} {axis} {keepdims}", lambda x: op(x, axis, keepdims), lambda x: numpys(x, axis=axis, keepdims=keepdims),
                [distinct(2, 3, 4)])


# ---------------------------------------------------------------- products of matrices

def products() -> Iterator[Case]:
    for a, b in (((2, 3), (3, 4)), ((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((2, 1, 2, 3), (4, 3, 2)), ((3, 2), (5, 2, 1)),
                 ((3,), (2, 3, 4)), ((0, 3), (3, 2))):
        yield Case(f"matmul {a} {b}", ops.matmul, naive_matmul, [normal(*a), normal(*b)])
    yield Case("matrix_product", ops.matrix_product, naive_matmul, [normal(4, 3), normal(3, 2)])
    yield Case("matrix_product of a stack", ops.matrix_product, naive_matmul, [normal(2, 2, 3), normal(3, 2)])
    yield Case("linear", ops.linear, lambda x, w: naive_matmul(x, w.T), [normal(4, 3), normal(2, 3)])
    yield Case("linear with a bias", ops.linear, lambda x, w, b: naive_matmul(x, w.T) + b, [normal(4, 3), normal(2, 3), normal(2)])


# ---------------------------------------------------------------- moving, copying, adding

def movement() -> Iterator[Case]:
    for axis, keepdims in ((None, False), (None, True), (0, False), (-1, True), ((0, 2), False), ((1, -1), True), ((), False)):
        yield reduction("sum", ops.sum, np.sum, axis, keepdims)
        yield reduction("mean", ops.mean, np.mean, axis, keepdims)
    for axis, ddof in ((None, 0), (1, 1), ((0, 2), 0), ((0, 2), 1)):
        yield variance(axis, ddof)
    for shape, to in (((3,), (2, 3)), ((2, 1, 3), (4, 2, 5, 3)), ((), (2, 2)), ((1,), (4,))):
        yield broadcast(shape, to)
    yield Case("sum_to", lambda x: ops.sum_to(x, (2, 1, 3)), lambda x: x.sum(0).sum(1, keepdims=True), [normal(4, 2, 5, 3)])
    yield Case("reshape", lambda x: x.reshape(3, -1), lambda x: np.array(list(x.flat)).reshape(3, 4), [normal(2, 2, 3)])
    yield Case("reshape of a transpose", lambda x: x.T.reshape((6,)), lambda x: np.array(list(x.T.flat)), [normal(2, 3)])
    yield Case("another type", lambda x: ops.movement.converted(x, x.dtype, x.dtype), lambda x: x, [normal(2, 3)])
    yield Case("transpose", lambda x: x.transpose(2, 0, 1), lambda x: np.moveaxis(x, 2, 0), [normal(2, 3, 4)])
    yield Case("transpose, negative axes", lambda x: x.transpose((-1, 0, -2)), lambda x: np.moveaxis(x, 2, 0), [normal(2, 3, 4)])
    yield Case("T", lambda x: x.T, lambda x: np.moveaxis(np.moveaxis(x, 2, 0), 2, 1), [normal(2, 3, 4)])
    yield Case("pad", lambda x: ops.pad(x, ((0, 0), (1, 2)), value=0.5), lambda x: np.array([[0.5, *row, 0.5, 0.5] for row in x]),
               [normal(2, 3)])
    yield Case("pad on all sides", lambda x: ops.pad(x, 1),
               lambda x: np.array([[0.0] * 5, *[[0.0, *row, 0.0] for row in x], [0.0] * 5]), [normal(2, 3)])
    yield Case("concatenate", lambda a, b, c: ops.concatenate([a, b, c], axis=1),
               lambda *arrays: np.array([[v for row in rows for v in row] for rows in zip(*arrays, strict=True)]),
               [normal(2, 3), normal(2, 1), normal(2, 2)])
    yield Case("concatenate, an array and twice a Tensor", lambda a, k: ops.concatenate((a, k, a), axis=-2),
               lambda a, k: np.array([*a, *k, *a]), [normal(2, 3)], [normal(1, 3)])


def reduction(name: str, op: Any, numpys: Any, axis: Any, keepdims: bool) -> Case:
    return Case(f"{name} {axis} {keepdims}", lambda x: op(x, axis, keepdims), lambda x: numpys(x, axis=axis, keepdims=keepdims),
                [normal(2, 3, 4)])


def variance(axis: Any, ddof: int) -> Case:
    return Case(f"var {axis} ddof={ddof}", lambda x: ops.var(x, axis, ddof, keepdims=True),
                lambda x: np.var(x, axis=axis, ddof=ddof, keepdims=True), [normal(2, 3, 4)])


def broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> Case:
    return Case(f"broadcast_to {shape} {to}", lambda x: ops.broadcast_to(x, to), lambda x: np.zeros(to) + x, [normal(*shape)])


def indexing() -> Iterator[Case]:
    every = slice(None)
    indices: dict[str, Any] = {
        "an int": 1, "ints": (1, 2), "a negative int": -1, "slices": (every, slice(None, None, 2)), "an ellipsis": (..., 1),
        "a backward slice": (every, slice(None, None, -1)), "None": (None, 1, every, None), "nothing": (),
        "an empty slice": slice(2, 2)}
    for name, index in indices.items():
        yield indexed(name, index)
    repeated, rows, columns = np.array([2, 0, 2]), np.array([0, 1, 1, 0]), np.array([2, 0, 0, 2])
    mask = np.array([[True, False, True], [False, False, True]])
    yield Case("getitem, repeated indices", lambda x, i: x[:, i], lambda x, i: np.stack([x[:, k] for k in i], 1), [normal(2, 3, 4)],
               [repeated])
    yield Case("getitem, pairs of indices", lambda x, i, j: x[i, j],
               lambda x, i, j: np.stack([x[k, m] for k, m in zip(i, j, strict=True)]), [normal(2, 3, 4)], [rows, columns])
    yield Case("getitem, a mask", lambda x, m: x[m], lambda x, m: np.stack([x[tuple(at)] for at in np.argwhere(m)]),
               [normal(2, 3, 4)],
               [mask])
    yield Case("place", lambda v: ops.place(v, (slice(1, 3),), (4, 2)), lambda v: np.stack([0 * v[0], v[0], v[1], 0 * v[0]]),
               [normal(2, 2)])
    yield Case("place, twice in one place", lambda v, i: ops.place(v, i, (4,)),
               lambda v, i: np.array([v[1], 0.0, v[0] + v[2], 0.0]),
               [normal(3)], [repeated])


def indexed(name: str, index: Any) -> Case:
    return Case(f"getitem, {name}", lambda x: x[index], lambda x: x[index], [normal(2, 3, 4)])


# ---------------------------------------------------------------- convolution

def convolution(x_shape: tuple[int, ...], w_shape: tuple[int, ...], **how: Any) -> Iterator[Case]:
    """The three maps, each by the loops of kernels.direct."""
    pairs = {k: v if k == "groups" or isinstance(v, tuple) else (v, v) for k, v in how.items()}

    def forward(x: Any, w: Any, b: Any = None) -> Any:
        return direct.conv2d(x, w, b, **pairs)

    def input_grad(dy: Any, w: Any) -> Any:
        return direct.conv2d_grads(dy, np.zeros(x_shape), w, **pairs)[0]

    def weight_grad(x: Any, dy: Any) -> Any:
        return direct.conv2d_grads(dy, x, np.zeros(w_shape), **pairs)[1]

    x, w, b = normal(*x_shape), normal(*w_shape), normal(w_shape[0])
    dy = normal(*forward(x, w).shape)
    yield Case(f"conv2d {x_shape} {w_shape} {how}", lambda x, w, b: ops.conv2d(x, w, b, **how), forward, [x, w, b])
    yield Case(f"conv2d, no bias {x_shape} {w_shape} {how}", lambda x, w: ops.conv2d(x, w, **how), forward, [x, w])
    yield Case(f"conv2d_input_grad {x_shape} {w_shape} {how}", lambda dy, w: ops.conv2d_input_grad(dy, w, x_shape[2:], **how),
               input_grad,
               [dy, w])
    yield Case(f"conv2d_weight_grad {x_shape} {w_shape} {how}", lambda x, dy: ops.conv2d_weight_grad(x, dy, w_shape[2:], **how),
               weight_grad, [x, dy])
    while np.abs(forward(x, w, b)).min() < 0.05:                # a step of the differences shall not cross the ReLU's kink
        x, b = normal(*x_shape), normal(w_shape[0])
    yield Case(f"conv2d_relu {x_shape} {w_shape} {how}", lambda x, w, b: ops.conv2d_relu(x, w, b, **how),
               lambda x, w, b: positive_part(forward(x, w, b)), [x, w, shift_off_zero(forward(x, w))])
    yield Case(f"conv2d_affine {x_shape} {w_shape} {how}", lambda x, w, scale, shift: ops.conv2d_affine(x, w, scale, shift, **how),
               lambda x, w, scale, shift: forward(x, w) * per_channel(scale) + per_channel(shift), [x, w, b, b[::-1]])
    while np.abs(forward(x, w) * per_channel(b) + per_channel(b[::-1]) + dy).min() < 0.05:
        x, b = normal(*x_shape), normal(w_shape[0])
    yield Case(f"conv2d_affine, all of it {x_shape} {w_shape} {how}",
               lambda x, w, scale, shift, plus: ops.conv2d_affine(x, w, scale, shift, plus, rectified=True, **how),
               lambda x, w, scale, shift, plus: positive_part(forward(x, w) * per_channel(scale) + per_channel(shift) + plus),
               [x, w, b, shift_off_zero(forward(x, w) * per_channel(b) + dy), dy])


# ---------------------------------------------------------------- pooling

def pooling(kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], ceil_mode: bool) -> Iterator[Case]:
    """Both pools, and the linear maps that they and their backwards are made of."""
    how: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    shape, windows = (2, 2, 5, 4), Windows.of(**how)
    x = distinct(*shape)
    winner = winners(x, max_pool2d(x, windows), windows)        # the linear maps take any: each names a pixel its window sees
    dy = normal(*winner.shape)

    def pixel(at: tuple[int, ...], tap: int) -> tuple[int, ...]:
        n, c, p, q = at
        i, j = divmod(int(tap), kernel_size[1])
        return n, c, p * stride[0] - padding[0] + i, q * stride[1] - padding[1] + j

    def taken(x: Any, winner: Any) -> Any:
        return np.array([x[pixel(at, tap)] for at, tap in np.ndenumerate(winner)]).reshape(winner.shape)

    def given(dy: Any, winner: Any) -> Any:
        dx = np.zeros(shape)
        for at, tap in np.ndenumerate(winner):
            dx[pixel(at, tap)] += dy[at]
        return dx

    def summed(x: Any) -> Any:
        y = np.zeros(winner.shape)
        for (n, c, p, q), seen, _ in pool_windows(x, **how)[1]:
            y[n, c, p, q] = math.fsum(x[n, c, h, w] for h, w in seen)
        return y

    def spread(dy: Any) -> Any:
        dx = np.zeros(shape)
        for (n, c, p, q), seen, _ in pool_windows(dx, **how)[1]:
            for h, w in seen:
                dx[n, c, h, w] += dy[n, c, p, q]
        return dx

    yield Case(f"max_pool2d {how}", lambda x: ops.max_pool2d(x, **how), lambda x: naive_max_pool(x, **how), [x])
    yield Case(f"avg_pool2d {how}", lambda x: ops.avg_pool2d(x, **how), lambda x: naive_avg_pool(x, **how), [x])
    yield Case(f"take_from_winner {how}", lambda x, i: ops.take_from_winner(x, i, windows), taken, [x], [winner])
    yield Case(f"give_to_winner {how}", lambda dy, i: ops.give_to_winner(dy, i, shape[2:], windows), given, [dy], [winner])
    yield Case(f"window_sum {how}", lambda x: ops.window_sum(x, windows), summed, [x])
    yield Case(f"window_spread {how}", lambda dy: ops.window_spread(dy, shape[2:], windows), spread, [dy])


def adaptive_pooling(to: tuple[int, int]) -> Case:
    return Case(f"adaptive_avg_pool2d {to}", lambda x: ops.adaptive_avg_pool2d(x, to), lambda x: naive_adaptive_avg_pool(x, to),
                [normal(2, 2, 5, 4)])


# ---------------------------------------------------------------- batch norm

def statistics(x: Any) -> tuple[Any, Any]:
    """Running statistics of their own for a call, in x's dtype and where it lives."""
    xp = backend.array_module(x.data if isinstance(x, mc.Tensor) else x)
    return xp.zeros(x.shape[1], x.dtype), xp.ones(x.shape[1], x.dtype)


def batch_norm_at_inference(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
    return (x - per_channel(mean)) / np.sqrt(per_channel(var) + 1e-5) * per_channel(weight) + per_channel(bias)


def normalization() -> Iterator[Case]:
    yield Case("batch_norm in training", lambda x, w, b: ops.batch_norm(x, w, b, *statistics(x), train=True), naive_batch_norm,
               [normal(3, 2, 2, 3) * 2 + 1, normal(2), normal(2)])
    yield Case("batch_norm in training, two values", lambda x, w, b: ops.batch_norm(x, w, b, *statistics(x), train=True, eps=0.1),
               lambda x, w, b: naive_batch_norm(x, w, b, 0.1), [normal(2, 3, 1, 1), normal(3), normal(3)])
    yield Case("batch_norm at inference", lambda x, w, b, mean, var: ops.batch_norm(x, w, b, mean, var, train=False),
               batch_norm_at_inference, [normal(2, 2, 2, 3), normal(2), normal(2)], [normal(2), positive(2)])
    yield Case("normalize", lambda x, w, b: ops.normalize(x, w, b, 1e-3)[0], lambda x, w, b: naive_batch_norm(x, w, b, 1e-3),
               [normal(2, 3, 2, 2), normal(3), normal(3)])
    yield Case("normalize_relu", lambda x, w, b: ops.normalize_relu(x, w, b, 1e-3)[0],
               lambda x, w, b: positive_part(naive_batch_norm(x, w, b, 1e-3)), [normal(2, 3, 2, 2), normal(3), normal(3)])
    yield Case("affine", ops.affine, lambda x, scale, shift: x * per_channel(scale) + per_channel(shift),
               [normal(2, 3, 2, 2), normal(3), normal(3)])


# ---------------------------------------------------------------- activations and losses

def activations() -> Iterator[Case]:
    kept = np.random.default_rng(5).random((3, 4), dtype=np.float32) >= 0.4
    yield Case("relu", ops.relu, loop(lambda v: v if v > 0 else 0.0), [distinct(3, 4)])
    yield Case("add_relu", ops.add_relu, lambda a, b: positive_part(a + b), [distinct(3, 4), normal(3, 4) / 50])
    yield Case("sigmoid", ops.sigmoid, loop(lambda v: 1 / (1 + math.exp(-v))), [normal(3, 4) * 3])
    yield Case("dropout", lambda x: ops.dropout(x, 0.4, train=True, rng=np.random.default_rng(5)), lambda x: x * kept / 0.6,
               [normal(3, 4)])
    yield Case("simam", ops.simam, naive_simam, [normal(2, 3, 3, 2)])
    yield Case("simam of two pixels", lambda x: ops.simam(x, 0.5), lambda x: naive_simam(x, 0.5), [normal(2, 3, 1, 2)])
    yield from map(softmax_along, (-1, 0, 1))
    yield from map(log_softmax_along, (-1, 0, 1))


def softmax_along(axis: int) -> Case:
    return Case(f"softmax {axis}", lambda x: ops.softmax(x, axis), lambda x: naive_softmax(x, axis), [normal(2, 3, 4)])


def log_softmax_along(axis: int) -> Case:
    return Case(f"log_softmax {axis}", lambda x: ops.log_softmax(x, axis), lambda x: naive_log_softmax(x, axis), [normal(2, 3, 4)])


def losses(smoothing: float) -> Case:
    return Case(f"cross_entropy {smoothing}", lambda z, labels: ops.cross_entropy(z, labels, smoothing),
                lambda z, labels: naive_cross_entropy(z, labels, smoothing), [normal(4, 3)], [np.array([2, 0, 2, 1])])


# ---------------------------------------------------------------- all of them

def table() -> Iterator[Case]:
    for part in (arithmetic, elementwise, choosing, products, movement, indexing):
        yield from part()
    yield from convolution((2, 2, 4, 5), (3, 2, 3, 3), padding=1)
    yield from convolution((2, 2, 5, 4), (2, 2, 2, 3), stride=(2, 1), padding=(0, 2), dilation=(2, 1))
    yield from convolution((1, 4, 4, 4), (4, 2, 3, 2), groups=2, stride=2, padding=1)
    yield from convolution((2, 3, 3, 3), (3, 1, 3, 3), groups=3, padding=1)
    yield from convolution((2, 3, 2, 2), (2, 3, 1, 1))
    yield from pooling((2, 2), (2, 2), (0, 0), False)
    yield from pooling((3, 3), (2, 2), (1, 1), False)
    yield from pooling((3, 2), (1, 2), (1, 1), True)
    yield from pooling((2, 3), (3, 2), (0, 1), True)
    yield from map(adaptive_pooling, ((1, 1), (2, 3), (5, 4), (7, 2), (1, 3)))
    yield Case("global_avg_pool2d", ops.global_avg_pool2d, lambda x: naive_adaptive_avg_pool(x, (1, 1))[:, :, 0, 0],
               [normal(2, 3, 3, 2)])
    yield from normalization()
    yield from activations()
    yield from map(losses, (0.0, 0.1, 1.0))
    yield Case("softmax_cross_entropy", ops.softmax_cross_entropy, naive_cross_entropy, [normal(4, 3)], [np.array([2, 0, 2, 1])])


CASES = list(table())
