"""GoogLeNet: inception blocks, in which 1x1, 3x3 and 5x5 convolutions and a pool see the same image, side by side.

Source: Szegedy et al., "Going Deeper with Convolutions", 2014; with the batch norm of Ioffe, Szegedy, 2015, behind every
convolution, and torchvision's names.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.layers import BatchNorm2d, Branches, Conv2d, Dropout, GlobalAvgPool2d, Layer, Linear, MaxPool2d, ReLU, Sequential
from minicnn.models.published import takes_weights

# Channels of each block: 1x1; 3x3 and the 1x1 before it; 5x5 and the 1x1 before it; the 1x1 behind the pool.
Widths = tuple[int, tuple[int, int], tuple[int, int], int]
STAGE3: dict[str, Widths] = {"3a": (64, (96, 128), (16, 32), 32), "3b": (128, (128, 192), (32, 96), 64)}
STAGE4: dict[str, Widths] = {"4a": (192, (96, 208), (16, 48), 64), "4b": (160, (112, 224), (24, 64), 64),
                             "4c": (128, (128, 256), (24, 64), 64), "4d": (112, (144, 288), (32, 64), 64),
                             "4e": (256, (160, 320), (32, 128), 128)}
STAGE5: dict[str, Widths] = {"5a": (256, (160, 320), (32, 128), 128), "5b": (384, (192, 384), (48, 128), 128)}


def conv_bn_relu(channels: int, kernel_size: int, stride: int = 1) -> Layer:
    """A convolution that keeps the image's size (over the stride), its batch norm, its ReLU."""
    return Sequential([Conv2d(channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False).named("conv"),
                       BatchNorm2d(eps=1e-3).named("bn"), ReLU().named("relu")])


def inception(widths: Widths, branch5x5: int) -> Layer:
    """Four branches, side by side: (C, H, W) -> (the sum of their channels, H, W). A 1x1 spares the large kernels most channels."""
    one, (before_three, three), (before_five, five), pooled = widths
    return Branches(conv_bn_relu(one, 1).named("branch1"),
                    Sequential([conv_bn_relu(before_three, 1), conv_bn_relu(three, 3)]).named("branch2"),
                    Sequential([conv_bn_relu(before_five, 1), conv_bn_relu(five, branch5x5)]).named("branch3"),
                    Sequential([MaxPool2d(3, 1, 1, ceil_mode=True), conv_bn_relu(pooled, 1)]).named("branch4"))


def stage(blocks: dict[str, Widths], branch5x5: int) -> list[Layer]:
    """Inception blocks one after the other, all of one image size."""
    return [inception(widths, branch5x5).named(f"inception{name}") for name, widths in blocks.items()]


@takes_weights
def googlenet(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), *, branch5x5: int = 5, seed: int = 0,
              dtype: Any = np.float32, dropout: float = 0.2) -> Sequential:
    """Nine inception blocks, 22 layers deep; images of at least 15 x 15. The pools run in ceil mode.

    branch5x5: kernel of the third branch, 5 as in the paper; 3 in torchvision's by a known slip, which its published weights need.
    dropout: share of the features dropped before the classes.

    There are no auxiliary heads. torchvision's checkpoint has them (aux1, aux2): weights="imagenet" passes over them and takes the
    kernel from the file; load_state_dict takes it with strict=False, which reports them. Its weights expect pixels of 0..1 as
    (x - 0.5) / 0.5: torchvision's model brings what was normalised with ImageNet's mean and deviation to that by itself
    (transform_input), this one takes its input as it is.
    """
    if branch5x5 not in (5, 3):
        raise ValueError(f"branch5x5={branch5x5!r} must be 5, the paper's kernel, or 3, which torchvision's weights need")
    return Sequential([conv_bn_relu(64, 7, 2).named("conv1"), MaxPool2d(3, 2, ceil_mode=True).named("maxpool1"),
                       conv_bn_relu(64, 1).named("conv2"), conv_bn_relu(192, 3).named("conv3"),
                       MaxPool2d(3, 2, ceil_mode=True).named("maxpool2"), *stage(STAGE3, branch5x5),
                       MaxPool2d(3, 2, ceil_mode=True).named("maxpool3"), *stage(STAGE4, branch5x5),
                       MaxPool2d(2, 2, ceil_mode=True).named("maxpool4"), *stage(STAGE5, branch5x5),
                       GlobalAvgPool2d().named("avgpool"), Dropout(dropout).named("dropout"), Linear(num_classes).named("fc")],
                      in_shape, seed, dtype)
