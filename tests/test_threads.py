"""Sharing work out over threads: who runs what, errors, the BLAS below, other threads of Python, and processes that fork."""
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl

import minicnn as mc
from minicnn import ops
from minicnn.threads import _blas, cores, in_shares, parallel, workspace

WAIT = 30       # seconds after which a test that hangs has failed


@pytest.fixture
def two_threads():
    before = mc.get_num_threads()
    mc.set_num_threads(2)
    yield
    mc.set_num_threads(before)


def conv(x, weight):
    return ops.conv2d(x, weight, padding=1)


def images(n=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 8, 12, 12)).astype(np.float32), rng.standard_normal((8, 8, 3, 3)).astype(np.float32)


def all_at_once(tasks):
    """Run each in a thread of its own, begun together; the first error is raised here."""
    begin, errors = threading.Barrier(len(tasks)), []

    def run(task):
        try:
            begin.wait(WAIT)
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


# ---------------------------------------------------------------- how many
def test_set_and_get(two_threads):
    for n in (1, 5, np.int64(3)):
        mc.set_num_threads(n)
        assert mc.get_num_threads() == n
        assert type(mc.get_num_threads()) is int


@pytest.mark.parametrize("n", [0, -1, 1.0, 2.5, "2", None, True, [2]])
def test_what_is_no_number_of_threads_is_refused_and_changes_nothing(n, two_threads):
    with pytest.raises(ValueError, match="at least 1") as error:
        mc.set_num_threads(n)
    assert repr(n) in str(error.value)
    assert mc.get_num_threads() == 2


def python(code, **environment):
    """What a new process prints that has one of these variables set and no other limit of threads."""
    limits = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in limits} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_by_default_as_many_as_the_blas_may_have_and_at_most_one_a_core(n):
    found = int(python("import minicnn; print(minicnn.get_num_threads())", OMP_NUM_THREADS=str(n)))
    assert found == min(n, cores())


# ---------------------------------------------------------------- who runs what
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_item_is_run_once(threads, count):
    done = []
    parallel(done.append, range(count))
    assert sorted(done) == list(range(count))


def test_as_many_threads_as_were_asked_for_and_the_caller_among_them(threads):
    meet, who = threading.Barrier(threads), []

    def task(_):
        meet.wait(WAIT)                                     # nobody goes on before all of them have an item
        who.append(threading.get_ident())

    parallel(task, range(threads))
    assert len(set(who)) == threads
    assert threading.get_ident() in who


def test_a_call_inside_a_task_runs_in_the_tasks_thread(threads):
    outer, inner = {}, []

    def task(i):
        outer[i] = threading.get_ident()
        parallel(lambda j: inner.append((i, threading.get_ident())), range(5))

    parallel(task, range(6))
    assert sorted(i for i, _ in inner) == sorted([*range(6)] * 5)
    assert all(thread == outer[i] for i, thread in inner)


def test_shares_are_runs_of_neighbours_and_always_the_same(threads):
    for count in (0, 1, 2, 3, 10, 11):
        shares = in_shares(list, range(count))
        assert [i for share in shares for i in share] == list(range(count))
        assert len(shares) == min(threads, count)
        assert all(max(map(len, shares)) - len(share) <= 1 for share in shares)
        for _ in range(5):
            assert in_shares(lambda share: time.sleep(len(share) % 2 * 1e-3) or list(share), range(count)) == shares


def test_nothing_runs_on_after_the_call(two_threads):
    """What a helper has begun is waited for, also when the caller's own part has failed."""
    meet, ended = threading.Barrier(2), []

    def task(i):
        meet.wait(WAIT)
        if threading.current_thread() is threading.main_thread():
            raise KeyError("mine")
        time.sleep(0.05)
        ended.append(i)

    with pytest.raises(KeyError, match="mine"):
        parallel(task, range(2))
    assert len(ended) == 1


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_reaches_the_caller_and_the_threads_go_on_working(two_threads, where):
    meet, done = threading.Barrier(2), []

    def task(i):
        if i < 2:
            meet.wait(WAIT)
            if (threading.current_thread() is threading.main_thread()) == (where == "caller"):
                raise ZeroDivisionError(f"in the {where}")
        else:
            time.sleep(1e-3)
        done.append(i)

    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        parallel(task, range(2000))
    assert len(done) < 1000                                 # the others were not begun
    done.clear()
    parallel(done.append, range(20))
    assert sorted(done) == list(range(20))


def test_errors_of_shares_and_of_calls_inside_tasks(threads):
    def fails(i):
        raise KeyError(i)
    with pytest.raises(KeyError):
        in_shares(fails, range(5))
    with pytest.raises(KeyError):
        parallel(lambda i: parallel(fails, range(3)), range(5))
    met = threading.Barrier(threads)
    parallel(lambda _: met.wait(WAIT), range(threads))      # all are there, and none of them thinks that it is busy


# ---------------------------------------------------------------- the BLAS below
def blas_threads():
    """Of the BLAS libraries that the engine found when it first looked; one that came later is not NumPy's, and not held."""
    return [blas.get_num_threads() for blas in _blas()]


def give_blas(n):
    """Set the BLAS to n threads and leave nobody in charge: threadpoolctl 3.8 listens to the first thread alone."""
    for blas in threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers:
        let_go = getattr(blas, "clear_controlling_thread", lambda force: None)
        let_go(force=True)
        blas.set_num_threads(n)
        let_go(force=True)
    assert set(blas_threads()) == {n}


@pytest.fixture
def two_in_the_blas():
    """[2] or so, as before the test is over."""
    before = max(blas_threads())
    give_blas(2)
    yield blas_threads()
    give_blas(before)


def test_the_blas_is_held_to_one_thread_and_gets_back_what_it_had(threads, two_in_the_blas):
    seen = []
    parallel(lambda _: seen.append(blas_threads()), range(4))
    assert blas_threads() == two_in_the_blas
    with pytest.raises(ZeroDivisionError):
        parallel(lambda i: 1 / i, range(4))
    assert blas_threads() == two_in_the_blas
    parallel(lambda i: parallel(lambda j: seen.append(blas_threads()), range(2)), range(2))
    assert blas_threads() == two_in_the_blas
    assert seen == [[1] * len(two_in_the_blas)] * 8


def test_a_model_holds_the_blas_once_for_all_its_layers(threads, two_in_the_blas):
    """Between its kernels, too: what a layer of the user's own multiplies wakes no threads that fight the next layer's."""
    class Looking(mc.layers.Layer):
        def forward(self, x, train, rng):
            seen.append(blas_threads())
            return x

    seen = []
    model = mc.layers.Sequential([Looking(), [Looking()], mc.layers.Residual([Looking()])], in_shape=(3,))
    model(np.ones((2, 3), np.float32))
    assert blas_threads() == two_in_the_blas
    assert seen == [[1] * len(two_in_the_blas)] * 3
    with pytest.raises(ValueError, match="axes"):
        model(np.ones(3, np.float32))
    assert blas_threads() == two_in_the_blas


def test_the_blas_is_held_for_any_thread_of_python(two_threads, two_in_the_blas):
    seen = []
    for _ in range(2):
        all_at_once([lambda: parallel(lambda _: seen.append(blas_threads()), range(1))])
        parallel(lambda _: seen.append(blas_threads()), range(1))
        assert blas_threads() == two_in_the_blas
    assert seen == [[1] * len(two_in_the_blas)] * 4


def test_the_last_of_several_callers_gives_it_back(two_threads, two_in_the_blas):
    """Two threads of Python whose calls overlap: the first that is done leaves the other's limit alone."""
    first_is_in, second_is_in, first_is_done, second_is_done = (threading.Event() for _ in range(4))
    seen = []

    def first():
        def task(_):
            first_is_in.set()
            assert second_is_in.wait(WAIT)
        parallel(task, range(1))
        first_is_done.set()
        assert second_is_done.wait(WAIT)

    def second():
        def task(_):
            second_is_in.set()
            assert first_is_done.wait(WAIT)
            seen.append(blas_threads())
        assert first_is_in.wait(WAIT)
        parallel(task, range(1))
        seen.append(blas_threads())
        second_is_done.set()

    all_at_once([first, second])
    assert seen == [[1] * len(two_in_the_blas), two_in_the_blas]


def test_who_sets_the_blas_meanwhile_is_not_overruled(threads, two_in_the_blas):
    parallel(lambda _: give_blas(3), range(1))
    assert set(blas_threads()) == {3}


def test_afterwards_anybody_may_limit_the_blas(two_threads, two_in_the_blas):
    """A convolution in one thread takes no other thread's threadpoolctl away."""
    done, limited = threading.Event(), []

    def first():
        parallel(lambda _: None, range(2))
        done.set()
        time.sleep(0.05)                                    # still there, though it computes no longer

    def second():
        assert done.wait(WAIT)
        with threadpoolctl.threadpool_limits(1, "blas"):
            limited.extend(blas_threads())

    all_at_once([first, second])
    assert set(limited) == {1}
    assert blas_threads() == two_in_the_blas


# ---------------------------------------------------------------- NumPy's settings, and workspaces
@pytest.mark.parametrize("divide", ["raise", "ignore", "warn"])
def test_numpys_error_state_is_the_callers_in_every_thread(threads, divide):
    meet, seen = threading.Barrier(threads), []

    def task(_):
        meet.wait(WAIT)
        seen.append(np.geterr()["divide"])

    with np.errstate(divide=divide):
        parallel(task, range(threads))
    assert seen == [divide] * threads


def test_the_algorithm_of_a_block_is_known_in_every_thread(threads):
    from minicnn.kernels.algorithms import _wish
    meet, seen = threading.Barrier(threads), []

    def task(_):
        meet.wait(WAIT)
        seen.append(_wish.get())

    with mc.algorithm("direct"):
        parallel(task, range(threads))
    assert seen == ["direct"] * threads


def test_a_workspace_is_the_same_memory_at_the_next_call_and_each_threads_own():
    a = workspace("test", (3, 4), np.float32)
    assert (a.shape, a.dtype, a.flags.c_contiguous, a.flags.writeable) == ((3, 4), np.float32, True, True)
    b = workspace("test", (2, 2), np.float64)
    assert b.dtype == np.float64 and np.shares_memory(a, b)
    assert not np.shares_memory(a, workspace("test, another", (3, 4), np.float32))
    larger = workspace("test", (100,), np.float32)
    assert larger.shape == (100,)
    assert np.shares_memory(larger, workspace("test", (0, 5), np.float32)) is False
    assert np.shares_memory(larger, workspace("test", (50,), np.float64))
    others = []
    all_at_once([lambda: others.append(workspace("test", (100,), np.float32))] * 2)
    assert not any(np.shares_memory(p, q) for p, q in ((larger, others[0]), (larger, others[1]), others))


# ---------------------------------------------------------------- several threads of Python, and fork
def test_several_threads_of_python_convolve_at_once(threads):
    """They share the helpers, and each gets its own numbers."""
    given = [images(seed=i) for i in range(4)]
    expected = [conv(*arrays) for arrays in given]

    def repeatedly(arrays, right):
        for _ in range(10):
            np.testing.assert_array_equal(conv(*arrays), right)

    all_at_once([lambda i=i: repeatedly(given[i], expected[i]) for i in range(4)])


def test_the_number_of_threads_may_change_while_others_work(two_threads):
    x, weight = images()
    expected, stop = conv(x, weight), threading.Event()

    def work():
        while not stop.is_set():
            np.testing.assert_allclose(conv(x, weight), expected, rtol=1e-4, atol=1e-4)

    def change():
        try:
            for i in range(60):
                mc.set_num_threads(1 + i % 3)
                time.sleep(1e-3)
        finally:
            stop.set()

    all_at_once([work, work, change])


FORK = """
import multiprocessing, os, sys, threading, warnings
import numpy as np
import minicnn as mc
from minicnn import memory, threads
warnings.simplefilter("ignore")

mc.set_num_threads(2)
rng = np.random.default_rng(0)
x, w = rng.standard_normal((8, 16, 24, 24)).astype(np.float32), rng.standard_normal((16, 16, 3, 3)).astype(np.float32)

def step():
    y = mc.ops.conv2d(x, w, padding=1)
    return [y, mc.ops.conv2d_weight_grad(x, y, (3, 3), padding=1)]

expected = step()                                   # the parent has a pool, helpers and workspaces now

def right():
    return all(np.array_equal(a, b) for a, b in zip(step(), expected)) and mc.get_num_threads() == 2

def child(results):
    results.put(right())

def forked(begin):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if begin() else 1)
    return os.waitpid(pid, 0)[1] == 0

context = multiprocessing.get_context("fork")
results = context.Queue()
process = context.Process(target=child, args=(results,))
process.start()
print("a child of multiprocessing", results.get(timeout=20))
process.join()

meet, inside = threading.Barrier(2), []
def task(_):
    meet.wait()
    if threading.current_thread() is threading.main_thread():
        inside.append(forked(right))
threads.parallel(task, range(2))
print("a child made inside a task", inside[0])

def hold(lock):
    with lock:
        held.set()
        release.wait()
for name, lock in (("memory", memory._lock), ("threads", threads._lock)):
    held, release = threading.Event(), threading.Event()
    holder = threading.Thread(target=hold, args=(lock,))
    holder.start()
    held.wait()
    ok = forked(right)
    release.set()
    holder.join()
    print("a child made while another thread holds the lock of", name, ok)
print("the parent afterwards", right())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this system")
def test_a_forked_child_computes_with_threads_of_its_own():
    lines = python(FORK, OMP_NUM_THREADS="2").splitlines()
    assert len(lines) == 5
    assert [line for line in lines if not line.endswith(" True")] == []
