"""Starting a kernel: compiled at the first use, its arguments made into what its signature says.

CuPy passes a Python int as 64 bits and a float as a double, whatever the kernel takes; a `float` parameter would then read half of
a double, and nobody would say so. Here the kernel's own declaration decides, and what does not fit is an error.
"""
from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module, is_array, real_of
from minicnn.kernels.blocks import slices
from minicnn.kernels.cuda import source

THREADS = 256               # in a block
LARGEST = 1 << 30           # elements of a pass: an int counts them
MOST_BLOCKS = 1 << 16       # of a pass over elements; with more elements, each thread takes several

STORED, REAL = ("stored*", "StoredFour*"), ("real*", "Four*")          # what pointers point at, and of those lists: see common.cuh

# Of numbers, and of what pointers point at; a list of addresses points at integers.
_types: dict[str, np.dtype[Any]] = {"int": np.dtype(np.int32), "long long": np.dtype(np.int64), "real*": np.dtype(np.int64)}
_names = {"f": "float", "d": "double", "E": "bf16", "e": "fp16"}       # of types of numbers, in the sources
_loading = threading.Lock()


def launch(file: str, kernel: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...], *arguments: Any) -> None:
    """Run a kernel of `file`.cu on so many blocks of so many threads; nothing where there are no blocks.

    arguments: one for each parameter: arrays for pointers (or None, a null pointer), numbers. The first array says which library it
    is; the first of the stored ones, or of all where there are none such, what `stored` and `real` are.
    TypeError or ValueError for one that does not fit its parameter.
    """
    parameters = source.signatures(file)[kernel]
    if len(arguments) != len(parameters):
        raise TypeError(f"{file}.cu: {kernel} takes {len(parameters)} arguments, not {len(arguments)}: "
                        f"{', '.join(p.name for p in parameters)}")
    given = [(p.kind, a) for p, a in zip(parameters, arguments) if a is not None]
    first = next((a for kind, a in given if kind in STORED), None)
    if first is None:
        first = next(a for kind, a in given if kind in REAL)
    run(array_module(first), first.dtype, file, kernel, blocks, threads, *arguments)


def run(xp: ModuleType, stored: np.dtype[Any], file: str, kernel: str, blocks: int | tuple[int, ...],
        threads: int | tuple[int, ...], *arguments: Any) -> None:
    """The same where no argument tells the library and the type of what is stored, as with lists of addresses."""
    grid, block = (size if isinstance(size, tuple) else (size,) for size in (blocks, threads))
    if 0 in grid:
        return
    made = [_argument(f"{file}.cu: {kernel}", parameter, value, stored)
            for parameter, value in zip(source.signatures(file)[kernel], arguments, strict=True)]
    _function(xp, file, kernel, stored.char)(grid, block, tuple(made))


def over(count: int) -> int:
    """How many blocks a pass over so many elements takes."""
    return min(-(-count // THREADS), MOST_BLOCKS)


def in_runs(n: int, of_each: int, most: int) -> list[slice]:
    """Cut n images into runs with about `most` of what each has so many of, bytes or numbers; of no images one run, of none."""
    return list(slices(n, most // max(1, of_each))) or [slice(0, 0)]


def _argument(kernel: str, parameter: source.Parameter, value: Any, stored: np.dtype[Any]) -> Any:
    """What CuPy is handed for a parameter: the array itself, or a NumPy number of the parameter's very size."""
    kind, name = parameter
    if kind.endswith("*"):
        if value is None:
            return np.int64(0)                                              # a null pointer
        if not is_array(value):
            raise TypeError(f"{kernel}: {name} is a pointer ({kind}) and takes an array, not {type(value).__name__}")
        expected = stored if kind in STORED else real_of(stored) if kind in REAL else _types[kind.removesuffix("*")]
        if value.dtype != expected:
            raise TypeError(f"{kernel}: {name} takes an array of {expected}, not of {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{kernel}: {name} {tuple(value.shape)} does not lie in one piece, with strides {value.strides}; the "
                             "kernel reads it as if it did: make it contiguous first")
        if kind.endswith("Four*") and value.data.ptr % four_bytes(value):
            raise ValueError(f"{kernel}: {name} does not begin at a multiple of {four_bytes(value)} bytes")
        return value
    if kind == "real":
        return np.asarray(value, real_of(stored))[()]
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{kernel}: {name} takes an integer, not {value!r}")
    if not -1 << 31 <= value < 1 << 31 and kind == "int":
        raise ValueError(f"{kernel}: {name}={value} is too large for a 32-bit integer: cut the work into smaller parts")
    return _integer(kind, value)


def four_bytes(array: Array) -> int:
    """At a multiple of how many bytes an array must begin to be read by fours, as common.cuh has it."""
    return min(16, 4 * int(array.itemsize))


@functools.lru_cache(maxsize=4096)
def _integer(kind: str, value: int) -> Any:
    """A number in the kernel's own size; the same few come again and again."""
    return np.asarray(value, _types[kind])[()]


@functools.cache
def _module(xp: ModuleType, file: str, stored: str) -> Any:
    real = "double" if stored == "d" else "float"
    return xp.RawModule(code=source.text(file), options=("--std=c++17", f"-DREAL={real}", f"-DSTORED={_names[stored]}"))


@functools.cache
def _function(xp: ModuleType, file: str, kernel: str, stored: str) -> Any:
    with _loading:                      # compiling takes a second, and need not be done by two threads
        return _module(xp, file, stored).get_function(kernel)
