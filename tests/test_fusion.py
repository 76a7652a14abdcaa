"""Neighbours that run as one layer compute what they compute one after the other: values, gradients, statistics, messages."""
from unittest import mock

import numpy as np
import pytest
from witnesses import relative_error

import minicnn as mc
from minicnn import layers, models, ops
from minicnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    FusedBatchNorm2d,
    FusedConv2d,
    FusedResidual,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)

CLASSES = 5


def plain(*body):
    return lambda: Sequential([*body_of(body), GlobalAvgPool2d(), Linear(CLASSES)], (3, 9, 8), 1, np.float64)


def body_of(makers):
    """Layers anew from functions that make them: a layer stands in one model alone."""
    return [maker() for maker in makers]


def conv(channels=4, **how):
    return lambda: Conv2d(channels, 3, padding=1, **how)


def residual(body, shortcut=()):
    return lambda: Residual(body_of(body), body_of(shortcut))


def bottlenecks():
    return models.resnet.resnet(models.resnet.bottleneck, [2, 1], (16, 32), CLASSES, (3, 24, 20), seed=1, dtype=np.float64)


def small_vgg(batch_norm):
    """VGG's stages, narrow and two of them."""
    stages = [[*models.vgg.conv_relu(c, batch_norm), *models.vgg.conv_relu(c, batch_norm), MaxPool2d(2)] for c in (4, 6)]
    return Sequential([Sequential(stages).named("features"), GlobalAvgPool2d(),
                       Sequential(models.vgg.classifier(CLASSES, 8, 0.5))], (3, 13, 12), 1, np.float64)


MODELS = {
    "VGG with batch norm": lambda: small_vgg(True),
    "VGG": lambda: small_vgg(False),
    "vgg11_bn": lambda: models.vgg11_bn(CLASSES, (3, 32, 32), hidden=16, pool=1, seed=1, dtype=np.float64),
    "ResNet, shortcut A": lambda: models.resnet.cifar_resnet(14, CLASSES, (3, 16, 16), shortcut="A", seed=1, dtype=np.float64),
    "ResNet, shortcut B": lambda: models.resnet.cifar_resnet(8, CLASSES, (3, 9, 10), shortcut="B", seed=1, dtype=np.float64),
    "ResNet of bottlenecks": bottlenecks,
    "conv with a bias, norm, relu": plain(conv(bias=True), BatchNorm2d, ReLU),
    "conv without, norm, relu": plain(conv(bias=False), BatchNorm2d, ReLU),
    "conv, norm": plain(conv(), BatchNorm2d, AvgPool2d),
    "conv, relu": plain(conv(), ReLU, conv(bias=False), ReLU),
    "conv, relu, norm": plain(conv(), ReLU, BatchNorm2d),
    "conv, norm, relu, relu, norm, norm, relu": plain(conv(), BatchNorm2d, ReLU, ReLU, BatchNorm2d, BatchNorm2d, ReLU),
    "norm, relu": plain(BatchNorm2d, ReLU, MaxPool2d, BatchNorm2d, ReLU),
    "groups, stride and dilation": plain(conv(6, groups=3, stride=2), BatchNorm2d, ReLU, conv(6, dilation=2, groups=2), ReLU,
                                         conv(groups=2, bias=False), BatchNorm2d),
    "momentum and eps": plain(conv(), lambda: BatchNorm2d(momentum=0.3, eps=0.1), ReLU),
    "residual, relu": plain(conv(), residual([conv(), BatchNorm2d, ReLU, conv(), BatchNorm2d]), ReLU),
    "residual": plain(conv(), residual([conv(), BatchNorm2d]), residual([conv(), ReLU])),
    "a body that ends in relu": plain(conv(), residual([conv(), BatchNorm2d, ReLU]), ReLU),
    "a body that ends in conv": plain(conv(), residual([BatchNorm2d, ReLU, conv()], [conv()]), ReLU),
    "a body of one convolution": plain(conv(), lambda: Residual(conv()(), conv()()), ReLU),
    "an empty body": plain(conv(), residual([]), ReLU, residual([], [conv(), BatchNorm2d]), ReLU),
    "branches": plain(lambda: Branches([conv()(), BatchNorm2d(), ReLU()], [conv()(), ReLU()], [], [MaxPool2d(3, 1, 1), conv()()]),
                      BatchNorm2d, ReLU, conv(), residual([lambda: Branches([conv()(), BatchNorm2d()])]), ReLU),
    "lists inside lists": plain(conv(), lambda: [BatchNorm2d(), ReLU()], ReLU, residual([lambda: [conv()(), BatchNorm2d()]]), ReLU),
    "residual inside residual": plain(conv(), residual([residual([conv(), BatchNorm2d]), ReLU, conv(), BatchNorm2d]), ReLU),
}


def stirred(make):
    """The model, with every parameter, bias and running statistic moved off its beginning."""
    model, rng = make(), np.random.default_rng(7)
    state = model.state_dict()
    for name, array in state.items():
        if array.dtype.kind == "f":
            kind = name.rpartition(".")[2]
            scale = 0.0 if kind == "weight" and array.ndim > 1 else 0.3
            state[name] = array + scale * (abs(rng.standard_normal(array.shape)) if kind == "running_var" else
                                           rng.standard_normal(array.shape))
    model.load_state_dict(state)
    return model


def step(make, fused, train, frozen):
    """Outputs, gradients (of the images too) and the state afterwards."""
    model = stirred(make)
    if frozen:
        model.freeze(parameters=False)
    rng = np.random.default_rng(3)
    x = mc.Tensor(rng.standard_normal((3, *model.in_shape)), requires_grad=True)
    with layers.fusion(fused):
        y = model(x, train=train, rng=np.random.default_rng(4))
        again = model(x, train=train, rng=np.random.default_rng(4))         # with statistics that have moved
        (ops.cross_entropy(y, rng.integers(0, CLASSES, 3)) + (again * again).mean()).backward()
    found = {"output": y.numpy(), "output again": again.numpy(), "gradient of x": x.grad.numpy()}
    found |= {f"gradient of {name}": p.grad.numpy() for name, p in model.named_parameters().items()}
    return found, model.state_dict()


@pytest.mark.parametrize(("train", "frozen"), [(False, False), (True, False), (True, True)],
                         ids=["inference", "training", "frozen statistics"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "vgg11_bn" else ()) for name in MODELS])
def test_fused_and_layer_by_layer_are_the_same(name, train, frozen):
    (found, state), (expected, expected_state) = (step(MODELS[name], fused, train, frozen) for fused in (True, False))
    assert list(found) == list(expected)
    largest = max(abs(array).max() for key, array in expected.items() if key.startswith("gradient"))
    for key, array in expected.items():
        if key.startswith("gradient"):      # those of a bias before a batch norm are 0 but for rounding: beside the largest of all
            assert abs(found[key] - array).max() <= 1e-12 * largest, key
        else:
            assert relative_error(found[key], array) <= 1e-12, key
    assert list(state) == list(expected_state)
    for key, array in expected_state.items():
        assert relative_error(state[key], array) <= 1e-12, key
        if key.endswith("num_batches_tracked"):
            assert state[key] == array == (2 if train and not frozen else 0)
    moved = {key for key, array in stirred(MODELS[name]).state_dict().items() if not np.array_equal(array, state[key])}
    assert bool(moved) == (train and not frozen and any("running" in key for key in state))


def test_float32_too():
    """Where convolutions are by Winograd and statistics in float32, both ways round alike."""
    model = stirred(lambda: models.resnet.cifar_resnet(8, CLASSES, (3, 16, 16), shortcut="B", seed=1))
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    with layers.fusion(False):
        expected = model(x).numpy()
    assert runs_fused(lambda: model(x))
    y = model(x).numpy()
    assert y.dtype == np.float32
    assert relative_error(y, expected) < 1e-5


# ---------------------------------------------------------------- the switch
FUSED = (FusedConv2d, FusedBatchNorm2d, FusedResidual)


def runs_fused(run):
    """Which fused layers ran."""
    ran = set()

    def noting(kind, forward):
        def noted(self, *args):
            ran.add(kind.__name__)
            return forward(self, *args)
        return noted

    patches = [mock.patch.object(kind, "forward", noting(kind, kind.forward)) for kind in FUSED]
    for patch in patches:
        patch.start()
    try:
        run()
    finally:
        for patch in patches:
            patch.stop()
    return ran


@pytest.mark.parametrize("train", [True, False])
def test_it_is_on_and_can_be_switched_off_for_a_block(train):
    model = plain(conv(), BatchNorm2d, ReLU, BatchNorm2d, ReLU, residual([conv(), BatchNorm2d]), ReLU)()
    x = np.random.default_rng(0).standard_normal((2, *model.in_shape))

    def forward():
        model(x, train=train)

    everything = {kind.__name__ for kind in FUSED}
    assert runs_fused(forward) == everything
    with layers.fusion(False):
        assert runs_fused(forward) == set()
        with layers.fusion(True):
            assert runs_fused(forward) == everything
        assert runs_fused(forward) == set()
    with pytest.raises(KeyError), layers.fusion(False):
        raise KeyError
    assert runs_fused(forward) == everything


def test_at_inference_a_basic_block_is_two_convolutions_and_nothing_else():
    """Norm, ReLU and the residual addition are done to the convolutions' blocks: no other op runs over the images."""
    model = models.resnet.cifar_resnet(8, CLASSES, (3, 8, 8), seed=1)
    x = np.zeros((1, 3, 8, 8), np.float32)
    refused = {name: mock.patch.object(getattr(ops, name), "forward", side_effect=AssertionError(f"{name} ran"))
               for name in ("relu", "add_relu", "affine", "conv2d", "normalize")}
    for patch in refused.values():
        patch.start()
    try:
        with mc.no_grad():
            model(x)
    finally:
        for patch in refused.values():
            patch.stop()


# ---------------------------------------------------------------- what is joined
def joined(*body):
    model = Sequential(body_of(body), (4, 8, 8))
    return [(name, type(layer).__name__) for name, layer in layers.fused(model.children())]


def test_joined_layers_are_named_after_their_parts():
    assert joined(conv(), BatchNorm2d, ReLU, MaxPool2d, conv(), ReLU, conv(), BatchNorm2d, BatchNorm2d, ReLU, ReLU) == [
        ("0+1+2", "FusedConv2d"), ("3", "MaxPool2d"), ("4+5", "FusedConv2d"), ("6+7", "FusedConv2d"), ("8+9", "FusedBatchNorm2d"),
        ("10", "ReLU")]
    model = models.resnet.cifar_resnet(8, CLASSES, (3, 8, 8))
    names = [name for name, _ in layers.fused(model.children())]
    assert names == ["conv1+bn1+relu", "layer1", "layer2", "layer3", "avgpool", "linear"]
    block = dict(model.walk())["layer1"].layers[0]
    assert [type(layer).__name__ for _, layer in layers.fused(block.children())] == ["FusedResidual"]
    body = block.layers[0].body
    assert [name for name, _ in layers.fused(body.children())] == ["conv1+bn1+relu1", "conv2+bn2"]


def test_what_nothing_can_be_joined_of_stays_as_it_is():
    for body in ([], [ReLU], [ReLU, conv()], [MaxPool2d, ReLU], [conv(), MaxPool2d, BatchNorm2d, Dropout, ReLU], [conv(), conv()]):
        model = Sequential(body_of(body), (4, 8, 8))
        assert layers.fused(model.children()) == list(model.children())
    assert layers.fused([]) == []


def test_joining_changes_no_list_and_copies_no_parameter():
    model = plain(conv(), BatchNorm2d, ReLU)()
    before = list(model.layers)
    (_, joined), *_ = layers.fused(model.children())
    assert model.layers == before
    assert joined.conv is before[0] and joined.norm is before[1]
    assert joined.in_shape == (3, 9, 8) and joined.out_shape == (4, 9, 8)
    assert list(joined.named_parameters()) == []


class MyConv(Conv2d):
    def forward(self, x, train, rng):
        return super().forward(x, train, rng) * 2.0


class MyNorm(BatchNorm2d):
    def forward(self, x, train, rng):
        return super().forward(x, train, rng) + 1.0


class MyReLU(ReLU):
    def forward(self, x, train, rng):
        return ops.maximum(x, 0.1 * x)


class MyResidual(Residual):
    def forward(self, x, train, rng):
        return super().forward(x, train, rng) * 0.5


class MySequential(Sequential):
    def forward(self, x, train, rng):
        return super().forward(x, train, rng) * 0.5


@pytest.mark.parametrize("body", [
    [lambda: MyConv(4, 3, padding=1), BatchNorm2d], [lambda: MyConv(4, 3), ReLU], [conv(), MyNorm, MyReLU], [conv(), MyReLU],
    [MyNorm, ReLU], [BatchNorm2d, MyReLU], [ReLU, MyReLU], [lambda: MyResidual([]), ReLU], [lambda: Residual([]), MyReLU]])
@pytest.mark.parametrize("train", [False, True])
def test_a_subclass_is_never_joined(body, train):
    """It may compute something else, as these do."""
    model = Sequential(body_of(body), (4, 8, 8), dtype=np.float64)
    assert [layer for _, layer in layers.fused(model.children())] == model.layers
    check_alike(model, train)


@pytest.mark.parametrize("train", [False, True])
def test_what_goes_before_a_subclass_is_joined_without_it(train):
    model = Sequential([Conv2d(4, 3, padding=1), BatchNorm2d(), MyReLU()], (4, 8, 8), dtype=np.float64)
    assert [name for name, _ in layers.fused(model.children())] == ["0+1", "2"]
    check_alike(model, train)


@pytest.mark.parametrize("train", [False, True])
def test_the_list_of_a_residuals_body_may_be_a_subclass(train):
    body = MySequential([Conv2d(4, 3, padding=1), BatchNorm2d()])
    check_alike(Sequential([Residual(body), ReLU()], (4, 8, 8), dtype=np.float64), train)


def check_alike(model, train):
    x = np.random.default_rng(0).standard_normal((2, *model.in_shape))
    with layers.fusion(False):
        expected = model(x, train=train).numpy()
    assert relative_error(model(x, train=train), expected) < 1e-12


def test_dropout_draws_in_the_same_order_in_a_block_with_frozen_statistics():
    model = Sequential([Residual([Dropout(0.5), Conv2d(3, padding=1), BatchNorm2d()], [Dropout(0.5)]), ReLU()], in_shape=(3, 6, 6))
    model.freeze(statistics=True)
    x = np.random.default_rng(0).standard_normal((4, 3, 6, 6), dtype=np.float32)
    with layers.fusion(False):
        apart = model(x, train=True, rng=np.random.default_rng(1))
    together = model(x, train=True, rng=np.random.default_rng(1))
    np.testing.assert_allclose(together.data, apart.data, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- messages and states
def message(run):
    with pytest.raises(ValueError) as error:
        run()
    return str(error.value)


def broken(name):
    """A ResNet whose convolution of this path was given filters for 7 channels, and a batch."""
    model = models.resnet.cifar_resnet(8, CLASSES, (3, 8, 8), shortcut="B", dtype=np.float64)
    weight = dict(model.walk())[name].weight
    weight.data = np.zeros((len(weight), 7, *weight.shape[2:]))
    return model, np.zeros((2, 3, 8, 8))


@pytest.mark.parametrize("name", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.shortcut.0"])
@pytest.mark.parametrize("train", [False, True])
def test_an_error_says_the_path_of_the_layer_whether_fused_or_not(name, train):
    model, x = broken(name)
    found = message(lambda: model(x, train=train))
    assert found.startswith(f"{name} (Conv2d): conv2d") and "+" not in found.partition(" ")[0]
    with layers.fusion(False):
        assert message(lambda: model(x, train=train)).startswith(f"{name} (Conv2d): conv2d: ")


@pytest.mark.parametrize("train", [False, True])
def test_an_error_says_the_whole_name_of_a_layer_whose_name_has_a_plus(train):
    model = Sequential([Conv2d(4, padding=1).named("a+b"), BatchNorm2d().named("c+d"), ReLU(), layers.Flatten().named("e+f"),
                        layers.Linear(2).named("g+h")], in_shape=(3, 4, 4))
    assert message(lambda: model(np.zeros((2, 4, 4, 4), np.float32), train=train)).startswith("a+b (Conv2d): ")
    model.layers[4].weight.data = np.zeros((2, 5), np.float32)
    assert message(lambda: model(np.zeros((2, 3, 4, 4), np.float32), train=train)).startswith("g+h (Linear): ")


def test_states_summaries_and_paths_know_nothing_of_it():
    for make in (MODELS["VGG with batch norm"], MODELS["ResNet, shortcut B"]):
        model = make()
        with layers.fusion(False):
            expected = list(model.state_dict()), str(model.summary()), repr(model), [path for path, _ in model.walk()]
        x = np.zeros((2, *model.in_shape))
        model(x)
        assert (list(model.state_dict()), str(model.summary()), repr(model), [path for path, _ in model.walk()]) == expected


def test_a_state_loaded_after_a_first_run_counts_in_the_next():
    """Nothing of the folded numbers is kept between calls."""
    model = plain(conv(), BatchNorm2d, ReLU)()
    x = np.random.default_rng(0).standard_normal((2, *model.in_shape))
    first = model(x).numpy()
    model.load_state_dict(stirred(plain(conv(), BatchNorm2d, ReLU)).state_dict())
    assert relative_error(model(x), first) > 1e-3
    check_alike(model, False)
