"""Convolution and pooling as their definitions say: loops over every index, one multiplication at a time.

For reading, and as a witness of the fast kernels: nothing here is shared with them, no padding, no gather, no product of
matrices. Use small arrays; the loops run in Python.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minicnn.backend import Array, array_module


def _pixels(p: int, q: int, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
            dilation: tuple[int, int], in_size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """The taps (i, j) through which output (p, q) sees a pixel (h, w) of the image."""
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            h = p * stride[0] - padding[0] + i * dilation[0]
            w = q * stride[1] - padding[1] + j * dilation[1]
            if 0 <= h < in_size[0] and 0 <= w < in_size[1]:
                yield i, j, h, w


def _out_size(in_size: tuple[int, int], kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
              dilation: tuple[int, int]) -> tuple[int, int]:
    """Count the places where the window fits."""
    p, q = (len(range(0, n + 2 * pad - d * (k - 1), s))
            for n, k, s, pad, d in zip(in_size, kernel_size, stride, padding, dilation, strict=True))
    return p, q


def conv2d(x: Array, weight: Array, bias: Array | None = None, *, stride: tuple[int, int] = (1, 1),
           padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1) -> Array:
    """y[n, k, p, q] = bias[k] + sum over c, i, j of weight[k, c, i, j] * x[n, group's c, p*sh - ph + i*dh, q*sw - pw + j*dw]."""
    (n_images, _, *size), (c_out, c_group, *kernel_size) = x.shape, weight.shape
    out_size = _out_size(size, kernel_size, stride, padding, dilation)
    y = array_module(x).zeros((n_images, c_out, *out_size), x.dtype)
    for n, k, p, q in np.ndindex(*y.shape):
        first = k // (c_out // groups) * c_group                # the first input channel of this filter's group
        for i, j, h, w in _pixels(p, q, kernel_size, stride, padding, dilation, size):
            for c in range(c_group):
                y[n, k, p, q] += weight[k, c, i, j] * x[n, first + c, h, w]
        if bias is not None:
            y[n, k, p, q] += bias[k]
    return y


def conv2d_grads(dy: Array, x: Array, weight: Array, *, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
                 dilation: tuple[int, int] = (1, 1), groups: int = 1) -> tuple[Array, Array, Array]:
    """dL/dx, dL/dweight, dL/dbias: every product of the forward hands its output's gradient to both of its factors."""
    (_, _, *size), (c_out, c_group, *kernel_size) = x.shape, weight.shape
    xp = array_module(x)
    dx, dweight, dbias = xp.zeros(x.shape, x.dtype), xp.zeros(weight.shape, x.dtype), xp.zeros(c_out, x.dtype)
    for n, k, p, q in np.ndindex(*dy.shape):
        first = k // (c_out // groups) * c_group
        g = dy[n, k, p, q]
        dbias[k] += g
        for i, j, h, w in _pixels(p, q, kernel_size, stride, padding, dilation, size):
            for c in range(c_group):
                dx[n, first + c, h, w] += weight[k, c, i, j] * g
                dweight[k, c, i, j] += x[n, first + c, h, w] * g
    return dx, dweight, dbias


def max_pool2d(x: Array, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Array:
    """y[n, c, p, q] = the largest x that the window at (p, q) sees."""
    n_images, channels, *size = x.shape
    y = array_module(x).zeros((n_images, channels, *_out_size(size, kernel_size, stride, padding, (1, 1))), x.dtype)
    for n, c, p, q in np.ndindex(*y.shape):
        seen = _pixels(p, q, kernel_size, stride, padding, (1, 1), size)
        y[n, c, p, q] = max(x[n, c, h, w] for _, _, h, w in seen)
    return y


def max_pool2d_grad(dy: Array, x: Array, kernel_size: tuple[int, int], stride: tuple[int, int],
                    padding: tuple[int, int]) -> Array:
    """The first of the largest pixels of each window gets all of its output's gradient."""
    size = x.shape[2:]
    dx = array_module(x).zeros(x.shape, x.dtype)
    for n, c, p, q in np.ndindex(*dy.shape):
        seen = _pixels(p, q, kernel_size, stride, padding, (1, 1), size)
        _, _, h, w = max(seen, key=lambda pixel: x[n, c, pixel[2], pixel[3]])       # max keeps the first of equals
        dx[n, c, h, w] += dy[n, c, p, q]
    return dx


def avg_pool2d(x: Array, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Array:
    """The sum of what the window sees, over its area (padding counts as zeros)."""
    n_images, channels, *size = x.shape
    y = array_module(x).zeros((n_images, channels, *_out_size(size, kernel_size, stride, padding, (1, 1))), x.dtype)
    for n, c, p, q in np.ndindex(*y.shape):
        for _, _, h, w in _pixels(p, q, kernel_size, stride, padding, (1, 1), size):
            y[n, c, p, q] += x[n, c, h, w] / (kernel_size[0] * kernel_size[1])
    return y


def avg_pool2d_grad(dy: Array, x: Array, kernel_size: tuple[int, int], stride: tuple[int, int],
                    padding: tuple[int, int]) -> Array:
    """Every pixel of a window gets the same share of its output's gradient."""
    dx = array_module(x).zeros(x.shape, x.dtype)
    for n, c, p, q in np.ndindex(*dy.shape):
        for _, _, h, w in _pixels(p, q, kernel_size, stride, padding, (1, 1), x.shape[2:]):
            dx[n, c, h, w] += dy[n, c, p, q] / (kernel_size[0] * kernel_size[1])
    return dx
