"""Whole training runs against PyTorch's, in float64 from equal weights and batches: every loss, parameter and running statistic.

Twenty steps of forward, backward and momentum multiply any error, so agreement to 1e-8 leaves no room for a wrong term.
"""
import numpy as np
import pytest

import minicnn as mc
from minicnn import models

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import torch_models as nets  # noqa: E402 (needs PyTorch)

VGG = {"dropout": 0.0, "pool": 1, "hidden": 64}


def twins(name, **options):
    """A model here and its twin in PyTorch, with equal weights."""
    model = models.build(name, 10, (3, 32, 32), dtype=np.float64, **options)
    twin = nets.VGG(11, True, 10, 64, 1, 0.0) if name == "vgg11_bn" else nets.CifarResNet(20, shortcut=options["shortcut"])
    return model, nets.take_over(twin, model)


def batches(seed, count, batch_size=16, size=32):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.standard_normal((batch_size, 3, size, size)), rng.integers(0, 10, batch_size)


def distance(a, b):
    """The largest difference, relative to the largest number; numbers under 1e-6 (the biases in front of a batch norm, whose
    gradient is 0 but for rounding) are compared with 1e-6."""
    return abs(a - b).max() / max(abs(b).max(), 1e-6)


def check_trajectory(model, twin, steps, make, make_torch):
    optimizer, torch_optimizer = make(model.parameters()), make_torch(twin.parameters())
    for step, (x, y) in enumerate(batches(1, steps, size=model.in_shape[1])):
        optimizer.zero_grad()
        loss = mc.ops.cross_entropy(model(x, train=True), y)
        loss.backward()
        optimizer.step()

        torch_optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(twin.train()(torch.from_numpy(x)), torch.from_numpy(y))
        expected.backward()
        torch_optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-8), f"the loss of step {step}"

    state, expected_state = model.state_dict(), twin.state_dict()
    assert state.keys() == expected_state.keys()
    for name, array in state.items():
        assert distance(array, expected_state[name].numpy()) < 1e-8, name
    x = next(batches(2, 1, size=model.in_shape[1]))[0]
    with torch.no_grad():
        assert distance(model(x).numpy(), twin.eval()(torch.from_numpy(x)).numpy()) < 1e-8, "inference afterwards"


def check_sgd(model, twin, steps):
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    check_trajectory(model, twin, steps, lambda p: mc.optim.SGD(p, **settings), lambda p: torch.optim.SGD(p, **settings))


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet20_trains_as_in_pytorch(shortcut):
    check_sgd(*twins("resnet20", shortcut=shortcut), steps=5)


@pytest.mark.parametrize("algorithm", ["direct", "im2col", "winograd"])
def test_every_algorithm_on_any_number_of_threads_trains_as_pytorch_does(algorithm, threads):
    model = models.resnet.cifar_resnet(8, 10, (3, 14, 14), shortcut="B", dtype=np.float64)
    with mc.algorithm(algorithm):
        check_sgd(model, nets.take_over(nets.CifarResNet(8, shortcut="B"), model), steps=3)


def test_vgg11_bn_trains_as_in_pytorch():
    check_sgd(*twins("vgg11_bn", **VGG), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("resnet20", {"shortcut": "A"}), ("resnet20", {"shortcut": "B"}), ("vgg11_bn", VGG)])
def test_twenty_steps_as_in_pytorch(name, options):
    check_sgd(*twins(name, **options), steps=20)


# ---------------------------------------------------------------- float32
def run32(model, parameters, loss_of, make):
    """The losses of twenty float32 steps of ResNet-20, and the state after them as one long vector."""
    optimizer, losses = make(parameters), []
    for x, y in batches(1, 20):
        optimizer.zero_grad()
        loss = loss_of(x.astype(np.float32), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = [np.asarray(array, np.float64).ravel() for name, array in model.state_dict().items() if not name.endswith("tracked")]
    return np.array(losses), np.concatenate(state)


def pytorchs32(model, memory_format):
    twin = nets.take_over(nets.CifarResNet(20), model).to(memory_format=memory_format).train()

    def loss_of(x, y):
        return torch.nn.functional.cross_entropy(twin(torch.from_numpy(x).to(memory_format=memory_format)), torch.from_numpy(y))
    return run32(twin, twin.parameters(), loss_of, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))


@pytest.mark.slow
def test_in_float32_twenty_steps_stay_as_near_to_pytorch_as_its_memory_formats_to_each_other(threads):
    """Within ten times that: rounding is multiplied from step to step, in PyTorch's own runs as in this one."""
    model = models.resnet20(10, (3, 32, 32), shortcut="A")
    contiguous, channels_last = (pytorchs32(model, how) for how in (torch.contiguous_format, torch.channels_last))
    ours = run32(model, model.parameters(), lambda x, y: mc.ops.cross_entropy(model(x, train=True), y),
                 lambda p: mc.optim.SGD(p, lr=0.01, momentum=0.9))
    for here, there, beside in zip(ours, contiguous, channels_last, strict=True):
        limit = 10 * np.linalg.norm(beside - there)
        assert 0 < limit < 0.1 * np.linalg.norm(there)
        assert np.linalg.norm(here - there) <= limit


def test_adamw_trains_a_partly_frozen_resnet20_as_in_pytorch():
    """Frozen parameters there: requires_grad False; frozen statistics there: the batch norms of that part in eval mode."""
    model, twin = twins("resnet20", shortcut="B")
    frozen = dict(model.walk())["layer1"].freeze()
    assert len(frozen.parameters()) == 18
    for p in twin.layer1.parameters():
        p.requires_grad_(False)
    twin.layer1.train = lambda mode=True: twin.layer1       # stays in eval mode when the net is set to training
    twin.layer1.apply(lambda module: setattr(module, "training", False))
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.05}
    before = frozen.state_dict()
    check_trajectory(model, twin, 3, lambda p: mc.optim.AdamW(p, **settings), lambda p: torch.optim.AdamW(p, **settings))
    for name, array in frozen.state_dict().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


# ---------------------------------------------------------------- second derivatives of a small ResNet's loss
def small_resnet():
    """ResNet-8 with projections, on 8 x 8 images: every kind of operation that the large ones have."""
    model = models.resnet.cifar_resnet(8, 4, (3, 8, 8), shortcut="B", dtype=np.float64, seed=2)
    twin = nets.take_over(nets.CifarResNet(8, 4, "B"), model)
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((4, 3, 8, 8)), rng.integers(0, 4, 4)
    directions = [rng.standard_normal(p.shape) for p in model.parameters()]
    return model, twin, x, y, directions


def gradient(model, x, y, train):
    return [g.numpy() for g in mc.grad(mc.ops.cross_entropy(model(x, train=train), y), model.parameters())]


@pytest.mark.parametrize("train", [True, False])
def test_a_hessian_vector_product_against_differences_and_pytorch(train):
    model, twin, x, y, directions = small_resnet()
    params = model.parameters()
    gradients = mc.grad(mc.ops.cross_entropy(model(x, train=train), y), params, create_graph=True)
    product = mc.grad(sum((g * v).sum() for g, v in zip(gradients, directions, strict=True)), params)

    twin.train(train)
    loss = torch.nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y))
    tensors = list(twin.parameters())
    torch_gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    slope = sum((g * torch.from_numpy(v)).sum() for g, v in zip(torch_gradients, directions, strict=True))
    for (name, p), hv, expected in zip(model.named_parameters().items(), product, torch.autograd.grad(slope, tensors), strict=True):
        assert hv.shape == p.shape
        assert distance(hv.numpy(), expected.numpy()) < 1e-8, name

    # Along the directions, so short that no ReLU and no maximum changes sides.
    eps, sides = 1e-7, []
    for sign in (1, -1):
        for p, v in zip(params, directions, strict=True):
            p.data = p.data + sign * eps * v
        sides.append(gradient(model, x, y, train))
        for p, v in zip(params, directions, strict=True):
            p.data = p.data - sign * eps * v
    for name, hv, plus, minus in zip(model.named_parameters(), product, *sides, strict=True):
        numeric = (plus - minus) / (2 * eps)
        assert abs(hv.numpy() - numeric).max() < 1e-4 * max(abs(numeric).max(), 0.1), name


def test_the_hessian_is_symmetric():
    """<u, H v> = <v, H u>, which a backward of a backward that forgets a term breaks."""
    model, _, x, y, v = small_resnet()
    rng, params = np.random.default_rng(4), model.parameters()
    u = [rng.standard_normal(p.shape) for p in params]

    def product(direction):
        gradients = mc.grad(mc.ops.cross_entropy(model(x, train=True), y), params, create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        return [g.numpy() for g in mc.grad(slope, params)]

    def inner(a, b):
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    assert inner(u, product(v)) == pytest.approx(inner(v, product(u)), rel=1e-9)
