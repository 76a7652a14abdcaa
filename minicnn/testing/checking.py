"""gradcheck, gradgradcheck and check_layer: is a gradient the derivative of what its forward computes?

    @mc.op
    def cube(x):
        return x * x * x

    @cube.backward("x")
    def cube_dx(dy, x):
        return dy * x * x * 3.0

    mc.testing.gradcheck(cube, np.array([1.0, -2.0]))           # True, or a GradcheckError that says what is wrong
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.autograd import Tensor
from minicnn.backend import to_device
from minicnn.layers import Layer
from minicnn.testing.consistency import FEW, check_consistency, check_outputs, groups, point_beside
from minicnn.testing.differences import ENOUGH, Comparison, Culprit
from minicnn.testing.function import Function, GradcheckError, Host, gradient_map, signed

DIRECTIONS = 2      # random directions an input, where there are few inputs


class Report(NamedTuple):
    """What a check that passed saw."""

    inputs: int                 # arrays whose gradient was compared
    elements: int               # numbers in them
    kinks: int                  # of these, kept out because the function has a corner there
    worst: float                # relative error among what was compared


def gradcheck(fn: Callable[..., Any], inputs: Any, *, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0,
              elementwise: bool = False, raise_exception: bool = True) -> bool:
    """Compare the gradients of fn with differences of its outputs, in float64; True where they agree.

    fn: takes the inputs as Tensors and returns a Tensor or a tuple of them, the same for the same inputs.
    inputs: a Tensor or array, or a list. The gradient of every floating one is checked, each on its own and all jointly.
    eps: the first step, relative to the size of each input's numbers.
    rtol, atol: agreement is |a - b| <= rtol max(|a|, |b|) + atol, where atol counts for less in a function of small numbers.
    seed: of the output gradient and the directions, which are random.
    elementwise: look at every element, not at random directions through all of them (two evaluations an element).
    raise_exception: False returns False instead of raising GradcheckError.

    Elements at kinks (ReLU at 0, equal candidates of a maximum) are kept out, but must lie between the slopes on both sides.
    Refused as well: a fn that is random or changes its inputs; gradients that depend on earlier calls or on the memory layout, or
    are not linear in the output gradient; a fused backward that differs from the composed one; a gradient that is right at these
    inputs and wrong beside them. Errors of the engine, such as a gradient of the wrong shape, come through as they are.
    """
    call = _call("gradcheck(fn, inputs", eps, rtol, atol, seed)
    return _verdict(lambda: check(Function(fn, inputs), eps, rtol, atol, seed, elementwise, call), raise_exception)


def gradgradcheck(fn: Callable[..., Any], inputs: Any, *, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0,
                  elementwise: bool = False, raise_exception: bool = True) -> bool:
    """The same for second derivatives: gradcheck of the map (inputs, output gradient) -> gradients that create_graph=True gives.

    It takes the first derivatives as they are; gradcheck says whether they are right.
    """
    call = _call("gradgradcheck(fn, inputs", eps, rtol, atol, seed)
    return _verdict(lambda: check_second(Function(fn, inputs), eps, rtol, atol, seed, elementwise, call), raise_exception)


def check_layer(layer: Layer, in_shape: Sequence[int], *, train: bool = False, second_order: bool = False, batch: int = 3,
                eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0, elementwise: bool = False,
                raise_exception: bool = True) -> bool:
    """gradcheck of a layer or a whole model, built or not: its input and every parameter, by name (`layer1.0.conv1.weight`).

    in_shape: of one image, (C, H, W) or (features,).   train: as in layer(x, train=...).   second_order: gradgradcheck instead.
    batch: how many random images.   The others are gradcheck's.

    A copy in float64 is checked; the layer stays as it is. The copy's parameters and statistics are moved a little at random, since
    a weight of 1 or a bias of 0 hides errors. Every evaluation begins with the same statistics and random numbers.
    """
    call = _call(f"check_layer(layer, {tuple(in_shape)}, train={train}" + (", second_order=True" if second_order else ""),
                 eps, rtol, atol, seed)
    order = check_second if second_order else check
    return _verdict(lambda: order(layer_function(layer, in_shape, train, batch, seed), eps, rtol, atol, seed, elementwise, call),
                    raise_exception)


# ---------------------------------------------------------------- the check
def check(function: Function, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0, elementwise: bool = False,
          call: str = "") -> Report:
    """Raise GradcheckError, or report what was compared. `call`: the code that repeats this."""
    rng = np.random.default_rng(seed)
    dy = signed(rng, check_outputs(function).shape)
    check_consistency(function, dy, rng, rtol)

    def compare(point: list[Host], dy: Host) -> Comparison:
        record = function.record(point)
        return Comparison(function, point, dy, record.gradients, rng, eps=eps, rtol=rtol, atol=atol)

    comparison = compare(function.point, dy)
    _compare_all(comparison, [[i] for i in range(len(function.point))], elementwise)
    if comparison.culprits:
        raise _wrong_element(function, comparison, seed, call)
    _check_kinks(function, comparison, seed, call)

    with np.errstate(all="ignore"):
        beside = _beside(function, compare, rng)
    if beside is not None:
        _compare_all(beside, groups(len(function.point), rng))
        if beside.culprits:
            raise _wrong_element(function, beside, seed, call, ", where the inputs are moved by about 1 % (as given it is right: "
                                 "are they special, or does a backward use numbers of another call?)")
    kinks = sum(map(len, comparison.kinks.values()))
    return Report(len(function.point), sum(x.size for x in function.point), kinks, comparison.worst)


def check_second(function: Function, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7, seed: int = 0,
                 elementwise: bool = False, call: str = "") -> Report:
    """The same for second derivatives."""
    return check(gradient_map(function, np.random.default_rng([seed, 2])), eps, rtol, atol, seed, elementwise, call)


def _compare_all(comparison: Comparison, groups: Sequence[Sequence[int]], elementwise: bool = False) -> None:
    """Each group of inputs on its own, then all jointly; where a group disagrees, each of its elements."""
    inputs = range(len(comparison.point))
    if elementwise:
        for i in inputs:
            for element in range(comparison.point[i].size):
                comparison.look_at(i, element)
        return
    directions = DIRECTIONS if len(inputs) <= FEW else 1
    comparison.suspects = [i for group in groups if not all(comparison.along(group) for _ in range(directions)) for i in group]
    if not comparison.suspects and not comparison.along(inputs):
        comparison.suspects = list(inputs)
    for i in comparison.suspects:
        comparison.search(i)


def _check_kinks(function: Function, comparison: Comparison, seed: int, call: str) -> None:
    for i, elements in comparison.kinks.items():
        if len(elements) == comparison.point[i].size:
            raise GradcheckError(f"{function.name}: every element of {function.names[i]} is at a kink, so nothing of its gradient "
                                 f"can be compared: move the inputs off it (seed {seed})")
    together = comparison.kinks_together()
    if together is None or together.right:
        return
    kinked = ", ".join(f"{function.names[i]} at {_indices(comparison, i)}" for i in comparison.kinks)
    slopes = together.slopes
    raise GradcheckError(
        f"{function.name}: at a kink ({kinked}) the gradient is given to too many or too few: where these elements move together, "
        f"the slope is {slopes.analytic:.9g} by backward, {slopes.numeric:.9g} by differences "
        f"(step {slopes.step:.1e}, seed {seed}). {_again(call)}".strip())


def _beside(function: Function, compare: Callable[..., Comparison], rng: np.random.Generator) -> Comparison | None:
    """A comparison at a point near by, if the function is defined there."""
    try:
        point = point_beside(function.point, rng)
        comparison = compare(point, signed(rng, function(point).shape))
    except Exception:       # the function may refuse that point
        return None
    finite = all(np.isfinite(values).all() for values in (comparison.here, *comparison.gradients))
    return comparison if finite else None


# ---------------------------------------------------------------- what is said
def _wrong_element(function: Function, comparison: Comparison, seed: int, call: str, beside: str = "") -> GradcheckError:
    worst = max(comparison.culprits, key=lambda c: c.error)
    name, size = function.names[worst.input], comparison.point[worst.input].size
    wrong = [c for c in comparison.culprits if c.input == worst.input]
    at_least = "at least " if len(comparison.culprits) >= ENOUGH and len(wrong) < size else ""
    error = GradcheckError(
        f"{function.name}: the gradient of {name} is wrong at {worst.where}: {worst.analytic:.9g} by backward, {_expected(worst)} "
        f"(relative error {worst.error:.1e}, step {worst.step:.1e}, seed {seed}){beside}; {at_least}{len(wrong)} of its {size} "
        f"elements {'is' if len(wrong) == 1 else 'are'} wrong{_pattern(wrong)}{_others(function, comparison, worst.input)}. "
        f"{_again(call)}".strip())
    error.input, error.index, error.analytic, error.numeric = name, worst.where, worst.analytic, worst.numeric
    error.relative_error = worst.error
    return error


def _expected(culprit: Culprit) -> str:
    if culprit.slopes is not None:
        return f"not between {culprit.slopes[0]:.9g} and {culprit.slopes[1]:.9g}, the slopes on either side of a kink"
    if not math.isfinite(culprit.numeric):
        return f"{culprit.numeric} by differences, however short the step: is this the end of its domain?"
    unsure = culprit.doubt > 0.1 * abs(culprit.analytic - culprit.numeric)
    scatter = f" (which scatter by {culprit.doubt:.1e} from step to step: the function may be too rough to tell)" if unsure else ""
    return f"{culprit.numeric:.9g} by differences{scatter}"


def _pattern(culprits: list[Culprit]) -> str:
    """A sign or a factor shows as the same ratio everywhere."""
    ratios = [c.analytic / c.numeric for c in culprits if c.numeric and c.slopes is None]
    if len(ratios) < 2 or not ratios[0] or max(ratios) - min(ratios) > 1e-3 * abs(ratios[0]):
        return ""
    return f", {ratios[0]:.6g} times what they should be"


def _others(function: Function, comparison: Comparison, i: int) -> str:
    """The other inputs that disagree: in a model, those before the wrong backward."""
    found = {c.input for c in comparison.culprits}
    if len(comparison.culprits) >= ENOUGH:                  # the search ended early: what disagreed and was not searched counts
        found |= set(comparison.suspects) - set(comparison.kinks)
    names = [function.names[k] for k in sorted(found - {i})]
    return f"; so are those of {', '.join(names)}" if names else ""


def _indices(comparison: Comparison, i: int) -> str:
    shape = comparison.point[i].shape
    some = [str(tuple(int(n) for n in np.unravel_index(e, shape))) for e in comparison.kinks[i][:4]]
    return " ".join(some) + (" ..." if len(comparison.kinks[i]) > 4 else "")


def _call(begin: str, eps: float, rtol: float, atol: float, seed: int) -> str:
    changed = "".join(f", {name}={value!r}" for name, value, usual in
                      (("eps", eps, 1e-6), ("rtol", rtol, 1e-5), ("atol", atol, 1e-7)) if value != usual)
    return f"mc.testing.{begin}{changed}, seed={seed}, elementwise=True)"


def _again(call: str) -> str:
    return f"To see it element by element: {call}" if call else ""


def _verdict(run: Callable[[], Report], raise_exception: bool) -> bool:
    try:
        run()
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


# ---------------------------------------------------------------- layers
def layer_function(layer: Layer, in_shape: Sequence[int], train: bool, batch: int, seed: int) -> Function:
    """A layer as a function of (x, parameter, parameter, ...)."""
    rng = np.random.default_rng([seed, 1])
    model = copy.deepcopy(layer)
    if model.out_shape is None:
        model.build(in_shape, rng, np.float64)
    elif tuple(in_shape) != model.in_shape:
        raise ValueError(f"the layer is built for inputs of {model.in_shape}, not {tuple(in_shape)}")
    else:
        model.astype(np.float64)
    _move_a_little(model, rng)
    named = {id(p): name for name, p in reversed(model.named_parameters().items())}     # one name, where two share a parameter
    parameters = {name: p for name, p in model.named_parameters().items() if named[id(p)] == name}
    frozen = list(parameters.values())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        # Copying it with these parameters in place of its own: statistics and random numbers begin anew every time.
        again = copy.deepcopy(model, {id(p): value for p, value in zip(frozen, values, strict=True)})
        return again(x, train=train, rng=np.random.default_rng([seed, 3]))

    run.__name__ = type(layer).__name__
    x = to_device(rng.normal(size=(batch, *in_shape)), model.device)
    return Function(run, [x, *frozen], ["x", *parameters])


def _move_a_little(model: Layer, rng: np.random.Generator) -> None:
    """Every parameter and statistic to somewhere near where nothing is 0, 1 or equal to its neighbour; variances stay positive."""
    state = model.state_dict()
    parameters = model.named_parameters()
    for name, value in state.items():
        if value.dtype.kind == "f":
            low = -0.1 if name in parameters else 0.05
            state[name] = value * rng.uniform(0.8, 1.2, value.shape) + rng.uniform(low, 0.1, value.shape)
    model.load_state_dict(state)
