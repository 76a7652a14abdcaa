"""Which algorithm computes a convolution.

    "im2col"    gather the windows, one matrix product: any convolution, the reference, float64's own
    "direct"    one matrix product for each tap of the window: any convolution, the least memory
    "winograd"  3x3 of stride 1 with a quarter of the multiplications: padding up to 2, on NumPy and CuPy
    "auto"      the fastest, by a table of measurements (auto.json, which `minicnn bench tune` writes anew)

Chosen for one call (`conv2d(..., algorithm="winograd")`: an error where it cannot) or for all calls inside a block
(`with algorithm("winograd"):`, where it can, otherwise im2col).
"""
from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from minicnn.backend import REAL, Array, compiles_cuda, is_half
from minicnn.kernels.windows import Windows

ALGORITHMS = ("direct", "im2col", "winograd")
TABLE = Path(__file__).with_name("auto.json")

# On a GPU, channels and filters from which on Winograd is taken. In float32 it saves multiplications. In TF32 these are six times
# as fast, and what takes long are im2col's columns, 9 numbers for each of the image, written and read again; the spectra have 2.25.
# Worked out from the operations and the bytes of either, not measured yet; with fewer channels its four launches weigh more.
WINOGRAD_CHANNELS = 64

_wish: ContextVar[str] = ContextVar("algorithm", default="auto")


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Compute every convolution inside the block by "direct", "im2col" or "winograd", or choose for each: "auto".

    Where the named one cannot serve (Winograd for a 5x5), im2col does. Gradients are computed when `backward` runs: put it inside.
    """
    token = _wish.set(_known(name))
    try:
        yield
    finally:
        _wish.reset(token)


def supports(name: str, array: Array, windows: Windows, groups: int = 1) -> bool:
    """Whether an algorithm can convolve this array with such windows."""
    if is_half(array.dtype):
        return _known(name) == "im2col"
    return _known(name) != "winograd" or (_transforms(array) and groups == 1 and windows.kernel_size == (3, 3)
                                         and windows.stride == windows.dilation == (1, 1) and max(windows.padding) <= 2)


def _transforms(array: Array) -> bool:
    """Whether there are Winograd's transforms for such arrays."""
    return isinstance(array, np.ndarray) or (compiles_cuda(array) and array.dtype.char in REAL)


def choose(wanted: str | None, which: str, array: Array, windows: Windows, groups: int, channels: int, filters: int,
           pixels: int) -> str:
    """The algorithm for a call. wanted: by name, or None for what the block around it says.

    which: "forward", "input_grad" or "weight_grad"; channels, filters: C and K; pixels: N P Q, all outputs of a filter.
    ValueError where the wanted one is unknown or cannot serve.
    """
    name = _known(wanted if wanted is not None else _wish.get())
    if name == "auto":
        return _fastest(which, array, windows, groups, channels, filters, pixels)
    if supports(name, array, windows, groups):
        return name
    if wanted is None:
        return "im2col"
    if is_half(array.dtype):
        raise ValueError(f'algorithm="{name}" computes in float32 and float64, and the images are of {array.dtype}: use "im2col"')
    raise ValueError('algorithm="winograd" computes 3x3 convolutions of stride 1, padding at most 2, without dilation or groups, '
                     f"on NumPy arrays; not {type(array).__module__} arrays with {windows} in {groups} groups. "
                     'Use "im2col", or "auto", which chooses what can')


def _known(name: str) -> str:
    if name not in (*ALGORITHMS, "auto"):
        raise ValueError(f"no algorithm {name!r}: choose one of {', '.join(map(repr, (*ALGORITHMS, 'auto')))}")
    return name


def _fastest(which: str, array: Array, windows: Windows, groups: int, channels: int, filters: int, pixels: int) -> str:
    """im2col, unless the table measured something else faster on the nearest shape; float64 is always by the reference.

    The table is about 3x3 windows on NumPy arrays, those of stride 1 and longer strides each for themselves. On a GPU it is a rule.
    """
    if array.dtype != np.float32 or groups > 1 or windows.kernel_size != (3, 3):
        return "im2col"
    if not isinstance(array, np.ndarray):
        many = min(channels, filters) >= WINOGRAD_CHANNELS
        return "winograd" if many and supports("winograd", array, windows) else "im2col"
    name = _nearest(which, max(windows.stride) > 1, channels, filters, pixels)
    return name if supports(name, array, windows, groups) else "im2col"


@functools.lru_cache(maxsize=1024)
def _nearest(which: str, strided: bool, channels: int, filters: int, pixels: int) -> str:
    """The winner of the nearest measured shape: a factor of two counts alike in channels, filters and pixels."""
    def far(row: dict[str, Any]) -> float:
        here = zip((channels, filters, max(1, pixels)), (row["channels"], row["filters"], row["pixels"]), strict=True)
        return sum(math.log2(mine / measured) ** 2 for mine, measured in here)

    rows = [row for row in _table()[which] if (row["stride"] > 1) == strided]
    return str(min(rows, key=far)["algorithm"]) if rows else "im2col"


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    import json  # only for those who convolve: it takes a while

    return json.loads(TABLE.read_text(encoding="utf-8"))["fastest"]     # type: ignore[no-any-return]
