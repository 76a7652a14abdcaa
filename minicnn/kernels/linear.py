"""The matrix product of a fully connected layer, shared out over threads.

With few images and many weights it is limited by reading the weights once, so each thread takes its part of them: a run of
the columns of the result, or of its rows, whichever are more. A small product is one part: the BLAS shall not wake threads of its
own even then, which spin for a tenth of a second in case more comes, and hold up the threads of whatever is computed next.

A product with few rows and a long sum, as of one image's last convolutions, is cut along the sum instead:

    y = sum over pieces of  a[:, piece] b[piece]

Each thread then reads whole rows of b, which lie one after the other in memory, and the pieces are small enough for the BLAS to
multiply them as they lie (tiles.py): to repack b, as it does with a large product, takes as long as the few multiplications.
49 rows, 4608 and 512: 2.4 ms in place of 2.9.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import PER_NUMBER, WORTH_SHARING, each, empty, slices
from minicnn.kernels.dispatch import has_cuda
from minicnn.kernels.tiles import TILE, WIDTH


@has_cuda
def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a b: (m, k), (k, n) -> (m, n), written to `out` if it is given."""
    xp, (m, k), n = array_module(a, b), a.shape, b.shape[1]
    if xp is not np:
        return xp.matmul(a, b, out=out)
    y = empty(xp, (m, n), a.dtype) if out is None else out
    pieces = _pieces(m, k, n)
    if pieces > 1 and a.flags.c_contiguous and b.flags.c_contiguous:
        return _sum_of_pieces(a, b, pieces, y)
    work = max(m * k * n // PER_NUMBER, m * k + k * n + m * n)
    share = max(m, n) if work < WORTH_SHARING else max(128, -(-max(m, n) // 8))     # whoever is free takes the next
    if n >= m:
        each(xp, lambda part: np.matmul(a, b[:, part], out=y[:, part]), list(slices(n, share)))
    else:
        each(xp, lambda part: np.matmul(a[part], b, out=y[part]), list(slices(m, share)))
    return y


@has_cuda
def add_to_rows(y: Array, bias: Array) -> None:
    """y += bias, in place: (m, n), (n,)"""
    y += bias


LONGEST_SUM = 512           # numbers; longer ones are cut
SHORTEST_PIECE = 128        # numbers; to add up shorter pieces takes too long beside multiplying them


def _pieces(m: int, k: int, n: int) -> int:
    """Into how many pieces the sum is cut: 1 where that would not pay, or no number of pieces of one length fits a tile."""
    if k < 4 * LONGEST_SUM or n % WIDTH or m > TILE // (WIDTH * SHORTEST_PIECE):
        return 1
    longest = min(LONGEST_SUM, TILE // (WIDTH * m))
    return next((count for count in range(-(-k // longest), k // SHORTEST_PIECE + 1) if k % count == 0), 1)


def _sum_of_pieces(a: Array, b: Array, pieces: int, y: Array) -> Array:
    """y = a b, the sum over so many pieces: each of them by whichever thread is free."""
    m, n, length = len(a), b.shape[1], a.shape[1] // pieces
    left = a.reshape(m, pieces, length).swapaxes(0, 1)[:, None]                             # (pieces, 1, m, length)
    right = b.reshape(pieces, length, n // WIDTH, WIDTH).swapaxes(1, 2)                     # (pieces, J, length, WIDTH)
    products = empty(np, (pieces, m, n), a.dtype)
    out = products.reshape(pieces, m, n // WIDTH, WIDTH).swapaxes(1, 2)
    each(np, lambda some: np.matmul(left[some], right[some], out=out[some]), list(slices(pieces, -(-pieces // 4))))
    return np.add.reduce(products, axis=0, out=y)
