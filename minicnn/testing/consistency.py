"""What must hold of any gradient before its numbers are looked at: the same question gets the same answer.

Each rule here was broken by somebody's working code: a cache of the last input, a buffer added to twice, an output gradient
clipped on the way, memory read in the order in which it happens to lie.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicnn.autograd import Tensor
from minicnn.testing.function import Function, GradcheckError, Host, signed, typical

SAME = 1e-9         # how closely two ways to one gradient must agree, relative to its largest number
FEW = 8             # inputs that are looked at one by one


def point_beside(point: Sequence[Host], rng: np.random.Generator) -> list[Host]:
    """Every element moved by about one per cent: no zeros, ones or equal numbers are left that could hide an error."""
    return [x + 0.01 * typical(x) * signed(rng, x.shape) for x in point]


def groups(count: int, rng: np.random.Generator) -> list[list[int]]:
    """Every input by itself where they are few; else shared out at random, so that a model of a hundred parameters stays quick."""
    if count <= FEW:
        return [[i] for i in range(count)]
    return [[int(i) for i in part] for part in np.array_split(rng.permutation(count), FEW)]


def check_outputs(function: Function) -> Host:
    """Evaluate twice, and return the outputs: they must be the same, and finite."""
    first, second = function(function.point), function(function.point)
    if first.shape != second.shape or not np.allclose(first, second, rtol=0, atol=SAME * _largest(first), equal_nan=True):
        raise GradcheckError(f"{function.name} gives different outputs for the same inputs, so there is no derivative to compare "
                             "with: let it draw its random numbers from a generator that it seeds itself, "
                             "np.random.default_rng(0), and copy running statistics before it moves them")
    if not np.isfinite(first).all():
        raise GradcheckError(f"{function.name} gives NaN or infinity at these inputs: check it where it is finite")
    return first


def check_consistency(function: Function, dy: Host, rng: np.random.Generator, rtol: float) -> None:
    """Ask for the gradients at the function's point in every way that must not matter."""
    record = function.record(function.point)
    _disturb(function, rng)                                 # whatever is kept from the last call is now another call's
    gradients = record.gradients(dy)
    for name, g in zip(function.names, gradients, strict=True):
        if not np.isfinite(g).all():
            at = tuple(int(n) for n in np.argwhere(~np.isfinite(g))[0])
            raise GradcheckError(f"{function.name}: the gradient of {name} is {g[at]} at {at}, although the outputs are finite")
    if not all(np.array_equal(a, b) for a, b in zip(gradients, record.gradients(dy), strict=True)):
        raise GradcheckError(f"{function.name}: a second backward pass through the same graph gives another gradient: "
                             "a backward changes what it was given, or keeps something between calls")
    _check_untouched(function, record.leaves)

    def compare(other: list[Host], problem: str, which: Sequence[int] | None = None, tolerance: float = SAME) -> None:
        floor = 1e-13 * max(map(_largest, gradients))                   # what cancels to nothing leaves rounding behind
        for n, g in zip(range(len(gradients)) if which is None else which, other, strict=True):
            apart = abs(g - gradients[n])
            if g.size and not apart.max() <= tolerance * _largest(gradients[n]) + floor:
                at = tuple(int(k) for k in np.unravel_index(apart.argmax(), g.shape))
                raise GradcheckError(f"{function.name}: the gradient of {function.names[n]} {problem} "
                                     f"(at {at}: {g[at]:.9g} then, {gradients[n][at]:.9g} otherwise)")

    compare(function.record(function.point).gradients(dy),
            "depends on what was computed before: is something kept outside the tape between forward and backward?")
    compare([g / -2.0 for g in record.gradients(-2.0 * dy)],
            "is not linear in the output gradient: -2 times that does not give -2 times this")
    compare(function.record(function.point, strided=True).gradients(dy),
            "changes when the arrays lie in memory in another order: index by axes, do not assume contiguous memory")
    if len(gradients) > 1:
        for some in groups(len(gradients), rng):
            alone = function.record(function.point, wanted=some)
            compare(alone.gradients(dy, some), "changes when some others are not asked for", some)
    composed = _composed(function, dy)
    if composed is not None:
        compare(composed, "by the backward made of ops differs from the fused one: they must be one derivative", tolerance=rtol)


def _disturb(function: Function, rng: np.random.Generator) -> None:
    """A forward and a backward pass of something else."""
    try:
        with np.errstate(all="ignore"):
            record = function.record(point_beside(function.point, rng))
            record.gradients(signed(rng, record.values().shape))
    except Exception:       # the function may refuse that point; if it fails everywhere, the next pass will say so
        pass


def _composed(function: Function, dy: Host) -> list[Host] | None:
    """The gradients by the backwards made of ops, where some op has a fused one as well."""
    record = function.record(function.point)
    if not any(node.op is not None and node.op.fused and node.op.composed for node in record.nodes()):
        return None
    try:
        return record.gradients(dy, create_graph=True)
    except (TypeError, AttributeError):     # some backward is not made of ops: gradgradcheck's question, not this one's
        return None


def _check_untouched(function: Function, leaves: Sequence[Tensor]) -> None:
    for name, leaf, x in zip(function.names, leaves, function.point, strict=True):
        if not np.array_equal(leaf.numpy(), x, equal_nan=True):
            raise GradcheckError(f"{function.name} changes {name}, which belongs to its caller: a forward or backward must not "
                                 "write into what it was given")


def _largest(x: Host) -> float:
    return float(np.abs(x).max()) if x.size else 0.0
