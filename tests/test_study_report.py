"""What the page is made of, without a browser: where steps stand, what is taken of an array, one file, and nothing that escapes."""
import base64
import html.parser
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from study_page import CLASSES, HOSTILE, model, subject

import minicnn as mc
from minicnn import cli
from minicnn.layers import BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Residual, Sequential
from minicnn.study import depth, pictures
from minicnn.study.formulas import FORMULAS, mathml
from minicnn.study.layout import layout
from minicnn.study.report import MARK, Report
from minicnn.study.steps import of_op, source
from minicnn.study.subject import choose

pytest.importorskip("latex2mathml", reason="the equations need latex2mathml")


@pytest.fixture(scope="module")
def report():
    return Report.of(subject())


# ---------------------------------------------------------------- the file
class Reader(html.parser.HTMLParser):
    """Takes a page apart: the elements, the JSON, what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.data, self.fetched, self.open = [], {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append(tag)
        self.fetched += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith(("#", "data:"))]
        self.open = attributes.get("id") if attributes.get("type") == "application/json" else None

    def handle_data(self, text):
        if self.open is not None:
            self.data[self.open] = self.data.get(self.open, "") + text

    def handle_endtag(self, tag):
        self.open = None


def test_one_file_that_fetches_nothing_and_lets_no_name_out(report):
    text = report.html()
    assert text.isascii() or not re.search("[\u2028\u2029]", text)
    page = Reader(text)
    assert page.fetched == [] and MARK in text[:400]
    assert page.elements.count("script") == 2 + len(report.tape.steps) + len(report.tape.values) and "img" not in page.elements
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/1998/Math/MathML", "http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    data = {name: json.loads(found) for name, found in page.data.items()}
    index = data["index"]
    assert index["about"]["label"] == HOSTILE and index["about"]["image"] == HOSTILE + ".png"
    assert index["steps"][0]["path"] == HOSTILE and {name for name, _ in index["about"]["classes"]} == set(CLASSES)
    assert len(index["steps"]) == len(report.tape.steps) and {f"s{i}" for i in range(len(report.tape.steps))} < set(data)


def test_every_step_is_checked(report):
    assert report.checked > 500 and report.wrong == 0
    for step, shown in zip(report.tape.steps, report.of_steps, strict=True):
        assert {name: len(rows) for name, rows in shown["checks"].items()} == {
            name: min(32, g.size) for name, g in step.input_grads.items()}


def test_what_is_kept_is_said_with_its_reason(report):
    norm = next(i for i, s in enumerate(report.tape.steps) if s.op == "normalize")
    kept = {row["name"]: row for row in report.of_steps[norm]["kept"]}
    assert kept["batch_mean"]["for"] == ["normalize_fused_backward"] and kept["batch_mean"]["why"]
    assert kept["x"]["shared"] == "the input itself"
    relu = next(i for i, s in enumerate(report.tape.steps) if s.op == "relu")
    assert [(row["name"], row["shared"]) for row in report.of_steps[relu]["kept"]] == [("y", "the output itself")]


def test_the_model_is_left_as_it_was(report):
    before = model().state_dict()
    assert all(np.array_equal(v, before[k]) for k, v in report.subject.model.state_dict().items())


def test_a_place_for_pictures(report):
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\x80")),
                           (b"IEND", b"")])
    other = Report(report.subject, report.tape, report.about, report.lines, report.of_steps, report.of_values)
    other.add_picture("Saliency <i>", png, "where")
    shown = json.loads(Reader(other.html()).data["index"])["pictures"]
    assert shown == [{"title": "Saliency <i>", "caption": "where", "png": base64.b64encode(png).decode()}]
    with pytest.raises(ValueError, match="no PNG"):
        other.add_picture("x", b"GIF89a")


# ---------------------------------------------------------------- parts
def test_a_residual_branch_is_a_lane_of_its_own():
    net = Sequential([Conv2d(4, 3, padding=1), ReLU(), Residual([Conv2d(4, 3, padding=1), ReLU()]), ReLU(), Flatten(), Linear(2)],
                     in_shape=(1, 4, 4))
    with mc.study.record() as tape:
        net(np.ones((1, 1, 4, 4), np.float32), train=True)
    assert [s.op for s in tape][:6] == ["conv2d", "relu", "conv2d", "relu", "add", "relu"]
    plan = layout(tape)
    assert plan.lanes == [0, 0, 1, 1, 0, 0, 0, 0] and plan.width == 2
    assert {(e.source, e.target, e.lane) for e in plan.edges} == {
        (-1, 0, 0), (0, 1, 0), (1, 2, 0), (2, 3, 1), (3, 4, 1), (1, 4, 0), (4, 5, 0), (5, 6, 0), (6, 7, 0)}


def test_pictures_keep_their_scale():
    planes = np.stack([np.linspace(-1, 0.5, 16).reshape(4, 4), np.zeros((4, 4))])
    packed = pictures.picture(planes, ["a", "b"])
    levels = np.frombuffer(base64.b64decode(packed["pixels"]), np.uint8).reshape(packed["shape"])
    back = packed["low"] + (packed["high"] - packed["low"]) * levels / 254
    assert (packed["low"], packed["high"]) == (-1, 1) and np.abs(back - planes).max() <= 1 / 254 + 1e-12
    assert pictures.picture(np.abs(planes), ["a", "b"])["low"] == 0
    large = np.random.default_rng(0).normal(size=(1, 130, 100))
    small, block = pictures.shrunk(large)
    assert block == 3 and small.shape == (1, 44, 34) and small[0, 1, 2] == pytest.approx(large[0, 3:6, 6:9].mean())
    assert small[0, -1, -1] == pytest.approx(large[0, 129:, 99:].mean())      # a block over the edge
    counts = pictures.histogram(np.array([0.0, 1, 1, np.nan]))
    assert counts["finite"] == 3 and sum(counts["bins"]) == 3 and counts["zeros"] == pytest.approx(1 / 3)
    assert counts["std"] == pytest.approx(np.std([0, 1, 1])) and counts["norm"] == pytest.approx(2 ** 0.5)


def test_without_residual_paths_and_without_norms():
    x, labels = subject().inputs, subject().labels
    lines = depth.gradient_norms(model(), x, labels)
    assert [(line.residual, line.batch_norm, line.given) for line in lines] == [
        (True, True, True), (True, False, False), (False, True, False), (False, False, False)]
    plain = depth.changed(model(), residual=False, batch_norm=True)
    assert not any(type(layer) is Residual for _, layer in plain.walk())
    # Against a pass of our own: the gradient at the output of the dilated convolution, and the same loss.
    with mc.study.record() as tape:
        loss = mc.ops.cross_entropy(plain(x, train=True), labels)
        loss.backward()
    expected = [float(np.linalg.norm(s.grad.astype(float))) for s in tape if s.op in ("conv2d", "linear")]
    assert lines[2].loss == pytest.approx(loss.item()) and lines[2].norms == pytest.approx(expected)
    assert len(depth.weighted_layers(model())) == len(expected) == 4
    assert any(type(layer) is Residual for _, layer in model().walk())
    vgg = Sequential([Conv2d(3, 3), ReLU(), Flatten(), Linear(2)], in_shape=(1, 5, 5))
    with_norm = depth.changed(vgg, residual=False, batch_norm=True)
    assert sum(type(layer) is BatchNorm2d for _, layer in with_norm.walk()) == 1
    two = np.random.default_rng(0).normal(size=(2, 1, 5, 5)).astype(np.float32)
    assert [(line.residual, line.batch_norm, line.given) for line in depth.gradient_norms(vgg, two, np.array([0, 1]))] == [
        (False, True, False), (False, False, True)]


def test_every_formula_is_of_its_op_and_can_be_typeset():
    for name, formula in FORMULAS.items():
        op = getattr(mc.ops, name)
        assert set(formula.backward) == {target for rule in op.composed for target in rule.targets}, name
        assert all(mathml(latex).startswith("<math") for latex in (formula.forward, *formula.backward.values()))
        known = {*op.arguments, *op.extras, "y"}
        assert set(formula.why) <= known, name


DECORATOR = '@op(real=("weight", "bias"))'


def test_source_lines_are_those_of_the_file():
    shown = of_op(mc.ops.conv2d)
    assert shown["source"]["where"] == "minicnn/ops/conv.py" and shown["source"]["text"].startswith(f"{DECORATOR}\ndef conv2d(")
    assert [rule["name"] for rule in shown["backwards"]] == ["conv2d_dx", "conv2d_dweight", "conv2d_dbias"]
    lines = (Path(mc.__file__).parent / "ops/conv.py").read_text().split("\n")
    assert lines[shown["source"]["first"] - 1] == DECORATOR
    assert [rule["name"] for rule in of_op(mc.ops.normalize)["backwards"]] == ["normalize_fused_backward"]
    assert "no file" in source(eval("lambda x: x"))["text"]
    assert of_op(mc.op(lambda x: x))["forward"] is None                 # an op of somebody's own: without equations


# ---------------------------------------------------------------- what is studied, and the command
@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_run(name, model="resnet20"):
    """The folder of a run that has a model, untrained."""
    from minicnn import train
    run = train.begin("digits", model=model, out=f"runs/{name}", epochs=1)
    mc.save(run.folder / "model.npz", {"state_dict": run.trainer.model.state_dict(), "about": json.dumps(run.about)})
    return run.folder


def test_a_digit_and_the_newest_run_of_the_model(elsewhere):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    found = choose("resnet20")
    assert found.weights.startswith("none") and found.images.shape == (8, 1, 8, 8) and found.said_by == "as its data set says"
    assert found.model.out_shape == (10,) and "digits" in found.image_name
    assert len(choose("resnet20", training=False).images) == 1
    folder = a_run("one")
    found = choose("resnet20")
    assert found.weights == str(folder / "model.npz") and choose().name == "resnet20"
    assert choose("resnet32").weights.startswith("none")
    assert choose("resnet20", in_shape=(3, 16, 16)).images.shape == (8, 3, 16, 16)
    fresh = found.fresh()
    assert np.array_equal(fresh.state_dict()["conv1.weight"], found.model.state_dict()["conv1.weight"])
    with pytest.raises(ValueError, match="has a resnet20, no vgg11"):
        choose("vgg11", run=str(folder))
    with pytest.raises(ValueError, match="no class 'cat'"):
        choose("resnet20", label="cat")
    (folder / "model.npz").write_bytes(b"damaged")
    assert choose("resnet20").weights.startswith("none")


def test_an_image_of_ones_own(elsewhere):
    pytest.importorskip("PIL", reason="image files need Pillow")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from PIL import Image
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save("<b>.png")
    found = choose("resnet20", "<b>.png", in_shape=(1, 8, 8), batch=3)
    assert found.image_name == "<b>.png" and len(found.images) == 3
    assert np.array_equal(found.images[0, 0], np.arange(64).reshape(8, 8))
    assert found.said_by.startswith("what the model takes it for")
    assert choose("resnet20", "<b>.png", in_shape=(1, 8, 8), label="7").labels[0] == 7
    assert choose("resnet20", "<b>.png").images.shape[1:] == (3, 32, 32)
    mc.save("foreign.npz", {"state_dict": mc.models.resnet20().state_dict()})
    with pytest.warns(RuntimeWarning, match="divided by 255"):
        assert choose("resnet20", "<b>.png", weights="foreign.npz").images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("arguments, message", [
    (["resnet2"], "did you mean"), (["--run", "nowhere"], "is no run's folder"),
    (["--weights", "x.pth"], "does not say what model"), (["resnet20", "--image", "nowhere.png"], "nowhere.png"),
    (["resnet20", "--out", "mine.txt"], "is no report of minicnn"),
    (["resnet20", "--out", "no/folder.html"], "the folder no does not exist"),
    (["resnet20", "--mean", "0.5"], "--mean and --std go together")])
def test_what_goes_wrong_is_said_in_one_line(elsewhere, capsys, arguments, message):
    (elsewhere / "mine.txt").write_text("a letter")
    assert cli.main(["study", *arguments]) in (1, 2)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
    assert (elsewhere / "mine.txt").read_text() == "a letter" and not list(elsewhere.glob("*.html"))


@pytest.mark.slow
def test_the_command(elsewhere, capsys):
    assert cli.main(["study", "resnet20", "--inference", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == "study-resnet20.html" and said["wrong"] == 0 and said["steps"] > 100 and said["checked"] > 3000
    assert MARK in (elsewhere / "study-resnet20.html").read_text()[:400]
    assert cli.main(["study", "resnet20", "--out", "study-resnet20.html"]) == 0        # an earlier report may be written over
    assert cli.main(["study", "resnet20"]) == 0
    assert (elsewhere / "study-resnet20-2.html").exists() and "0 wrong" in capsys.readouterr().out
