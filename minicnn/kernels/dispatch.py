"""Which body of a kernel runs: the portable one, or for arrays on a GPU the one in CUDA.

The portable one is written first, runs on every library, and says what the other must compute. Where a fast one for CUDA exists,
the portable one is marked `@has_cuda`, and the fast one is the function of the same name in the file of the same name in `cuda/`.
It is taken for arrays of a library that compiles CUDA sources (`RawModule`), as CuPy is: of float32 and float64, and of float16 and
bfloat16 unless it is marked `@has_cuda_for_real`.
"""
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from minicnn.backend import HALF, REAL, compiles_cuda

P = ParamSpec("P")
R = TypeVar("R")


def has_cuda(portable: Callable[P, R]) -> Callable[P, R]:
    """The kernel, on CUDA where its first argument (an array, or a list of them) lies there."""
    return _chosen(portable, REAL + HALF)


def has_cuda_for_real(portable: Callable[P, R]) -> Callable[P, R]:
    """The same for a kernel in CUDA that takes what is computed in alone: one that reads half precision as that reads nonsense."""
    return _chosen(portable, REAL)


def _chosen(portable: Callable[P, R], types: str) -> Callable[P, R]:
    module = portable.__module__.replace(".kernels.", ".kernels.cuda.")

    @functools.wraps(portable)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if type(first) is np.ndarray:                           # NumPy's, without a further question
            return portable(*args, **kwargs)
        if isinstance(first, list):
            first = first[0] if first else None
        if compiles_cuda(first) and first.dtype.char in types:
            return _fast(module, portable.__name__)(*args, **kwargs)        # type: ignore[no-any-return]
        return portable(*args, **kwargs)

    return chosen


@functools.cache
def _fast(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
