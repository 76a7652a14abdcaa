"""Half precision on a GPU: images of float16 or bfloat16 inside a model, all else in float32; and the scaled loss of float16.

What the kernels do is in test_cuda_kernels.py; here are operations, models and trainings, by g++ and (`-m gpu`) on a GPU.
"""
from __future__ import annotations

import sys
from unittest import mock

import cuda_cases
import cushim
import numpy as np
import pytest
from test_accelerator import images, small_resnet
from test_models import images as random_images
from test_models import lively_pair, logits_and_gradients, torch_logits_and_gradients

import minicnn as mc
from minicnn import backend, models, ops, optim, train
from minicnn.kernels import conv as kernels
from minicnn.kernels.precision import half_type, precision
from minicnn.kernels.windows import Windows
from minicnn.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential
from minicnn.train import Config, Trainer

NO_COMPILER = pytest.mark.skipif(cushim.compiler() is None, reason="no g++ to compile the CUDA kernels for the CPU with")
NAMES = ["fp16", *(["bf16"] if len(cuda_cases.halves()) > 1 else [])]
each_half = pytest.mark.parametrize("half", NAMES)
ROUNDING = {"fp16": 2 ** -11, "bf16": 2 ** -8}          # of one number, relative


@pytest.fixture(params=[pytest.param("cushim", marks=NO_COMPILER), pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    """A device that computes with half precision."""
    return request.param


def put(array, where, requires_grad=False):
    return mc.Tensor(backend.to_device(np.asarray(array), where), requires_grad)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- operations
# name: (the operation, shapes of what is half, shapes of what is float32)
OPERATIONS = {
    "conv2d": (lambda x, w, b: ops.conv2d(x, w, b, padding=1), [(2, 4, 6, 5)], [(3, 4, 3, 3), (3,)]),
    "conv2d, groups": (lambda x, w: ops.conv2d(x, w, stride=2, groups=2), [(2, 4, 7, 5)], [(6, 2, 3, 3)]),
    "conv2d_relu": (lambda x, w, b: ops.conv2d_relu(x, w, b), [(2, 4, 6, 5)], [(3, 4, 1, 1), (3,)]),
    "conv2d_affine": (lambda x, r, w, scale, shift: ops.conv2d_affine(x, w, scale, shift, r, rectified=True),
                      [(2, 4, 6, 5), (2, 3, 4, 3)], [(3, 4, 3, 3), (3,), (3,)]),
    "linear": (ops.linear, [(5, 7)], [(3, 7), (3,)]),
    "normalize": (lambda x, w, b: ops.normalize(x, w, b, 1e-5)[0], [(4, 3, 5, 4)], [(3,), (3,)]),
    "normalize_relu": (lambda x, w, b: ops.normalize_relu(x, w, b, 1e-5)[0], [(4, 3, 5, 4)], [(3,), (3,)]),
    "normalize_add_relu": (lambda x, r, w, b: ops.normalization.normalize_add_relu(x, w, b, r, 1e-5)[0],
                           [(4, 3, 5, 4), (4, 3, 5, 4)], [(3,), (3,)]),
    "affine": (ops.affine, [(4, 3, 5, 4)], [(3,), (3,)]),
    "relu": (ops.relu, [(3, 4)], []),
    "add_relu": (ops.add_relu, [(3, 4), (3, 4)], []),
    "max_pool2d": (lambda x: ops.max_pool2d(x, 3, 2, 1), [(2, 3, 7, 6)], []),
    "avg_pool2d": (lambda x: ops.avg_pool2d(x, 2), [(2, 3, 7, 6)], []),
    "avg_pool2d, over the edge": (lambda x: ops.avg_pool2d(x, 3, 2, 1, True), [(2, 3, 7, 6)], []),
    "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, (3, 2)), [(2, 3, 7, 6)], []),
    "global_avg_pool2d": (ops.global_avg_pool2d, [(2, 3, 7, 6)], []),
    "simam": (ops.simam, [(2, 3, 7, 6)], []),
    "concatenate": (lambda a, b: ops.concatenate([a, b], 1), [(2, 3, 4), (2, 1, 4)], []),
    "pad": (lambda x: ops.pad(x, 1), [(2, 3)], []),
    "dropout": (lambda x: ops.dropout(x, 0.5, train=True, rng=np.random.default_rng(0)), [(20, 3)], []),
    "add": (lambda a, b: a + b, [(3, 4), (3, 4)], []),
    "used twice": (lambda x: ops.relu(x) + ops.relu(x), [(3, 4)], []),
    "another type": (lambda x: ops.relu(x.astype(np.float32)), [(3, 4)], []),
}


@each_half
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_and_its_gradients_are_those_in_float32_but_for_rounding(where, half, name):
    fn, of_half, of_float = OPERATIONS[name]
    dtype = half_type(half)
    halves = [normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(of_half)]
    floats = [normal(*shape, seed=10 + i) for i, shape in enumerate(of_float)]
    inputs = [put(a, where, True) for a in (*halves, *floats)]
    exact = [mc.Tensor(a.astype(np.float32), True) for a in (*halves, *floats)]
    y, expected = fn(*inputs), fn(*exact)
    assert y.dtype == (np.float32 if name == "another type" else dtype)
    dy = normal(*y.shape, seed=20).astype(y.dtype)
    y.backward(put(dy, where))
    expected.backward(dy.astype(np.float32))
    limit = 8 * ROUNDING[half]
    for i, (found, wanted) in enumerate([(y, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]):
        assert i == 0 or found.dtype == inputs[i - 1].dtype             # of the weights, float32
        found, wanted = found.numpy().astype(np.float32), wanted.numpy()
        assert abs(found - wanted).max() <= limit * max(abs(wanted).max(), 1e-3), (i, found, wanted)


@each_half
def test_sums_lose_nothing_to_half_precision(where, half):
    """Thousands of numbers that, added up in their own type, would stop at 256 or 2048: each is half a step of such a sum."""
    dtype = half_type(half)
    ones = np.ones((1, 2, 80, 80), dtype)
    bias, weight = put(np.zeros(2, np.float32), where, True), put(np.ones((2, 2, 1, 1), np.float32), where, True)
    ops.conv2d(put(ones, where), weight, bias).backward(put(ones, where))
    assert bias.grad.numpy().tolist() == [6400, 6400] and weight.grad.numpy().ravel().tolist() == [6400] * 4
    assert ops.global_avg_pool2d(put(ones, where)).numpy().tolist() == [[1, 1]]
    _, mean, var = ops.normalize(put(ones, where), *(put(np.ones(2, np.float32), where) for _ in range(2)), 1e-5)
    assert backend.to_numpy(mean).tolist() == [1, 1] and backend.to_numpy(var).tolist() == [0, 0]


@each_half
def test_gradients_of_gradients(where, half):
    model, exact = (Sequential([Conv2d(2), BatchNorm2d(), ReLU(), GlobalAvgPool2d(), Linear(3)], (3, 8, 8)) for _ in range(2))
    x, dy = normal(2, 3, 8, 8).astype(half_type(half)), normal(2, 3).astype(half_type(half))

    def penalty(model, x, dy, train):
        x = mc.Tensor(x, requires_grad=True)
        g, = mc.grad(model(x, train=train), x, dy, create_graph=True)
        return mc.grad((g.astype(np.float32) ** 2).sum(), model.parameters()[0])[0].numpy()

    model.to(where)
    for training in (True, False):
        found = penalty(model, *(backend.to_device(a, where) for a in (x, dy)), training)
        wanted = penalty(exact, x.astype(np.float32), dy.astype(np.float32), training)
        assert found.dtype == np.float32
        assert abs(found - wanted).max() <= 60 * ROUNDING[half] * abs(wanted).max()


# ---------------------------------------------------------------- what does not fit
def test_what_belongs_in_float32_is_said(where):
    x, half = put(normal(1, 2, 4, 4).astype(np.float16), where), np.float16
    weight, channel = put(normal(3, 2, 3, 3), where), put(normal(2), where)
    for call in (lambda: ops.conv2d(x, weight.astype(half)), lambda: ops.normalize(x, channel.astype(half), channel, 1e-5),
                 lambda: ops.conv2d(x, weight.astype(np.float64)),
                 lambda: ops.linear(put(normal(1, 2), where).astype(half), put(normal(3, 2), where).astype(half))):
        with pytest.raises(TypeError, match="beside images of half precision, all of one type, what else there is .* is float32"):
            call()
    with pytest.raises(TypeError, match="batch_norm: x is of float16, but running_mean of float16.*half precision, float32"):
        ops.batch_norm(x, channel, channel, channel.astype(half).data, channel.data, train=True)
    for algorithm in ("direct", "winograd"):
        with pytest.raises(ValueError, match=f'"{algorithm}" computes in float32 and float64, and the images are of'):
            ops.conv2d(x, weight, algorithm=algorithm)
        with mc.algorithm(algorithm):
            assert ops.conv2d(x, weight).dtype == half
    with pytest.raises(TypeError, match="add_relu mixes float16 and float32"):
        ops.add_relu(x, x.astype(np.float32))


@pytest.mark.parametrize("device", ["cpu", "standin"])
def test_without_a_gpu_it_is_refused(device):
    x, weight = normal(1, 2, 4, 4).astype(np.float16), normal(3, 2, 3, 3)
    with pytest.raises(TypeError, match=r"conv2d was given float16: with half precision only a GPU computes; .*astype\('float32"):
        ops.conv2d(*(backend.to_device(a, device) for a in (x, weight)))


@each_half
def test_what_no_kernel_reads_in_half_goes_the_portable_way(where, half):
    """Parameters of half precision are nobody's here; read as float32 they would be nonsense, and what lies behind them, too."""
    dtype = half_type(half)
    for make in (lambda p: optim.SGD(p, lr=0.5, momentum=0.5), lambda p: optim.AdamW(p, lr=0.5)):
        found = []
        for device in ("cpu", where):
            whole = backend.to_device(np.arange(16).astype(dtype), device)
            p = mc.Tensor(whole[:8], requires_grad=True)
            p.sum().backward()
            make([p]).step()
            found.append(backend.to_numpy(whole).tolist())
        assert found[0] == found[1] and found[1][8:] == [*range(8, 16)] and found[1][0] < 0
    logits = normal(3, 4).astype(dtype)
    losses = [ops.softmax_cross_entropy(put(logits, device), backend.to_device(np.arange(3), device)) for device in ("cpu", where)]
    assert losses[1].dtype == dtype and float(losses[1]) == pytest.approx(float(losses[0]), rel=4 * ROUNDING[half])


@pytest.mark.skipif(len(NAMES) < 2, reason="ml_dtypes is not installed")
def test_from_one_half_type_to_the_other(where):
    fp16, bf16 = half_type("fp16"), half_type("bf16")
    numbers = np.array([1 + 2 ** -9, 65504, 6e-8, -3], np.float32)
    for here, there in ((fp16, bf16), (bf16, fp16)):
        x = put(numbers.astype(here), where, True)
        y = x.astype(there)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y.numpy(), numbers.astype(here).astype(np.float32).astype(there))
        y.backward(put(np.ones(4, there), where))
        assert x.grad.dtype == here and x.grad.numpy().tolist() == [1] * 4


def test_a_type_without_gradient_is_refused():
    with pytest.raises(TypeError, match="float32 as int64 has no gradient"):
        mc.Tensor(normal(3), requires_grad=True).astype(int)
    assert mc.Tensor(np.arange(3)).astype(np.float32).dtype == np.float32
    t = mc.Tensor(normal(3))
    assert t.astype(np.float32) is t


def test_bfloat16_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        mc.set_precision("bf16")
    assert mc.get_precision() == "fp32"


# ---------------------------------------------------------------- models
@each_half
def test_a_model_computes_in_half_inside_and_in_float32_outside(where, half):
    seen = []
    model = Sequential([Conv2d(4), BatchNorm2d(), ReLU(), [Conv2d(4)], GlobalAvgPool2d(), Linear(3)], (3, 8, 8)).to(where)
    forward = Conv2d.forward
    with mock.patch.object(Conv2d, "forward", lambda self, x, *rest: seen.append(x.dtype) or forward(self, x, *rest)):
        with precision(half):
            x = put(normal(2, 3, 8, 8), where, True)
            y = model(x, train=True)
            y.sum().backward()
        assert seen == [half_type(half)] * 2 and y.dtype == x.grad.dtype == np.float32
        seen.clear()
        assert model(x, train=True).dtype == np.float32 and seen == [np.float32] * 2            # outside the block as ever
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {np.dtype(np.float32)}
    with precision(half):
        exact = Sequential([Conv2d(4)], (3, 8, 8), dtype=np.float64).to(where)
        assert exact(put(normal(2, 3, 8, 8).astype(np.float64), where)).dtype == np.float64      # float64 is float64
        on_the_cpu = Sequential([Conv2d(4)], (3, 8, 8))
        np.testing.assert_array_equal(on_the_cpu(normal(2, 3, 8, 8)).numpy(), on_the_cpu(normal(2, 3, 8, 8)).numpy())


def relative(found, exact):
    return np.linalg.norm(backend.to_numpy(found) - exact) / np.linalg.norm(exact)


def test_a_convolution_in_tf32_rounds_less_than_in_bfloat16_by_whichever_algorithm(where):
    """set_precision's docstring has the figures. From 64 channels on, "auto" is Winograd."""
    x, weight = np.maximum(normal(1, 64, 24, 24), 0), normal(32 * 2, 64, 3, 3)
    x64, weight64, dy64 = (a.astype(np.float64) for a in (x, weight, normal(1, 64, 24, 24, seed=1)))
    windows = Windows.of(3, 1, 1)
    maps = ((kernels.conv2d, (x64, weight64, None)), (kernels.conv2d_input_grad, (dy64, weight64, (24, 24))),
            (kernels.conv2d_weight_grad, (x64, dy64)))
    for kernel, arrays in maps:
        exact = kernel(*arrays, windows)
        there = [backend.to_device(a.astype(np.float32), where) if isinstance(a, np.ndarray) else a for a in arrays]
        with precision("tf32"):
            im2col, winograd, auto = (kernel(*there, windows, algorithm=name) for name in ("im2col", "winograd", "auto"))
        assert np.array_equal(backend.to_numpy(auto), backend.to_numpy(winograd))
        assert 1e-4 < relative(im2col, exact) < relative(winograd, exact) < 1.8e-3, kernel.__name__
        if "bf16" in NAMES:
            halves = [a.astype(half_type("bf16")) if hasattr(a, "astype") else a for a in there]
            assert relative(winograd, exact) < relative(kernel(*halves, windows).astype(np.float32), exact), kernel.__name__


@pytest.mark.slow
@pytest.mark.skipif("bf16" not in NAMES, reason="ml_dtypes is not installed")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("which", ["vgg11", "resnet18", "vgg11_bn"])
def test_a_model_in_tf32_is_nearer_to_float32_than_in_bfloat16(where, which, train):
    """Its logits several times; gradients, which the ReLUs that turn decide, by less."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    model, _ = lively_pair(which, np.float32)
    x, dy = random_images(8, *model.in_shape), random_images(8, 5, seed=9)
    exact = logits_and_gradients(model, x, dy, train)
    model.to(where)
    far = {}
    for how in ("tf32", "bf16"):
        with precision(how):
            found = logits_and_gradients(model, backend.to_device(x, where), backend.to_device(dy, where), train)
        distances = {name: relative(found[name], e) for name, e in exact.items()}
        far[how] = distances["logits"], np.median(list(distances.values()))
    assert 0 < far["tf32"][0] < far["bf16"][0] / 2 and 0 < far["tf32"][1] < far["bf16"][1], far


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("which", ["resnet20 A", "vgg11", "resnet18", "vgg11_bn"])
@each_half
def test_rounding_costs_what_it_costs_pytorch(where, half, which, train):
    """The distance from float32 of logits and gradients, beside that of PyTorch's autocast: at most twice as far."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, twin = lively_pair(which, np.float32)
    x, dy = random_images(8, *model.in_shape), random_images(8, 5, seed=9)
    exact = logits_and_gradients(model, x, dy, train)
    model.to(where)
    with precision(half):
        ours = logits_and_gradients(model, backend.to_device(x, where), backend.to_device(dy, where), train)
    with torch.autocast("cpu", torch.float16 if half == "fp16" else torch.bfloat16):
        theirs = torch_logits_and_gradients(twin, x, dy, train)

    def far(found):
        distances = {name: relative(found[name], e) for name, e in exact.items()}
        return [distances["logits"], distances["images"], np.median(list(distances.values()))]

    assert 0 < max(far(ours)) < 1
    assert all(a <= 2 * b for a, b in zip(far(ours), far(theirs), strict=True)), (far(ours), far(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet56", "resnet50", "googlenet", "nin", "vgg11"])
@each_half
def test_every_family_runs(where, half, name):
    """Each kind of layer that there is; at inference the logits are near those of float32."""
    shape = models.default_in_shape(name) if name in ("resnet56", "nin") else (3, 64, 64)
    options = {"hidden": 64, "pool": 3} if name == "vgg11" else {}
    model = models.build(name, 10, shape, **options)
    x = random_images(4, *shape)
    exact = model(x).numpy()
    model.to(where)
    with precision(half):
        model(backend.to_device(x, where), train=True, rng=np.random.default_rng(0)).sum().backward()
        assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters())
        for _, layer in model.walk():
            if isinstance(layer, BatchNorm2d):
                assert layer.running_mean.dtype == np.float32
        again = models.build(name, 10, shape, **options).to(where)
        assert np.linalg.norm(again(backend.to_device(x, where)).numpy() - exact) <= 12 * ROUNDING[half] * np.linalg.norm(exact)


@pytest.mark.slow
@NO_COMPILER
@each_half
def test_what_a_step_holds_is_half_as_much(half):
    """The most that lives at once, by the stand-in's pool: weights and their gradients stay as they are."""
    library = sys.modules["standin_with_cuda"]
    pool = library.get_default_memory_pool()
    peaks = {}
    for how in ("fp32", half):
        model = models.resnet.cifar_resnet(8, 3, (3, 16, 16)).to("cushim")
        x = backend.to_device(normal(32, 3, 16, 16), "cushim")
        with precision(how):
            for _ in range(2):
                pool.free_all_blocks()
                before = pool.live
                model(x, train=True).sum().backward()
            peaks[how] = pool.total_bytes() - before
    assert 0.45 < peaks[half] / peaks["fp32"] < 0.65


# ---------------------------------------------------------------- the scaled loss
EVERYWHERE = ["cpu", "standin", pytest.param("cushim", marks=NO_COMPILER), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_scaler_is_pytorchs(device, rule):
    """Parameters and scales over steps of which some overflow; AdamW's steps that do not."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    start = normal(5000)
    gradients = [normal(5000, seed=i) for i in range(8)]
    if rule == "sgd":
        gradients[2][4999], gradients[3][0], gradients[6][7] = np.inf, np.nan, -np.inf
    ours = mc.Tensor(backend.to_device(start.copy(), device), requires_grad=True)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    kinds = {"sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
             "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 0.01})}
    mine, its, settings = kinds[rule]
    scaler = optim.GradScaler(2.0 ** 8, growth_interval=2)
    oracle = torch.amp.GradScaler("cpu", init_scale=2.0 ** 8, growth_interval=2)
    optimizer, peer = mine([ours], **settings), its([theirs], **settings)
    for g in gradients:
        scaler.scale((ours * backend.to_device(g, device)).sum()).backward()
        oracle.scale((theirs * torch.from_numpy(g)).sum()).backward()
        for scaling, stepping in ((scaler, optimizer), (oracle, peer)):
            scaling.step(stepping)
            scaling.update()
            stepping.zero_grad()
        assert scaler.get_scale() == oracle.get_scale()
        np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
    resumed = optim.GradScaler()
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.state_dict() == scaler.state_dict() and resumed.get_scale() == scaler.get_scale()


def test_a_rule_of_ones_own_is_scaled_too(where):
    class Plain(optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)

        def update(self, p, g, memory, settings):
            p -= settings["lr"] * g

    p = put(np.zeros(3, np.float32), where, True)
    scaler, optimizer = optim.GradScaler(4.0), Plain([p], lr=1.0)
    for g, expected in ((1.0, -1.0), (np.inf, -1.0), (2.0, -3.0)):
        optimizer.zero_grad()
        scaler.scale((p * put(np.full(3, g, np.float32), where).data).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.numpy().tolist() == [expected] * 3
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("device", EVERYWHERE)
def test_two_optimisers_share_a_loss(device):
    """One that overflows is left out alone; the scale falls once."""
    a, b = (put(np.zeros(2, np.float32), device, True) for _ in range(2))
    scaler, first, second = optim.GradScaler(2.0), optim.SGD([a], lr=1.0), optim.SGD([b], lr=1.0)
    factors = [put(np.array(v, np.float32), device).data for v in ([np.inf, 1], [1, 1])]
    with np.errstate(invalid="ignore"):                 # 0 times infinity
        scaler.scale((a * factors[0]).sum() + (b * factors[1]).sum()).backward()
    for optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert a.numpy().tolist() == [0, 0] and b.numpy().tolist() == [-1, -1] and scaler.get_scale() == 1.0


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_scale_never_becomes_infinite(device):
    """Nor so large that its inverse is 0: the parameters would stand still, and nobody would say so."""
    p = put(np.zeros(1, np.float32), device, True)
    scaler, optimizer = optim.GradScaler(2.0 ** 120, growth_interval=1), optim.SGD([p], lr=2.0 ** 60)
    for step in range(1, 11):
        optimizer.zero_grad()
        scaler.scale((p * 2.0 ** -60).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.numpy().tolist() == [-step]
    assert 2.0 ** 126 <= scaler.get_scale() <= 2.0 ** 127


def test_a_scaler_without_sense_is_refused():
    with pytest.raises(TypeError, match="'cuda' must be a number, no device"):
        optim.GradScaler("cuda")                            # which PyTorch's takes
    with pytest.raises(TypeError, match="init_scale=None must be a number"):
        optim.GradScaler(None)
    for wrong in ({"init_scale": 0}, {"growth_factor": 1}, {"backoff_factor": 1}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match=f"GradScaler: .*{next(iter(wrong))}"):
            optim.GradScaler(**wrong)


# ---------------------------------------------------------------- a training
def half_trainer(where, half, **settings):
    model = models.resnet.cifar_resnet(8, 3, (3, 8, 8)).to(where)
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.05, "precision": half, **settings}
    return Trainer(model, images(64), images(8, seed=1), Config(**settings))


@pytest.mark.slow
@each_half
def test_a_training_learns_as_in_float32(where, half):
    exact, trainer = half_trainer(where, "fp32"), half_trainer(where, half)
    exact.fit()
    trainer.fit()
    losses = [[row["train_loss"] for row in t.history] for t in (exact, trainer)]
    assert losses[0][-1] < 0.4 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert mc.get_precision() == "fp32"


@each_half
def test_a_loss_of_half_logits_is_float32(where, half):
    logits = normal(4, 3).astype(half_type(half))
    z, exact = put(logits, where, True), mc.Tensor(logits.astype(np.float32), True)
    loss, expected = (ops.cross_entropy(v, np.array([0, 2, 1, 1])) for v in (z, exact))
    loss.backward()
    expected.backward()
    assert loss.dtype == np.float32 and z.grad.dtype == half_type(half)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert abs(z.grad.numpy().astype(np.float32) - exact.grad.numpy()).max() <= ROUNDING[half]


def test_gradients_too_small_for_float16_arrive_scaled(where):
    """A loss that is divided by a million: without a scale, all that reaches the body is 0."""
    model = Sequential([Conv2d(4), ReLU(), GlobalAvgPool2d(), Linear(3)], (3, 8, 8)).to(where)
    x, scaler = put(normal(2, 3, 8, 8), where), optim.GradScaler()
    weight = model.parameters()[0]
    with precision("fp16"):
        for scaled in (False, True):
            weight.grad = None
            loss = model(x, train=True).sum() * 1e-7
            (scaler.scale(loss) if scaled else loss).backward()
            assert bool(weight.grad.numpy().any()) is scaled


@NO_COMPILER
def test_a_step_that_overflows_is_left_out_and_nobody_waits():
    """All that a step does, the look for what overflowed included; the host learns of it behind the epoch, if it asks."""
    library = sys.modules["standin_with_cuda"]
    trainer = half_trainer("cushim", "fp16", epochs=1)
    trainer.scaler = optim.GradScaler(2.0 ** 40)                # far too high: the first steps overflow
    before, behind, waits = trainer.model.state_dict(), [], []
    with library.host_syncs() as syncs:
        def look(trainer):
            waits.append(list(syncs))
            if len(behind) < 2:
                behind.append(trainer.model.state_dict())
                syncs.clear()
        trainer.fit(on_step=look)
    assert waits == [[]] * 8
    for name, p in trainer.model.named_parameters().items():
        np.testing.assert_array_equal(behind[0][name], before[name])
        assert np.isfinite(p.numpy()).all()
    assert trainer.scaler.get_scale() == 2.0 ** 32


@NO_COMPILER
@each_half
def test_a_training_goes_on_where_it_stopped(tmp_path, half):
    def halfway(trainer):
        if trainer.epoch == 0 and trainer.step == 5:
            mc.save(tmp_path / "state.npz", trainer.state_dict())

    whole, resumed = (half_trainer("cushim", half, epochs=1) for _ in range(2))
    whole.fit(on_step=halfway)
    resumed.load_state_dict(mc.load(tmp_path / "state.npz"))
    resumed.fit()
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in whole.history]
    assert (resumed.scaler is None) == (half != "fp16")
    if resumed.scaler is not None:
        assert resumed.scaler.state_dict() == whole.scaler.state_dict() == {"scale": 65536.0, "stayed": 8}


@each_half
def test_on_the_cpu_a_run_is_refused(tmp_path, monkeypatch, half):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"precision={half} is how a GPU computes, and this run is on the CPU"):
        train.begin("digits", device="cpu", precision=half)
    assert not list(tmp_path.iterdir())


def accelerated(trainer):
    return ((backend.to_device(inputs, "cushim"), labels) for inputs, labels in trainer._inputs())


@NO_COMPILER
def test_products_are_of_half_precision_and_added_up_in_float32():
    trainer, seen = half_trainer("cushim", "fp16", epochs=1), set()
    gemm = cushim.gemm_strided_batched_ex

    def watched(*args):
        seen.add((args[8], args[17], args[-2]))
        gemm(*args)

    with mock.patch.object(cushim, "gemm_strided_batched_ex", watched), precision("fp16"):
        trainer._train_step(*next(iter(accelerated(trainer))))
    assert seen == {(2, 2, 68), (2, 0, 68)}                 # half to half, and of weights' gradients to float32


def test_the_small_resnet_of_float64_is_computed_in_float64(where):
    model = small_resnet(where)
    with precision("fp16"):
        assert model(backend.to_device(normal(1, 3, 8, 8).astype(np.float64), where)).dtype == np.float64
