"""Convolution by im2col: gather every window into a row of a matrix, and a convolution is one matrix product.

    y[n, k, p, q] = bias[k] + sum_{c, i, j}  weight[k, c, i, j] * x[n, c, p*sh - ph + i*dh, q*sw - pw + j*dw]

(cross-correlation, zero padding). Shapes: x (N, C, H, W), weight (K, C / groups, kh, kw), y (N, K, P, Q). Memory is
channels-last inside, so that a gather copies runs of channels and the product writes the layout that the next layer reads.

The three maps `conv2d`, `conv2d_input_grad` and `conv2d_weight_grad` are each other's derivatives: the convolution is
linear in x and in weight, and the other two are its adjoints in each. All work block by block, so the 9x larger matrix of
the whole batch never exists.

Source: Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from minicnn.backend import Array, array_module
from minicnn.kernels.windows import Pair, Windows, channels_first, channels_last, slide

COLUMN_BYTES = 8 << 20      # a block's columns: in the range of a last-level cache, and rows enough for an efficient product


# ---------------------------------------------------------------- im2col and col2im, a pair of adjoint maps
def im2col(array: Array, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Array:
    """Every window of an image as a column: (N, C, H, W) -> (N, C*kh*kw, P*Q), the layout of PyTorch's `unfold`.

    Row (c, i, j) of column (p, q) is the pixel of channel c that output (p, q) sees through tap (i, j); 0 in the padding.
    Its adjoint is `col2im`:  <im2col(x), columns> == <x, col2im(columns)>.
    """
    windows = Windows.of(kernel_size, stride, padding, dilation)
    _check_rank("im2col", "array", array, 4, "(N, C, H, W)")
    p, q = windows.out_size(array.shape[2:])
    taken = _gather(channels_last(array), windows, (p, q))              # (N, P, Q, kh, kw, C)
    n, c, (kh, kw) = array.shape[0], array.shape[1], windows.kernel_size
    columns = taken.transpose(0, 5, 3, 4, 1, 2).reshape(n, c * kh * kw, p * q)
    return columns.copy() if array_module(array).may_share_memory(columns, array) else columns      # 1 x 1: still the image itself


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


# ---------------------------------------------------------------- the three maps
def conv2d(x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int = 1) -> Array:
    """(N, C, H, W), (K, C / groups, kh, kw), (K,) -> (N, K, P, Q)."""
    if groups > 1:
        y = _each_group(groups, lambda x, weight: conv2d(x, weight, None, windows), (x, 1), (weight, 0))
        return y if bias is None else y + bias.reshape(-1, 1, 1)
    xp, image = array_module(x), channels_last(x)
    p, q = windows.out_size(x.shape[2:])
    filters = _as_matrix(weight)                                        # (kh*kw*C, K)
    y = xp.empty((len(x), p, q, len(weight)), x.dtype)
    for images, rows in _blocks(image, weight, (p, q)):
        out = y[images, rows].reshape(-1, len(weight))                  # a view: whole images, or whole rows of one
        xp.matmul(_columns(image[images], windows, rows, q), filters, out=out)
        if bias is not None:
            out += bias                                                 # while the block is in cache
    return channels_first(y)


def conv2d_input_grad(dy: Array, weight: Array, in_size: Pair, windows: Windows, groups: int = 1) -> Array:
    """dL/dx from dL/dy: what each output got from a pixel through a tap goes back to it, times the same weight.

    dx[n, c, p*sh - ph + i*dh, ...] += sum_k weight[k, c, i, j] * dy[n, k, p, q]: one tap of col2im at a time, without columns.
    """
    if groups > 1:
        return _each_group(groups, lambda dy, weight: conv2d_input_grad(dy, weight, in_size, windows), (dy, 1), (weight, 0))
    xp, dy_image = array_module(dy), channels_last(dy)
    n, p, q, k = dy_image.shape
    c = weight.shape[1]
    filters = xp.ascontiguousarray(weight.transpose(2, 3, 0, 1))        # (kh, kw, K, C)
    dx = xp.zeros((n, *in_size, c), dy.dtype)
    for images in _slices(n, COLUMN_BYTES // (p * q * c * dy.itemsize)):
        block, taken = dx[images], dy_image[images].reshape(-1, k)
        product = xp.empty((len(taken), c), dy.dtype)
        for tap in windows.taps(in_size, (p, q)):
            xp.matmul(taken, filters[tap.at], out=product)
            block[:, *tap.pixels] += product.reshape(-1, p, q, c)[:, *tap.outputs]
    return channels_first(dx)


def conv2d_weight_grad(x: Array, dy: Array, windows: Windows, groups: int = 1) -> Array:
    """dL/dweight from dL/dy: every window times the output gradient it led to, summed over images and positions.

    dweight[k, c, i, j] = sum_{n, p, q} dy[n, k, p, q] * x[n, c, p*sh - ph + i*dh, q*sw - pw + j*dw] = dy^T columns.
    """
    if groups > 1:
        return _each_group(groups, lambda x, dy: conv2d_weight_grad(x, dy, windows), (x, 1), (dy, 1), join=0)
    xp, image, dy_image = array_module(x), channels_last(x), channels_last(dy)
    (p, q, k), c, (kh, kw) = dy_image.shape[1:], x.shape[1], windows.kernel_size
    dweight = xp.zeros((k, kh, kw, c), x.dtype)
    flat = dweight.reshape(k, -1)
    for images, rows in _blocks(image, dweight, (p, q)):
        flat += dy_image[images, rows].reshape(-1, k).T @ _columns(image[images], windows, rows, q)
    return xp.ascontiguousarray(dweight.transpose(0, 3, 1, 2))


# ---------------------------------------------------------------- their parts
def _as_matrix(weight: Array) -> Array:
    """(K, C, kh, kw) -> (kh*kw*C, K): rows in the order in which `_columns` lays out a window."""
    return array_module(weight).ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(-1, len(weight))


def _columns(image: Array, windows: Windows, rows: slice, width: int) -> Array:
    """(N, H, W, C) -> (N * rows * Q, kh*kw*C): the windows of some rows of the output, one a row."""
    seen, part, below = windows.rows(rows, image.shape[1])
    return _gather(image[:, seen], part, (rows.stop - rows.start, width), below).reshape(-1, _window_length(image, windows))


def _gather(image: Array, windows: Windows, out_size: Pair, below: int | None = None) -> Array:
    """(N, H, W, C) -> (N, P, Q, kh, kw, C): pad, slide, copy. `below`: rows of padding below, by default as above."""
    xp = array_module(image)
    (top, side), (n, h, w, c) = windows.padding, image.shape
    below = top if below is None else below
    if top or side or below:
        padded = xp.zeros((n, top + h + below, w + 2 * side, c), image.dtype)
        padded[:, top:top + h, side:side + w] = image
        image = padded
    taken = slide(image, windows)[:, :out_size[0], :out_size[1]]
    return xp.ascontiguousarray(taken)


def _window_length(image: Array, windows: Windows) -> int:
    return windows.kernel_size[0] * windows.kernel_size[1] * int(image.shape[3])


def _blocks(image: Array, weight: Array, out_size: Pair) -> Iterator[tuple[slice, slice]]:
    """Cut the outputs into (images, rows): several whole images, or some rows of one, whose columns take COLUMN_BYTES."""
    window_bytes = weight.size // len(weight) * image.itemsize
    n, (p, q) = len(image), out_size
    rows = max(1, COLUMN_BYTES // (window_bytes * q))
    for images in _slices(n, rows // p):
        for part in _slices(p, rows):
            yield images, part


def _slices(count: int, step: int) -> Iterator[slice]:
    """Cut range(count) into pieces of `step`, at least one long."""
    step = max(1, step)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _each_group(groups: int, kernel: Callable[..., Array], *split: tuple[Array, int], join: int = 1) -> Array:
    """Run a kernel on each group's share of the arrays, cut along the axis given with each, and join along `join`."""
    def share(array: Array, axis: int, g: int) -> Array:
        size = array.shape[axis] // groups
        return array[(slice(None),) * axis + (slice(g * size, (g + 1) * size),)]

    parts = [kernel(*(share(array, axis, g) for array, axis in split)) for g in range(groups)]
    return array_module(parts[0]).concatenate(parts, axis=join)


def _check_rank(function: str, name: str, array: Array, rank: int, axes: str) -> None:
    if array.ndim != rank:
        raise ValueError(f"{function}: {name} must have {rank} axes {axes}, not shape {tuple(array.shape)}")


def _size(in_size: Any) -> Pair:
    h, w = in_size
    return int(h), int(w)
