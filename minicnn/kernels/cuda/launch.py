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

from minicnn.backend import array_module, is_array
from minicnn.kernels.blocks import slices
from minicnn.kernels.cuda import source

THREADS = 256               # in a block
LARGEST = 1 << 30           # elements of a pass: an int counts them
MOST_BLOCKS = 1 << 16       # of a pass over elements; with more elements, each thread takes several

# Of numbers, and of what pointers point at; a list of addresses points at integers.
_types: dict[str, np.dtype[Any]] = {"int": np.dtype(np.int32), "long long": np.dtype(np.int64), "real*": np.dtype(np.int64)}
_loading = threading.Lock()


def launch(file: str, kernel: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...], *arguments: Any) -> None:
    """Run a kernel of `file`.cu on so many blocks of so many threads; nothing where there are no blocks.

    arguments: one for each parameter: arrays for pointers (or None, a null pointer), numbers. The first array says which library it
    is, and whether `real` is float or double. TypeError or ValueError for one that does not fit its parameter.
    """
    parameters = source.signatures(file)[kernel]
    if len(arguments) != len(parameters):
        raise TypeError(f"{file}.cu: {kernel} takes {len(parameters)} arguments, not {len(arguments)}: "
                        f"{', '.join(p.name for p in parameters)}")
    first = next(a for p, a in zip(parameters, arguments) if p.kind in ("real*", "Four*") and a is not None)
    run(array_module(first), first.dtype, file, kernel, blocks, threads, *arguments)


def run(xp: ModuleType, real: np.dtype[Any], file: str, kernel: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...],
        *arguments: Any) -> None:
    """The same where no argument tells the library and the type of `real`, as with lists of addresses."""
    grid, block = (size if isinstance(size, tuple) else (size,) for size in (blocks, threads))
    if 0 in grid:
        return
    made = [_argument(f"{file}.cu: {kernel}", parameter, value, real)
            for parameter, value in zip(source.signatures(file)[kernel], arguments, strict=True)]
    _function(xp, file, kernel, real.char)(grid, block, tuple(made))


def over(count: int) -> int:
    """How many blocks a pass over so many elements takes."""
    return min(-(-count // THREADS), MOST_BLOCKS)


def in_runs(n: int, of_each: int, most: int) -> list[slice]:
    """Cut n images into runs with about `most` of what each has so many of, bytes or numbers; of no images one run, of none."""
    return list(slices(n, most // max(1, of_each))) or [slice(0, 0)]


def _argument(kernel: str, parameter: source.Parameter, value: Any, real: np.dtype[Any]) -> Any:
    """What CuPy is handed for a parameter: the array itself, or a NumPy number of the parameter's very size."""
    kind, name = parameter
    if kind.endswith("*"):
        if value is None:
            return np.int64(0)                                              # a null pointer
        if not is_array(value):
            raise TypeError(f"{kernel}: {name} is a pointer ({kind}) and takes an array, not {type(value).__name__}")
        expected = _types.get(kind.removesuffix("*"), real)                 # `real` and `Four` are what the first array is of
        if value.dtype != expected:
            raise TypeError(f"{kernel}: {name} takes an array of {expected}, not of {value.dtype}")
        if not value.flags.c_contiguous:
            raise ValueError(f"{kernel}: {name} {tuple(value.shape)} does not lie in one piece, with strides {value.strides}; the "
                             "kernel reads it as if it did: make it contiguous first")
        if kind == "Four*" and value.data.ptr % 16:
            raise ValueError(f"{kernel}: {name} does not begin at a multiple of 16 bytes")
        return value
    if kind == "real":
        return np.asarray(value, real)[()]
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{kernel}: {name} takes an integer, not {value!r}")
    if not -1 << 31 <= value < 1 << 31 and kind == "int":
        raise ValueError(f"{kernel}: {name}={value} is too large for a 32-bit integer: cut the work into smaller parts")
    return _integer(kind, value)


@functools.lru_cache(maxsize=4096)
def _integer(kind: str, value: int) -> Any:
    """A number in the kernel's own size; the same few come again and again."""
    return np.asarray(value, _types[kind])[()]


@functools.cache
def _module(xp: ModuleType, file: str, real: str) -> Any:
    name = {"f": "float", "d": "double"}[real]
    return xp.RawModule(code=source.text(file), options=("--std=c++17", f"-DREAL={name}"))


@functools.cache
def _function(xp: ModuleType, file: str, kernel: str, real: str) -> Any:
    with _loading:                      # compiling takes a second, and need not be done by two threads
        return _module(xp, file, real).get_function(kernel)
