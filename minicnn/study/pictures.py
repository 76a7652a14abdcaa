"""Arrays as the report carries them: small pictures of channels with a scale, histograms, and exact numbers.

A picture is quantised to 255 levels between its lowest and highest number, one byte a pixel; a large plane is shrunk by the means
of square blocks. The page colours it. Numbers that are computed with are float32 as they are. Both travel in base64.
"""
from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.study.tape import Host

CHANNELS = 8            # of one value that are shown
SIDE = 64               # pixels along the longer side of a picture, at most
BINS = 41


def sampled(count: int, most: int = CHANNELS) -> list[int]:
    """Which of `count` channels are shown: all, or `most` of them, evenly spread."""
    return list(range(count)) if count <= most else [int(i) for i in np.linspace(0, count - 1, most).round()]


def picture(planes: Host, names: Sequence[Any], across: float | None = None) -> dict[str, Any]:
    """(n, H, W) on one scale: numbers of either sign around 0, others from 0 up.

    names: of the planes, channel numbers mostly.   across: the end of the scale, where it is that of another picture.
    """
    small, block = shrunk(planes)
    finite = np.where(np.isfinite(small), small, 0.0)
    end = float(across if across is not None else np.abs(finite).max(initial=0.0))
    signed = bool((finite < 0).any())
    low = -end if signed else 0.0
    levels = np.round((finite - low) / ((end - low) or 1.0) * 254).clip(0, 254).astype(np.uint8)
    return {"names": [str(name) for name in names], "shape": list(levels.shape), "low": low, "high": end, "block": block,
            "pixels": base64.b64encode(levels.tobytes()).decode("ascii")}


def shrunk(planes: Host) -> tuple[Host, int]:
    """(n, H, W) -> (n, h, w), each pixel the mean of a square block, and the block's side; as they are where they are small."""
    _, h, w = planes.shape
    block = -(-max(h, w) // SIDE)
    if block <= 1:
        return planes.astype(np.float64), 1
    short = (-h % block), (-w % block)
    padded = np.pad(planes.astype(np.float64), ((0, 0), (0, short[0]), (0, short[1])), constant_values=np.nan)
    blocks = padded.reshape(len(planes), padded.shape[1] // block, block, padded.shape[2] // block, block)
    return np.asarray(np.nanmean(blocks, axis=(2, 4))), block


def of_value(array: Host) -> dict[str, Any]:
    """The picture of an activation or its gradient: of (N, C, H, W) the first image's sampled channels, of (N, C) its row."""
    if array.ndim == 4:
        channels = sampled(array.shape[1])
        return picture(array[0, channels], channels)
    flat = array[0].reshape(1, 1, -1) if array.ndim > 1 else array.reshape(1, 1, -1)
    return picture(_folded(flat), [""])


def of_weight(array: Host) -> dict[str, Any]:
    """The picture of a weight: of filters (K, C, kh, kw) some, over some channels each; of a matrix an evenly spread part."""
    if array.ndim == 4:
        filters, channels = sampled(array.shape[0]), sampled(array.shape[1], 3)
        chosen = array[np.ix_(filters, channels)]
        return picture(chosen.reshape(-1, *array.shape[2:]), [f"{k}, {c}" for k in filters for c in channels])
    if array.ndim == 2:
        rows, columns = sampled(array.shape[0], 40), sampled(array.shape[1], 64)
        return picture(array[np.ix_(rows, columns)][None], [""])
    return picture(_folded(array.reshape(1, 1, -1)), [""])


def _folded(row: Host) -> Host:
    """(1, 1, n) -> (1, h, w): a long row in several, the last one filled up with zeros, so that it is looked at more easily."""
    n = row.shape[-1]
    if n <= 64:
        return row
    most = row[..., :64 * 48]               # what is further right is left out of the picture
    width = 64
    filled = np.pad(most, ((0, 0), (0, 0), (0, -most.shape[-1] % width)))
    return filled.reshape(1, -1, width)


def histogram(array: Host) -> dict[str, Any]:
    """How many numbers lie in each of evenly wide bins, and what they are like as a whole."""
    numbers = array.ravel()
    usable = np.isfinite(numbers)
    finite = numbers if usable.all() else numbers[usable]
    if not finite.size:
        return {"count": int(numbers.size), "finite": 0}
    low, high = float(finite.min()), float(finite.max())
    mean = float(finite.mean(dtype=np.float64))
    squares = float(np.einsum("i,i->", finite, finite, dtype=np.float64))          # without a copy of what may be large
    counts, _ = np.histogram(finite, BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
    return {"count": int(numbers.size), "finite": int(finite.size), "low": low, "high": high, "mean": mean, "norm": squares ** 0.5,
            "std": max(0.0, squares / finite.size - mean * mean) ** 0.5, "zeros": float((finite == 0).mean()),
            "bins": counts.tolist()}


def exact(array: Host) -> dict[str, Any]:
    """Every number, in float32."""
    return {"shape": list(array.shape), "floats": base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode("ascii")}
