"""The CUDA sources beside this file: their text, and what their kernels take.

A kernel is a function `extern "C" __global__ void name(type name, ...)`. What a launch must hand over is read off this line, so
that no list of types has to be kept beside it. Pointers come first, numbers behind them.
"""
from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent

KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')


class Parameter(NamedTuple):
    """`const real* x` is of kind "real*" (an array, or None), `int n` of kind "int", a list of addresses of kind "real**"."""

    kind: str
    name: str

    @property
    def pointer(self) -> bool:
        return self.kind.endswith("*")


def files() -> list[str]:
    """The names of the sources, "im2col" for im2col.cu."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


@functools.cache
def text(file: str) -> str:
    """A source as it is compiled: with common.cuh in its place, so that the compiler needs no folder to look in."""
    common = (FOLDER / "common.cuh").read_text(encoding="utf-8")
    return (FOLDER / f"{file}.cu").read_text(encoding="utf-8").replace('#include "common.cuh"', common)


@functools.cache
def signatures(file: str) -> dict[str, list[Parameter]]:
    """{kernel: its parameters} of a file."""
    return {name: [_parameter(part) for part in parameters.split(",")] for name, parameters in KERNEL.findall(text(file))}


def _parameter(declaration: str) -> Parameter:
    words = declaration.replace("*", " * ").split()
    kind = " ".join(word for word in words[:-1] if word != "const").replace(" *", "*")
    return Parameter(kind, words[-1])


def digest() -> str:
    """A hash of all that decides what the kernels compute: the sources, and the Python beside them."""
    found = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".cu", ".cuh", ".py"):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
