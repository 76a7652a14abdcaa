"""CIFAR-10, from the archives it is published in or from image files, and CIFAR-100."""
from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from minicnn.weights.pickled import NUMPY, NotGiven, read

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
            content = entry.read()
            rows, labels = (_parse_binary(content, entry.where, 1) if entry.name.suffix
                            else _parse_pickle(content, entry.where, "labels"))
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


def cifar100(root: Path | str) -> tuple[ImageSet, ImageSet]:
    """CIFAR-100: 32 x 32 RGB photographs of a hundred classes, (train of 50,000, test of 10,000), with their fine labels.

    `root` is the python or the binary version, as an archive (`cifar-100-python.tar.gz`, `cifar-100-binary.tar.gz`), as what is
    inside of it (`cifar-100-python`), or a folder that holds one of these. The classes' names are read from it, too.

    Raises
    ------
    DataError
        Nothing there, or files that are missing, damaged, or not CIFAR-100's.
    """
    root = Path(root)
    held = [root / name for name in ("cifar-100-python", "cifar-100-binary", "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz")]
    source = next((path for path in held if path.exists()), root) if root.is_dir() else root
    files = {entry.name.name: (entry.read(), entry.where) for entry in walk(source) if entry.name.name in FILES100}
    binary = "train.bin" in files
    wanted = ("train.bin", "test.bin", "fine_label_names.txt") if binary else ("train", "test", "meta")
    if missing := [name for name in wanted if name not in files]:
        raise DataError(f"{source}: no {', '.join(missing)} of CIFAR-100 in it; expected cifar-100-python.tar.gz, "
                        "cifar-100-binary.tar.gz, or what is inside of either")
    classes = _class_names(*files[wanted[2]], binary)
    sets = []
    for name, part in zip(wanted, ("train", "test"), strict=False):
        content, where = files[name]
        rows, labels = _parse_binary(content, where, 2) if binary else _parse_pickle(content, where, "fine_labels")
        sets.append(labelled(rows.reshape(-1, *SHAPE), labels, classes, f"cifar100 {part}", where))
    return sets[0], sets[1]


FILES100 = {"train", "test", "meta", "train.bin", "test.bin", "fine_label_names.txt"}


def _class_names(content: bytes, where: str, text: bool) -> list[str]:
    """The hundred names, of a text file, one a line, or of a pickled dict's `fine_label_names`."""
    try:
        names = content.decode().split() if text else [str(name) for name in read(io.BytesIO(content), NUMPY)["fine_label_names"]]
    except Exception as error:                                      # damaged pickles fail in any way whatever
        raise DataError(f"{where}: not CIFAR-100's names of classes, or damaged ({one_line(error)}); fetch it again") from error
    if len(set(names)) != 100:
        raise DataError(f"{where}: {len(set(names))} names of classes; CIFAR-100 has 100; fetch it again")
    return names


def _parse_binary(content: bytes, where: str, labels: int) -> tuple[Images, Labels]:
    """Records of so many labels, a byte each, the last of which counts, and an image's 3,072 bytes: (N, 3072) and (N,)."""
    record = labels + math.prod(SHAPE)
    if not content or len(content) % record:
        raise DataError(f"{where}: {len(content)} bytes are no whole number of records of {record}; fetch it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, labels:], records[:, labels - 1].astype(np.int64)


def _parse_pickle(content: bytes, where: str, key: str) -> tuple[Images, Labels]:
    """A pickled dict with `data`, uint8 (N, 3072), and under a key the labels, a list of N integers."""
    try:
        batch = read(io.BytesIO(content), NUMPY, largest=len(content) + 1)
        images, labels = batch["data"].array, np.array([int(label) for label in batch[key]], np.int64)
    except NotGiven as error:
        raise DataError(f"{where}: its pickle {error}; fetch the archive from its publisher") from error
    except Exception as error:                                      # damaged pickles fail in any way whatever
        raise DataError(f"{where}: not a pickled batch of CIFAR, or damaged "
                        f"({type(error).__name__}: {one_line(error)}); fetch it again") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != math.prod(SHAPE):
        raise DataError(f"{where}: data of {images.dtype.str} {images.shape}; a batch of CIFAR has uint8 (N, {math.prod(SHAPE)})")
    return images, labels
