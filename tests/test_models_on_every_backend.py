"""Whole models on NumPy, on the stand-in for CuPy, and on CuPy where there is a device: the same numbers everywhere."""
import numpy as np
import pytest

import minicnn as mc
from minicnn import layers, models, ops, optim

MODELS = {
    "resnet20, option A": lambda: models.resnet20(4, (3, 16, 16), dtype=np.float64),
    "resnet20, option B": lambda: models.resnet20(4, (3, 16, 16), shortcut="B", dtype=np.float64),
    "resnet18": lambda: models.resnet18(4, (3, 40, 36), dtype=np.float64),
    "bottlenecks": lambda: models.resnet.resnet(models.resnet.bottleneck, [1, 1, 1, 1], (16, 32, 64, 128), 4, (3, 40, 36),
                                                dtype=np.float64),
    "vgg11_bn": lambda: models.vgg11_bn(4, (3, 32, 32), hidden=16, pool=2, dtype=np.float64),
    "nin": lambda: models.nin(4, (3, 12, 11), dtype=np.float64),
    "googlenet": lambda: models.googlenet(4, (3, 36, 40), dtype=np.float64),
    "vgg11": lambda: models.vgg11(4, (1, 33, 47), hidden=16, pool=1, dtype=np.float64),
}
OPTIMIZERS = {"sgd": lambda p: optim.SGD(p, 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True),
              "adamw": lambda p: optim.AdamW(p, 1e-3)}


def close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(np.abs(value).max(initial=0.0), 1e-6)
        assert np.abs(actual[name] - value).max(initial=0.0) <= 1e-9 * scale, name


def trained(model, put, steps, make_optimizer):
    """Losses, the first step's gradients, and the state after some steps."""
    rng = np.random.default_rng(1)
    optimizer = make_optimizer(model.parameters())
    losses, gradients = [], {}
    for step in range(steps):
        x, labels = rng.standard_normal((4, *model.in_shape)), rng.integers(0, 4, 4)
        optimizer.zero_grad()
        loss = ops.cross_entropy(model(put(x), train=True), labels)
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.numpy() for name, p in model.named_parameters().items() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    with mc.no_grad():
        logits = model(put(x)).numpy()
    return {"losses": np.array(losses), "logits": logits, **{f"d {n}": g for n, g in gradients.items()}, **model.state_dict()}


@pytest.mark.parametrize("name, optimizer", [*((name, "sgd") for name in MODELS), ("resnet20, option B", "adamw")])
def test_a_model_trains_as_on_numpy(device, name, optimizer):
    expected = trained(MODELS[name](), np.asarray, 2, OPTIMIZERS[optimizer])
    model = MODELS[name]().to(device.name)
    assert model.device == device.name
    close(trained(model, device.put, 2, OPTIMIZERS[optimizer]), expected)


def test_a_trajectory_of_twenty_steps(device):
    expected = trained(MODELS["resnet20, option B"](), np.asarray, 20, OPTIMIZERS["sgd"])
    actual = trained(MODELS["resnet20, option B"]().to(device.name), device.put, 20, OPTIMIZERS["sgd"])
    assert np.abs(actual["losses"] - expected["losses"]).max() < 1e-7


def test_frozen_layers_stay_still(device):
    model = MODELS["resnet20, option B"]().to(device.name)
    model.layers[0].freeze()
    model.layers[3].freeze(parameters=True, statistics=False)
    before = model.state_dict()
    trained(model, device.put, 2, OPTIMIZERS["sgd"])
    after = model.state_dict()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert not any(name.startswith("conv1.") for name in moved)
    in_layer1 = {name.rpartition(".")[2] for name in moved if name.startswith("layer1.")}
    assert in_layer1 == {"running_mean", "running_var", "num_batches_tracked"}
    assert "linear.weight" in moved


def test_state_goes_from_one_backend_to_the_other(device, tmp_path):
    here, there = MODELS["vgg11_bn"](), MODELS["vgg11_bn"]().to(device.name)
    trained(there, device.put, 1, OPTIMIZERS["sgd"])
    mc.save(tmp_path / "model.npz", there.state_dict())
    here.load_state_dict(mc.load(tmp_path / "model.npz"))
    assert all(isinstance(value, np.ndarray) for value in there.state_dict().values())
    x = np.random.default_rng(0).standard_normal((2, *here.in_shape))
    close({"logits": there(device.put(x)).numpy()}, {"logits": here(x).numpy()})


def test_a_dropout_mask_is_the_same_everywhere(device):
    model = layers.Sequential([layers.Flatten(), layers.Dropout(0.4), layers.Linear(5)], (2, 4, 4), seed=3, dtype=np.float64)
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4))
    expected = model(x, train=True, rng=np.random.default_rng(7)).numpy()
    actual = model.to(device.name)(device.put(x), train=True, rng=np.random.default_rng(7)).numpy()
    close({"y": actual}, {"y": expected})


def test_an_error_inside_names_the_layer(device):
    model = MODELS["resnet20, option B"]().to(device.name)
    weight = dict(model.walk())["layer2.0.conv1"].weight
    weight.data = weight.data[:, :15]
    with pytest.raises(ValueError, match=r"^layer2\.0\.conv1 \(Conv2d\): .*\(32, 15, 3, 3\)"):
        model(device.put(np.zeros((1, 3, 16, 16))))
