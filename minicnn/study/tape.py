"""What a recording holds, as plain data: values (NumPy arrays), the steps that made them, the layers that ran them.

A tape is written by `recording.py`. It holds copies: what the program does to its own arrays later leaves it as it is.
"""
from __future__ import annotations

import fnmatch
import html
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minicnn.autograd import Op

Host = np.ndarray[Any, Any]


@dataclass(eq=False)
class Value:
    """An array of the pass, and the gradient that came back to it."""

    number: int                     # its place in tape.values
    name: str                       # "input", "layer1.0.conv1.weight", "layer1.0.conv1: conv2d"
    kind: str                       # "input" of the model, "parameter" of a layer, "leaf", "constant", or "step": made by one
    array: Host
    grad: Host | None = None        # dL/d(array), summed over all its uses; None where no gradient was asked for
    made_by: int | None = None      # number of the step
    used_by: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name} {self.array.dtype}{self.shape}>"


@dataclass(eq=False)
class Step:
    """One operation that ran, and what its backwards did when they ran last."""

    number: int                     # in order of the forward
    op: str                         # "conv2d"
    path: str                       # of the layer that called it, "layer1.0.conv1"; "" outside of any
    layer: str                      # that layer's class, "Conv2d"; "" outside of any
    inputs: dict[str, Value]        # by argument; one inside a list is "arrays[0]"
    options: dict[str, Any]         # the arguments that are no arrays: stride, padding, ...
    output: Value
    extras: dict[str, Host]         # further outputs, kept for the backward
    kept: dict[str, Any]            # what the engine keeps for the backward: arrays, shapes, options; {} where there will be none
    multiply_adds: int              # of the forward; 0 outside of convolutions and matrix products
    forward_seconds: float
    backward_seconds: float | None = None                           # of all its backwards together; None: none ran
    input_grads: dict[str, Host] = field(default_factory=dict)      # what its backwards gave each argument
    operation: Op | None = None                                     # the engine's op itself: its forward, its backwards

    @property
    def grad(self) -> Host | None:
        """The output gradient that its backwards were given, dL/d(output)."""
        return self.output.grad

    @property
    def kept_bytes(self) -> int:
        """Bytes of the arrays that are kept for the backward."""
        return sum(v.nbytes for v in self.kept.values() if isinstance(v, np.ndarray))

    def __repr__(self) -> str:
        where = f" in {self.path} ({self.layer})" if self.layer else ""
        return f"<step {self.number}: {self.op}{where} -> {self.output.shape}>"


@dataclass(eq=False)
class LayerCall:
    """One call of a layer: what went in, what came out, and the steps between, those of layers inside included."""

    path: str
    layer: str                      # its class
    depth: int                      # how many layers it stands inside
    input: Value
    output: Value | None = None
    first: int = 0                  # number of its first step
    behind: int = 0                 # number behind its last; equal to `first` for a layer that only passes on its input

    def __repr__(self) -> str:
        ends = f"{self.input.shape} -> {self.output.shape if self.output is not None else '?'}"
        return f"<layer {self.path or '(model)'} ({self.layer}) {ends}, steps {self.first} to {self.behind - 1}>"


Hook = Callable[[LayerCall], None]


class Tape:
    """Everything that ran inside `with record() as tape`: `.steps`, `.values`, `.layers`, in order of the forward."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.layers: list[LayerCall] = []
        self.hooks: dict[str, list[tuple[str, Hook]]] = {"forward": [], "backward": []}

    # ------------------------------------------------------------ hooks on layers
    def on_forward(self, pattern: str, hook: Hook) -> Hook:
        """Call hook(layer_call) behind each forward of the layers whose path fits: "layer1.0.conv1", "layer1.*", "*conv?", "" (the
        model itself). It has .input and .output. Returns the hook."""
        self.hooks["forward"].append((pattern, hook))
        return hook

    def on_backward(self, pattern: str, hook: Hook) -> Hook:
        """Call hook(layer_call) behind the backwards of the first of its steps, when .output.grad is complete, and the gradients of
        its parameters have arrived (.input.grad may still grow where the input is used elsewhere, too). Returns the hook."""
        self.hooks["backward"].append((pattern, hook))
        return hook

    def tell(self, which: str, call: LayerCall) -> None:
        """Call the hooks whose pattern fits this call's path."""
        for pattern, hook in self.hooks[which]:
            if fnmatch.fnmatchcase(call.path, pattern):
                hook(call)

    # ------------------------------------------------------------ looking things up
    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def steps_of(self, path: str) -> list[Step]:
        """The steps of the layer of that path, and of those inside it."""
        return [step for step in self.steps if step.path == path or step.path.startswith(f"{path}.") or not path]

    def __repr__(self) -> str:
        back = sum(step.backward_seconds is not None for step in self.steps)
        return f"<tape of {len(self.steps)} steps, {back} with a backward>"

    def _repr_html_(self) -> str:
        """For a notebook: a line a step."""
        head = ("", "step", "layer", "output", "norm", "norm of its gradient", "kept, bytes", "forward, ms", "backward, ms")
        lines = [(str(s.number), s.op, s.path, " x ".join(map(str, s.output.shape)) or "scalar",
                  _norm(s.output.array), _norm(s.grad), f"{s.kept_bytes:,}", f"{1e3 * s.forward_seconds:.2f}",
                  "" if s.backward_seconds is None else f"{1e3 * s.backward_seconds:.2f}") for s in self.steps]
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        opened = " open" * (len(lines) <= 30)
        return (f"<details{opened}><summary>{html.escape(repr(self))}</summary><table><thead><tr>"
                f"{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{rows}</tbody></table></details>")

    # ------------------------------------------------------------ out
    def to_data(self, arrays: bool = False) -> dict[str, Any]:
        """The tape as dicts, lists, numbers and strings.

        arrays: with every number of every array; otherwise shape, type, smallest, largest, mean and Euclidean norm of each.
        """
        def described(array: Host | None) -> Any:
            return None if array is None else _described(array, arrays)
        return {
            "values": [{"number": v.number, "name": v.name, "kind": v.kind, "made_by": v.made_by, "used_by": v.used_by,
                        "array": described(v.array), "grad": described(v.grad)} for v in self.values],
            "steps": [{"number": s.number, "op": s.op, "path": s.path, "layer": s.layer,
                       "inputs": {name: v.number for name, v in s.inputs.items()},
                       "options": {name: _plain(option) for name, option in s.options.items()},
                       "output": s.output.number, "extras": {name: described(a) for name, a in s.extras.items()},
                       "kept": {name: described(k) if isinstance(k, np.ndarray) else _plain(k) for name, k in s.kept.items()},
                       "kept_bytes": s.kept_bytes, "multiply_adds": s.multiply_adds, "forward_seconds": s.forward_seconds,
                       "backward_seconds": s.backward_seconds,
                       "input_grads": {name: described(g) for name, g in s.input_grads.items()}} for s in self.steps],
            "layers": [{"path": c.path, "layer": c.layer, "depth": c.depth, "input": c.input.number,
                        "output": None if c.output is None else c.output.number, "first": c.first, "behind": c.behind}
                       for c in self.layers]}

    def to_json(self, arrays: bool = False, indent: int | None = None) -> str:
        """`to_data` as JSON. What is no finite number is the string "nan", "inf" or "-inf"."""
        return json.dumps(self.to_data(arrays), allow_nan=False, indent=indent)

    def to_dot(self) -> str:
        """The steps as a graph for Graphviz: an arrow from each step to those that use what it made, parameters left out.

        `dot -Tsvg tape.dot > tape.svg` draws it.
        """
        lines = ["digraph tape {", '  node [shape=box, style=rounded, fontname="sans-serif"];', '  edge [fontname="sans-serif"];']
        starts = {v.number: v for s in self.steps for v in s.inputs.values() if v.kind in ("input", "leaf")}
        lines += [f"  v{n} [shape=ellipse, label={_quoted(v.name)}];" for n, v in starts.items()]
        for step in self.steps:
            lines.append(f"  s{step.number} [label={_quoted(step.op, step.path)}];")
            for value in step.inputs.values():
                tail = f"s{value.made_by}" if value.made_by is not None else f"v{value.number}" if value.number in starts else None
                if tail:
                    lines.append(f"  {tail} -> s{step.number} [label={_quoted(' x '.join(map(str, value.shape)) or 'scalar')}];")
        return "\n".join([*lines, "}", ""])


# ---------------------------------------------------------------- in plain words and numbers
def _described(array: Host, numbers: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if array.size:
        wide = array.astype(np.float64)
        about |= {"min": _number(wide.min()), "max": _number(wide.max()), "mean": _number(wide.mean()),
                  "norm": _number(np.linalg.norm(wide))}
    if numbers:
        about["numbers"] = [_plain(x) for x in array.ravel().tolist()]
    return about


def _norm(array: Host | None) -> str:
    return "" if array is None else f"{np.linalg.norm(array.astype(np.float64)):.4g}"


def _number(x: Any) -> float | str:
    return float(x) if math.isfinite(x) else str(float(x))


def _plain(value: Any) -> Any:
    """What JSON knows: numbers, strings, lists; anything else by its repr."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _described(value, numbers=True)
    return repr(value)


def _quoted(*lines: str) -> str:
    """A string of Graphviz's, in quotes, whatever is in it."""
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines if line)
    return '"' + "\\n".join(escaped) + '"'
