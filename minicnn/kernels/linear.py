"""The matrix product of a fully connected layer, shared out over threads.

With few images and many weights it is limited by reading the weights once, so each thread takes its part of them: a run of
the columns of the result, or of its rows, whichever are more.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import each, empty, slices

LEAST = 1 << 20             # multiplications; below, one thread is done sooner than two have begun


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a b: (m, k), (k, n) -> (m, n), written to `out` if it is given."""
    xp, (m, k), n = array_module(a, b), a.shape, b.shape[1]
    if xp is not np or m * k * n < LEAST:
        return xp.matmul(a, b, out=out)
    y = empty(xp, (m, n), a.dtype) if out is None else out
    if n >= m:
        each(xp, lambda part: np.matmul(a, b[:, part], out=y[:, part]), list(slices(n, _step(n))))
    else:
        each(xp, lambda part: np.matmul(a[part], b, out=y[part]), list(slices(m, _step(m))))
    return y


def _step(count: int) -> int:
    """Eight parts or so: whichever thread is free takes the next."""
    return max(64, -(-count // 8))
