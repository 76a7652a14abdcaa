"""The non-linear steps between the linear ones, and dropout."""
from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.autograd import Tensor, op
from minicnn.backend import Array, array_module, device_of, is_array, to_device
from minicnn.kernels import elementwise as kernels
from minicnn.ops.arithmetic import exp
from minicnn.ops.movement import sum


@op
def relu(x: Array) -> Array:
    """y = max(x, 0)      dx = dy where y > 0, else 0 (at 0 too)"""
    return kernels.relu(x)


@relu.backward("x")
def relu_dx(dy, y):
    return where_positive(dy, y)


def where_positive(dy: Any, y: Any) -> Any:
    """dy where y > 0, else 0: how a gradient passes a ReLU whose result was y."""
    return kernels.relu_grad(dy, y) if is_array(dy) else dy * (y > 0)


@op
def add_relu(a: Array, b: Array) -> Array:
    """y = max(a + b, 0), of two arrays of one shape      da = db = dy where y > 0"""
    if a.shape != b.shape:
        raise ValueError(f"add_relu: a {tuple(a.shape)} and b {tuple(b.shape)} must have one shape; relu(a + b) broadcasts")
    return kernels.add_relu(a, b)


@add_relu.backward("a", "b")
def add_relu_backward(dy, y):
    dz = where_positive(dy, y)
    return dz, dz


@op
def sigmoid(x: Array) -> Array:
    """y = 1 / (1 + e^-x)      dx = dy y (1 - y)"""
    e = np.exp(-np.abs(x))                              # of the negative side only: never overflows
    return array_module(x).where(x >= 0, 1.0, e) / (1.0 + e)


@sigmoid.backward("x")
def sigmoid_dx(dy, y):
    return dy * y * (1.0 - y)


@op
def softmax(x: Array, axis: int = -1) -> Array:
    """y_i = e^(x_i) / sum_j e^(x_j) along `axis`      dx = y (dy - sum_j dy_j y_j)"""
    e = np.exp(x - x.max(axis=axis, keepdims=True))     # the same quotient, and no overflow
    return e / e.sum(axis=axis, keepdims=True)


@softmax.backward("x")
def softmax_dx(dy, y, axis):
    return y * (dy - sum(dy * y, axis, keepdims=True))


@op
def log_softmax(x: Array, axis: int = -1) -> Array:
    """y_i = x_i - log sum_j e^(x_j) along `axis`      dx = dy - e^y sum_j dy_j"""
    z = x - x.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


@log_softmax.backward("x")
def log_softmax_dx(dy, y, axis):
    return dy - exp(y) * sum(dy, axis, keepdims=True)


def dropout(x: Any, p: float, *, train: bool, rng: np.random.Generator | None = None) -> Any:
    """Set a random share p of the numbers to 0 and scale the others by 1 / (1 - p), so that the mean stays; only in training.

    rng: a NumPy Generator, which both backends draw from, so that one seed gives one mask on either.
    Source: Srivastava et al., "Dropout", 2014 (inverted scaling).
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p={p} must be a share between 0 and 1")
    if not train or p == 0.0:
        return x
    if rng is None:
        raise ValueError("dropout in training draws random numbers: pass rng=numpy.random.default_rng(seed)")
    array = x.data if isinstance(x, Tensor) else x
    kept = rng.random(array.shape, dtype=np.float32) >= p
    mask = kept.astype(array.dtype)
    mask *= 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return x * to_device(mask, device_of(array))
