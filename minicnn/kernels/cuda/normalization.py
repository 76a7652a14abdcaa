"""Batch normalisation on a GPU: see normalization.cu.

Of images of half precision the statistics, and all else that there is one of a channel, are float32.

Forward: x is read twice, for its sums and to be normalised (a residual added and rectified in passing), y written once. Backward:
dy, x and a rectified y are read twice, dx written once. What lies between is of one number a channel.
"""
from __future__ import annotations

from typing import Any

from minicnn.backend import Array, array_module, real_of
from minicnn.kernels.cuda.elementwise import COLUMNS, affine_pass, in_columns, in_fours
from minicnn.kernels.cuda.launch import THREADS, launch, over
from minicnn.kernels.windows import image_of, rows_of

TX, TY = 32, 8              # threads of a block, across the channels and down the rows: as normalization.cu has them
MOST_CHUNKS = 512           # of the rows
LEAST_ROWS = 64             # of a chunk: so that there are few chunks to be added up where there are few rows


def normalize(x: Array, weight: Array, bias: Array, eps: float, rectified: bool = False,
              residual: Array | None = None) -> tuple[Array, Array, Array]:
    """(N, C, H, W) -> y, the mean of each channel (C,), its biased variance (C,)."""
    rows, c = rows_of(x), x.shape[1]
    mean, var, scale, shift = (array_module(x).empty(c, weight.dtype) for _ in range(4))
    partial, chunks = _in_chunks("sums", 2, rows)
    launch("normalization", "moments", -(-c // TX), (TX, TY),
           partial, rows, weight, bias, mean, var, scale, shift, len(rows), c, chunks, eps)
    y = array_module(x).empty(rows.shape, x.dtype)
    affine_pass(rows, scale, shift, None if residual is None else rows_of(residual), rectified, y)
    return image_of(y, x), mean, var


def normalize_grad(dy: Array, x: Array, weight: Array, mean: Array, var: Array, eps: float, want_dx: bool,
                   y: Array | None = None) -> tuple[Array | None, Array, Array]:
    """dx, dweight, dbias from the saved statistics; y: the result where it was rectified."""
    arriving, rows, c = rows_of(dy), rows_of(x), x.shape[1]
    result = None if y is None else rows_of(y)
    dweight, dbias, scale, slope, rest = (array_module(x).empty(c, weight.dtype) for _ in range(5))
    partial, chunks = _in_chunks("grad_sums", 2, arriving, rows, result, mean)
    launch("normalization", "coefficients", -(-c // TX), (TX, TY),
           partial, weight, mean, var, dweight, dbias, scale, slope, rest, len(rows), c, chunks, eps)
    if not want_dx:
        return None, dweight, dbias
    dx = array_module(x).empty(rows.shape, x.dtype)
    fours = in_fours(c, arriving, rows, result, scale, slope, rest, dx)
    width, blocks = in_columns(dx.size, c, fours)
    launch("normalization", f"normalize_grad{fours}", blocks, COLUMNS,
           arriving, rows, result, scale, slope, rest, dx, dx.size, c, width)
    return image_of(dx, x), dweight, dbias


def follow(running_mean: Array, running_var: Array, mean: Array, var: Array, momentum: float, m: int) -> None:
    """Move the running mean and variance towards a batch's, in place: one launch where array operations take nine."""
    launch("normalization", "follow", over(len(mean)), THREADS,
           running_mean, running_var, mean, var, len(mean), momentum, m / (m - 1))


def scale_and_shift(weight: Array, bias: Array, mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """scale and shift, (C,) both, with which batch norm by constant statistics is scale x + shift."""
    scale, shift = (array_module(weight).empty(len(weight), weight.dtype) for _ in range(2))
    launch("normalization", "scale_and_shift", over(len(weight)), THREADS, weight, bias, mean, var, scale, shift, len(weight), eps)
    return scale, shift


def channel_affine(x: Array, scale: Array, shift: Array) -> Array:
    """scale x + shift, one number of each a channel: (N, C, H, W), (C,), (C,)."""
    rows = rows_of(x)
    y = array_module(x).empty(rows.shape, x.dtype)
    affine_pass(rows, scale, shift, None, False, y)
    return image_of(y, x)


def channel_total(x: Array) -> Array:
    """(N, C, H, W) -> (C,): the sum of each channel, of half precision in float32."""
    rows, c = rows_of(x), x.shape[1]
    sums = array_module(x).empty(c, real_of(x.dtype))
    partial, chunks = _in_chunks("channel_sums", 1, rows)
    launch("normalization", "add_chunks", -(-c // TX), (TX, TY), partial, sums, c, chunks)
    return sums


def _in_chunks(kernel: str, sums: int, rows: Array, *more: Any) -> tuple[Array, int]:
    """Run one of the kernels that add up chunks of rows: (chunks, sums, C), and how many chunks there are.

    Into how many is a matter of the sizes alone: the same sums in the same order on any device.
    """
    m, c = rows.shape
    length = max(LEAST_ROWS, -(-m // MOST_CHUNKS))
    chunks = -(-m // length)
    partial = array_module(rows).empty((chunks, sums, c), real_of(rows.dtype))
    launch("normalization", kernel, (-(-c // TX), chunks), (TX, TY), rows, *more, partial, m, c, length)
    return partial, chunks
