"""Writes down what the engine does, while it does it.

The engine tells one `Recorder` of its calls (autograd.py); this one makes a `Tape` of them. A step's forward is timed around the
op's own function, its backwards one by one as the reverse pass asks for them, without what adds the gradients up between.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minicnn.autograd import Key, Node, Op, Recorder, Tensor, watched_by
from minicnn.backend import Array, array_module, device_of, is_array, to_numpy
from minicnn.layers import Layer, fusion
from minicnn.study.tape import Host, LayerCall, Step, Tape, Value


@contextmanager
def record(fused: bool = False) -> Iterator[Tape]:
    """Record every forward and backward that runs inside the block: a Tape, that is filled as it goes.

    fused: let neighbours run as one (`layers.fused`), as they do outside. By default every layer runs by itself, as the list of
    layers is written, so that each has its own steps; the results are the same up to rounding.

    Calls with plain arrays alone are no steps, here as elsewhere. A recording holds copies of all arrays, each as it was when it
    was first used; so record one pass, and let an optimiser step outside of the block.
    """
    tape = Tape()
    with fusion(fused), watched_by(_Writer(tape)):
        yield tape


class _Writer(Recorder):
    """Fills a tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.elapsed = 0.0                                  # of the forward that ran last
        self.by_node: dict[Node, Value] = {}                # where on the engine's tape a value stands
        self.by_array: dict[int, tuple[Any, Value]] = {}    # what has no node, by the array; kept, so that its id stays its own
        self.steps: dict[Node, Step] = {}
        self.inside: list[LayerCall] = []                   # the layers that run now, outermost first
        self.layers: list[Layer] = []                       # the same ones themselves
        self.paths: dict[int, str] = {}                     # of the layers inside the outermost

    # ------------------------------------------------------------ what the engine tells
    def forward(self, op: Op, values: dict[str, Any]) -> Any:
        """Run and time it."""
        _wait_for(values.values())
        began = time.perf_counter()
        result = op.forward(**values)
        _wait_for(values.values())
        self.elapsed = time.perf_counter() - began
        return result

    def called(self, op: Op, values: dict[str, Any], parents: Mapping[Key, Node], extras: Sequence[Any], out: Tensor) -> None:
        """Write the step down."""
        number = len(self.tape.steps)
        call = self.inside[-1] if self.inside else None
        inputs: dict[str, Value] = {}
        options: dict[str, Any] = {}
        for name, value in values.items():
            if is_array(value):
                inputs[name] = self._value(value, parents.get(name), f"{op.__name__}.{name}")
            elif isinstance(value, (list, tuple)) and any(map(is_array, value)):
                for i, part in enumerate(value):
                    inputs[f"{name}[{i}]"] = self._value(part, parents.get((name, i)), f"{op.__name__}.{name}[{i}]")
            else:
                options[name] = value
        for used in {id(v): v for v in inputs.values()}.values():
            used.used_by.append(number)
        path, layer = (call.path, call.layer) if call else ("", "")
        output = self._add(out.data, f"{path}: {op.__name__}" if path else op.__name__, "step", number)
        self._remember(output, out.data, out.node)
        named = {name: _copy(value) for name, value in zip(op.extras, extras, strict=True)}
        step = Step(number, op.__name__, path, layer, inputs, {**op.defaults, **options}, output, named, {},
                    multiply_adds(op.__name__, inputs, output), self.elapsed, operation=op)
        step.options = {name: value for name, value in step.options.items() if name not in inputs}
        if out.node is not None:
            assert out.node.saved is not None
            step.kept = {name: self._kept(step, name, value) for name, value in out.node.saved.items()}
            self.steps[out.node] = step
        self.tape.steps.append(step)

    def pulled(self, node: Node, dy: Any, gradients: Iterator[tuple[Node, Any, bool]]) -> Iterator[tuple[Node, Any, bool]]:
        """Time the backwards, copy what they give, and hand it on."""
        step = self.steps.get(node)
        if step is None:                        # from before the recording
            yield from gradients
            return
        step.output.grad = _copy(dy)
        step.backward_seconds = 0.0
        arguments = {parent: [name for name, value in step.inputs.items() if self.by_node.get(parent) is value]
                     for parent in node.parents.values()}
        first_of = dict.fromkeys(node.parents.values(), 0)
        while True:
            _wait_for([dy])
            began = time.perf_counter()
            found = next(gradients, None)
            _wait_for([dy])
            step.backward_seconds += time.perf_counter() - began
            if found is None:
                break
            parent, g, _ = found
            copied = _copy(g)
            value = self.by_node[parent]
            step.input_grads[arguments[parent][first_of[parent]]] = copied      # x * x names one parent twice
            first_of[parent] += 1
            if parent.op is None:               # a leaf gets its gradient in parts; what a step made is told its whole
                value.grad = copied if value.grad is None else value.grad + copied
            yield found
        self._tell_of_backward(step)

    def layer(self, layer: Layer, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Note which layer runs, from which step to which."""
        if not self.inside:
            self.paths = {id(inner): path for path, inner in reversed([*layer.walk()])}
            for name, parameter in layer.named_parameters().items():
                self._value(parameter.data, parameter.node, name, "parameter")
        known = getattr(layer, "first", layer)              # of layers that run as one, the first
        path = self.paths.get(id(known), self.inside[-1].path if self.inside else "")
        value = self._value(x.data, x.node, "input", "input")
        call = LayerCall(path, type(layer).__name__, len(self.inside), value, first=len(self.tape.steps))
        self.tape.layers.append(call)
        self.inside.append(call)
        try:
            out = run()
        finally:
            self.inside.pop()
        call.behind = len(self.tape.steps)
        call.output = self._value(out.data, out.node, path, "constant")
        self.tape.tell("forward", call)
        return out

    # ------------------------------------------------------------ parts
    def _value(self, array: Array, node: Node | None, name: str, kind: str | None = None) -> Value:
        """The value of this array: known already, or new, by this name."""
        found = self.by_node.get(node) if node is not None else self.by_array.get(id(array), (None, None))[1]
        if found is None:
            kind = kind or ("constant" if node is None else "leaf")
            found = self._add(array, name, kind, None)
            self._remember(found, array, node)
        return found

    def _add(self, array: Array, name: str, kind: str, made_by: int | None) -> Value:
        value = Value(len(self.tape.values), name, kind, _copy(array), made_by=made_by)
        self.tape.values.append(value)
        return value

    def _remember(self, value: Value, array: Array, node: Node | None) -> None:
        if node is not None:
            self.by_node[node] = value
        else:
            self.by_array[id(array)] = (array, value)

    def _kept(self, step: Step, name: str, value: Any) -> Any:
        """What the engine keeps under this name, as the tape has it."""
        if name in step.inputs:
            return step.inputs[name].array
        if name in step.extras:
            return step.extras[name]
        if name == "y":
            return step.output.array
        return _copy(value) if is_array(value) else [_copy(v) for v in value] if _is_list_of_arrays(value) else value

    def _tell_of_backward(self, step: Step) -> None:
        """Of the layers whose first step with a backward this is: they are through."""
        if not self.tape.hooks["backward"]:
            return
        differentiable = {s.number for s in self.steps.values()}
        for call in reversed(self.tape.layers):             # the innermost first
            if call.first <= step.number < call.behind and differentiable.isdisjoint(range(call.first, step.number)):
                self.tape.tell("backward", call)


def _is_list_of_arrays(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_array, value))


def _copy(array: Any) -> Host:
    """On the host, in C order, nobody else's."""
    return np.array(to_numpy(array.data if isinstance(array, Tensor) else array), order="C")


def _wait_for(values: Any) -> None:
    """Where an array lies on a GPU: for what was asked of it before, so that a clock tells of the work."""
    for value in values:
        array = value.data if isinstance(value, Tensor) else value
        if is_array(array) and device_of(array) == "cuda":
            array_module(array).cuda.Device().synchronize()
            return


def multiply_adds(op: str, inputs: Mapping[str, Value], output: Value) -> int:
    """Multiplications (each with its addition) of a forward, in convolutions and matrix products; 0 for other operations."""
    if op.startswith("conv2d") and not op.endswith("_grad"):
        return int(output.array.size * np.prod(inputs["weight"].shape[1:]))
    if op == "linear":
        return int(output.array.size * inputs["weight"].shape[1])
    if op == "matrix_product":
        return int(output.array.size * inputs["a"].shape[-1])
    return 0
