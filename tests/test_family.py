"""Network in Network, GoogLeNet, SimAM, and branches side by side: counts, names, arithmetic, gradients, errors."""
import numpy as np
import pytest
from witnesses import naive_simam, same

import minicnn as mc
from minicnn import models, ops
from minicnn.layers import (
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    SimAM,
    fusion,
)
from minicnn.models.resnet import conv_bn
from minicnn.testing import check_layer, gradcheck, gradgradcheck

# name, options: (parameters, multiply-adds of an image), at the images and classes the model is made for
COUNTS = [("nin", {}, 966_986, 222_486_528),
          ("googlenet", {}, 7_005_832, 1_582_671_872),
          ("googlenet", {"branch5x5": 3}, 6_624_904, 1_498_376_192)]
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]


def numbers(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def message_of(action):
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- counts, sizes, names
@pytest.mark.parametrize("name, options, parameters, multiply_adds", COUNTS)
def test_counts_are_the_published_ones(name, options, parameters, multiply_adds):
    model = models.build(name, **options)
    summary = model.summary()
    assert (summary.parameters, summary.multiply_adds) == (parameters, multiply_adds)
    assert sum(p.size for p in model.parameters()) == parameters


def sizes(model):
    """Pixels a side behind every pool."""
    return [layer.out_shape[1:] for _, layer in model.walk() if type(layer).__name__ in ("MaxPool2d", "AvgPool2d")
            and layer.stride == 2]


def test_the_pools_round_up():
    assert sizes(models.nin()) == [(16, 16), (8, 8)]                                    # the last pool of Caffe's model is 8 x 8
    assert sizes(models.nin(10, (3, 27, 30))) == [(13, 15), (6, 7)]
    assert sizes(models.googlenet(10)) == [(56, 56), (28, 28), (14, 14), (7, 7)]        # table 1 of the paper
    assert sizes(models.googlenet(10, (3, 75, 31))) == [(19, 8), (9, 4), (4, 2), (2, 1)]


def test_the_names_of_network_in_network_are_those_of_its_caffe_model():
    shapes = {"conv1": (192, 3, 5, 5), "cccp1": (160, 192, 1, 1), "cccp2": (96, 160, 1, 1),
              "conv2": (192, 96, 5, 5), "cccp3": (192, 192, 1, 1), "cccp4": (192, 192, 1, 1),
              "conv3": (192, 192, 3, 3), "cccp5": (192, 192, 1, 1), "cccp6": (10, 192, 1, 1)}
    expected = {f"{name}.{part}": shape if part == "weight" else shape[:1] for name, shape in shapes.items()
                for part in ("weight", "bias")}
    assert {name: array.shape for name, array in models.nin().state_dict().items()} == expected
    assert [layer.p for _, layer in models.nin(dropout=0.25).walk() if isinstance(layer, Dropout)] == [0.25, 0.25]


def test_the_names_of_googlenet_are_torchvisions():
    model = models.googlenet(7, (3, 64, 64), dropout=0.3)
    blocks = [f"inception{block}" for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    convolutions = ["conv1", "conv2", "conv3", *(f"{block}.{branch}" for block in blocks for branch in (
        "branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"))]
    expected = [f"{conv}.{part}" for conv in convolutions
                for part in ("conv.weight", "bn.weight", "bn.bias", *(f"bn.{name}" for name in STATISTICS))]
    assert list(model.state_dict()) == [*expected, "fc.weight", "fc.bias"]
    assert {layer.eps for _, layer in model.walk() if isinstance(layer, BatchNorm2d)} == {1e-3}
    assert [layer.p for _, layer in model.walk() if isinstance(layer, Dropout)] == [0.3]
    for branch5x5 in (5, 3):
        layers = dict(models.googlenet(7, (3, 64, 64), branch5x5=branch5x5).walk())
        assert [layers[f"{block}.branch3.1.conv"].weight.shape[2:] for block in blocks] == [(branch5x5, branch5x5)] * 9


def test_a_checkpoint_with_auxiliary_heads_loads_and_reports_them():
    model, other = (models.googlenet(3, (3, 32, 32), branch5x5=3, seed=seed) for seed in (1, 2))
    heads = {"aux1.conv.conv.weight": np.zeros((128, 512, 1, 1)), "aux2.fc2.bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"2 unexpected: aux1\.conv\.conv\.weight, aux2\.fc2\.bias"):
        model.load_state_dict({**other.state_dict(), **heads})
    assert model.load_state_dict({**other.state_dict(), **heads}, strict=False) == ([], list(heads), [])
    x = numbers(2, 3, 32, 32, dtype=np.float32)
    np.testing.assert_array_equal(model(x).numpy(), other(x).numpy())


# ---------------------------------------------------------------- arithmetic, against PyTorch's own layers
def torch_and_twin(name, model, options):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch_models as nets
    classes, channels = model.out_shape[0], model.in_shape[0]
    if name == "nin":
        twin = nets.NetworkInNetwork(classes, channels)
    else:
        twin = nets.GoogLeNet(classes, options.get("branch5x5", 5), channels)
    return torch, nets.take_over(twin, model)


def built(name, in_shape, options, dtype=np.float64):
    """The model without dropout, whose masks would differ; with numbers in it that no wrong use of them survives."""
    model = models.build(name, 5, in_shape, dtype=dtype, dropout=0.0, **options)
    rng, state = np.random.default_rng(9), model.state_dict()
    for key, array in state.items():
        if array.ndim == 1:
            low = -1.0 if key.endswith(("bn.bias", "running_mean")) else 0.5
            array[...] = rng.uniform(low, low + 1.5, array.shape)
    model.load_state_dict(state)
    return model


# Sides that leave some pool a remainder, where ceil mode matters; odd ones, and no square.
each_model = pytest.mark.parametrize("name, in_shape, options", [
    ("nin", (3, 32, 32), {}), ("nin", (1, 25, 18), {}), ("googlenet", (3, 64, 64), {}),
    ("googlenet", (3, 64, 64), {"branch5x5": 3}), ("googlenet", (2, 47, 66), {}),
    ("googlenet", (3, 15, 24), {}), ("nin", (3, 4, 5), {})])         # the least: a pool's window is larger than its image


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-10), (np.float32, 1e-4)])
@each_model
def test_a_model_computes_what_pytorchs_of_the_same_weights_does(name, in_shape, options, dtype, limit):
    model = built(name, in_shape, options, dtype)
    torch, twin = torch_and_twin(name, model, options)
    x = numbers(3, *in_shape, dtype=dtype)
    with torch.no_grad():
        expected = twin.eval()(torch.from_numpy(x)).numpy()
    assert abs(expected).max() > 0
    same(model(x), expected, limit)
    with fusion(False):
        same(model(x), expected, limit)
    assert list(model.state_dict()) == list(twin.state_dict())


@each_model
def test_a_models_gradients_in_training_are_pytorchs(name, in_shape, options):
    """Of every parameter and of the images, for a random output gradient; and the statistics have moved as PyTorch's."""
    model = built(name, in_shape, options)
    torch, twin = torch_and_twin(name, model, options)
    x, dy = mc.Tensor(numbers(4, *in_shape), requires_grad=True), numbers(4, 5, seed=1)
    model(x, train=True).backward(mc.Tensor(dy))
    theirs = torch.from_numpy(x.numpy()).requires_grad_()
    twin.train()(theirs).backward(torch.from_numpy(dy))
    same(x.grad, theirs.grad.numpy(), 1e-8, "images")
    for parameter, expected in twin.named_parameters():
        assert abs(expected.grad.numpy()).max() > 1e-6, f"{parameter} has a gradient that tells something"
        same(model.named_parameters()[parameter].grad, expected.grad.numpy(), 1e-8, parameter)
    for key, array in model.state_dict().items():
        same(array, twin.state_dict()[key].numpy(), 1e-10, key)


def test_network_in_network_learns():
    """64 digits by heart, from the parameters that it begins with: the last ReLU lets classes through."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    digits, _ = mc.data.digits()
    x, labels = ((digits.images[:64] / 255 - 0.3) / 0.37).astype(np.float32), digits.labels[:64]
    model = models.nin(10, (1, 8, 8), dropout=0.2)
    optimizer = mc.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(x, train=True), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1.0, f"from 2.3, what chance gives: {losses}"


@pytest.mark.slow
def test_googlenet_in_small_has_the_gradients_of_finite_differences():
    """The block itself, narrow: a pool, 1x1, 3x3 and 5x5 beside each other, two of them, to second order."""
    def blocks(kernel):
        widths = [(2, (1, 2), (2, 1), 2), (1, (2, 1), (1, 2), 1)]
        return [models.inception.inception(w, kernel).named(f"inception{i}") for i, w in enumerate(widths)]
    for kernel in (5, 3):
        for train in (False, True):
            assert check_layer(Sequential(blocks(kernel)), (3, 4, 5), train=train, batch=2)
    assert check_layer(Sequential(blocks(5)), (3, 4, 5), train=True, second_order=True, batch=2)


# ---------------------------------------------------------------- branches
def test_branches_join_channels_in_order_and_add_gradients():
    """By hand: 2 x, x itself, and x's first channel out of a 1x1 convolution."""
    layer = Branches([Conv2d(3, 1, bias=False)], [], [Conv2d(1, 1, bias=False)])
    assert layer.build((3, 4, 5), np.random.default_rng(0), np.float64) == (7, 4, 5)
    twice, first = (branch[0] for branch in (layer.layers[0], layer.layers[2]))
    twice.load_state_dict({"weight": 2 * np.eye(3)[:, :, None, None]})
    first.load_state_dict({"weight": np.array([1.0, 0, 0]).reshape(1, 3, 1, 1)})
    x, dy = mc.Tensor(numbers(2, 3, 4, 5), requires_grad=True), numbers(2, 7, 4, 5, seed=1)
    y = layer(x)
    same(y, np.concatenate([2 * x.numpy(), x.numpy(), x.numpy()[:, :1]], 1))
    y.backward(mc.Tensor(dy))
    dx = 2 * dy[:, :3] + dy[:, 3:6]
    dx[:, :1] += dy[:, 6:]
    same(x.grad, dx)
    same(twice.weight.grad[:, :, 0, 0], np.einsum("nkhw,nchw->kc", dy[:, :3], x.numpy()))


BRANCHES = {
    "an inception block": lambda: Branches([Conv2d(2, 1), BatchNorm2d(), ReLU()], [Conv2d(2, 3, padding=1), ReLU()],
                                           [MaxPool2d(3, 1, 1, ceil_mode=True), Conv2d(1, 1)]),
    "with the input": lambda: Branches([], [Conv2d(2, 3, padding=1), BatchNorm2d()]),
    "one": lambda: Branches([Conv2d(2, 3, padding=1), ReLU()]),
    "strided": lambda: Sequential([Branches([Conv2d(2, 3, stride=2, padding=1)], [MaxPool2d(3, 2, 1)]), ReLU(), Flatten(),
                                   Linear(2)]),
    "inside each other": lambda: Branches([Branches([Conv2d(1, 1)], []), ReLU()], [Residual([Conv2d(3, 3, padding=1)]), ReLU()]),
    "vectors": lambda: Sequential([GlobalAvgPool2d(), Branches(Linear(2), [Linear(3), ReLU()], [])]),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", BRANCHES)
def test_gradients_through_branches_to_second_order(name, train):
    assert check_layer(BRANCHES[name](), (3, 4, 5), train=train)
    assert check_layer(BRANCHES[name](), (3, 4, 5), train=train, second_order=True)


def test_branches_compute_the_same_on_every_device(device):
    for make in BRANCHES.values():
        model = make()
        model.build((3, 4, 5), np.random.default_rng(0), np.float64)
        expected = model(numbers(2, 3, 4, 5), train=True)
        y = model.to(device.name)(device.put(numbers(2, 3, 4, 5)), train=True)
        same(y, expected)


def test_branches_take_their_names_or_their_index():
    model = Sequential([Branches(Conv2d(1).named("left"), [Conv2d(1)])], (1, 3, 3))
    assert list(model.state_dict()) == ["0.left.weight", "0.left.bias", "0.1.0.weight", "0.1.0.bias"]


@pytest.mark.parametrize("make, start, words", [
    (lambda: Sequential([ReLU(), Branches([Conv2d(2)], [Conv2d(2, padding=1)]).named("mixed")], (3, 8, 8)), "mixed (Branches): ",
     "from (3, 8, 8) its branches must end in one height and width; 0 in (2, 6, 6), 1 in (2, 8, 8): give them"),
    (lambda: Sequential([[Branches(ReLU().named("same"), [Flatten(), Linear(2)])]], (3, 4, 4)), "0.0 (Branches): ",
     "same in (3, 4, 4), 1 in (2,)"),
    (lambda: Sequential([Branches([ReLU()], [ReLU(), Conv2d(2, 5)])], (3, 4, 4)), "0.1.1 (Conv2d): ", "image of 4 x 4"),
    (lambda: Branches([ReLU(), Linear(2)]).build((3, 4, 4), np.random.default_rng(0)), "0.1 (Linear): ", "not (3, 4, 4)"),
    (lambda: Sequential([Branches(Conv2d(1).named("a"), Conv2d(1).named("a"))], (3, 4, 4)),
     "0 (Branches): ", "two layers have the name 'a."),
    (lambda: Branches(), "Branches needs at least one branch", "Branches([Conv2d(8, 1)], [])"),
    (lambda: models.googlenet(10, (3, 14, 15)), "maxpool3 (MaxPool2d): ", "image of 1 x 2"),
    (lambda: models.googlenet(10, (64, 64)), "conv1.conv (Conv2d): ", "not (64, 64)"),
    (lambda: models.googlenet(branch5x5=4), "branch5x5=4 must be 5, the paper's kernel, or 3", "torchvision"),
    (lambda: models.nin(10, (3, 3, 4)), "pool2 (AvgPool2d): ", "image of 1 x 2"),
    (lambda: models.nin(0), "Conv2d: ", "out_channels=0"),
    (lambda: models.nin(dropout=2.0), "Dropout: ", "p=2.0"),
    (lambda: Sequential([Conv2d(2), SimAM().named("attention")], (3, 3, 3)), "attention (SimAM): ",
     "(2, 1, 1) has one pixel a channel"),
    (lambda: Sequential([SimAM()], (3,)), "0 (SimAM): ", "SimAM reads images (C, H, W), not (3,)"),
    (lambda: ops.simam(numbers(2, 3, 1, 1)), "simam: x (2, 3, 1, 1) has 1 pixel a channel", "needs at least 2"),
    (lambda: ops.simam(numbers(2, 3, 4)), "simam: x must have 4 axes (N, C, H, W)", "(2, 3, 4)")])
def test_what_cannot_be_is_said_in_one_line(make, start, words):
    message = message_of(make)
    assert message.startswith(start)
    assert words in message


def test_an_error_while_running_names_the_branch():
    model = Sequential([Branches([Conv2d(2, 1)], [Conv2d(2, 1).named("conv")]).named("mixed")], (3, 4, 4), dtype=np.float64)
    dict(model.walk())["mixed.1.conv"].weight = mc.Tensor(numbers(2, 5, 1, 1))
    assert message_of(lambda: model(numbers(1, 3, 4, 4))).startswith("mixed.1.conv (Conv2d): conv2d: ")
    model = Sequential([Branches([MaxPool2d(2)], [Conv2d(1, 3, stride=2, padding=1)]).named("mixed")], (3, 4, 4), dtype=np.float64)
    message = message_of(lambda: model(numbers(1, 3, 5, 5)))            # sizes that agree for the image it was built for alone
    assert message.startswith("mixed (Branches): concatenate")
    assert "(1, 3, 2, 2), (1, 1, 3, 3)" in message


# ---------------------------------------------------------------- SimAM
def test_simam_by_hand():
    """Two pixels, 1 and 3: mean 2, d^2 = 1 for both, variance over n - 1 is 2, so e = 1 / (4 (2 + eps)) + 1/2."""
    x = np.array([1.0, 3.0]).reshape(1, 1, 1, 2)
    np.testing.assert_allclose(ops.simam(x, 0.5), x / (1 + np.exp(-(1 / 10 + 1 / 2))), rtol=1e-15)
    layer = SimAM(0.5)
    layer.build((1, 1, 2), np.random.default_rng(0), np.float64)
    np.testing.assert_array_equal(layer(x).numpy(), ops.simam(x, 0.5))


def test_every_image_and_channel_is_measured_by_itself():
    x = numbers(3, 4, 5, 6)
    np.testing.assert_allclose(ops.simam(x)[1:2, 2:3], ops.simam(x[1:2, 2:3].copy()), rtol=1e-13)
    same(ops.simam(x, 0.01), naive_simam(x, 0.01), 1e-13)
    flat = np.full((1, 2, 3, 3), 5.0)
    np.testing.assert_allclose(ops.simam(flat), flat / (1 + np.exp(-0.5)), rtol=1e-13)      # no variance: eps alone divides


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 2), (2, 1, 7, 1)])
def test_simams_gradients_are_right_to_second_order_and_those_it_states(shape):
    x, dy, eps = numbers(*shape), numbers(*shape, seed=1), 0.05
    assert gradcheck(lambda x: ops.simam(x, eps), [x])
    assert gradgradcheck(lambda x: ops.simam(x, eps), [x])
    leaf = mc.Tensor(x, requires_grad=True)
    ops.simam(leaf, eps).backward(mc.Tensor(dy))
    n = shape[2] * shape[3]
    d = x - x.mean((2, 3), keepdims=True)
    v = (d * d).sum((2, 3), keepdims=True) / (n - 1)
    s = 1 / (1 + np.exp(-(d * d / (4 * (v + eps)) + 0.5)))
    g = dy * x * s * (1 - s)
    c = d / (2 * (v + eps)) * (g - (g * d * d).sum((2, 3), keepdims=True) / ((n - 1) * (v + eps)))
    same(leaf.grad, dy * s + c - c.mean((2, 3), keepdims=True))


def test_simam_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import torch_models as nets
    for dtype, limit in ((np.float64, 1e-12), (np.float32, 1e-5)):
        x, dy = mc.Tensor(numbers(2, 3, 5, 4, dtype=dtype), requires_grad=True), numbers(2, 3, 5, 4, dtype=dtype, seed=1)
        theirs = torch.from_numpy(x.numpy()).requires_grad_()
        y, expected = ops.simam(x), nets.simam(theirs)
        same(y, expected.detach().numpy(), limit)
        y.backward(mc.Tensor(dy))
        expected.backward(torch.from_numpy(dy))
        same(x.grad, theirs.grad.numpy(), limit)


def test_simam_refuses_integers():
    with pytest.raises(TypeError, match="simam: x must be floating, not uint8"):
        ops.simam(np.zeros((1, 1, 2, 2), np.uint8))


def attentive_block(channels, stride=1, shortcut=()):
    """A ResNet's basic block with SimAM behind its second batch norm, as the paper places it."""
    body = [*conv_bn(channels, 3, stride, ("conv1", "bn1")), ReLU(), *conv_bn(channels, 3, names=("conv2", "bn2")), SimAM()]
    return [Residual(Sequential(body).named(""), Sequential(list(shortcut)).named("downsample")).named(""), ReLU()]


def attentive_resnet(dtype=np.float64):
    return Sequential([*conv_bn(4, 3, names=("conv1", "bn1")), ReLU(), Sequential(attentive_block(4)).named("layer1"),
                       Sequential(attentive_block(6, 2, conv_bn(6, 1, 2))).named("layer2"), GlobalAvgPool2d(), Linear(3)],
                      (3, 8, 8), dtype=dtype)


def test_simam_drops_into_a_resnets_blocks(device):
    """It adds no parameter and no name; a step of training lowers the loss; fused and layer by layer are one."""
    model = attentive_resnet(np.float32).to(device.name)
    assert not any("SimAM" in name or name.split(".")[-2] == "5" for name in model.state_dict())
    assert [row.kind for row in model.summary().rows].count("SimAM") == 2
    x, labels = device.put(numbers(6, 3, 8, 8, dtype=np.float32)), np.arange(6) % 3
    optimizer = mc.optim.SGD(model.parameters(), 0.05)
    before = ops.cross_entropy(model(x, train=True), labels)
    before.backward()
    assert all(p.grad.dtype == np.float32 and p.grad.numpy().any() for p in model.parameters())
    optimizer.step()
    assert ops.cross_entropy(model(x, train=True), labels).item() < before.item()
    with fusion(False):
        layer_by_layer = model(x)
    same(model(x), layer_by_layer, 1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_through_a_block_with_simam(train):
    assert check_layer(Sequential([attentive_block(3)]), (3, 4, 5), train=train)
    assert check_layer(Sequential([attentive_block(3)]), (3, 4, 5), train=train, second_order=True)
    assert check_layer(SimAM(), (3, 4, 5), train=train, second_order=True)
