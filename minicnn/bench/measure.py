"""How long a call takes, and what memory it needs beside its result.

On the CPU the wall clock tells. On a GPU a call only hands over work, so two events on the stream tell when it began and ended
there. The first call is timed apart: it compiles, fills caches and makes workspaces.
"""
from __future__ import annotations

import contextvars
import time
import tracemalloc
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, to_device
from minicnn.bench import engine

Call = Callable[[], Any]
Clock = Callable[[Call], float]         # seconds of one call; its result is freed after the clock has stopped


class Care(NamedTuple):
    """How carefully to measure."""

    repeats: int = 9            # of which the median and the quartiles are shown
    shortest: float = 0.01      # seconds that a repetition takes at least: a short call is made again and again
    warm_up: int = 2            # untimed calls

    @classmethod
    def quick(cls, repeats: int | None = None) -> Care:
        """Shows that everything runs; measures nothing."""
        return cls(repeats or 2, 0.0, 0)


class Spread(NamedTuple):
    """What the repetitions gave, in seconds: the median, and the quartiles between which the middle half lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of the seconds of each repetition."""
        low, high = np.quantile(seconds, (0.25, 0.75))
        return cls(median(seconds), float(low), float(high))

    @property
    def width(self) -> float:
        """From quartile to quartile."""
        return self.high - self.low


# ---------------------------------------------------------------- time
def wall(call: Call) -> float:
    """Seconds by the wall clock."""
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def events(xp: Any) -> Clock:
    """Seconds between two events on the current stream of a GPU, whose array library is xp."""
    def clock(call: Call) -> float:
        start, end = xp.cuda.Event(), xp.cuda.Event()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return float(xp.cuda.get_elapsed_time(start, end)) / 1e3        # it counts milliseconds
    return clock


def clock_of(device: str) -> Clock:
    """The clock that tells the time on this device."""
    return events(engine.module_of(device)) if device == "cuda" else wall


def repeat(call: Call, clock: Clock, care: Care) -> list[float]:
    """Seconds a call of each repetition, after a warm-up."""
    return in_turn({"": call}, clock, care)[""]


def in_turn(calls: Mapping[str, Call], clock: Clock, care: Care) -> dict[str, list[float]]:
    """The same of several calls, one repetition of each in turn: a slow minute of the machine hits all alike."""
    many = {name: _warm_up(call, clock, care) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(care.repeats):
        for name, call in calls.items():
            seconds[name].append(sum(clock(call) for _ in range(many[name])) / many[name])
    return seconds


def _warm_up(call: Call, clock: Clock, care: Care) -> int:
    """Call it untimed; returns how many calls a repetition takes."""
    warm = [clock(call) for _ in range(care.warm_up)]
    return max(1, min(1000, round(care.shortest / min(warm)))) if warm else 1


def once(call: Call, clock: Clock) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    kept: list[Any] = []
    return clock(lambda: kept.append(call())), kept[0]


# ---------------------------------------------------------------- transfers
def upload(arrays: Mapping[str, Array], device: str) -> tuple[dict[str, Array], float | None]:
    """The arrays on a device, and the seconds that it took to bring them there; None where they are there already."""
    if device == "cpu":
        return dict(arrays), None
    moved: dict[str, Array] = {}
    seconds = clock_of(device)(lambda: moved.update({name: to_device(array, device) for name, array in arrays.items()}))
    return moved, seconds


# ---------------------------------------------------------------- memory
def temporary_bytes(call: Call, device: str) -> int | None:
    """The most memory that a call holds at once beside its result, workspaces that it would find later included.

    None where nothing tells. The engine has forgotten its workspaces afterwards: warm up before you time.
    """
    if device == "cuda":
        return _temporary_on_gpu(call, engine.module_of(device))
    return _temporary_on_host(call) if device == "cpu" else None


def _temporary_on_host(call: Call) -> int:
    """What Python and NumPy allocate is traced, in a thread that has no workspaces yet; it is slow, and not timed."""
    engine.forget()
    tracemalloc.start()
    try:
        with ThreadPoolExecutor(1) as fresh:
            result = fresh.submit(contextvars.copy_context().run, call).result()    # the context knows the algorithm
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        engine.forget()
    return max(0, peak - _own_bytes(result))


def _temporary_on_gpu(call: Call, xp: Any) -> int:
    """CuPy's pool keeps every block it ever needed at once: emptied before, it has grown by the peak after."""
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    result = call()
    xp.cuda.Device().synchronize()
    return max(0, int(pool.total_bytes()) - int(before) - _own_bytes(result))


def _own_bytes(result: Any) -> int:
    return int(getattr(result, "nbytes", 0))
