"""Image files to arrays, by Pillow, which is imported only here and only when an image file is read."""
from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from .files import DataError, one_line, reading
from .imageset import Images, ImageSet

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
GREY_MODES = frozenset({"1", "L", "LA", "La"})


def read_image(path: Path | str, in_shape: tuple[int, int, int]) -> Images:
    """Any image file as a uint8 array of in_shape (C, H, W): with C = 1 or 3 channels, scaled and centre-cropped.

    Raises
    ------
    DataError
        The file is missing or no image.
    ValueError
        C is neither 1 (grey) nor 3 (RGB).
    ImportError
        Pillow is not installed.
    """
    channels, height, width = in_shape
    if channels not in (1, 3):
        raise ValueError(f"an image file gives 1 channel (grey) or 3 (RGB), but the model takes {channels}; "
                         "give it arrays instead")
    with reading(path):
        content = Path(path).read_bytes()
    return np.ascontiguousarray(decode(content, str(path), size=(height, width), channels=channels))


def decode(content: bytes, where: str, *, size: tuple[int, int] | None = None, channels: int | None = None) -> Images:
    """The bytes of an image file as (C, H, W): C is 1 for a grey image, else 3, unless `channels` says; H, W as they
    are unless `size` says. Shrunk or enlarged until it just covers `size`, what sticks out cut off evenly.

    `where` names the image in messages.
    """
    image_module, image_ops = _pillow()
    try:
        with image_module.open(io.BytesIO(content)) as picture:
            if picture.mode.startswith(("I", "F")):         # Pillow would clip these to 255, not scale them
                raise DataError(f"{where}: has 16-bit or floating pixels (mode {picture.mode}); "
                                "save it with 8 bits a channel")
            if channels is None:
                channels = 1 if picture.mode in GREY_MODES else 3
            picture = picture.convert("L" if channels == 1 else "RGB")
            if size is not None:
                height, width = size
                picture = image_ops.fit(picture, (width, height), image_module.Resampling.BILINEAR)
            pixels = np.asarray(picture)
    except DataError:
        raise
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"{where}: not an image that Pillow can read; remove it or replace it") from error
    except Exception as error:                              # decoders fail on damaged files in many ways
        raise DataError(f"{where}: damaged image ({one_line(error)}); remove it or replace it") from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def common_channels(pictures: Sequence[Images], names: Sequence[str]) -> int:
    """The channels that images (C, H, W) of one set get: 1 if all are grey, else 3. DataError if their sizes differ."""
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape[1:] != pictures[0].shape[1:]:
            raise DataError(f"{name} is {_size(picture)}, but {names[0]} is {_size(pictures[0])} (height x width); "
                            "a set has one size: pass size=(height, width) to resize and centre-crop its images")
    return max(len(picture) for picture in pictures)


def stack(pictures: Sequence[Images], channels: int) -> Images:
    """Images (1 or C, H, W) of one size as (N, C, H, W); a grey one fills all C channels."""
    images = np.empty((len(pictures), channels, *pictures[0].shape[1:]), np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[...] = picture
    return images


def fitted(dataset: ImageSet, in_shape: Sequence[int]) -> ImageSet:
    """A set as a model of in_shape (C, H, W) reads it: grey images in all channels; enlarged or shrunk until they just cover
    (H, W), what sticks out cut off evenly. ValueError for colours that a model of grey images cannot see."""
    images, (channels, height, width) = dataset.images, in_shape
    if images.shape[1] not in (1, channels):
        raise ValueError(f"{dataset.name} has images of {images.shape[1]} channels, but the model takes {channels}; only grey "
                         "ones can be given more")
    if images.shape[2:] != (height, width):
        image_module, image_ops = _pillow()
        planes = [image_ops.fit(image_module.fromarray(plane), (width, height), image_module.Resampling.BILINEAR)
                  for plane in images.reshape(-1, *images.shape[2:])]
        images = np.stack([np.asarray(plane) for plane in planes]).reshape(*images.shape[:2], height, width)
    return replace(dataset, images=np.ascontiguousarray(np.broadcast_to(images, (len(images), *in_shape))))


def _size(picture: Images) -> str:
    return "{} x {}".format(*picture.shape[1:])


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("image files need Pillow, which is not installed: pip install pillow") from error
    return Image, ImageOps
