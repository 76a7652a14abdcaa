"""Batch normalisation over plain arrays: what each channel's numbers have in common, and the passes that use it.

All work on rows (N H W, C), block by block. Sums over a channel are taken by einsum, which multiplies and adds in one pass over
long rows: NumPy's sum over a leading axis takes longer, and so does a product with a row of ones on more than one thread.

Where the result is rectified, y = max(y, 0) and every dy below counts only where y > 0; that costs no pass of its own.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicnn.backend import Array, array_module, real_of
from minicnn.kernels.blocks import each, empty, row_blocks, scratch, total
from minicnn.kernels.dispatch import has_cuda, has_cuda_for_real
from minicnn.kernels.elementwise import channelwise, rectify
from minicnn.kernels.windows import image_of, rows_of


@has_cuda
def normalize(x: Array, weight: Array, bias: Array, eps: float, rectified: bool = False,
              residual: Array | None = None) -> tuple[Array, Array, Array]:
    """(N, C, H, W) -> y, the mean of each channel (C,), its biased variance (C,).

    y = weight (x - mean) / sqrt(var + eps) + bias = scale x + shift;   a residual is added before y is rectified
    """
    xp, rows = array_module(x), rows_of(x)
    mean, var = moments(rows)
    y = empty(xp, rows.shape, rows.dtype)
    scale = weight * (var + eps) ** -0.5
    shift = bias - mean * scale
    others = None if residual is None else rows_of(residual)

    def one(part: slice) -> None:
        out = channelwise(xp.multiply, rows[part], scale, y[part])
        channelwise(xp.add, out, shift, out)
        if others is not None:
            out += others[part]
        if rectified:
            rectify(out, out)

    each(xp, one, row_blocks(rows), 3 * rows.size)
    return image_of(y, x), mean, var


def moments(rows: Array) -> tuple[Array, Array]:
    """(m, C) -> the mean and the biased variance of each channel, (C,) both.

    The mean square less the square of the mean takes one look at the numbers, but where the mean is large beside the deviation
    it subtracts two almost equal numbers: then the deviations are squared instead, in a second look.
    """
    xp, blocks = array_module(rows), row_blocks(rows)

    def sums(about: Array | None) -> Array:
        """sum (x - about) and sum (x - about)^2: (2, C)"""
        def some(parts: Sequence[slice]) -> Array:
            found = xp.zeros((2, rows.shape[1]), rows.dtype)
            for part in parts:
                seen = _less(rows[part], about)
                found[0] += channel_sum(seen)
                found[1] += channel_sum(seen, seen)
            return found
        return total(xp, some, blocks, 2 * rows.size)

    mean, square = sums(None) / len(rows)
    var = square - mean * mean
    if xp is not np or bool((var <= SHARE_OF_SQUARE * square).any()):       # to ask a GPU would be to wait for it
        off, square = sums(mean) / len(rows)
        mean, var = mean + off, square - off * off                          # off: by how much the mean was rounded
    return mean, var


SHARE_OF_SQUARE = 0.1       # below it, the variance has lost a digit or more to the mean
LONG_ROW = 512              # numbers: in shorter rows NumPy's loop hardly gets going


@has_cuda
def normalize_grad(dy: Array, x: Array, weight: Array, mean: Array, var: Array, eps: float, want_dx: bool,
                   y: Array | None = None) -> tuple[Array | None, Array, Array]:
    """dx, dweight, dbias in as few passes as NumPy allows, from the saved statistics.

    With x_hat = (x - mean) / std and m numbers a channel:
    dbias = sum dy,   dweight = sum dy x_hat,   dx = weight / std (dy - dbias / m - x_hat dweight / m).
    y: the result where it was rectified; dy counts where y > 0.
    Source: Ioffe, Szegedy, "Batch Normalization", 2015, section 3.
    """
    xp, dy_rows, x_rows = array_module(dy), rows_of(dy), rows_of(x)
    y_rows = None if y is None else rows_of(y)
    m, inv_std = len(dy_rows), (var + eps) ** -0.5
    blocks = row_blocks(x_rows)
    dx = empty(xp, x_rows.shape, x.dtype) if want_dx or y is not None else None     # first it holds what of dy counts

    def sums(parts: Sequence[slice]) -> Array:
        """sum dy and sum dy (x - about) over some blocks: (2, C)"""
        found = xp.zeros((2, x_rows.shape[1]), x.dtype)
        for part in parts:
            arriving = dy_rows[part] if y_rows is None else xp.multiply(dy_rows[part], y_rows[part] > 0, out=dx[part])  # type: ignore[index]
            found[0] += channel_sum(arriving)
            found[1] += channel_sum(arriving, _less(x_rows[part], about))
        return found

    # A mean that is small beside the deviation may as well be taken off the sum: one pass less.
    about = None if xp is np and bool((SHARE_OF_SQUARE * mean * mean <= var).all()) else mean
    dbias, along = total(xp, sums, blocks, 4 * x_rows.size)
    dweight = (along if about is not None else along - mean * dbias) * inv_std
    if not want_dx:
        return None, dweight, dbias
    scale = weight * inv_std                                    # dx = scale dy + slope x + rest
    slope = -scale * inv_std * dweight / m
    rest = -scale * dbias / m - slope * mean
    arrived = dy_rows if y_rows is None else dx

    def one(part: slice) -> None:
        out = channelwise(xp.multiply, arrived[part], scale, dx[part])      # type: ignore[index]
        out += channelwise(xp.multiply, x_rows[part], slope, scratch(xp, "normalize x", out.shape, out.dtype))
        channelwise(xp.add, out, rest, out)

    each(xp, one, blocks, 4 * x_rows.size)
    return image_of(dx, x), dweight, dbias


@has_cuda_for_real
def follow(running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float, m: int) -> None:
    """running += momentum (batch - running), in place: (C,) all; of the variance the unbiased one, over m - 1 of the m numbers."""
    running_mean += momentum * (mean - running_mean)
    running_var += momentum * (var * (m / (m - 1)) - running_var)


@has_cuda_for_real
def scale_and_shift(weight: Array, bias: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """scale and shift, (C,) both, with which batch norm by constant statistics is scale x + shift."""
    scale = weight * (var + eps) ** -0.5
    return scale, bias - scale * mean


@has_cuda
def channel_affine(x: Array, scale: Array, shift: Array) -> Array:
    """scale x + shift, one number of each a channel: (N, C, H, W), (C,), (C,)."""
    y = x * scale.reshape(-1, 1, 1)
    y += shift.reshape(-1, 1, 1)
    return y


@has_cuda
def channel_total(x: Array) -> Array:
    """(N, C, H, W) -> (C,): the sum of each channel, of half precision in float32."""
    return x.sum(axis=(0, 2, 3), dtype=real_of(x.dtype))


def channel_sum(rows: Array, times: Array | None = None) -> Array:
    """(m, C) -> (C,): the sum of all rows, or of rows * times.

    Few channels: several rows are added as one long row, and its parts in the end.
    """
    xp, (m, c) = array_module(rows), rows.shape
    several = max(1, LONG_ROW // c)
    if m % several or not rows.flags.c_contiguous or not (times is None or times.flags.c_contiguous):
        several = 1
    factors = [factor.reshape(-1, several * c) for factor in (rows, times) if factor is not None]
    long = xp.einsum(("ij,ij->j" if times is not None else "ij->j"), *factors)
    return long.reshape(several, c).sum(axis=0) if several > 1 else long


def _less(rows: Array, about: Array | None) -> Array:
    """rows - about, one number a channel, in a workspace; the rows as they are where there is nothing to take off."""
    if about is None:
        return rows
    xp = array_module(rows)
    return channelwise(xp.subtract, rows, about, scratch(xp, "normalize x", rows.shape, rows.dtype))
