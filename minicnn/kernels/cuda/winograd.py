"""Winograd's convolution F(4x4, 3x3) on a GPU: the transforms of winograd.cu, and between them 36 products by one call of cuBLAS.

Some images at a time, so that the spectra, 2.25 times as large as the images and the results, take SPECTRUM_BYTES and no more.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import Finish
from minicnn.kernels.cuda.elementwise import ending
from minicnn.kernels.cuda.gemm import gemm
from minicnn.kernels.cuda.launch import THREADS, in_runs, launch, over
from minicnn.kernels.windows import Pair, Windows

SPECTRUM_BYTES = 256 << 20


def convolve(image: Array, filters: Array, bias: Array | None, windows: Windows, finish: Finish | None = None) -> Array:
    """(N, H, W, C), (3, 3, C, K), (K,) -> (N, P, Q, K) with P = H + 2 padding - 2, Q alike."""
    (n, _, _, c), k, (p, q) = image.shape, filters.shape[3], windows.out_size(image.shape[1:3])
    y, u = array_module(image).empty((n, p, q, k), image.dtype), _filter_spectrum(filters)
    scale, shift, residual, rectified = ending(bias, finish)
    down, across = -(-p // 4), -(-q // 4)
    for some in _some_images(n, down * across, c + k, image.dtype):
        m, out = gemm(_image_spectrum(image[some], windows.padding, (down, across)), u), y[some]
        others = None if residual is None else residual[some.start * p * q:some.stop * p * q]
        launch("winograd", "outputs", over(m.size // 36), THREADS, m, scale, shift, others, out, len(out), p, q, k, down, across,
               int(rectified))
    return y


def convolve_weight_grad(image: Array, dy: Array, windows: Windows) -> Array:
    """(N, H, W, C), (N, P, Q, K) -> (3, 3, C, K): dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G."""
    xp, c, (n, p, q, k) = array_module(image), image.shape[3], dy.shape
    down, across = -(-p // 4), -(-q // 4)
    du = xp.empty((36, c, k), image.dtype)
    for some in _some_images(n, down * across, c + k, image.dtype):
        v, part = _image_spectrum(image[some], windows.padding, (down, across)), dy[some]
        w = xp.empty((36, v.shape[1], k), dy.dtype)
        launch("winograd", "output_spectrum", over(w.size // 36), THREADS, part, w, len(part), p, q, k, down, across)
        gemm(v.transpose(0, 2, 1), w, du, accumulate=some.start > 0)
    dg = xp.empty((3, 3, c, k), image.dtype)
    launch("winograd", "filter_gradient", over(c * k), THREADS, du, dg, c * k)
    return dg


def _image_spectrum(image: Array, padding: Pair, tiles: Pair) -> Array:
    """V = B^T d B: (N, H, W, C) -> (36, N tiles, C)."""
    n, h, w, c = image.shape
    v = array_module(image).empty((36, n * tiles[0] * tiles[1], c), image.dtype)
    launch("winograd", "image_spectrum", over(v.size // 36), THREADS, image, v, n, h, w, c, *tiles, *padding)
    return v


def _filter_spectrum(filters: Array) -> Array:
    """U = G g G^T: (3, 3, C, K) -> (36, C, K)."""
    xp, (c, k) = array_module(filters), filters.shape[2:]
    u = xp.empty((36, c, k), filters.dtype)
    launch("winograd", "filter_spectrum", over(c * k), THREADS, xp.ascontiguousarray(filters), u, c * k)
    return u


def _some_images(n: int, tiles: int, channels: int, dtype: np.dtype) -> list[slice]:
    """Cut n images into runs whose spectra, of all the channels on both sides, are about SPECTRUM_BYTES."""
    return in_runs(n, 36 * tiles * channels * dtype.itemsize, SPECTRUM_BYTES)
