"""The matrix product on a GPU: one way to cuBLAS, without a copy.

    out = a b,   or   out += a b             (..., m, k), (..., k, n) -> (..., m, n)

A transposed view is read as it lies, a stack of matrices is one call, and of one that all share (stride 0) no copy is made. CuPy's
own `matmul` copies transposed stacks, and knows no `+=`.

cuBLAS thinks in columns: what lies row by row is to it the transpose. So it is asked for out^T = b^T a^T.
Source: NVIDIA, cuBLAS, cublasGemmEx and cublasGemmStridedBatchedEx.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, array_module, real_of
from minicnn.kernels.cuda.cublas import cublas_of
from minicnn.kernels.precision import get_precision

# cudaDataType_t and cublasComputeType_t, by the type of the factors; half precision is added up in float32
DATA = {"f": 0, "d": 1, "e": 2, "E": 14}
COMPUTE = {"f": 68, "d": 70, "e": 68, "E": 68}
COMPUTE_TF32 = 77
NO_TRANSPOSE, TRANSPOSE = 0, 1
DEFAULT_ALGORITHM = -1

_factors = {kind: np.array([0, 1], "d" if kind == "d" else "f") for kind in DATA}      # 0 and 1, where cuBLAS may read them,
_addresses = {kind: (array[:1].ctypes.data, array[1:].ctypes.data) for kind, array in _factors.items()}     # and where that is


class Operand(NamedTuple):
    """How a stack of matrices lies in memory, for a library that thinks in columns."""

    array: Array
    transposed: int
    leading: int            # numbers from one row (or column, where transposed) to the next
    step: int               # numbers from one matrix to the next


def gemm(a: Array, b: Array, out: Array | None = None, *, accumulate: bool = False) -> Array:
    """a b, written or added to `out`: (m, k), (k, n) -> (m, n), or stacks of so many on both sides, (s, m, k), (s, k, n).

    The arrays have one dtype: float32 (on tensor cores where `set_precision` says "tf32"), float64, float16 or bfloat16; of the
    last two, `out` may be float32. The rows of `out` lie in one piece.
    """
    xp = array_module(a, b)
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    stack = a.shape[:-2]
    fits = b.shape == (*stack, k, n) and a.dtype == b.dtype and len(stack) <= 1
    if not fits or (out is not None and (out.shape != (*stack, m, n) or out.dtype not in (a.dtype, real_of(a.dtype)))):
        raise ValueError(f"gemm: a {tuple(a.shape)} of {a.dtype} times b {tuple(b.shape)} of {b.dtype}"
                         + ("" if out is None else f" into {tuple(out.shape)} of {out.dtype}")
                         + ": must be (..., m, k), (..., k, n) and (..., m, n), with the same leading axis or none, and one dtype")
    if out is None:
        out, accumulate = xp.empty((*stack, m, n), a.dtype), False
    if not out.size or not k:
        if not accumulate:
            out[...] = 0
        return out
    left, right, into = operand(a), operand(b), operand(out)
    if into.transposed or into.array is not out:
        raise ValueError(f"gemm: out {tuple(out.shape)} with strides {out.strides} must have rows that lie in one piece")
    kind = a.dtype.char
    zero, one = _addresses[kind]
    beta = one if accumulate else zero
    cublas, handle = cublas_of(xp), xp.cuda.device.get_cublas_handle()
    common: list[Any] = [handle, right.transposed, left.transposed, n, m, k, one]
    how = COMPUTE_TF32 if kind == "f" and get_precision() == "tf32" else COMPUTE[kind], DEFAULT_ALGORITHM
    data, made = DATA[kind], DATA[out.dtype.char]
    if not stack or stack == (1,):
        cublas.gemmEx(*common, right.array.data.ptr, data, right.leading, left.array.data.ptr, data, left.leading, beta,
                      out.data.ptr, made, into.leading, *how)
    else:
        cublas.gemmStridedBatchedEx(*common, right.array.data.ptr, data, right.leading, right.step,
                                    left.array.data.ptr, data, left.leading, left.step, beta,
                                    out.data.ptr, made, into.leading, into.step, stack[0], *how)
    return out


def operand(array: Array) -> Operand:
    """The array as cuBLAS can read it: as it lies where rows or columns lie in one piece, else a copy."""
    rows, columns = array.shape[-2:]
    down, along = (stride // array.itemsize for stride in array.strides[-2:])
    step = array.strides[0] // array.itemsize if array.ndim > 2 else 0
    if (along == 1 or columns == 1) and (down >= columns or rows == 1):
        return Operand(array, NO_TRANSPOSE, max(down, columns) if rows > 1 else columns, step)
    if (down == 1 or rows == 1) and (along >= rows or columns == 1):
        return Operand(array, TRANSPOSE, max(along, rows) if columns > 1 else rows, step)
    return operand(array_module(array).ascontiguousarray(array))
