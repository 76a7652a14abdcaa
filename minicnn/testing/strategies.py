"""Hypothesis strategies for valid inputs of convolution, pooling, normalisation and the rest, for anybody's tests.

    @given(conv_cases())
    def test_my_convolution(case):
        y = my_conv2d(case.x, case.weight, case.bias, **case.options)

Every case is valid as it is drawn: sizes follow from the options, nothing is filtered out. Shrinking leads to one image of one
channel, the smallest that the window fits, and options of 1 and 0. The numbers in the arrays come from a seed that is part of
the draw: an array of any size costs one choice, and a failure shrinks in its shape, which is where the defects are.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("minicnn.testing.strategies needs hypothesis: pip install hypothesis") from error

Host = np.ndarray[Any, Any]
Strategy = st.SearchStrategy[Any]


class ConvCase(NamedTuple):
    """ops.conv2d(x, weight, bias, **options); bias may be None."""

    x: Host
    weight: Host
    bias: Host | None
    options: dict[str, Any]         # stride, padding, dilation (ints or pairs), groups

    @property
    def arrays(self) -> list[Host]:
        """x, weight, and bias if there is one."""
        return [a for a in (self.x, self.weight, self.bias) if a is not None]


class PoolCase(NamedTuple):
    """ops.max_pool2d(x, **options) or ops.avg_pool2d(x, **options)."""

    x: Host
    options: dict[str, Any]         # kernel_size, stride (None: as the kernel), padding, ceil_mode


class NormCase(NamedTuple):
    """ops.batch_norm(x, weight, bias, running_mean.copy(), running_var.copy(), **options): training moves the running arrays."""

    x: Host
    weight: Host
    bias: Host
    running_mean: Host
    running_var: Host               # positive
    options: dict[str, Any]         # train, momentum, eps


class LossCase(NamedTuple):
    """ops.cross_entropy(logits, labels, **options)."""

    logits: Host
    labels: Host
    options: dict[str, Any]         # label_smoothing


# ---------------------------------------------------------------- numbers
def shapes(min_dims: int = 0, max_dims: int = 4, max_side: int = 4) -> Strategy:
    """Shapes of a few axes, none empty."""
    return st.lists(st.integers(1, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def arrays(draw: st.DrawFn, shape: Any, dtype: Any = np.float64, *, ties: bool | None = False, positive: bool = False) -> Host:
    """Random numbers between -2 and 2, all different, or with ties=True quarters, of which many are equal (None: either).

    shape: a tuple, or a strategy for one.   positive: between 0.5 and 2, for logarithms and variances.
    """
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 16)))
    numbers = rng.uniform(0.5 if positive else -2.0, 2.0, shape)
    if draw(st.booleans()) if ties is None else ties:
        numbers = np.round(numbers * 4) / 4
    return np.asarray(numbers, dtype)


@st.composite
def broadcastable_pairs(draw: st.DrawFn, dtype: Any = np.float64, max_dims: int = 4, max_side: int = 3) -> tuple[Host, Host]:
    """Two arrays that NumPy broadcasts: either may lack leading axes, or have length 1 where the other does not."""
    full = draw(shapes(0, max_dims, max_side))

    def side() -> tuple[int, ...]:
        kept = full[draw(st.integers(0, len(full))):]
        return tuple(n if draw(st.booleans()) else 1 for n in kept)

    first = draw(arrays(side(), dtype))
    return first, draw(arrays(side(), dtype))


def labels(count: int, classes: int) -> Strategy:
    """(count,) integers, each a class from 0 to classes - 1."""
    return st.lists(st.integers(0, classes - 1), min_size=count, max_size=count).map(lambda drawn: np.array(drawn, np.int64))


# ---------------------------------------------------------------- sliding windows
@st.composite
def _int_or_pair(draw: st.DrawFn, least: int, most: int) -> tuple[Any, tuple[int, int]]:
    """An option as it is passed, an int or a pair (rows, columns), and the pair that it means."""
    rows = draw(st.integers(least, most))
    if draw(st.booleans()):
        columns = draw(st.integers(least, most))
        return (rows, columns), (rows, columns)
    return rows, (rows, rows)


def _image_size(draw: st.DrawFn, reach: tuple[int, ...], padding: tuple[int, ...], more: int) -> tuple[int, ...]:
    """(H, W): for each axis the least size that a window of `reach` pixels fits, with the padding, or up to `more` beyond."""
    least = [max(1, r - 2 * p) for r, p in zip(reach, padding, strict=True)]
    return tuple(n + draw(st.just(0) | st.integers(0, more)) for n in least)    # most often the least: where things break


@st.composite
def conv_cases(draw: st.DrawFn, dtype: Any = np.float64, max_kernel: int = 3, max_groups: int = 3, more: int = 4) -> ConvCase:
    """Convolutions: kernels, strides, paddings and dilations as ints and as pairs, groups to depthwise, with and without bias.

    more: how many pixels an image may be larger than the smallest that the window fits.
    """
    stride, _ = draw(_int_or_pair(1, 3))
    padding, pads = draw(_int_or_pair(0, 2))
    dilation, dilations = draw(_int_or_pair(1, 2))
    kernel = draw(st.tuples(st.integers(1, max_kernel), st.integers(1, max_kernel)))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    size = _image_size(draw, reach, pads, more)
    groups = draw(st.integers(1, max_groups))
    c_group, k_group, images = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = draw(arrays((images, groups * c_group, *size), dtype))
    weight = draw(arrays((groups * k_group, c_group, *kernel), dtype))
    bias = draw(arrays((groups * k_group,), dtype)) if draw(st.booleans()) else None
    return ConvCase(x, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})


@st.composite
def pool_cases(draw: st.DrawFn, dtype: Any = np.float64, max_kernel: int = 3, more: int = 4, *, ties: bool | None = False,
               ceil_mode: bool | None = None) -> PoolCase:
    """Poolings: windows that overlap, touch or leave gaps, padded by at most half the kernel.

    ties: whether windows may hold equal pixels (None: either).   ceil_mode: None for either.
    """
    kernel_size, kernel = draw(_int_or_pair(1, max_kernel))
    stride = draw(st.none() | _int_or_pair(1, 3).map(lambda drawn: drawn[0]))
    pads = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    padding = pads[0] if pads[0] == pads[1] and draw(st.booleans()) else pads
    ceil = draw(st.booleans()) if ceil_mode is None else ceil_mode
    steps = kernel if stride is None else stride if isinstance(stride, tuple) else (stride, stride)
    reach = tuple(k - s + 1 for k, s in zip(kernel, steps, strict=True)) if ceil else kernel     # what must lie in the image
    size = _image_size(draw, reach, pads, more)
    x = draw(arrays((draw(st.integers(1, 2)), draw(st.integers(1, 3)), *size), dtype, ties=ties))
    return PoolCase(x, {"kernel_size": kernel_size, "stride": stride, "padding": padding, "ceil_mode": ceil})


# ---------------------------------------------------------------- normalisation and loss
@st.composite
def norm_cases(draw: st.DrawFn, dtype: Any = np.float64, *, train: bool | None = None) -> NormCase:
    """Batch normalisations of at least two values a channel, which training needs.   train: None for either."""
    h, w, channels = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    images = draw(st.integers(1 if h * w > 1 else 2, 3))
    x = draw(arrays((images, channels, h, w), dtype))
    weight, bias, mean = (draw(arrays((channels,), dtype)) for _ in range(3))
    var = draw(arrays((channels,), dtype, positive=True))
    options = {"train": draw(st.booleans()) if train is None else train, "momentum": draw(st.sampled_from([0.1, 0.0, 0.5, 1.0])),
               "eps": draw(st.sampled_from([1e-5, 1e-3, 0.1]))}
    return NormCase(x, weight, bias, mean, var, options)


@st.composite
def loss_cases(draw: st.DrawFn, dtype: Any = np.float64, max_images: int = 4, max_classes: int = 5) -> LossCase:
    """Logits and labels for cross-entropy, with and without label smoothing."""
    images, classes = draw(st.integers(1, max_images)), draw(st.integers(1, max_classes))
    logits = draw(arrays((images, classes), dtype))
    return LossCase(logits, draw(labels(images, classes)), {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))})
