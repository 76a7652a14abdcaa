"""What this machine reaches: a large matrix product, and a copy of more than its caches hold.

No kernel computes faster than the first or moves memory faster than the second, so a kernel that has `operations` to do and
`least_bytes` to move takes at least max(operations / peak, least_bytes / bandwidth): its roof. Two ways lead above it: an
algorithm that needs fewer operations than the definition (Winograd), and arrays so small that they stay in a cache.
Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009.
"""
from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import to_device
from minicnn.bench import engine
from minicnn.bench.measure import clock_of

COPY_BYTES = 128 << 20          # read once and written once: beyond what last-level caches hold


class Roof(NamedTuple):
    """The two limits of a machine, as measured with the threads that the kernels get."""

    gflops: float               # of a float32 matrix product, in 1e9 operations a second
    gbytes: float               # of a copy, in 1e9 bytes a second, read and written both counted

    def seconds(self, operations: int, least_bytes: int) -> float:
        """The least time for so much work."""
        return max(operations / (1e9 * self.gflops), least_bytes / (1e9 * self.gbytes))


def measure(device: str, threads: int, quick: bool = False) -> Roof:
    """Both limits of a device, each the best of several tries: a roof is what can be reached, not what is usual."""
    tries = 2 if quick else 7
    size, count = (256, 1 << 20) if quick else (4096 if device == "cuda" else 1536, COPY_BYTES)
    return Roof(_product(device, size, tries), _copy(device, threads, count, tries))


def _product(device: str, size: int, tries: int) -> float:
    clock = clock_of(device)
    a, b = (to_device(np.random.default_rng(i).standard_normal((size, size), dtype=np.float32), device) for i in (0, 1))
    out = a @ b
    xp: Any = engine.module_of(device)
    return 2e-9 * size ** 3 / min(clock(lambda: xp.matmul(a, b, out=out)) for _ in range(tries))


def _copy(device: str, threads: int, count: int, tries: int) -> float:
    source = to_device(np.ones(count // 4, np.float32), device)
    target = source.copy()
    if device == "cuda":
        clock = clock_of(device)
        return 2e-9 * count / min(clock(lambda: target.__setitem__(slice(None), source)) for _ in range(tries))
    parts = [slice(i * len(source) // threads, (i + 1) * len(source) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        def copy_all() -> float:
            start = time.perf_counter()
            list(pool.map(lambda part: target.__setitem__(part, source[part]), parts))
            return time.perf_counter() - start
        return 2e-9 * count / min(copy_all() for _ in range(tries))
