"""The gradient of one step, checked by differences in float64: sampled numbers, each with its estimate and its step size.

What is checked is the step by itself: with the output gradient dy that the pass brought, the gradient of an argument must be the
slope of <dy, forward(argument)>. The forward is the engine's own, evaluated at the recorded numbers in float64, ahead and back;
`testing.differences` chooses the length of the step and knows a kink. Beside it stands what the engine's backward gives on the
same float64 numbers, and the number that the pass itself recorded, with the rounding of its own type.

One number moves few outputs: through a 3x3 convolution at most nine pixels of each channel. So the forward is evaluated on the
part of the step that the number can move, which is the same slope for much less work (`PARTS`).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn.autograd import Op, Tensor, grad
from minicnn.study.tape import Host, Step
from minicnn.testing.differences import Comparison, Slopes, bounds, shortest_for
from minicnn.testing.function import typical

SAMPLES = 32
Index = tuple[int, ...]


class Sample(NamedTuple):
    """One number of a gradient, and what differences say of it."""

    at: Index                           # in the array of the argument
    recorded: float                     # by the pass itself, in its own type
    backward: float                     # by the same backward in float64
    numeric: float                      # by differences of the forward in float64
    step: float                         # how far the number was moved, ahead and back
    error: float                        # |backward - numeric| over the larger of the two
    right: bool                         # they agree; at a kink: the backward lies between the slopes on either side
    kink: tuple[float, float] | None    # at a kink, the slopes back and ahead


class Part(NamedTuple):
    """A step on fewer numbers: the arguments of its forward, where the moved number is in its argument, and dy."""

    arguments: dict[str, Any]
    at: Index
    dy: Host


# ---------------------------------------------------------------- what is checked
def check(step: Step, argument: str, rng: np.random.Generator, count: int = SAMPLES,
          among: Callable[[Index], bool] | None = None) -> list[Sample]:
    """Check `count` numbers of a step's gradient in one argument, all where it has fewer; drawn at random, the largest with them.

    among: which numbers half of them are to be drawn from, those that a picture shows.
    """
    gradient = step.input_grads[argument]
    chosen = _drawn(gradient, rng, count, among)
    whole, scale = _whole(step), typical(step.inputs[argument].array)
    return [_sample(step, argument, index, whole, scale, rng) for index in chosen]


def _drawn(gradient: Host, rng: np.random.Generator, count: int, among: Callable[[Index], bool] | None) -> list[Index]:
    if gradient.size <= count:
        return [tuple(map(int, index)) for index in np.ndindex(gradient.shape)]
    largest = max(int(gradient.argmax()), int(gradient.argmin()), key=lambda i: abs(float(gradient.flat[i])))
    drawn = [largest, *map(int, rng.integers(gradient.size, size=40 * count)), *range(count)]
    indices = [tuple(int(n) for n in np.unravel_index(i, gradient.shape)) for i in dict.fromkeys(drawn)]
    shown = [] if among is None else [index for index in indices if among(index)][:count // 2]
    return sorted(list(dict.fromkeys([indices[0], *shown, *indices]))[:count])


def _sample(step: Step, argument: str, index: Index, whole: dict[str, Any], scale: float, rng: np.random.Generator) -> Sample:
    assert step.operation is not None and step.grad is not None
    narrow = PARTS.get(step.op, _all_of_it)(step, argument, index, whole)
    part = Part({name: _wide(value) for name, value in narrow.arguments.items()}, narrow.at, _wide(narrow.dy))
    forward, backward = _functions(step.operation, argument, part)
    name, _, position = argument.partition("[")
    point = part.arguments[name][int(position[:-1])] if position else part.arguments[name]
    x = abs(float(point[part.at]))
    comparison = Comparison(forward, [point], part.dy.ravel(), backward, rng, eps=1e-6, rtol=1e-5, atol=1e-7)
    direction = np.zeros(point.shape)
    direction[part.at] = scale
    finding = comparison.judge({0: direction}, shortest_for(x, scale))
    slopes, right, at_kink = finding.slopes, finding.right, finding.kink
    if not right and not at_kink:               # a kink may lie so near that only a shorter step stays on this side of it
        steps = [1e-8, 1e-9, 1e-10, 1e-11, 1e-9 * x / scale]        # the last: no other number of float32 is as near as that
        closer = [comparison.walk({0: direction}, step) for step in steps if step]
        slopes = next((shorter for shorter in closer if _same(shorter)), closer[-1])
        right = _same(slopes)
        at_kink = not right and slopes.corner > 1e-3 * slopes.size      # it sits on one, and another is near
    kink = None
    analytic, numeric = slopes.analytic / scale, slopes.numeric / scale
    if at_kink:
        kink = float(slopes.back.sum() / scale), float(slopes.ahead.sum() / scale)
        lower, upper = bounds(slopes)
        slack = 1e-5 * max(abs(lower), abs(upper))
        right = lower - slack <= slopes.analytic <= upper + slack
    largest = max(abs(analytic), abs(numeric))
    return Sample(index, float(step.input_grads[argument][index]), analytic, numeric, slopes.step * scale,
                  abs(analytic - numeric) / largest if largest else 0.0, bool(right), kink)


def _same(slopes: Slopes) -> bool:
    """Whether a very short step confirms the gradient: up to what rounding does to the outputs that move."""
    apart = abs(slopes.analytic - slopes.numeric)
    return bool(apart <= 1e-5 * max(abs(slopes.analytic), abs(slopes.numeric)) + 1e-6 * slopes.size)


def _functions(operation: Op, argument: str, part: Part) -> tuple[Callable[..., Host], Callable[..., list[Host]]]:
    """The op as a function of one argument alone, and the gradient of that argument by the op's own backward."""
    name, _, position = argument.partition("[")

    def arguments(values: Any) -> dict[str, Any]:
        if not position:
            return {**part.arguments, name: values}
        parts = list(part.arguments[name])
        parts[int(position[:-1])] = values
        return {**part.arguments, name: parts}

    def forward(point: Any) -> Host:
        y = operation.forward(**arguments(point[0]))
        return np.ravel(y[0] if operation.extras else y)

    def backward(dy: Host) -> list[Host]:
        values = part.arguments[name]
        leaf = Tensor(values[int(position[:-1])] if position else values, requires_grad=True)
        y = operation(**arguments(leaf))
        y = y[0] if operation.extras else y
        return [g.numpy() for g in grad(y, leaf, dy.reshape(y.shape))]

    return forward, backward


def _whole(step: Step) -> dict[str, Any]:
    """The arguments of a step as its forward takes them; a list of arrays as a list."""
    found: dict[str, Any] = {}
    for name, value in step.inputs.items():
        base, _, position = name.partition("[")
        if position:
            found.setdefault(base, []).append(value.array)
        else:
            found[name] = value.array
    return {**step.options, **found}


def _wide(value: Any) -> Any:
    """Floating arrays in float64; all else as it is."""
    if isinstance(value, list):
        return [_wide(v) for v in value]
    return value.astype(np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


# ---------------------------------------------------------------- the part of a step that one number can move
def _all_of_it(step: Step, argument: str, index: Index, whole: dict[str, Any]) -> Part:
    assert step.grad is not None
    arrays = [v for v in whole.values() if isinstance(v, np.ndarray)]
    one_for_one = step.op in ONE_FOR_ONE and all(a.shape == step.output.shape for a in arrays)
    if one_for_one:
        single = {name: v[index].reshape(1) if isinstance(v, np.ndarray) else v for name, v in whole.items()}
        return Part(single, (0,), step.grad[index].reshape(1))
    return Part(whole, index, step.grad)


ONE_FOR_ONE = {"relu", "add_relu", "sigmoid", "tanh", "exp", "log", "sqrt", "neg", "add", "sub", "mul", "div", "power", "where",
               "maximum", "minimum"}


def _of_convolution(step: Step, argument: str, index: Index, whole: dict[str, Any]) -> Part:
    """Of x one channel around the pixel, with the outputs that see it; of a weight its channel and its filter."""
    assert step.grad is not None
    x, weight, options = whole["x"], whole["weight"], step.options
    pairs = {name: np.broadcast_to(options[name], 2) for name in ("stride", "padding", "dilation")}
    per_group, filters = weight.shape[1], len(weight) // options["groups"]
    plain = {**options, "groups": 1, "bias": None}
    if argument == "x":
        n, c, *pixel = index
        group = c // per_group
        first, last, rows = [], [], []
        for axis in (0, 1):
            s, p, d, k = *(int(pairs[name][axis]) for name in ("stride", "padding", "dilation")), weight.shape[2 + axis]
            outs = [o for o in range(step.output.shape[2 + axis]) if (pixel[axis] + p - o * s) in range(0, d * k, d)]
            if not outs:                # a stride steps over this pixel: nothing depends on it
                return Part(whole, index, step.grad)
            first.append(outs[0])
            last.append(outs[-1])
            rows.append(np.arange(outs[0] * s - p, outs[-1] * s - p + d * (k - 1) + 1))
        seen = _with_zeros(x[n, c], *rows)[None, None]
        at = (0, 0, pixel[0] - int(rows[0][0]), pixel[1] - int(rows[1][0]))
        mine = slice(group * filters, (group + 1) * filters)
        dy = step.grad[n:n + 1, mine, first[0]:last[0] + 1, first[1]:last[1] + 1]
        # Outputs between those that see the pixel are computed as well, at the same stride, and do not move.
        one = slice(c % per_group, c % per_group + 1)
        return Part({**plain, "x": seen, "weight": weight[mine, one], "padding": 0}, at, dy)
    k = index[0]
    c = (k // filters) * per_group + (index[1] if argument == "weight" else 0)
    one = slice(index[1], index[1] + 1) if argument == "weight" else slice(0, 1)
    part = {**plain, "x": x[:, c:c + 1], "weight": weight[k:k + 1, one]}
    if argument == "bias":
        part["bias"] = whole["bias"][k:k + 1]
    return Part(part, (0, 0, *index[2:]) if argument == "weight" else (0,), step.grad[:, k:k + 1])


def _with_zeros(plane: Host, rows: Host, columns: Host) -> Host:
    """These rows and columns of a plane, zeros where they are outside of it."""
    inside = [(at >= 0) & (at < n) for at, n in zip((rows, columns), plane.shape, strict=True)]
    found = np.zeros((len(rows), len(columns)))
    found[np.ix_(*inside)] = plane[np.ix_(rows[inside[0]], columns[inside[1]])]
    return found


def _of_linear(step: Step, argument: str, index: Index, whole: dict[str, Any]) -> Part:
    """One input of one image with all outputs, one weight with all images."""
    assert step.grad is not None
    x, weight, dy = whole["x"], whole["weight"], step.grad
    if argument == "x":
        n, i = index
        return Part({"x": x[n:n + 1, i:i + 1], "weight": weight[:, i:i + 1], "bias": None}, (0, 0), dy[n:n + 1])
    k, i = index[0], index[1] if argument == "weight" else 0
    bias = whole["bias"][k:k + 1] if argument == "bias" else None
    part = {"x": x[:, i:i + 1], "weight": weight[k:k + 1, i:i + 1], "bias": bias}
    return Part(part, (0, 0) if argument == "weight" else (0,), dy[:, k:k + 1])


def _of_channels(step: Step, argument: str, index: Index, whole: dict[str, Any]) -> Part:
    """Each channel by itself: (N, C, H, W) with (C,)."""
    assert step.grad is not None
    c = index[1] if argument == "x" else index[0]
    part = {name: v[:, c:c + 1] if isinstance(v, np.ndarray) and v.ndim == 4 else v[c:c + 1] if isinstance(v, np.ndarray) else v
            for name, v in whole.items()}
    return Part(part, (index[0], 0, *index[2:]) if argument == "x" else (0,), step.grad[:, c:c + 1])


def _of_planes(step: Step, argument: str, index: Index, whole: dict[str, Any]) -> Part:
    """Each channel of each image by itself."""
    assert step.grad is not None
    n, c, *pixel = index
    return Part({**whole, "x": whole["x"][n:n + 1, c:c + 1]}, (0, 0, *pixel), step.grad[n:n + 1, c:c + 1])


PARTS: dict[str, Callable[[Step, str, Index, dict[str, Any]], Part]] = {
    "conv2d": _of_convolution, "linear": _of_linear, "normalize": _of_channels, "normalize_relu": _of_channels,
    "affine": _of_channels, "max_of_windows": _of_planes, "window_sum": _of_planes}
