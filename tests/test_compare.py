"""Plain and residual networks side by side: the same lists with and without the additions, gradients along depth, trainings."""
import json
import math

import numpy as np
import pytest

import minicnn as mc
from minicnn import train
from minicnn.layers import Residual
from minicnn.study import compare

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train_set, test_set = mc.data.digits()
    return train_set.subset(range(32)), test_set.subset(range(20))


# ---------------------------------------------------------------- the two kinds
def test_a_plain_network_is_the_residual_ones_list_without_the_additions():
    model, plain = (compare.network(20, kind, 3, (1, 8, 8), seed=3).astype(np.float64) for kind in ("residual", "plain"))
    assert not any(isinstance(layer, Residual) for _, layer in plain.walk())
    assert sum(isinstance(layer, Residual) for _, layer in model.walk()) == 9
    theirs = model.state_dict()
    for name, array in plain.state_dict().items():
        assert np.array_equal(array, theirs.pop(name)), name
    assert theirs == {}, "both have the same parameters, and begin with the same weights"
    assert plain.parameters()[0] is not model.parameters()[0]
    # What is left, written down once more: the same layers, one after the other.
    layers = dict(model.walk())
    x = RNG.standard_normal((4, 1, 8, 8))
    y = mc.ops.relu(layers["bn1"](layers["conv1"](x)))
    for block in [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)]:
        y = mc.ops.relu(layers[f"{block}.bn1"](layers[f"{block}.conv1"](y)))
        y = mc.ops.relu(layers[f"{block}.bn2"](layers[f"{block}.conv2"](y)))
    expected = layers["linear"](mc.ops.global_avg_pool2d(y)).numpy()
    np.testing.assert_allclose(plain(x).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(model(x).numpy(), expected)


def test_gradients_along_depth_against_pytorch(digits):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_models import CifarResNet, take_over

    images, labels = digits[0].images[:compare.GRADIENT_IMAGES], digits[0].labels[:compare.GRADIENT_IMAGES]
    normalize = train.normalization_of(digits[0])
    found = compare.gradients_before(14, digits[0], normalize, seed=0)
    net = take_over(CifarResNet(14, channels=1), compare.network(14, "residual", 10, (1, 8, 8))).train()
    norms = []

    def note(module, inputs, y):
        y.register_hook(lambda dy: norms.append(float(dy.norm())))

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(note)
    torch.nn.functional.cross_entropy(net(torch.from_numpy(normalize(images))), torch.from_numpy(labels)).backward()
    assert found["residual"]["batch norm"] == pytest.approx(norms[::-1], rel=1e-3) and len(norms) == 14
    assert all(len(found[kind][norm]) == 14 for kind in ("plain", "residual") for norm in ("batch norm", "no batch norm"))


def test_residual_additions_carry_gradients_to_the_first_layer(digits):
    """Without batch norm a deep plain network's gradient has all but vanished at the image; with the additions it has not."""
    found = compare.gradients_before(44, digits[0], train.normalization_of(digits[0]), seed=0)
    plain, residual = (found[kind]["no batch norm"] for kind in ("plain", "residual"))
    assert residual[0] / residual[-1] > 1e3 * plain[0] / plain[-1] > 0


# ---------------------------------------------------------------- what is said of it
def found(errors, gradients=((1.0, 0.5), (1.0, 2.0)), ended_by=""):
    """A comparison of 20 and 56 layers: {(depth, kind): training error in %}."""
    results = [compare.Result(depth, kind, {"batch norm": list(gradients[kind == "residual"])},
                              [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 1 - error / 100, "test_accuracy": 0.5}]
                              if not math.isnan(error) else [], 1.0, ended_by if math.isnan(error) else "")
               for (depth, kind), error in errors.items()]
    return compare.Comparison("digits", {"epochs": 1, "train_images": 100, "seed": 0}, results)


def test_the_words_say_what_the_numbers_show():
    words = compare.in_words(found({(20, "plain"): 2.0, (56, "plain"): 70.0, (20, "residual"): 3.0, (56, "residual"): 1.0}))
    assert words[0] == ("Plain: with 56 layers 70.0 % of the training images went wrong in the last epoch, with 20 layers 2.0 %: "
                        "the deeper network is worse.")
    assert words[1].endswith("with 20 layers 3.0 %: the deeper network is better.")
    assert words[2].startswith("Of 56 layers, 70.0 % of the training images went wrong without the residual additions and 1.0 % ")
    assert words[3] == ("Before training, with batch norm, the gradient at the first convolution of plain-56 is 2 times that at "
                        "its last layer; of ResNet-56, 0.5 times.")
    assert words[-1].startswith("One training each, of 1 epochs on 100 images, with seed 0")


@pytest.mark.parametrize(("first", "last", "words"), [
    (2190.4, 1.0, "2,190 times"), (4.59e-6, 1.0, "1/218,000 of"), (0.25, 1.0, "0.25 times"), (67.21, 1.0, "67.2 times"),
    (1.0, 0.0, "out of all proportion to")])
def test_proportions(first, last, words):
    one = found({(20, "plain"): 1.0, (20, "residual"): 1.0}, ((first, last), (1.0, 1.0)))
    assert f"the gradient at the first convolution of plain-20 is {words} that at its last layer" in " ".join(compare.in_words(one))


def test_the_words_when_it_comes_out_otherwise():
    words = compare.in_words(found({(20, "plain"): 50.0, (56, "plain"): 10.0, (20, "residual"): 5.0, (56, "residual"): 5.0}))
    assert words[0].endswith("the deeper network is better.") and words[1].endswith("the deeper network is as good.")
    why = "the loss is no number any more"
    diverged = found({(20, "plain"): 50.0, (56, "plain"): math.nan}, ((math.inf, 0.0), (1.0, 1.0)), why)
    assert compare.in_words(diverged)[0].endswith("with 20 layers 50.0 %: the deeper network cannot be compared.")
    assert why in compare.row(diverged.results[1])
    saved = json.loads(diverged.to_json())
    assert saved["networks"][0]["gradients"]["batch norm"] == [None, 0.0] and saved["networks"][1]["history"] == []
    assert compare.in_words(found({(20, "plain"): 50.0}))[0].startswith("One training each")


# ---------------------------------------------------------------- the experiment
def test_the_experiment_and_its_picture(digits, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = compare.default_config("digits", 2, batch_size=16)
    begun, steps, done = [], [], []
    result = compare.measure(*digits, config, (8, 14), on_begin=lambda result: begun.append(result.name),
                             on_step=lambda trainer: steps.append(trainer.step), on_end=lambda all: done.append(len(all.results)))
    assert begun == ["plain-8", "ResNet-8", "plain-14", "ResNet-14"] and done == [1, 2, 3, 4] and len(steps) == 4 * 2 * 2
    saved = json.loads(result.to_json())
    for network, mine in zip(saved["networks"], result.results, strict=True):
        assert network["name"] == mine.name and len(network["history"]) == 2
        assert {norm: len(sizes) for norm, sizes in network["gradients"].items()} == dict.fromkeys(
            ("batch norm", "no batch norm"), mine.depth)
    # The same training by itself: nothing of one network reaches the next.
    alone = train.Trainer(compare.network(14, "residual", 10, (1, 8, 8)), *digits, config)
    assert alone.fit() == result.results[3].history
    compare.draw(result, [tmp_path / "c.png", tmp_path / "c.svg"])
    assert (tmp_path / "c.png").stat().st_size > 20_000
    svg = (tmp_path / "c.svg").read_text()
    assert svg.count("<svg") == 1 and svg.rstrip().endswith("</svg>")


def test_a_loss_that_is_no_number_is_a_result(digits):
    result = compare.measure(*digits, compare.default_config("digits", 1, lr=1e30), (8,))
    assert all("the loss is no number any more" in r.ended_by and r.history == [] for r in result.results)
    assert compare.in_words(result)


def test_depths_that_no_network_has():
    with pytest.raises(ValueError, match="depth=21 must be 6 n \\+ 2"):
        compare.check_depths([20, 21])


@pytest.mark.slow
def test_degradation_on_the_digits():
    """The finding of the paper, in small: what `minicnn study compare` shows by default."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    result = compare.measure(*mc.data.digits(), compare.default_config("digits"))
    errors = {r.name: r.error("train") for r in result.results}
    assert errors["plain-56"] > errors["plain-20"] + 10
    assert errors["ResNet-56"] < errors["plain-56"] / 2
    plain, residual = (compare.first_to_last(result.of(kind)[-1], compare.WITHOUT_NORM) for kind in ("plain", "residual"))
    assert residual > 1e5 * plain
