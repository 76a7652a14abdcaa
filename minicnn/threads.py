"""Threads: how a kernel's blocks are shared out over the cores.

NumPy lets go of Python's lock inside its loops and its matrix products, so Python threads that each work on a block of their
own do run at once. Each then calls the BLAS for itself, on one core; a BLAS that started threads of its own below them
would only fight them for the cores. So while blocks are running, the BLAS under NumPy is held to one thread, and afterwards it gets
back what it had.

    with kernels in mind:   parallel(task, blocks)      runs task(block) for every block, on get_num_threads() threads

Blocks that write to places of their own may run in any order. What adds up over blocks goes through `in_shares`, which gives
every share its blocks beforehand: the same number of threads, the same sums, bit for bit.
"""
from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import threadpoolctl

from minicnn.memory import fresh

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

_count: int | None = None                       # what was asked for; None: nobody has asked
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_mine = threading.local()                       # each thread's workspaces, and whether it is running a block


# ---------------------------------------------------------------- how many
def set_num_threads(n: int) -> None:
    """Run kernels on n threads from now on, the caller's among them. ValueError below 1."""
    global _count, _pool
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
        raise ValueError(f"set_num_threads({n!r}): give a number of threads of at least 1")
    with _lock:
        old, _pool, _count = _pool, None, int(n)
    if old is not None:
        old.shutdown(wait=False)                # whoever is using it finishes there


def get_num_threads() -> int:
    """How many threads kernels run on; unless set, as many as NumPy's BLAS (which OMP_NUM_THREADS limits), at most one a core."""
    global _count
    if _count is None:
        _count = max(1, min([cores(), *(pool.num_threads for pool in _blas())]))
    return _count


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Inside the block, n threads for the kernels, and for the BLAS outside them; afterwards as many as before."""
    before = get_num_threads()
    set_num_threads(n)
    try:
        with threadpoolctl.threadpool_limits(n, user_api="blas"):
            yield
    finally:
        set_num_threads(before)


# ---------------------------------------------------------------- sharing out
def parallel(task: Callable[[T], object], items: Sequence[T], most: int | None = None) -> None:
    """task(item) for every item, each on the thread that is free first; returns when all are done.

    most: threads, get_num_threads() by default. The calling thread takes part; a call inside a task runs in the thread of the task.
    The first exception of a task is raised here; items that nobody has begun by then are left undone.
    """
    if getattr(_mine, "busy", False):
        for item in items:
            task(item)
        return
    helpers = min(most or get_num_threads(), len(items)) - 1
    if helpers < 1:
        with blas_alone():
            for item in items:
                task(item)
        return
    todo = iter(items)
    take = threading.Lock()

    def work() -> None:
        _mine.busy = True
        try:
            while True:
                with take:
                    try:
                        item = next(todo)
                    except StopIteration:
                        return
                task(item)
        except BaseException:
            with take:
                for _ in todo:                  # nobody begins another
                    pass
            raise
        finally:
            _mine.busy = False

    with blas_alone():
        waiting = [_submit(work) for _ in range(helpers)]
        try:
            work()
        finally:                                # a helper that another caller keeps busy has not begun; it need not
            begun = [future for future in waiting if not future.cancel()]
            failed = [error for future in begun if (error := future.exception()) is not None]
        if failed:
            raise failed[0]


def in_shares(task: Callable[[Sequence[T]], R], items: Sequence[T], most: int | None = None) -> list[R]:
    """Cut items into one run of neighbours a thread; return task(run) of each, in order, to be added up: always alike."""
    shares = min(most or get_num_threads(), len(items))
    ends = [len(items) * i // shares for i in range(shares + 1)] if shares else []
    results: list[Any] = [None] * shares

    def one(i: int) -> None:
        results[i] = task(items[ends[i]:ends[i + 1]])

    parallel(one, range(shares))
    return results


def _submit(work: Callable[[], None]) -> Future[None]:
    """Give it to a helper, together with the caller's context (np.errstate lives there)."""
    global _pool
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and a single thread needs none

    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), thread_name_prefix="minicnn")
        pool = _pool
        return pool.submit(contextvars.copy_context().run, work)


# ---------------------------------------------------------------- workspaces
def workspace(name: str, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
    """An array of the calling thread's own to scribble in, with whatever was left there; the same memory at the next call.

    Fresh memory costs as much as the arithmetic: the system hands it out a page at a time, zeroed. Use a name once in
    a task: the array is valid until the same thread asks for the same name.
    """
    dtype = np.dtype(dtype)
    size = dtype.itemsize
    for n in shape:
        size *= n
    found = _mine.__dict__.setdefault("workspaces", {})
    memory = found.get(name)
    if memory is None or len(memory) < size:
        memory = found[name] = fresh(size)
    return memory[:size].view(dtype).reshape(shape)


# ---------------------------------------------------------------- the BLAS under NumPy
_holders = 0                                    # how many callers hold the BLAS to one thread at the moment
_held: list[tuple[Any, int]] = []               # each BLAS, and the threads that it had before
_found: list[Any] | None = None


def _blas() -> list[Any]:
    """The BLAS libraries of this process, as threadpoolctl sees them (looked for once: it takes milliseconds)."""
    global _found
    if _found is None:
        _found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return _found


def _set(blas: Any, n: int) -> None:
    """Set the threads of a BLAS. threadpoolctl 3.8 obeys only the first thread that sets any, unless it is told to let go of it."""
    let_go = getattr(blas, "clear_controlling_thread", lambda force: None)
    let_go(force=True)
    blas.set_num_threads(n)
    let_go(force=True)


class blas_alone:       # noqa: N801 (a block: `with blas_alone():`)
    """Inside the block, the BLAS runs on one thread; the last of several callers that ask for it gives it back what it had.

    Every kernel does so for itself. A model's forward and a backward pass do it once for all their kernels: to ask and to tell the
    BLAS takes as long as a small product.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        global _holders, _held
        with _lock:
            if _holders == 0:
                _held = [(blas, n) for blas in _blas() if (n := blas.get_num_threads()) != 1]
                for blas, _ in _held:
                    _set(blas, 1)
            _holders += 1

    def __exit__(self, *error: object) -> None:
        global _holders, _held
        with _lock:
            _holders -= 1
            if _holders == 0:
                for blas, n in _held:
                    if blas.get_num_threads() == 1:         # unless somebody else has set it meanwhile
                        _set(blas, n)
                _held = []


def _after_fork() -> None:
    """A child process has none of its parent's threads; it makes its own."""
    global _pool, _lock, _holders, _held
    _pool, _lock, = None, threading.Lock()
    _mine.busy = False
    if _holders:
        for blas, n in _held:
            _set(blas, n)
    _holders, _held = 0, []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
