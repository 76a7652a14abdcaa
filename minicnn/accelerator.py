"""What a training on a GPU needs besides kernels: batches that are there before their step, a step that is asked for with one
order, and words when memory runs out."""
from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from minicnn.backend import Array, array_module, device_of, library_of, to_device

Rest = TypeVar("Rest")
Result = TypeVar("Result")

SHARE = 0.9                     # of what is free, for a step: the optimiser keeps arrays, too, and the next batch waits


def uploaded_ahead(batches: Iterable[tuple[np.ndarray[Any, Any], Rest]], device: str) -> Iterator[tuple[Array, Rest]]:
    """The batches with their arrays on the device, each sent while the step before it computes.

    A GPU works through a stream of orders; copies ordered on a second stream go on beside it. Two things are awaited, by the
    streams and never by the host: a step begins when its batch has arrived; and a copy, which may be given the memory of a batch
    that is done with, begins when the steps that were ordered before it have ended. On a device without streams each batch is sent
    when it is its turn.
    """
    xp = library_of(device)
    if not hasattr(xp, "RawModule"):
        for array, rest in batches:
            yield to_device(array, device), rest
        return
    computing, copying = xp.cuda.get_current_stream(), _second_stream(xp)
    waiting: list[tuple[Array, Any, Rest]] = []
    for array, rest in batches:
        copying.wait_event(computing.record())
        with copying:                       # by way of pinned memory, so that the host need not wait
            waiting.append((xp.asarray(array), copying.record(), rest))
        if len(waiting) == 2:
            yield _arrived(computing, *waiting.pop(0))
    while waiting:
        yield _arrived(computing, *waiting.pop(0))


@functools.cache
def _second_stream(xp: Any) -> Any:
    """One for all: memory that was used on a stream is used again on it alone."""
    return xp.cuda.Stream(non_blocking=True)


def _arrived(computing: Any, array: Array, event: Any, rest: Rest) -> tuple[Array, Rest]:
    computing.wait_event(event)
    return array, rest


class Captured(Generic[Result]):
    """What a step asks of a GPU, captured once as a CUDA graph: calling this asks for all of it again, with one order.

    A small model's kernels take less time than Python takes to ask for them one after the other.

    step: what is captured, Python's part of which runs here and never again. So it reads arrays that stay where they are, and are
    filled before each call; what it makes lies, from call to call, in the arrays of `result`, what it returned. It must not wait
    for the device, nor send it anything: neither labels from the host nor a dropout's mask. It runs twice before it is captured,
    so that all is compiled, and what it moves has moved. The graph knows arrays by their addresses: the step is kept, and so are
    those that it names; where one behind an attribute is replaced, as a model's by `load_state_dict`, capture anew.
    Raises RuntimeError where the step cannot be captured; ValueError on a device without graphs.
    Source: NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs".
    """

    def __init__(self, step: Callable[[], Result], device: str) -> None:
        xp = library_of(device)
        if not hasattr(xp, "RawModule"):
            raise ValueError(f'a step is captured on a GPU, and not on "{device}"')
        self._step = step
        self._xp, self._stream, self._pool = xp, xp.cuda.Stream(non_blocking=True), xp.cuda.MemoryPool()
        with self._in_turn(), self._stream, xp.cuda.using_allocator(self._pool.malloc):     # kept for the graph, address by address
            for _ in range(2):
                step()
            self._stream.begin_capture()
            try:
                self.result = step()
            except BaseException as error:
                with contextlib.suppress(Exception):        # the capture is broken: end it, so that the stream can be left
                    self._stream.end_capture()
                if not isinstance(error, Exception) or isinstance(error, MemoryError):
                    raise
                raise RuntimeError(f"this step cannot be captured, since it waits for the GPU or sends something to it ({error})"
                                   ) from error
            self._graph = self._stream.end_capture()

    def __call__(self) -> Result:
        """Ask for the step again."""
        with self._in_turn():
            self._graph.launch(self._stream)
        return self.result

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """What the graph's stream is asked for inside comes behind what the computing one was, and before what that will be."""
        computing = self._xp.cuda.get_current_stream()
        self._stream.wait_event(computing.record())
        try:
            yield
        finally:
            computing.wait_event(self._stream.record())


class OutOfDeviceMemory(MemoryError):
    """A GPU's memory did not suffice. The message says what was asked for, what was free, and which batch would fit."""


@contextlib.contextmanager
def told_when_full(like: Array, step: Callable[[int], object], batch_size: int) -> Iterator[None]:
    """Turn an error of the device's memory into one that says what to do; the process and the memory stay usable.

    like: an array on the device, such as a parameter; on the CPU nothing happens.
    step: makes a step with so many images and leaves nothing behind; some of them find out which batch would fit.
    Raises OutOfDeviceMemory.
    """
    try:
        yield
    except MemoryError as error:
        xp = array_module(like)
        if device_of(like) == "cpu" or not hasattr(xp, "get_default_memory_pool"):
            raise
        said = str(error).rstrip(".")
        traceback.clear_frames(error.__traceback__)         # they hold the step's arrays
    else:
        return
    free, whole = _free_and_whole(xp)
    fits = _fitting(xp, step, int(SHARE * free), batch_size)
    raise OutOfDeviceMemory(
        f"the GPU's memory is full: {said}. With nothing under way, {_size(free)} of its {_size(whole)} are free; "
        + (f"a batch of {fits} would fit, not {batch_size}" if fits else
           "not even a few images at a time fit: a smaller model or smaller images would"))


def _fitting(xp: Any, step: Callable[[int], object], limit: int, batch_size: int) -> int:
    """How many images fit into so many bytes, to a tenth, found by halving; 0 where not even two do.

    It is tried, not computed: what is free does not lie in one piece, so a step's memory does not grow evenly with its images.
    """
    fits, too_many = 0, batch_size
    while too_many > 2 and too_many - fits > max(1, fits // 10):
        images = max(2, (fits + too_many) // 2)
        if _fit(xp, step, images, limit):
            fits = images
        else:
            too_many = images
    return fits


def _fit(xp: Any, step: Callable[[int], object], images: int, limit: int) -> bool:
    """Whether a step with so many images gets by with so many bytes: in a pool of its own, which may take no more."""
    pool = xp.cuda.MemoryPool()
    pool.set_limit(size=max(limit, 1))              # 0 would be none
    try:
        with xp.cuda.using_allocator(pool.malloc):
            for _ in range(2):                      # the second begins with what the first has left, in its pieces
                step(images)
    except MemoryError:
        return False
    finally:
        pool.free_all_blocks()
    return True


def _free_and_whole(xp: Any) -> tuple[int, int]:
    """Bytes of the device's memory; of what CuPy may take of it, where that is less (CUPY_GPU_MEMORY_LIMIT)."""
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    free, whole = xp.cuda.runtime.memGetInfo()
    limit = pool.get_limit()
    return (min(free, limit - pool.used_bytes()), min(whole, limit)) if limit else (free, whole)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
