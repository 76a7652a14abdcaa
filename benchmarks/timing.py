"""How long something takes."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Task(NamedTuple):
    """Something to time. `run` gets what `prepare` made, and returns when its work is finished (on a GPU it waits for it)."""

    prepare: Callable[[], Any]          # not timed: a backward needs a forward before it
    run: Callable[[Any], Any]


def once(task: Task) -> float:
    """Seconds of one call. What it returns is freed after the clock has stopped."""
    prepared = task.prepare()
    start = time.perf_counter()
    result = task.run(prepared)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def warm_up(task: Task, shortest: float) -> int:
    """Call it untimed: first calls compile, fault pages in and fill caches. Returns how many calls take `shortest` seconds.

    A repetition is that many, so that threads that have to wake up first do not count for much.
    """
    once(task)
    return max(1, min(100, int(shortest / once(task))))


def repetition(task: Task, calls: int) -> float:
    """Seconds a call, over so many."""
    return sum(once(task) for _ in range(calls)) / calls


def fall_asleep(limit: float = 1.0) -> None:
    """Wait until this process uses no processor any more, at most `limit` seconds.

    Threads of OpenMP and of OpenBLAS spin after their work in case more comes (OpenBLAS's for a tenth of a second), and
    would take a core from the library that is measured next.
    """
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.001:
            return
