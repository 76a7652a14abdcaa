"""Work that is done before it is asked for, on threads of its own; and how far long work has come."""
from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from minicnn.threads import cores

T = TypeVar("T")
R = TypeVar("R")

WAITING = 2         # results that may lie ready, beside those that are being made


def ahead(make: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """make(item) of each item, in their order, made by so many threads (by default one a core) before they are asked for.

    No more than workers + 2 are under way or ready, so that memory stays bounded. What make raises is raised in its place in the
    order. Threads gain where make lets go of Python's lock, as Pillow's decoders do.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and data in memory need none

    workers = workers or cores()
    with ThreadPoolExecutor(workers, thread_name_prefix="minicnn-ahead") as pool:
        under_way: deque[Any] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(make, item))
                if len(under_way) == workers + WAITING:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:                        # nobody wants them any more
                future.cancel()


def shown(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that counts them while they pass; only on a terminal, where tqdm is installed."""
    if sys.stderr is None or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return iter(items)
    bar: Iterator[T] = iter(importlib.import_module("tqdm").tqdm(items, what, total, leave=False, dynamic_ncols=True))
    return bar
