"""Data sets, and the way of their images to the model: `load`, `batches`, `augment`, `Normalize`.

They lie in memory, decoded; image files that take too much of it stay on the disk, and are decoded ahead of who asks for them.
Every data set comes as (train, test), two `ImageSet`s. Whatever is wrong with files is a `DataError`, in one line.
"""
from .augmentation import Normalize, augment, channel_statistics, random_resized_crop
from .batching import batches, steps_per_epoch
from .cifar import cifar10, cifar100
from .files import DataError
from .folder import image_folder, judged_images
from .handwritten import digits, fashion_mnist, mnist
from .imageset import ImageSet
from .loading import load
from .pictures import ImageFiles, fitted, read_image

__all__ = [
    "DataError",
    "ImageFiles",
    "ImageSet",
    "Normalize",
    "augment",
    "batches",
    "channel_statistics",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "fitted",
    "image_folder",
    "judged_images",
    "load",
    "mnist",
    "random_resized_crop",
    "read_image",
    "steps_per_epoch",
]
