"""The receptive field: which pixels of the image a number of some layer sees.

receptive_fields    by geometry. A window of kernel k (dilated: k' = dilation (k - 1) + 1), stride s and padding p, on a map whose
                    numbers see `size` pixels, `stride` apart, the first of them from pixel `start` on, gives numbers that see

                        size + (k' - 1) stride pixels,      s stride apart,     from start - p stride on

                    Where lists run side by side, as in a residual block, their sum sees what any of them sees.
effective_receptive_field
                    by a backward pass: how much each pixel matters to one place, in a network with these weights. It is far
                    smaller, and highest in its middle, since few paths lead there from the rim.
                    Source: Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep CNNs", 2016.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np

from minicnn import layers
from minicnn.autograd import grad
from minicnn.backend import device_of, to_device, to_numpy
from minicnn.kernels.windows import Pair, Windows
from minicnn.layers import Branches, Layer, Residual, Sequential
from minicnn.models.resnet import PadShortcut
from minicnn.study.attribution import as_input, layer_at, run_to

Array = np.ndarray[Any, Any]
VISIBLE = 1 - 0.9545            # Luo et al.: a pixel counts while it matters at least so much of what the most important one does


# ---------------------------------------------------------------- by geometry
@dataclass(frozen=True, eq=False)
class Axis:
    """What the numbers of a map see along one axis of the image.

    size, stride, start: how many pixels each sees, by how many the next one's are further on, where the first one's begin. Those of
    the padding count, so that start may be negative. Where numbers see unequally much, size is the most, and stride the least step.
    first, last: (P,) the first and the last real pixel that each sees.
    """

    size: int
    stride: int
    start: int
    first: Array
    last: Array

    def through(self, windows: Windows, axis: int, out_size: int) -> Axis:
        """What the numbers see that are computed of these by windows."""
        first, last = np.full(out_size, self.last.max() + 1), np.full(out_size, -1)
        for outputs, pixels in windows.axis_taps(axis, len(self.first), out_size).values():
            first[outputs] = np.minimum(first[outputs], self.first[pixels])
            last[outputs] = np.maximum(last[outputs], self.last[pixels])
        return Axis(self.size + (windows.reach[axis] - 1) * self.stride, self.stride * windows.stride[axis],
                    self.start - windows.padding[axis] * self.stride, first, last)

    def shared(self, parts: int) -> Axis:
        """The same for windows that share the map out, as an adaptive pooling's do."""
        n, i = len(self.first), np.arange(parts)
        begin, end = i * n // parts, -(-(i + 1) * n // parts)
        return Axis(self.size + int((end - begin).max() - 1) * self.stride, n // parts * self.stride, self.start,
                    self.first[begin], self.last[end - 1])

    def everything(self, out_size: int) -> Axis:
        """The same for numbers each of which is computed of the whole map."""
        return Axis(self.size + (len(self.first) - 1) * self.stride, 0, self.start, np.full(out_size, self.first.min()),
                    np.full(out_size, self.last.max()))

    def beside(self, other: Axis) -> Axis:
        """The same for numbers that are computed of one number of each of two maps, at the same place."""
        start = min(self.start, other.start)
        return Axis(max(self.start + self.size, other.start + other.size) - start, max(self.stride, other.stride), start,
                    np.minimum(self.first, other.first), np.maximum(self.last, other.last))


@dataclass(frozen=True, eq=False)
class Field:
    """What the numbers of a layer see of the image, rows and columns; a vector has one place, (0, 0)."""

    rows: Axis
    columns: Axis

    @property
    def size(self) -> Pair:
        """Pixels that a number sees, down and along, with those of the padding."""
        return self.rows.size, self.columns.size

    @property
    def stride(self) -> Pair:
        """By how many pixels the field of the next number is further down, and further along."""
        return self.rows.stride, self.columns.stride

    @property
    def start(self) -> Pair:
        """The pixel that the field of the number at (0, 0) begins with; negative in the padding."""
        return self.rows.start, self.columns.start

    @property
    def centre(self) -> Pair:
        """The place in the middle of the map."""
        return len(self.rows.first) // 2, len(self.columns.first) // 2

    def box(self, position: Pair | None = None) -> tuple[slice, slice]:
        """The real pixels that the number at a place of the map sees: the smallest box around them. By default of the middle."""
        p, q = self.centre if position is None else position
        inside = len(self.rows.first), len(self.columns.first)
        if not (0 <= p < inside[0] and 0 <= q < inside[1]):
            raise ValueError(f"position {p, q} is outside the map of {inside[0]} x {inside[1]}")
        return (slice(int(self.rows.first[p]), int(self.rows.last[p]) + 1),
                slice(int(self.columns.first[q]), int(self.columns.last[q]) + 1))

    def through(self, windows: Windows) -> Field:
        """What windows on this map see."""
        p, q = windows.out_size((len(self.rows.first), len(self.columns.first)))
        return Field(self.rows.through(windows, 0, p), self.columns.through(windows, 1, q))

    def beside(self, other: Field) -> Field:
        """What two maps see together."""
        return Field(self.rows.beside(other.rows), self.columns.beside(other.columns))

    def whole(self) -> Field:
        """What a number sees that is computed of all of the map."""
        return Field(self.rows.everything(1), self.columns.everything(1))


def receptive_fields(model: Sequential) -> dict[str, Field]:
    """The field of each layer's numbers, at inference, by the layer's path; the model itself is "".

    TypeError for a layer of a kind that is not known here; `sees.register` makes it known.
    """
    if model.in_shape is None or len(model.in_shape) != 3:
        raise ValueError(f"a receptive field is one of images: the model must be built for (C, H, W), not {model.in_shape}")
    found: dict[str, Field] = {}
    rows, columns = (Axis(1, 1, 0, np.arange(n), np.arange(n)) for n in model.in_shape[1:])
    _follow(model, Field(rows, columns), "", found)
    return found


def _follow(layer: Layer, field: Field, path: str, found: dict[str, Field]) -> Field:
    """The field behind the layer; those inside are put into `found` as well."""
    inside = [(".".join(part for part in (path, name) if part), child) for name, child in layer.children()]
    if isinstance(layer, Sequential):
        for name, child in inside:
            field = _follow(child, field, name, found)
    elif isinstance(layer, (Residual, Branches)):
        first, *others = [_follow(child, field, name, found) for name, child in inside]
        for other in others:
            first = first.beside(other)
        field = first
    else:
        field = sees(layer, field)
    found[path] = field
    return field


@singledispatch
def sees(layer: Layer, field: Field) -> Field:
    """The field behind a layer that reads a map with this field. For a layer of your own:

        @minicnn.study.receptive.sees.register
        def _(layer: MyLayer, field: Field) -> Field: ...
    """
    raise TypeError(f"which pixels a {type(layer).__name__} sees is not known: say so with @minicnn.study.receptive.sees.register")


@sees.register(layers.BatchNorm2d)
@sees.register(layers.ReLU)
@sees.register(layers.Dropout)
def _of_one_number(layer: Layer, field: Field) -> Field:
    return field


@sees.register(layers.Conv2d)
@sees.register(layers.MaxPool2d)
@sees.register(layers.AvgPool2d)
def _of_windows(layer: layers.Conv2d | layers.MaxPool2d | layers.AvgPool2d, field: Field) -> Field:
    return field.through(layer.windows)


@sees.register
def _of_every_second(layer: PadShortcut, field: Field) -> Field:
    return field.through(Windows.of(1, layer.stride))


@sees.register
def _of_shares(layer: layers.AdaptiveAvgPool2d, field: Field) -> Field:
    return Field(field.rows.shared(layer.output_size[0]), field.columns.shared(layer.output_size[1]))


@sees.register(layers.GlobalAvgPool2d)
@sees.register(layers.Flatten)
@sees.register(layers.Linear)
def _of_all(layer: Layer, field: Field) -> Field:
    return field.whole()


@sees.register
def _of_its_channel(layer: layers.SimAM, field: Field) -> Field:
    return Field(field.rows.everything(len(field.rows.first)), field.columns.everything(len(field.columns.first)))


# ---------------------------------------------------------------- by a backward pass
def effective_receptive_field(model: Sequential, images: Array, layer: str, position: Pair | None = None, *, draws: int = 32,
                              seed: int = 0) -> Array:
    """How much each pixel matters to the numbers of a layer at one place: (N, C, H, W) -> (H, W).

    effective[h, w]^2 = mean over the images of   sum_{k, c} (dA[k, position] / dx[c, h, w])^2

    which is the mean of the squares of v^T dA/dx over random normal v, one number a channel k: a backward pass a draw.
    images: as the model reads them, normalised; Luo et al. take random ones.   layer: its path.
    position: (row, column) of the layer's map, by default its middle; of a layer that gives a vector, its numbers together.
    """
    rng = np.random.default_rng(seed)
    x = as_input(model, images)
    given = layer_at(model, layer).out_shape
    assert given is not None
    at = place(given, position)
    _, seen = run_to(model, x, layer)
    squares = np.zeros(images.shape[2:])
    for _ in range(draws):
        v = np.zeros(seen.shape, seen.dtype)
        v[(slice(None), slice(None), *at)] = rng.standard_normal((len(images), given[0]))
        gradient = to_numpy(grad(seen, x, to_device(v, device_of(seen.data)), retain_graph=True)[0].data)
        squares += np.square(gradient, dtype=np.float64).sum(axis=(0, 1))
    effective: Array = np.sqrt(squares / (draws * len(images)))
    return effective


def effective_size(effective: Array) -> float:
    """The side of a square of as many pixels as matter at least 4.55 % as much as the most important one: Luo et al. count so."""
    return float(np.sqrt((effective > VISIBLE * effective.max()).sum()))


def place(out_shape: tuple[int, ...], position: Pair | None = None) -> Pair | tuple[()]:
    """The place in a layer's map (K, P, Q) that is meant, by default the middle; a vector has none. ValueError outside the map."""
    if len(out_shape) != 3:
        return ()
    p, q = position or (out_shape[1] // 2, out_shape[2] // 2)
    if not (0 <= p < out_shape[1] and 0 <= q < out_shape[2]):
        raise ValueError(f"position {p, q} is outside the layer's map of {out_shape[1]} x {out_shape[2]}")
    return p, q
