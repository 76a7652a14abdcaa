"""Pooling: one number for every window of every channel.

The largest (`max_pool2d`) or the sum (`window_sum`, of which the average is a multiple). Each loops over the taps of the window
and lets all windows look through one tap at a time, so that no window is ever copied; padding is never made, since a
tap knows which outputs see a real pixel through it.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.blocks import ELEMENTS, each, empty, scratch, slices
from minicnn.kernels.dispatch import has_cuda
from minicnn.kernels.windows import Pair, Windows, channels_first, channels_last, of_some


@has_cuda
def max_pool2d(x: Array, windows: Windows) -> Array:
    """(N, C, H, W) -> the largest of each window (N, C, P, Q).

    Padding counts as minus infinity; NaN beats everything, as in PyTorch.
    The largest of a window is the largest of its columns' largest numbers: first down, comparing whole rows of pixels, which lie
    side by side, then along, over fewer rows. Some rows of outputs at a time, so that these have not left the cache.
    """
    xp, image = array_module(x), channels_last(x)
    (n, c, h, w), stride = x.shape, windows.stride[0]
    p, q = windows.out_size((h, w))
    y = empty(xp, (n, p, q, c), x.dtype)
    down, along = (list(windows.axis_taps(axis, *sizes).values()) for axis, sizes in enumerate(((h, p), (w, q))))

    def one(block: tuple[Any, slice]) -> None:
        i, rows = block
        best = y[i, rows]
        columns = scratch(xp, "pooling columns", (*best.shape[:-2], w, c), x.dtype)
        seen = [of_some(*tap, rows, stride) for tap in down]
        _largest(columns, [(columns[..., o, :, :], image[i, pixels]) for o, pixels in seen])
        _largest(best, [(best[..., o, :], columns[..., pixels, :]) for o, pixels in along])

    each(xp, one, _rows_of_images(xp, n, p, w * c), (len(down) * w + len(along) * q) * n * p * c)
    return channels_first(y)


def _largest(out: Array, taps: list[tuple[Array, Array]]) -> None:
    """out = the largest over some taps, each (its part of out, what it sees there); minus infinity where none sees anything."""
    xp = array_module(out)
    whole = [seen for part, seen in taps if part.shape == out.shape]
    some = [(part, seen) for part, seen in taps if part.shape != out.shape]
    if len(whole) > 1:
        xp.maximum(whole[0], whole[1], out=out)
    else:
        out[...] = whole[0] if whole else -np.inf
    for part, seen in [*((out, seen) for seen in whole[2:]), *some]:
        xp.maximum(part, seen, out=part)


@has_cuda
def max_pool2d_grad(dy: Array, x: Array, y: Array, windows: Windows) -> Array:
    """dL/dx: each output's gradient to the pixel that it is; of equals, to the first tap in row-major order.

    No winner was written down: the pixels that equal the output are looked for again, and an output that has met one is closed to
    the next.
    """
    xp, image, best, arriving = array_module(x), channels_last(x), channels_last(y), channels_last(dy)
    n, (p, q, c), in_size = len(x), best.shape[1:], x.shape[2:]
    taps = list(windows.taps(in_size, (p, q)))
    dx = empty(xp, image.shape, x.dtype)
    (sh, sw), padded = windows.stride, windows.padding != (0, 0)
    once = windows.kernel_size == (sh, sw) and (p * sh, q * sw) == in_size and not padded     # every pixel is in one window

    def one(i: Any) -> None:
        if not once:
            dx[i] = 0
        for _, rows in _rows_of_images(xp, 1, p, q * c):
            free = scratch(xp, "pooling free", best[i, rows].shape, bool)           # outputs whose winner has not been met
            free[...] = True
            odd = xp is not np or bool((best[i, rows] != best[i, rows]).any())      # to ask a GPU would be to wait for it
            for tap in taps:
                outputs, seen = tap.of_rows(rows, windows.stride[0])
                pixels, given, open_ = image[i, *seen], arriving[i, rows][..., *outputs, :], free[..., *outputs, :]
                won = pixels == best[i, rows][..., *outputs, :]
                if odd:
                    won |= pixels != pixels                             # NaN, which equals nothing
                won &= open_
                open_ ^= won
                if once:
                    xp.multiply(given, won, out=dx[i, *seen])
                else:
                    dx[i, *seen] += xp.multiply(given, won, out=scratch(xp, "pooling taken", given.shape, dy.dtype))

    each(xp, one, range(n) if xp is np else [slice(0, n)], 6 * len(taps) * dy.size)
    return channels_first(dx)


def winners(x: Array, y: Array, windows: Windows) -> Array:
    """The number of the tap through which each maximum was seen: (N, C, P, Q) of small integers; the first one of equals."""
    xp = array_module(x)
    winner = _like(x, y.shape[2:], 0, _tap_type(windows))
    for tap in reversed(list(windows.taps(x.shape[2:], y.shape[2:]))):          # of equals, the first tap has the last word
        pixels, chosen = x[:, :, *tap.pixels], winner[:, :, *tap.outputs]
        won = (pixels == y[:, :, *tap.outputs]) | (pixels != pixels)            # the second: NaN, which equals nothing
        chosen[...] = xp.where(won, tap.number, chosen)
    return winner


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


def _rows_of_images(xp: ModuleType, n: int, p: int, row_elements: int) -> list[tuple[Any, slice]]:
    """Cut n images into runs of output rows: (which image, which rows); another library gets all at once."""
    if xp is not np:
        return [(slice(0, n), slice(0, p))]
    return [(i, rows) for i in range(n) for rows in slices(p, ELEMENTS // row_elements)]
