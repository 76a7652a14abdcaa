"""ONNX files: checked by the onnx library, run by onnxruntime to the logits that the model itself gives."""
import json

import numpy as np
import pytest

import minicnn as mc
from minicnn import cli, export, models
from minicnn.data import Normalize
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
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    SimAM,
)

library = pytest.importorskip("onnx", reason="ONNX files need the onnx library: pip install onnx")
runtime = pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime: pip install onnxruntime")

LIMIT = 1e-5        # of the largest difference over the largest logit, in float32


def run(path, x):
    """The logits of an ONNX file, by onnxruntime on one thread."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["N", *x.shape[1:]])]
    [logits] = session.run(None, {"images": x})
    return logits


def lively(model, seed=9):
    """The model with numbers that tell images and every parameter apart: none at its beginning's 0 or 1, all layers of one size."""
    rng, state = np.random.default_rng(seed), model.state_dict()
    for name, array in state.items():
        if array.ndim > 1:
            array[...] = rng.standard_normal(array.shape) * (2 / array[0].size) ** 0.5
        elif name.endswith(("running_var", "weight")):
            array[...] = rng.uniform(0.7, 1.3, array.shape)
        elif array.ndim:
            array[...] = rng.uniform(-0.2, 0.2, array.shape)
    model.load_state_dict(state)
    return model


def check(model, path, batch=3):
    """Exported and run, the model gives its own logits; they depend on the image."""
    lively(model)
    export.onnx(model, path)
    library.checker.check_model(str(path), full_check=True)
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((batch, *model.in_shape)) + rng.standard_normal((batch, model.in_shape[0], 1, 1))).astype(np.float32)
    expected = model(x).numpy()
    differ = np.ptp(expected, axis=0).max()
    assert differ > 100 * LIMIT * abs(expected).max(), "logits that tell nothing of the image test nothing"
    found = run(path, x)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    assert abs(found - expected).max() <= LIMIT * abs(expected).max()
    return library.load(path)


SMALL = [("vgg11", (3, 32, 32), {"hidden": 16, "pool": 7}), ("vgg13_bn", (3, 70, 64), {"hidden": 16, "pool": 3}),
         ("resnet18", (3, 65, 47), {}), ("resnet50", (3, 33, 31), {}),
         ("resnet20", (3, 32, 32), {}), ("resnet32", (1, 31, 17), {}), ("resnet44", (3, 9, 32), {"shortcut": "B"}),
         ("nin", (3, 32, 32), {}), ("nin", (1, 25, 18), {}), ("googlenet", (3, 64, 64), {"branch5x5": 3}),
         ("googlenet", (2, 47, 66), {})]


@pytest.mark.parametrize("name, in_shape, options", SMALL)
def test_a_small_model_runs_to_its_own_logits(tmp_path, name, in_shape, options):
    check(models.build(name, 5, in_shape, **options), tmp_path / "model.onnx")


# Every model as it is published: its own images and classes.
WHOLE = [*((name, {}) for name in models.names()), ("googlenet", {"branch5x5": 3}),
         *((name, {"shortcut": "B"}) for name in models.names() if models.default_in_shape(name) == (3, 32, 32) and name != "nin")]


@pytest.mark.slow
@pytest.mark.parametrize("name, options", WHOLE)
def test_a_whole_model_runs_to_its_own_logits(tmp_path, name, options):
    check(models.build(name, **options), tmp_path / "model.onnx", batch=2)


WINDOWS = [((3, 2, 1, False), (8, 7)), ((3, 2, 0, True), (8, 7)), ((3, 2, 1, True), (6, 4)), ((2, 3, 1, True), (2, 5)),
           (((2, 3), (1, 2), (0, 1), True), (5, 6)), ((2, 2, 0, False), (5, 7)), ((4, 3, 2, True), (7, 9)),
           ((3, 2, 0, True), (2, 4)), ((4, (2, 3), 1, True), (1, 3))]
POOLS = [*((kind, *case) for kind in (MaxPool2d, AvgPool2d) for case in WINDOWS), (GlobalAvgPool2d, (), (4, 5)),
         *((AdaptiveAvgPool2d, *case) for case in [(((3, 2),), (7, 5)), (((2, 4),), (4, 8)), ((3,), (3, 3)), ((5,), (2, 3)),
                                                   ((1,), (4, 5))])]


@pytest.mark.parametrize("kind, options, size", POOLS)
def test_pools_of_every_geometry(tmp_path, kind, options, size):
    """Padding, windows that hang over the edge, rows left over, uneven windows: values and shapes as the layer's."""
    check(Sequential([kind(*options)], (2, *size)), tmp_path / "pool.onnx")


LAYERS = {
    "convolution of every option": [Conv2d(6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=2, bias=False)],
    "batch norm": [BatchNorm2d(eps=0.1), ReLU()],
    "linear without bias": [Flatten(), Linear(5, bias=False), ReLU(), Linear(3)],
    "attention": [Residual([Conv2d(4, 3, padding=1), BatchNorm2d(), SimAM(0.01)]), ReLU()],
    "branches": [Branches([Conv2d(2, 1)], [], [MaxPool2d(3, 1, 1), ReLU()]), Branches(SimAM(), [])],
    "dropout at the end": [Conv2d(2), Dropout(0.9)],
    "nothing": [Dropout(0.9)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(tmp_path, name):
    check(Sequential(LAYERS[name], (4, 7, 8)), tmp_path / "layers.onnx")


def test_arrays_have_the_names_of_state_dict_and_float64_is_written_as_float32(tmp_path):
    model = lively(models.resnet20(5, (3, 16, 16), dtype=np.float64))
    export.onnx(model, tmp_path / "m.onnx")
    file = library.load(tmp_path / "m.onnx")
    arrays = {array.name: library.numpy_helper.to_array(array) for array in file.graph.initializer}
    for name, array in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(arrays[name], array.astype(np.float32), err_msg=name, strict=True)
    kinds = [node.op_type for node in file.graph.node]
    assert (kinds.count("BatchNormalization"), kinds.count("Add"), kinds[-1]) == (19, 9, "Gemm")
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16))
    expected = model(x).numpy()
    assert abs(run(tmp_path / "m.onnx", x.astype(np.float32)) - expected).max() <= LIMIT * abs(expected).max()


def test_what_the_file_says_of_itself(tmp_path):
    normalize = Normalize((0.1, 0.2, 0.3), (0.5, 0.25, 1 / 3))
    export.onnx(models.resnet20(2), tmp_path / "m.onnx", name="resnet20", classes=["cat", "dög"], normalize=normalize)
    file = library.load(tmp_path / "m.onnx")
    said = {prop.key: prop.value for prop in file.metadata_props}
    assert said.keys() == {"model", "classes", "normalize"} and said["model"] == file.graph.name == "resnet20"
    assert json.loads(said["classes"]) == ["cat", "dög"]
    assert Normalize.from_dict(json.loads(said["normalize"])) == normalize
    assert (file.producer_name, file.producer_version) == ("minicnn", mc.__version__)
    export.onnx(models.resnet20(2), tmp_path / "m.onnx")
    assert {prop.key for prop in library.load(tmp_path / "m.onnx").metadata_props} == {"model"}


class Doubled(Layer):
    def forward(self, x, train, rng):
        return x * 2.0


class OwnReLU(ReLU):
    def forward(self, x, train, rng):
        return mc.ops.relu(x) * 3.0


@pytest.mark.parametrize("layer, words", [(Doubled(), "0.1 (Doubled): there are no ONNX nodes for this layer; known are Seq"),
                                          (OwnReLU().named("mine"), "0.mine (OwnReLU): there are no")])
def test_a_layer_that_is_not_known_is_named_and_the_old_file_stays(tmp_path, layer, words):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ValueError) as caught:
        export.onnx(Sequential([[ReLU(), layer]], (3, 4, 4)), path)
    assert str(caught.value).startswith(words)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"] and path.read_bytes() == b"old"


def test_a_layer_of_ones_own_gets_its_nodes(tmp_path, monkeypatch):
    monkeypatch.setitem(export.NODES, Doubled, lambda graph, layer, x, path: graph.add("Add", [x, x], path))
    check(Sequential([Conv2d(2), Doubled(), Doubled()], (3, 4, 4)), tmp_path / "m.onnx")


def test_a_file_that_the_checker_refuses_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setitem(export.NODES, ReLU, lambda graph, layer, x, path: graph.add("NoSuchOperator", [x], path))
    with pytest.raises(library.checker.ValidationError):
        export.onnx(Sequential([ReLU()], (3, 4, 4)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"m.pth: the name of an ONNX file ends in .onnx"):
        export.onnx(models.resnet20(), tmp_path / "m.pth")
    with pytest.raises(RuntimeError, match="the model is not built"):
        export.onnx(Sequential([ReLU()]), tmp_path / "m.onnx")
    monkeypatch.setattr(export, "LARGEST", 1e6)
    with pytest.raises(ValueError, match="2 GiB and more, which one ONNX file cannot hold"):
        export.onnx(models.resnet20(), tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match="ONNX files need the onnx library, which is not installed: pip install onnx"):
        export.onnx(models.resnet20(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command
def test_the_command_writes_weights_from_elsewhere(tmp_path, capsys):
    model = lively(models.resnet20(3))
    mc.save(tmp_path / "w.pth", model.state_dict())
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    out = tmp_path / "m.onnx"
    words = ["export", "--onnx", out, "--model", "resnet20", "--weights", tmp_path / "w.pth", "--mean", "0.4,0.5,0.6",
             "--std", "0.2,0.25,0.3", "--classes", tmp_path / "names.txt"]
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: resnet20 of {tmp_path / 'w.pth'}, " in printed
    assert "images (N, 3, 32, 32), float32" in printed
    said = {prop.key: prop.value for prop in library.load(out).metadata_props}
    assert json.loads(said["classes"]) == ["cat", "dog", "cow"]
    assert json.loads(said["normalize"]) == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(run(out, x), model(x).numpy(), rtol=0, atol=LIMIT * abs(model(x).numpy()).max())


def tiny(num_classes, in_shape, seed=0, dtype=np.float32):
    return Sequential([Conv2d(4, 3), BatchNorm2d(), ReLU(), GlobalAvgPool2d(), Linear(num_classes)], in_shape, seed, dtype)


def test_the_command_writes_a_runs_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install scikit-learn")
    from minicnn import train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    train.begin("digits", model="tiny", epochs=1, batch_size=512, out="r", device="cpu").fit()
    assert cli.main(["export", "--onnx", "m.onnx", "--run", "r"]) == 0
    said = {prop.key: prop.value for prop in library.load("m.onnx").metadata_props}
    assert json.loads(said["classes"]) == [str(i) for i in range(10)]
    _, test_set = mc.data.digits()
    x = Normalize.from_dict(json.loads(said["normalize"]))(test_set.images[:50])
    expected = train.load_trained("r").model(x).numpy()
    assert abs(run("m.onnx", x) - expected).max() <= LIMIT * abs(expected).max()


@pytest.mark.parametrize("words, status, message", [
    ([], 2, "the following arguments are required: --onnx"),
    (["--onnx", "m.onnx", "--model", "resnet20"], 2, "--model is for weights from elsewhere: it takes --weights FILE"),
    (["--onnx", "m.onnx", "--classes", "c.txt"], 1, "c.txt: No such file or directory"),
    (["--onnx", "m.onnx"], 1, "no run in ./runs has a model.npz")])
def test_a_command_that_makes_no_sense(tmp_path, capsys, monkeypatch, words, status, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *words]) == status
    error = capsys.readouterr().err
    assert error.startswith("minicnn: error: ") and message in error and error.count("\n") == 1
