"""Element by element, in blocks: what is limited by memory, not by arithmetic.

Each block is read once, changed while it is in cache, and written once; the blocks are shared out over threads. An expression of
NumPy's passes over whole arrays once for every operator instead.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module, memory_order
from minicnn.kernels.blocks import ELEMENTS, each, empty, slices
from minicnn.kernels.dispatch import has_cuda

_zeros = {np.dtype(kind): np.zeros(ELEMENTS, kind) for kind in ("float32", "float64")}


def rectify(a: Array, out: Array) -> Array:
    """out = max(a, 0), NaN where a is NaN; a and out of one shape, contiguous.

    NumPy has vector instructions for the larger of two arrays, but not of an array and a number, which takes three times as long.
    """
    xp = array_module(a)
    zeros = _zeros.get(a.dtype)
    if xp is not np or zeros is None or a.size > len(zeros) or not (a.flags.c_contiguous and out.flags.c_contiguous):
        return xp.maximum(a, 0, out=out)
    np.maximum(a.reshape(-1), zeros[:a.size], out=out.reshape(-1))
    return out


def channelwise(ufunc: np.ufunc, rows: Array, per_channel: Array, out: Array) -> Array:
    """ufunc(rows, one number a channel, out): (m, C), (C,).

    NumPy's inner loop runs over the last axis, and over few channels it hardly gets going: several rows are made one long row.
    """
    m, c = rows.shape
    several = 1024 // c
    if isinstance(rows, np.ndarray) and c < 64 and m % several == 0 and rows.flags.c_contiguous and out.flags.c_contiguous:
        ufunc(rows.reshape(-1, several * c), np.tile(per_channel, several), out=out.reshape(-1, several * c))
        return out
    return ufunc(rows, per_channel, out=out)


@dataclass(frozen=True)
class Affine:
    """What to do with each block of a result, a `Finish`: scale each channel, shift it, add a residual's same rows, rectify."""

    scale: Array | None = None              # (C,)
    shift: Array | None = None              # (C,)
    residual: Array | None = None           # all its rows, (m, C)
    rectified: bool = False

    def __call__(self, rows: Array, first: int) -> None:
        xp = array_module(rows)
        if self.scale is not None:
            channelwise(xp.multiply, rows, self.scale, rows)
        if self.shift is not None:
            channelwise(xp.add, rows, self.shift, rows)
        if self.residual is not None:
            rows += self.residual[first:first + len(rows)]
        if self.rectified:
            rectify(rows, rows)


@has_cuda
def relu(x: Array) -> Array:
    """max(x, 0)"""
    return blockwise(lambda out, a: rectify(a, out), x)


@has_cuda
def relu_grad(dy: Array, y: Array) -> Array:
    """dy where y > 0, else 0"""
    return blockwise(lambda out, a, g: array_module(g).multiply(g, a > 0, out=out), y, dy)


@has_cuda
def add_relu(a: Array, b: Array) -> Array:
    """max(a + b, 0)"""
    return blockwise(lambda out, a, b: rectify(array_module(a).add(a, b, out=out), out), a, b)


@has_cuda
def cast(x: Array, dtype: np.dtype[Any]) -> Array:
    """The same numbers in another type, which lie in memory as they did."""
    return x.astype(dtype)


def as_images(weight: Array, images: Array) -> Array:
    """The weight in the type of the images beside it: itself, or rounded where they are of half precision."""
    return weight if weight.dtype == images.dtype else cast(weight, images.dtype)


@has_cuda
def accumulate(a: Array, b: Array) -> None:
    """a += b, in place"""
    in_place(lambda a, b: array_module(a).add(a, b, out=a), a, b)


def blockwise(task: Callable[..., object], *arrays: Array) -> Array:
    """task(part of the result, part of each array ...) over blocks; returns the result, like the first array in shape and layout.

    All arrays have one shape and one dtype. Where their layouts in memory differ, the others are copied into the first one's.
    """
    first, xp = arrays[0], array_module(*arrays)

    def filled(order: list[int]) -> Array:
        out = empty(xp, [first.shape[axis] for axis in order], first.dtype)
        flat = [xp.ascontiguousarray(array.transpose(order)).reshape(-1) for array in arrays]
        laid = out.reshape(-1)
        step = ELEMENTS if xp is np else max(1, laid.size)
        work = laid.size * (1 + len(arrays))
        each(xp, lambda part: task(laid[part], *(array[part] for array in flat)), list(slices(laid.size, step)), work)
        return out

    return laid_out_like(first, filled)


def in_place(task: Callable[..., object], *arrays: Array) -> None:
    """task(part of each array ...) over blocks, for tasks that write into their parts.

    Arrays that do not fill their memory in one common order are handed to the task whole.
    """
    xp, order = array_module(*arrays), memory_order(arrays[0])
    turned = [array.transpose(order) for array in arrays]
    if xp is not np or not all(array.flags.c_contiguous for array in turned):
        task(*arrays)
        return
    flat = [array.reshape(-1) for array in turned]
    size = math.prod(arrays[0].shape)
    each(xp, lambda part: task(*(array[part] for array in flat)), list(slices(size, ELEMENTS)), size * (1 + len(arrays)))


def laid_out_like(array: Array, make: Callable[[list[int]], Array]) -> Array:
    """What `make` makes of the axes in the order of the array's memory, with its axes back in their places."""
    order = memory_order(array)
    return make(order).transpose(sorted(range(array.ndim), key=order.__getitem__))
