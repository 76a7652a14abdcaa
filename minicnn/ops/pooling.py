"""Pooling: many pixels, one number.

Which pixel won a max-pool window is an integer, constant almost everywhere: given the winners, the pool and its backward
are linear maps and each other's adjoint, so second derivatives need nothing new. Sums over windows are linear from the start.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.autograd import Tensor, op
from minicnn.backend import Array, device_of, is_floating, to_device
from minicnn.kernels import pooling as kernels
from minicnn.kernels.windows import Pair, Windows, pair
from minicnn.ops.arithmetic import matmul
from minicnn.ops.movement import in_real, mean


def max_pool2d(x: Any, kernel_size: Any = 2, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> Any:
    """The largest of each window: (N, C, H, W) -> (N, C, P, Q).

    stride: the kernel size by default.   padding: counts as minus infinity, at most half the kernel.
    ceil_mode: a last window may hang over the far edge.   dx: dy goes to the winner; of equals, to the first in row-major order.
    """
    return max_of_windows(x, _windows("max_pool2d", x, kernel_size, stride, padding, ceil_mode))


@op
def max_of_windows(x: Array, windows: Windows) -> Array:
    """y[n, c, p, q] = the largest of the pixels that the window at (p, q) sees      dx: dy to the pixel that is y, the first one"""
    return kernels.max_pool2d(x, windows)


@max_of_windows.backward("x")
def max_of_windows_dx(dy, x, y, windows):
    winner = kernels.winners(x.data if isinstance(x, Tensor) else x, y.data if isinstance(y, Tensor) else y, windows)
    return give_to_winner(dy, winner, x.shape[2:], windows)


@max_of_windows.backward("x", fused=True)
def max_of_windows_fused_dx(dy, x, y, windows):
    return kernels.max_pool2d_grad(dy, x, y, windows)


@op
def give_to_winner(dy: Array, winner: Array, in_size: Pair, windows: Windows) -> Array:
    """Each window's number to the pixel that won it; a pixel that won several gets their sum."""
    return kernels.give_to_winner(dy, winner, in_size, windows)


@give_to_winner.backward("dy")
def give_to_winner_ddy(g, winner, windows):
    return take_from_winner(g, winner, windows)


@op
def take_from_winner(x: Array, winner: Array, windows: Windows) -> Array:
    """The pixel that won each window: the adjoint of `give_to_winner`."""
    return kernels.take_from_winner(x, winner, windows)


@take_from_winner.backward("x")
def take_from_winner_dx(g, winner, x_shape, windows):
    return give_to_winner(g, winner, x_shape[2:], windows)


def avg_pool2d(x: Any, kernel_size: Any = 2, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> Any:
    """The mean of each window: (N, C, H, W) -> (N, C, P, Q); zeros of the padding count, pixels beyond it do not exist.

    dx: every pixel of a window gets dy over the window's area.
    """
    windows = _windows("avg_pool2d", x, kernel_size, stride, padding, ceil_mode)
    area = _areas(windows, x.shape[2:])
    return in_real(lambda x: _over_area(window_sum(x, windows), area), x)


def _over_area(total: Any, area: np.ndarray[Any, Any]) -> Any:
    if (area == area[0, 0]).all():
        return total * (1.0 / float(area[0, 0]))
    data = total.data if isinstance(total, Tensor) else total
    return total / to_device(area.astype(data.dtype), device_of(data))


@op
def window_sum(x: Array, windows: Windows) -> Array:
    """y[n, c, p, q] = the sum of the pixels that the window at (p, q) sees      dx = window_spread(dy)"""
    return kernels.window_sum(x, windows)


@window_sum.backward("x")
def window_sum_dx(dy, x_shape, windows):
    return window_spread(dy, x_shape[2:], windows)


@op
def window_spread(dy: Array, in_size: Pair, windows: Windows) -> Array:
    """Each window's number to every pixel it sees      ddy = window_sum(g)"""
    return kernels.window_spread(dy, in_size, windows)


@window_spread.backward("dy")
def window_spread_ddy(g, windows):
    return window_sum(g, windows)


def adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Means over output_size (P, Q) windows that share the image out evenly: (N, C, H, W) -> (N, C, P, Q).

    Output p averages the rows from floor(p H / P) to ceil((p + 1) H / P). Averaging rows and averaging columns are matrix
    products: y = A x B^T, with A (P, H) and B (Q, W).
    """
    _check_image("adaptive_avg_pool2d", x)
    p, q = pair(output_size, "output_size", 1)
    h, w = x.shape[2:]
    if (h, w) == (p, q):
        return x
    if (p, q) == (1, 1):
        return in_real(lambda x: mean(x, (2, 3), keepdims=True), x)
    return in_real(lambda x: _averaged(x, (p, q)), x)


def _averaged(x: Any, parts: Pair) -> Any:
    data = x.data if isinstance(x, Tensor) else x
    a, b = (to_device(averaging(n, some, data.dtype), device_of(data)) for n, some in zip(x.shape[2:], parts, strict=True))
    return matmul(matmul(a, x), b.T)


def global_avg_pool2d(x: Any) -> Any:
    """The mean of each channel: (N, C, H, W) -> (N, C).   dx = dy / (H W) for every pixel."""
    _check_image("global_avg_pool2d", x)
    return in_real(lambda x: mean(x, (2, 3)), x)


def averaging(n: int, parts: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """(parts, n): row i averages the numbers from floor(i n / parts) to ceil((i + 1) n / parts)."""
    i, at = np.arange(parts)[:, None], np.arange(n)
    inside = (at >= i * n // parts) & (at < -(-(i + 1) * n // parts))
    return inside.astype(dtype) / inside.sum(1, keepdims=True).astype(dtype)


def _areas(windows: Windows, in_size: Pair) -> np.ndarray[Any, Any]:
    """(P, Q): how many pixels and padding zeros each window sees; fewer where ceil_mode lets it hang over the padding."""
    sides = []
    out_size = windows.out_size(in_size)
    for n, out, k, s, p in zip(in_size, out_size, windows.kernel_size, windows.stride, windows.padding, strict=True):
        start = np.arange(out) * s - p
        sides.append(np.minimum(start + k, n + p) - start)
    return np.multiply.outer(*sides)


def _windows(function: str, x: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Windows:
    _check_image(function, x)
    windows = Windows.of(kernel_size, kernel_size if stride is None else stride, padding, 1, ceil_mode)
    if any(2 * p > k for p, k in zip(windows.padding, windows.kernel_size, strict=True)):
        raise ValueError(f"{function}: padding {windows.padding} must be at most half of kernel_size {windows.kernel_size}, "
                         "or a window could see padding alone")
    return windows


def _check_image(function: str, x: Any) -> None:
    if x.ndim != 4:
        raise ValueError(f"{function}: x must have 4 axes (N, C, H, W), not shape {tuple(x.shape)}; "
                         "a single image becomes a batch with x[None]")
    if not is_floating(x.dtype):
        raise TypeError(f"{function}: x must be floating, not {x.dtype}: sums of small integers overflow, and padding with minus "
                        "infinity needs a float; convert images with array.astype('float32')")
