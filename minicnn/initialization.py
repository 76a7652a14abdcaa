"""How weights begin. Each function returns an initialiser: (shape, rng, dtype) -> NumPy array.

A layer keeps the size of what flows through it when the variance of its weights is matched to its fan: the number of
products that add up in one output (fan-in), or in one input's gradient (fan-out).
He et al., "Delving Deep into Rectifiers", 2015:  variance 2 / fan (half of a ReLU's inputs are lost).
Glorot, Bengio (whose first name is Xavier), 2010:  variance 2 / (fan_in + fan_out).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Initializer = Callable[[Shape, "np.random.Generator", Any], np.ndarray[Any, Any]]      # quoted: its module is slow to import


def fans(shape: Shape) -> tuple[int, int]:
    """(fan-in, fan-out) of a weight (out, in, *window)."""
    window = int(np.prod(shape[2:], dtype=int))
    return shape[1] * window, shape[0] * window


def normal(std: float) -> Initializer:
    """Normal with mean 0 and the given standard deviation."""
    def draw(shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray[Any, Any]:
        return np.multiply(rng.standard_normal(shape, dtype=dtype), float(std))
    return draw


def uniform(bound: float) -> Initializer:
    """Uniform between -bound and bound."""
    def draw(shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray[Any, Any]:
        return np.multiply(rng.random(shape, dtype=dtype), 2 * float(bound)) - float(bound)
    return draw


def he_normal(fan: str = "out") -> Initializer:
    """Normal, variance 2 / fan-out (or 2 / fan-in)."""
    index = _fan_index(fan)
    return lambda shape, rng, dtype: normal((2.0 / fans(shape)[index]) ** 0.5)(shape, rng, dtype)


def he_uniform(fan: str = "in") -> Initializer:
    """Uniform, variance 2 / fan-in (or 2 / fan-out): bound sqrt(6 / fan)."""
    index = _fan_index(fan)
    return lambda shape, rng, dtype: uniform((6.0 / fans(shape)[index]) ** 0.5)(shape, rng, dtype)


def xavier_normal() -> Initializer:
    """Normal, variance 2 / (fan-in + fan-out)."""
    return lambda shape, rng, dtype: normal((2.0 / sum(fans(shape))) ** 0.5)(shape, rng, dtype)


def xavier_uniform() -> Initializer:
    """Uniform, variance 2 / (fan-in + fan-out): bound sqrt(6 / (fan-in + fan-out))."""
    return lambda shape, rng, dtype: uniform((6.0 / sum(fans(shape))) ** 0.5)(shape, rng, dtype)


def fan_in_uniform() -> Initializer:
    """Uniform between -1 and 1 over sqrt(fan-in): PyTorch's default for fully connected layers."""
    return lambda shape, rng, dtype: uniform(fans(shape)[0] ** -0.5)(shape, rng, dtype)


def zeros(shape: Shape, rng: np.random.Generator, dtype: Any) -> np.ndarray[Any, Any]:
    """All zeros: an initialiser itself."""
    return np.zeros(shape, dtype)


def _fan_index(fan: str) -> int:
    if fan not in ("in", "out"):
        raise ValueError(f'fan={fan!r} must be "in" or "out"')
    return ("in", "out").index(fan)
