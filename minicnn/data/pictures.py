"""Image files to arrays, by Pillow, which is imported only here and only when an image file is read."""
from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from .ahead import ahead, shown
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
    are unless `size` says. Turned as its EXIF says that the camera was held; shrunk or enlarged until it just covers `size`, what
    sticks out cut off evenly.

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
            picture.load()
            with suppress(Exception):                       # a damaged note of how the camera was held turns nothing
                image_ops.exif_transpose(picture, in_place=True)
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


@dataclass(frozen=True, slots=True)
class InFile:
    """A picture that stays in its file; what is known of it once it has been decoded."""

    where: str                          # for messages
    read: Callable[[], bytes]           # its file, at any time and on any thread
    shape: tuple[int, ...]              # (C, H, W), as `decode` gives it
    crc: int                            # a checksum of the file


def look_at(read: Callable[[], bytes], where: str, size: tuple[int, int] | None) -> InFile:
    """Decode a picture, so that it is known to be one, and let it go again."""
    content = read()
    return InFile(where, read, decode(content, where, size=size).shape, zlib.crc32(content))


class ImageFiles:
    """Images that stay in their files: to whoever indexes it a uint8 array (N, C, H, W), each decoded when it is asked for.

    Nothing is kept, so a set may be larger than memory. `batches` asks ahead, on threads.
    """

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(self, pictures: Sequence[InFile], channels: int, size: tuple[int, int]) -> None:
        self.pictures, self.channels, self._size = list(pictures), channels, size
        self.shape = (len(self.pictures), channels, *size)
        self.size = math.prod(self.shape)

    @property
    def crcs(self) -> np.ndarray[Any, Any]:
        """(N,) the checksum of each file."""
        return np.array([picture.crc for picture in self.pictures], np.uint32)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Images:
        if isinstance(index, (int, np.integer)):
            return self._decoded(self.pictures[index])
        chosen = self._chosen(index)
        images = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for image, picture in zip(images, chosen, strict=True):
            image[...] = self._decoded(picture)
        return images

    def take(self, index: Any, axis: int = 0) -> ImageFiles:
        """Those images, still in their files."""
        return ImageFiles(self._chosen(index), self.channels, self._size)

    def originals(self, index: Any) -> list[Images]:
        """Those images as they are in their files, each (C, h, w) of its own size."""
        return [decode(picture.read(), picture.where, channels=self.channels) for picture in self._chosen(index)]

    def _chosen(self, index: Any) -> list[InFile]:
        return [self.pictures[i] for i in np.arange(len(self))[index]]

    def _decoded(self, picture: InFile) -> Images:
        return decode(picture.read(), picture.where, size=self._size, channels=self.channels)


def blocks(images: Images) -> Iterator[Images]:
    """The images, some at a time, in order; those that are in files are decoded by threads."""
    step = max(1, 2**22 // math.prod(images.shape[1:]))
    parts = [slice(start, start + step) for start in range(0, len(images), step)]
    if isinstance(images, ImageFiles):
        return shown(ahead(images.__getitem__, parts), "statistics", len(parts))
    return (images[part] for part in parts)


def common_channels(pictures: Sequence[Images | InFile], names: Sequence[str]) -> int:
    """The channels that images (C, H, W) of one set get: 1 if all are grey, else 3. DataError if their sizes differ."""
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape[1:] != pictures[0].shape[1:]:
            raise DataError(f"{name} is {_size(picture)}, but {names[0]} is {_size(pictures[0])} (height x width); "
                            "a set has one size: resize and crop its images, with --image-size H,W (in Python, size=(H, W))")
    return max(picture.shape[0] for picture in pictures)


def stack(pictures: Sequence[Images | InFile], channels: int) -> Images:
    """Images (1 or C, H, W) of one size as (N, C, H, W); a grey one fills all C channels. Those that are in files stay there."""
    if isinstance(pictures[0], InFile):
        size = cast("tuple[int, int]", pictures[0].shape[1:])
        return cast("Images", ImageFiles(cast("Sequence[InFile]", pictures), channels, size))
    images = np.empty((len(pictures), channels, *pictures[0].shape[1:]), np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[...] = picture
    return images


def resized(picture: Images, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Images:
    """An image (C, h, w), or the box (left, top, right, bottom) of it, as (C, H, W): bilinear, averaging where it shrinks."""
    image_module, _ = _pillow()
    planes = [image_module.fromarray(np.ascontiguousarray(plane)).resize(size[::-1], image_module.Resampling.BILINEAR, box)
              for plane in picture]
    return np.stack([np.asarray(plane) for plane in planes])


def fitted(dataset: ImageSet, in_shape: Sequence[int]) -> ImageSet:
    """A set as a model of in_shape (C, H, W) reads it: grey images in all channels; enlarged or shrunk until they just cover
    (H, W), what sticks out cut off evenly. ValueError for colours that a model of grey images cannot see."""
    images, (channels, height, width) = dataset.images, in_shape
    if images.shape[1] not in (1, channels):
        raise ValueError(f"{dataset.name} has images of {images.shape[1]} channels, but the model takes {channels}; only grey "
                         "ones can be given more")
    if isinstance(images, ImageFiles):          # they are decoded to what is wanted
        return replace(dataset, images=cast("Images", ImageFiles(images.pictures, channels, (height, width))))
    if images.shape[2:] != (height, width):
        image_module, image_ops = _pillow()
        planes = [image_ops.fit(image_module.fromarray(plane), (width, height), image_module.Resampling.BILINEAR)
                  for plane in images.reshape(-1, *images.shape[2:])]
        images = np.stack([np.asarray(plane) for plane in planes]).reshape(*images.shape[:2], height, width)
    return replace(dataset, images=np.ascontiguousarray(np.broadcast_to(images, (len(images), *in_shape))))


def _size(picture: Images | InFile) -> str:
    return "{} x {}".format(*picture.shape[1:])


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("image files need Pillow, which is not installed: pip install pillow") from error
    return Image, ImageOps
