"""Maps of numbers over an image, as PNG files, by Pillow, which is imported only here and only when a picture is made."""
from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from minicnn.weights import atomically

Array = np.ndarray[Any, Any]
SIDE = 256                      # a picture is enlarged by whole pixels to about so many
# From nothing to much: dark blue, violet, red, orange, pale yellow; each lighter than the last, so that it also reads in grey.
COLOURS = np.array([(8, 8, 40), (84, 20, 110), (190, 55, 82), (245, 125, 21), (252, 255, 164)], float)


def heat_colours(values: Array) -> Array:
    """(H, W) of at least 0, each over the largest -> (H, W, 3) uint8. All 0 is all dark."""
    share = values / (values.max() or 1.0)
    at = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(share, at, channel) for channel in COLOURS.T], axis=-1).round().astype(np.uint8)


def overlay(image: Array, values: Array) -> Array:
    """The image, (C, H, W) uint8, darkened, under the colours of the map (H, W), where it is high -> (H, W, 3) uint8."""
    share = (values / (values.max() or 1.0))[..., None]
    return ((1 - share) * 0.6 * in_colour(image) + share * heat_colours(values)).round().astype(np.uint8)


def in_colour(image: Array) -> Array:
    """(C, H, W) uint8 -> (H, W, 3): grey in all three colours; where the channels are no colours, their mean."""
    if image.shape[0] not in (1, 3):
        image = image.mean(axis=0, keepdims=True).round().astype(np.uint8)
    return np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)


def framed(picture: Array, box: tuple[slice, slice]) -> Array:
    """The picture (H, W, 3) enlarged, with a white line around the pixels of a box."""
    factor = magnification(picture)
    large = enlarged(picture)
    top, bottom = box[0].start * factor, box[0].stop * factor
    left, right = box[1].start * factor, box[1].stop * factor
    line = max(1, large.shape[0] // 128)
    inner = large[top + line:bottom - line, left + line:right - line].copy()
    large[top:bottom, left:right] = 255
    large[top + line:bottom - line, left + line:right - line] = inner
    return large


def magnification(picture: Array) -> int:
    """By how much a picture (H, W, 3) is enlarged."""
    return max(1, SIDE // max(picture.shape[:2]))


def enlarged(picture: Array) -> Array:
    """(H, W, 3), each pixel a square of pixels."""
    factor = magnification(picture)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def png(picture: Array) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file. ImportError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow, which is not installed: pip install pillow") from error
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="PNG")
    return file.getvalue()


def write_png(path: str | os.PathLike[str], picture: Array) -> None:
    """Write a picture as a PNG file, whole or not at all."""
    content = png(picture)

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(content)
    atomically(path, write)
