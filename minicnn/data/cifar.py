"""CIFAR-10, from the archives it is published in or from image files."""
from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .files import DataError, one_line, walk
from .folder import LAYOUT, divide, read_tree
from .imageset import Images, ImageSet, Labels, labelled
from .pictures import SUFFIXES

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)                                                 # of an image: the red, the green, the blue plane
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}       # the published files
LOCATIONS = ("expected cifar-10-python.tar.gz, cifar-10-binary.tar.gz, what is inside of either, "
             "or train/CLASS/*.png (or .jpg, ...) and test/CLASS/*")
ARCHIVE = re.compile(r"cifar-?10(?!\d).*\.(tar|tgz|tar\.(gz|bz2|xz))", re.IGNORECASE)


def cifar10(root: Path | str, parts: Sequence[str] = ("train", "test")) -> tuple[ImageSet, ...]:
    """CIFAR-10: 32 x 32 RGB photographs of ten classes, 50,000 to train on and 10,000 to test.

    `root` is one of these, or a folder that holds one under its published name (or an archive named cifar10*):

    - the python version: `cifar-10-batches-py` or `cifar-10-python.tar.gz`. Its pickles are read without executing
      anything in them;
    - the binary version: `cifar-10-batches-bin` or `cifar-10-binary.tar.gz`;
    - image files `train/CLASS/*` and `test/CLASS/*`, as a folder or a tar archive (.tar, .gz, .bz2, .xz).

    Archives are read as they are, nothing is unpacked. `parts` says which sets are returned, in which order: what is
    not asked for is not decoded, so `[test] = cifar10(root, parts=["test"])` is the quick way to evaluate.

    Raises
    ------
    DataError
        Nothing there, or files that are missing, damaged, or not CIFAR-10's.
    """
    if not parts or not set(parts) <= set(BATCHES):
        raise ValueError(f"parts={parts!r}: CIFAR-10 has the parts 'train' and 'test'")
    source = _locate(Path(root))
    known = (entry.name for entry in walk(source) if _is_batch(entry.name) or entry.name.suffix.lower() in SUFFIXES)
    first = next(known, None)                                       # tells which version it is; nothing is decoded yet
    if first is None:
        raise DataError(f"{source}: neither a batch of CIFAR-10 nor an image file in it; {LOCATIONS}")
    return tuple(_from_batches(source, parts) if _is_batch(first) else _from_images(source, parts))


def _locate(root: Path) -> Path:
    """The folder or archive to read: root itself, or what lies in it under a name of CIFAR-10's."""
    if not root.is_dir():
        return root                                                 # an archive, or an error that `walk` puts in words
    for name in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        if (root / name).is_dir():
            return root / name
    if any((root / name).exists() for name in ("train", "test", "test_batch", "test_batch.bin")):
        return root
    # the published archives are named cifar-10-..., and sort before copies as JPEG files, which have lost detail
    archives = sorted(path for path in root.iterdir() if ARCHIVE.fullmatch(path.name))
    if archives:
        return archives[0]
    raise DataError(f"{root}: no CIFAR-10 here; {LOCATIONS}")


def _is_batch(name: PurePosixPath) -> bool:
    return name.suffix in ("", ".bin") and any(name.stem in names for names in BATCHES.values())


def _from_images(source: Path, parts: Sequence[str]) -> list[ImageSet]:
    pictures = read_tree(source, halves=parts)
    for part in parts:
        found = sorted({p.label for p in pictures if p.half == part})
        if tuple(found) != CIFAR10_CLASSES:                         # alphabetical is their own order, too
            raise DataError(f"{source}: {part}/ holds the classes {', '.join(found) or 'of no image'}; "
                            f"CIFAR-10 has {', '.join(CIFAR10_CLASSES)}; {LAYOUT}")
    if odd := next((p for p in pictures if p.pixels.shape[1:] != SHAPE[1:]), None):
        raise DataError(f"{odd.where}: {odd.pixels.shape[1]} x {odd.pixels.shape[2]} pixels; CIFAR-10's are 32 x 32")
    return divide(pictures, CIFAR10_CLASSES, [f"cifar10 {part}" for part in parts], parts)


def _from_batches(source: Path, parts: Sequence[str]) -> list[ImageSet]:
    """The python or the binary version: both are a few files of some thousand images each."""
    wanted = [name for part in parts for name in BATCHES[part]]
    batches: dict[str, ImageSet] = {}
    for entry in walk(source):
        if _is_batch(entry.name) and entry.name.stem in wanted:
            parse = _parse_binary if entry.name.suffix else _parse_pickle
            rows, labels = parse(entry.read(), entry.where)
            images = rows.reshape(-1, *SHAPE)
            batches[entry.name.stem] = labelled(images, labels, CIFAR10_CLASSES, entry.name.stem, entry.where)
    if missing := [name for name in wanted if name not in batches]:
        raise DataError(f"{source}: no {', '.join(missing)} of CIFAR-10 in it; fetch the archive again")
    sets = []
    for part in parts:
        mine = [batches[name] for name in BATCHES[part]]            # by number; an archive holds them in any order
        images, labels = np.concatenate([b.images for b in mine]), np.concatenate([b.labels for b in mine])
        sets.append(ImageSet(images, labels, CIFAR10_CLASSES, f"cifar10 {part}"))
    return sets


def _parse_binary(content: bytes, where: str) -> tuple[Images, Labels]:
    """Records of a label's byte and an image's 3,072: rows of pixels (N, 3072) and labels (N,)."""
    record = 1 + math.prod(SHAPE)
    if not content or len(content) % record:
        raise DataError(f"{where}: {len(content)} bytes are no whole number of records of {record}; fetch it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _parse_pickle(content: bytes, where: str) -> tuple[Images, Labels]:
    """A pickled dict with `data`, uint8 (N, 3072), and `labels`, a list of N integers."""
    try:
        batch = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = batch["data"].pixels(), np.array([int(label) for label in batch["labels"]], np.int64)
    except _Refused as error:
        raise DataError(f"{where}: its pickle asks for {error}, which no batch of CIFAR-10 needs; "
                        "nothing was run; fetch the archive from its publisher") from error
    except Exception as error:                                      # damaged pickles fail in any way whatever
        raise DataError(f"{where}: not a pickled batch of CIFAR-10, or damaged "
                        f"({type(error).__name__}: {one_line(error)}); fetch it again") from error
    if images.ndim != 2 or images.shape[1] != math.prod(SHAPE):
        raise DataError(f"{where}: data of shape {images.shape}; a batch of CIFAR-10 has (N, {math.prod(SHAPE)})")
    return images, labels


class _Refused(pickle.UnpicklingError):
    """A pickle named something beyond the few names that its array needs."""


class _PickledDtype:
    """Takes down how a pickle describes an array's element type."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: a byte has none."""


class _PickledArray:
    """Takes down how a pickle describes an array, where NumPy would build one as it is told."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[object, tuple[int, ...], _PickledDtype, bool, bytes]) -> None:
        self.state = state

    def pixels(self) -> Images:
        _, shape, dtype, column_major, content = self.state
        if dtype.code not in (b"u1", "u1") or column_major:
            raise ValueError(f"data of type {dtype.code!r}, expected rows of uint8")
        return np.frombuffer(content, np.uint8).reshape(shape)


_STAND_INS: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,      # its name since NumPy 2
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): None,                                     # an argument, never called
}


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickled array without calling anything that the pickle names: a class from above stands for each name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]
