"""A set of labelled images in memory, and how a part of it is held out."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .files import DataError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images of one size, each with the index of its class.

    Attributes
    ----------
    images : uint8 array (N, C, H, W), 0 black to 255 full; or `ImageFiles`, which is indexed like one
    labels : int64 array (N,), each an index into `classes`
    classes : the names of the classes
    name : for people: where the images come from, and which part of them these are

    Raises
    ------
    ValueError
        A shape or a type other than these, counts that differ, or a label without a class.
    """

    images: Images
    labels: Labels
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"{self.name}: images are {images.dtype}{images.shape}; ImageSet takes uint8 (N, C, H, W)")
        if labels.ndim != 1 or labels.dtype != np.int64:
            raise ValueError(f"{self.name}: labels are {labels.dtype}{labels.shape}; ImageSet takes int64 (N,)")
        if len(images) != len(labels):
            raise ValueError(f"{self.name}: {len(images)} images but {len(labels)} labels; each image takes one label")
        if problem := out_of_range(labels, len(self.classes)):
            raise ValueError(f"{self.name}: {problem}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return f"<ImageSet {self.name}: {len(self)} images of {size}, {len(self.classes)} classes>"

    def subset(self, indices: ArrayLike) -> ImageSet:
        """The images at these positions (integers, 0 to N-1), in this order; a copy, of those in memory."""
        index = np.asarray(indices)
        if index.size == 0:
            index = index.astype(np.int64)              # np.asarray([]) is float64
        inside = not index.size or 0 <= index.min() <= index.max() < len(self)
        if index.ndim != 1 or index.dtype.kind not in "iu" or not inside:
            raise ValueError(f"{self.name}: a subset takes positions from 0 to {len(self) - 1}, not {indices!r:.60}")
        return replace(self, images=self.images.take(index, axis=0), labels=self.labels[index])


def out_of_range(labels: Labels, classes: int) -> str:
    """What is wrong with the labels, in words; empty where each is an index into so many classes."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        return f"labels run from {labels.min()} to {labels.max()}, but {classes} classes take 0 to {classes - 1}"
    return ""


def labelled(images: Images, labels: Labels, classes: Sequence[str], name: str, where: object) -> ImageSet:
    """The ImageSet of what was read from the file `where`; DataError if images and labels there do not agree."""
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels, which do not belong together; "
                        "fetch them again")
    if problem := out_of_range(labels, len(classes)):
        raise DataError(f"{where}: {problem}; fetch the file again")
    return ImageSet(images, labels, tuple(classes), name)


def stratified_split(labels: Labels, held_out: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw `held_out` positions so that every class keeps its share of them, to within one image.

    A class of n among N is due n * held_out / N; all get the whole part of that, and the classes with the largest
    fractions left share what remains (the largest-remainder method). Returns (kept, held out), both ascending.
    """
    if not 0 < held_out < len(labels):
        raise ValueError(f"cannot hold out {held_out} of {len(labels)} images; both parts need at least one")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    due = np.array([len(m) for m in members]) * held_out        # in units of 1 / N images, so all of this is exact
    quota, fraction = due // len(labels), due % len(labels)
    quota[np.argsort(-fraction, kind="stable")[:held_out - quota.sum()]] += 1
    rng = np.random.default_rng(seed)
    drawn = np.sort(np.concatenate([rng.permutation(m)[:q] for m, q in zip(members, quota, strict=True)]))
    return np.setdiff1d(np.arange(len(labels)), drawn), drawn


def hold_out_a_fifth(whole: ImageSet, source: str, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a data set that came in one piece; the names say that `source` was divided here."""
    kept, held = stratified_split(whole.labels, -(-len(whole) // 5), seed)
    return (replace(whole.subset(kept), name=f"{whole.name} train (four fifths of {source})"),
            replace(whole.subset(held), name=f"{whole.name} test (a held-out fifth of {source})"))
