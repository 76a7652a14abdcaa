"""Max-pooling on a GPU: see pooling.cu. Four channels go as one where they can."""
from __future__ import annotations

from minicnn.backend import Array, array_module
from minicnn.kernels.cuda.elementwise import in_fours
from minicnn.kernels.cuda.launch import THREADS, launch, over_rows
from minicnn.kernels.windows import Windows, channels_first, channels_last


def max_pool2d(x: Array, windows: Windows) -> Array:
    """(N, C, H, W) -> the largest of each window (N, C, P, Q)."""
    image, (p, q) = channels_last(x), windows.out_size(x.shape[2:])
    n, h, w, c = image.shape
    y = array_module(x).empty((n, p, q, c), x.dtype)
    fours = in_fours(c, image, y)
    launch("pooling", f"max_pool2d{fours}", over_rows(n * p, q * c, fours), THREADS,
           image, y, n, h, w, c, *_steps(windows), p, q)
    return channels_first(y)


def max_pool2d_grad(dy: Array, x: Array, y: Array, windows: Windows) -> Array:
    """dL/dx: each output's gradient to the pixel that it is; of equals, to the first one in row-major order."""
    arriving, image, best = channels_last(dy), channels_last(x), channels_last(y)
    (n, h, w, c), (p, q) = image.shape, best.shape[1:3]
    dx = array_module(x).empty(image.shape, x.dtype)
    fours = in_fours(c, arriving, image, best, dx)
    launch("pooling", f"max_pool2d_grad{fours}", over_rows(n * h, w * c, fours), THREADS,
           arriving, image, best, dx, n, h, w, c, *_steps(windows), p, q)
    return channels_first(dx)


def _steps(windows: Windows) -> tuple[int, ...]:
    return *windows.kernel_size, *windows.stride, *windows.padding
