"""The matrix product of a fully connected layer, shared out over threads.

With few images and many weights it is limited by reading the weights once, so each thread takes its part of them: a run of
the columns of the result, or of its rows, whichever are more. A small product is one part: the BLAS shall not wake threads of its
own even then, which spin for a tenth of a second in case more comes, and hold up the threads of whatever is computed next.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import PER_NUMBER, WORTH_SHARING, each, empty, slices


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a b: (m, k), (k, n) -> (m, n), written to `out` if it is given."""
    xp, (m, k), n = array_module(a, b), a.shape, b.shape[1]
    if xp is not np:
        return xp.matmul(a, b, out=out)
    y = empty(xp, (m, n), a.dtype) if out is None else out
    work = max(m * k * n // PER_NUMBER, m * k + k * n + m * n)
    share = max(m, n) if work < WORTH_SHARING else max(128, -(-max(m, n) // 8))     # whoever is free takes the next
    if n >= m:
        each(xp, lambda part: np.matmul(a, b[:, part], out=y[:, part]), list(slices(n, share)))
    else:
        each(xp, lambda part: np.matmul(a[part], b, out=y[part]), list(slices(m, share)))
    return y
