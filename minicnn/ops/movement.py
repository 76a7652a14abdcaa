"""Linear maps that only move, copy or add numbers. They come in adjoint pairs, and each is its partner's backward:

    sum         and  broadcast_to       adding up        and  copying
    reshape     and  reshape            transpose  and  the inverse transpose
    getitem     and  place              taking some      and  putting them back among zeros
    pad         and  getitem            concatenate  and  getitem

For a linear map y = A x the backward is dx = A^T dy, whatever x was: none of these keeps any number for its backward.
"""
from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicnn import backend
from minicnn.autograd import op
from minicnn.backend import Array, array_module, is_floating, is_half, real_of
from minicnn.kernels import elementwise as kernels
from minicnn.kernels.elementwise import laid_out_like

Axis = int | Sequence[int] | None


def axes_of(axis: Axis, ndim: int) -> tuple[int, ...]:
    """NumPy's `axis` (None, one, several, negative) as a sorted tuple of axes."""
    axes = range(ndim) if axis is None else [axis] if isinstance(axis, (int, np.integer)) else axis
    wrong = [a for a in axes if not -ndim <= a < ndim]
    if wrong:
        raise ValueError(f"axis {wrong[0]} does not exist in an array of {ndim} axes; valid axes are {-ndim} to {ndim - 1}")
    return tuple(sorted({a % ndim for a in axes}))


# ---------------------------------------------------------------- adding up, and copying
@op
def sum(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Add up along `axis` (all of them by default).   dx: every number gets the gradient of the sum it went into."""
    return x.sum(axis=axes_of(axis, x.ndim), keepdims=keepdims)


@sum.backward("x")
def sum_dx(dy, x_shape, axis):
    axes = axes_of(axis, len(x_shape))
    return broadcast_to(reshape(dy, tuple(1 if i in axes else n for i, n in enumerate(x_shape))), x_shape)


@op
def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Copy along new axes and along axes of length 1 until the shape is `shape`.   dx: the sum over the copies."""
    return array_module(x).broadcast_to(x, shape)


@broadcast_to.backward("x")
def broadcast_to_dx(dy, x_shape):
    return sum_to(dy, x_shape)


def sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    """The adjoint of NumPy's broadcasting: add up along the axes that it made or stretched, until the shape is `shape`."""
    if tuple(x.shape) == tuple(shape):
        return x
    new = x.ndim - len(shape)
    stretched = [new + i for i, n in enumerate(shape) if n == 1 and x.shape[new + i] != 1]
    return reshape(sum(x, (*range(new), *stretched)), tuple(shape))


# ---------------------------------------------------------------- another order
@op
def reshape(x: Array, shape: int | tuple[int, ...]) -> Array:
    """The same numbers in row-major order, under another shape (one axis may be -1).   dx: reshaped back."""
    return array_module(x).reshape(x, shape)


@reshape.backward("x")
def reshape_dx(dy, x_shape):
    return reshape(dy, x_shape)


@op
def transpose(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Axis i of the result is axis axes[i] of x; reversed by default.   dx: the inverse permutation."""
    return array_module(x).transpose(x, axes)


@transpose.backward("x")
def transpose_dx(dy, axes, x_shape):
    order = axes_in_order(axes, len(x_shape))
    return transpose(dy, tuple(order.index(i) for i in range(len(order))))


def axes_in_order(axes: Sequence[int] | None, ndim: int) -> list[int]:
    """NumPy's `axes` of a transposition (None, negative) as a list of axes."""
    return list(range(ndim))[::-1] if axes is None else [a % ndim for a in axes]


def swap_last(x: Any) -> Any:
    """Transpose the matrices in the last two axes."""
    return transpose(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


# ---------------------------------------------------------------- taking some, and putting them back
@op
def getitem(x: Array, index: Any) -> Array:
    """x[index], for everything that NumPy takes as an index.   dx: zeros, with dy added where it was taken from."""
    return x[index]


@getitem.backward("x")
def getitem_dx(dy, index, x_shape):
    return place(dy, index, x_shape)


@op
def place(values: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Zeros of `shape` with `values` added at `index`; a place named twice gets both.   dvalues = dy[index]."""
    xp = array_module(values)
    if values.ndim == len(shape):           # in memory as the values lie, so that what it is added to lies alike
        x = laid_out_like(values, lambda order: xp.zeros([shape[axis] for axis in order], values.dtype))
    else:
        x = xp.zeros(shape, values.dtype)
    if _names_no_place_twice(index):
        x[index] = values
    else:
        xp.add.at(x, index, values)
    return x


@place.backward("values")
def place_dvalues(dy, index):
    return getitem(dy, index)


def _names_no_place_twice(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer)) for part in parts)


@op
def pad(x: Array, pad_width: Any, value: float = 0.0) -> Array:
    """Surround x with `value`.

    pad_width: as NumPy's: one int for all sides, or a pair (before, after) for each axis.   dx: the middle of dy.
    """
    pairs = _pad_pairs(pad_width, x.ndim)
    return laid_out_like(x, lambda order: array_module(x).pad(x.transpose(order), [pairs[axis] for axis in order],
                                                              mode="constant", constant_values=value))


@pad.backward("x")
def pad_dx(dy, x_shape, pad_width):
    pairs = _pad_pairs(pad_width, len(x_shape))
    return getitem(dy, tuple(slice(before, before + n) for (before, _), n in zip(pairs, x_shape, strict=True)))


def _pad_pairs(pad_width: Any, ndim: int) -> list[tuple[int, int]]:
    if isinstance(pad_width, (int, np.integer)):
        pad_width = [(pad_width, pad_width)] * ndim
    pairs = [(int(before), int(after)) for before, after in pad_width]
    if len(pairs) != ndim or any(min(p) < 0 for p in pairs):
        raise ValueError(f"pad_width={pad_width}: give one integer, or a pair (before, after) of at least 0 "
                         f"for each of the {ndim} axes")
    return pairs


@op
def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Join along an existing axis.   d(array): its own stretch of dy."""
    shapes = [tuple(a.shape) for a in arrays]
    if not shapes:
        raise ValueError("concatenate needs at least one array")
    along, = axes_of(axis, len(shapes[0]))
    if len({s[:along] + s[along + 1:] for s in shapes}) > 1 or len({len(s) for s in shapes}) > 1:
        raise ValueError(f"concatenate along axis {axis}: shapes {shapes} must be equal in every other axis")
    return array_module(*arrays).concatenate(list(arrays), axis=along)


@concatenate.backward("arrays")
def concatenate_darrays(dy, arrays_shape, axis):
    along, = axes_of(axis, len(arrays_shape[0]))
    ends = np.cumsum([shape[along] for shape in arrays_shape])
    before = (slice(None),) * along
    return ([getitem(dy, (*before, slice(int(end) - shape[along], int(end))))
             for end, shape in zip(ends, arrays_shape, strict=True)],)


# ---------------------------------------------------------------- another type
def astype(x: Any, dtype: Any) -> Any:
    """The same numbers in another type; x itself if it has that type already.   dx: back in the type of x."""
    wanted = np.dtype(dtype)
    if x.dtype == wanted:
        return x
    if is_floating(x.dtype) and not is_floating(wanted):
        raise TypeError(f"astype: a Tensor of {x.dtype} as {wanted} has no gradient: convert its array, t.data.astype(...)")
    x = widened(x) if is_half(wanted) else x        # the kernels know the way between float32 and either of the half types
    return converted(x, wanted, x.dtype)


@op(real=("y",))
def converted(x: Array, dtype: np.dtype[Any], source: np.dtype[Any]) -> Array:
    """Numbers of the type `source` in the type `dtype`.   dx: back again."""
    return kernels.cast(x, dtype) if real_of(dtype) == real_of(source) else x.astype(dtype)


@converted.backward("x")
def converted_dx(dy, dtype, source):
    return converted(dy, source, dtype)


def widened(x: Any) -> Any:
    """x in the type that is computed in: of half precision float32, else itself."""
    return astype(x, real_of(x.dtype))


def in_real(compute: Callable[[Any], Any], x: Any) -> Any:
    """compute(x), in float32 where x is of half precision, and rounded to that again: for sums whose terms would lose digits."""
    return astype(compute(widened(x)), x.dtype) if is_half(x.dtype) else compute(x)


# ---------------------------------------------------------------- another device
def to(x: Any, device: str) -> Any:
    """On another device ("cpu", "cuda", "auto"); the gradient comes back the same way."""
    data = x if backend.is_array(x) else x.data
    here, there = backend.device_of(data), backend.resolve_device(device)
    return x if here == there else transfer(x, there, here)


@op
def transfer(x: Array, device: str, source: str) -> Array:
    """Copy from the device `source` to `device`.   dx: copied back."""
    return backend.to_device(x, device)


@transfer.backward("x")
def transfer_dx(dy, device, source):
    return transfer(dy, source, device)


# ---------------------------------------------------------------- reductions made of these
def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """The sum over the count, along `axis`."""
    count = builtins.max(1, _count(x, axis))
    return sum(x, axis, keepdims) * (1.0 / count)


def var(x: Any, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """The mean square distance from the mean; ddof=1 divides by the count less one (the unbiased estimate)."""
    count = _count(x, axis)
    if count <= ddof:
        raise ValueError(f"var of {count} values with ddof={ddof} divides by {count - ddof}; it needs more than ddof values")
    centred = x - mean(x, axis, keepdims=True)
    return sum(centred * centred, axis, keepdims) * (1.0 / (count - ddof))


def _count(x: Any, axis: Axis) -> int:
    return int(np.prod([x.shape[i] for i in axes_of(axis, x.ndim)], dtype=int))
