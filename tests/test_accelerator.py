"""A training on a GPU, as far as a CPU can tell: batches sent ahead, nobody waits, and words when memory runs out."""
from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import weakref
from unittest import mock

import cushim
import hostcuda
import numpy as np
import pytest

from minicnn import Tensor, accelerator, backend, kernels, models, train
from minicnn.data import ImageSet
from minicnn.train import Config, Trainer

NO_COMPILER = pytest.mark.skipif(cushim.compiler() is None, reason="no g++ to compile the CUDA kernels for the CPU with")


@pytest.fixture
def library():
    return sys.modules["standin_with_cuda"]


@pytest.fixture(params=[pytest.param("cushim", marks=NO_COMPILER), pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    """A device whose memory can be full, and that captures what it is asked for."""
    return request.param


def images(count, size=8, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return ImageSet(pixels, rng.integers(0, 3, count), ["a", "b", "c"], "noise")


def small_resnet(device, size=8):
    return models.resnet.cifar_resnet(8, 3, (3, size, size), dtype=np.float64).to(device)


# ---------------------------------------------------------------- batches sent ahead
@pytest.mark.parametrize("device", ["cpu", "standin", pytest.param("cushim", marks=NO_COMPILER),
                                    pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_batch_arrives_whole_and_in_order(device, count):
    batches = [(np.full((2, 3), i, np.float32), i) for i in range(count)]
    seen = []
    for there, i in accelerator.uploaded_ahead(iter(batches), device):
        assert backend.device_of(there) == device
        seen.append((backend.to_numpy(there).tolist(), i))
    assert seen == [(array.tolist(), i) for array, i in batches]


@NO_COMPILER
def test_a_batch_is_sent_before_the_step_before_it():
    asked = []
    batches = ((asked.append(i) or np.zeros(1), i) for i in range(4))
    for _, i in accelerator.uploaded_ahead(batches, "cushim"):
        assert asked[-1] == min(i + 1, 3)


@NO_COMPILER
def test_a_step_waits_for_its_batch_and_a_copy_for_the_steps_before():
    """The stand-in's second stream copies late, and refuses to copy over what the main one may still be reading."""
    with mock.patch.object(accelerator, "_arrived", lambda computing, array, event, rest: (array, rest)):
        arrays = [backend.to_numpy(a) for a, _ in accelerator.uploaded_ahead([(np.ones(2), 0)], "cushim")]
    assert np.isnan(arrays).all()                           # nobody waited for it
    fresh = mock.patch.object(accelerator, "_second_stream", lambda xp: cushim.Stream())
    unheard = mock.patch.object(cushim.Stream, "wait_event", lambda self, event: None)
    with fresh, unheard, pytest.raises(AssertionError, match="second stream"):
        list(accelerator.uploaded_ahead([(np.ones(2), 0)], "cushim"))


# ---------------------------------------------------------------- a whole training
def fitted(device):
    trainer = Trainer(small_resnet(device), images(16), images(4, seed=1), Config(epochs=2, batch_size=8, lr=0.05))
    trainer.fit()
    return trainer


@NO_COMPILER
def test_a_training_by_the_cuda_kernels_is_that_of_numpy():
    here, there = fitted("cpu"), fitted("cushim")
    for ours, theirs in zip(here.history, there.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)


@NO_COMPILER
def test_steps_never_wait_for_the_device(library):
    """All that a step does, the optimiser and the copy of the next batch included; the host looks behind the epoch."""
    waits = []
    trainer = Trainer(small_resnet("cushim"), images(24), images(4, seed=1), Config(epochs=1, batch_size=8))
    with library.host_syncs() as syncs:
        trainer.fit(on_step=lambda trainer: waits.append(list(syncs)))
    assert len(waits) == 3 and waits[-1] == []
    assert syncs                                            # of the evaluation, and of the epoch's figures


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")       # it misses some: those that the host counts
def test_cupy_waits_for_nothing_in_a_training_step():
    """Behind the first step, which compiles, CuPy refuses to wait; the host's count, where it answers, is of all four."""
    waits = importlib.import_module("hostcuda_runtime").waits if hostcuda.wanted() else lambda: 0
    counts = []

    def look(_):
        counts.append(waits())
        if len(counts) == 1:
            refused.enter_context(importlib.import_module("cupyx").allow_synchronize(False))
        elif len(counts) == 4:
            refused.close()

    with contextlib.ExitStack() as refused:                     # so that a failure does not leave it refused for others
        Trainer(small_resnet("cuda"), images(32), images(4), Config(epochs=1, batch_size=8)).fit(on_step=look)
    assert len(counts) == 4 and counts[0] == counts[3]


@NO_COMPILER
def test_what_is_launched_in_a_step_does_not_grow_with_the_parameters(library):
    """The optimiser is one launch, and tables of addresses that are still true are not sent again."""
    trainer, launched = Trainer(small_resnet("cushim"), images(16), images(4), Config(epochs=1, batch_size=8)), []
    call = cushim.Kernel.__call__
    with mock.patch.object(cushim.Kernel, "__call__", lambda self, *args: launched.append(self.name) or call(self, *args)):
        trainer.fit()
    assert launched.count("sgd") == 2 < launched.count("grad_sums")


# ---------------------------------------------------------------- memory
@contextlib.contextmanager
def little_memory(trainer, size):
    """So many bytes free beside a trainer, and no more. Gives a function: bytes that are in use beyond those that were."""
    pool = backend.array_module(trainer.model.parameters()[0].data).get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    before = pool.used_bytes()
    limit = pool.get_limit()
    pool.set_limit(size=pool.total_bytes() + size)
    try:
        yield lambda: pool.used_bytes() - before
    finally:
        pool.set_limit(size=limit)


@pytest.mark.slow
@pytest.mark.parametrize("body_lr", [1.0, 0.0], ids=["all layers", "the head"])
def test_full_memory_says_what_was_asked_what_is_free_and_which_batch_would_fit(where, body_lr):
    """And it fits, as many held-out images as there are, too."""
    def trainer_of(model, batch_size):
        config = Config(epochs=1, batch_size=batch_size, body_lr=body_lr)
        return train.trainer_of(model, images(64, 16), images(64, 16, seed=1), config)

    trainer = trainer_of(small_resnet(where, 16), 64)
    before = trainer.model.state_dict()
    with little_memory(trainer, 12 << 20) as used:
        with pytest.raises(accelerator.OutOfDeviceMemory) as raised:
            trainer.fit()
        said = str(raised.value)
        assert "Out of memory allocating" in said and "MiB are free" in said and "not 64" in said
        fits = int(said.partition("a batch of ")[2].split()[0])
        assert 4 <= fits < 64
        assert used() < 2 << 20                                 # nothing of the step is held
        for name, p in trainer.model.named_parameters().items():
            np.testing.assert_array_equal(p.numpy(), before[name])
        smaller = trainer_of(trainer.model, fits)
        smaller.fit()                                       # in the same process and the same memory
        assert smaller.epoch == 1
        with pytest.raises(accelerator.OutOfDeviceMemory):  # and the estimate is no guess on the safe side
            trainer_of(trainer.model, int(1.8 * fits)).fit()


def test_where_no_batch_fits_it_says_so(where):
    trainer = Trainer(small_resnet(where, 16), images(16, 16), images(4, 16), Config(epochs=1, batch_size=16))
    with little_memory(trainer, 1 << 18), pytest.raises(accelerator.OutOfDeviceMemory, match="not even a few images at a time"):
        trainer.fit()


@pytest.mark.gpu
def test_more_than_the_device_has():
    """Here the device refuses, and no limit of CuPy's. A step takes 1 MiB an image, and what is said to fit fits."""
    like = backend.to_device(np.zeros(1, np.float32), "cuda")
    xp = backend.array_module(like)
    _, whole = xp.cuda.runtime.memGetInfo()
    with pytest.raises(accelerator.OutOfDeviceMemory, match=f"allocating {whole + 512:,} bytes") as raised, \
            accelerator.told_when_full(like, lambda images: xp.empty(images << 20, np.uint8), 10**9):
        xp.empty(whole + 1, np.uint8)
    free = xp.cuda.runtime.memGetInfo()[0]
    fits = int(str(raised.value).partition("a batch of ")[2].split()[0])
    assert 0.8 * free < fits << 20 <= 0.9 * free
    xp.empty(fits << 20, np.uint8)
    xp.get_default_memory_pool().free_all_blocks()


def test_the_hosts_memory_is_the_hosts():
    def full(*_):
        raise MemoryError("of the host")

    trainer = Trainer(small_resnet("cpu"), images(16), images(8), Config(epochs=1, batch_size=8))
    with mock.patch.object(train.ops, "softmax_cross_entropy", full), pytest.raises(MemoryError, match="of the host") as raised:
        trainer.fit()
    assert type(raised.value) is MemoryError


# ---------------------------------------------------------------- a captured step
def test_a_captured_step_does_the_same_again(where):
    x = backend.to_device(np.arange(6, dtype=np.float32).reshape(2, 3), where)
    total = backend.to_device(np.zeros(3, np.float32), where)
    ran = []

    def step():
        nonlocal total
        ran.append(1)
        y = train.ops.relu(x) * 2.0
        total += y.sum(axis=0)
        y[0] = 7
        return y

    again = accelerator.Captured(step, where)
    assert len(ran) == 3                                    # twice before, once to be captured
    assert backend.to_numpy(total).tolist() == [12, 20, 28]         # which does nothing yet
    for _ in range(2):
        x[...] = x - 4.0
        result = again()
    assert len(ran) == 3 and result is again.result
    assert backend.to_numpy(result).tolist() == [[7, 7, 7], [0, 0, 0]]
    assert backend.to_numpy(total).tolist() == [12, 20, 28 + 2]     # of 5 - 4, once


def test_what_a_captured_step_reads_stays_where_it_is(where):
    """The graph has addresses: of an array that were given back, it would read whatever comes to lie there."""
    def captured():
        x = Tensor(backend.to_device(np.ones(3, np.float32), where))
        return accelerator.Captured(lambda: x.data + x.data, where), weakref.ref(x)

    again, x = captured()
    gc.collect()
    assert x() is not None
    assert backend.to_numpy(again()).tolist() == [2, 2, 2]


def test_what_cannot_be_captured_says_why_and_the_device_goes_on(where):
    x = backend.to_device(np.ones(3, np.float32), where)
    for step in (lambda: float((x * 2).sum()), lambda: x + backend.to_device(np.ones(3, np.float32), where)):
        with pytest.raises(RuntimeError, match="cannot be captured, since it waits for the GPU or sends something to it"):
            accelerator.Captured(step, where)
    assert backend.to_numpy(x + x).tolist() == [2, 2, 2]
    again = accelerator.Captured(lambda: x + x, where)
    x[...] = 3
    assert backend.to_numpy(again()).tolist() == [6, 6, 6]


def test_without_graphs_nothing_is_captured():
    for device in ("cpu", "standin"):
        with pytest.raises(ValueError, match=f'captured on a GPU, and not on "{device}"'):
            accelerator.Captured(lambda: None, device)


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16", "label_smoothing": 0.1}], ids=["fp32", "fp16"])
def test_a_captured_training_is_the_other_one(where, settings):
    """The same bits: history, parameters, statistics and counts; also where it goes on from a checkpoint."""
    def trainer(**more):
        model = models.resnet.cifar_resnet(8, 3, (3, 8, 8)).to(where)
        return Trainer(model, images(32), images(8, seed=1), Config(epochs=2, batch_size=8, lr=0.05, **settings, **more))

    plain, captured, resumed = trainer(), trainer(cuda_graph=True), trainer(cuda_graph=True)
    states, ran = [], []
    plain.fit()
    captured.fit(on_step=lambda t: states.append(t.state_dict()) if t.step == 2 and not t.epoch else None)
    call = type(resumed.model).__call__
    resumed.load_state_dict(states[0])
    with mock.patch.object(type(resumed.model), "__call__", lambda self, *args, **kw: ran.append(1) or call(self, *args, **kw)):
        resumed.fit()
    assert sum(ran) < 3 * 20 and resumed.step == plain.step == 0
    for other in (captured, resumed):
        assert other.history == plain.history
        for name, array in plain.model.state_dict().items():
            np.testing.assert_array_equal(other.model.state_dict()[name], array, err_msg=name)
    assert plain.model.state_dict()["bn1.num_batches_tracked"] == 8


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("between", ["zero_grad", "load", "scaler", "full"])
def test_what_happens_between_captured_steps_is_heard_of(where, between, precision):
    """Gradients that were dropped come again, and of arrays that were exchanged the graph is captured anew."""
    def look(trainer):
        if (trainer.epoch, trainer.step) != (0, 2):
            return
        if between == "zero_grad":
            trainer.optimizer.zero_grad()
        if between == "load":
            trainer.load_state_dict(trainer.state_dict())
            trainer.model.load_state_dict(trainer.model.state_dict())
        if between == "scaler" and trainer.scaler:
            trainer.scaler.load_state_dict({"scale": 2.0 ** 10, "stayed": 0})
        if between == "full":
            with np.errstate(all="ignore"), pytest.raises(accelerator.OutOfDeviceMemory), trainer._full():
                raise MemoryError("full")
            assert trainer._captured is None                # and its memory with it

    histories = []
    for graph in (False, True):
        model = models.resnet.cifar_resnet(8, 3, (3, 8, 8)).to(where)
        config = Config(epochs=2, batch_size=8, lr=0.05, precision=precision, cuda_graph=graph)
        histories.append(Trainer(model, images(32), images(8, seed=1), config).fit(on_step=look))
    assert histories[0] == histories[1]


@NO_COMPILER
def test_a_graph_that_is_let_go_is_freed_at_once():
    """With the memory that its steps took: nobody has to wait for Python's search for cycles."""
    trainer = Trainer(small_resnet("cushim"), images(16), images(4), Config(epochs=1, batch_size=8, cuda_graph=True))
    trainer.fit()
    graph = weakref.ref(trainer._captured)
    gc.disable()
    try:
        trainer._captured = None
        assert graph() is None
    finally:
        gc.enable()


def test_a_captured_training_goes_on_without_a_gpu():
    trainers = [Trainer(small_resnet("cpu"), images(16), images(4), Config(epochs=1, batch_size=8, cuda_graph=g)) for g in (0, 1)]
    assert trainers[0].fit() == trainers[1].fit()


@NO_COMPILER
def test_a_captured_step_is_asked_for_with_one_order(library):
    """Nothing of the model runs on the host any more, and nobody waits."""
    trainer = Trainer(small_resnet("cushim"), images(32), images(4, seed=1), Config(epochs=1, batch_size=8, cuda_graph=True))
    passes, waits = [], []
    call = models.resnet.Sequential.forward
    with mock.patch.object(models.resnet.Sequential, "forward", lambda self, *args: passes.append(1) or call(self, *args)), \
            library.host_syncs() as syncs:
        trainer.fit(on_step=lambda trainer: waits.append((len(passes), list(syncs))))
    assert [seen for _, seen in waits] == [[]] * 4
    assert len({count for count, _ in waits}) == 1          # all of them in the first step: it was captured there


def test_a_captured_training_with_dropout_or_on_the_cpu_is_refused(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = models.build("vgg11", 3, (3, 32, 32), hidden=4, pool=1).to(where)
    with pytest.raises(ValueError, match="cuda_graph: this model has Dropout"):
        Trainer(model, images(8, 32), images(4, 32), Config(epochs=1, batch_size=8, cuda_graph=True))
    with pytest.raises(ValueError, match="cuda_graph captures what a GPU is asked for, and this run is on the CPU"):
        train.begin("digits", device="cpu", cuda_graph=True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- precision
@NO_COMPILER
def test_a_training_multiplies_in_its_own_precision():
    model = models.resnet.cifar_resnet(8, 3, (3, 8, 8)).to("cushim")
    for name, compute in (("fp32", 68), ("tf32", 77)):
        found = []
        cushim.RECORD.clear()
        Trainer(model, images(16), images(4), Config(epochs=1, batch_size=8, precision=name)).fit(
            on_step=lambda _, found=found: found.append({call[0] for call in cushim.RECORD}))
        assert found == [{compute}] * 2 and kernels.precision.get_precision() == "fp32"


def test_a_precision_on_the_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="precision=tf32 is how a GPU computes, and this run is on the CPU"):
        train.begin("digits", device="cpu", precision="tf32")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="precision='half' must be one of fp32, tf32, bf16, fp16"):
        Config(precision="half")
