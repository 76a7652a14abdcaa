"""How exactly a GPU computes what is of float32."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minicnn.backend import compiles_cuda

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

_precision = "fp32"


def set_precision(name: str) -> None:
    """How a GPU computes with models and arrays of float32; on tensor cores (NVIDIA's, since Ampere) in all but the first:

    "fp32"      In float32.
    "tf32"      The factors of matrix products are rounded to 10 bits behind the point (a relative 5e-4). Winograd's convolution,
                which "auto" takes from 64 channels on, is then 1.4e-3 off, where im2col is 3e-4 off and bfloat16 2.3e-3.
    "bf16"      A model computes with images of bfloat16 inside, 7 bits (4e-3) and float32's range; they take half the memory.
    "fp16"      With images of float16, 10 bits from 6e-8 to 65504. Gradients are smaller than that: train with `optim.GradScaler`.

    Weights and their gradients, statistics, every sum, and what goes into a model and comes out are float32 in all four.
    For the whole process, and on a GPU alone: NumPy's arrays, and those of float64, are computed as they are.
    Raises ImportError where "bf16" lacks the library ml_dtypes, by which NumPy and CuPy know the type.
    """
    global _precision
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r}: choose one of {', '.join(map(repr, PRECISIONS))}")
    half_type(name)
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


def half_beside(array: Any) -> np.dtype[Any] | None:
    """The type in which a model given this array is to compute inside; None: in the array's own."""
    if _precision in ("fp32", "tf32") or not compiles_cuda(array) or array.dtype != np.float32:
        return None
    return half_type(_precision)


def half_type(name: str) -> np.dtype[Any] | None:
    """The type of images inside a model under a precision; None: the model's own. ImportError where NumPy does not know it."""
    if name != "bf16":
        return np.dtype(np.float16) if name == "fp16" else None
    try:
        import ml_dtypes  # only for those who ask for it
    except ImportError:
        raise ImportError('precision "bf16" needs ml_dtypes, by which NumPy and CuPy know the type: pip install ml_dtypes'
                          ) from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
