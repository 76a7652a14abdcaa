"""What happens to pixels between the data set and the model: normalisation, and random crops, shifts, flips and cuts."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .imageset import Images
from .pictures import blocks, resized

TRIES = 10                                                  # to draw a box that fits
ASPECTS = (3 / 4, 4 / 3)                                    # its width over its height


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (biased) standard deviation of pixel / 255, per channel of images (N, C, H, W).

    Sums of bytes and of their squares are integers, added up exactly; only the last steps round.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f"images are {images.dtype}{images.shape}; channel statistics take uint8 (N, C, H, W), none 0")
    total, squares = np.zeros((2, images.shape[1]), np.int64)
    for part in blocks(images):                             # some at a time: the squares take eight times the images' memory
        block = part.astype(np.int64)
        total += block.sum((0, 2, 3))
        squares += (block * block).sum((0, 2, 3))
    count = images.size // images.shape[1]
    # count and the sums become Python integers, which cannot overflow: var = (n sum x^2 - (sum x)^2) / n^2
    mean = tuple(int(s) / (255 * count) for s in total)
    std = tuple((count * int(q) - int(s) ** 2) ** 0.5 / (255 * count) for s, q in zip(total, squares, strict=True))
    return mean, std


@dataclass(frozen=True)
class Normalize:
    """uint8 images (..., C, H, W) to floating point: (pixel / 255 - mean) / std, per channel.

    Raises ValueError where mean and std differ in length, or a std is not positive (as of a channel that is constant
    over the whole data set).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):                        # plain floats, so that == compares and JSON takes them
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; both need one a channel")
        if not (np.isfinite([*self.mean, *self.std]).all() and min(self.std) > 0):
            raise ValueError(f"mean {self.mean} and std {self.std} must be finite, and every std positive")

    def __call__(self, images: Images, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(f"images are {images.dtype}{images.shape}; Normalize with {len(self.mean)} means takes "
                             f"uint8 (..., {len(self.mean)}, H, W)")
        if not np.issubdtype(dtype, np.floating):
            raise ValueError(f"dtype={dtype!r}: normalised pixels are fractions; ask for float32 or float64")
        mean, std = (np.array(values)[:, None, None] for values in (self.mean, self.std))
        x = images.astype(dtype)
        x *= (1 / (255 * std)).astype(dtype)                # the same map with one division a channel, not one a pixel
        x -= (mean / std).astype(dtype)
        return x

    def as_dict(self) -> dict[str, list[float]]:
        """For a checkpoint or JSON; `from_dict` takes it back, exactly."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Sequence[float] | NDArray[Any]]) -> Normalize:
        """What `as_dict` gave, from a checkpoint or JSON."""
        if {"mean", "std"} != set(saved):
            raise ValueError(f"a saved Normalize has 'mean' and 'std', not {sorted(saved)}")
        return cls(tuple(saved["mean"]), tuple(saved["std"]))


def random_resized_crop(images: Images | Sequence[Images], rng: np.random.Generator, size: tuple[int, int],
                        least: float = 0.08) -> Images:
    """From each image (C, h, w), of any size, a random box, enlarged or shrunk to `size` (H, W): (n, C, H, W).

    The box covers `least` to all of the image's area, all shares being as likely; its width over its height is between 3/4 and 4/3,
    all logarithms being as likely. Of ten draws the first that lies inside counts; where none does, the largest box
    around the middle whose aspect is allowed.
    Source: Szegedy et al., "Going Deeper with Convolutions", 2015, section 6; the ten draws are those of torchvision's
    RandomResizedCrop. 40 numbers an image are drawn, whatever comes of them.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least={least} is a share of an image's area, above 0 and at most 1")
    draws = rng.random((len(images), TRIES, 4))
    boxes = [_box(image.shape[1:], numbers, least) for image, numbers in zip(images, draws, strict=True)]
    return np.stack([resized(image, size, box) for image, box in zip(images, boxes, strict=True)])


def _box(size: Sequence[int], draws: NDArray[np.float64], least: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), in whole pixels, from draws (tries, 4) between 0 and 1."""
    h, w = size
    areas = (least + (1 - least) * draws[:, 0]) * (h * w)
    aspects = np.exp(np.log(ASPECTS[0]) + np.log(ASPECTS[1] / ASPECTS[0]) * draws[:, 1])
    widths, heights = np.sqrt(areas * aspects).round().astype(int), np.sqrt(areas / aspects).round().astype(int)
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    if fits.any():
        i = fits.argmax()
        width, height = int(widths[i]), int(heights[i])
        left, top = int(draws[i, 2] * (w - width + 1)), int(draws[i, 3] * (h - height + 1))
    else:
        width, height = min(w, max(1, round(h * ASPECTS[1]))), min(h, max(1, round(w / ASPECTS[0])))
        left, top = (w - width) // 2, (h - height) // 2
    return left, top, left + width, top + height


def augment(images: Images, rng: np.random.Generator, *, pad: int, flip: bool, cutout: int = 0) -> Images:
    """New images (N, C, H, W), each padded by `pad` zeros, cropped back at a random place, and flipped left to right
    half of the time (He et al. 2015, section 4.2, use pad=4 on CIFAR-10).

    cutout: then the pixels of a square of that side become 0; its middle is any pixel, so at an edge less is lost
    (DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout": 16 on CIFAR-10).

    Three numbers an image are drawn whatever `pad` and `flip` say, so the flips are the same under every `pad`, and
    what comes out of `rng` next depends on N alone; behind them two more, if squares are cut out.
    """
    if images.ndim != 4 or min(pad, cutout) < 0:
        raise ValueError(f"augment takes images (N, C, H, W), pad >= 0 and cutout >= 0, not {images.shape}, pad={pad} and "
                         f"cutout={cutout}")
    n, _, height, width = images.shape
    draws = rng.random((3, n))          # not integers(): how much that takes from the generator varies with its range
    down, right = (draws[:2] * (2 * pad + 1)).astype(int)
    flipped = draws[2] < 0.5
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    result = np.empty_like(images)
    for i in range(n):
        crop = padded[i, :, down[i]:down[i] + height, right[i]:right[i] + width]
        result[i] = crop[:, :, ::-1] if flip and flipped[i] else crop
    if cutout:
        tops, lefts = (rng.random((2, n)) * [[height], [width]]).astype(int) - cutout // 2
        for image, top, left in zip(result, tops, lefts, strict=True):
            image[:, max(0, top):max(0, top + cutout), max(0, left):max(0, left + cutout)] = 0
    return result
