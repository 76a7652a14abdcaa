"""A function of Tensors, seen as a function of NumPy arrays: what a gradient check evaluates and differentiates."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minicnn.autograd import Node, Tensor, grad
from minicnn.backend import Array, array_module, device_of, is_array, to_device, to_numpy

Host = np.ndarray[Any, Any]         # an array of NumPy, wherever the function computes


class GradcheckError(AssertionError):
    """A gradient is wrong, or cannot be checked; the message says which, where, and how to see it again.

    Where one element is the culprit: `input` (its name), `index`, `analytic`, `numeric`, `relative_error`; else None.
    """

    input: str | None = None
    index: tuple[int, ...] | None = None
    analytic: float | None = None
    numeric: float | None = None
    relative_error: float | None = None


class Function:
    """`fn` with the inputs at which it is checked. A point is a list of arrays, one for each floating input.

    Every evaluation gets copies, on the devices where the inputs lie; all results are flat vectors on the host.
    """

    def __init__(self, fn: Callable[..., Any], inputs: Any, names: Sequence[str] | None = None) -> None:
        given = [inputs] if isinstance(inputs, Tensor) or is_array(inputs) else list(inputs)
        self.fn = fn
        self.name = getattr(fn, "__name__", type(fn).__name__).replace("<lambda>", "fn")
        self.given = given
        arrays = [_data(x, i) for i, x in enumerate(given)]
        self.where = [i for i, x in enumerate(arrays) if x.dtype.kind == "f"]
        self.devices = [device_of(arrays[i]) for i in self.where]
        self.point: list[Host] = [np.array(to_numpy(arrays[i]), order="C") for i in self.where]
        self.names = [f"input {i}" if names is None else names[i] for i in self.where]
        if not self.where:
            raise ValueError("none of the inputs is a floating array, so there is no gradient to check")

    def __call__(self, point: Sequence[Host]) -> Host:
        """All outputs in one flat vector."""
        return self.record(point, wanted=()).values()

    def record(self, point: Sequence[Host], wanted: Sequence[int] | None = None, strided: bool = False) -> Record:
        """Call fn; the floating inputs in `wanted` (all by default) are leaves of the tape.

        strided: hand over arrays whose elements are neither in C order nor next to each other.
        """
        arguments = list(self.given)                        # those that are not floating go in as they came
        leaves = []
        for n, (i, values) in enumerate(zip(self.where, point, strict=True)):
            leaf = Tensor(_on_device(values, self.devices[n], strided), requires_grad=wanted is None or n in wanted)
            arguments[i] = leaf
            leaves.append(leaf)
        return Record(leaves, self.outputs_of(arguments), strided)

    def outputs_of(self, arguments: Sequence[Any]) -> list[Tensor]:
        """What fn returns for these Tensors, as a list. TypeError where that is not made of floating Tensors."""
        returned = self.fn(*arguments)
        outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        for i, y in enumerate(outputs):
            if not isinstance(y, Tensor) or y.dtype.kind != "f":
                kind = f"a Tensor of {y.dtype}" if isinstance(y, Tensor) else f"of type {type(y).__name__}"
                raise TypeError(f"{self.name} returned an output {i} that is {kind}; to be checked it must return a floating "
                                "Tensor or a tuple of them, e.g. lambda x: my_op(x)[0]")
        if not outputs:
            raise TypeError(f"{self.name} returned an empty tuple; to be checked it must return a Tensor or a tuple of them")
        return outputs


class Record:
    """A recorded call: its leaves, its outputs, and the gradients that come back from the one to the other."""

    def __init__(self, leaves: list[Tensor], outputs: list[Tensor], strided: bool) -> None:
        self.leaves, self.outputs, self.strided = leaves, outputs, strided

    def values(self) -> Host:
        return np.concatenate([to_numpy(y.data).ravel() for y in self.outputs])

    def gradients(self, dy: Host, wanted: Sequence[int] | None = None, create_graph: bool = False) -> list[Host]:
        """d<outputs, dy> / d(leaf) for the leaves in `wanted` (all by default); dy is flat. The graph is kept."""
        ends = np.cumsum([y.size for y in self.outputs])
        seeds = []
        for y, end in zip(self.outputs, ends, strict=True):
            seed = _on_device(dy[end - y.size:end].reshape(y.shape), device_of(y.data), self.strided)
            if isinstance(seed, np.ndarray):
                seed.flags.writeable = False        # a backward may only read it
            seeds.append(Tensor(seed))
        leaves = self.leaves if wanted is None else [self.leaves[n] for n in wanted]
        try:
            found = grad(self.outputs, leaves, seeds, create_graph=create_graph, retain_graph=True)
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            raise GradcheckError("a backward writes into the output gradient it was given, which others may hold too; "
                                 "it must make a new array (dy * mask, not dy *= mask)") from error
        return [np.array(g.numpy()) for g in found]

    def nodes(self) -> Iterator[Node]:
        """Every node of the tape behind the outputs."""
        stack = [y.node for y in self.outputs if y.node is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            yield node
            fresh = set(node.parents.values()) - seen
            seen |= fresh
            stack.extend(fresh)


def gradient_map(function: Function, rng: np.random.Generator) -> Function:
    """(inputs, output gradients) -> gradients of the inputs: the function whose gradient is the second derivative.

    The output gradients are drawn at random, and are inputs like the others: their gradients are checked too.
    """
    count, outputs = len(function.given), function.record(function.point, wanted=()).outputs
    seeds = [to_device(signed(rng, y.shape), device_of(y.data)) for y in outputs]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = list(tensors[:count])
        for i in function.where:
            inputs[i] = inputs[i] if inputs[i].requires_grad else Tensor(inputs[i].data, requires_grad=True)
        outputs = function.outputs_of(inputs)
        return tuple(grad(outputs, [inputs[i] for i in function.where], list(tensors[count:]), create_graph=True))

    names = ["a constant"] * count
    for i, name in zip(function.where, function.names, strict=True):
        names[i] = name
    names += [f"output gradient {i}" for i in range(len(seeds))] if len(seeds) > 1 else ["the output gradient"]
    gradients.__name__ = f"the gradient of {function.name}"
    return Function(gradients, [*function.given, *seeds], names)


def signed(rng: np.random.Generator, shape: tuple[int, ...]) -> Host:
    """Random numbers of either sign between 0.5 and 1.5: no element is so small that its error would not show."""
    return np.asarray(rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape))


def typical(x: Host) -> float:
    """The size of the numbers (root mean square); 1 for zeros, and for none."""
    size = float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
    return size if size > 0.0 else 1.0


def _data(x: Any, position: int) -> Array:
    data = x.data if isinstance(x, Tensor) else x
    if not is_array(data):
        raise TypeError(f"input {position} is of type {type(x).__name__}; inputs are Tensors or arrays, and what is neither "
                        "belongs into the function: lambda x: my_op(x, 2)")
    if data.dtype.kind == "f" and data.dtype != np.float64:
        raise TypeError(f"input {position} is of {data.dtype}, whose rounding drowns a difference: check the function in float64, "
                        "with array.astype('float64')")
    return data


def _on_device(values: Host, device: str, strided: bool) -> Array:
    """A copy of its own, on the device."""
    copy = to_device(np.array(values, order="C"), device)
    if not strided or not values.ndim:
        return copy
    spread = array_module(copy).zeros((*values.shape[::-1], 2), copy.dtype)
    view = spread[..., 0].T
    view[...] = copy
    return view
