"""`minicnn study attribute` and `minicnn study compare`, as somebody types them."""
import base64
import importlib.util
import json
import re

import numpy as np
import pytest
import test_cli
import test_train
from PIL import Image

import minicnn as mc
from minicnn import models, train
from minicnn.study import compare, grad_cam, saliency

here, minicnn = test_cli.here, test_cli.minicnn         # fixtures

PICTURES = {"image.png", "saliency.png", "grad_cam.png", "receptive_field.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has seen the digits once, and a digit that it has not seen, as a file."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._BUILDERS, "tiny", test_train.tiny)
        train.begin(model="tiny", epochs=1, batch_size=128, out=folder / "digits-tiny-1").fit()
    Image.fromarray(mc.data.digits()[1].images[0, 0]).save(folder / "digit.png")
    return folder / "digits-tiny-1", folder / "digit.png"


# ---------------------------------------------------------------- attribute
def test_attribute(minicnn, here, run):
    folder, digit = run
    status, out, err = minicnn("study", "attribute", digit, "--run", folder, "--class", 3)
    assert (status, err) == (0, "")
    made = here / "studies" / "digit-tiny-1"
    assert {path.name for path in made.iterdir()} == {*PICTURES, "maps.npz", "attribution.json"}
    assert f"in {made.relative_to(here)}: image.png, " in out
    # The maps are those of the functions, for the class that was asked about.
    model, maps = train.load_trained(folder), mc.load(made / "maps.npz")
    image = mc.data.read_image(digit, (1, 8, 8))
    x = model.normalize(image, np.float32)
    np.testing.assert_array_equal(maps["saliency"], saliency(model.model, x, 3))
    np.testing.assert_array_equal(maps["grad_cam"], grad_cam(model.model, x, 3).heat)
    assert maps["effective_receptive_field"].shape == (8, 8) and maps["gradient"].shape == (1, 8, 8)
    about = json.loads((made / "attribution.json").read_text())
    probabilities = train.predict(model.model, image[None], model.normalize)[0]
    assert (about["class"], about["taken_for"]) == ("3", str(probabilities.argmax()))
    assert about["probability"] == pytest.approx(probabilities[3])
    assert re.match(rf"{re.escape(str(digit))}: taken for {probabilities.argmax()} \(\S+ %\); asked about 3 \(", out)
    half = int(re.search(r"of the class 3; half of it lies in (\d+) of 64 pixels", out)[1])
    falling = np.sort(maps["saliency"].ravel())[::-1]
    assert falling[:half].sum() >= falling.sum() / 2 > falling[:half - 1].sum()
    shown = np.asarray(Image.open(made / "image.png"))
    assert shown.shape == (256, 256, 3) and np.array_equal(shown[16::32, 16::32, 0], image[0])


def test_attribute_elsewhere(minicnn, here, run):
    folder, digit = run
    where = ["--layer", "0", "--position", "0,2", "--out", "mine"]
    status, out, err = minicnn("study", "attribute", digit, "--run", folder, *where, "--json")
    assert (status, err) == (0, "")
    about = json.loads(out)
    assert about["folder"] == "mine" and about["layer"] == "0"
    assert about["class"] == about["taken_for"]
    field = about["receptive_field"]                            # of a 3 x 3 convolution with stride 2, on 8 x 8
    assert field["position"] == [0, 2] and field["size"] == [3, 3]
    assert (field["rows"], field["columns"]) == ([0, 3], [4, 7])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--class", "11"], "the model knows no class '11'; did you mean '1'?"),
    (["--class", "seven"], "the model knows no class 'seven': it knows 0, 1, 2, "),
    (["--layer", "layer9"], "the model has no layer 'layer9'; its layers are "),
    (["--position", "9,9"], "position (9, 9) is outside the layer's map of "),
    (["--position", "3"], "'3' is not ROW,COLUMN, such as 3,3"),
    (["--out", "full"], "full exists already, and nothing is written over: name a new folder with --out"),
    (["--run", "nowhere"], "nowhere is no run's folder")])
def test_attribute_says_what_is_wrong(minicnn, here, run, arguments, message):
    folder, digit = run
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    status, out, err = minicnn("study", "attribute", digit, *([] if "--run" in arguments else ["--run", folder]), *arguments)
    assert status != 0 and out == "" and err.startswith("minicnn: error: ") and err.count("\n") == 1 and message in err
    assert not (here / "studies").exists() and [path.name for path in (here / "full").iterdir()] == ["notes.txt"]


def test_attribute_of_a_bad_file(minicnn, here, run):
    (here / "bad.png").write_bytes(b"no image")
    status, _, err = minicnn("study", "attribute", "bad.png", "--run", run[0])
    assert (status, err) == (1, "minicnn: error: bad.png: not an image that Pillow can read; remove it or replace it\n")
    assert not (here / "studies").exists()


def test_attribute_of_a_file_with_a_hostile_name(minicnn, here, run):
    name = "<b>&'; rm -rf *.png"
    (here / name).write_bytes(run[1].read_bytes())
    status, _, err = minicnn("study", "attribute", name, "--run", run[0], "--out", "out")
    assert (status, err) == (0, "") and {path.name for path in (here / "out").iterdir()} > PICTURES


def test_the_report_shows_the_maps_too(minicnn, here, run):
    pytest.importorskip("latex2mathml", reason="the report typesets its equations with latex2mathml")
    status, _, err = minicnn("study", "--run", run[0], "--image", run[1], "--label", 3, "--out", "page.html")
    assert (status, err) == (0, "")
    index = json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', (here / "page.html").read_text())[1])
    assert [picture["title"] for picture in index["pictures"]] == ["Saliency", "Grad-CAM", "Receptive field"]
    minicnn("study", "attribute", run[1], "--run", run[0], "--class", 3, "--out", "maps")
    for picture, name in zip(index["pictures"][:2], ("saliency", "grad_cam"), strict=True):
        assert base64.b64decode(picture["png"]) == (here / "maps" / f"{name}.png").read_bytes()
    assert "of the class 3" in index["pictures"][0]["caption"]


# ---------------------------------------------------------------- compare
@pytest.fixture
def few(monkeypatch):
    """The command's own networks and data, but few images."""
    train_set, test_set = mc.data.digits()
    monkeypatch.setattr(train, "read_data", lambda source, root: (train_set.subset(range(64)), test_set.subset(range(32))))


def test_compare(minicnn, here, few):
    status, out, err = minicnn("study", "compare", "--depths", "8,14", "--epochs", 1, "--batch-size", 32, "--seed", 2)
    assert (status, err) == (0, "")
    made = here / "studies" / "compare-digits-1"
    assert {path.name for path in made.iterdir()} == {"comparison.json", "comparison.png", "comparison.svg"}
    found = json.loads((made / "comparison.json").read_text())
    assert [network["name"] for network in found["networks"]] == ["plain-8", "ResNet-8", "plain-14", "ResNet-14"]
    assert found["settings"]["seed"] == 2 and found["settings"]["depths"] == [8, 14] and found["settings"]["batch_size"] == 32
    rows = re.findall(r"^(\S+-\d+) +(\S+) +(\S+) % +(\S+) % +\d+$", out, re.M)
    for (name, loss, error, held_out), network in zip(rows, found["networks"], strict=True):
        last = network["history"][-1]
        assert name == network["name"] and loss == f"{last['train_loss']:.4f}"
        assert (error, held_out) == tuple(f"{100 * (1 - last[part]):.2f}" for part in ("train_accuracy", "test_accuracy"))
    assert "Plain: with 14 layers " in out and "One training each, of 1 epochs on 64 images, with seed 2" in out


def test_compare_without_matplotlib(minicnn, here, few, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest))
    status, out, _ = minicnn("study", "compare", "--depths", "8", "--epochs", 1, "--out", "x")
    assert status == 0 and "no picture: matplotlib cannot be found; pip install matplotlib" in out
    assert [path.name for path in (here / "x").iterdir()] == ["comparison.json"]


def test_what_is_done_stays_where_it_is_interrupted(minicnn, here, few, monkeypatch):
    before = train.Trainer.fit

    def fit(trainer, **hooks):
        if any(isinstance(layer, mc.layers.Residual) for _, layer in trainer.model.walk()):
            raise KeyboardInterrupt
        return before(trainer, **hooks)
    monkeypatch.setattr(train.Trainer, "fit", fit)
    status, _, err = minicnn("study", "compare", "--depths", "8", "--epochs", 1, "--out", "x")
    assert (status, err) == (130, "minicnn: interrupted; the networks that are done are in x\n")
    assert [network["name"] for network in json.loads((here / "x" / "comparison.json").read_text())["networks"]] == ["plain-8"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--depths", "20,21"], "depth=21 must be 6 n + 2"), (["--depths", "20;56"], "'20;56' is not a whole number of at least 1"),
    (["--data", "cifar10"], "name their folder with --root FOLDER"), (["--data", "cifar11"], "did you mean 'cifar10'?"),
    (["--lr", "-1"], "lr=-1.0 must be at least 0"), (["--epoch", "1"], "did you mean --epochs?")])
def test_compare_says_what_is_wrong(minicnn, here, arguments, message):
    status, out, err = minicnn("study", "compare", *arguments)
    assert status != 0 and out == "" and err.startswith("minicnn: error: ") and err.count("\n") == 1 and message in err
    assert not (here / "studies").exists()


def test_a_slip_in_a_command_of_two_words(minicnn):
    status, out, err = minicnn("study", "atribute", "digit.png")
    assert (status, out) == (2, "")
    assert err == "minicnn: error: no command 'study atribute'; did you mean `minicnn study attribute`?\n"
    status, _, err = minicnn("study", "resnt20")
    assert status == 1 and "did you mean 'resnet20'?" in err


def test_a_share_of_a_set():
    from minicnn.study.commands import FEW_IMAGES, share_of
    sets = mc.data.digits()
    assert share_of(sets, "digits", None, 0) is sets
    few = share_of(sets, "digits", 100, 0)
    assert [len(part) for part in few] == [100, 50] and len(set(few[0].labels)) == 10
    assert [len(part) for part in share_of(sets, "cifar10", None, 0)] == [1437, 360] and FEW_IMAGES > 1437
    assert compare.default_config("cifar10").flip and not compare.default_config("digits").flip
    assert "tiny" not in models.names()
