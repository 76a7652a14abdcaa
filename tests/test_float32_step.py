"""A whole float32 training step makes no float64 array, not even one that is gone at the end of a line.

Looking at results cannot show that: an array that was widened and narrowed again leaves no trace but its cost. So the arrays
of the step are of a subclass of NumPy's (`Watched`) that NumPy tells about every array it makes of them, whether by an
operator, a function, a method or a slice. What the engine makes from nothing (np.zeros, a random draw) is turned into one.
The tests at the end plant such arrays and see each one found.
"""
import contextlib
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import standin

import minicnn as mc
from minicnn import models, ops
from minicnn.autograd import Tensor
from minicnn.optim import SGD, AdamW, Optimizer

MAKERS = ("zeros", "ones", "empty", "full", "arange", "array", "asarray", "ascontiguousarray", "zeros_like", "ones_like",
          "empty_like", "full_like", "concatenate", "stack", "where", "broadcast_to", "eye", "linspace", "frombuffer", "fromiter")
LIBRARIES = (str(Path(np.__file__).parent), standin.__file__)
THIS_WATCH = {"note", "watched", "__array_finalize__", "__array_function__", "watching_call", "watching_init", "random",
              "standard_normal"}

_found = []
_watching = False


def note(array):
    """Remember the line that made an array wider than float32: the innermost that is not NumPy's, the stand-in's or the watch's.

    Numbers (no dimension) pass: NumPy itself divides float32 sums by int64 counts, and a float64 that meets an array shows there.
    """
    if _watching and array.ndim and array.dtype.kind in "fc" and array.dtype.itemsize > 4:
        line = [frame for frame in traceback.extract_stack()
                if not frame.filename.startswith(LIBRARIES) and frame.name not in THIS_WATCH][-1]
        _found.append(f"{Path(line.filename).name}, {line.name}: {line.line}")


class Watched(np.ndarray):
    """An array that NumPy reports every descendant of."""

    def __array_finalize__(self, parent):
        note(self)

    def __array_function__(self, function, types, args, kwargs):
        """Functions such as np.pad make plain arrays inside; what comes out is watched again."""
        return watched(super().__array_function__(function, types, args, kwargs))


def watched(value):
    if isinstance(value, np.ndarray) and type(value) is np.ndarray:
        return value.view(Watched)
    return type(value)(map(watched, value)) if type(value) in (list, tuple) else value


class WatchedRandom(np.random.Generator):
    """A Generator whose draws are watched."""

    def random(self, *args, **kwargs):
        return watched(super().random(*args, **kwargs))

    def standard_normal(self, *args, **kwargs):
        return watched(super().standard_normal(*args, **kwargs))


@contextlib.contextmanager
def float64_arrays(monkeypatch):
    """Collect the lines that make a float64 array inside the block, on NumPy and on the stand-in for CuPy."""
    global _watching

    def watching(make):
        def watching_call(*args, **kwargs):
            value = make(*args, **kwargs)
            return value if sys._getframe(1).f_code.co_filename.startswith(LIBRARIES) else watched(value)
        return watching_call

    init = standin.ndarray.__init__

    def watching_init(self, host):
        init(self, host)
        note(host)

    with monkeypatch.context() as patch:
        for name in MAKERS:
            patch.setattr(np, name, watching(getattr(np, name)))
        patch.setattr(standin.ndarray, "__init__", watching_init)
        _found.clear()
        _watching = True
        try:
            yield _found
        finally:
            _watching = False


def step(model, make_optimizer, monkeypatch, put=watched, planted=contextlib.nullcontext()):
    """Two training steps and an inference of a model in float32; the lines that made float64 arrays."""
    rng, n = np.random.default_rng(0), 4
    x, y = rng.standard_normal((n, *model.in_shape)).astype(np.float32), rng.integers(0, model.out_shape[0], n)
    for _, layer in model.walk():
        for name, value in layer._own((*layer.parameter_names, *layer.buffer_names)).items():
            if isinstance(value, Tensor):
                value.data = watched(value.data)
            else:
                setattr(layer, name, watched(value))
    schedule = mc.optim.warmup(mc.optim.cosine_schedule(np.float64(0.1), 10), 2)
    with float64_arrays(monkeypatch) as found, planted:
        optimizer = make_optimizer(model.parameters())
        for i in range(2):
            optimizer.lr = schedule(i)
            optimizer.zero_grad()
            logits = model(put(x), train=True, rng=WatchedRandom(np.random.PCG64(0)))
            ops.cross_entropy(logits, y, label_smoothing=0.1).backward()
            optimizer.step()
        with mc.no_grad():
            ops.softmax(model(put(x)))
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    return sorted(set(found))


def sgd(params):
    return SGD(params, np.float64(0.1), momentum=np.float64(0.9), weight_decay=np.float64(5e-4), nesterov=True)


def adamw(params):
    return AdamW(params, np.float64(1e-3), betas=(np.float64(0.9), np.float64(0.999)), weight_decay=np.float64(0.01))


MODELS = {"resnet20, option A": lambda: models.resnet20(10, (3, 16, 16)),
          "resnet20, option B": lambda: models.resnet20(10, (3, 16, 16), shortcut="B"),
          "vgg11_bn": lambda: models.vgg11_bn(10, (3, 32, 32), hidden=16, pool=1),
          "vgg11, pooled to 7 x 7": lambda: models.vgg11(10, (3, 32, 32), hidden=16),
          "resnet18": lambda: models.resnet18(10, (3, 33, 33)),
          "the other layers": lambda: mc.layers.Sequential(
              [mc.layers.Conv2d(4, 3, groups=1), mc.layers.AvgPool2d(3, 2, 1, ceil_mode=True), mc.layers.Dropout(0.3),
               mc.layers.AdaptiveAvgPool2d((2, 3)), mc.layers.Flatten(), mc.layers.Linear(10)], (3, 12, 12))}


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", MODELS)
def test_a_float32_training_step_makes_no_float64_array(name, make_optimizer, monkeypatch):
    assert step(MODELS[name](), make_optimizer, monkeypatch) == []


@pytest.mark.parametrize("name", ["resnet20, option A", "the other layers"])
def test_nor_does_it_on_cupys_stand_in(name, monkeypatch):
    model = MODELS[name]().to("standin")
    assert step(model, sgd, monkeypatch, put=standin.asarray) == []


def test_a_hessian_vector_product_in_float32_makes_no_float64_array(monkeypatch):
    model = models.resnet.cifar_resnet(8, 4, (3, 8, 8), shortcut="B")
    x, y = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32), np.arange(2)
    for p in model.parameters():
        p.data = watched(p.data)
    with float64_arrays(monkeypatch) as found:
        gradients = mc.grad(ops.cross_entropy(model(watched(x), train=True), y), model.parameters(), create_graph=True)
        product = mc.grad(sum((g * g).sum() for g in gradients), model.parameters())
    assert {g.dtype for g in product} == {np.dtype(np.float32)}
    assert found == []


# ---------------------------------------------------------------- the watch sees what is planted
@pytest.fixture
def layer_by_layer():
    """ReLU by ReLU's own function, where the plants are: fused with its neighbour it has none."""
    with mc.layers.fusion(False):
        yield


def in_relu(x):
    return np.maximum(x.astype(np.float64), 0).astype(np.float32)


def through_a_numpy_number(x):
    return (x * np.float64(1.0)).astype(x.dtype)


def from_nothing(x):
    return x + np.zeros(x.shape[1:]).astype(x.dtype)


def in_a_numpy_function(x):
    return np.pad(x, 0, constant_values=0).clip(0) + np.mean(x, dtype=np.float64, keepdims=True).astype(x.dtype) * 0


def in_a_reduction(x):
    return x - x.sum(axis=0, dtype=np.float64).astype(x.dtype) * 0


def from_integers(x):
    return x * (np.arange(1, x.shape[-1] + 1) / 1.0).astype(x.dtype)


PLANTS = [in_relu, through_a_numpy_number, from_nothing, in_a_numpy_function, in_a_reduction, from_integers]


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("forward", PLANTS)
def test_a_planted_float64_is_found_though_no_result_shows_it(forward, monkeypatch):
    monkeypatch.setattr(ops.relu, "forward", forward)
    found = step(models.resnet.cifar_resnet(8, 4, (3, 8, 8)), sgd, monkeypatch)
    assert any(forward.__name__ in line for line in found)


@pytest.mark.usefixtures("layer_by_layer")
def test_a_planted_float64_is_found_in_a_backward_and_in_an_optimizer(monkeypatch):
    rule = ops.relu.composed[0]

    def backward(dy, y):
        return (dy * np.float64(2.0) * (y > 0) / 2).astype(y.dtype)

    class Careless(Optimizer):
        def update(self, p, g, memory, settings):
            p -= g * np.float64(settings["lr"])

    with monkeypatch.context() as patch:
        patch.setattr(ops.relu, "composed", [rule._replace(function=backward)])
        found = step(models.resnet.cifar_resnet(8, 4, (3, 8, 8)), sgd, monkeypatch)
        assert any("backward: return (dy" in line for line in found)
    found = step(models.resnet.cifar_resnet(8, 4, (3, 8, 8)), lambda params: Careless(params, lr=0.1), monkeypatch)
    assert any("update: p -= " in line for line in found)


@pytest.mark.usefixtures("layer_by_layer")
def test_a_planted_float64_is_found_on_the_stand_in(monkeypatch):
    monkeypatch.setattr(ops.relu, "forward", lambda x: (standin.maximum(x, 0) * np.float64(1.0)).astype(x.dtype))
    found = step(models.resnet.cifar_resnet(8, 4, (3, 8, 8)).to("standin"), sgd, monkeypatch, put=standin.asarray)
    assert any("np.float64(1.0)" in line for line in found)
