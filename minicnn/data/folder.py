"""Images as files in folders named after their classes, on the disk or in a tar archive."""
from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .files import DataError, walk
from .imageset import Images, ImageSet, hold_out_a_fifth
from .pictures import SUFFIXES, common_channels, decode, stack

HALVES = ("train", "test", "val")
NAMED = 10                      # bad files that a warning names
LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)"


class Picture(NamedTuple):
    """One decoded image file of a tree."""

    above: tuple[str, ...]      # the folders above its half or class: none, or one that wraps everything
    half: str | None            # "train", "test", "val", or None in a tree that is not divided
    label: str                  # the name of its class
    where: str                  # the file, for messages
    pixels: Images              # (C, H, W)


def image_folder(root: Path | str, size: tuple[int, int] | None = None, *, skip_bad: bool = False) -> tuple[ImageSet, ImageSet]:
    """(train, test) from image files whose folder names their class.

    `root` is a folder, or a tar archive (plain, .gz, .bz2, .xz) of one, with either

    - `CLASS/*.png` (or jpg, ...): a stratified fifth is held out, always the same; or
    - `train/CLASS/*` and `test/CLASS/*` (or `val` in place of `test`; `test` wins where both are there).

    Classes are numbered in alphabetical order. Images are RGB unless all of them are grey. They must be of one size,
    unless `size=(H, W)` says which: each is then scaled until it just covers H x W, and its centre cut out.

    skip_bad: leave out files that are no images or damaged, and warn of them by name, where they are an error by default.

    Raises
    ------
    DataError
        Nothing there, another layout, an empty class, a file that is no image, differing sizes.
    ImportError
        Pillow is not installed.
    """
    root = Path(root)
    pictures = read_tree(root, size=size, skip_bad=skip_bad)
    halves = {picture.half for picture in pictures}
    name = root.resolve().name.split(".")[0]
    if halves == {None}:
        return hold_out_a_fifth(_undivided(root, pictures, name), str(root))
    if None in halves:
        loose = next(p for p in pictures if p.half is None)
        raise DataError(f"{loose.where}: lies beside folders named {_listed(halves)}, not in one; {LAYOUT}")
    held_out = "test" if "test" in halves else "val"
    if not {"train", held_out} <= halves:
        raise DataError(f"{root}: has {_listed(halves)} alone; add the other half, "
                        "or name that folder itself to have a fifth of it held out")
    classes = sorted({p.label for p in pictures if p.half == "train"})
    pictures = [p for p in pictures if p.half in ("train", held_out)]
    _refuse_empty_classes(root, pictures)
    train, test = divide(pictures, classes, (f"{name} train", f"{name} {held_out}"), ("train", held_out))
    return train, test


def read_tree(source: Path, *, size: tuple[int, int] | None = None,
              halves: Collection[str] | None = None, skip_bad: bool = False) -> list[Picture]:
    """Every image file of a folder or an archive, decoded; those of other halves than `halves` are passed over, and those that
    cannot be decoded, if skip_bad says so.

    Decoding is left to one thread: measured on CIFAR-10's small files, most of it is Python, and a second thread
    fighting for the interpreter's lock made it 1.6 times slower.
    """
    pictures: list[Picture] = []
    bad: list[str] = []
    for entry in walk(source):
        if entry.name.suffix.lower() not in SUFFIXES:
            continue
        above, half, label = _place(entry.name, entry.where)
        if pictures and above != pictures[0].above:
            raise DataError(f"{entry.where}: not as deep in the same folder as {pictures[0].where}; {LAYOUT}")
        if halves is None or half in halves:
            content = entry.read()
            try:
                pictures.append(Picture(above, half, label, entry.where, decode(content, entry.where, size=size)))
            except DataError:
                if not skip_bad:
                    raise
                bad.append(entry.where)
    if not pictures:
        raise DataError(f"{source}: holds no image files{' in ' + _listed(halves) if halves else ''}"
                        + (f" but {len(bad)} that cannot be read" if bad else "") + f"; {LAYOUT}")
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        warnings.warn(f"{len(bad)} of {len(bad) + len(pictures)} image files cannot be read and are left out: "
                      f"{', '.join(bad[:NAMED])}{more}", RuntimeWarning, stacklevel=3)
    return pictures


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


def _undivided(root: Path, pictures: Sequence[Picture], name: str) -> ImageSet:
    classes = sorted({p.label for p in pictures})
    _refuse_empty_classes(root, pictures)
    [whole] = divide(pictures, classes, [name], [None])
    for number, count in enumerate(np.bincount(whole.labels)):
        if count < 2:
            raise DataError(f"{root}: class {classes[number]!r} has a single image, and a fifth is to be held out; "
                            "add images of it, or divide them yourself into train/ and test/")
    return whole


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
