"""Small grey images: scikit-learn's digits, which come with the library; MNIST and Fashion-MNIST from their own files."""
from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import DataError, reading
from .imageset import ImageSet, hold_out_a_fifth, labelled

TEN_DIGITS = tuple("0123456789")
TEN_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def digits(seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 scanned digits of 8 x 8 pixels: (train of 1,437, test of 360). Nothing is downloaded.

    The fifth that is held out is stratified and always the same one: `seed` draws it, and belongs to the split
    alone, so that accuracies of runs with different training seeds can be compared.

    Raises ImportError, with the command that mends it, where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits need scikit-learn, which is not installed: pip install scikit-learn") from error
    source = load_digits()
    ink = source.images[:, None]                                    # (1797, 1, 8, 8), counts 0 to 16
    images = np.rint(ink * (255 / 16)).astype(np.uint8)
    whole = ImageSet(images, source.target.astype(np.int64), TEN_DIGITS, "digits")
    return hold_out_a_fifth(whole, "scikit-learn's digits", seed)


def mnist(root: Path | str) -> tuple[ImageSet, ImageSet]:
    """MNIST from a folder with its idx files, plain or .gz, under their published names: (train, test).

    Where only one of the two halves (train-*, t10k-*) is there, a stratified fifth of it is held out instead, and
    the names of both sets say so.

    Raises
    ------
    DataError
        No folder, neither half in it, or files that are damaged, of the wrong kind, or do not belong together.
    """
    return _idx_files(Path(root), "mnist", "MNIST", TEN_DIGITS)


def fashion_mnist(root: Path | str) -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST: photographs of clothes in MNIST's format, under the same names of files; so it takes a folder of its own.

    Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
    Raises DataError as `mnist` does.
    """
    return _idx_files(Path(root), "fashion_mnist", "Fashion-MNIST", TEN_CLOTHES)


def _idx_files(root: Path, name: str, title: str, classes: tuple[str, ...]) -> tuple[ImageSet, ImageSet]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {title} is read from the folder with its four idx files")
    train, test = (_idx_half(root, half, name, classes) for half in ("train", "t10k"))
    if train and test:
        return train, test
    if whole := train or test:
        half = "train" if train else "t10k"
        return hold_out_a_fifth(ImageSet(whole.images, whole.labels, whole.classes, name), f"the {half} files")
    raise DataError(f"{root}: no {title} here; expected train-images-idx3-ubyte and train-labels-idx1-ubyte, "
                    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, or either pair, plain or .gz")


def _idx_half(root: Path, half: str, name: str, classes: tuple[str, ...]) -> ImageSet | None:
    """The images and labels of "train" or "t10k", or None where neither file is there."""
    images, labels = _find_idx(root, half, "images", 3), _find_idx(root, half, "labels", 1)
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        there, lacking = (labels, "images-idx3") if images is None else (images, "labels-idx1")
        raise DataError(f"{there}: its companion {half}-{lacking}-ubyte (or .gz) is not beside it; put it there")
    name += " train" if half == "train" else " test"
    found = labelled(read_idx(images, 3)[:, None], read_idx(labels, 1).astype(np.int64), classes, name, labels)
    if not len(found):                      # an empty half must not pass for one that is not there
        raise DataError(f"{images}: holds no image; fetch it again")
    return found


def _find_idx(root: Path, half: str, content: str, ndim: int) -> Path | None:
    # the files are named with a dash where they are published and with a dot inside their own gzip headers
    names = [f"{half}-{content}{dash}idx{ndim}-ubyte{gz}" for dash in "-." for gz in ("", ".gz")]
    return next((root / name for name in names if (root / name).is_file()), None)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes with so many axes.

    The format: two zero bytes, a byte for the type (8: uint8), a byte for the number of axes, each axis' length as a
    big-endian uint32, then the values, last axis fastest.
    """
    with reading(path), (gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as stream:
        content = stream.read()
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: {len(content)} bytes, shorter than an idx header of {header}; fetch it again")
    if content[:4] != bytes((0, 0, 8, ndim)):
        raise DataError(f"{path}: starts with the magic number {int.from_bytes(content[:4], 'big')}, "
                        f"not {0x800 + ndim} (idx, {ndim} axes of bytes); is it another file under this name?")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=ndim, offset=4))
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path}: its header promises {math.prod(shape)} bytes for shape {shape}, "
                        f"{len(content) - header} follow; fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
