"""What the laboratory asks of the engine beyond its operations: memory, algorithms, devices."""
from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from minicnn import backend, memory
from minicnn.kernels import algorithms as known
from minicnn.kernels.windows import Windows
from minicnn.threads import get_num_threads, set_num_threads


def forget() -> None:
    """Let go of the memory that the engine keeps to use again: its stock of arrays, its helpers and what they scribble in."""
    memory.release()
    set_num_threads(get_num_threads())


def algorithms(windows: Windows, device: str) -> tuple[str, ...]:
    """The algorithms that can compute this convolution in float32 on a device; the first is the reference."""
    array = backend.to_device(np.zeros(1, np.float32), device)
    able = [name for name in known.ALGORITHMS if known.supports(name, array, windows)]
    return tuple(sorted(able, key=lambda name: name != "im2col"))


def algorithm(name: str) -> AbstractContextManager[None]:
    """Convolutions inside are computed by this algorithm; "" leaves the choice to the engine."""
    return known.algorithm(name or "auto")


def devices(wanted: str = "auto") -> list[str]:
    """The devices to measure on: "auto" is the CPU and, where one works, the GPU. Raises as the backend does."""
    if wanted == "auto":
        return ["cpu", "cuda"] if backend.cuda_status().available else ["cpu"]
    return [backend.resolve_device(wanted)]


def module_of(device: str) -> Any:
    """The array library of a device."""
    return backend.array_module(backend.to_device(np.zeros(1, np.float32), device))
