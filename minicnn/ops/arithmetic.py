"""Elementwise arithmetic with NumPy's broadcasting, the matrix product, and the largest of several.

Where broadcasting copied an input, its gradient is the sum over the copies: that is `sum_to`.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from minicnn.autograd import OPERATORS, op
from minicnn.backend import Array, array_module
from minicnn.kernels.elementwise import accumulate
from minicnn.kernels.linear import product
from minicnn.ops import movement
from minicnn.ops.movement import Axis, axes_of, reshape, sum_to, swap_last, transpose


@op
def add(a: Array, b: Array) -> Array:
    """y = a + b      da = dy,  db = dy"""
    return a + b


@add.backward("a")
def add_da(dy, a_shape):
    return sum_to(dy, a_shape)


@add.backward("b")
def add_db(dy, b_shape):
    return sum_to(dy, b_shape)


@op
def sub(a: Array, b: Array) -> Array:
    """y = a - b      da = dy,  db = -dy"""
    return a - b


@sub.backward("a")
def sub_da(dy, a_shape):
    return sum_to(dy, a_shape)


@sub.backward("b")
def sub_db(dy, b_shape):
    return sum_to(-dy, b_shape)


@op
def mul(a: Array, b: Array) -> Array:
    """y = a b      da = dy b,  db = dy a"""
    return a * b


@mul.backward("a")
def mul_da(dy, b, a_shape):
    return sum_to(dy * b, a_shape)


@mul.backward("b")
def mul_db(dy, a, b_shape):
    return sum_to(dy * a, b_shape)


@op
def div(a: Array, b: Array) -> Array:
    """y = a / b      da = dy / b,  db = -dy a / b^2 = -dy y / b"""
    return a / b


@div.backward("a")
def div_da(dy, b, a_shape):
    return sum_to(dy / b, a_shape)


@div.backward("b")
def div_db(dy, b, y, b_shape):
    return sum_to(-(dy * y / b), b_shape)


@op
def neg(x: Array) -> Array:
    """y = -x      dx = -dy"""
    return -x


@neg.backward("x")
def neg_dx(dy):
    return -dy


@op
def power(x: Array, exponent: Array) -> Array:
    """y = x^e      dx = dy e x^(e - 1),  de = dy y log x   (0 where x <= 0, where the logarithm has no real value)"""
    return x ** exponent


@power.backward("x")
def power_dx(dy, x, exponent, x_shape):
    if isinstance(exponent, (int, float)) and exponent == 0:
        return dy * 0.0                                 # not 0 * x^-1, which is no number at x = 0
    return sum_to(dy * exponent * x ** (exponent - 1), x_shape)


@power.backward("exponent")
def power_dexponent(dy, x, y, exponent_shape):
    if isinstance(x, (int, float)):                     # a Python number stays one: an array of it would promote
        log_x = math.log(x) if x > 0 else 0.0
    else:
        log_x = log(where(x > 0, x, 1.0))
    return sum_to(dy * y * log_x, exponent_shape)


@op
def exp(x: Array) -> Array:
    """y = e^x      dx = dy y"""
    return np.exp(x)


@exp.backward("x")
def exp_dx(dy, y):
    return dy * y


@op
def log(x: Array) -> Array:
    """y = log x (natural)      dx = dy / x"""
    return np.log(x)


@log.backward("x")
def log_dx(dy, x):
    return dy / x


@op
def sqrt(x: Array) -> Array:
    """y = sqrt(x)      dx = dy / (2 y);  infinite at 0"""
    return np.sqrt(x)


@sqrt.backward("x")
def sqrt_dx(dy, y):
    return dy / (y * 2.0)


@op
def tanh(x: Array) -> Array:
    """y = tanh x      dx = dy (1 - y^2)"""
    return np.tanh(x)


@tanh.backward("x")
def tanh_dx(dy, y):
    return dy * (1.0 - y * y)


# ---------------------------------------------------------------- choosing
@op
def where(condition: Array, a: Array, b: Array) -> Array:
    """y = a where condition holds, else b      da = dy there, db = dy elsewhere"""
    return array_module(condition, a, b).where(condition, a, b)


@where.backward("a")
def where_da(dy, condition, a_shape):
    return sum_to(where(condition, dy, 0.0), a_shape)


@where.backward("b")
def where_db(dy, condition, b_shape):
    return sum_to(where(condition, 0.0, dy), b_shape)


@op
def maximum(a: Array, b: Array) -> Array:
    """The larger of each pair      dy goes to the larger; of equals, to the first argument"""
    return np.maximum(a, b)


@maximum.backward("a")
def maximum_da(dy, a, b, a_shape):
    return sum_to(where(_not_less(a, b), dy, 0.0), a_shape)


@maximum.backward("b")
def maximum_db(dy, a, b, b_shape):
    return sum_to(where(_not_less(a, b), 0.0, dy), b_shape)


@op
def minimum(a: Array, b: Array) -> Array:
    """The smaller of each pair      dy goes to the smaller; of equals, to the first argument"""
    return np.minimum(a, b)


@minimum.backward("a")
def minimum_da(dy, a, b, a_shape):
    return sum_to(where(_not_less(b, a), dy, 0.0), a_shape)


@minimum.backward("b")
def minimum_db(dy, a, b, b_shape):
    return sum_to(where(_not_less(b, a), 0.0, dy), b_shape)


def _not_less(a: Any, b: Any) -> Array:
    """a >= b as a plain mask, and True where either is NaN."""
    return np.logical_not(a < b)


@op(extras=("winner",))
def max_of_last(x: Array) -> tuple[Array, Array]:
    """(..., m) -> the largest along the last axis (...), and its index      dy goes to it; of equals, to the first"""
    winner = x.argmax(-1)
    return array_module(x).take_along_axis(x, winner[..., None], -1)[..., 0], winner


@max_of_last.backward("x")
def max_of_last_dx(dy, winner, x_shape):
    hit = winner[..., None] == array_module(winner).arange(x_shape[-1])
    return where(hit, reshape(dy, (*x_shape[:-1], 1)), 0.0)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """The largest along `axis` (all by default); the gradient goes to it, of equals to the first in row-major order."""
    axes = axes_of(axis, x.ndim)
    kept = [i for i in range(x.ndim) if i not in axes]
    shape = tuple(x.shape[i] for i in kept)
    count = int(np.prod([x.shape[i] for i in axes], dtype=int))
    if count == 0:
        raise ValueError(f"the largest of no values: axis {axis} of shape {tuple(x.shape)} is empty")
    y, _ = max_of_last(reshape(transpose(x, (*kept, *axes)), (*shape, count)))
    return reshape(y, tuple(1 if i in axes else n for i, n in enumerate(x.shape))) if keepdims else y


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Any:
    """The smallest along `axis`: the largest of the negatives."""
    return -max(-x, axis, keepdims)


# ---------------------------------------------------------------- products of matrices
@op
def matrix_product(a: Array, b: Array) -> Array:
    """y = a b over the last two axes, broadcasting the others      da = dy b^T,  db = a^T dy"""
    return product(a, b) if a.ndim == b.ndim == 2 and a.dtype == b.dtype else array_module(a, b).matmul(a, b)


@matrix_product.backward("a")
def matrix_product_da(dy, b, a_shape):
    return sum_to(matrix_product(dy, swap_last(b)), a_shape)


@matrix_product.backward("b")
def matrix_product_db(dy, a, b_shape):
    return sum_to(matrix_product(swap_last(a), dy), b_shape)


def matmul(a: Any, b: Any) -> Any:
    """NumPy's a @ b: a vector counts as a row on the left, as a column on the right, and its axis is dropped again."""
    if not (getattr(a, "ndim", 0) and getattr(b, "ndim", 0)):
        raise ValueError("matmul needs at least one axis on both sides; multiply by a number with *")
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul of {tuple(a.shape)} and {tuple(b.shape)}: the last axis of the first must be as long as the "
                         "second to last (a vector's only) axis of the second")
    row = a if a.ndim > 1 else reshape(a, (1, -1))
    column = b if b.ndim > 1 else reshape(b, (-1, 1))
    y = matrix_product(row, column)
    if a.ndim > 1 and b.ndim > 1:
        return y
    lead = tuple(y.shape[:-2])
    return reshape(y, lead + (y.shape[-2:-1] if a.ndim > 1 else ()) + (y.shape[-1:] if b.ndim > 1 else ()))


OPERATORS.update(accumulate=accumulate, add=add, sub=sub, mul=mul, div=div, neg=neg, power=power, matmul=matmul, exp=exp, log=log,
                 sqrt=sqrt, max=max, getitem=movement.getitem, sum=movement.sum, mean=movement.mean, var=movement.var,
                 reshape=movement.reshape, transpose=movement.transpose, to=movement.to, astype=movement.astype)
