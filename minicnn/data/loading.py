"""Data sets by name, as the command line asks for them."""
from __future__ import annotations

from pathlib import Path

from .cifar import cifar10
from .files import DataError
from .folder import image_folder
from .handwritten import digits, mnist
from .imageset import ImageSet

NAMES = ("digits", "mnist", "cifar10")


def load(name: str, root: Path | str | None = None) -> tuple[ImageSet, ImageSet]:
    """(train, test) of "digits", of "mnist" or "cifar10" with its files in `root`, or of a folder of images.

    A folder (or a tar archive of one) is given by its path as `name`, taken from `root` on if there is one.

    Raises DataError where there is nothing of that name, where `root` is missing, and for all that is wrong with files.
    """
    if name == "digits":
        return digits()
    if name in ("mnist", "cifar10"):
        if root is None:
            raise DataError(f"{name} is read from files on this machine: name their folder with --root FOLDER "
                            f"(in Python, load({name!r}, root=FOLDER))")
        train, test = mnist(root) if name == "mnist" else cifar10(root)
        return train, test
    path = Path(root or "", name)
    if not path.exists():
        raise DataError(f"no data set {name!r}: known are {', '.join(NAMES)}, or the path of a folder of images "
                        f"({path} does not exist)")
    return image_folder(path)
