"""cuBLAS's two products, asked for past CuPy, where a step is captured as a CUDA graph.

CuPy refuses to call cuBLAS for a stream that is being captured (NotImplementedError, in 14.2). cuBLAS itself allows it: it writes
what it would launch into the graph, and reads alpha and beta at once. So the library that CuPy uses is called as C functions.
Source: NVIDIA, cuBLAS, cublasSetStream, cublasGemmEx, cublasGemmStridedBatchedEx; "CUDA Graphs Support".
"""
from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

# What a parameter of the C functions is: the handle or an address, an int, a count of 64 bits.
ADDRESS, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
FACTOR, STRIDED = (ADDRESS, INT, INT), (ADDRESS, INT, INT, LONG)        # address, type, leading (, step)
PRODUCT = (ADDRESS, INT, INT, INT, INT, INT, ADDRESS, *FACTOR, *FACTOR, ADDRESS, *FACTOR, INT, INT)
PRODUCTS = (ADDRESS, INT, INT, INT, INT, INT, ADDRESS, *STRIDED, *STRIDED, ADDRESS, *STRIDED, INT, INT, INT)


class Direct:
    """The C library behind the names of `cupy.cuda.cublas`, for one stream at a time."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def on(self, stream: int) -> Direct:
        """The same, for what is asked for next on this stream, by its address."""
        self.stream = stream
        return self

    def gemmEx(self, *arguments: int) -> None:                  # noqa: N802 (CuPy's name)
        """C = alpha op(A) op(B) + beta C."""
        self._call("cublasGemmEx", PRODUCT, arguments)

    def gemmStridedBatchedEx(self, *arguments: int) -> None:    # noqa: N802
        """The same of so many matrices, each a step behind the one before."""
        self._call("cublasGemmStridedBatchedEx", PRODUCTS, arguments)

    def _call(self, name: str, kinds: tuple[Any, ...], arguments: tuple[int, ...]) -> None:
        handle = ADDRESS(arguments[0])
        given = [kind(argument) for kind, argument in zip(kinds, arguments, strict=True)]
        for function, values in (("cublasSetStream_v2", [handle, ADDRESS(self.stream)]), (name, given)):
            if status := getattr(self.functions, function)(*values):
                raise RuntimeError(f"{function} answers with status {status}")


def cublas_of(xp: Any) -> Any:
    """Where `gemmEx` and `gemmStridedBatchedEx` are to be found now: in CuPy, unless the current stream is being captured."""
    stream = xp.cuda.get_current_stream()
    captured = hasattr(stream, "is_capturing") and stream.is_capturing()        # the stand-in of the tests has products of its own
    return _direct().on(stream.ptr) if captured else xp.cuda.cublas


@functools.cache
def _direct() -> Direct:
    """The library that CuPy has loaded: found by the package that finds it for CuPy."""
    pathfinder: Any = importlib.import_module("cuda.pathfinder")
    return Direct(ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path))
