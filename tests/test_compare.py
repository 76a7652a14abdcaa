"""Plain and residual networks side by side: the same lists with and without the additions, gradients along depth, the whole command."""
import json
import math

import numpy as np
import pytest

import minicnn as mc
from minicnn import train
from minicnn.layers import BatchNorm2d, Branches, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Residual, Sequential
from minicnn.study import compare

RNG = np.random.default_rng(0)


# ---------------------------------------------------------------- a list without some of its layers
def test_without_residuals_it_is_the_plain_list():
    model = mc.models.resnet20(3, (1, 8, 8), dtype=np.float64)
    plain = compare.without(model, Residual)
    assert not any(isinstance(layer, Residual) for _, layer in plain.walk())
    assert sum(isinstance(layer, Residual) for _, layer in model.walk()) == 9, "the given model stays as it was"
    # What is left, written down once more: the same layers one after the other, on the same parameters.
    layers = dict(model.walk())
    x = RNG.standard_normal((4, 1, 8, 8))
    y = mc.Tensor(x)
    for stage in (1, 2, 3):
        if stage == 1:
            y = mc.ops.relu(layers["bn1"](layers["conv1"](y)))
        for block in range(3):
            at = f"layer{stage}.{block}"
            y = mc.ops.relu(layers[f"{at}.bn1"](layers[f"{at}.conv1"](y)))
            y = mc.ops.relu(layers[f"{at}.bn2"](layers[f"{at}.conv2"](y)))
    expected = layers["linear"](mc.ops.global_avg_pool2d(y)).numpy()
    np.testing.assert_allclose(plain(x).numpy(), expected, rtol=1e-9, atol=1e-12)
    with mc.layers.fusion(False):
        np.testing.assert_allclose(plain(x).numpy(), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(model(x).numpy(), expected)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_without_batch_norm():
    model = Sequential([Conv2d(4, 3, padding=1), BatchNorm2d(), ReLU(), Branches([Conv2d(2, 1), BatchNorm2d()], []),
                        Residual([BatchNorm2d(), Conv2d(6, 3, padding=1)], [BatchNorm2d()]), GlobalAvgPool2d(), Linear(3)],
                       (2, 6, 6), dtype=np.float64)
    bare = compare.without(model, BatchNorm2d)
    assert sum(isinstance(layer, BatchNorm2d) for _, layer in model.walk()) == 4
    assert not any(isinstance(layer, BatchNorm2d) for _, layer in bare.walk())
    same = Sequential([Conv2d(4, 3, padding=1), ReLU(), Branches([Conv2d(2, 1)], []), Residual([Conv2d(6, 3, padding=1)]),
                       GlobalAvgPool2d(), Linear(3)], (2, 6, 6), dtype=np.float64)
    for mine, theirs in zip(bare.parameters(), same.parameters(), strict=True):
        theirs.data[...] = mine.data
    x = RNG.standard_normal((3, 2, 6, 6))
    np.testing.assert_allclose(bare(x, train=True).numpy(), same(x, train=True).numpy(), rtol=1e-12)


def test_what_cannot_be_taken_out():
    with pytest.raises(ValueError, match=r"without its MaxPool2d, \(1, 8, 8\) -> \(1, 4, 4\), a list does not fit together"):
        compare.without(Sequential([MaxPool2d(2)], (1, 8, 8)), MaxPool2d)


def test_plain_and_residual_begin_with_the_same_weights():
    plain, residual = (compare.network(20, kind, 10, (1, 8, 8), seed=3) for kind in ("plain", "residual"))
    assert plain.parameters()[0] is not residual.parameters()[0]
    for name, array in plain.state_dict().items():
        assert np.array_equal(array, residual.state_dict()[name]), name


# ---------------------------------------------------------------- gradients along depth
def test_gradient_norms_against_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from torch_models import CifarResNet, take_over

    model = mc.models.resnet20(10, (3, 8, 8), dtype=np.float64)
    net = take_over(CifarResNet(20), model).train()
    images, labels = RNG.standard_normal((6, 3, 8, 8)), RNG.integers(0, 10, 6)
    torch.nn.functional.cross_entropy(net(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
    norms = compare.gradient_norms(model, images, labels)
    expected = {name.removesuffix(".weight"): float(p.grad.square().mean().sqrt()) for name, p in net.named_parameters() if p.ndim == 4}
    assert list(norms) == list(expected) and len(norms) == 19
    assert norms == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_residual_additions_carry_gradients_to_the_first_layer():
    """Without batch norm a deep plain network's gradient has all but vanished, in every layer; the additions keep it."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((16, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, 16)
    sizes = {kind: compare.gradient_norms(compare.without(compare.network(44, kind, 10, (1, 8, 8)), BatchNorm2d), images, labels)
             for kind in ("plain", "residual")}
    assert sizes["residual"]["conv1"] > 1e3 * sizes["plain"]["conv1"] > 0


# ---------------------------------------------------------------- what is said of it
def found(errors, gradients=((1.0, 0.5), (1.0, 2.0)), ended_by=""):
    """A comparison of 20 and 56 layers: {(depth, kind): training error in %}."""
    results = [compare.Result(depth, kind, {"batch norm": dict(zip("ab", gradients[kind == "residual"], strict=True))},
                              [{"epoch": 1, "train_loss": 1.0, "train_accuracy": 1 - error / 100, "test_accuracy": 0.5}]
                              if not math.isnan(error) else [], 1.0, ended_by if math.isnan(error) else "")
               for (depth, kind), error in errors.items()]
    return compare.Comparison("digits", {"epochs": 1, "train_images": 100, "seed": 0}, results)


def test_the_words_say_what_the_numbers_show():
    words = compare.in_words(found({(20, "plain"): 2.0, (56, "plain"): 70.0, (20, "residual"): 3.0, (56, "residual"): 1.0}))
    assert words[0] == ("Plain: with 56 layers 70.0 % of the training images went wrong in the last epoch, with 20 layers 2.0 %: "
                        "the deeper network is worse.")
    assert words[1].endswith("with 20 layers 3.0 %: the deeper network is better.")
    assert words[2].startswith("Of 56 layers, 70.0 % of the training images went wrong without the residual additions and 1.0 % with")
    assert words[3] == ("Before training, with batch norm, the gradient at the first convolution of plain-56 is 2 times that at its "
                        "last one; of ResNet-56, 0.5 times.")
    assert words[-1].startswith("One training each, of 1 epochs on 100 images, with seed 0")


def test_the_words_when_it_comes_out_otherwise():
    words = compare.in_words(found({(20, "plain"): 50.0, (56, "plain"): 10.0, (20, "residual"): 5.0, (56, "residual"): 5.0}))
    assert words[0].endswith("the deeper network is better.") and words[1].endswith("the deeper network is as good.")
    diverged = found({(20, "plain"): 50.0, (56, "plain"): math.nan}, ((math.inf, 0.0), (1.0, 1.0)), "the loss is no number any more")
    assert compare.in_words(diverged)[0].endswith("with 20 layers 50.0 %: the deeper network cannot be compared.")
    assert "the loss is no number any more" in compare.row(diverged.results[1])
    saved = json.loads(diverged.to_json())
    assert saved["networks"][0]["gradients"]["batch norm"] == {"a": None, "b": 0.0} and saved["networks"][1]["history"] == []
    assert compare.in_words(found({(20, "plain"): 50.0}))[0].startswith("One training each")


# ---------------------------------------------------------------- the experiment
@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train_set, test_set = mc.data.digits()
    return train_set.subset(range(96)), test_set.subset(range(40))


def test_the_experiment_and_its_picture(digits, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    config = compare.default_config("digits", 2, batch_size=32)
    begun, steps, done = [], [], []
    result = compare.measure(*digits, config, (8, 14), on_begin=lambda r: begun.append(r.name), on_step=lambda t: steps.append(t.step),
                             on_end=lambda f: done.append(len(f.results)))
    assert begun == ["plain-8", "ResNet-8", "plain-14", "ResNet-14"] and done == [1, 2, 3, 4] and len(steps) == 4 * 2 * 3
    saved = json.loads(result.to_json())
    for network, mine in zip(saved["networks"], result.results, strict=True):
        assert network["name"] == mine.name and len(network["history"]) == 2
        assert {norm: len(sizes) for norm, sizes in network["gradients"].items()} == dict.fromkeys(
            ("batch norm", "no batch norm"), mine.depth - 1)
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
    plain, residual = (result.of(kind)[-1].gradients[compare.WITHOUT_NORM]["conv1"] for kind in ("plain", "residual"))
    assert residual > 1e5 * plain
