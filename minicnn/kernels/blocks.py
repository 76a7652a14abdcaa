"""Blocks: the pieces that a kernel cuts its work into, and where they are computed.

Arrays of NumPy: each block small enough for a core's cache, the blocks shared out over threads, with workspaces and results whose
memory is used again. Arrays of another library: the same blocks one after the other, with memory from that library; a GPU
has threads and a pool of memory of its own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from minicnn import memory, threads
from minicnn.backend import Array

WORTH_SHARING = 1 << 21     # numbers read and written: with fewer, one thread is done before two would be
PER_NUMBER = 8              # multiplications of a matrix product that take as long as reading and writing one number

T = TypeVar("T")
R = TypeVar("R")

# Called with every block of a result, (m, K), while it is in cache, and the number of its first row among all rows of the
# result: the place to add a bias, to rectify or to gather statistics in passing.
Finish = Callable[[Array, int], object]

ELEMENTS = 1 << 18          # of a block that is only passed over: the larger, the less often two threads wait for Python's lock


def each(xp: ModuleType, task: Callable[[T], object], items: Sequence[T], work: int = WORTH_SHARING) -> None:
    """task(item) for every item, in any order.

    work: numbers read and written in all. Another thread has to be woken, and after each of its calls of NumPy's may wait for
    Python's lock; so little work stays on the caller's.
    """
    if xp is np:
        threads.parallel(task, items, threads_for(work))
    else:
        for item in items:
            task(item)


def total(xp: ModuleType, task: Callable[[Sequence[T]], R], items: Sequence[T], work: int = WORTH_SHARING) -> R:
    """The sum of task(run) over runs of neighbouring items; the same runs, and so the same bits, for the same number of threads."""
    if xp is not np:
        return task(items)
    first, *others = threads.in_shares(task, items, threads_for(work))
    for other in others:
        first += other      # type: ignore[operator]
    return first


def empty(xp: ModuleType, shape: Sequence[int], dtype: Any) -> Array:
    """A result to be filled."""
    return memory.empty(shape, dtype) if xp is np else xp.empty(shape, dtype)


def scratch(xp: ModuleType, name: str, shape: Sequence[int], dtype: Any) -> Array:
    """An array to scribble in, until the same thread asks for the same name."""
    return threads.workspace(name, shape, dtype) if xp is np else xp.empty(shape, dtype)


def slices(count: int, step: int) -> Iterator[slice]:
    """Cut range(count) into pieces of `step`, at least one long."""
    step = max(1, step)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def image_blocks(xp: ModuleType, n: int, image_bytes: int, block_bytes: int, work: int) -> list[slice]:
    """Cut n images into runs of about block_bytes, and into one a thread at least."""
    return list(slices(n, min(block_bytes // max(1, image_bytes), a_share(n, work)) if xp is np else n))


def a_share(count: int, work: int) -> int:
    """How many of `count` things a thread gets; all of them where one thread is done sooner, see `each`."""
    return -(-count // threads_for(work))


def threads_for(work: int) -> int:
    """How many threads are worth waking for it, see `each`."""
    return threads.get_num_threads() if work >= WORTH_SHARING else 1


def row_blocks(rows: Array, elements: int = ELEMENTS) -> list[slice]:
    """Cut (m, C) into runs of rows of about so many elements, or fewer where that leaves a thread without."""
    m, c = rows.shape
    return list(slices(m, min(elements // max(1, c), a_share(m, 3 * rows.size)) if isinstance(rows, np.ndarray) else m))


def copy_padded(images: Array, out: Array, top: int, left: int) -> None:
    """out[:, i, j] = images[:, top + i, left + j], and 0 outside the images: (n, h, w, C), (n, height, width, C)."""
    (h, w), (height, width) = images.shape[1:3], out.shape[1:3]
    i0, j0 = min(max(0, -top), height), min(max(0, -left), width)
    i1, j1 = max(i0, min(height, h - top)), max(j0, min(width, w - left))
    out[:, :i0] = 0
    out[:, i1:] = 0
    out[:, i0:i1, :j0] = 0
    out[:, i0:i1, j1:] = 0
    out[:, i0:i1, j0:j1] = images[:, top + i0:top + i1, left + j0:left + j1]


def copy_pixels(source: Array, out: Array) -> None:
    """out[...] = source: (..., C) both, where the C numbers of a pixel lie side by side.

    NumPy is shown each pixel as one item of C numbers: it copies items in a tight loop of its own, while rows of few numbers each
    cost it a turn of the loop over all axes, which takes twice as long at 16 channels.
    """
    pixel = (np.void, source.shape[-1] * source.itemsize)
    if isinstance(source, np.ndarray) and source.dtype == out.dtype and source.size:
        out.view(pixel)[...] = source.view(pixel)
    else:
        out[...] = source
