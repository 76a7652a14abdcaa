"""Attention without parameters: how much a pixel counts follows from the pixels themselves."""
from __future__ import annotations

from typing import Any

from minicnn.backend import is_floating
from minicnn.ops.activation import sigmoid
from minicnn.ops.movement import in_real, mean, sum

PIXELS = (2, 3)         # of one channel of one image


def simam(x: Any, eps: float = 1e-4) -> Any:
    """Scale every pixel by how much it stands out of its channel: (N, C, H, W) -> the same.

    With d = x - mean and v = sum d^2 / (n - 1), over the n = H W pixels of one channel of one image:

        e = d^2 / (4 (v + eps)) + 1/2,      y = x s,    s = sigmoid(e)

    dx = dy s + c - mean c,     c = d / (2 (v + eps)) (g - sum(g d^2) / ((n - 1) (v + eps))),     g = dy x s (1 - s)

    It is made of other operations, so that its gradients exist to every order.
    eps: the lambda of the paper, in which e is one over the least energy of a neuron.
    Raises ValueError for images of one pixel, which have no variance over n - 1.
    Source: Yang, Zhang, Li, Xie, "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks", 2021.
    """
    if x.ndim != 4:
        raise ValueError(f"simam: x must have 4 axes (N, C, H, W), not shape {tuple(x.shape)}")
    if not is_floating(x.dtype):
        raise TypeError(f"simam: x must be floating, not {x.dtype}: convert images with array.astype('float32')")
    n = x.shape[2] * x.shape[3]
    if n < 2:
        raise ValueError(f"simam: x {tuple(x.shape)} has {n} pixel a channel, and the variance over n - 1 needs at least 2: "
                         "use a larger image, or leave it out where the image has shrunk to one pixel")
    return in_real(lambda x: _scaled(x, n, eps), x)


def _scaled(x: Any, n: int, eps: float) -> Any:
    d = x - mean(x, PIXELS, keepdims=True)
    square = d * d
    v = sum(square, PIXELS, keepdims=True) * (1.0 / (n - 1))
    return x * sigmoid(square / ((v + eps) * 4.0) + 0.5)
