"""Memory for activations and gradients, used again.

A training step needs the same arrays as the step before it. Handed back to the system and asked for anew, each would come
page by page, zeroed, and that costs as much as computing what goes in. So large arrays get their memory here: when the last view of
one is gone, its memory waits for the next array that fits in.

    y = empty((16, 224, 224, 64), np.float32)       a NumPy array like any other, of unknown content

    one piece of memory from the system      [ taken |  free  | taken |     free     ]
    an array takes the smallest free run that it fits in, and leaves the rest free; runs that meet become one again

Where nothing fits, a new piece comes from the system, and as much as that of pieces that are wholly free goes back.
"""
from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

SMALLEST = 1 << 18          # bytes; below, the system's allocator does as well
ALIGNMENT = 4096            # bytes; every array of a piece begins where a page does
CACHE_LINE = 64             # bytes; and every other one where a line of the cache does, see `fresh`

_lock = threading.Lock()


def fresh(size: int, alignment: int = CACHE_LINE) -> np.ndarray[Any, Any]:
    """So many bytes from the system, beginning at a multiple of `alignment`.

    A vector register of 64 bytes that is loaded from across two lines of the cache takes two loads: where the right factor of a
    matrix product began 16 bytes past a line, as NumPy's arrays often do, the product took up to twice as long (Ice Lake).
    """
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.__array_interface__["data"][0] % alignment
    return memory[start:start + size]


class _Piece:
    """Memory from the system, and its free runs: {where a run begins: where it ends}, in bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.memory = size, fresh(size, ALIGNMENT)
        self.free = {0: size}

    def take(self, start: int, size: int) -> None:
        end = self.free.pop(start)
        if start + size < end:
            self.free[start + size] = end

    def give_back(self, start: int, end: int) -> None:
        if end in self.free:
            end = self.free.pop(end)
        before = next((first for first, behind in self.free.items() if behind == start), None)
        self.free[start if before is None else before] = end

    @property
    def unused(self) -> bool:
        return self.free.get(0) == self.size


_pieces: list[_Piece] = []
_returned: deque[tuple[_Piece, int, int]] = deque()         # runs whose arrays are gone


class _Lease:
    """A run of a piece, in use. The array made of it, and every view of that, keep it so; when they are gone, the run is free."""

    __slots__ = ("piece", "start", "end", "__array_interface__")

    def __init__(self, piece: _Piece, start: int, end: int) -> None:
        self.piece, self.start, self.end = piece, start, end
        self.__array_interface__ = piece.memory[start:end].__array_interface__

    def __del__(self) -> None:
        # Only noted: an array may go at any line, where the garbage collector comes by, also while its piece is being looked at.
        _returned.append((self.piece, self.start, self.end))


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    """As np.empty, from memory that was used before where some fits, and beginning with a line of the cache."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return fresh(size).view(dtype).reshape(shape)
    return np.asarray(_lease(-(-size // ALIGNMENT) * ALIGNMENT))[:size].view(dtype).reshape(shape)


def _lease(size: int) -> _Lease:
    """The smallest free run that is large enough, or the beginning of a new piece."""
    with _lock:
        _take_back()
        runs = [(end - start, i, start) for i, piece in enumerate(_pieces) for start, end in piece.free.items()
                if end - start >= size]
        if runs:
            _, i, start = min(runs)
            piece = _pieces[i]
        else:
            _return_to_the_system(size)
            piece, start = _Piece(size), 0
            _pieces.append(piece)
        piece.take(start, size)
        return _Lease(piece, start, start + size)


def _take_back() -> None:
    """Make the runs whose arrays are gone free again."""
    while _returned:
        piece, start, end = _returned.popleft()
        piece.give_back(start, end)


def _return_to_the_system(size: float) -> None:
    """Let wholly free pieces go, until they make up so many bytes."""
    for piece in [piece for piece in _pieces if piece.unused]:
        if size <= 0:
            break
        _pieces.remove(piece)
        size -= piece.size


def release() -> None:
    """Give back to the system what is free, as far as whole pieces are."""
    with _lock:
        _take_back()
        _return_to_the_system(math.inf)


def in_stock() -> int:
    """Bytes that are free, waiting to be used again."""
    with _lock:
        _take_back()
        return sum(end - start for piece in _pieces for start, end in piece.free.items())


def _after_fork() -> None:
    """The child's copy of the lock may be held by a thread that the child does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
