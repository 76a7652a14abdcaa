"""Element by element on a GPU: each a single pass over memory, where an expression of array operations takes one an operator."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module, is_half, memory_order
from minicnn.kernels.blocks import Finish
from minicnn.kernels.cuda.launch import THREADS, four_bytes, launch, over
from minicnn.kernels.elementwise import Affine, laid_out_like

COLUMNS = 32, 8             # threads of a block: neighbouring numbers of a row, and rows
ONE_ROW = 128               # numbers: shorter rows are taken several as one
MOST_BLOCKS = 1 << 14


def relu(x: Array) -> Array:
    """max(x, 0)"""
    return _like(lambda out, x: affine_pass(x, None, None, None, True, out), x)


def relu_grad(dy: Array, y: Array) -> Array:
    """dy where y > 0, else 0"""
    def fill(dx: Array, y: Array, dy: Array) -> None:
        fours = in_fours(dx.size, dy, y, dx)
        launch("elementwise", f"relu_grad{fours}", over(dx.size, fours), THREADS, dy, y, dx, dx.size)

    return _like(fill, y, dy)


def add_relu(a: Array, b: Array) -> Array:
    """max(a + b, 0)"""
    return _like(lambda out, a, b: affine_pass(a, None, None, b, True, out), a, b)


def cast(x: Array, dtype: np.dtype[Any]) -> Array:
    """The same numbers in another type, one of the two float32: a half one is widened, or float32 rounded to it."""
    xp = array_module(x)

    def filled(order: list[int]) -> Array:
        laid = xp.ascontiguousarray(x.transpose(order)).reshape(-1)
        out = xp.empty(laid.shape, dtype)
        kernel = "narrow" if is_half(dtype) else "widen"
        fours = in_fours(out.size, laid, out)
        launch("elementwise", f"{kernel}{fours}", over(out.size, fours), THREADS, laid, out, out.size)
        return out.reshape([x.shape[axis] for axis in order])

    return laid_out_like(x, filled)


def accumulate(a: Array, b: Array) -> None:
    """a += b, in place"""
    order = memory_order(a)
    laid = a.transpose(order)
    if laid.flags.c_contiguous:
        affine_pass(laid, None, None, array_module(a).ascontiguousarray(b.transpose(order)), False, laid)
    else:
        a += b


def affine_pass(x: Array, scale: Array | None, shift: Array | None, residual: Array | None, rectified: bool, out: Array) -> None:
    """out = max(scale x + shift + residual, 0) of whatever is there; scale and shift for each number of the last axis."""
    channels = max(1, x.shape[-1]) if scale is not None or shift is not None else ONE_ROW       # else all are alike
    fours = in_fours(channels, x, scale, shift, residual, out) and in_fours(x.size)
    width, blocks = in_columns(x.size, channels, fours)
    launch("elementwise", f"affine{fours}", blocks, COLUMNS,
           x, scale, shift, residual, out, x.size, channels, width, int(rectified))


def in_fours(count: int, *arrays: Array | None) -> str:
    """"_by_fours", the ending of kernels that read four numbers at once, where counts and arrays allow it, else ""."""
    if count % 4:
        return ""
    for array in arrays:
        if array is not None and array.data.ptr % four_bytes(array.itemsize):
            return ""
    return "_by_fours"


def in_columns(count: int, channels: int, fours: str) -> tuple[int, tuple[int, int]]:
    """How kernels that stay in a column see rows of so many channels: the width of a row of theirs, and the blocks of COLUMNS."""
    width = channels * max(1, ONE_ROW // channels)
    across, down = -(-width // (COLUMNS[0] * (4 if fours else 1))), -(-count // (width * COLUMNS[1]))
    return width, (across, min(down, max(1, MOST_BLOCKS // across)))


def ending(bias: Array | None, finish: Finish | None) -> tuple[Array | None, Array | None, Array | None, bool]:
    """Scale, shift, residual, and whether it is rectified: a bias and what comes after it as one pass. The bias is the shift."""
    after = Affine() if finish is None else finish
    if not isinstance(after, Affine) or (bias is not None and (after.scale is not None or after.shift is not None)):
        raise TypeError(f"on a GPU a convolution ends in an Affine, and a bias beside it is its shift; not in {finish!r}")
    return after.scale, after.shift if bias is None else bias, after.residual, after.rectified


def _like(fill: Callable[..., None], *arrays: Array) -> Array:
    """fill(result, array ...), all in one piece of memory that runs as the first array's does."""
    xp, first = array_module(*arrays), arrays[0]

    def filled(order: list[int]) -> Array:
        laid = [xp.ascontiguousarray(array.transpose(order)).reshape(-1) for array in arrays]
        out = xp.empty(laid[0].shape, first.dtype)
        fill(out, *laid)
        return out.reshape([first.shape[axis] for axis in order])

    return laid_out_like(first, filled)
