"""How exactly a GPU multiplies matrices of float32."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PRECISIONS = ("fp32", "tf32", "bf16")

_precision = "fp32"


def set_precision(name: str) -> None:
    """How the GPU multiplies matrices of float32, on tensor cores (NVIDIA's, since Ampere) where factors are rounded:

    "fp32": in float32.   "tf32": factors rounded to 10 bits behind the point (a relative 5e-4).   "bf16": to 7 bits (4e-3).
    Sums are float32 in all three, and so is all that is kept: weights, activations, gradients.

    For the whole process, and on a GPU alone: NumPy's products, and those of float64, are what they are.
    """
    global _precision
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}: choose one of {', '.join(map(repr, PRECISIONS))}")
    _precision = name


@contextmanager
def precision(name: str) -> Iterator[None]:
    """As `set_precision`, for what runs inside the block."""
    before = _precision
    set_precision(name)
    try:
        yield
    finally:
        set_precision(before)


def get_precision() -> str:
    """What `set_precision` was given last; "fp32" before."""
    return _precision
