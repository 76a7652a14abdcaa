"""Convolution by im2col on a GPU: some images' windows as a matrix, and a product by cuBLAS.

    y = columns W,     dW = columns^T dy,     dx = col2im(dy W^T)

Some images at a time, so that the columns, kh kw times as large as the images, take COLUMN_BYTES and no more, however large the
batch. A 1x1 convolution of stride 1 has no columns: its columns are the image.
"""
from __future__ import annotations

from minicnn.backend import Array, array_module, real_of
from minicnn.kernels.blocks import Finish
from minicnn.kernels.cuda.elementwise import affine_pass, ending, in_fours
from minicnn.kernels.cuda.gemm import gemm
from minicnn.kernels.cuda.launch import THREADS, in_runs, launch, over_rows
from minicnn.kernels.windows import Pair, Windows

COLUMN_BYTES = 256 << 20    # of columns at a time, but those of one image at the least


def convolve(image: Array, filters: Array, bias: Array | None, windows: Windows, finish: Finish | None = None) -> Array:
    """(N, H, W, C), (kh, kw, C, K), (K,) -> (N, P, Q, K)."""
    n, (p, q), k = len(image), windows.out_size(image.shape[1:3]), filters.shape[3]
    y, matrix = array_module(image).empty((n, p, q, k), image.dtype), filters.reshape(-1, k)
    for images in _some_images(n, p * q * len(matrix) * image.itemsize, windows):
        gemm(columns(image[images], windows, (p, q)), matrix, y[images].reshape(-1, k))
    if bias is not None or finish is not None:
        rows = y.reshape(-1, k)
        affine_pass(rows, *ending(bias, finish), rows)
    return y


def convolve_weight_grad(image: Array, dy: Array, windows: Windows) -> Array:
    """(N, H, W, C), (N, P, Q, K) -> (kh, kw, C, K): columns^T dy, of images of half precision in float32."""
    n, p, q, k = dy.shape
    shape = (*windows.kernel_size, image.shape[3], k)
    dw = array_module(image).empty((shape[0] * shape[1] * shape[2], k), real_of(image.dtype))
    for images in _some_images(n, p * q * len(dw) * image.itemsize, windows):
        gemm(columns(image[images], windows, (p, q)).T, dy[images].reshape(-1, k), dw, accumulate=images.start > 0)
    return dw.reshape(shape)


def convolve_input_grad(dy: Array, filters: Array, in_size: Pair, windows: Windows) -> Array:
    """(N, P, Q, K), (kh, kw, C, K) -> (N, H, W, C): the columns' gradient dy W^T, and each pixel gathers what its windows say."""
    (n, p, q, k), c = dy.shape, filters.shape[2]
    back = filters.reshape(-1, k).T
    dx = array_module(dy).empty((n, *in_size, c), dy.dtype)
    if windows.pointwise:
        gemm(dy.reshape(-1, k), back, dx.reshape(-1, c))
        return dx
    for images in _some_images(n, p * q * back.shape[1] * dy.itemsize, windows):
        part = dx[images]
        said = gemm(dy[images].reshape(-1, k), back)
        _gather("col2im", said, part, part.shape, windows, (p, q), len(part) * in_size[0], in_size[1] * c)
    return dx


# ---------------------------------------------------------------- their parts
def columns(image: Array, windows: Windows, out_size: Pair) -> Array:
    """(N, H, W, C) -> (N P Q, kh kw C)."""
    xp, (n, _, _, c), (kh, kw), (p, q) = array_module(image), image.shape, windows.kernel_size, out_size
    if windows.pointwise:
        return image.reshape(-1, c)
    gathered = xp.empty((n * p * q, kh * kw * c), image.dtype)
    _gather("im2col", image, gathered, image.shape, windows, out_size, n * p, q * kw * c)
    return gathered


def _gather(kernel: str, source: Array, out: Array, image_shape: tuple[int, ...], windows: Windows, out_size: Pair,
            rows: int, length: int) -> None:
    """Start a kernel of im2col.cu, over so many rows of such a length; four channels go as one where they can.

    image_shape: (N, H, W, C) of the image, which is read by im2col and written by col2im.   out_size: (P, Q).
    """
    if out.size:
        fours = in_fours(image_shape[3], source, out)
        launch("im2col", f"{kernel}{fours}", over_rows(rows, length, fours), THREADS,
               source, out, *image_shape, *windows.kernel_size, *windows.stride, *windows.padding, *windows.dilation, *out_size)


def _some_images(n: int, bytes_each: int, windows: Windows) -> list[slice]:
    """Cut n images into runs whose columns are about COLUMN_BYTES; into one run where there are no columns."""
    return in_runs(n, 0 if windows.pointwise else bytes_each, COLUMN_BYTES)
