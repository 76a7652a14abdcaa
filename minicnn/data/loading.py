"""Data sets by name, as the command line asks for them."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .cifar import cifar10, cifar100
from .files import DataError
from .folder import image_folder
from .handwritten import digits, fashion_mnist, mnist
from .imageset import ImageSet

READERS: dict[str, Callable[..., tuple[ImageSet, ...]]] = {"mnist": mnist, "fashion_mnist": fashion_mnist, "cifar10": cifar10,
                                                       "cifar100": cifar100}
NAMES = ("digits", *READERS)


def load(name: str, root: Path | str | None = None, *, skip_bad: bool = False) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "digits"; of "mnist", "fashion_mnist", "cifar10" or "cifar100" with its files in `root`; or of a folder of
    images.

    A folder (or a tar archive of one) is given by its path as `name`, taken from `root` on if there is one; `skip_bad` is as for
    `image_folder`.

    Raises DataError where there is nothing of that name, where `root` is missing, and for all that is wrong with files.
    """
    if name == "digits":
        return digits()
    if name in READERS:
        if root is None:
            raise DataError(f"{name} is read from files on this machine: name their folder with --root FOLDER "
                            f"(in Python, load({name!r}, root=FOLDER))")
        train, test = READERS[name](root)
        return train, test
    path = Path(root or "", name)
    if not path.exists():
        raise DataError(f"no data set {name!r}: known are {', '.join(NAMES)}, or the path of a folder of images "
                        f"({path} does not exist)")
    return image_folder(path, skip_bad=skip_bad)
