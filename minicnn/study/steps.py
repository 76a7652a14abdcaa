"""What the report shows of each step and each value, as plain data for the page."""
from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

import minicnn
from minicnn.autograd import Op, Rule
from minicnn.study import differences
from minicnn.study.formulas import FORMULAS, mathml
from minicnn.study.opened import opened
from minicnn.study.pictures import histogram, of_value, of_weight, sampled
from minicnn.study.tape import Host, Step, Tape, Value

PACKAGE = Path(minicnn.__file__).parent.parent


# ---------------------------------------------------------------- operations: the same at every step that runs them
def of_op(op: Op) -> dict[str, Any]:
    """Its equations in MathML, and the source of its forward and its backwards."""
    formula = FORMULAS.get(op.__name__)
    words = formula.says if formula else (inspect.getdoc(op) or "").partition("\n")[0]
    return {"says": words,
            "forward": mathml(formula.forward) if formula else None,
            "backward": {name: mathml(latex) for name, latex in formula.backward.items()} if formula else {},
            "source": source(op.forward),
            "backwards": [{"targets": list(rule.targets), **source(rule.function)} for rule in used(op)]}


def used(op: Op) -> list[Rule]:
    """The backwards that a first-order pass takes: of each argument the first that there is."""
    done: set[str] = set()
    found = []
    for rule in op.rules(create_graph=False):
        if not done.issuperset(rule.targets):
            found.append(rule)
            done.update(rule.targets)
    return found


def source(function: Any) -> dict[str, Any]:
    """The lines of a function as they stand in its file, and where."""
    name = getattr(function, "__name__", repr(function))
    try:
        lines, first = inspect.getsourcelines(function)
        path = Path(inspect.getsourcefile(function) or "")
    except (OSError, TypeError):
        return {"name": name, "where": "", "first": 1, "text": "(its source is in no file that can be read)"}
    where = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
    return {"name": name, "where": where, "first": first, "text": inspect.cleandoc("\n" + "".join(lines)) if lines else ""}


# ---------------------------------------------------------------- values
def of_value_on_page(value: Value) -> dict[str, Any]:
    """Picture and histogram of an array and of the gradient that arrived at it."""
    draw = of_weight if value.kind in ("parameter",) and value.array.ndim > 1 else of_value
    shown: dict[str, Any] = {"name": value.name, "kind": value.kind, "shape": list(value.shape), "bytes": value.nbytes,
                             "type": str(value.array.dtype)}
    for name, array in (("array", value.array), ("grad", value.grad)):
        if array is not None and array.size and array.dtype.kind == "f":
            shown[name] = {"picture": draw(array), "histogram": histogram(array)}
    return shown


# ---------------------------------------------------------------- steps
def outline(step: Step) -> dict[str, Any]:
    """What the list of all steps says of one."""
    return {"op": step.op, "path": step.path, "layer": step.layer, "shape": list(step.output.shape),
            "macs": step.multiply_adds, "forward_ms": 1e3 * step.forward_seconds,
            "backward_ms": None if step.backward_seconds is None else 1e3 * step.backward_seconds}


def of_step(step: Step, rng: np.random.Generator, share: float = 1.0) -> dict[str, Any]:
    """Everything that the page shows of a step by itself.   share: of the numbers with which it is opened up, see `opened`."""
    asked = {name: value for name, value in step.inputs.items() if name in step.input_grads}
    return {
        "inputs": [{"argument": name, "value": v.number, "name": v.name, "kind": v.kind, "made_by": v.made_by,
                    "uses": len(v.used_by), "shape": list(v.shape), "bytes": v.nbytes, "type": str(v.array.dtype)}
                   for name, v in step.inputs.items()],
        "options": {name: _short(option) for name, option in step.options.items() if option is not None},
        "output": {"value": step.output.number, "shape": list(step.output.shape), "bytes": step.output.nbytes,
                   "type": str(step.output.array.dtype)},
        "kept": _kept(step), "kept_bytes": step.kept_bytes,
        "shares": {name: _share(step.input_grads[name], value) for name, value in asked.items() if len(value.used_by) > 1},
        "checks": {name: _checked(step, name, rng) for name in asked},
        "opened": opened(step, share)}


def _share(gradient: Host, value: Value) -> dict[str, Any]:
    """What this step alone gave a value that others use, too."""
    return {"picture": of_value(gradient), "histogram": histogram(gradient)}


def _kept(step: Step) -> list[dict[str, Any]]:
    """What is kept for the backward: as what, for which of the backwards, and why."""
    if not step.kept or step.operation is None:
        return []
    formula = FORMULAS.get(step.op)
    targets = {name.partition("[")[0] for name in step.input_grads or step.inputs}
    rules = [rule for rule in step.operation.rules(create_graph=False) if targets & set(rule.targets)]
    rows = []
    for name, value in step.kept.items():
        is_array = isinstance(value, np.ndarray)
        why = formula.why.get(name) if formula else None
        if why is None:
            why = ("The gradient must have this shape." if name.endswith("_shape") else
                   "" if is_array else "A setting of the call, which the backward needs as well.")
        rows.append({"name": name, "array": is_array, "shape": list(value.shape) if is_array else None,
                     "bytes": value.nbytes if is_array else 0, "says": "" if is_array else _short(value), "why": why,
                     "for": [rule.function.__name__ for rule in rules if name in rule.names],
                     "shared": "the input itself" if name in step.inputs else "the output itself" if name == "y" else ""})
    return sorted(rows, key=lambda row: (not row["array"], row["name"].endswith("_shape"), row["name"]))


def _checked(step: Step, argument: str, rng: np.random.Generator) -> list[list[Any]]:
    """[where, recorded, backward in float64, by differences, step, relative error, right, slopes at a kink] of sampled numbers."""
    shape = step.inputs[argument].shape
    shown = set(sampled(shape[1])) if len(shape) == 4 and step.inputs[argument].kind != "parameter" else None
    among = None if shown is None else lambda at: at[0] == 0 and at[1] in shown
    return [[list(s.at), s.recorded, s.backward, s.numeric, s.step, s.error, s.right, s.kink]
            for s in differences.check(step, argument, rng, among=among)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# ---------------------------------------------------------------- the whole
def dead_units(tape: Tape) -> list[dict[str, Any]]:
    """Of each ReLU, the share of numbers that are 0 and how many channels (or units) are 0 for the whole batch."""
    found = []
    for step in tape.steps:
        if step.op in ("relu", "add_relu", "conv2d_relu", "normalize_relu") and step.output.array.ndim > 1:
            y = step.output.array
            dead = (y == 0).all(axis=(0, *range(2, y.ndim)))
            found.append({"step": step.number, "path": step.path, "zeros": float((y == 0).mean()), "dead": int(dead.sum()),
                          "units": int(dead.size)})
    return found
