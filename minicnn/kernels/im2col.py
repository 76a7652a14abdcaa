"""Convolution by im2col: gather every window into a row of a matrix, and a convolution is one matrix product.

    columns[n p q, i j c] = x[n, p*sh - ph + i*dh, q*sw - pw + j*dw, c]           0 in the padding
    y = columns W,     W[i j c, k] = weight[k, c, i, j]
    dW = columns^T dy

Any kernel, stride, padding and dilation. Block by block, each on one thread: some output rows' windows are gathered
(`columns`, about COLUMN_BYTES), multiplied, and finished, while they are in cache; so the matrix of the whole batch,
kh kw times as large as the images, never exists. A 1x1 convolution of stride 1 needs no gathering: its columns are the image.

      images (N, H, W, C)        columns (rows, kh kw C)        W (kh kw C, K)         y (N, P, Q, K)
    +--------------------+     +------------------------+      +---------------+     +----------------+
    |  [ kh x W x C ]    | ->  | one window a row       |  x   |               |  =  | some rows      |
    +--------------------+     +------------------------+      +---------------+     +----------------+

Cost: 2 kh kw C K operations an output pixel, at the rate of the machine's matrix product; and kh kw C numbers copied.

This is the definition that the other algorithms are checked against, and float64's own.
Source: Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels import tapwise
from minicnn.kernels.blocks import PER_NUMBER, Finish, a_share, copy_padded, copy_pixels, each, empty, scratch, slices, total
from minicnn.kernels.dispatch import has_cuda
from minicnn.kernels.linear import product
from minicnn.kernels.tiles import multiply, sum_of_products, tiled
from minicnn.kernels.windows import Pair, Windows, channels_last, slide

COLUMN_BYTES = 2 << 20      # a block on one core, its columns and its outputs: it stays in the cache
LIBRARY_BYTES = 64 << 20    # on a library that shares a block out by itself: rows enough for all its threads
LEAST_ROWS = 192            # of a block, so that the product pays for reading W
LEAST_ROWS_OF_A_SUM = 1024  # where each block adds to the whole of dW


# ---------------------------------------------------------------- im2col and col2im, a pair of adjoint maps
def im2col(array: Array, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    """Every window of an image as a column: (N, C, H, W) -> (N, C*kh*kw, P*Q), the layout of PyTorch's `unfold`.

    Row (c, i, j) of column (p, q) is the pixel of channel c that output (p, q) sees through tap (i, j); 0 in the padding.
    Its adjoint is `col2im`:  <im2col(x), columns> == <x, col2im(columns)>.
    """
    windows = Windows.of(kernel_size, stride, padding, dilation)
    _check_rank("im2col", "array", array, 4, "(N, C, H, W)")
    xp, (n, c, h, w), (kh, kw) = array_module(array), array.shape, windows.kernel_size
    p, q = windows.out_size((h, w))
    (top, side), (rh, rw) = windows.padding, windows.reach
    padded = xp.zeros((n, max(h + top, (p - 1) * windows.stride[0] + rh), max(w + side, (q - 1) * windows.stride[1] + rw), c),
                      array.dtype)
    padded[:, top:top + h, side:side + w] = channels_last(array)
    gathered = xp.empty((n, c, kh, kw, p, q), array.dtype)
    gathered[...] = slide(padded, windows)[:, :p, :q].transpose(0, 5, 3, 4, 1, 2)
    return gathered.reshape(n, c * kh * kw, p * q)


def col2im(columns: Array, in_size: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    """Add every column back to the pixels it came from: (N, C*kh*kw, P*Q) -> (N, C, H, W), as PyTorch's `fold`.

    in_size: (H, W) of the image. Overlapping windows add up, so this is the adjoint of `im2col`, not its inverse.
    """
    windows = Windows.of(kernel_size, stride, padding, dilation)
    _check_rank("col2im", "columns", columns, 3, "(N, C*kh*kw, P*Q)")
    h, w = in_size = _size(in_size)
    (p, q), (kh, kw) = windows.out_size(in_size), windows.kernel_size
    n, rows, count = columns.shape
    if rows % (kh * kw) or count != p * q:
        raise ValueError(f"columns {columns.shape} do not fit: windows of {kh} x {kw} on an image of {h} x {w} give "
                         f"(N, C*{kh * kw}, {p}*{q}={p * q}); check in_size, kernel_size, stride, padding and dilation")
    taps = columns.reshape(n, rows // (kh * kw), kh, kw, p, q)
    x = array_module(columns).zeros((n, rows // (kh * kw), h, w), columns.dtype)
    for tap in windows.taps(in_size, (p, q)):                           # one tap touches a pixel at most once: no overlap
        x[:, :, *tap.pixels] += taps[:, :, *tap.at, *tap.outputs]
    return x


# ---------------------------------------------------------------- the convolution and its gradient in the weights
@has_cuda
def convolve(image: Array, filters: Array, bias: Array | None, windows: Windows, finish: Finish | None = None) -> Array:
    """(N, H, W, C), (kh, kw, C, K), (K,) -> (N, P, Q, K)."""
    xp, k = array_module(image), filters.shape[3]
    n, (p, q) = len(image), windows.out_size(image.shape[1:3])
    matrix = filters.reshape(-1, k)
    y = empty(xp, (n, p, q, k), image.dtype)

    def complete(out: Array, first: int) -> None:
        if bias is not None:
            out += bias
        if finish is not None:
            finish(out, first)

    if n * p * q <= LEAST_ROWS:                                         # too few to be cut: the columns of W are, in their place
        complete(product(columns(image, windows, Block(slice(0, n), slice(0, p)), q), matrix, out=y.reshape(-1, k)), 0)
        return y
    tiles = tiled(matrix)

    def one(block: Block) -> None:
        out = y[block.images, block.rows].reshape(-1, k)                # a view: whole images, or whole rows of one
        multiply(columns(image, windows, block, q), tiles, out)
        complete(out, (block.images.start * p + block.rows.start) * q)

    each(xp, one, cut(xp, n, (p, q), (len(matrix) + k) * image.itemsize, LEAST_ROWS, len(matrix) * k))
    return y


@has_cuda
def convolve_weight_grad(image: Array, dy: Array, windows: Windows) -> Array:
    """(N, H, W, C), (N, P, Q, K) -> (kh, kw, C, K): columns^T dy."""
    xp, (n, p, q, k) = array_module(image), dy.shape
    shape = (*windows.kernel_size, image.shape[3], k)
    length = shape[0] * shape[1] * shape[2]

    def summed(blocks: Sequence[Block]) -> Array:
        dw = empty(xp, (length, k), image.dtype)
        for i, block in enumerate(blocks):
            seen, taken = columns(image, windows, block, q), dy[block.images, block.rows].reshape(-1, k)
            part = dw if i == 0 else scratch(xp, "im2col product", dw.shape, dw.dtype)
            sum_of_products(seen, taken, part)
            if i > 0:
                dw += part
        return dw

    blocks = cut(xp, n, (p, q), (length + k) * image.itemsize, LEAST_ROWS_OF_A_SUM, length * k)
    return total(xp, summed, blocks).reshape(shape) if blocks else xp.zeros(shape, image.dtype)


@has_cuda
def convolve_input_grad(dy: Array, filters: Array, in_size: Pair, windows: Windows) -> Array:
    """(N, P, Q, K), (kh, kw, C, K) -> (N, H, W, C).

    For a stride of 1 it is the convolution of dy with the filters turned by 180 degrees:

        dx[h, w] = sum_{i, j} dy[h + ph - i dh, w + pw - j dw] W[i, j]^T

    so the turned filters see dy under a padding of reach - 1 - padding, reach = dilation (kernel - 1) + 1. A longer stride leaves
    gaps between the windows, and more padding cuts dy; then the products of each tap are added to the pixels it saw.
    """
    (rh, rw), (ph, pw) = windows.reach, windows.padding
    if windows.stride != (1, 1) or ph >= rh or pw >= rw:
        return tapwise.convolve_input_grad(dy, filters, in_size, windows)
    turned = filters[::-1, ::-1].transpose(0, 1, 3, 2)
    return convolve(dy, turned, None, Windows(windows.kernel_size, (1, 1), (rh - 1 - ph, rw - 1 - pw), windows.dilation))


# ---------------------------------------------------------------- their parts
class Block(NamedTuple):
    """Some rows of the output: of one image, or all rows of several images."""

    images: slice
    rows: slice


def cut(xp: Any, n: int, out_size: Pair, row_bytes: int, least: int, products: int) -> list[Block]:
    """Cut the outputs into blocks of COLUMN_BYTES, but of `least` or more; a pixel has row_bytes and takes so many products."""
    p, q = out_size
    pixels = LIBRARY_BYTES // row_bytes
    if xp is np:                                                        # and no thread shall be left without
        pixels = min(max(least, COLUMN_BYTES // row_bytes), a_share(n * p * q, n * p * q * products // PER_NUMBER))
    images = max(1, pixels // (p * q))
    return [Block(some, rows) for some in slices(n, images) for rows in slices(p, max(1, pixels // q) if images == 1 else p)]


def columns(image: Array, windows: Windows, block: Block, width: int) -> Array:
    """(N, H, W, C) -> (images * rows * Q, kh*kw*C): the windows of a block of the output, one a row."""
    xp, (h, w, c) = array_module(image), image.shape[1:]
    if windows.pointwise:
        return image[block.images, block.rows].reshape(-1, c)           # the image itself
    (kh, kw), (sh, sw), (rh, rw) = windows.kernel_size, windows.stride, windows.reach
    count, rows = block.images.stop - block.images.start, block.rows.stop - block.rows.start
    top, left = block.rows.start * sh - windows.padding[0], -windows.padding[1]
    height, across = (rows - 1) * sh + rh, (width - 1) * sw + rw
    if top >= 0 and left >= 0 and top + height <= h and across <= w:
        seen = image[block.images, top:top + height, :across]
    else:
        seen = scratch(xp, "im2col padded", (count, height, across, c), image.dtype)
        copy_padded(image[block.images], seen, top, left)
    gathered = scratch(xp, "im2col columns", (count, rows, width, kh, kw, c), image.dtype)
    taps, rows_of_taps = slide(seen, windows), (count, rows, width, kh, kw * c)
    if windows.dilation[1] == 1:                                        # the pixels of a row of taps lie side by side
        copy_pixels(taps.reshape(rows_of_taps), gathered.reshape(rows_of_taps))
    else:
        copy_pixels(taps, gathered)
    return gathered.reshape(-1, kh * kw * c)


def _check_rank(function: str, name: str, array: Array, rank: int, axes: str) -> None:
    if array.ndim != rank:
        raise ValueError(f"{function}: {name} must have {rank} axes {axes}, not shape {tuple(array.shape)}")


def _size(in_size: Any) -> Pair:
    h, w = in_size
    return int(h), int(w)
