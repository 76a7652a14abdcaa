"""What a kernel's result must be: a sample of its numbers, computed in float64 from the definition.

Nothing is shared with the kernels: for some output positions the pixels that the window sees are picked one tap at a time, by their
index, and multiplied. The whole would take longer than the measurement; the sample holds the corners, where padding is, and
random places, and every channel of each (or some channels, all of whose numbers take part in a sum).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from minicnn.bench.cases import Case, Shape

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

PLACES = 96             # positions of a sample, the corners of the first and the last image among them
CHANNELS = 6            # channels of a sample that sums over all positions


class Sample(NamedTuple):
    """The numbers expected at an index of the result, in float64."""

    index: Any
    expected: Array


def sample(case: Case, arrays: Arrays) -> Sample:
    """Some of the numbers that this kernel must give for these inputs."""
    return _WITNESSES[case.kernel](case, arrays)


def relative_error(result: Array, expected: Sample) -> float:
    """The largest deviation, over the largest number expected; infinity where the result has another shape or is not finite."""
    try:
        found = result[expected.index].astype(np.float64)
    except IndexError:
        return float("inf")
    if found.shape != expected.expected.shape or not np.isfinite(found).all():
        return float("inf")
    largest = float(np.abs(expected.expected).max()) or 1.0
    return float(np.abs(found - expected.expected).max()) / largest


# ---------------------------------------------------------------- picking
def _places(case: Case, size: Shape) -> tuple[Array, Array, Array]:
    """(image, row, column) of the sampled positions of an image of `size`."""
    rng = np.random.default_rng(1)
    (h, w), last = size, case.batch - 1
    corners = [(n, p, q) for n in (0, last) for p in (0, h - 1) for q in (0, w - 1)]
    drawn = np.stack([rng.integers(0, bound, PLACES - len(corners)) for bound in (case.batch, h, w)], axis=1)
    n, p, q = np.concatenate([corners, drawn]).T
    return n, p, q


def _some(count: int) -> Array:
    """A few channels of so many, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, CHANNELS).astype(int))


def _seen(case: Case, x: Array, n: Array, p: Array, q: Array, outside: float = 0.0) -> Array:
    """(places, C, taps): the pixels that outputs (n, p, q) see, `outside` where there is none."""
    assert case.windows is not None
    w = case.windows
    seen = np.full((len(n), x.shape[1], w.kernel_size[0] * w.kernel_size[1]), outside, np.float64)
    for i, j in np.ndindex(*w.kernel_size):
        row = p * w.stride[0] - w.padding[0] + i * w.dilation[0]
        column = q * w.stride[1] - w.padding[1] + j * w.dilation[1]
        real = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        seen[real, :, i * w.kernel_size[1] + j] = x[n[real], :, row[real], column[real]]
    return seen


def _seeing(case: Case, n: Array, h: Array, w: Array) -> Any:
    """For each tap the outputs that see pixel (n, h, w) through it: (tap, which places, their n, p, q)."""
    assert case.windows is not None
    windows = case.windows
    for i, j in np.ndindex(*windows.kernel_size):
        p, p_rest = np.divmod(h + windows.padding[0] - i * windows.dilation[0], windows.stride[0])
        q, q_rest = np.divmod(w + windows.padding[1] - j * windows.dilation[1], windows.stride[1])
        there = (p_rest == 0) & (q_rest == 0) & (p >= 0) & (q >= 0) & (p < case.out_shape[1]) & (q < case.out_shape[2])
        yield i * windows.kernel_size[1] + j, there, n[there], p[there], q[there]


# ---------------------------------------------------------------- one for each kernel
def _im2col(case: Case, a: Arrays) -> Sample:
    n, p, q = _places(case, case.out_shape[1:])
    return Sample((n, slice(None), p * case.out_shape[2] + q), _seen(case, a["x"], n, p, q).reshape(len(n), -1))


def _col2im(case: Case, a: Arrays) -> Sample:
    n, h, w = _places(case, case.in_shape[1:])
    columns = a["columns"].reshape(case.batch, case.in_shape[0], -1, *case.out_shape[1:])
    x = np.zeros((len(n), case.in_shape[0]))
    for tap, there, image, p, q in _seeing(case, n, h, w):
        x[there] += columns[image, :, tap, p, q]
    return Sample((n, slice(None), h, w), x)


def _conv2d(case: Case, a: Arrays) -> Sample:
    n, p, q = _places(case, case.out_shape[1:])
    weight = a["weight"].astype(np.float64).reshape(len(a["weight"]), -1)
    return Sample((n, slice(None), p, q), _seen(case, a["x"], n, p, q).reshape(len(n), -1) @ weight.T)


def _conv2d_input_grad(case: Case, a: Arrays) -> Sample:
    n, h, w = _places(case, case.in_shape[1:])
    weight = a["weight"].astype(np.float64).reshape(*a["weight"].shape[:2], -1)
    dx = np.zeros((len(n), case.in_shape[0]))
    for tap, there, image, p, q in _seeing(case, n, h, w):
        dx[there] += a["dy"][image, :, p, q].astype(np.float64) @ weight[:, :, tap]
    return Sample((n, slice(None), h, w), dx)


def _conv2d_weight_grad(case: Case, a: Arrays) -> Sample:
    """Of some filters and some channels: the sums over all images and positions."""
    assert case.windows is not None
    (kh, kw), (ph, pw), (sh, sw) = case.windows.kernel_size, case.windows.padding, case.windows.stride
    filters, channels = _some(case.out_shape[0]), _some(case.in_shape[0])
    x = np.pad(a["x"][:, channels].astype(np.float64), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    dy = a["dy"][:, filters].astype(np.float64).transpose(1, 0, 2, 3).reshape(len(filters), -1)
    dweight = np.empty((len(filters), len(channels), kh, kw))
    for i, j in np.ndindex(kh, kw):
        (p, q), (di, dj) = case.out_shape[1:], (i * case.windows.dilation[0], j * case.windows.dilation[1])
        seen = x[:, :, di:di + (p - 1) * sh + 1:sh, dj:dj + (q - 1) * sw + 1:sw]
        dweight[:, :, i, j] = dy @ seen.transpose(1, 0, 2, 3).reshape(len(channels), -1).T
    return Sample(np.ix_(filters, channels), dweight)


def _max_pool2d(case: Case, a: Arrays) -> Sample:
    n, p, q = _places(case, case.out_shape[1:])
    return Sample((n, slice(None), p, q), _seen(case, a["x"], n, p, q, -np.inf).max(axis=2))


def _max_pool2d_grad(case: Case, a: Arrays) -> Sample:
    n, h, w = _places(case, case.in_shape[1:])
    dx = np.zeros((len(n), case.in_shape[0]))
    for tap, there, image, p, q in _seeing(case, n, h, w):
        won = _seen(case, a["x"], image, p, q, -np.inf).argmax(axis=2) == tap        # the first of equals
        dx[there] += np.where(won, a["dy"][image, :, p, q], 0.0)
    return Sample((n, slice(None), h, w), dx)


def _standardized(case: Case, a: Arrays) -> tuple[Array, Array, Array]:
    """Some channels; their x_hat (N, channels, H, W) and 1 / std (channels, 1, 1)."""
    channels = _some(case.in_shape[0])
    x = a["x"][:, channels].astype(np.float64)
    inv_std = (x.var(axis=(0, 2, 3), keepdims=True)[0] + 1e-5) ** -0.5
    return channels, (x - x.mean(axis=(0, 2, 3), keepdims=True)) * inv_std, inv_std


def _batch_norm(case: Case, a: Arrays) -> Sample:
    channels, x_hat, _ = _standardized(case, a)
    scale, shift = (a[name][channels, None, None].astype(np.float64) for name in ("scale", "shift"))
    return Sample((slice(None), channels), x_hat * scale + shift)


def _batch_norm_grad(case: Case, a: Arrays) -> Sample:
    channels, x_hat, inv_std = _standardized(case, a)
    dy, over = a["dy"][:, channels].astype(np.float64), (0, 2, 3)
    centred = dy - dy.mean(axis=over, keepdims=True) - x_hat * (dy * x_hat).mean(axis=over, keepdims=True)
    return Sample((slice(None), channels), centred * inv_std * a["scale"][channels, None, None])


def _linear(case: Case, a: Arrays) -> Sample:
    outputs = _some(case.out_shape[0])
    return Sample((slice(None), outputs), a["x"].astype(np.float64) @ a["weight"][outputs].T.astype(np.float64))


def _linear_input_grad(case: Case, a: Arrays) -> Sample:
    inputs = _some(case.in_shape[0])
    return Sample((slice(None), inputs), a["dy"].astype(np.float64) @ a["weight"][:, inputs].astype(np.float64))


def _linear_weight_grad(case: Case, a: Arrays) -> Sample:
    outputs = _some(case.out_shape[0])
    return Sample(outputs, a["dy"][:, outputs].T.astype(np.float64) @ a["x"].astype(np.float64))


def _residual_add(case: Case, a: Arrays) -> Sample:
    channels = _some(case.in_shape[0])
    return Sample((slice(None), channels), a["x"][:, channels].astype(np.float64) + a["other"][:, channels])


_WITNESSES: dict[str, Callable[[Case, Arrays], Sample]] = {
    "im2col": _im2col, "col2im": _col2im, "conv2d": _conv2d, "conv2d_input_grad": _conv2d_input_grad,
    "conv2d_weight_grad": _conv2d_weight_grad, "max_pool2d": _max_pool2d, "max_pool2d_grad": _max_pool2d_grad,
    "batch_norm": _batch_norm, "batch_norm_grad": _batch_norm_grad, "linear": _linear, "linear_input_grad": _linear_input_grad,
    "linear_weight_grad": _linear_weight_grad, "residual_add": _residual_add,
}
