"""Derivatives by differences, and the comparison of a gradient with them.

A function F from arrays to a vector is walked a little way along a direction d, ahead and back, and seen through a random
output gradient dy:

    slope = <dy, F(x + h d) - F(x - h d)> / 2h        which is to be   <gradient, d>.

One direction through all elements of an input costs two evaluations, whatever its size; a wrong gradient escapes only by a
coincidence of random numbers. Where a direction disagrees its elements are looked at: halves, quarters, down to single ones.

**Steps.** No h suits every function: too long and it bends on the way, too short and rounding drowns the difference. So a
disagreement is believed only after steps over many decades, at the one where neighbouring steps agree best (after Ridders,
"Accurate computation of F'(x) and F'(x)F''(x)", 1982).

**Kinks.** Where F has a corner (ReLU at 0, equal candidates of a maximum) the slopes ahead and back differ however short the
step, while those of a smooth function draw together. No number is the derivative there; one between the two slopes is a fair
choice (an element of Clarke's generalised gradient, "Optimization and Nonsmooth Analysis", 1983), one outside is not. So an
element at a kink is compared through the outputs that are smooth, and held to these bounds for the others. Then all of them are
moved together, which leaves equal candidates equal, and the maximum smooth. Where kinks coincide (a minimum inside a maximum),
rules that are right one by one can combine to a gradient outside the bounds; it is called wrong, for the function does otherwise.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from minicnn.testing.function import Host, signed, typical

LONGEST, SHORTEST = 4, -3       # decades from eps: the steps that are tried
ENOUGH = 10                     # this many wrong elements show what is wrong
ROUNDING = float(np.finfo(np.float64).eps)

Direction = dict[int, Host]     # for some of the inputs, how far each element moves


class Slopes(NamedTuple):
    """What one step along a direction showed; `ahead` and `back` have an entry for every output."""

    step: float
    analytic: float             # <gradient, d>
    ahead: Host                 # dy (F(x + h d) - F(x)) / h
    back: Host                  # dy (F(x) - F(x - h d)) / h

    @property
    def numeric(self) -> float:
        return float((self.ahead + self.back).sum() / 2)

    @property
    def size(self) -> float:
        """How much the outputs moved, each for itself: their sum, the slope, may be much smaller."""
        return float(np.linalg.norm(self.ahead + self.back) / 2)

    @property
    def corner(self) -> float:
        return float(np.linalg.norm(self.ahead - self.back))


class Finding(NamedTuple):
    """The verdict on one direction."""

    right: bool
    slopes: Slopes
    doubt: float = 0.0          # how far the numeric value itself is uncertain
    kink: bool = False
    leaps: bool = False         # at a kink where some output does not even have slopes, but a step up or down


class Culprit(NamedTuple):
    """A single element whose gradient is wrong. Both values are derivatives with respect to this element."""

    input: int
    where: tuple[int, ...]
    analytic: float
    numeric: float
    slopes: tuple[float, float] | None      # at a kink: what the value must lie between
    step: float
    error: float
    doubt: float


class Comparison:
    """A function at a point and its gradients there, to be compared with differences.

    function: a list of arrays -> a vector (m,).   dy: (m,).   gradient_of: dy -> one gradient for each array of the point.
    """

    def __init__(self, function: Callable[[Sequence[Host]], Host], point: list[Host], dy: Host,
                 gradient_of: Callable[[Host], list[Host]], rng: np.random.Generator, *,
                 eps: float, rtol: float, atol: float) -> None:
        self.function, self.point, self.dy, self.gradient_of, self.rng = function, point, dy, gradient_of, rng
        self.eps, self.rtol, self.atol = eps, rtol, atol
        self.here = function(point)
        self.gradients = gradient_of(dy)
        self.scales = [typical(x) for x in point]
        self.output_size = float(np.linalg.norm(dy * self.here))
        self.worst = 0.0                                    # relative error of what was found right
        self.kinks: dict[int, list[int]] = {}
        self.culprits: list[Culprit] = []
        self.suspects: list[int] = []                       # inputs that disagreed along some direction

    # ------------------------------------------------------------ what is walked
    def along(self, inputs: Sequence[int]) -> bool:
        """Whether the gradients of these inputs agree along one random direction through all of them."""
        return self.judge({i: signed(self.rng, self.point[i].shape) * self.scales[i] for i in inputs}).right

    def search(self, i: int, elements: Host | None = None) -> None:
        """Find what disagrees among these elements of input i (all by default): culprits and kinks are added to the lists."""
        elements = np.arange(self.point[i].size) if elements is None else elements
        if len(elements) == 1:
            self.look_at(i, int(elements[0]))
        elif len(elements) and len(self.culprits) < ENOUGH and not self._agree(i, elements):
            for half in np.array_split(elements, 2):
                self.search(i, half)

    def look_at(self, i: int, element: int) -> None:
        """Compare the gradient of one element."""
        x, scale = abs(self.point[i].flat[element]), self.scales[i]
        direction = np.zeros(self.point[i].shape)
        direction.flat[element] = scale
        finding = self.judge({i: direction}, shortest_for(x, scale))
        if finding.right:
            return
        slopes = finding.slopes
        lower, upper = bounds(slopes)
        if finding.kink:
            slack = self._tolerance(slopes)
            rest = self._seen_through(self._smooth(slopes)).judge({i: direction})
            if rest.right and (finding.leaps or lower - slack <= slopes.analytic <= upper + slack):
                self.kinks.setdefault(i, []).append(element)
                return
            if not rest.right:
                finding, slopes = rest, rest.slopes
        apart = abs(slopes.analytic - slopes.numeric) / max(abs(slopes.analytic), abs(slopes.numeric))
        where = tuple(int(n) for n in np.unravel_index(element, self.point[i].shape))
        self.culprits.append(Culprit(i, where, slopes.analytic / scale, slopes.numeric / scale,
                                     (lower / scale, upper / scale) if finding.kink else None,
                                     slopes.step * scale, apart, finding.doubt / scale))

    def kinks_together(self) -> Finding | None:
        """Move all elements at kinks by the same amount. Equal candidates stay equal, so what chooses among them is smooth.

        Seen through those outputs alone that are smooth along this direction; None where there is none.
        """
        if not self.kinks:
            return None
        scale = min(self.scales[i] for i in self.kinks)
        direction = {i: np.zeros(self.point[i].shape) for i in self.kinks}
        for i, elements in self.kinks.items():
            direction[i].flat[elements] = scale
        smooth = self._smooth(self.walk(direction, self.eps))
        return self._seen_through(smooth).judge(direction) if smooth.any() else None

    def _smooth(self, slopes: Slopes) -> Host:
        """Which outputs have the same slope ahead and back, up to the bend of a smooth function and to rounding."""
        steeper = np.maximum(abs(slopes.ahead), abs(slopes.back))
        return np.asarray(abs(slopes.ahead - slopes.back) <= 1e-4 * steeper + 1e-6 * abs(self.dy * self.here))

    # ------------------------------------------------------------ what is concluded
    def judge(self, direction: Direction, shortest: int = SHORTEST) -> Finding:
        """Compare along a direction; at the first step if that agrees, else at the most trustworthy of many."""
        first = self.walk(direction, self.eps)
        if self._agrees(first):
            return self._right(first)
        around = [first, *(self.walk(direction, self.eps * 10.0 ** -k) for k in (1, 2))]
        ladder = around
        if not np.ptp([s.numeric for s in around]) <= 0.01 * self._tolerance(first):    # not: one may be NaN, outside the domain
            longer = [self.walk(direction, self.eps * 10.0 ** k) for k in range(LONGEST, 0, -1)]
            shorter = [self.walk(direction, self.eps * 10.0 ** k) for k in range(-len(around), shortest - 1, -1)]
            ladder = [*longer, *around, *shorter]
        best, doubt = self._most_trustworthy(ladder)
        if self._agrees(best, self._rounding(best)):
            return self._right(best)
        if _vanishing(around) and abs(first.analytic) <= abs(around[-1].numeric):
            return Finding(True, around[-1])
        if _steady([s.corner for s in around]):
            return Finding(False, around[1], doubt, kink=True)
        heights = [s.corner * s.step for s in around]
        if _steady(heights) and min(heights) > 1e-6 * self.output_size:
            return Finding(False, around[1], doubt, kink=True, leaps=True)
        return Finding(False, best, doubt)

    def _seen_through(self, outputs: Host) -> Comparison:
        """The same comparison with these outputs alone."""
        return Comparison(self.function, self.point, np.where(outputs, self.dy, 0.0), self.gradient_of, self.rng,
                          eps=self.eps, rtol=self.rtol, atol=self.atol)

    def _agree(self, i: int, elements: Host) -> bool:
        direction = np.zeros(self.point[i].shape)
        direction.flat[elements] = signed(self.rng, elements.shape) * typical(self.point[i].flat[elements])
        return self.judge({i: direction}).right

    def walk(self, direction: Direction, step: float) -> Slopes:
        """What one step along the direction shows, ahead and back."""
        ahead, back = list(self.point), list(self.point)
        for i, d in direction.items():
            ahead[i], back[i] = self.point[i] + step * d, self.point[i] - step * d
        with np.errstate(all="ignore"):         # a long step may leave the domain: then it is not finite, and not used
            slopes = self.dy * (self.function(ahead) - self.here) / step, self.dy * (self.here - self.function(back)) / step
        return Slopes(step, sum(float(np.vdot(self.gradients[i], d)) for i, d in direction.items()), *slopes)

    def _right(self, slopes: Slopes) -> Finding:
        apart = abs(slopes.analytic - slopes.numeric)
        if apart:
            self.worst = max(self.worst, apart / max(abs(slopes.analytic), abs(slopes.numeric), self._unit(slopes)))
        return Finding(True, slopes)

    def _agrees(self, slopes: Slopes, slack: float = 0.0) -> bool:
        return abs(slopes.analytic - slopes.numeric) <= self._tolerance(slopes) + slack

    def _tolerance(self, slopes: Slopes) -> float:
        return self.rtol * max(abs(slopes.analytic), abs(slopes.numeric)) + self.atol * self._unit(slopes)

    def _unit(self, slopes: Slopes) -> float:
        """What counts as 1: in a function of small numbers less, or an absolute tolerance would cover everything."""
        return min(1.0, max(slopes.size, 1e-4 * self.output_size))

    def _rounding(self, slopes: Slopes) -> float:
        """What rounding of the outputs can do to a slope."""
        return 10 * ROUNDING * self.output_size / slopes.step

    def _most_trustworthy(self, ladder: list[Slopes]) -> tuple[Slopes, float]:
        """Of the steps, the one that its neighbour confirms best, and by how much it does not."""
        finite = [s for s in ladder if math.isfinite(s.numeric)] or ladder[-1:]
        moving = [s for s in finite if s.size > 0.0] or finite      # steps too short to move any output say nothing
        pairs = list(zip(moving, moving[1:], strict=False)) or [(moving[0], moving[0])]
        doubts = [abs(longer.numeric - shorter.numeric) + self._rounding(shorter) for longer, shorter in pairs]
        best = int(np.argmin(doubts))
        return pairs[best][1], doubts[best]


def _steady(numbers: list[float]) -> bool:
    """Equal up to a factor of 2, over steps of 1, 1/10 and 1/100.

    The corners of a smooth function shrink with the step, and what rounding makes of them grows; a kink's stay as they are.
    """
    return 0.0 < max(numbers) <= 2 * min(numbers)


def _vanishing(around: list[Slopes]) -> bool:
    """Slopes that shrink with the step, as those of x^3 at 0: on their way to 0, with nothing to be small beside."""
    return all(abs(shorter.numeric) <= 0.2 * abs(longer.numeric) for longer, shorter in zip(around, around[1:], strict=False))


def shortest_for(x: float, scale: float) -> int:
    """Decades from eps of the shortest step to try for an element of size x, where others have the size `scale`: it fits both."""
    closer = math.floor(math.log10(x / scale)) if 0.0 < x < scale else 0
    return SHORTEST + max(closer, -12)


def bounds(slopes: Slopes) -> tuple[float, float]:
    """The least and the largest that a gradient may say: each output's share lies between its two slopes."""
    return float(np.minimum(slopes.ahead, slopes.back).sum()), float(np.maximum(slopes.ahead, slopes.back).sum())
