"""Convolution tap by tap, as the sum is written: one matrix product for each position inside the window, nothing gathered.

    y[n, p, q] = sum over taps (i, j) of  x[n, p*sh - ph + i*dh, q*sw - pw + j*dw] W[i, j]          W[i, j]: (C, K)

Each tap reads the images shifted by its position and adds its product to the outputs that see a pixel through it; so there is no
padding either. The same operations as im2col, with C in place of kh kw C numbers in each inner product and the sum over
taps in memory: slower where C is small, and the least memory of all.

Its mirror image, the gradient in x, is what col2im amounts to when every tap is added as soon as it is computed:

    dx[n, p*sh - ph + i*dh, q*sw - pw + j*dw] += dy[n, p, q] W[i, j]^T
"""
from __future__ import annotations

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import PER_NUMBER, Finish, each, empty, image_blocks, scratch
from minicnn.kernels.tiles import multiply, tiled
from minicnn.kernels.windows import Pair, Tap, Windows

BLOCK_BYTES = 1 << 20


def convolve(image: Array, filters: Array, bias: Array | None, windows: Windows, finish: Finish | None = None) -> Array:
    """(N, H, W, C), (kh, kw, C, K), (K,) -> (N, P, Q, K)."""
    xp, k, in_size = array_module(image), filters.shape[3], image.shape[1:3]
    n, (p, q) = len(image), windows.out_size(in_size)
    y = empty(xp, (n, p, q, k), image.dtype)
    taps = [(tap, tiled(filters[tap.at])) for tap in windows.taps(in_size, (p, q))]

    def one(images: slice) -> None:
        block = y[images]
        block[...] = 0 if bias is None else bias
        for tap, tiles in taps:
            seen = image[images, *tap.pixels]
            product = scratch(xp, "tapwise product", (*seen.shape[:3], k), image.dtype)
            multiply(seen.reshape(-1, seen.shape[3]), tiles, product.reshape(-1, k))
            block[:, *tap.outputs] += product
        if finish is not None:
            finish(block.reshape(-1, k), images.start * p * q)

    each(xp, one, image_blocks(xp, n, p * q * k * image.itemsize, BLOCK_BYTES, n * p * q * filters.size // PER_NUMBER))
    return y


def convolve_input_grad(dy: Array, filters: Array, in_size: Pair, windows: Windows) -> Array:
    """(N, P, Q, K), (kh, kw, C, K) -> (N, H, W, C)."""
    xp, (n, p, q, k), c = array_module(dy), dy.shape, filters.shape[2]
    dx = empty(xp, (n, *in_size, c), dy.dtype)
    taps = [(tap, tiled(filters[tap.at].T)) for tap in windows.taps(in_size, (p, q))]

    def one(images: slice) -> None:
        block, taken = dx[images], dy[images].reshape(-1, k)
        block[...] = 0
        for tap, tiles in taps:
            product = scratch(xp, "tapwise product", (len(taken), c), dy.dtype)
            multiply(taken, tiles, product)
            block[:, *tap.pixels] += product.reshape(-1, p, q, c)[:, *tap.outputs]

    each(xp, one, image_blocks(xp, n, p * q * c * dy.itemsize, BLOCK_BYTES, n * p * q * filters.size // PER_NUMBER))
    return dx


def convolve_weight_grad(image: Array, dy: Array, windows: Windows) -> Array:
    """(N, H, W, C), (N, P, Q, K) -> (kh, kw, C, K): dW[i, j] = x^T dy over the pixels and outputs of the tap."""
    xp, c, k = array_module(image), image.shape[3], dy.shape[3]
    dw = xp.zeros((*windows.kernel_size, c, k), image.dtype)

    def one(tap: Tap) -> None:
        xp.matmul(image[:, *tap.pixels].reshape(-1, c).T, dy[:, *tap.outputs].reshape(-1, k), out=dw[tap.at])

    each(xp, one, list(windows.taps(image.shape[1:3], dy.shape[1:3])), dy.size * dw.size // (k * PER_NUMBER))
    return dw
