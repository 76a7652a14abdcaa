"""ResNet: stages of residual blocks, y = relu(body(x) + shortcut(x)).

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015. The ImageNet models have torchvision's
names, and its stride on the 3x3 of a bottleneck (v1.5); the CIFAR models the names of the public CIFAR checkpoints.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.autograd import Tensor
from minicnn.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Layer, Linear, MaxPool2d, ReLU, Residual, Sequential, Shape
from minicnn.models.published import takes_weights

Block = Callable[[int, int, Layer], list[Layer]]        # (channels, stride, shortcut) -> the block's layers


def conv_bn(channels: int, kernel_size: int, stride: int = 1, names: tuple[str, str] = ("0", "1")) -> list[Layer]:
    """A convolution that keeps the image's size (over the stride) and its batch norm, which makes a bias pointless."""
    return [Conv2d(channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False).named(names[0]),
            BatchNorm2d().named(names[1])]


def basic_block(channels: int, stride: int, shortcut: Layer) -> list[Layer]:
    """Two 3x3 convolutions. (C, H, W) -> (channels, H / stride, W / stride)"""
    body = [*conv_bn(channels, 3, stride, ("conv1", "bn1")), ReLU().named("relu1"),
            *conv_bn(channels, 3, names=("conv2", "bn2"))]
    return [Residual(Sequential(body).named(""), shortcut).named(""), ReLU().named("relu")]


def bottleneck(channels: int, stride: int, shortcut: Layer) -> list[Layer]:
    """1x1 down to a quarter, 3x3, 1x1 up again. (C, H, W) -> (channels, H / stride, W / stride)"""
    body = [*conv_bn(channels // 4, 1, names=("conv1", "bn1")), ReLU().named("relu1"),
            *conv_bn(channels // 4, 3, stride, ("conv2", "bn2")), ReLU().named("relu2"),
            *conv_bn(channels, 1, names=("conv3", "bn3"))]
    return [Residual(Sequential(body).named(""), shortcut).named(""), ReLU().named("relu")]


def projection(channels: int, stride: int) -> list[Layer]:
    """Shortcut option B: a 1x1 convolution to the body's shape."""
    return conv_bn(channels, 1, stride)


class PadShortcut(Layer):
    """Shortcut option A, without parameters: every second pixel, and zero channels, half before and half after the real ones."""

    def __init__(self, channels: int, stride: int) -> None:
        self.channels, self.stride = channels, stride

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c, h, w = in_shape
        if (self.channels - c) % 2 or self.channels < c:
            raise ValueError(f"an option A shortcut adds as many zero channels before as after; from {c} to {self.channels} "
                             'it cannot; use shortcut="B"')
        return self.channels, -(-h // self.stride), -(-w // self.stride)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        side = (self.channels - x.shape[1]) // 2
        return ops.pad(x[:, :, ::self.stride, ::self.stride], ((0, 0), (side, side), (0, 0), (0, 0)))    # type: ignore[no-any-return]


def stage(block: Block, channels: int, depth: int, stride: int, shortcut: list[Layer], shortcut_name: str) -> Layer:
    """`depth` blocks; only the first has a stride, and a shortcut that is not the identity."""
    first = block(channels, stride, Sequential(shortcut).named(shortcut_name))
    others = [block(channels, 1, Sequential([]).named(shortcut_name)) for _ in range(depth - 1)]
    return Sequential([first, *others])


# ---------------------------------------------------------------- ImageNet
def resnet(block: Block, depths: Sequence[int], widths: Sequence[int], num_classes: int = 1000,
           in_shape: Sequence[int] = (3, 224, 224), *, seed: int = 0, dtype: Any = np.float32) -> Sequential:
    """A ResNet for large images: a 7x7 convolution and a pool quarter the image, then four stages."""
    stages, channels = [], 64
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        stride = 1 if i == 0 else 2
        shortcut = projection(width, stride) if (stride, channels) != (1, width) else []
        stages.append(stage(block, width, depth, stride, shortcut, "downsample").named(f"layer{i + 1}"))
        channels = width
    return Sequential([*conv_bn(64, 7, 2, ("conv1", "bn1")), ReLU().named("relu"),
                       MaxPool2d(3, stride=2, padding=1).named("maxpool"), *stages,
                       GlobalAvgPool2d().named("avgpool"), Linear(num_classes).named("fc")], in_shape, seed, dtype)


BASIC, WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)


@takes_weights
def resnet18(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """8 basic blocks; options as for `resnet`."""
    return resnet(basic_block, [2, 2, 2, 2], BASIC, num_classes, in_shape, **options)


@takes_weights
def resnet34(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """16 basic blocks; options as for `resnet`."""
    return resnet(basic_block, [3, 4, 6, 3], BASIC, num_classes, in_shape, **options)


@takes_weights
def resnet50(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """16 bottlenecks; options as for `resnet`."""
    return resnet(bottleneck, [3, 4, 6, 3], WIDE, num_classes, in_shape, **options)


@takes_weights
def resnet101(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """33 bottlenecks; options as for `resnet`."""
    return resnet(bottleneck, [3, 4, 23, 3], WIDE, num_classes, in_shape, **options)


@takes_weights
def resnet152(num_classes: int = 1000, in_shape: Sequence[int] = (3, 224, 224), **options: Any) -> Sequential:
    """50 bottlenecks; options as for `resnet`."""
    return resnet(bottleneck, [3, 8, 36, 3], WIDE, num_classes, in_shape, **options)


# ---------------------------------------------------------------- CIFAR
def cifar_resnet(depth: int, num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), *, shortcut: str = "A", seed: int = 0,
                 dtype: Any = np.float32) -> Sequential:
    """A ResNet for small images: three stages of 16, 32 and 64 channels, (depth - 2) / 6 basic blocks in each.

    shortcut: where a stage changes the shape, "A" pads with zero channels, "B" projects by a 1x1 convolution.
    """
    if shortcut not in ("A", "B"):
        raise ValueError(f'shortcut={shortcut!r} must be "A" (zero channels) or "B" (1x1 convolution)')
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} must be 6 n + 2: 20, 32, 44, 56, 110, ...")
    stages = []
    for i, channels in enumerate((16, 32, 64)):
        change: list[Layer] = [] if i == 0 else [PadShortcut(channels, 2)] if shortcut == "A" else projection(channels, 2)
        stages.append(stage(basic_block, channels, (depth - 2) // 6, 1 if i == 0 else 2, change, "shortcut").named(f"layer{i + 1}"))
    return Sequential([*conv_bn(16, 3, names=("conv1", "bn1")), ReLU().named("relu"), *stages,
                       GlobalAvgPool2d().named("avgpool"), Linear(num_classes).named("linear")], in_shape, seed, dtype)


@takes_weights
def resnet20(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), **options: Any) -> Sequential:
    """9 basic blocks; options as for `cifar_resnet`."""
    return cifar_resnet(20, num_classes, in_shape, **options)


@takes_weights
def resnet32(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), **options: Any) -> Sequential:
    """15 basic blocks; options as for `cifar_resnet`."""
    return cifar_resnet(32, num_classes, in_shape, **options)


@takes_weights
def resnet44(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), **options: Any) -> Sequential:
    """21 basic blocks; options as for `cifar_resnet`."""
    return cifar_resnet(44, num_classes, in_shape, **options)


@takes_weights
def resnet56(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), **options: Any) -> Sequential:
    """27 basic blocks; options as for `cifar_resnet`."""
    return cifar_resnet(56, num_classes, in_shape, **options)


@takes_weights
def resnet110(num_classes: int = 10, in_shape: Sequence[int] = (3, 32, 32), **options: Any) -> Sequential:
    """54 basic blocks; options as for `cifar_resnet`."""
    return cifar_resnet(110, num_classes, in_shape, **options)
