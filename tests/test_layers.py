"""Layers and lists of them: sizes, names, errors that say where, freezing, states, and the same numbers on every backend."""
import numpy as np
import pytest

import minicnn as mc
from minicnn import initialization
from minicnn.autograd import Tensor
from minicnn.backend import device_of
from minicnn.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    Linear,
    LoadReport,
    MaxPool2d,
    MisfitError,
    ReLU,
    Residual,
    Sequential,
    SimAM,
)


def numbers(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def block(channels, stride=1, shortcut=()):
    """A residual block with the names of torchvision's."""
    body = Sequential([Conv2d(channels, 3, stride=stride, padding=1, bias=False).named("conv1"), BatchNorm2d().named("bn1"),
                       ReLU().named("relu1"), Conv2d(channels, 3, padding=1, bias=False).named("conv2"),
                       BatchNorm2d().named("bn2")]).named("")
    return [Residual(body, Sequential(list(shortcut)).named("downsample")).named(""), ReLU().named("relu")]


def stages():
    """An unbuilt model with paths such as layer2.0.conv1 inside."""
    return [Conv2d(4, 3, padding=1, bias=False).named("conv1"), BatchNorm2d().named("bn1"), ReLU(),
            Sequential([block(4)]).named("layer1"),
            Sequential([block(8, 2, [Conv2d(8, 1, stride=2, bias=False), BatchNorm2d()]), block(8)]).named("layer2"),
            MaxPool2d(2), AvgPool2d(2, 1), AdaptiveAvgPool2d(2), Flatten(), Linear(6).named("hidden"), ReLU(), Dropout(0.25),
            Linear(5).named("fc")]


def small_model(dtype=np.float64, seed=0):
    return Sequential(stages(), (3, 16, 16), seed, dtype)


def train(model, steps=3, optimizer=None, seed=0, put=np.asarray):
    """Some steps on made-up images, which `put` brings to the model's device; returns the losses."""
    rng = np.random.default_rng(seed)
    optimizer = optimizer or mc.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    losses = []
    for _ in range(steps):
        x = rng.standard_normal((4, *model.in_shape)).astype(model.dtype)
        optimizer.zero_grad()
        loss = mc.ops.cross_entropy(model(put(x), train=True), rng.integers(0, 5, 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moved(before, after):
    """The names whose arrays differ in any bit."""
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def message_of(action, kind=ValueError):
    """What the error of this kind that `action` must raise says, in one line."""
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- sizes
# (layer, input, output, parameters, multiply-adds an image), worked out by hand
SIZES = [
    (Conv2d(8), (3, 9, 7), (8, 7, 5), 8 * 3 * 9 + 8, 8 * 3 * 9 * 35),
    (Conv2d(8, 3, padding=1, bias=False), (3, 9, 7), (8, 9, 7), 216, 216 * 63),
    (Conv2d(4, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 5, 6), (4, 3, 8), 4 * 2 * 3 + 4, 24 * 24),
    (Conv2d(4, 3, dilation=2), (2, 9, 9), (4, 5, 5), 76, 72 * 25),
    (Conv2d(6, 3, groups=3, padding=1), (3, 4, 4), (6, 4, 4), 6 * 1 * 9 + 6, 54 * 16),
    (Conv2d(5, 7, stride=2, padding=3), (3, 65, 47), (5, 33, 24), 5 * 3 * 49 + 5, 735 * 33 * 24),
    (BatchNorm2d(), (3, 4, 5), (3, 4, 5), 6, 0),
    (Linear(7), (11,), (7,), 84, 77),
    (Linear(7, bias=False), (11,), (7,), 77, 77),
    (ReLU(), (3, 4, 5), (3, 4, 5), 0, 0),
    (ReLU(), (7,), (7,), 0, 0),
    (MaxPool2d(), (3, 7, 6), (3, 3, 3), 0, 0),
    (MaxPool2d(3, 2, 1), (3, 7, 6), (3, 4, 3), 0, 0),
    (MaxPool2d(2, ceil_mode=True), (3, 7, 6), (3, 4, 3), 0, 0),
    (AvgPool2d((3, 1), 1), (3, 7, 6), (3, 5, 6), 0, 0),
    (AdaptiveAvgPool2d((2, 7)), (3, 5, 3), (3, 2, 7), 0, 0),
    (GlobalAvgPool2d(), (3, 5, 4), (3,), 0, 0),
    (Flatten(), (3, 5, 4), (60,), 0, 0),
    (Dropout(), (3, 5, 4), (3, 5, 4), 0, 0),
    (Sequential([]), (3, 5, 4), (3, 5, 4), 0, 0),
    (Sequential([]), (7,), (7,), 0, 0),
    (Sequential([Conv2d(4), [ReLU(), [Flatten(), Linear(2)]]]), (1, 3, 3), (2,), 40 + 10, 36 + 8),
    (Residual([Conv2d(3, padding=1)]), (3, 5, 5), (3, 5, 5), 84, 81 * 25),
    (Residual([Conv2d(6, stride=2, padding=1)], [Conv2d(6, 1, stride=2)]), (3, 5, 5), (6, 3, 3), 168 + 24, 162 * 9 + 18 * 9),
    (Residual(Linear(4), Linear(4)), (3,), (4,), 32, 24),
    (Branches([Conv2d(2, 1)], [], MaxPool2d(3, 1, 1)), (3, 5, 4), (8, 5, 4), 8, 6 * 20),
    (Branches(Linear(4), []), (3,), (7,), 16, 12),
    (SimAM(), (3, 5, 4), (3, 5, 4), 0, 0),
]


@pytest.mark.parametrize("layer, in_shape, out_shape, parameters, multiply_adds", SIZES, ids=lambda v: type(v).__name__)
def test_sizes_follow_from_the_input_and_the_run_agrees(layer, in_shape, out_shape, parameters, multiply_adds):
    assert layer.build(in_shape, np.random.default_rng(0), np.float64) == out_shape
    assert (layer.in_shape, layer.out_shape, layer.dtype) == (in_shape, out_shape, np.float64)
    for flag in (False, True):
        y = layer(numbers(2, *in_shape), train=flag, rng=np.random.default_rng(0))
        assert y.shape == (2, *out_shape)
        assert y.dtype == np.float64
    summary = layer.summary()
    assert (summary.parameters, summary.multiply_adds) == (parameters, multiply_adds)
    assert sum(p.size for p in layer.parameters()) == parameters


def test_a_fully_convolutional_model_runs_at_other_sizes_than_it_was_built_for():
    model = Sequential([Conv2d(4, padding=1), GlobalAvgPool2d(), Linear(2)], (3, 8, 8))
    assert model(numbers(2, 3, 11, 5, dtype=np.float32)).shape == (2, 2)


def test_an_empty_list_is_the_identity():
    x = Tensor(numbers(2, 3, 4, 4), requires_grad=True)
    y = Sequential([], (3, 4, 4), dtype=np.float64)(x, train=True)
    assert y is x
    assert (Sequential([]).state_dict(), Sequential([]).parameters()) == ({}, [])


def test_nothing_is_allocated_after_build():
    model = small_model()
    before = {name: id(p) for name, p in model.named_parameters().items()}
    train(model)
    assert {name: id(p) for name, p in model.named_parameters().items()} == before


# ---------------------------------------------------------------- building, once
def test_building_twice_is_an_error():
    layer = Conv2d(4)
    layer.build((3, 8, 8), np.random.default_rng(0))
    with pytest.raises(RuntimeError, match=r"this Conv2d is built already, for an input of \(3, 8, 8\)"):
        layer.build((3, 8, 8), np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="is built already"):
        small_model().build((3, 16, 16), np.random.default_rng(0))


def test_the_same_layer_in_two_places_is_an_error_that_says_where():
    with pytest.raises(RuntimeError, match=r"^1 \(Conv2d\): this Conv2d is built already.* \* 2 repeats the same object"):
        Sequential([Conv2d(4, 3, padding=1)] * 2, (3, 8, 8))
    shared = ReLU()
    with pytest.raises(RuntimeError, match=r"^layer2\.1 \(ReLU\): this ReLU is built already"):
        Sequential([shared, Sequential([Conv2d(2), shared]).named("layer2")], (3, 8, 8))


@pytest.mark.parametrize("use", [lambda m: m(numbers(2, 3, 8, 8)), lambda m: m.summary(), lambda m: m.freeze(),
                                 lambda m: m.unfreeze(), lambda m: m.astype(np.float64), lambda m: m.to("cpu")])
def test_an_unbuilt_layer_says_so_rather_than_doing_nothing(use):
    for layer in (Conv2d(4), Sequential([Conv2d(4)])):
        message = message_of(lambda: use(layer), RuntimeError)          # noqa: B023 (called at once)
        assert "is not built" in message
        assert "in_shape" in message


@pytest.mark.parametrize("dtype", [np.int64, bool, "int32"])
def test_layers_compute_in_floating_point(dtype):
    with pytest.raises(TypeError, match=f"parameters are float32 or float64, not {np.dtype(dtype)}"):
        Sequential([Conv2d(4)], (3, 8, 8), dtype=dtype)


def test_parameters_are_never_of_half_precision():
    model = Sequential([Conv2d(4)], (3, 8, 8))
    for make in (lambda: Sequential([Conv2d(4)], (3, 8, 8), dtype=np.float16), lambda: model.astype(np.float16)):
        with pytest.raises(TypeError, match="float32 or float64, not float16: half precision is for images, on a GPU, see"):
            make()


def test_parameters_have_the_dtype_asked_for():
    for dtype in (np.float32, np.float64):
        state = small_model(dtype).state_dict()
        assert {a.dtype for name, a in state.items() if not name.endswith("tracked")} == {np.dtype(dtype)}
    assert Sequential([Conv2d(2)], (3, 8, 8)).dtype == np.float32


def test_parameters_follow_from_the_seed_alone():
    def state(seed):
        return small_model(seed=seed).state_dict()
    assert not moved(state(3), state(3))
    weights = {name for name, array in state(3).items() if array.std() > 0}
    assert moved(state(3), state(4)) == weights
    assert len(weights) == 12


@pytest.mark.parametrize("make, words", [
    (lambda: Conv2d(0), "out_channels=0"), (lambda: Conv2d(4, groups=3), "groups=3 must divide out_channels=4"),
    (lambda: Conv2d(4, groups=0), "groups=0"), (lambda: Conv2d(4, 0), "kernel_size=0"),
    (lambda: Conv2d(4, 3, stride=0), "stride=0"), (lambda: Conv2d(4, 3, padding=-1), "padding=-1"),
    (lambda: Conv2d(4, (3, 3, 3)), "kernel_size=(3, 3, 3)"),
    (lambda: Conv2d(4, 3, dilation=1.5), "dilation=1.5"), (lambda: MaxPool2d(0), "kernel_size=0"),
    (lambda: AdaptiveAvgPool2d(0), "output_size=0"), (lambda: Linear(0), "out_features=0"), (lambda: Dropout(1.5), "p=1.5"),
    (lambda: Dropout(-0.1), "p=-0.1")])
def test_wrong_settings_are_refused_where_they_are_written(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize("item, words", [
    (len, "item 1 of a layer list is <built-in function len>, not a layer"), ("relu", "'relu', not a layer"),
    (Conv2d, "not a layer"), ((ReLU(),), "not a layer.*splice"), (None, "None, not a layer")])
def test_a_list_holds_layers_and_lists(item, words):
    with pytest.raises(TypeError, match=words):
        Sequential([ReLU(), item])


# ---------------------------------------------------------------- errors name the layer's path
@pytest.mark.parametrize("layers, in_shape, start, words", [
    ([ReLU(), Conv2d(4)], (3, 2, 8), "1 (Conv2d): ", "image of 2 x 8"),
    ([Sequential([block(4, 1, [Conv2d(4, 1, groups=2)])]).named("layer2")], (3, 8, 8),
     "layer2.0.downsample.0 (Conv2d): ", "groups=2"),
    ([[ReLU(), [Conv2d(4), Linear(3)]]], (3, 8, 8), "0.1.1 (Linear): ", "not (4, 6, 6): put Flatten()"),
    ([Residual([Linear(4)], [Conv2d(3)]).named("sum")], (3,), "sum.shortcut.0 (Conv2d): ", "images (C, H, W), not (3,)"),
    ([Residual([Flatten(), MaxPool2d()])], (3, 8, 8), "0.body.1 (MaxPool2d): ", "not (192,)"),
    ([Sequential(block(8)).named("layer1")], (4, 8, 8), "layer1 (Residual): ",      # the Residual, named "", adds no part
     "adds its body, (4, 8, 8) -> (8, 8, 8), to its shortcut, (4, 8, 8) -> (4, 8, 8)"),
    ([Sequential(block(4, 2)).named("layer1")], (4, 8, 8), "layer1 (Residual): ", "1x1 convolution"),
    ([GlobalAvgPool2d(), BatchNorm2d().named("norm")], (4, 8, 8), "norm (BatchNorm2d): ", "(4,)")])
def test_an_error_while_building_names_the_path(layers, in_shape, start, words):
    message = message_of(lambda: Sequential(layers, in_shape))
    assert message.startswith(start)
    assert words in message
    assert message.count(": ") < 4, f"the path is told once: {message}"


def test_a_residual_alone_names_its_branch():
    residual = Residual([ReLU(), Linear(2)])
    assert message_of(lambda: residual.build((3, 8, 8), np.random.default_rng(0))).startswith("body.1 (Linear): ")


def inner(model, path):
    return dict(model.walk())[path]


def test_an_error_while_running_names_the_path():
    model = small_model()
    assert message_of(lambda: model(numbers(2, 4, 16, 16))).startswith("conv1 (Conv2d): conv2d: ")
    inner(model, "layer2.0.conv1").weight = Tensor(numbers(8, 5, 3, 3))
    message = message_of(lambda: model(numbers(2, 3, 16, 16)))
    assert message.startswith("layer2.0.conv1 (Conv2d): conv2d: ")
    assert "(2, 4, 16, 16)" in message
    assert "(8, 5, 3, 3)" in message


def test_a_shortcut_and_a_body_name_their_path_while_running():
    model = small_model()
    inner(model, "layer2.0.downsample.0").weight = Tensor(numbers(8, 5, 1, 1))
    assert message_of(lambda: model(numbers(2, 3, 16, 16))).startswith("layer2.0.downsample.0 (Conv2d): ")
    assert message_of(lambda: Sequential([BatchNorm2d()], (3, 1, 1), dtype=np.float64)(numbers(1, 3, 1, 1), train=True)).startswith(
        "0 (BatchNorm2d): batch_norm: x (1, 3, 1, 1) has 1 value a channel")


class Broken(Layer):
    """Somebody's layer that fails, in building or in running."""

    def __init__(self, error, at):
        self.error, self.at = error, at

    def infer(self, in_shape, rng, dtype):
        if self.at == "build":
            raise self.error
        return in_shape

    def forward(self, x, train, rng):
        raise self.error


@pytest.mark.parametrize("at", ["build", "run"])
@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, IndexError, KeyError, ZeroDivisionError, AssertionError])
def test_any_error_in_somebodys_layer_names_the_path(kind, at):
    def run():
        model = Sequential([ReLU(), Sequential([Residual([Broken(kind("it fails"), at)])]).named("layer1")], (3,), dtype=np.float64)
        model(numbers(2, 3))
    message = message_of(run, kind)
    assert "layer1.0.body.0 (Broken): " in message
    assert "it fails" in message


def test_a_layer_without_forward_says_so():
    class Unfinished(Layer):
        pass
    with pytest.raises(NotImplementedError, match=r"1 \(Unfinished\)"):
        Sequential([ReLU(), Unfinished()], (3,), dtype=np.float64)(numbers(2, 3))


# ---------------------------------------------------------------- names
def test_unnamed_layers_take_their_index_and_named_ones_their_name():
    names = list(small_model().state_dict())
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert names == [
        "conv1.weight", *(f"bn1.{n}" for n in bn),
        *(f"layer1.0.{n}" for n in ["conv1.weight", *(f"bn1.{n}" for n in bn), "conv2.weight", *(f"bn2.{n}" for n in bn)]),
        *(f"layer2.0.{n}" for n in ["conv1.weight", *(f"bn1.{n}" for n in bn), "conv2.weight", *(f"bn2.{n}" for n in bn),
                                    "downsample.0.weight", *(f"downsample.1.{n}" for n in bn)]),
        *(f"layer2.1.{n}" for n in ["conv1.weight", *(f"bn1.{n}" for n in bn), "conv2.weight", *(f"bn2.{n}" for n in bn)]),
        "hidden.weight", "hidden.bias", "fc.weight", "fc.bias"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    model = small_model()
    assert list(model.named_parameters()) == [n for n in names if not n.endswith(buffers)]
    assert [id(p) for p in model.parameters()] == [id(p) for p in model.named_parameters().values()]
    deeper = Sequential([[ReLU(), [Linear(2)]], Linear(2)], (3,))
    assert list(deeper.state_dict()) == ["0.1.0.weight", "0.1.0.bias", "1.weight", "1.bias"]
    alone = Conv2d(2)
    alone.build((3, 8, 8), np.random.default_rng(0))
    assert list(alone.state_dict()) == ["weight", "bias"]


def test_a_residual_calls_its_branches_body_and_shortcut():
    model = Sequential([Residual([Linear(3)], Linear(3))], (3,))
    assert list(model.state_dict()) == ["0.body.0.weight", "0.body.0.bias", "0.shortcut.weight", "0.shortcut.bias"]


@pytest.mark.parametrize("layers, start", [
    ([Linear(3).named("a"), Linear(3).named("a")], "two layers have the name 'a.bias'"),
    ([Linear(3).named("1"), Linear(3)], "two layers have the name '1.bias'"),
    ([Sequential([Linear(3)]).named(""), Sequential([Linear(3)]).named("")], "two layers have the name '0.bias'"),
    ([Residual(Linear(3).named("x"), Linear(3).named("x")).named("sum")], "sum (Residual): two layers have the name 'x.bias'")])
def test_two_layers_of_one_name_are_an_error(layers, start):
    message = message_of(lambda: Sequential(layers, (3,)))
    assert message.startswith(start)
    assert ".named(" in message


def test_a_list_is_read_as_a_list():
    model = small_model()
    assert len(model) == len(list(model)) == 13
    assert model[0] is model.layers[0]
    assert isinstance(model[-1], Linear)


# ---------------------------------------------------------------- what a layer computes, by its own definition
def test_residual_adds_and_its_gradient_takes_both_ways():
    residual = Residual([Linear(3, bias=False)])
    residual.build((3,), np.random.default_rng(0), np.float64)
    w, x, dy = residual.parameters()[0].numpy(), Tensor(numbers(2, 3), requires_grad=True), numbers(2, 3, seed=1)
    y = residual(x)
    np.testing.assert_allclose(y.numpy(), x.numpy() + x.numpy() @ w.T, rtol=1e-14)
    y.backward(dy)
    np.testing.assert_allclose(x.grad.numpy(), dy + dy @ w, rtol=1e-14)


def test_batch_norm_keeps_pytorchs_statistics():
    layer = BatchNorm2d(momentum=0.25, eps=1e-3)
    layer.build((3, 4, 5), np.random.default_rng(0), np.float64)
    x = numbers(2, 3, 4, 5) * 3 + 1
    y = layer(x, train=True).numpy()
    mean, biased, unbiased = x.mean((0, 2, 3)), x.var((0, 2, 3)), x.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(y, (x - mean[:, None, None]) / np.sqrt(biased[:, None, None] + 1e-3), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_mean, 0.25 * mean, rtol=1e-12)              # momentum is the weight of the new batch
    np.testing.assert_allclose(layer.running_var, 0.75 + 0.25 * unbiased, rtol=1e-12)    # and the stored variance is unbiased
    assert (layer.num_batches_tracked, layer.num_batches_tracked.dtype) == (1, np.int64)
    before = layer.state_dict()
    inference = layer(x).numpy()
    expected = (x - before["running_mean"][:, None, None]) / np.sqrt(before["running_var"][:, None, None] + 1e-3)
    np.testing.assert_allclose(inference, expected, rtol=1e-12, atol=1e-12)
    assert not moved(before, layer.state_dict())
    assert {name: a.shape for name, a in before.items() if a.ndim} == dict.fromkeys(
        ["weight", "bias", "running_mean", "running_var"], (3,))


def test_initial_parameters_are_the_documented_ones():
    conv = Conv2d(64, 5, groups=2)
    conv.build((32, 8, 8), np.random.default_rng(0), np.float64)
    assert conv.weight.numpy().std() == pytest.approx((2 / (64 * 25)) ** 0.5, rel=0.02)         # He et al., fan-out
    assert not conv.bias.numpy().any()
    linear = Linear(300)
    linear.build((400,), np.random.default_rng(0), np.float64)
    for p in linear.parameters():
        assert abs(p.numpy()).max() <= 0.05
        assert p.numpy().std() == pytest.approx(0.05 / 3 ** 0.5, rel=0.1)
    own = Linear(30, weight_init=initialization.normal(0.01))
    own.build((400,), np.random.default_rng(0), np.float64)
    assert own.weight.numpy().std() == pytest.approx(0.01, rel=0.05)
    assert not own.bias.numpy().any()
    other = Conv2d(8, weight_init=initialization.zeros)
    other.build((3, 8, 8), np.random.default_rng(0), np.float64)
    assert not other.weight.numpy().any()


# ---------------------------------------------------------------- no hidden mode: dropout and inference
def masks(model, **options):
    return (model(np.ones((1, 64), np.float32), **options).numpy() == 0).tobytes()


def dropout_model(seed=0):
    return Sequential([Dropout(), [Dropout(0.25)]], (64,), seed)


def test_dropout_repeats_with_the_seed_and_moves_on_with_every_call():
    first, second = dropout_model(), dropout_model()
    drawn = [masks(first, train=True) for _ in range(3)]
    assert drawn == [masks(second, train=True) for _ in range(3)]
    assert len(set(drawn)) == 3
    assert masks(dropout_model(seed=1), train=True) != drawn[0]


def test_dropout_draws_from_the_generator_that_is_passed():
    model = dropout_model()
    state = model.rng.bit_generator.state
    a = masks(model, train=True, rng=np.random.default_rng(7))
    assert a == masks(model, train=True, rng=np.random.default_rng(7))
    assert a != masks(model, train=True, rng=np.random.default_rng(8))
    assert model.rng.bit_generator.state == state


def test_inference_draws_nothing_moves_nothing_and_repeats():
    model = small_model(np.float32)
    train(model)
    x, before, rng = numbers(4, 3, 16, 16, dtype=np.float32), model.state_dict(), model.rng.bit_generator.state
    outputs = {model(x).numpy().tobytes() for _ in range(3)}
    assert len(outputs) == 1
    assert not moved(before, model.state_dict())
    assert model.rng.bit_generator.state == rng
    assert model(x, train=True).numpy().tobytes() not in outputs
    np.testing.assert_allclose(model(x[:1]).numpy(), model(x).numpy()[:1], rtol=1e-4, atol=1e-6)    # no image sees another


def test_dropout_alone_asks_for_a_generator():
    layer = Dropout()
    layer.build((3,), np.random.default_rng(0))
    with pytest.raises(ValueError, match="pass rng="):
        layer(np.ones((1, 3), np.float32), train=True)


# ---------------------------------------------------------------- freezing
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OPTIMIZERS = [lambda p: mc.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
              lambda p: mc.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
              lambda p: mc.optim.AdamW(p, 0.05, weight_decay=0.1)]


@pytest.mark.parametrize("began", [False, True], ids=["from the start", "training had begun"])
@pytest.mark.parametrize("make", OPTIMIZERS, ids=["momentum", "nesterov", "adamw"])
@pytest.mark.parametrize("parameters, statistics", [(True, True), (True, False), (False, True)])
def test_what_is_frozen_does_not_move_by_a_bit_and_the_rest_does(parameters, statistics, make, began):
    model = small_model()
    optimizer = make(model.parameters())
    if began:                                       # now there are gradients, velocities and moving statistics
        train(model, 3, optimizer)
    frozen_part = inner(model, "layer2")
    assert frozen_part.freeze(parameters=parameters, statistics=statistics) is frozen_part
    before = model.state_dict()
    train(model, 4, optimizer, seed=1)
    held = {name for name in before if name.startswith("layer2.") and (statistics if name.endswith(STATISTICS) else parameters)}
    assert moved(before, model.state_dict()) == before.keys() - held


def test_a_frozen_model_holds_everything_and_unfreezing_lets_it_go():
    model = small_model()
    optimizer = OPTIMIZERS[0](model.parameters())
    train(model, 2, optimizer)
    model.freeze()
    before = model.state_dict()
    assert not any(p.requires_grad for p in model.parameters())
    model(numbers(4, 3, 16, 16), train=True)
    optimizer.step()
    assert not moved(before, model.state_dict())
    model.unfreeze(parameters=False)
    model(numbers(4, 3, 16, 16), train=True)
    optimizer.step()
    assert moved(before, model.state_dict()) == {name for name in before if name.endswith(STATISTICS)}
    model.freeze(parameters=False).unfreeze(statistics=False)
    before = model.state_dict()
    train(model, 2, optimizer)
    assert moved(before, model.state_dict()) == {name for name in before if not name.endswith(STATISTICS)}
    model.unfreeze()
    before = model.state_dict()
    train(model, 2, optimizer)
    assert moved(before, model.state_dict()) == before.keys()


def test_freezing_one_kind_leaves_the_other_as_it_was():
    model = small_model()
    model.freeze(statistics=False)
    model.freeze(parameters=False)
    assert not any(p.requires_grad for p in model.parameters())
    model.unfreeze(statistics=False)
    before = model.state_dict()
    train(model, 1)
    assert not {name for name in moved(before, model.state_dict()) if name.endswith(STATISTICS)}


def test_frozen_statistics_normalise_in_training_as_at_inference():
    layer = BatchNorm2d()
    layer.build((3, 4, 4), np.random.default_rng(0), np.float64)
    for i in range(3):
        layer(numbers(4, 3, 4, 4, seed=i) * 2 + 1, train=True)
    x = numbers(4, 3, 4, 4, seed=9)
    assert not np.allclose(layer(x, train=True).numpy(), layer(x).numpy(), atol=0.1)
    layer.freeze(parameters=False)
    assert layer(x, train=True).numpy().tobytes() == layer(x).numpy().tobytes()
    assert layer(x[:1, :, :1, :1], train=True).shape == (1, 3, 1, 1)        # running statistics need no batch


def test_frozen_parameters_get_no_gradient_and_let_it_through():
    model = Sequential([Linear(3).named("a"), Linear(3).named("b"), Linear(3).named("c")], (3,), dtype=np.float64)
    model[1].freeze()
    x = Tensor(numbers(2, 3), requires_grad=True)
    model(x).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [False, False, True, True, False, False]
    w = [model[i].weight.numpy() for i in range(3)]
    np.testing.assert_allclose(x.grad.numpy(), np.ones((2, 3)) @ w[2] @ w[1] @ w[0], rtol=1e-13)


def test_freezing_the_beginning_of_a_model_stops_the_backward_pass_there():
    model = small_model()
    for layer in model.layers[:4]:
        layer.freeze()
    y = model(numbers(2, 3, 16, 16), train=True)
    node, reached = y.node, set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += node.parents.values()
    leaves = {node for node in reached if node.op is None}
    assert leaves == {p.node for p in model.parameters() if p.requires_grad}


# ---------------------------------------------------------------- dtype, rank and device of the input
def test_an_input_of_another_dtype_is_refused_with_the_cure():
    model = Sequential([Conv2d(2)], (3, 8, 8))
    for dtype in (np.float64, np.uint8, np.int64):
        with pytest.raises(TypeError, match=rf"{np.dtype(dtype)} in a layer of float32.*astype\('float32'\)"):
            model(np.zeros((1, 3, 8, 8), dtype))


def test_an_input_of_another_rank_is_refused_with_the_cure():
    model = Sequential([Conv2d(2)], (3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\) has 3 axes.*a batch of \(3, 8, 8\), with 4 axes.*x\[None\]"):
        model(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="5 axes"):
        model(np.zeros((1, 1, 3, 8, 8), np.float32))


def test_an_input_on_another_device_is_refused_with_the_path(device):
    if device.name == "cpu":
        return              # there must be two
    model, x = small_model(np.float32), numbers(2, 3, 16, 16, dtype=np.float32)
    message = message_of(lambda: model(device.put(x)), TypeError)
    assert message.startswith("conv1 (Conv2d): one array is on ")
    assert f't.to("{device}")' in message
    model.to(device.name)
    assert message_of(lambda: model(x), TypeError).startswith("conv1 (Conv2d): one array is on ")


def test_arrays_and_tensors_go_in_and_tensors_come_out():
    model, x = small_model(), numbers(2, 3, 16, 16)
    assert type(model(x)) is Tensor
    np.testing.assert_array_equal(model(x).numpy(), model(Tensor(x)).numpy())


# ---------------------------------------------------------------- astype and to
def test_astype_converts_everything_and_back():
    model = small_model(np.float32)
    train(model, 1)
    before, x = model.state_dict(), numbers(2, 3, 16, 16, dtype=np.float32)
    y = model(x).numpy()
    assert model.astype(np.float64) is model
    assert {a.dtype.name for name, a in model.state_dict().items() if not name.endswith("tracked")} == {"float64"}
    assert all(p.grad is None and p.node.dtype == np.float64 for p in model.parameters())       # leaves of the new type
    np.testing.assert_allclose(model(x.astype(np.float64)).numpy(), y, rtol=1e-3, atol=1e-5)
    train(model, 1)
    model.astype("float32").load_state_dict(before)
    np.testing.assert_array_equal(model(x).numpy(), y)
    train(model, 1)


def test_astype_keeps_what_is_frozen_frozen():
    model = small_model()
    inner(model, "layer2").freeze()
    model.astype(np.float32)
    assert [p.requires_grad for p in model.parameters()] == [not name.startswith("layer2.") for name in model.named_parameters()]


def test_astype_to_integers_is_refused_before_anything_changes():
    model = small_model()
    before = model.state_dict()
    with pytest.raises(TypeError, match="int32"):
        model.astype(np.int32)
    assert not moved(before, model.state_dict())
    assert model.dtype == np.float64
    train(model, 1)


def test_every_layer_computes_the_same_on_every_device(device):
    """Forward, gradients and three steps of each optimiser, against NumPy; and the model comes back unharmed."""
    for make in OPTIMIZERS:
        here, there = small_model(), small_model().to(device.name)
        assert (here.device, there.device) == ("cpu", device.name)
        losses = train(here, 3, make(here.parameters()))
        np.testing.assert_allclose(train(there, 3, make(there.parameters()), put=device.put), losses, rtol=1e-9)
        for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
            assert type(b) is np.ndarray
            np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-9, err_msg=name)
        for name, p in there.named_parameters().items():
            assert device_of(p.data) == device_of(p.grad.data) == device.name
            expected = here.named_parameters()[name].grad.numpy()
            np.testing.assert_allclose(p.grad.numpy(), expected, rtol=1e-7, atol=1e-9, err_msg=name)
        x = numbers(2, 3, 16, 16)
        y = there(device.put(x))
        assert device_of(y.data) == device.name
        np.testing.assert_allclose(y.numpy(), there.to("cpu")(x).numpy(), rtol=1e-9, atol=1e-12)
        assert there.device == "cpu"


def test_freezing_holds_on_every_device(device):
    model = small_model().to(device.name)
    optimizer = OPTIMIZERS[0](model.parameters())
    train(model, 2, optimizer, put=device.put)
    inner(model, "layer2").freeze()
    before = model.state_dict()
    train(model, 2, optimizer, put=device.put)
    assert moved(before, model.state_dict()) == {name for name in before if not name.startswith("layer2.")}


def test_a_state_loads_onto_the_models_device_and_dtype(device):
    source, target = small_model(seed=1), small_model(np.float32).to(device.name)
    target.load_state_dict(source.state_dict())
    assert target.device == device.name
    for name, array in target.state_dict().items():
        np.testing.assert_array_equal(array, source.state_dict()[name].astype(array.dtype))
    train(target, 1, put=device.put)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        small_model().to("tpu")


# ---------------------------------------------------------------- states
def test_a_state_dict_is_a_copy():
    model = small_model()
    state = model.state_dict()
    frozen = {name: a.copy() for name, a in state.items()}
    train(model)
    assert not moved(frozen, state)
    for a in state.values():
        a[...] = 7
    assert not (model.state_dict()["conv1.weight"] == 7).any()
    model.load_state_dict(frozen)
    frozen["conv1.weight"][...] = 7                 # nor does the model keep what it was given
    assert not (model.state_dict()["conv1.weight"] == 7).any()
    assert all(a.flags.c_contiguous and type(a) is np.ndarray for a in model.state_dict().values())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, other = small_model(np.float32), small_model(np.float32, seed=5)
    train(model)
    mc.save(tmp_path / f"model{suffix}", model.state_dict())
    report = other.load_state_dict(mc.load(tmp_path / f"model{suffix}"))
    assert report == ([], [], [])
    assert str(report) == "everything fits"
    assert not moved(model.state_dict(), other.state_dict())
    assert list(other.state_dict()["bn1.num_batches_tracked"].shape) == []
    x = numbers(2, 3, 16, 16, dtype=np.float32)
    np.testing.assert_array_equal(model(x).numpy(), other(x).numpy())


def test_loading_goes_on_training_as_if_nothing_had_happened():
    model, other = small_model(), small_model(seed=5)
    train(model)
    other.load_state_dict(model.state_dict())
    other.rng.bit_generator.state = model.rng.bit_generator.state
    assert train(model, 3, seed=2) == train(other, 3, seed=2)
    assert not moved(model.state_dict(), other.state_dict())


def misfit():
    state = small_model(seed=1).state_dict()
    del state["conv1.weight"], state["layer2.1.bn2.running_var"]
    state["stray.weight"] = np.zeros(3)
    state["fc.weight"] = np.zeros((7, 6))
    state["fc.bias"] = np.zeros(())
    return state


def test_strict_loading_lists_everything_that_does_not_fit_and_changes_nothing():
    model = small_model()
    before = model.state_dict()
    message = message_of(lambda: model.load_state_dict(misfit()))
    for part in ("2 missing: conv1.weight, layer2.1.bn2.running_var", "1 unexpected: stray.weight",
                 "2 mismatched: fc.weight: (7, 6) given, (5, 6) here, fc.bias: () given, (5,) here", "strict=False"):
        assert part in message
    assert not moved(before, model.state_dict())


def test_loading_that_is_not_strict_takes_what_fits_and_reports_the_rest():
    model, source = small_model(), misfit()
    before = model.state_dict()
    report = model.load_state_dict(source, strict=False)
    assert report.missing == ["conv1.weight", "layer2.1.bn2.running_var"]
    assert report.unexpected == ["stray.weight"]
    assert [text.partition(":")[0] for text in report.mismatched] == ["fc.weight", "fc.bias"]
    after = model.state_dict()
    for name in after:
        fits = name in source and source[name].shape == after[name].shape
        np.testing.assert_array_equal(after[name], source[name] if fits else before[name])


def test_checkpoints_of_elsewhere_are_unwrapped():
    source = small_model(seed=1).state_dict()
    for wrapped in ({f"module.{name}": a for name, a in source.items()}, {"state_dict": source, "epoch": 3},
                    {"state_dict": {f"module.{name}": a for name, a in source.items()}},
                    {f"module.module.{name}": a for name, a in source.items()},
                    {"model": {"state_dict": {f"module.{name}": a for name, a in source.items()}, "epoch": 3}, "args": None}):
        model = small_model()
        model.load_state_dict(wrapped)
        assert not moved(source, model.state_dict())


def test_old_files_without_num_batches_tracked_load():
    model = small_model()
    train(model, 2)
    source = {name: a for name, a in small_model(seed=1).state_dict().items() if not name.endswith("tracked")}
    assert model.load_state_dict(source).missing == []
    assert model.state_dict()["bn1.num_batches_tracked"] == 2


def test_a_state_takes_numbers_lists_and_tensors_or_changes_nothing():
    model = Sequential([Linear(2)], (3,))
    model.load_state_dict({"0.weight": [[1, 2, 3], [4, 5, 6]], "0.bias": Tensor(np.array([7.0, 8.0]))})
    np.testing.assert_array_equal(model.state_dict()["0.weight"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(model.state_dict()["0.bias"], [7, 8])
    before = model.state_dict()
    with pytest.raises(MisfitError, match=r"2 mismatched: 0.weight: a dict given, \(2, 3\) here, 0.bias: a list given"):
        model.load_state_dict({"0.weight": {"deep": np.zeros((2, 3))}, "0.bias": ["a", "b"]})
    with pytest.raises(MisfitError, match="1 unexpected: x; 2 mismatched: 0.weight: an array of <U1 given.*0.bias: None given"):
        model.load_state_dict({"0.weight": np.array("w"), "0.bias": None, "x": None})
    report = model.load_state_dict({"0.weight": [[1], [2, 3]], "0.bias": [7.0, 8.0]}, strict=False)
    assert report.mismatched == ["0.weight: a list given, (2, 3) here"]
    assert not moved(before, model.state_dict())


def test_a_long_report_can_be_short():
    report = LoadReport([f"m{i}" for i in range(61)], ["u"], [])
    assert report.words(most=3) == "61 missing: m0, m1, m2, ... and 58 more; 1 unexpected: u"
    assert str(report).count(",") == 60 and LoadReport(["a", "b", "c"], [], []).words(most=3) == "3 missing: a, b, c"


# ---------------------------------------------------------------- the summary
def test_the_summary_counts_layer_by_layer_and_in_total():
    summary = small_model(np.float32).summary()
    rows = {row.path: row for row in summary.rows}
    assert rows["conv1"][1:] == ("Conv2d", (4, 16, 16), 108, 108 * 256, 4 * 256 * 4)
    assert rows["bn1"][1:] == ("BatchNorm2d", (4, 16, 16), 8, 0, 4096)
    assert rows["layer2.0.conv1"][1:] == ("Conv2d", (8, 8, 8), 288, 288 * 64, 8 * 64 * 4)
    assert rows["layer2.0.downsample.0"][1:] == ("Conv2d", (8, 8, 8), 32, 32 * 64, 2048)
    assert rows["hidden"][1:] == ("Linear", (6,), 32 * 6 + 6, 192, 24)
    assert not any(row.kind == "Sequential" for row in summary.rows)
    assert summary.parameters == sum(p.size for p in small_model().parameters()) == sum(row.parameters for row in summary.rows)
    assert summary.multiply_adds == (27648 + 2 * 144 * 256 + (288 + 576 + 32 + 576 + 576) * 64 + 192 + 30)
    assert summary.activation_bytes == sum(int(np.prod(row.out_shape)) * 4 for row in summary.rows)
    assert small_model(np.float64).summary().activation_bytes == 2 * summary.activation_bytes


def test_the_summary_prints_as_a_table():
    model = Sequential([Conv2d(64, padding=1).named("conv1"), [ReLU()], GlobalAvgPool2d(), Linear(1000)], (3, 32, 32))
    lines = str(model.summary()).split("\n")
    assert [line.split() for line in lines] == [
        ["layer", "kind", "output", "parameters", "multiply-adds", "activation", "bytes"],
        [*(["-" * len(part) for part in lines[1].split()])],
        ["conv1", "Conv2d", "64", "x", "32", "x", "32", "1,792", "1,769,472", "262,144"],
        ["1.0", "ReLU", "64", "x", "32", "x", "32", "0", "0", "262,144"],
        ["2", "GlobalAvgPool2d", "64", "0", "0", "256"],
        ["3", "Linear", "1000", "65,000", "64,000", "4,000"],
        lines[1].split(),
        ["total", "66,792", "1,833,472", "528,544"]]
    assert len({len(line) for line in lines}) == 1                      # the last column ends in one line
    assert repr(Sequential([ReLU()], (3,)).summary()) == str(Sequential([ReLU()], (3,)).summary())


def test_a_layer_alone_has_a_summary():
    layer = Linear(2)
    layer.build((3,), np.random.default_rng(0))
    assert "(itself)" in str(layer.summary())


# ---------------------------------------------------------------- repr
@pytest.mark.parametrize("text", [
    "Conv2d(64)", "Conv2d(64, kernel_size=5, stride=2, padding=(1, 2), dilation=2, groups=4, bias=False)", "BatchNorm2d()",
    "BatchNorm2d(momentum=0.2, eps=0.001)", "Linear(10)", "Linear(10, bias=False)", "ReLU()", "MaxPool2d()",
    "MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=True)", "AvgPool2d(kernel_size=(2, 3))", "AdaptiveAvgPool2d((7, 7))",
    "GlobalAvgPool2d()", "Flatten()", "Dropout()", "Dropout(p=0.1)", "SimAM()", "SimAM(e_lambda=0.01)",
    "Sequential([])"])
def test_repr_is_the_call_that_made_it(text):
    assert repr(eval(text)) == text


def test_repr_of_a_built_layer_is_the_same():
    layer = Conv2d(4, bias=False)
    layer.build((3, 8, 8), np.random.default_rng(0))
    assert repr(layer) == "Conv2d(4, bias=False)"


def test_repr_of_lists_shows_names_and_nesting():
    assert repr(Sequential([Conv2d(4).named("conv1"), Residual([ReLU()])])) == "\n".join([
        "Sequential([",
        "    (conv1) Conv2d(4)",
        "    (1) Residual(",
        "        (body) Sequential([",
        "            (0) ReLU()])",
        "        (shortcut) Sequential([]))])"])
    assert repr(Branches(ReLU().named("first"), [])) == "\n".join(["Branches(", "    (first) ReLU()", "    (1) Sequential([]))"])
