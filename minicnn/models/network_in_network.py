"""Network in Network: each convolution is followed by two of 1x1, a small fully connected network at every pixel.

Source: Lin, Chen, Yan, "Network In Network", 2013. Names as in the authors' Caffe model for CIFAR-10 (cccp: cascaded cross channel
parametric pooling, the paper's other name for a 1x1 convolution).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.layers import AvgPool2d, Conv2d, Dropout, GlobalAvgPool2d, Layer, MaxPool2d, ReLU, Sequential
from minicnn.models.published import takes_weights


def mlpconv(kernel_size: int, **widths: int) -> list[Layer]:
    """A convolution that keeps the image's size, then 1x1 ones, a ReLU behind each. widths: {name: channels}, in order."""
    first, *others = widths.items()
    convolutions = [Conv2d(first[1], kernel_size, padding=kernel_size // 2).named(first[0]),
                    *(Conv2d(channels, 1).named(name) for name, channels in others)]
    return [layer for conv in convolutions for layer in (conv, ReLU())]


@takes_weights
def nin(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), *, seed: int = 0, dtype: Any = np.float32,
        dropout: float = 0.5) -> Sequential:
    """Three such networks, for small images; the mean of each of the last one's channels is a class's logit.

    The pools are 3x3 with stride 2 and no padding, in ceil mode as Caffe's always are: 32 pixels become 16, then 8.
    dropout: share dropped behind each pool. The last convolution has its ReLU too, so that no logit is below 0.
    """
    return Sequential([*mlpconv(5, conv1=192, cccp1=160, cccp2=96),
                       MaxPool2d(3, 2, ceil_mode=True).named("pool1"), Dropout(dropout),
                       *mlpconv(5, conv2=192, cccp3=192, cccp4=192),
                       AvgPool2d(3, 2, ceil_mode=True).named("pool2"), Dropout(dropout),
                       *mlpconv(3, conv3=192, cccp5=192, cccp6=num_classes),
                       GlobalAvgPool2d().named("pool3")], in_shape, seed, dtype)
