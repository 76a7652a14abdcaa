"""Memory that is used again: arrays as good as NumPy's, nobody's memory twice, and all of it free when its arrays are gone."""
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import minicnn as mc
from minicnn import memory, ops
from minicnn.memory import ALIGNMENT, SMALLEST, empty, in_stock, release
from minicnn.threads import workspace

WAIT = 30           # seconds after which a test that hangs has failed
LARGE = SMALLEST // 4           # float32 numbers that are pooled


def rounded(array):
    """The bytes that an array takes of a piece."""
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT


@pytest.fixture(autouse=True)
def a_stock_of_its_own():
    """No test meets memory that another has left, nor leaves any."""
    gc.collect()
    with mock.patch.object(memory, "_pieces", []):
        yield


# ---------------------------------------------------------------- arrays
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, bool, "f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7,), [2, 3], (SMALLEST // 8 + 1,), (300, 301, 3),
                                   (2, 3, 128, 1, 400)], ids=str)
def test_an_array_like_any_other(shape, dtype):
    a = empty(shape, dtype)
    assert (type(a), a.shape, a.dtype) == (np.ndarray, tuple(shape), np.dtype(dtype))
    assert a.flags.c_contiguous and a.flags.writeable and a.flags.aligned
    a[...] = 1
    assert a.sum() == a.size
    if a.nbytes >= SMALLEST:
        assert a.ctypes.data % ALIGNMENT == 0


def test_small_arrays_are_numpys_own():
    a = empty((SMALLEST // 4 - 1,), np.float32)
    a[...] = 1
    assert memory._pieces == []


@pytest.mark.parametrize("size", [1, 63, 64, 1000, SMALLEST - 1])
def test_every_array_begins_with_a_line_of_the_cache(size):
    """Several at a time: one alone may lie well by chance."""
    held = [empty((size,), np.uint8) for _ in range(8)]
    assert [a.ctypes.data % 64 for a in held] == [0] * 8
    assert all(a.nbytes == size and a.flags.writeable for a in held)
    with ThreadPoolExecutor(1) as other:                # a thread that has no workspace yet
        lines = other.submit(lambda: [workspace(f"{size} {i}", (size,), np.uint8).ctypes.data % 64 for i in range(8)])
        assert lines.result() == [0] * 8


# ---------------------------------------------------------------- when memory is free again
def test_memory_is_used_again_when_its_array_is_gone():
    a = empty((LARGE,), np.float32)
    at = a.ctypes.data
    assert in_stock() == 0
    del a
    assert in_stock() == SMALLEST
    assert empty((LARGE // 2,), np.float64).ctypes.data == at


def numbers(view):
    return view.data if isinstance(view, mc.Tensor) else np.asarray(view)


@pytest.mark.parametrize("view", [
    lambda a: a[5:9], lambda a: a.reshape(-1, 2).T, lambda a: a.view(np.uint8)[:1], lambda a: a[::-3][2:], lambda a: np.asarray(a),
    lambda a: a[None, ..., 0], lambda a: memoryview(a), lambda a: mc.Tensor(a).reshape(-1, 4),
    lambda a: np.broadcast_to(a, (3, LARGE)),
    lambda a: np.lib.stride_tricks.sliding_window_view(a, 3), lambda a: np.frombuffer(a, np.float32)])
def test_the_last_view_keeps_the_memory(view):
    a = empty((LARGE,), np.float32)
    a[...] = np.pi
    kept = view(a)
    del a
    gc.collect()
    assert in_stock() == 0
    before = numbers(kept).copy()
    other = empty((LARGE,), np.float32)
    other[...] = np.e
    np.testing.assert_array_equal(numbers(kept), before)
    assert not np.shares_memory(numbers(kept), other)
    del kept, other
    gc.collect()
    release()
    assert memory._pieces == []


def test_the_tightest_run_that_is_large_enough():
    a, hold, b = empty((8 * LARGE,), np.float32), empty((LARGE,), np.float32), empty((2 * LARGE,), np.float32)
    small, large = b.ctypes.data, a.ctypes.data
    del a, b
    first, second = empty((2 * LARGE,), np.float32), empty((2 * LARGE,), np.float32)
    assert (first.ctypes.data, second.ctypes.data) == (small, large)
    assert in_stock() == 6 * SMALLEST
    assert hold.size == LARGE


def test_runs_that_meet_become_one_again():
    whole = empty((4 * LARGE,), np.float32)
    at = whole.ctypes.data
    del whole
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 2, 0], [0, 2, 1, 3]):
        parts = [empty((LARGE,), np.float32) for _ in range(4)]
        assert len(memory._pieces) == 1 and in_stock() == 0
        for i in order:
            parts[i] = None
        assert in_stock() == 4 * SMALLEST
        assert [piece.free for piece in memory._pieces] == [{0: 4 * SMALLEST}]
    assert empty((4 * LARGE,), np.float32).ctypes.data == at


def test_growing_arrays_do_not_pile_up():
    """Where nothing fits, as much goes back to the system as comes from it."""
    for size in range(1, 30):
        empty((size * LARGE,), np.float32)
        assert in_stock() == size * SMALLEST


def test_release_gives_back_whole_pieces_and_leaves_what_is_in_use():
    kept, gone = empty((LARGE,), np.float32), empty((3 * LARGE,), np.float32)
    kept[...] = 7
    del gone
    assert in_stock() == 3 * SMALLEST
    release()
    assert in_stock() == 0
    assert len(memory._pieces) == 1
    assert (kept == 7).all()
    del kept
    assert in_stock() == SMALLEST
    release()
    release()
    assert (in_stock(), memory._pieces) == (0, [])


# ---------------------------------------------------------------- nobody's memory twice
def walk(rng, steps, tag, limit=12):
    """Take and let go of arrays at random, each filled with a number of its own; all must keep theirs."""
    live = {}
    for step in range(steps):
        if live and (len(live) > limit or rng.random() < 0.45):
            number = list(live)[int(rng.integers(len(live)))]
            assert (live.pop(number) == number).all(), "another array's number"
        else:
            a = empty((int(rng.integers(SMALLEST // 8, SMALLEST)),), np.float64)
            number = tag + step
            a[...] = number
            live[number] = a[:: int(rng.integers(1, 3))] if rng.random() < 0.5 else a
        if rng.random() < 0.05:
            release()
    return live


def all_is_free():
    return in_stock() == sum(piece.size for piece in memory._pieces) and all(piece.unused for piece in memory._pieces)


def check_stock(live):
    """Every piece is made of its free runs, none of which touch, and of what is in use, without overlap."""
    in_stock()
    in_use = sorted((a.__array_interface__["data"][0], a) for a in live.values())
    for (_, a), (_, b) in zip(in_use, in_use[1:], strict=False):
        assert not np.may_share_memory(a, b)
    for piece in memory._pieces:
        runs = sorted(piece.free.items())
        assert all(0 <= start < end <= piece.size and start % ALIGNMENT == end % ALIGNMENT == 0 for start, end in runs)
        assert all(end < start for (_, end), (start, _) in zip(runs, runs[1:], strict=False))
        start = piece.memory.ctypes.data
        for begin, end in runs:
            free = piece.memory[begin:end]
            assert not any(np.may_share_memory(free, a) for at, a in in_use if start <= at < start + piece.size)


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_no_two_live_arrays_share_memory(seed):
    live = walk(np.random.default_rng(seed), 60, 0)
    check_stock(live)
    assert all((a == number).all() for number, a in live.items())
    live.clear()
    assert all_is_free()
    release()
    assert memory._pieces == []


def test_several_threads_at_once():
    errors, results = [], []

    def run(i):
        try:
            results.append(walk(np.random.default_rng(i), 300, 1000 * (i + 1)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert errors == [] and len(results) == 4
    live = {number: a for part in results for number, a in part.items()}
    check_stock(live)
    assert all((a == number).all() for number, a in live.items())
    live.clear()
    results.clear()
    assert all_is_free()


# ---------------------------------------------------------------- beside the garbage collector
def cycle_with(array):
    """Garbage that reference counting does not find: the array goes when the collector comes by."""
    ring = [array]
    ring.append(ring)


def test_an_array_may_go_while_the_lock_is_held():
    def run():
        a = empty((LARGE,), np.float32)
        with memory._lock:
            del a
        ended.append(in_stock())

    ended = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert ended == [SMALLEST]


@pytest.mark.slow
def test_the_collector_may_come_by_at_any_line():
    """After one, two, three ... more objects, so also while a run is searched for or taken."""
    empty((40 * LARGE,), np.float32)                        # one piece of memory for all of them
    kept = [empty((LARGE,), np.float32) for _ in range(40)]
    assert len(memory._pieces) == 1
    for i in range(0, 40, 2):
        kept[i] = None                                      # free runs to search, with something in use between them
    before = gc.get_threshold()
    try:
        for i in range(1, 40, 2):
            gc.collect()
            gc.disable()
            cycle_with(kept[i])
            kept[i] = None
            gc.set_threshold(i // 2 + 1)
            gc.enable()
            kept[i] = empty((LARGE,), np.float32)
    finally:
        gc.enable()
        gc.set_threshold(*before)
    gc.collect()
    check_stock({i: a for i, a in enumerate(kept) if a is not None})


# ---------------------------------------------------------------- in the engine
def test_a_training_step_takes_the_memory_of_the_step_before(threads):
    """Nothing of a step stays in use, and the steps after the first do not ask the system for as much again."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8, 16, 32, 32)).astype(np.float32), rng.standard_normal((16, 16, 3, 3)).astype(np.float32)

    def step():
        w = mc.Tensor(weight, requires_grad=True)
        y = ops.relu(ops.conv2d(ops.conv2d_relu(x, w, padding=1), w, padding=1))
        y.sum().backward()
        return w.grad.numpy().copy()

    first = step()
    gc.collect()
    pieces = list(memory._pieces)
    assert pieces and all_is_free()
    for _ in range(3):
        np.testing.assert_array_equal(step(), first)
        gc.collect()
        assert all_is_free()
        if threads == 1:                    # several may take their memory in another order, and need a little more
            assert memory._pieces == pieces
        assert in_stock() < 2 * sum(piece.size for piece in pieces)
