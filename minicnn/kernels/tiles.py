"""Matrix products in tiles, each so small that the BLAS multiplies it where it lies.

A large product is repacked first: the BLAS copies its factors into panels that suit its inner loop, and copies pay only where each
number is multiplied often. A convolution's matrices are long and narrow (a million pixels, 16 to 512 filters), so they hardly do:
OpenBLAS reaches 75 to 100 GFLOP/s on a core there (AVX-512). But it has kernels without any packing, meant for small matrices,
that it takes up to a million multiplications; they reach 105 to 115, and 120 to 150 on an Ice Lake, provided that the right factor
begins with a line of the cache (memory.py). So a long product is handed over as a stack of small ones:

      rows (m, K)         tiles (J, K, n)          out (m, N = J n)

    +-----------+       +-----+ +-----+ +-----+      +-----+-----+-----+
    | r x K     |       |     | |     | |     |      | r x n     |     |
    +-----------+   x   | K   | |     | |     |  =   +-----+-----+-----+           r K n <= TILE
    |           |       |     | |     | |     |      |     |     |     |
    +-----------+       +-----+ +-----+ +-----+      +-----+-----+-----+

Where the BLAS has no such kernels, the stack costs a little more than the one product.
Source of the limit: OpenBLAS, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c.
"""
from __future__ import annotations

import functools

import numpy as np

from minicnn import memory
from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import scratch

TILE = 1_000_000        # multiplications in a tile, at most
WIDTH = 64              # columns of a tile: more leave it too few rows
FEWEST_ROWS = 24        # with fewer, the packed product is as fast
LARGEST_MATRIX = 1 << 17    # numbers to be cut into tiles: to lay out a larger one takes as long as it saves
LARGEST_SUM = 1 << 16   # numbers in a sum of products: a larger one leaves the cache, and is added to as rarely as can be


def tiled(matrix: Array) -> Array:
    """(..., K, N) -> (..., J, K, n) with N = J n: its columns in J tiles, contiguous; where they would not pay as it is, J = 1."""
    *stack, k, n = matrix.shape
    width = _width(n)
    if not isinstance(matrix, np.ndarray) or k * n > LARGEST_MATRIX or TILE // (k * width) < FEWEST_ROWS:
        return matrix[..., None, :, :]
    tiles = memory.empty((*stack, n // width, k, width), matrix.dtype)          # where a line of the cache begins
    tiles[...] = matrix.reshape(*stack, k, n // width, width).swapaxes(-3, -2)
    return tiles


def multiply(rows: Array, tiles: Array, out: Array) -> None:
    """out = rows matrix: (..., m, K), `tiled(matrix)`, (..., m, N)."""
    (*stack, m, k), (count, _, n) = rows.shape, tiles.shape[-3:]
    most = TILE // (k * n)
    if not isinstance(rows, np.ndarray) or most < FEWEST_ROWS:
        array_module(rows).matmul(rows, tiles[..., 0, :, :], out=out)
        return
    for part, height in _runs(m, most):
        np.matmul(rows[..., part, :].reshape(*stack, -1, 1, height, k), tiles[..., None, :, :, :],
                  out=out[..., part, :].reshape(*stack, -1, height, count, n).swapaxes(-3, -2))


def multiply_planes(matrix: Array, planes: Array, out: Array, pixel: int) -> None:
    """out = matrix planes: (m, K), (K, n), (m, n) with few rows and long ones, cut between pixels of so many numbers."""
    (m, k), n = matrix.shape, planes.shape[1]
    for part, width in _runs(n // pixel, max(1, TILE // (m * k * pixel))):
        columns = slice(part.start * pixel, part.stop * pixel)
        np.matmul(matrix, planes[:, columns].reshape(k, -1, width * pixel).swapaxes(0, 1),
                  out=out[:, columns].reshape(m, -1, width * pixel).swapaxes(0, 1))


def multiply_transposed(left: Array, right: Array, out: Array) -> None:
    """out = left^T right: (..., m, K), (..., m, N), (..., K, N)."""
    (*stack, m, k), n = left.shape, right.shape[-1]
    tall, wide = _width(k), _width(n)
    if not isinstance(left, np.ndarray) or m * tall * wide > TILE:
        array_module(left).matmul(left.swapaxes(-1, -2), right, out=out)
        return
    np.matmul(left.reshape(*stack, m, k // tall, tall).swapaxes(-3, -2).swapaxes(-1, -2)[..., None, :, :],
              right.reshape(*stack, m, n // wide, wide).swapaxes(-3, -2)[..., None, :, :, :],
              out=out.reshape(*stack, k // tall, tall, n // wide, wide).swapaxes(-3, -2))


def sum_of_products(left: Array, right: Array, out: Array) -> None:
    """The same for long and narrow ones, (m, K), (m, N), (K, N): runs of rows are multiplied each by itself, and added up."""
    xp, m, (k, n) = array_module(left), len(left), out.shape
    most = TILE // (_width(k) * _width(n)) if xp is np and out.size <= LARGEST_SUM else m
    for i, (part, height) in enumerate(_runs(m, max(1, most))):
        count = (part.stop - part.start) // height
        if i == 0 and count == 1:
            multiply_transposed(left[part], right[part], out)
            continue
        products = scratch(xp, "products", (count, k, n), out.dtype)
        multiply_transposed(left[part].reshape(count, height, k), right[part].reshape(count, height, n), products)
        if i == 0:
            xp.add.reduce(products, axis=0, out=out)
        else:
            out += products[0]


@functools.lru_cache(maxsize=1024)
def _runs(m: int, most: int) -> list[tuple[slice, int]]:
    """Cut m rows into runs of `most` or a little fewer: (the rows that make runs of one height, the height), and what is left."""
    fewest = max(1, -(-m // most))
    count = next((count for count in range(fewest, 2 * fewest) if m % count == 0), fewest)
    height = max(1, m // count)
    whole = min(count, m) * height
    return [(slice(0, whole), height)] * (whole > 0) + [(slice(whole, m), m - whole)] * (m > whole)


@functools.lru_cache(maxsize=1024)
def _width(n: int) -> int:
    """Into how wide tiles n columns are cut: the largest divisor up to WIDTH, or all of them if that is no use."""
    width = next(width for width in range(min(n, WIDTH), 0, -1) if n % width == 0)
    return width if width >= 16 else n
