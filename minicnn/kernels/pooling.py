"""Pooling: one number for every window of every channel.

The largest (`max_pool2d`) or the sum (`window_sum`, of which the average is a multiple). Each loops over the taps of the window
and lets all windows look through one tap at a time, so that no window is ever copied; padding is never made, since a
tap knows which outputs see a real pixel through it.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.windows import Pair, Windows, channels_first


def max_pool2d(x: Array, windows: Windows) -> tuple[Array, Array]:
    """(N, C, H, W) -> the largest of each window (N, C, P, Q), and the number of the tap it came through.

    Padding counts as minus infinity; of equals the first tap in row-major order wins; NaN beats everything, as in PyTorch.
    """
    xp = array_module(x)
    out_size = windows.out_size(x.shape[2:])
    y = _like(x, out_size, -np.inf, x.dtype)
    winner = _like(x, out_size, 0, _tap_type(windows))
    taps = list(windows.taps(x.shape[2:], out_size))
    for tap in taps:
        best = y[:, :, *tap.outputs]
        xp.maximum(best, x[:, :, *tap.pixels], out=best)
    for tap in reversed(taps):                                                  # of equals, the first tap has the last word
        pixels, chosen = x[:, :, *tap.pixels], winner[:, :, *tap.outputs]
        won = (pixels == y[:, :, *tap.outputs]) | (pixels != pixels)            # the second: NaN, which equals nothing
        chosen[...] = xp.where(won, tap.number, chosen)
    return y, winner


def give_to_winner(dy: Array, winner: Array, in_size: Pair, windows: Windows) -> Array:
    """The adjoint of `take_from_winner`: each output's number goes to the pixel that won. (N, C, P, Q) -> (N, C, H, W)."""
    dx = _like(dy, in_size, 0, dy.dtype)
    xp = array_module(dy)
    for tap in windows.taps(in_size, dy.shape[2:]):                             # taps in a fixed order: the same bits every time
        here = (slice(None), slice(None), *tap.outputs)
        dx[:, :, *tap.pixels] += xp.where(winner[here] == tap.number, dy[here], 0)
    return dx


def take_from_winner(x: Array, winner: Array, windows: Windows) -> Array:
    """The pixel that won each window: (N, C, H, W) -> (N, C, P, Q)."""
    y = _like(x, winner.shape[2:], 0, x.dtype)
    xp = array_module(x)
    for tap in windows.taps(x.shape[2:], winner.shape[2:]):
        here = (slice(None), slice(None), *tap.outputs)
        y[here] = xp.where(winner[here] == tap.number, x[:, :, *tap.pixels], y[here])
    return y


def window_sum(x: Array, windows: Windows) -> Array:
    """The sum over each window: (N, C, H, W) -> (N, C, P, Q). Its adjoint is `window_spread`."""
    out_size = windows.out_size(x.shape[2:])
    y = _like(x, out_size, 0, x.dtype)
    for tap in windows.taps(x.shape[2:], out_size):
        y[:, :, *tap.outputs] += x[:, :, *tap.pixels]
    return y


def window_spread(dy: Array, in_size: Pair, windows: Windows) -> Array:
    """Each output's number to every pixel of its window: (N, C, P, Q) -> (N, C, H, W)."""
    dx = _like(dy, in_size, 0, dy.dtype)
    for tap in windows.taps(in_size, dy.shape[2:]):
        dx[:, :, *tap.pixels] += dy[:, :, *tap.outputs]
    return dx


def _like(x: Array, size: Pair, value: float, dtype: np.dtype) -> Array:
    """(N, C, *size) of one value, in channels-last memory as the convolutions leave theirs."""
    n, c = x.shape[:2]
    return channels_first(array_module(x).full((n, *size, c), value, dtype))


def _tap_type(windows: Windows) -> np.dtype:
    kh, kw = windows.kernel_size
    return np.min_scalar_type(kh * kw - 1)
