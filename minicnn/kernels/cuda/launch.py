"""Starting a kernel: compiled at the first use, its arguments made into what its signature says.

CuPy passes a Python int as 64 bits and a float as a double, whatever the kernel takes; a `float` parameter would then read half of
a double, and nobody would say so. Here the kernel's own declaration decides, and what does not fit is an error.
"""
from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import array_module, is_array, real_of
from minicnn.kernels.blocks import slices
from minicnn.kernels.cuda import source

THREADS = 256               # in a block
MOST_BLOCKS = 1 << 16       # of a pass over elements; with more elements, each thread takes several
MOST_ROWS = 1 << 20         # blocks for rows; with more rows, each takes several
MOST_ALONG = 1 << 15        # blocks along a row, likewise

STORED, REAL = ("stored*", "StoredFour*"), ("real*", "Four*")          # what pointers point at, and of those lists: see common.cuh

# Of numbers, and of what pointers point at; a list of addresses points at integers.
_types: dict[str, np.dtype[Any]] = {"int": np.dtype(np.int32), "long long": np.dtype(np.int64), "real*": np.dtype(np.int64)}
_null = np.int64(0)
_names = {"f": "float", "d": "double", "E": "bf16", "e": "fp16"}       # of types of numbers, in the sources
_loading = threading.Lock()


def launch(file: str, kernel: str, blocks: int | tuple[int, ...], threads: int | tuple[int, ...], *arguments: Any) -> None:
    """Run a kernel of `file`.cu on so many blocks of so many threads; nothing where there are no blocks.

    arguments: one for each parameter: arrays for pointers (or None, a null pointer), then numbers. The first array of what is
    stored, or where there is none of what is computed in, says which library it is, and what `stored` and `real` are.
    TypeError or ValueError for one that does not fit its parameter.
    """
    _check_count(file, kernel, arguments)
    first = next(arguments[i] for i in _telling(file, kernel) if arguments[i] is not None)
    _start(array_module(first), first.dtype, file, kernel, blocks, threads, arguments)


def run(xp: ModuleType, stored: np.dtype[Any], file: str, kernel: str, blocks: int | tuple[int, ...],
        threads: int | tuple[int, ...], *arguments: Any) -> None:
    """The same where no argument tells the library and the type of what is stored, as with lists of addresses."""
    _check_count(file, kernel, arguments)
    _start(xp, stored, file, kernel, blocks, threads, arguments)


def _start(xp: ModuleType, stored: np.dtype[Any], file: str, kernel: str, blocks: int | tuple[int, ...],
           threads: int | tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    grid = blocks if isinstance(blocks, tuple) else (blocks,)
    if 0 in grid:
        return
    function, pointers = _started(xp, file, kernel, stored)
    ndarray = xp.ndarray
    made: list[Any] = []
    # A training step hands over some thousand arguments, and a small model waits for it: so they are looked at here, in one loop.
    for pointer, value in zip(pointers, arguments, strict=False):       # numbers are left over
        if value is None:
            made.append(_null)
        elif (isinstance(value, ndarray) and value.dtype == pointer.dtype and value.flags.c_contiguous
              and not value.data.ptr % pointer.multiple):
            made.append(value)
        else:
            raise _misfit(xp, f"{file}.cu: {kernel}", pointer, value)
    try:
        values = _numbers(file, kernel, stored, *arguments[len(pointers):])
    except TypeError as error:                  # of a list or an array, too, which cannot be looked up
        raise TypeError(f"{file}.cu: {kernel}: numbers expected behind its pointers: {error}") from None
    function(grid, threads if isinstance(threads, tuple) else (threads,), (*made, *values))


def over(count: int, fours: str = "") -> int:
    """How many blocks a pass over so many elements takes.   fours: the kernel's ending, where it takes four at once."""
    return min(_blocks(count, fours), MOST_BLOCKS)


def over_rows(rows: int, length: int, fours: str = "") -> tuple[int, int]:
    """Blocks of THREADS for so many rows: one for each, and more along a row where it is long."""
    return min(rows, MOST_ROWS), min(_blocks(length, fours), MOST_ALONG)


def _blocks(count: int, fours: str) -> int:
    return -(-(count // 4 if fours else count) // THREADS)


def in_runs(n: int, of_each: int, most: int) -> list[slice]:
    """Cut n images into runs with about `most` of what each has so many of, bytes or numbers; of no images one run, of none."""
    return list(slices(n, most // max(1, of_each))) or [slice(0, 0)]


def _check_count(file: str, kernel: str, arguments: tuple[Any, ...]) -> None:
    parameters = source.signatures(file)[kernel]
    if len(arguments) != len(parameters):
        raise TypeError(f"{file}.cu: {kernel} takes {len(parameters)} arguments, not {len(arguments)}: "
                        f"{', '.join(p.name for p in parameters)}")


class Pointer(NamedTuple):
    """A parameter that points at numbers, for one type of what is stored: at which, and at a multiple of how many bytes."""

    kind: str
    name: str
    dtype: np.dtype[Any]
    multiple: int


def _pointer(kind: str, name: str, stored: np.dtype[Any]) -> Pointer:
    dtype = stored if kind in STORED else real_of(stored) if kind in REAL else _types[kind.removesuffix("*")]
    return Pointer(kind, name, dtype, four_bytes(dtype.itemsize) if kind.endswith("Four*") else 1)


def _misfit(xp: ModuleType, kernel: str, pointer: Pointer, value: Any) -> TypeError | ValueError:
    """What to say of an array that does not fit."""
    kind, name, dtype, multiple = pointer
    if not is_array(value):
        return TypeError(f"{kernel}: {name} is a pointer ({kind}) and takes an array, not {type(value).__name__}")
    if value.dtype != dtype:
        return TypeError(f"{kernel}: {name} takes an array of {dtype}, not of {value.dtype}")
    if not value.flags.c_contiguous:
        return ValueError(f"{kernel}: {name} {tuple(value.shape)} does not lie in one piece, with strides {value.strides}; the "
                          "kernel reads it as if it did: make it contiguous first")
    if not isinstance(value, xp.ndarray):
        return TypeError(f"{kernel}: {name} takes an array of {xp.__name__}, not of {array_module(value).__name__}")
    return ValueError(f"{kernel}: {name} does not begin at a multiple of {multiple} bytes")


@functools.lru_cache(maxsize=4096, typed=True)
def _numbers(file: str, kernel: str, stored: np.dtype[Any], *values: Any) -> tuple[Any, ...]:
    """Numbers in the sizes that the kernel declares. They come behind its pointers, and the same come again in every step."""
    made = []
    for (kind, name), value in zip([p for p in source.signatures(file)[kernel] if not p.pointer], values, strict=True):
        if kind == "real":
            if not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} takes a number, not {value!r}")
            made.append(real_of(stored).type(value))
            continue
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} takes an integer, not {value!r}")
        if not -1 << 31 <= value < 1 << 31 and kind == "int":
            raise ValueError(f"{file}.cu: {kernel}: {name}={value} is too large for a 32-bit integer: cut the work into parts")
        made.append(_types[kind].type(value))
    return tuple(made)


def four_bytes(itemsize: int) -> int:
    """At a multiple of how many bytes an array must begin to be read by fours, as common.cuh has it."""
    return min(16, 4 * itemsize)


@functools.cache
def _telling(file: str, kernel: str) -> list[int]:
    """The places of the arguments that may tell the library and the type: what is stored, then what is computed in."""
    kinds = [parameter.kind for parameter in source.signatures(file)[kernel]]
    return [i for telling in (STORED, REAL) for i, kind in enumerate(kinds) if kind in telling]


@functools.cache
def _module(xp: ModuleType, file: str, stored: str) -> Any:
    real = "double" if stored == "d" else "float"
    return xp.RawModule(code=source.text(file), options=("--std=c++17", f"-DREAL={real}", f"-DSTORED={_names[stored]}"))


@functools.cache
def _started(xp: ModuleType, file: str, kernel: str, stored: np.dtype[Any]) -> tuple[Any, list[Pointer]]:
    """The compiled kernel, and what points at arrays among what it takes."""
    pointers = [_pointer(*parameter, stored) for parameter in source.signatures(file)[kernel] if parameter.pointer]
    with _loading:                      # compiling takes a second, and need not be done by two threads
        return _module(xp, file, stored.char).get_function(kernel), pointers
