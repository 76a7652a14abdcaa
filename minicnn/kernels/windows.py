"""How a small window slides over an image: the geometry that convolution and pooling share.

Every size and step is a pair (rows, columns). With in_size (H, W), the outputs are

    P = floor((H + 2 padding - dilation (kernel - 1) - 1) / stride) + 1      rows, and the same for the columns,

and through tap (i, j) output (p, q) sees the pixel (p stride - padding + i dilation, q stride - padding + j dilation).
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import each, empty

Pair = tuple[int, int]


def pair(value: Any, name: str, least: int = 0) -> Pair:
    """An int or a pair of ints, as a pair; ValueError when it is neither or below `least`."""
    if type(value) is int and value >= least:                   # nearly always
        return value, value
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2 or not all(_is_int(n) and n >= least for n in sizes):
        raise ValueError(f"{name}={value!r}: give one integer, or a pair (rows, columns), of at least {least}")
    return int(sizes[0]), int(sizes[1])


def _is_int(n: Any) -> bool:
    return hasattr(n, "__index__") and not isinstance(n, bool)


class Tap(NamedTuple):
    """One position inside the window, the outputs that see a real pixel through it (not padding), and these pixels."""

    number: int                             # row-major inside the window
    at: Pair                                # its row and column inside the window
    outputs: tuple[slice, slice]
    pixels: tuple[slice, slice]

    def of_rows(self, rows: slice, stride: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The same for some rows of the outputs alone, counted from the first of them; stride: of the windows, down."""
        outputs, pixels = of_some(self.outputs[0], self.pixels[0], rows, stride)
        return (outputs, self.outputs[1]), (pixels, self.pixels[1])


def of_some(outputs: slice, pixels: slice, some: slice, stride: int) -> tuple[slice, slice]:
    """Along one axis: those of the outputs that are among `some`, counted from the first of these, and the pixels that they see."""
    first, behind = max(outputs.start, some.start), min(outputs.stop, some.stop)
    count = max(0, behind - first)
    start = pixels.start + (first - outputs.start) * stride
    return (slice(first - some.start, first - some.start + count),
            slice(start, start + max(0, (count - 1) * stride + 1) if count else start, stride))


@dataclass(frozen=True)
class Windows:
    """The sizes and steps of a sliding window; make one with `Windows.of`, which checks them."""

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    @classmethod
    def of(cls, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Windows:
        return cls(pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1), pair(padding, "padding"),
                   pair(dilation, "dilation", 1), ceil_mode)

    @property
    def pointwise(self) -> bool:
        """Whether output (p, q) sees pixel (p, q) alone: 1x1, stride 1, no padding."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)

    @functools.cached_property
    def reach(self) -> Pair:
        """Rows and columns from the first pixel of a window to behind its last."""
        return self._along(lambda k, d: d * (k - 1) + 1, self.kernel_size, self.dilation)

    @staticmethod
    def _along(rule: Any, *pairs: Pair) -> Pair:
        return rule(*(p[0] for p in pairs)), rule(*(p[1] for p in pairs))

    @functools.lru_cache(maxsize=1024)      # noqa: B019 (a few sizes a model; they may stay)
    def out_size(self, in_size: Pair) -> Pair:
        """(H, W) -> (P, Q); ValueError where the padded image is smaller than the window, in ceil mode by a whole stride."""
        room = self._along(lambda n, p, r: n + 2 * p - r, in_size, self.padding, self.reach)
        lacking = self._along(lambda room, s: room <= -s if self.ceil_mode else room < 0, room, self.stride)
        if any(lacking):
            raise ValueError(f"an image of {in_size[0]} x {in_size[1]} with padding {self.padding} is smaller than the window of "
                             f"{self.reach[0]} x {self.reach[1]} (kernel_size={self.kernel_size}, dilation={self.dilation}); "
                             "use a larger image, a smaller kernel or more padding")
        if not self.ceil_mode:
            return self._along(lambda room, s: room // s + 1, room, self.stride)
        # One more window may hang over the far edge, but it must begin inside the image or its near padding.
        return self._along(lambda room, n, s, p: min(-(-room // s), (n + p - 1) // s) + 1,
                           room, in_size, self.stride, self.padding)

    def taps(self, in_size: Pair, out_size: Pair) -> Iterator[Tap]:
        """Every position of the window that sees a pixel at all, in row-major order."""
        rows, columns = (self.axis_taps(axis, in_size[axis], out_size[axis]) for axis in (0, 1))
        for i, (p, h) in rows.items():
            for j, (q, w) in columns.items():
                yield Tap(i * self.kernel_size[1] + j, (i, j), (p, q), (h, w))

    def axis_taps(self, axis: int, in_size: int, out_size: int) -> dict[int, tuple[slice, slice]]:
        """Along one axis: {place inside the window: (the outputs that see a pixel through it, these pixels)}."""
        stride, padding, dilation = self.stride[axis], self.padding[axis], self.dilation[axis]
        found = {}
        for tap in range(self.kernel_size[axis]):
            shift = tap * dilation - padding                        # output o sees pixel o * stride + shift
            first = max(0, -(shift // stride))                      # the first o whose pixel is not before the image
            behind = min(out_size, (in_size - 1 - shift) // stride + 1)
            if first < behind:
                start = first * stride + shift
                found[tap] = slice(first, behind), slice(start, start + (behind - first - 1) * stride + 1, stride)
        return found


def slide(image: Array, windows: Windows) -> Array:
    """(N, H, W, C), padded already -> (N, P, Q, kh, kw, C): every window, as a view; a copy of it is im2col."""
    (rh, rw), (sh, sw), (dh, dw), (kh, kw) = windows.reach, windows.stride, windows.dilation, windows.kernel_size
    n, h, w, c = image.shape
    per_image, down, along, per_channel = image.strides
    return array_module(image).lib.stride_tricks.as_strided(
        image, (n, (h - rh) // sh + 1, (w - rw) // sw + 1, kh, kw, c),
        (per_image, sh * down, sw * along, dh * down, dw * along, per_channel))


FEW_CHANNELS = 8


def channels_last(x: Array) -> Array:
    """(N, C, H, W) -> (N, H, W, C), contiguous: a view where the memory lies so already, which is how kernels leave it."""
    image = x.transpose(0, 2, 3, 1)
    if not isinstance(x, np.ndarray) or image.flags.c_contiguous:
        return array_module(x).ascontiguousarray(image)
    laid = empty(np, image.shape, x.dtype)

    def one(i: int) -> None:
        if image.shape[3] < FEW_CHANNELS:
            for channel in range(image.shape[3]):       # plane by plane: pixel by pixel takes four times as long
                laid[i, :, :, channel] = x[i, channel]
        else:
            laid[i] = image[i]

    each(np, one, range(len(x)), 8 * x.size)
    return laid


def rows_of(x: Array) -> Array:
    """(N, C, H, W) -> (N H W, C): every pixel a row; a view where memory is channels-last."""
    return channels_last(x).reshape(-1, x.shape[1])


def image_of(rows: Array, like: Array) -> Array:
    """(N H W, C) -> (N, C, H, W), the shape of `like`: a view."""
    n, c, h, w = like.shape
    return channels_first(rows.reshape(n, h, w, c))


def channels_first(x: Array) -> Array:
    """(N, H, W, C) -> (N, C, H, W), a view: the interface's axes over channels-last memory."""
    return x.transpose(0, 3, 1, 2)
