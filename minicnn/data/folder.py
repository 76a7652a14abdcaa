"""Images as files in folders named after their classes, on the disk or in a tar archive."""
from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .ahead import ahead, shown
from .files import DataError, Entry, walk
from .imageset import Images, ImageSet, hold_out_a_fifth
from .pictures import SUFFIXES, InFile, common_channels, decode, look_at, stack

HALVES = ("train", "test", "val")
NAMED = 10                      # bad files that a warning names
SHARE = 0.25                    # of this machine's memory, that images which are decoded once may take
LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)"


class Picture(NamedTuple):
    """One image file of a tree."""

    above: tuple[str, ...]      # the folders above its half or class: none, or one that wraps everything
    half: str | None            # "train", "test", "val", or None in a tree that is not divided
    label: str                  # the name of its class
    where: str                  # the file, for messages
    pixels: Images | InFile     # (C, H, W)


def image_folder(root: Path | str, size: tuple[int, int] | None = None, *, skip_bad: bool = False,
                 decode: str | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, test) from image files whose folder names their class.

    `root` is a folder, or a tar archive (plain, .gz, .bz2, .xz) of one, with either

    - `CLASS/*.png` (or jpg, ...): a stratified fifth is held out, always the same; or
    - `train/CLASS/*` and `test/CLASS/*` (or `val` in place of `test`; `test` wins where both are there).

    Classes are numbered in alphabetical order. Images are RGB unless all of them are grey. They must be of one size,
    unless `size=(H, W)` says which: each is then scaled until it just covers H x W, and its centre cut out.

    skip_bad: leave out files that are no images or damaged, and warn of them by name, where they are an error by default.
    decode: "once", all of them now, into memory; or "ahead", whenever they are asked for, on threads ahead of who asks (`batches`),
    so that a set may be larger than memory. Then each is decoded now, too, but not kept, to know that it can be.
    By default "once" where that takes at most a quarter of the machine's memory: an epoch then decodes nothing.

    Raises
    ------
    DataError
        Nothing there, another layout, an empty class, a file that is no image, differing sizes; with decode="ahead" an archive
        that is compressed, which can only be read from its beginning.
    ImportError
        Pillow is not installed.
    """
    root = Path(root)
    pictures = _pictures(root, size, skip_bad, decode)
    halves = {picture.half for picture in pictures}
    held_out = "test" if "test" in halves else "val"
    if halves != {None} and not {"train", held_out} <= halves:
        raise DataError(f"{root}: has {_listed(halves)} alone; add the other half, "
                        "or name that folder itself to have a fifth of it held out")
    return _halved(root, pictures)


def judged_images(root: Path | str, size: tuple[int, int] | None = None, *, whole: bool = False, skip_bad: bool = False,
                  decode: str | None = None) -> ImageSet:
    """The images of a folder, or an archive, that a trained model is judged by: those that `image_folder` holds out; all of test/,
    or of val/, where there is nothing to train on; and whole: all there are, for a model that has been trained on others.

    The rest is as for `image_folder`.
    """
    root = Path(root)
    pictures = _pictures(root, size, skip_bad, decode)
    halves = {picture.half for picture in pictures}
    if not whole and (halves == {None} or "train" in halves and len(halves) > 1):
        return _halved(root, pictures)[1]
    if not whole and "train" in halves:
        raise DataError(f"{root}: has train/ alone, which a model is not judged by; add test/ or val/, or judge it by all images, "
                        "with --all (in Python, whole=True)")
    if not whole and "test" in halves:
        pictures = [p for p in pictures if p.half == "test"]
    return _whole(root, pictures, " ".join([_name(root), *([] if whole else sorted({p.half for p in pictures if p.half}))]))


def _pictures(root: Path, size: tuple[int, int] | None, skip_bad: bool, decode: str | None) -> list[Picture]:
    """All images of a tree, which is divided into halves or is not."""
    if decode not in (None, "once", "ahead"):
        raise ValueError(f'decode={decode!r} must be "once" or "ahead"')
    later = decode == "ahead" or decode is None and _bytes_decoded(root, size) > SHARE * _memory()
    pictures = read_tree(root, size=size, skip_bad=skip_bad, later=later)
    halves = {picture.half for picture in pictures}
    if None in halves and halves != {None}:
        loose = next(p for p in pictures if p.half is None)
        raise DataError(f"{loose.where}: lies beside folders named {_listed(halves)}, not in one; {LAYOUT}")
    return pictures


def _halved(root: Path, pictures: list[Picture]) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a tree that has both halves, or none."""
    halves, name = {picture.half for picture in pictures}, _name(root)
    if halves == {None}:
        whole = _whole(root, pictures, name)
        for number, count in enumerate(np.bincount(whole.labels)):
            if count < 2:
                raise DataError(f"{root}: class {whole.classes[number]!r} has a single image, and a fifth is to be held out; "
                                "add images of it, or divide them yourself into train/ and test/")
        return hold_out_a_fifth(whole, str(root))
    held_out = "test" if "test" in halves else "val"
    classes = sorted({p.label for p in pictures if p.half == "train"})
    pictures = [p for p in pictures if p.half in ("train", held_out)]
    _refuse_empty_classes(root, pictures)
    train, test = divide(pictures, classes, (f"{name} train", f"{name} {held_out}"), ("train", held_out))
    return train, test


def _whole(root: Path, pictures: list[Picture], name: str) -> ImageSet:
    """One set of all of them, whatever halves they lie in."""
    _refuse_empty_classes(root, pictures)
    [whole] = divide([p._replace(half=None) for p in pictures], sorted({p.label for p in pictures}), [name], [None])
    return whole


def _name(root: Path) -> str:
    return root.resolve().name.split(".")[0]


def read_tree(source: Path, *, size: tuple[int, int] | None = None, halves: Collection[str] | None = None, skip_bad: bool = False,
              later: bool = False) -> list[Picture]:
    """Every image file of a folder or an archive, decoded; those of other halves than `halves` are passed over, and those that
    cannot be decoded, if skip_bad says so. later: each is decoded to see that it can be, on threads, and stays in its file.

    What is kept is decoded on one thread: measured on CIFAR-10's small files, most of it is Python, and a second thread
    fighting for the interpreter's lock made it 1.6 times slower.
    """
    pictures: list[Picture] = []
    bad: list[str] = []
    attempt = partial(_attempt, _known if later else _decoded, size)
    wanted = (_readable(found, later) for found in _placed(source) if halves is None or found[1] in halves)
    for found in shown(ahead(attempt, wanted) if later else map(attempt, wanted), "images"):
        if isinstance(found, Picture):
            pictures.append(found)
        elif skip_bad:
            bad.append(found[0])
        else:
            raise found[1]
    if not pictures:
        raise DataError(f"{source}: holds no image files{' in ' + _listed(halves) if halves else ''}"
                        + (f" but {len(bad)} that cannot be read" if bad else "") + f"; {LAYOUT}")
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        warnings.warn(f"{len(bad)} of {len(bad) + len(pictures)} image files cannot be read and are left out: "
                      f"{', '.join(bad[:NAMED])}{more}", RuntimeWarning, stacklevel=3)
    return pictures


Placed = tuple[tuple[str, ...], str | None, str, Entry]         # what `_place` says, and the file


def _placed(source: Path) -> Iterator[Placed]:
    """The image files, not yet read, each with its place in the tree."""
    first: Placed | None = None
    for entry in walk(source):
        if entry.name.suffix.lower() in SUFFIXES:
            found = (*_place(entry.name, entry.where), entry)
            first = first or found
            if found[0] != first[0]:
                raise DataError(f"{entry.where}: not as deep in the same folder as {first[3].where}; {LAYOUT}")
            yield found


def _attempt(take: Callable[[Entry, tuple[int, int] | None], Images | InFile], size: tuple[int, int] | None,
             found: Placed) -> Picture | tuple[str, DataError]:
    """The picture; or which file it is, and what is wrong with it."""
    above, half, label, entry = found
    try:
        return Picture(above, half, label, entry.where, take(entry, size))
    except DataError as error:
        return entry.where, error


def _decoded(entry: Entry, size: tuple[int, int] | None) -> Images:
    return decode(entry.read(), entry.where, size=size)


def _known(entry: Entry, size: tuple[int, int] | None) -> InFile:
    assert entry.again is not None
    return look_at(entry.again, entry.where, size)


def _readable(found: Placed, later: bool) -> Placed:
    entry = found[3]
    if later and entry.again is None:
        raise DataError(f"{entry.where}: in an archive that is compressed no image can be read by itself; to have them decoded as "
                        "they are needed, unpack it, or decompress it to a plain .tar")
    return found


def _bytes_decoded(source: Path, size: tuple[int, int] | None) -> int:
    """About how much memory the images of a tree take, decoded, by the first that is one; 0 of an archive that is compressed."""
    count = one = 0
    for *_, entry in _placed(source):
        if entry.again is None:
            return 0
        count += 1
        if not one:
            with suppress(DataError):           # of a bad file, `read_tree` says so
                one = _decoded(entry, size).nbytes
    return count * one


def _memory() -> float:
    """Bytes that this machine has; no end of them where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def divide(pictures: Sequence[Picture], classes: Sequence[str], names: Sequence[str],
           halves: Sequence[str | None]) -> list[ImageSet]:
    """An ImageSet, of the given name, of each of these halves; all have one image size."""
    number = {name: i for i, name in enumerate(classes)}
    if stray := next((p for p in pictures if p.label not in number), None):
        raise DataError(f"{stray.where}: its class {stray.label!r} is not among the {len(classes)} known ones "
                        f"({_listed(classes)}); every class needs images to train on, under the same name")
    channels = common_channels([p.pixels for p in pictures], [p.where for p in pictures])
    sets = []
    for half, name in zip(halves, names, strict=True):
        mine = [p for p in pictures if p.half == half]
        labels = np.array([number[p.label] for p in mine], np.int64)
        sets.append(ImageSet(stack([p.pixels for p in mine], channels), labels, tuple(classes), name))
    return sets


def _place(path: PurePosixPath, where: str) -> tuple[tuple[str, ...], str | None, str]:
    """The folders above, the half and the class of an image, by its path."""
    *above, label = path.parts[:-1] or ("",)
    if label in ("", *HALVES):
        raise DataError(f"{where}: this image lies in no class folder; {LAYOUT}")
    half = above.pop() if above and above[-1] in HALVES else None
    if len(above) > 1:
        raise DataError(f"{where}: this image lies too deep; {LAYOUT}")
    return tuple(above), half, label


def _refuse_empty_classes(root: Path, pictures: Sequence[Picture]) -> None:
    """A class folder without an image is a mistake somewhere; training would go on as if it were not there."""
    if not root.is_dir():
        return
    filled = {root.joinpath(*above, half or "", label) for above, half, label in {p[:3] for p in pictures}}
    for parent in sorted({folder.parent for folder in filled}):
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder not in filled:
                raise DataError(f"{folder}: this class folder holds no image files; fill it or remove it")


def _listed(names: Collection[str | None]) -> str:
    return ", ".join(sorted(name for name in names if name))
