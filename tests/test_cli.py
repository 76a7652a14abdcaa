"""The `minicnn` command, as somebody types it: what it prints, leaves and returns."""
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import test_train
from PIL import Image
from test_train import leavings, same_as, tiny

import minicnn as mc
from minicnn import cli, models, train
from minicnn.testing.table import Result

COMMAND = [sys.executable, "-m", "minicnn"]
squares = test_train.squares        # a fixture


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in, and a model that trains at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    return tmp_path


@pytest.fixture
def minicnn(here, capfd):
    """minicnn("train", "--epochs", 1) -> (status, stdout, stderr)"""
    def run(*words):
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        return status, *capfd.readouterr()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run of the tiny model on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setitem(models._BUILDERS, "tiny", tiny)
        assert cli.main(["train", "--model", "tiny", "--epochs", "3"]) == 0
    return folder


def pictures(folder, classes=("cat", "dog"), count=5, size=(9, 8)):
    """A folder of images: CLASS/NUMBER.png, all grey noise, dogs darker."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(100 * label, 100 + 100 * label, size, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


# ---------------------------------------------------------------- the way it is meant
def test_train_eval_predict(minicnn, here):
    status, out, err = minicnn("train", "--model", "tiny", "--epochs", 3, "--seed", 1)
    assert (status, err) == (0, "")
    assert out.splitlines()[:2] == ["data    digits: 1,437 images to train on, 360 held out; 1 x 8 x 8, 10 classes",
                                    "model   tiny: 414 parameters, float32"]
    assert re.search(r"^device  [CG]PU", out, re.M)
    run = here / "runs" / "digits-tiny-1"
    assert f"folder  {run.relative_to(here)}\n" in out
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.npz", "model.npz", *train.PICTURES}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    correct = rows[-1]["test_correct"]
    accuracy = f"accuracy {correct / 3.6:.2f} % ({correct} of 360)"
    assert re.search(rf"^   3 / 3 .*\({correct} of 360\)$", out, re.M) and f"\n{accuracy}, after " in out

    status, out, err = minicnn("eval")
    assert (status, out.splitlines()[-1], err) == (0, accuracy, "")
    status, out, err = minicnn("eval", "--weights", run / "model.npz", "--batch-size", 100, "--json")
    found = json.loads(out)
    assert (status, found["correct"], found["total"], found["accuracy"]) == (0, correct, 360, correct / 360)
    assert found["loss"] == pytest.approx(rows[-1]["test_loss"], rel=1e-5)

    _, held_out = mc.data.digits()
    names = []
    for i in range(12):
        names.append(f"digit {i}.png")
        Image.fromarray(held_out.images[i, 0]).save(names[-1])
    status, out, err = minicnn("predict", *names, "--json")
    answers = json.loads(out)
    assert status == 0 and [answer["image"] for answer in answers] == names
    model = train.load_trained(run)
    probabilities = train.predict(model.model, held_out.images[:12], model.normalize)
    for answer, p in zip(answers, probabilities, strict=True):
        assert [c["class"] for c in answer["classes"]] == [str(i) for i in np.argsort(-p)[:5]]
        assert [c["probability"] for c in answer["classes"]] == pytest.approx(sorted(p, reverse=True)[:5], rel=1e-4)
    status, out, err = minicnn("predict", *names[:2], "--top", 2, "--run", run)
    lines = out.splitlines()
    assert lines[::3] == names[:2]
    for line, best in zip(lines[1:3], answers[0]["classes"], strict=False):
        found = re.fullmatch(r"  (\d)  +(\S+) %  ?([\u2588-\u258f#]*)", line)
        assert (found[1], found[2]) == (best["class"], f"{100 * best['probability']:.2f}")
        assert abs(len(found[3]) - 30 * best["probability"]) <= 1


@pytest.mark.filterwarnings("always::RuntimeWarning")
@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_weights_from_elsewhere(minicnn, here, trained, suffix):
    """Of a checkpoint that says nothing of its model: the same answers as of the run, if one says what the run says of itself."""
    folder = trained / "runs" / "digits-tiny-1"
    run, state = train.load_trained(folder), mc.load(folder / "model.npz")["state_dict"]
    mc.save(here / f"w{suffix}", {"model": {f"module.{name}": array for name, array in state.items()}, "epoch": 3})
    mean, std = (",".join(map(repr, values)) for values in (run.normalize.mean, run.normalize.std))
    expected = json.loads(minicnn("eval", "--run", folder, "--json")[1])
    elsewhere = ["eval", "--model", "tiny", "--weights", f"w{suffix}", "--data", "digits", "--json"]
    status, out, err = minicnn(*elsewhere, "--mean", mean, "--std", std)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert {**found, "weights": ""} == {**expected, "weights": ""}

    status, out, err = minicnn(*elsewhere)
    assert status == 0 and "divided by 255 and nothing else" in err and json.loads(out)["loss"] != found["loss"]
    overridden = json.loads(minicnn("eval", "--run", folder, "--json", "--mean", "0", "--std", "1")[1])
    assert overridden["loss"] == json.loads(out)["loss"], "the flags override what the run says"
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (here / "names.txt").write_text("\n".join(names) + "\n\n")
    Image.fromarray(mc.data.digits()[1].images[0, 0]).save("digit.png")
    said = ["--mean", mean, "--std", std, "--json"]
    by_run = json.loads(minicnn("predict", "digit.png", "--run", folder, "--json")[1])[0]["classes"]
    for more, name in ((["--classes", "names.txt"], names.__getitem__), ([], str)):
        status, out, err = minicnn("predict", "digit.png", "--model", "tiny", "--in-shape", "1,8,8", "--weights", f"w{suffix}",
                                   *said, *more)
        assert (status, err) == (0, "")
        assert json.loads(out)[0]["classes"] == [{**c, "class": name(int(c["class"]))} for c in by_run]


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_a_runs_model_says_of_itself_what_the_command_does_not(minicnn, here, trained, suffix):
    """Beside --model too: its pixels, its classes, its images; the flags override it, and another model is an error."""
    own = here / f"own{suffix}"
    mc.save(own, mc.load(trained / "runs" / "digits-tiny-1" / "model.npz"))
    Image.fromarray(mc.data.digits()[1].images[0, 0]).save("digit.png")
    for command in (["eval", "--data", "digits"], ["predict", "digit.png"]):
        answers = [minicnn(*command, "--weights", own, *more, "--json") for more in ([], ["--model", "tiny"])]
        assert answers[0] == answers[1] and answers[0][::2] == (0, "")
        overridden = minicnn(*command, "--weights", own, "--model", "tiny", "--json", "--mean", "0", "--std", "1")
        assert overridden[::2] == (0, "") and overridden[1] != answers[0][1]
        status, _, err = minicnn(*command, "--weights", own, "--model", "resnet20")
        assert status == 1 and "says that it is of tiny, not of resnet20: leave the model's name out" in err
    status, _, err = minicnn("finetune", "--weights", own, "--model", "resnet20", "--data", "digits")
    assert status == 1 and "says that it is of tiny, not of resnet20" in err and not (here / "runs").exists()


def test_what_nobody_has_named_is_named_after_cifar10_or_numbered(minicnn, here):
    Image.new("RGB", (32, 32)).save("black.png")
    command = ["predict", "black.png", "--model", "resnet20", "--weights", "w.npz", "--top", "20", "--json", "--mean", "0,0,0",
               "--std", "1,1,1"]
    for count, expected in ((10, set(mc.data.cifar.CIFAR10_CLASSES)), (11, {str(i) for i in range(11)})):
        mc.save("w.npz", mc.models.resnet20(count).state_dict())
        status, out, _ = minicnn(*command)
        assert status == 0 and {c["class"] for c in json.loads(out)[0]["classes"]} == expected
    (here / "two.txt").write_text("cat\ndog\n")
    status, _, err = minicnn(*command, "--classes", "two.txt")
    assert (status, err) == (1, "minicnn: error: two.txt names 2 classes, but w.npz knows 11\n")


def test_the_first_answer_does_not_wait_for_the_last_image(minicnn, here, trained):
    Image.new("L", (8, 8)).save("black.png")
    (here / "bad.png").write_bytes(b"meow")
    status, out, err = minicnn("predict", "black.png", "bad.png", "--run", trained / "runs" / "digits-tiny-1")
    assert status == 1 and out.startswith("black.png\n  ") and "bad.png: not an image" in err


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_classes_are_counted_in_the_last_layer_wherever_it_stands(minicnn, here):
    """A .safetensors file, among others, does not keep the model's order."""
    state = mc.models.resnet18(7, (3, 32, 32)).state_dict()
    mc.save("w.npz", dict(sorted(state.items())))
    assert not [*mc.load("w.npz")][-1].startswith("fc")
    Image.new("RGB", (32, 32)).save("black.png")
    command = ["predict", "black.png", "--model", "resnet18", "--in-shape", "3,32,32", "--weights", "w.npz", "--top", "9", "--json"]
    status, out, _ = minicnn(*command)
    assert status == 0 and {c["class"] for c in json.loads(out)[0]["classes"]} == set("0123456")
    del state["fc.bias"]
    mc.save("w.npz", state)
    status, _, err = minicnn(*command)
    assert status == 1 and "w.npz has no fc.bias of resnet18's last layer" in err


def test_a_mean_of_other_channels_is_told_before_anything_is_made(minicnn, here, trained):
    Image.new("L", (8, 8)).save("black.png")
    for command in (["finetune", "--data", "digits"], ["eval"], ["predict", "black.png"], ["export", "--onnx", "x.onnx"]):
        status, _, err = minicnn(*command, "--weights", trained / "runs" / "digits-tiny-1" / "model.npz", "--mean", "0,0,0",
                                 "--std", "1,1,1")
        assert status == 1 and "mean and std have a number for each of 3 channels, but the model reads 1" in err
    assert not (here / "runs").exists() and not (here / "x.onnx").exists()


@pytest.mark.parametrize("words", ["predict x.png", "eval --data digits", "export --onnx x.onnx", "finetune --data digits"])
@pytest.mark.parametrize("weights", ["imagenet", "https://host/w.pth"])
def test_published_weights_need_a_models_name(minicnn, here, words, weights):
    status, _, err = minicnn(*words.split(), "--weights", weights)
    assert status == 1 and f"{weights} does not say what model it is of: name it, too (--model MODEL)" in err


def test_a_new_head_on_an_old_body(minicnn, here, trained):
    """From a run on the digits to a folder of pictures: the body is the run's to the bit, and what was made says what it is."""
    old = mc.load(trained / "runs" / "digits-tiny-1" / "model.npz")["state_dict"]
    pictures(here / "pets", size=(8, 8), count=10)
    status, out, err = minicnn("finetune", "--weights", trained / "runs" / "digits-tiny-1" / "model.npz", "--data", "pets",
                               "--epochs", 2, "--batch-size", 4)
    assert (status, err) == (0, "")
    assert "all but the last layer, frozen" in out and re.search(r"^   2 / 2 ", out, re.M)
    new = mc.load(here / "runs" / "pets-tiny-1" / "model.npz")["state_dict"]
    for name, array in new.items():
        assert (array.tobytes() == old[name].tobytes()) == (not name.startswith("5.")), name
    status, out, err = minicnn("eval")
    assert (status, err) == (0, "") and "of 4)" in out
    assert re.match(r"pets/cat/0.png\n  (cat|dog)  ", minicnn("predict", "pets/cat/0.png", "--top", 1)[1])
    status, out, err = minicnn("finetune", "--weights", here / "runs" / "pets-tiny-1" / "model.npz", "--data", "digits",
                               "--body-lr", 0.5, "--no-augment", "--epochs", 1)
    assert (status, err) == (0, "") and "at 0.5 of the learning rate" in out
    status, out, err = minicnn("train", "--resume", "runs/digits-tiny-1", "--epochs", 2)
    assert (status, err) == (0, "") and re.search(r"^   2 / 2 ", out, re.M)


def test_every_flag_arrives(minicnn, here):
    status, _, err = minicnn(
        "train", "--model", "tiny", "--data", "digits", "--epochs", 1, "--batch-size", 100, "--lr", 0.02, "--momentum", 0.8,
        "--weight-decay", 1e-3, "--schedule", "step", "--warmup", 0.5, "--label-smoothing", 0.2, "--no-augment",
        "--crop-area", 0.5, "--dtype", "float64", "--device", "cpu", "--threads", 2, "--seed", 7, "--out", "a/b",
        "--checkpoint-every", 5)
    assert (status, err) == (0, "")
    about = json.loads((here / "a" / "b" / "config.json").read_text())
    assert about["training"] == {
        "epochs": 1, "batch_size": 100, "lr": 0.02, "momentum": 0.8, "weight_decay": 1e-3, "schedule": "step", "warmup": 0.5,
        "label_smoothing": 0.2, "body_lr": 1.0, "crop_area": 0.5, "shift": 0, "flip": False, "cutout": 0,
        "precision": "fp32", "cuda_graph": False, "seed": 7}
    assert (about["model"], about["dtype"], about["device"], about["threads"]) == ("tiny", "float64", "cpu", 2)
    assert about["classes"] == list("0123456789") and about["num_classes"] == 10 and about["in_shape"] == [1, 8, 8]
    assert mc.load("a/b/model.npz")["state_dict"]["5.weight"].dtype == np.float64


def test_a_folder_of_images(minicnn, here):
    pictures(here / "pets")
    status, out, err = minicnn("train", "--data", "pets", "--model", "tiny", "--epochs", 2, "--batch-size", 4)
    assert (status, err) == (0, "")
    assert "8 images to train on, 2 held out; 1 x 9 x 8, 2 classes" in out
    os.rename("pets", "beasts")
    status, _, err = minicnn("eval")
    assert status == 1 and "pets" in err
    status, out, _ = minicnn("eval", "--data", "beasts", "--all", "--json")
    assert status == 0 and json.loads(out)["total"] == 10 and json.loads(out)["data"] == "beasts"
    assert "the run was trained on most of its own" in minicnn("eval", "--all")[2]
    assert "digits has test images of its own" in minicnn("eval", "--data", "digits", "--all")[2]
    status, out, _ = minicnn("eval", "--data", "beasts")
    assert status == 0 and "(2 of 2)" in out or "(1 of 2)" in out or "(0 of 2)" in out
    assert re.match(r"beasts/cat/0.png\n  (cat|dog)  ", minicnn("predict", "beasts/cat/0.png")[1])
    Image.new("L", (30, 30)).save("beasts/cat/large.png")
    status, out, _ = minicnn("train", "--data", "beasts", "--image-size", "9,8", "--model", "tiny", "--epochs", 1)
    assert status == 0 and "1 x 9 x 8" in out


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_bad_pictures_are_left_out_if_one_says_so(minicnn, here):
    pictures(here / "pets")
    (here / "pets" / "cat" / "9.png").write_bytes(b"meow")
    status, out, err = minicnn("train", "--data", "pets", "--skip-bad", "--model", "tiny", "--epochs", 1, "--batch-size", 4)
    assert status == 0 and "8 images to train on, 2 held out" in out
    assert "note: 1 of 11 image files cannot be read and are left out: " in err and "pets/cat/9.png" in err
    assert minicnn("eval")[0] == 0
    status, _, err = minicnn("train", "--data", "pets", "--model", "tiny", "--epochs", 1)
    assert status == 1 and "pets/cat/9.png: not an image" in err


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_weights_from_elsewhere_on_pictures_of_any_size(minicnn, here):
    for half in ("train", "test"):
        pictures(here / "pets" / half, size=(9, 12), count=3)
    Image.new("RGB", (20, 10)).save("pets/test/cat/wide.png")
    (here / "pets" / "test" / "dog" / "none.png").write_bytes(b"no picture")
    mc.save("w.npz", mc.models.resnet20(2).state_dict())
    command = ["eval", "--model", "resnet20", "--weights", "w.npz", "--data", "pets", "--mean", "0,0,0", "--std", "1,1,1", "--json"]
    assert "none.png: not an image" in minicnn(*command)[2]
    assert "with --image-size H,W" in minicnn(*command, "--skip-bad")[2]
    status, out, err = minicnn(*command, "--skip-bad", "--image-size", "32,32")
    assert status == 0 and json.loads(out)["total"] == 7 and "1 of 14 image files cannot be read" in err
    status, out, err = minicnn(*command, "--skip-bad", "--image-size", "32,32", "--all")
    assert status == 0 and json.loads(out)["total"] == 13
    status, _, err = minicnn("eval", "--image-size", "32,32")
    assert status == 2 and "a run knows its own" in err


def test_images_of_another_source_must_fit(minicnn, here, trained):
    pictures(here / "pets")
    status, _, err = minicnn("eval", "--run", trained / "runs" / "digits-tiny-1", "--data", "pets")
    assert status == 1 and "pets has the classes cat, dog, but the model knows 0, 1, 2" in err


def test_summary(minicnn):
    status, out, _ = minicnn("summary", "resnet20")
    assert status == 0 and out == f"{models.build('resnet20').summary()}\n" and "269,722" in out
    status, out, _ = minicnn("summary", "resnet20", "--classes", 5, "--in-shape", "1,8,8", "--json")
    found = json.loads(out)
    assert found["parameters"] == sum(layer["parameters"] for layer in found["layers"]) == 269434 - 5 * 65
    assert found["layers"][0] | {"path": "conv1", "out_shape": [16, 8, 8]} == found["layers"][0]


def test_info(minicnn):
    status, out, _ = minicnn("info")
    assert status == 0 and f"minicnn {mc.__version__}" in out and "NumPy" in out and re.search(r"^GPU: ", out, re.M)
    assert re.search(r"^  matplotlib +\d", out, re.M)


def test_gradcheck_shows_what_is_wrong(minicnn, monkeypatch):
    results = [Result("conv2d", 1, 3, 1.5e-9, 0.1, True, ""),
               Result("relu", 2, 1, 0.69, 0.2, False, "input 0 at (1, 2): 3 against 4")]
    def check_everything(on_result):
        for result in results:
            on_result(result)
        return results
    monkeypatch.setattr(cli.table, "check_everything", check_everything)
    status, out, err = minicnn("gradcheck")
    assert (status, err) == (1, "")
    assert re.search(r"^conv2d +first +3 +1.5e-09 +0.10$", out, re.M)
    assert re.search(r"^relu +second +1 +6.9e-01 +0.20  WRONG\n    input 0 at \(1, 2\): 3 against 4\n1 of 2 wrong", out, re.M)
    results.pop()
    status, out, _ = minicnn("gradcheck")
    assert status == 0 and out.endswith("all 1 right in 0 s\n")


# ---------------------------------------------------------------- one line, whatever is typed
def damaged(name, content):
    def make(here):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    return make


def cut_png(here):
    pictures(here / "pets")
    whole = (here / "pets" / "cat" / "1.png").read_bytes()
    (here / "pets" / "cat" / "1.png").write_bytes(whole[:60])


def two_sizes(here):
    pictures(here / "pets")
    Image.new("L", (30, 30)).save(here / "pets" / "cat" / "large.png")


WRONG = [
    # what is typed, the status, what the line says, and what is there before
    ("", 2, "COMMAND", None),
    ("trian", 2, "did you mean train?", None),
    ("train --epoch 3", 2, "did you mean --epochs?", None),
    ("train digits", 2, "unknown: digits", None),
    ("train --epochs three", 2, "argument --epochs: 'three' is not a whole number", None),
    ("train --epochs", 2, "expected one argument", None),
    ("train --schedule cosin", 2, "did you mean cosine?", None),
    ("train --device gpu", 2, "choose from", None),
    ("train --image-size 8", 2, "'8' is not H,W, such as 8,8", None),
    ("train --epochs 0", 2, "'0' is not a whole number of at least 1", None),
    ("train --checkpoint-every -1", 2, "argument --checkpoint-every", None),
    ("train --seed -1", 1, "seed=-1 must be at least 0", None),
    ("train --lr nan", 1, "lr=nan", None),
    ("train --model vgg16bn", 1, "did you mean 'vgg16_bn'?", None),
    ("train --model vgg16", 1, "features", None),                           # five pools are too many for 8 x 8 pixels
    ("train --data digts", 1, "did you mean 'digits'?", None),
    ("train --data cifar10", 1, "--root", None),
    ("train --data mnist --root nowhere", 1, "nowhere: no such folder", None),
    ("train --data mnist --root .", 1, "no MNIST here", None),
    ("train --data mnist --root .", 1, "t10k-images-idx3-ubyte.gz: not compressed as its name says", lambda here: [
        damaged(f"t10k-{what}-ubyte.gz", b"\x1f\x8b\x08 cut short")(here) for what in ("images-idx3", "labels-idx1")]),
    ("train --data empty", 1, "holds no image files", lambda here: (here / "empty").mkdir()),
    ("train --data pets", 1, "not an image that Pillow can read", damaged("pets/cat/1.png", b"meow")),
    ("train --data pets", 1, "pets/cat/1.png: damaged image", cut_png),
    ("train --data pets", 1, "size", two_sizes),
    ("train --data notes.txt", 1, "notes.txt: not a tar archive", damaged("notes.txt", b"milk, eggs")),
    ("train --model tiny --lr 1e30 --warmup 0 --epochs 1", 1, "the learning rate 1e+30 is too high", None),
    ("train --out mine", 1, "mine exists already", damaged("mine/thesis.txt", b"years of work")),
    ("train --out mine", 1, "mine exists already", damaged("mine", b"a file")),
    ("train --out mine/run --model tiny --epochs 1", 1, "mine", damaged("mine", b"a file")),
    ("train --resume", 1, "train one with `minicnn train`", None),
    ("train --resume nowhere", 1, "nowhere is no run's folder: it does not exist", None),
    ("train --resume RUN --lr 1", 2, "--lr cannot change in a run that is resumed", None),
    ("train --resume RUN --no-augment", 2, "--no-augment cannot change", None),
    ("train --resume RUN --epochs 1", 1, "cannot end behind epoch 1", None),
    ("finetune", 2, "--weights", None),
    ("finetune --weights w.pth --data digits", 1, "w.pth does not exist", None),
    ("finetune --weights w.pth --data digits", 1, "w.pth does not say what model it is of: name it, too (--model MODEL)",
     lambda here: mc.save(here / "w.pth", {"a": np.zeros(3)})),
    ("finetune --weights w.pth --model tiny --data digits", 1, "the state does not fit the model",
     lambda here: mc.save(here / "w.pth", {"1.weight": np.zeros(3)})),
    ("finetune --weights w.pth --model tiny --data digits --body-lr 2", 1, "body_lr=2.0 is a share",
     lambda here: mc.save(here / "w.pth", {"a": np.zeros(3)})),
    ("finetune --weights w.pth --model tiny --mean 1", 2, "--mean and --std go together", None),
    ("eval", 1, "no run in ./runs has a model.npz", None),
    ("eval --run nowhere", 1, "nowhere is no run's folder", None),
    ("eval --weights nowhere.npz", 1, "nowhere.npz does not exist", None),
    ("eval --weights notes.npz", 1, "notes.npz is damaged or not an .npz file", damaged("notes.npz", b"milk, eggs")),
    ("eval --weights notes.txt", 1, "the suffix names the format", damaged("notes.txt", b"milk, eggs")),
    ("eval --run RUN --data digts", 1, "did you mean 'digits'?", None),
    ("eval --run RUN --batch-size 0", 2, "argument --batch-size", None),
    ("eval --run RUN --mean 0.5", 2, "--mean and --std go together", None),
    ("eval --run RUN --mean 0.5,x --std 1", 2, "'0.5,x' is not numbers with commas between", None),
    ("eval --run RUN --mean 0.5 --std 0", 1, "every std positive", None),
    ("eval --run RUN --mean 0,0,0 --std 1,1,1", 1, "each of 3 channels, but the model reads 1", None),
    ("eval --model tiny --weights w.pth", 2, "it takes --weights FILE and --data DATA", None),
    ("eval --model tiny --weights w.pth --data digits --run RUN", 2, "and no --run", None),
    ("eval --model tiny --weights w.pth --data digits --mean 0 --std 1", 1, "w.pth does not exist", None),
    ("eval --model tiny --weights w.pth --data digits --mean 0 --std 1", 1, "w.pth is damaged or not a PyTorch checkpoint",
     damaged("w.pth", b"milk, eggs")),
    ("eval --model tiny --weights w.pth --data digits --mean 0 --std 1", 1, "1 mismatched: 5.weight: (2, 3) given, (10, ",
     lambda here: mc.save(here / "w.pth", {"state_dict": {"5.weight": np.zeros((2, 3))}})),
    ("eval --model resnet20 --weights w.pth --data digits --mean 0 --std 1", 1, "bn1.weight, bn1.bias, ... and 92 more",
     lambda here: mc.save(here / "w.pth", {"linear.weight": np.zeros((10, 64)), "linear.bias": np.zeros(10)})),
    ("eval --model resnet2 --weights w.pth --data digits --mean 0 --std 1", 1, "did you mean", None),
    ("predict --run RUN", 2, "IMAGE", None),
    ("predict a.png", 1, "no run in ./runs", None),
    ("predict a.png --model tiny", 2, "it takes --weights FILE, and no --run", None),
    ("predict a.png --run RUN --classes names.txt", 2, "a run knows its own", damaged("names.txt", b"cat\ndog\n")),
    ("predict a.png --model tiny --weights w.pth --classes names.txt", 1, "names.txt: No such file or directory", None),
    ("predict a.png --model tiny --weights w.pth --classes names.txt", 1, "names.txt holds no names",
     damaged("names.txt", b"\xff\n")),
    ("predict a.png --model tiny --weights w.pth --mean 0 --std 1", 1, "it does not say how many classes it knows",
     lambda here: mc.save(here / "w.pth", {"n": 3})),
    ("predict a.png --run RUN", 1, "a.png: no such file", None),
    ("predict a.png --run RUN", 1, "a.png: not an image that Pillow can read", damaged("a.png", b"meow")),
    ("predict . --run RUN", 1, "Is a directory", None),
    ("predict a.png --run RUN --top 0", 2, "argument --top", None),
    ("summary", 2, "MODEL", None),
    ("summary vgg17", 1, "did you mean 'vgg1", None),
    ("summary vgg16 --in-shape 3,224", 2, "'3,224' is not C,H,W, such as 1,8,8", None),
    ("summary vgg16 --in-shape 3,8,8", 1, "features", None),
    ("summary resnet20 --classes 0", 2, "argument --classes", None),
    ("info --all", 2, "unknown: --all", None),
]


@pytest.mark.parametrize("typed, status, words, before", WRONG, ids=[f"{typed}: {words}" for typed, _, words, _ in WRONG])
def test_one_clear_line(minicnn, here, trained, typed, status, words, before):
    if before:
        before(here)
    there = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    found, _, err = minicnn(*typed.replace("RUN", str(trained / "runs" / "digits-tiny-1")).split())
    assert found == status
    assert re.fullmatch(r"minicnn: error: [^\n]+\n", err) and words in err
    assert len(err) < 500 and "Errno" not in err and "strict=" not in err
    assert {path: path.read_bytes() for path in there} == there             # nothing of anybody's is lost


def test_no_gpu_is_one_line(minicnn, monkeypatch):
    no_gpu = mc.backend.Status(False, "the NVIDIA driver finds no GPU", "`nvidia-smi -L` must list one", {"CuPy": "14"})
    monkeypatch.setattr(mc.backend, "cuda_status", lambda: no_gpu)
    status, out, err = minicnn("train", "--device", "cuda")
    assert (status, out) == (1, "")
    assert err == f"minicnn: error: {mc.backend.BackendUnavailable(no_gpu.reason, no_gpu.cure)}\n" and no_gpu.cure in err


def test_warnings_are_notes(minicnn, monkeypatch):
    monkeypatch.setattr(cli.backend, "describe", lambda: warnings.warn("the GPU is out", RuntimeWarning, stacklevel=1) or "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = minicnn("info")
    assert (status, err) == (0, "minicnn: note: the GPU is out\n")


@pytest.mark.parametrize("library, words", [("sklearn.datasets", "digits need scikit-learn, which is not installed: pip install")])
def test_without_a_library_that_a_command_needs(minicnn, monkeypatch, library, words):
    monkeypatch.setitem(sys.modules, library, None)
    status, _, err = minicnn("train")
    assert status == 1 and words in err and err.count("\n") == 1


def test_without_tqdm_and_matplotlib_it_trains(minicnn, here, monkeypatch):
    for library in ("tqdm", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, library, None)
    status, out, err = minicnn("train", "--model", "tiny", "--epochs", 1)
    assert (status, err) == (0, "")
    assert "no progress bar and no pictures: tqdm and matplotlib cannot be found; pip install tqdm matplotlib" in out
    assert out.endswith("in runs/digits-tiny-1: model.npz, metrics.jsonl\n")


def test_dev_mode_shows_where():
    program = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "minicnn", "summary", "vgg99"]
    found = subprocess.run(program, capture_output=True, text=True)
    assert found.returncode == 1 and "Traceback" in found.stderr and "no model is called 'vgg99'" in found.stderr


# ---------------------------------------------------------------- as a process
def test_as_a_module():
    found = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"minicnn {mc.__version__}\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["summary", "resnet110"], ["info"]])
def test_output_to_a_full_disk(words):
    """More than a buffer holds, and less, which only shows when the buffer is emptied."""
    with open("/dev/full", "w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        found = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert (found.returncode, found.stderr) == (1, "minicnn: error: No space left on device\n")


def test_output_to_somebody_who_has_read_enough():
    with subprocess.Popen([*COMMAND, "summary", "resnet110"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# The command on a small data set, in which a step takes a while, and with a limit on the size of files where one is given.
SLOWLY = textwrap.dedent("""
    import resource, sys, time
    sys.path.insert(0, {tests!r})
    import test_train as t
    from minicnn import cli, models, train
    models._BUILDERS["tiny"] = t.tiny
    train.NAMES, train.read_data = ("squares",), lambda *_: t.SETS
    step = train.Trainer._train_step
    train.Trainer._train_step = lambda self, *batch: (time.sleep(0.02), step(self, *batch))
    if {limit}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    sys.exit(cli.main([*sys.argv[1:], "--data", "squares", "--model", "tiny", "--batch-size", "2"]))
""")


def slowly(*words, limit=0):
    return [sys.executable, "-c", SLOWLY.format(tests=str(Path(__file__).parent), limit=limit), *words]


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
def test_ctrl_c_of_a_process_and_resume(squares, minicnn, monkeypatch):
    monkeypatch.setattr(train.Run, "draw", lambda run: [])      # others look at the pictures
    arguments = ["train", "--epochs", "15", "--seed", "3"]
    with subprocess.Popen(slowly(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("   1 / 15"):
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130
    told = re.fullmatch(r"minicnn: interrupted behind (\d+ of 15 epochs(?: and \d+ of 23 steps)?); saved. "
                        r"Go on with `minicnn (train --resume runs/squares-tiny-1)`\n", err)
    assert told, err
    status, out, err = minicnn(*told[2].split())
    assert (status, err) == (0, "") and f"going on behind {told[1]}\n" in out
    assert minicnn(*arguments, "--data", "squares", "--model", "tiny", "--batch-size", 2, "--out", "through")[0] == 0
    same_as(leavings(squares / "through"), squares / "runs" / "squares-tiny-1")

    status, out, _ = minicnn("train", "--resume", "runs/squares-tiny-1")
    assert status == 0 and "this run is finished, with 15 epochs; --epochs" in out
    status, out, _ = minicnn("train", "--resume", "runs/squares-tiny-1", "--epochs", 16)
    assert status == 0 and "going on behind 15 of 16 epochs\n" in out and re.search(r"^  16 / 16 ", out, re.M)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
def test_a_full_disk_for_a_process(squares, minicnn):
    """Files may hold 8 kB here: the configuration and the model fit, the checkpoint does not."""
    found = subprocess.run(slowly("train", "--epochs", "1", limit=8000), capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == ("minicnn: error: cannot write to runs/squares-tiny-1 (File too large); what was saved before is whole: "
                            "mend that, then go on with `minicnn train --resume runs/squares-tiny-1`\n")
    assert {path.name for path in (squares / "runs" / "squares-tiny-1").iterdir()} == {"config.json", "metrics.jsonl", "model.npz"}
    assert minicnn("train", "--resume")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_the_bar_on_a_terminal(here):
    import fcntl
    import pty
    import struct
    import termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    with subprocess.Popen(slowly("train", "--epochs", "2"), stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):      # what a terminal says at its end
            while part := os.read(ours, 4096):
                shown += part
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0 and "   2 / 2 " in out
    assert re.search(r"46/46 .*step/s, loss \d\.\d{4}, \d+\.\d %, lr 0\.\d{4}", shown.decode())


# ---------------------------------------------------------------- the main job
@pytest.mark.slow
def test_the_main_job(here):
    """`minicnn train`: at least 355 of 360 right, within 90 seconds on 2 cores."""
    began = time.monotonic()
    out = subprocess.run([*COMMAND, "train"], check=True, capture_output=True, text=True).stdout
    seconds = time.monotonic() - began
    row = json.loads((here / "runs" / "digits-resnet20-1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["test_correct"] >= 355 and f"({row['test_correct']} of 360)" in out
    assert seconds < 90
    evaluated = subprocess.run([*COMMAND, "eval"], check=True, capture_output=True, text=True).stdout
    assert f"({row['test_correct']} of 360)" in evaluated
