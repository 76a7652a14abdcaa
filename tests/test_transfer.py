"""Transfer learning: the body arrives whole, a frozen one does not move by a bit, a slow one moves slowly."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

import minicnn as mc
from minicnn import models, train, transfer
from minicnn.data import ImageSet, Normalize
from minicnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential

PUBLISHED = Path(os.environ.get("MINICNN_DATA", "")) / "resnet20-12fca82f.th"
NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def photographs(count, classes=3, seed=0, shape=(3, 8, 8)):
    """Noise whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 120, (count, *shape), np.uint8) + (labels * 120 // classes).astype(np.uint8)[:, None, None, None]
    return ImageSet(images, labels.astype(np.int64), tuple(f"c{i}" for i in range(classes)), "photographs")


def small(classes=3, seed=0, dtype=np.float32):
    return Sequential([
        Sequential([Conv2d(4, 3, padding=1, bias=False), BatchNorm2d(), ReLU(),
                    Residual([Conv2d(4, 3, padding=1, bias=False), BatchNorm2d()]), ReLU()]).named("features"),
        GlobalAvgPool2d().named("pool"),
        Sequential([Linear(6), ReLU(), Dropout(0.5), Linear(classes)]).named("classifier")], (3, 8, 8), seed, dtype)


SETS = photographs(48), photographs(24, seed=1)


def pixels(dataset, dtype=np.float32):
    return NORMALIZE(dataset.images, dtype)


# ---------------------------------------------------------------- bodies and heads
@pytest.mark.parametrize("make", [small, lambda: models.resnet20(5, (3, 8, 8)),
                                  lambda: models.vgg11(5, (3, 32, 32), hidden=8, pool=1)])
def test_the_head_sees_the_features(make):
    """The whole model is its head on the features, in the same numbers."""
    model = make()
    path, head = transfer.head_of(model)
    assert path in ("classifier.3", "linear", "classifier.6") and isinstance(head, Linear)
    dataset = photographs(7, shape=model.in_shape)
    seen = []
    found = transfer.features(model, dataset, NORMALIZE, batch_size=3, on_batch=seen.append)
    assert found.shape == (7, *head.in_shape) and seen == [3, 6, 7]
    with mc.no_grad():
        whole = np.concatenate([model(pixels(dataset)[i:i + 3]).numpy() for i in (0, 3, 6)])
    np.testing.assert_allclose(found @ head.weight.numpy().T + head.bias.numpy(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [ReLU(), GlobalAvgPool2d()])
def test_a_model_without_a_head(last):
    model = Sequential([Conv2d(3), last], (3, 8, 8))
    with pytest.raises(ValueError, match="must end in a Linear layer"):
        transfer.head_of(model)


def test_the_body_arrives_and_the_head_stays():
    old, new = small(5, seed=1), small(3, seed=2)
    before = new.state_dict()
    transfer.load_body(new, {"epoch": 3, "model": {f"module.{name}": array for name, array in old.state_dict().items()}})
    for name, array in new.state_dict().items():
        expected = before if name.startswith("classifier.3.") else old.state_dict()
        np.testing.assert_array_equal(array, expected[name], strict=True, err_msg=name)
    state = old.state_dict()
    del state["features.1.running_var"]
    state["features.0.weight"] = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match=r"1 missing: features.1.running_var; 1 mismatched: features.0.weight: \(1, 2\) given"):
        transfer.load_body(new, state)


# ---------------------------------------------------------------- what moves
def test_a_frozen_body_does_not_move_by_a_bit():
    model = small()
    before = model.state_dict()
    trainer = train.train(model, *SETS, train.Config(epochs=5, batch_size=8, body_lr=0.0))
    assert isinstance(trainer, train.HeadTrainer)
    moved = {name for name, array in model.state_dict().items() if array.tobytes() != before[name].tobytes()}
    assert moved == {"classifier.3.weight", "classifier.3.bias"}
    assert trainer.evaluation.correct == train.evaluate(model, SETS[1], trainer.normalize).correct
    assert trainer.evaluation.loss == pytest.approx(train.evaluate(model, SETS[1], trainer.normalize).loss, rel=1e-5)
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]


def test_the_head_moves_as_by_hand():
    """The same numbers as of steps through the whole model at inference, of which the head's gradient is taken."""
    model, twin = small(dtype=np.float64), small(dtype=np.float64)
    config = train.Config(epochs=2, batch_size=8, body_lr=0.0, lr=0.2, schedule="constant", warmup=0, label_smoothing=0.1)
    trainer = train.HeadTrainer(model, *SETS, config, NORMALIZE)
    trainer.fit()
    head = transfer.head_of(twin)[1]
    optimizer = mc.optim.SGD(head.parameters(), 0.2, 0.9, config.weight_decay, nesterov=True)
    for epoch in range(2):
        for images, labels in mc.data.batches(SETS[0], 8, seed=0, epoch=epoch, drop_last=True):
            optimizer.zero_grad()
            mc.ops.cross_entropy(twin(NORMALIZE(images, np.float64)), labels, 0.1).backward()
            optimizer.step()
    for a, b in zip(transfer.head_of(model)[1].parameters(), head.parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12)


def test_the_body_moves_by_its_share_of_the_rate():
    """One step without momentum and decay: every parameter by rate x gradient, the body's by a quarter of that."""
    moved = {}
    for share in (1.0, 0.25):
        model = small(dtype=np.float64)
        before = {name: p.numpy().copy() for name, p in model.named_parameters().items()}
        config = train.Config(epochs=1, batch_size=48, lr=0.1, momentum=0, weight_decay=0, schedule="constant", warmup=0,
                              body_lr=share)
        trainer = train.trainer_of(model, *SETS, config, NORMALIZE)
        trainer.fit()
        assert trainer.history[-1]["lr"] == 0.1
        moved[share] = {name: p.numpy() - before[name] for name, p in model.named_parameters().items()}
    for name, whole in moved[1.0].items():
        assert abs(whole).max() > 0
        share = 1 if name.startswith("classifier.3.") else 0.25
        np.testing.assert_allclose(moved[0.25][name], whole * share, rtol=1e-9, atol=1e-15, err_msg=name)


@pytest.mark.parametrize(("setting", "words"), [
    ({"body_lr": 1.5}, "a share of the learning rate, from 0 to 1"), ({"body_lr": -1}, "at least 0"),
    ({"body_lr": 0, "shift": 1}, "computes what the frozen layers make of an image once"),
    ({"body_lr": 0, "flip": True}, "none can be cropped, shifted, flipped or cut"), ({"body_lr": 0, "cutout": 2}, "flipped or cut"),
    ({"cutout": -1}, "cutout=-1 must be at least 0"),
    ({"body_lr": 0, "crop_area": 0.5}, "none can be cropped"), ({"crop_area": 0}, "a share of an image's area, above 0"),
    ({"crop_area": 1.1}, "and at most 1")])
def test_settings_that_make_no_sense(setting, words):
    with pytest.raises(ValueError, match=words):
        train.Config(**setting)


# ---------------------------------------------------------------- images that fit
def test_grey_images_fill_the_channels_and_any_size_is_made_to_fit():
    pytest.importorskip("PIL", reason="images are resized by Pillow")
    grey = photographs(4, shape=(1, 8, 8))
    found = mc.data.fitted(grey, (3, 8, 8))
    np.testing.assert_array_equal(found.images, np.repeat(grey.images, 3, axis=1), strict=True)
    assert (found.classes, found.name) == (grey.classes, grey.name) and found.labels is grey.labels
    flat = ImageSet(np.full((2, 3, 6, 9), 77, np.uint8), np.zeros(2, np.int64), ("a",), "flat")
    np.testing.assert_array_equal(mc.data.fitted(flat, (3, 12, 12)).images, np.full((2, 3, 12, 12), 77), strict=False)
    wide = np.zeros((1, 1, 4, 8), np.uint8)
    wide[..., 2:6] = 200                                        # the middle square
    middle = mc.data.fitted(ImageSet(wide, np.zeros(1, np.int64), ("a",), "wide"), (1, 4, 4)).images
    np.testing.assert_array_equal(middle, np.full((1, 1, 4, 4), 200))
    with pytest.raises(ValueError, match="flat has images of 3 channels, but the model takes 1"):
        mc.data.fitted(flat, (1, 6, 9))


# ---------------------------------------------------------------- a run
@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "small", small_by_name)
    return tmp_path


def small_by_name(num_classes=3, in_shape=(3, 8, 8), *, seed=0, dtype=np.float32):
    return small(num_classes, seed, dtype)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_that_begins_with_weights_from_elsewhere_resumes_to_the_same_bits(here, share):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    mc.save("w.pth", {"state_dict": small(7, seed=5).state_dict()})

    def begun(out):
        return train.begin("digits", start="w.pth", model="small", normalize=NORMALIZE, out=out, epochs=3, body_lr=share,
                           device="cpu")

    whole = begun("whole")
    whole.fit()
    about = json.loads(Path("whole/config.json").read_text())
    assert about["in_shape"] == [3, 8, 8] and about["normalize"] == NORMALIZE.as_dict() and about["start"].endswith("w.pth")
    assert about["training"]["shift"] == (1 if share else 0)

    cut = begun("cut")

    def stop(trainer):
        if (trainer.epoch, trainer.step) == (1, 7):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.fit(on_step=stop)
    train.resume("cut").fit()
    a, b = mc.load("whole/model.npz")["state_dict"], mc.load("cut/model.npz")["state_dict"]
    assert {name: array.tobytes() for name, array in a.items()} == {name: array.tobytes() for name, array in b.items()}

    trained = train.load_trained("whole")                       # what it says of itself is enough to use it
    held_out = train.held_out(trained.about)
    assert held_out.images.shape[1:] == (3, 8, 8)
    assert train.evaluate(trained.model, held_out, trained.normalize).correct == whole.evaluation().correct


def test_a_run_goes_on_from_another_runs_model(here):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    first = train.begin("digits", model="resnet20", epochs=1, out="first", device="cpu", batch_size=256)
    first.fit()
    second = train.begin("digits", start="first/model.npz", out="second", device="cpu", epochs=1)
    assert second.about["model"] == "resnet20" and second.about["normalize"] == first.about["normalize"]
    assert second.about["in_shape"] == [1, 8, 8]
    for name, array in second.trainer.model.state_dict().items():
        if not name.startswith("linear."):
            np.testing.assert_array_equal(array, first.trainer.model.state_dict()[name], err_msg=name)


def test_published_weights_bring_their_normalisation_and_their_form(here, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    monkeypatch.setattr(models.published, "find", lambda model, weights: {"imagenet": "w.npz"}.get(str(weights), weights))
    mc.save("w.npz", models.resnet20(7, shortcut="B", seed=5).state_dict())
    options = {"model": "resnet20", "epochs": 1, "device": "cpu"}
    run = train.begin("digits", start="imagenet", out="a", **options)
    assert run.about["normalize"] == Normalize(*models.published.IMAGENET_PIXELS).as_dict()
    assert run.about["model_options"] == {"shortcut": "B"} and run.about["in_shape"] == [3, 32, 32]
    assert run.trainer.normalize == Normalize(*models.published.IMAGENET_PIXELS)
    run = train.begin("digits", start="imagenet", out="b", normalize=NORMALIZE, **options)
    assert run.trainer.normalize == NORMALIZE
    run = train.begin("digits", start="w.npz", out="c", **options)          # nobody knows: what gives these images mean 0
    assert run.trainer.normalize == train.normalization_of(run.trainer.train_set)


def test_weights_that_do_not_say_what_they_are_of(here):
    mc.save("w.npz", small().state_dict())
    with pytest.raises(ValueError, match="w.npz does not say what model it is of: name it, too"):
        train.begin("digits", start="w.npz")
    assert [path.name for path in here.iterdir()] == ["w.npz"], "no folder is made for a run that cannot begin"


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="MINICNN_DATA names no folder with resnet20-12fca82f.th")
def test_photographs_help_with_digits(tmp_path):
    """Of 50 digits, a body that knows photographs makes more than one that knows nothing."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    train_set, test_set = (mc.data.fitted(part, (3, 32, 32)) for part in mc.data.digits())
    right = {}
    for way, share in (("tuned", 0.3), ("scratch", 1.0)):
        model = models.resnet20()
        if way == "tuned":
            transfer.load_body(model, mc.load(PUBLISHED))
        config = train.Config(epochs=8, batch_size=10, body_lr=share, weight_decay=1e-3)
        normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        trainer = train.trainer_of(model, train_set.subset(range(50)), test_set, config, normalize)
        trainer.fit()
        right[way] = trainer.evaluation.accuracy
    assert right["tuned"] > 0.5 > right["scratch"]


def test_lists_inside_the_list_are_laid_open():
    model = Sequential([Flatten(), [[Linear(4)], ReLU()], Linear(2)], (3, 2, 2))
    assert [path for path, _ in transfer.steps(model)] == ["0", "1.0.0", "1.1", "2"]
