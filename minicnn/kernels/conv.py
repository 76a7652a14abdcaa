"""Convolution: three maps, each computed by the algorithm that was chosen.

    y[n, k, p, q] = bias[k] + sum_{c, i, j}  weight[k, c, i, j] * x[n, c, p*sh - ph + i*dh, q*sw - pw + j*dw]

(cross-correlation, zero padding). Shapes: x (N, C, H, W), weight (K, C / groups, kh, kw), y (N, K, P, Q). Memory is
channels-last inside: images lie as (N, H, W, C), so that a gather copies runs of channels and a product writes the layout that
the next layer reads; filters as (kh, kw, C, K), which is the matrix of that product already. Arrays that lie so are read as they
are, others are copied.

The three maps `conv2d`, `conv2d_input_grad` and `conv2d_weight_grad` are each other's derivatives: the convolution is
linear in x and in weight, and the other two are its adjoints in each.
"""
from __future__ import annotations

from collections.abc import Callable

from minicnn.backend import Array, array_module
from minicnn.kernels import im2col, tapwise, winograd
from minicnn.kernels.algorithms import choose
from minicnn.kernels.blocks import Finish
from minicnn.kernels.dispatch import has_cuda
from minicnn.kernels.elementwise import Affine, as_images
from minicnn.kernels.windows import Pair, Windows, channels_first, channels_last, rows_of

FORWARD = {"im2col": im2col.convolve, "direct": tapwise.convolve, "winograd": winograd.convolve}
INPUT_GRAD = {"im2col": im2col.convolve_input_grad, "direct": tapwise.convolve_input_grad,
              "winograd": winograd.convolve_input_grad}
WEIGHT_GRAD = {"im2col": im2col.convolve_weight_grad, "direct": tapwise.convolve_weight_grad,
               "winograd": winograd.convolve_weight_grad}


def conv2d(x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int = 1, algorithm: str | None = None,
           finish: Finish | None = None) -> Array:
    """(N, C, H, W), (K, C / groups, kh, kw), (K,) -> (N, K, P, Q).   finish: what to do with each block, after the bias."""
    (k, c), (n, p, q) = weight.shape[:2], (len(x), *windows.out_size(x.shape[2:]))
    name = choose(algorithm, "forward", x, windows, groups, c, k, n * p * q)
    if groups > 1:
        y = channels_last(_each_group(groups, lambda x, w: conv2d(x, w, None, windows, 1, name), (x, 1), (weight, 0)))
        if bias is not None:
            y += bias
        if finish is not None:
            finish(y.reshape(-1, y.shape[3]), 0)
        return channels_first(y)
    return channels_first(FORWARD[name](channels_last(x), filters_last(weight, x), bias, windows, finish))


def conv2d_input_grad(dy: Array, weight: Array, in_size: Pair, windows: Windows, groups: int = 1,
                      algorithm: str | None = None) -> Array:
    """dL/dx from dL/dy: what each output got from a pixel through a tap goes back to it, times the same weight.

    dx[n, c, p*sh - ph + i*dh, ...] += sum_k weight[k, c, i, j] * dy[n, k, p, q]
    """
    (k, c), n = weight.shape[:2], len(dy)
    name = choose(algorithm, "input_grad", dy, windows, groups, c, k, n * dy.shape[2] * dy.shape[3])
    if groups > 1:
        return _each_group(groups, lambda dy, w: conv2d_input_grad(dy, w, in_size, windows, 1, name), (dy, 1), (weight, 0))
    return channels_first(INPUT_GRAD[name](channels_last(dy), filters_last(weight, dy), in_size, windows))


def conv2d_weight_grad(x: Array, dy: Array, windows: Windows, groups: int = 1, algorithm: str | None = None) -> Array:
    """dL/dweight from dL/dy: every window times the output gradient it led to, summed over images and positions.

    dweight[k, c, i, j] = sum_{n, p, q} dy[n, k, p, q] * x[n, c, p*sh - ph + i*dh, q*sw - pw + j*dw]
    """
    (n, k, p, q), c = dy.shape, x.shape[1]
    name = choose(algorithm, "weight_grad", x, windows, groups, c, k, n * p * q)
    if groups > 1:
        return _each_group(groups, lambda x, dy: conv2d_weight_grad(x, dy, windows, 1, name), (x, 1), (dy, 1), join=0)
    return filters_first(WEIGHT_GRAD[name](channels_last(x), channels_last(dy), windows))


@has_cuda
def conv2d_affine(x: Array, weight: Array, scale: Array, shift: Array, residual: Array | None, rectified: bool, windows: Windows,
                  groups: int, algorithm: str | None) -> Array:
    """max(scale conv2d(x, weight) + shift + residual, 0); the filters are scaled where they are fewer numbers than the result."""
    (n, *_), (p, q) = x.shape, windows.out_size(x.shape[2:])
    if n * p * q > weight[0].size:
        scaled = weight * scale.reshape(-1, 1, 1, 1)
        return conv2d(x, scaled, shift, windows, groups, algorithm, affine(None, None, residual, rectified))
    return conv2d(x, weight, None, windows, groups, algorithm, affine(scale, shift, residual, rectified))


def affine(scale: Array | None, shift: Array | None, residual: Array | None, rectified: bool) -> Affine:
    """What comes after a convolution, of (N, K, P, Q): scale each channel and shift it, add a residual, rectify."""
    return Affine(scale, shift, None if residual is None else rows_of(residual), rectified)


# ---------------------------------------------------------------- their parts
def filters_last(weight: Array, beside: Array | None = None) -> Array:
    """(K, C, kh, kw) -> (kh, kw, C, K), contiguous: a view where the memory lies so already, which is how layers keep it.

    beside: images; of half precision, the filters are rounded to it.
    """
    filters = array_module(weight).ascontiguousarray(weight.transpose(2, 3, 1, 0))
    return filters if beside is None else as_images(filters, beside)


def filters_first(filters: Array) -> Array:
    """(kh, kw, C, K) -> (K, C, kh, kw), a view."""
    return filters.transpose(3, 2, 0, 1)


def _each_group(groups: int, kernel: Callable[..., Array], *split: tuple[Array, int], join: int = 1) -> Array:
    """Run a kernel on each group's share of the arrays, cut along the axis given with each, and join along `join`."""
    def share(array: Array, axis: int, g: int) -> Array:
        size = array.shape[axis] // groups
        return array[(slice(None),) * axis + (slice(g * size, (g + 1) * size),)]

    parts = [kernel(*(share(array, axis, g) for array, axis in split)) for g in range(groups)]
    return array_module(parts[0]).concatenate(parts, axis=join)
