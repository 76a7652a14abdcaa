"""VGG: five stages of 3x3 convolutions, each ended by a 2x2 max-pool, and three fully connected layers.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014. Names as torchvision's.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.initialization import normal
from minicnn.layers import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Dropout, Flatten, Layer, Linear, MaxPool2d, ReLU, Sequential
from minicnn.models.published import takes_weights

WIDTHS = (64, 128, 256, 512, 512)       # channels of each stage
VGG11 = (1, 1, 2, 2, 2)                 # convolutions in each stage
VGG13 = (2, 2, 2, 2, 2)
VGG16 = (2, 2, 3, 3, 3)
VGG19 = (2, 2, 4, 4, 4)


def conv_relu(channels: int, batch_norm: bool) -> list[Layer]:
    """A 3x3 convolution that keeps the image's size, [its batch norm,] its ReLU."""
    return [Conv2d(channels, 3, padding=1), *([BatchNorm2d()] if batch_norm else []), ReLU()]


def features(depths: Sequence[int], batch_norm: bool) -> list[Layer]:
    """The convolutional stages: each halves the image."""
    return [layer for channels, depth in zip(WIDTHS, depths, strict=True)
            for layer in [*(part for _ in range(depth) for part in conv_relu(channels, batch_norm)), MaxPool2d(2)]]


def classifier(num_classes: int, hidden: int, dropout: float) -> list[Layer]:
    """Three fully connected layers: `hidden`, `hidden` and `num_classes` wide."""

    def fully_connected(n: int) -> Layer:
        return Linear(n, weight_init=normal(0.01))
    return [fully_connected(hidden), ReLU(), Dropout(dropout),
            fully_connected(hidden), ReLU(), Dropout(dropout),
            fully_connected(num_classes)]


def vgg(depths: Sequence[int], batch_norm: bool, num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), *, seed: int = 0,
        dtype: Any = np.float32, dropout: float = 0.5, hidden: int = 4096, pool: int = 7) -> Sequential:
    """A VGG of the given depths, built.

    hidden: width of the fully connected layers.   dropout: share dropped behind each.
    pool: the image is averaged to pool x pool before them; 1 suits small images, whose last stage is 1 x 1.
    """
    return Sequential([Sequential(features(depths, batch_norm)).named("features"),
                       AdaptiveAvgPool2d(pool).named("avgpool"),
                       Flatten().named("flatten"),
                       Sequential(classifier(num_classes, hidden, dropout)).named("classifier")], in_shape, seed, dtype)


@takes_weights
def vgg11(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """8 convolutions; options as for `vgg`."""
    return vgg(VGG11, False, num_classes, in_shape, **options)


@takes_weights
def vgg13(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """10 convolutions; options as for `vgg`."""
    return vgg(VGG13, False, num_classes, in_shape, **options)


@takes_weights
def vgg16(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """13 convolutions; options as for `vgg`."""
    return vgg(VGG16, False, num_classes, in_shape, **options)


@takes_weights
def vgg19(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """16 convolutions; options as for `vgg`."""
    return vgg(VGG19, False, num_classes, in_shape, **options)


@takes_weights
def vgg11_bn(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """8 convolutions, each with a batch norm; options as for `vgg`."""
    return vgg(VGG11, True, num_classes, in_shape, **options)


@takes_weights
def vgg13_bn(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """10 convolutions, each with a batch norm; options as for `vgg`."""
    return vgg(VGG13, True, num_classes, in_shape, **options)


@takes_weights
def vgg16_bn(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """13 convolutions, each with a batch norm; options as for `vgg`."""
    return vgg(VGG16, True, num_classes, in_shape, **options)


@takes_weights
def vgg19_bn(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """16 convolutions, each with a batch norm; options as for `vgg`."""
    return vgg(VGG19, True, num_classes, in_shape, **options)
