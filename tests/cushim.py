"""CUDA sources compiled by g++ and run on the CPU, behind CuPy's `RawModule`; cuBLAS's two products, streams and a pool of memory.

What a kernel gets is packed as CuPy packs it: each argument into the bytes of its own type, a Python int into 8 bytes and a float
into a double, whatever the kernel declares. So an argument of a wrong size is wrong here as it would be on a GPU; and is refused,
because the compiler tells the sizes that the kernel reads.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

HEADER = Path(__file__).with_name("cushim.h")
FLAGS = ("-std=c++20", "-O2",
         "-x", "c++", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-sign-compare", "-ffp-contract=off")
KERNEL = re.compile(r"__global__\s+void\s+(\w+)\s*\(")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


@functools.cache
def build(code: str, options: tuple[str, ...] = ()) -> Path:
    """The library made of a CUDA source; one that was made before is not made again. CUSHIM_FLAGS: more options for g++."""
    entries = "".join(f"SHIM_ENTRY({name})\n" for name in KERNEL.findall(code))
    source = f'#include "{HEADER.name}"\n{code}\n{entries}'
    command = [compiler() or "g++", *FLAGS, *options, *os.environ.get("CUSHIM_FLAGS", "").split(), "-I", str(HEADER.parent)]
    name = hashlib.sha256("\0".join([source, HEADER.read_text(), *command]).encode()).hexdigest()[:32]
    library = Path(tempfile.gettempdir(), f"minicnn-cushim-{os.getuid()}", f"{name}.so")
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made), "-"], input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ refuses a CUDA source:\n{done.stderr}")
        made.replace(library)               # whole, or not there
    return library


class RawModule:
    """CuPy's class, as far as it is used: a source, and its kernels by name."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.code = code
        self.compiled = ctypes.CDLL(str(build(code, tuple(o for o in options if o.startswith("-D")))))

    def get_function(self, name: str) -> Kernel:
        return Kernel(self, name)


class Kernel:
    """A kernel that can be called as CuPy's are: kernel(grid, block, arguments)."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.name, self.entry = name, getattr(module.compiled, f"launch_{name}")
        sizes = (ctypes.c_int * 64)()
        count = getattr(module.compiled, f"sizes_{name}")(sizes)
        self.sizes = list(sizes[:count])
        getattr(module.compiled, f"alignments_{name}")(sizes)
        self.alignments = list(sizes[:count])
        self.meets = name in meeting(module.code)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        Stream.current.orders += 1
        packed = [packed_as_cupy_does(argument) for argument in arguments]
        if [len(p) for p in packed] != self.sizes:
            raise TypeError(f"{self.name} reads {self.sizes} bytes and is given {[len(p) for p in packed]}: a GPU would not say so")
        for argument, multiple in zip(packed, self.alignments, strict=True):
            if multiple > 1 and int.from_bytes(argument, "little") % multiple:
                raise RuntimeError(f"cudaErrorMisalignedAddress: {self.name} reads {multiple} bytes at once")
        threads = int(np.prod(block))
        assert 0 < threads <= 1024 and 0 < grid[0] < 1 << 31 and all(0 < g < 1 << 16 for g in grid[1:]), (grid, block)
        boxes = [ctypes.create_string_buffer(p, len(p)) for p in packed]
        three = lambda size: (ctypes.c_uint * 3)(*size, *(1,) * (3 - len(size)))        # noqa: E731
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(b) for b in boxes))
        later_or_now(lambda: (self.entry(three(grid), three(block), pointers, ctypes.c_bool(self.meets)), boxes))


def packed_as_cupy_does(argument: Any) -> bytes:
    """The bytes that CuPy hands to the driver for an argument."""
    if hasattr(argument, "data") and hasattr(argument.data, "ptr"):
        return np.int64(argument.data.ptr).tobytes()
    if isinstance(argument, np.generic):
        return argument.tobytes()
    if isinstance(argument, bool | int | float):
        return {bool: np.bool_, int: np.int64, float: np.float64}[type(argument)](argument).tobytes()
    raise TypeError(f"Unsupported type {type(argument)}")           # a NumPy array, say, whose memory the device cannot reach


def meeting(code: str) -> set[str]:
    """The functions of a source that reach a __syncthreads, by themselves or through others."""
    bodies = dict(re.findall(r"^(?:extern \"C\" )?__(?:global|device)__[\w\s*]*?(\w+)\([^)]*\)\s*(\{[^\n]*\}$|\{.*?^\})", code,
                             re.MULTILINE | re.DOTALL))
    found: set[str] = {"__syncthreads"}
    while more := {name for name, body in bodies.items() if name not in found
                   and any(re.search(rf"\b{f}\(", body) for f in found)}:
        found |= more
    return found - {"__syncthreads"}


# ---------------------------------------------------------------- cuBLAS
def gemm_ex(handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int, b: int,
            b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algorithm: int) -> None:
    """cublasGemmEx by its documentation: C = alpha op(A) op(B) + beta C, matrices by columns, checked as cuBLAS does."""
    gemm_strided_batched_ex(handle, transa, transb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c, c_type, ldc, 0,
                            1, compute, algorithm)


def gemm_strided_batched_ex(handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int,
                            lda: int, stride_a: int, b: int, b_type: int, ldb: int, stride_b: int, beta: int, c: int, c_type: int,
                            ldc: int, stride_c: int, count: int, compute: int, algorithm: int) -> None:
    """cublasGemmStridedBatchedEx: so many products, whose matrices lie a stride apart."""
    rows_a, rows_b = (k if transa else m), (n if transb else k)
    if handle != HANDLE or min(m, n, k) < 0 or lda < max(1, rows_a) or ldb < max(1, rows_b) or ldc < max(1, m):
        raise ValueError("CUBLAS_STATUS_INVALID_VALUE")
    if a_type != b_type or (a_type, c_type, compute) not in SUPPORTED or algorithm != -1:
        raise ValueError("CUBLAS_STATUS_NOT_SUPPORTED")
    if count > 1 and stride_c < ldc * (n - 1) + m:
        raise ValueError("the results of a batch overlap, which cuBLAS leaves undefined")
    real = np.dtype(np.float64 if compute == 70 else np.float32)
    scale, keep = (_memory(address, (1,), (real.itemsize,), real)[0] for address in (alpha, beta))

    def matrix(address: int, kind: int, rows: int, columns: int, leading: int, stride: int) -> np.ndarray[Any, Any]:
        dtype = np.dtype(TYPES[kind])
        return _memory(address, (count, rows, columns), (stride * dtype.itemsize, dtype.itemsize, leading * dtype.itemsize), dtype)

    def multiply() -> None:
        left = matrix(a, a_type, rows_a, m if transa else k, lda, stride_a).astype(real, copy=False)
        right = matrix(b, b_type, rows_b, k if transb else n, ldb, stride_b).astype(real, copy=False)
        if compute == 77:
            left, right = (rounded(factor, 10) for factor in (left, right))     # TF32 has 10 bits behind the point
        out = matrix(c, c_type, m, n, ldc, stride_c)
        product = scale * (left.transpose(0, 2, 1) if transa else left) @ (right.transpose(0, 2, 1) if transb else right)
        out[...] = product if keep == 0 else product + keep * out.astype(real)  # beta 0: what C held is not read, NaN or not

    later_or_now(multiply)
    RECORD.append((compute, m, n, k, count))


HANDLE = 4711
TYPES = {0: "float32", 1: "float64", 2: "float16", 14: "bfloat16"}      # by cudaDataType_t
# (type of A and B, of C, compute type) as the table of cublasGemmEx has them
SUPPORTED = {(0, 0, 68), (0, 0, 77), (1, 1, 70), (2, 2, 68), (2, 0, 68), (14, 14, 68), (14, 0, 68)}
RECORD: list[tuple[int, int, int, int, int]] = []       # (compute type, m, n, k, how many) of every product


def _memory(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The numbers at an address, to read and to write."""
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize if all(shape) else 0
    raw = np.frombuffer((ctypes.c_char * reach).from_address(address), np.uint8) if reach else np.empty(0, np.uint8)
    return np.ndarray(shape, dtype, raw, 0, strides)


def rounded(x: np.ndarray[Any, Any], kept: int) -> np.ndarray[Any, Any]:
    """Factors as the tensor cores read them: so many bits behind the point, to the nearest, ties away from 0."""
    lost = 23 - kept
    bits = np.ascontiguousarray(x).view(np.uint32) + np.uint32(1 << (lost - 1))
    return (bits & np.uint32(0x100000000 - (1 << lost))).view(np.float32)


# ---------------------------------------------------------------- streams
class Stream:
    """A queue of orders. Those of a stream that computes are done at once; copies that another stream was given are done late: when
    the main stream waits for an event behind them, and until then the memory holds what is no number.

    While it is captured nothing is done, and the orders are kept: see `_done` in standin.py.
    """

    current: Stream
    main: Stream
    standin: Any                                # whose arrays it computes with

    def __init__(self, non_blocking: bool = False) -> None:
        self.copies: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.orders, self.seen = 0, -1          # given to it; how many of the main stream's it has waited for

    def __enter__(self) -> Stream:
        self.before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *error: object) -> None:
        Stream.current = self.before

    def record(self) -> Event:
        return Event(self, len(self.copies), self.orders)

    def wait_event(self, event: Event) -> None:
        if self is Stream.main:
            for memory, numbers in event.stream.copies[:event.copies]:
                memory[...] = numbers
        elif event.stream is Stream.main:
            self.seen = event.orders

    def copy(self, memory: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> None:
        """Fill the memory: late, and not before the main stream has done what it was asked before, for it may still read there."""
        if self.orders:
            memory[...] = numbers               # it computes, too: behind what it was asked before, as all that it is asked for
            return
        if self.seen != Stream.main.orders:
            raise AssertionError("a copy on a second stream was not made to wait for what the main one had been asked to do before")
        self.copies.append((memory, numbers.copy()))
        memory[...] = np.nan if memory.dtype.kind == "f" else -1


    def begin_capture(self) -> None:
        if self is Stream.main or Stream.current is not self:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: a stream of its own is captured, and the current one")
        self.standin.orders, self.standin.kept = [], []

    def end_capture(self) -> Graph:
        orders, kept, self.standin.orders, self.standin.kept = self.standin.orders, self.standin.kept, None, None
        return Graph(orders, kept)


class Graph:
    """What a stream was asked for while it was captured, and the memory that it uses."""

    def __init__(self, orders: list[Callable[[], object]], kept: list[Any]) -> None:
        self.orders, self.kept = orders, kept

    def launch(self, stream: Stream) -> None:
        stream.orders += 1
        for order in self.orders:
            order()


def later_or_now(order: Callable[[], object]) -> None:
    """Do it; while a stream is captured, when its graph is launched."""
    later = Stream.standin.orders
    order() if later is None else later.append(order)


class Event(NamedTuple):
    """A place in a stream: behind so many copies, and so many orders."""

    stream: Stream
    copies: int
    orders: int


Stream.main = Stream.current = Stream()


# ---------------------------------------------------------------- memory
class OutOfMemoryError(MemoryError):
    """CuPy's."""


class Memory:
    """What a device has of it: `limit` bytes, of which the arrays that live take `live`; and the pool that is asked for more."""

    def __init__(self) -> None:
        self.limit, self.live = 1 << 40, 0
        self.known: set[int] = set()
        self.default = self.pool = Pool(self)

    def take(self, array: np.ndarray[Any, Any]) -> None:
        """Count an array that owns its memory, for as long as it lives."""
        if array.base is not None or id(array) in self.known:
            return
        if self.live + array.nbytes > self.limit or self.pool.live + array.nbytes > (self.pool.limit or self.limit):
            raise OutOfMemoryError(f"Out of memory allocating {array.nbytes:,} bytes (allocated so far: {self.live:,} bytes).")
        self.known.add(id(array))
        self.pool.change(array.nbytes)
        weakref.finalize(array, self.give_back, self.pool, id(array), array.nbytes)

    def give_back(self, pool: Pool, name: int, size: int) -> None:
        self.known.discard(name)
        pool.change(-size)

    @contextlib.contextmanager
    def using_allocator(self, malloc: Any) -> Iterator[None]:
        """CuPy's: arrays inside take their memory from the pool whose `malloc` this is."""
        before, self.pool = self.pool, malloc.__self__
        try:
            yield
        finally:
            self.pool = before


class Pool:
    """CuPy's MemoryPool: it keeps what it was ever given, until it is told to give back what is free."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.live, self.peak, self.limit = memory, 0, 0, 0         # no limit but the device's

    def change(self, size: int) -> None:
        self.memory.live += size
        self.live += size
        self.peak = max(self.peak, self.live)

    def malloc(self, size: int) -> None:
        """Named by `using_allocator`; never called here."""

    def total_bytes(self) -> int:
        return self.peak

    def used_bytes(self) -> int:
        return self.live

    def get_limit(self) -> int:
        return self.limit

    def set_limit(self, size: int) -> None:
        self.limit = size

    def free_all_blocks(self) -> None:
        self.peak = self.live


# ---------------------------------------------------------------- the stand-in, with all of it
def with_cuda() -> Any:
    """The stand-in for CuPy once more, as a library of its own that compiles CUDA and has cuBLAS's products, streams and a pool."""
    spec = importlib.util.spec_from_file_location("standin_with_cuda", Path(__file__).with_name("standin.py"))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module             # where its functions look for each other
    spec.loader.exec_module(module)
    memory, init, asarray = Memory(), module.ndarray.__init__, module.asarray

    def counted(self: Any, array: np.ndarray[Any, Any]) -> None:
        memory.take(array)
        init(self, array)
        if module.orders is not None:
            module.kept.append(array)           # a graph knows it by its address

    def sent(a: Any, dtype: Any = None) -> Any:
        if Stream.current is Stream.main or not isinstance(a, np.ndarray) or module.orders is not None:
            return asarray(a, dtype)
        there = module.empty(a.shape, a.dtype)
        Stream.current.copy(there._host, a)
        return there

    Stream.standin, module.kept = module, None
    module.ndarray.__init__, module.asarray = counted, sent
    module.RawModule, module.get_default_memory_pool = RawModule, lambda: memory.default
    module.cuda = SimpleNamespace(
        cublas=SimpleNamespace(gemmEx=gemm_ex, gemmStridedBatchedEx=gemm_strided_batched_ex),
        device=SimpleNamespace(get_cublas_handle=lambda: HANDLE), Stream=Stream, get_current_stream=lambda: Stream.current,
        MemoryPool=lambda: Pool(memory), using_allocator=memory.using_allocator,
        runtime=SimpleNamespace(memGetInfo=lambda: (memory.limit - memory.live, memory.limit)))
    return module
