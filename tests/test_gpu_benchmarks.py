"""The two commands for a machine with a GPU: they run (on the CPU, in small), and the README says what they found."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from minicnn import backend, models
from minicnn.bench import cases
from minicnn.data.cifar import CIFAR10_CLASSES
from minicnn.kernels.cuda import source

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def module(monkeypatch):
    """Import a file of the folder as its scripts do."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def test_the_readme_says_what_is_known_of_the_gpu(module):
    gpu = module("gpu")
    assert gpu.table(gpu.newest()) in (REPOSITORY / "README.md").read_text(encoding="utf-8"), (
        "paste what `python benchmarks/gpu.py --table` prints into the README")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_everything_runs_in_small(module, monkeypatch, tmp_path, capsys, device):
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "MODELS", {"resnet20": 2})
    monkeypatch.setattr(gpu, "SELECTIONS", (("conv2d", "resnet20"),))
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setattr(gpu.launches, "SIDE", 4)
    file = tmp_path / "out.json"
    assert gpu.main(["--quick", "--device", device, "--no-pytorch", "--json", str(file), "--commit", "abc"]) == 0
    found = json.loads(file.read_text())
    assert found["hash"] == source.digest() and found["environment"]["commit"] == "abc" and "left out" not in found
    assert [(row["task"], row["precision"], len(row["seconds"]["minicnn"])) for row in found["models"]] == [
        (task, how, 2) for how in (gpu.PRECISIONS if device == "cuda" else ["fp32"]) for task in ("inference", "training step")]
    assert all(row["problems"] == {} for row in found["models"])
    assert sum("captured" in row["seconds"] for row in found["models"]) == (len(gpu.PRECISIONS) if device == "cuda" else 0)
    assert {row["kernel"] for row in found["kernels"]["rows"]} == {"conv2d"} and found["kernels"]["problems"] == []
    assert found["kernels"]["roofline"].keys() == {"cpu", device}
    assert all(("kernels" in row) == (device == "cuda") for row in found["models"])
    assert "| resnet20 | 2 | fp32 |" in capsys.readouterr().out


def test_every_selection_of_kernels_fits_some_at_every_batch(module):
    gpu = module("gpu")
    for words in gpu.SELECTIONS:
        named = [word for word in words if word in models.names()]
        for batch in gpu.BATCHES:
            assert cases.choose(words, cases.of_models(named or cases.MODELS, False, batch))


def test_kernels_that_cannot_be_measured_are_a_failure_and_say_so(module, monkeypatch, tmp_path, capsys):
    gpu, file = module("gpu"), tmp_path / "out.json"
    monkeypatch.setattr(gpu, "MODELS", {})
    monkeypatch.setattr(gpu, "SELECTIONS", (("no such kernel",),))
    assert gpu.main(["--quick", "--device", "cpu", "--no-pytorch", "--json", str(file)]) == 1
    problem, = json.loads(file.read_text())["kernels"]["problems"]
    assert problem.startswith("no such kernel, batch 1: ") and "fits no kernel" in problem and problem in capsys.readouterr().out


def test_a_side_that_cannot_leaves_the_others_to_go_on(module):
    gpu = module("gpu")

    def broken():
        raise MemoryError("Out of memory allocating 1 bytes")

    calls = []

    def tired():
        calls.append(0)
        if len(calls) > 3:
            broken()

    found = gpu.measured({"minicnn": lambda: lambda: None, "other": lambda: broken, "third": lambda: tired}, "cpu", 3, None)
    assert {side: len(times) for side, times in found["seconds"].items()} == {"minicnn": 3, "third": 1}
    assert found["problems"] == dict.fromkeys(("other", "third"), "MemoryError: Out of memory allocating 1 bytes")


def test_what_is_not_done_in_time_is_named(module, monkeypatch, tmp_path):
    gpu, file = module("gpu"), tmp_path / "out.json"
    assert gpu.main(["--quick", "--device", "cpu", "--no-pytorch", "--minutes", "0", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["left out"] == "what is not here: the time was up"


def test_the_same_command_goes_on_with_what_is_missing(module, monkeypatch, tmp_path):
    gpu, file = module("gpu"), tmp_path / "out.json"
    monkeypatch.setattr(gpu, "MODELS", {"resnet20": 2})
    monkeypatch.setattr(gpu, "SELECTIONS", (("conv2d", "resnet20"),))
    command = ["--quick", "--device", "cpu", "--no-pytorch", "--json", str(file)]
    assert gpu.main([*command, "--minutes", "1"]) == 0                  # models are begun until 90 seconds before the end
    assert json.loads(file.read_text())["models"] == []
    assert gpu.main(command) == 0
    whole = json.loads(file.read_text())
    assert len(whole["models"]) == 2 and whole["kernels"]["rows"] and "left out" not in whole and len(whole["gone on"]) == 1
    assert gpu.main(command) == 0
    again = json.loads(file.read_text())
    assert (again["models"], again["kernels"]) == (whole["models"], whole["kernels"]) and len(again["gone on"]) == 2


@pytest.mark.parametrize("text, why", [
    ('{"hash": "another", "quick": true, "environment": {"NumPy": "1.0"}}', "it is of hash another, not "),
    ("[]", "not one of its results files"), ("{", "not one of its results files")])
def test_a_file_of_something_else_is_left_as_it_is(module, tmp_path, text, why):
    gpu, file = module("gpu"), tmp_path / "out.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=why):
        gpu.main(["--quick", "--device", "cpu", "--no-pytorch", "--json", str(file)])
    assert file.read_text() == text


def test_a_suite_that_did_not_come_to_its_end_says_how_far_it_came(module):
    lines = ["[gw0] [  1%] PASSED tests/a.py::b ", "tests/a.py::c ", "[gw1] [  2%] FAILED tests/a.py::c ", "tests/a.py::d "]
    gpu = module("gpu")
    assert gpu.verdict(gpu.TIME_IS_UP, lines) == {
        "exit status": "the time was up", "last line": "1 failed, 1 passed, then the time was up", "failures": [lines[2]]}
    lines += ["=== short test summary info ===", "FAILED tests/a.py::c - AssertionError", "=== 1 failed, 2 passed in 1.00s ==="]
    assert gpu.verdict(1, lines) == {"exit status": 1, "last line": "1 failed, 2 passed in 1.00s", "failures": [lines[-2]]}


@pytest.mark.gpu
def test_every_launch_of_a_step_is_timed(module, monkeypatch):
    launches, cases_of_benchmarks, engine = (module(name) for name in ("launches", "cases", "engine_minicnn"))
    monkeypatch.setattr(launches, "SIDE", 4)
    prepare, run = engine.Engine(1, device="cuda").tasks(cases_of_benchmarks.model("resnet20", True, 2)[1])["training step"]
    found = launches.of(lambda: run(prepare()))
    counts = {name: count for name, (count, _) in found["launches"].items()}
    assert counts["update.sgd"] == 1 and counts["loss.losses"] == 1
    assert sum(count for name, count in counts.items() if name.startswith("gemm ")) == 3 * 20 - 1   # pixels have no gradient
    assert found["seconds"] > 0 and "gemm " in launches.in_words(found)
    assert list(found["launches"].values()) == sorted(found["launches"].values(), key=lambda entry: -entry[1])


def document(digest):
    def row(task, how, mine, *others):
        sides = {"minicnn": [mine], **({"captured": [mine / 2]} if task == "training step" else {})}
        sides |= {f"PyTorch {form}": [s] for form, s in zip(("contiguous", "channels_last"), others, strict=False)}
        return {"model": "resnet50", "task": task, "precision": how, "batch": 64, "seconds": sides, "problems": {},
                "peak_bytes": {"minicnn": 2e9, "captured": 1e9, "PyTorch contiguous": 4e9, "PyTorch channels_last": 3e9}}

    return {"hash": digest, "suite": {"last line": "1804 passed"},
            "environment": {"GPU": "A Chip", "date": "2030-01-02T03:04:05", "commit": "abcdef", "PyTorch": "9.9"},
            "models": [row("inference", "fp32", 0.020, 0.030, 0.025), row("training step", "fp32", 0.080, 0.060, 0.064),
                       row("inference", "tf32", 0.020)]}


def test_the_table_is_the_files_figures(module):
    lines = module("gpu").table(document(source.digest())).splitlines()
    assert lines[0].startswith("On A Chip, 2030-01-02, commit abcdef: tests: 1804 passed.")
    assert lines[4] == "| resnet50 | 64 | fp32 | 20.00 | 25.00 | **1.25** | 80.00 | 40.00 (1.50) | 60.00 | **0.75** | 2.00 | 3.00 |"
    assert lines[5] == "| resnet50 | 64 | tf32 | 20.00 | - | - | - | - | - | - | - | - |"


def test_figures_of_other_code_say_so(module):
    assert "**these figures are not of this code**" in module("gpu").table(document("another"))
    assert "It has not run on a GPU yet" in module("gpu").table(None)


def test_the_newest_results_are_taken(module, tmp_path):
    gpu = module("gpu")
    assert gpu.newest(tmp_path) is None
    for day in ("2030-01-01", "2029-12-31"):
        (tmp_path / f"{day}-gpu.json").write_text(json.dumps({"hash": day}))
    (tmp_path / "2031-01-01-all.json").write_text("{}")
    assert gpu.newest(tmp_path) == {"hash": "2030-01-01"}


def test_from_which_batch_the_gpu_is_faster(module):
    def row(kernel, batch, backend, *seconds, algorithm=""):
        return {"kernel": kernel, "shape": "s", "batch": batch, "backend": backend, "algorithm": algorithm,
                "seconds": list(seconds)}

    rows = [row("a", 1, "cpu", 1.0), row("a", 1, "cuda", 2.0), row("a", 8, "cpu", 8.0, algorithm="im2col"),
            row("a", 8, "cpu", 3.0, algorithm="winograd"), row("a", 8, "cuda", 2.5), row("b", 1, "cpu", 1.0),
            row("b", 1, "cuda", 3.0), row("c", 1, "cpu", 1.0), row("d", 1, "cuda")]
    assert module("gpu").crossings(rows) == {"a s": 8, "b s": None}


@pytest.mark.gpu
def test_a_constant_is_varied(module, monkeypatch, capsys):
    launches = module("launches")
    monkeypatch.setattr(launches, "SIDE", 4)
    launches.main(["resnet20", "--batch", "1", "--inference", "--vary", "im2col.COLUMN_BYTES", "1", "100000000"])
    one, many = capsys.readouterr().out.splitlines()
    assert one.startswith("im2col.COLUMN_BYTES =            1: ") and " ms of the device: " in many
    launches.main(["resnet20", "--batch", "1", "--inference"])
    assert "elementwise.affine" in capsys.readouterr().out


@pytest.mark.parametrize("words, why", [
    (["im2col.COLUMN_BYTE", "1"], "no attribute 'COLUMN_BYTE'"), (["im2row.COLUMN_BYTES", "1"], "No module named"),
    (["im2col.COLUMN_BYTES", "1.5"], "invalid literal"), (["im2col.COLUMN_BYTES"], "at least one value")])
def test_a_constant_that_cannot_be_varied(module, capsys, words, why):
    with pytest.raises(SystemExit) as end:
        module("launches").main(["resnet20", "--vary", *words])
    assert end.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize("script, words, why", [
    ("gpu", ["--device", "cuda"], "no GPU to compute on"), ("launches", ["resnet20"], "no GPU to compute on"),
    ("train_cifar10", ["FOLDER", "--device", "cuda"], "no GPU to compute on"),
    ("train_cifar10", ["FOLDER", "--device", "cpu", "--root", "nowhere.tar.xz"], "nowhere.tar.xz: no such file"),
    ("train_cifar10", ["FOLDER", "--device", "cpu", "--data", "digits", "--cuda-graph"], "this run is on the CPU")])
def test_what_cannot_be_ends_in_a_line(module, monkeypatch, tmp_path, script, words, why):
    status = backend.Status(False, "no GPU to compute on: none in this test", "to get one", {})
    monkeypatch.setattr(backend, "cuda_status", lambda: status)
    with pytest.raises(SystemExit) as end:
        module(script).main([str(tmp_path) if word == "FOLDER" else word for word in words])
    assert str(end.value).startswith(f"{script}.py: ") and why in str(end.value) and "\n" not in str(end.value)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["minicnn", "PyTorch"])
def test_a_training_in_parts_ends_as_one_in_one_piece(module, tmp_path, library, capsys):
    if library == "PyTorch":
        pytest.importorskip("torch")
    script, flag = module("train_cifar10"), ["--pytorch"] * (library == "PyTorch")
    ends = []
    for name, parts in (("one", ["9"]), ("three", ["0.0001", "0.0001", "9", "9"])):
        for minutes in parts:
            assert script.main([str(tmp_path / name), "--data", "digits", "--epochs", "2", "--device", "cpu", "--minutes", minutes,
                                *flag]) == 0
        ends.append(script.kept(tmp_path / name)[library])
    assert "the time is up; the same command goes on" in capsys.readouterr().out
    assert ends[0]["epochs"] == ends[1]["epochs"] == 2 and ends[0]["of"] == 360
    assert ends[0]["right"] == ends[1]["right"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision, more", [("fp32", []), ("bf16", ["--cuda-graph"])])
def test_a_training_on_a_gpu_keeps_what_it_ran_on(module, tmp_path, precision, more):
    image_module = pytest.importorskip("PIL.Image")
    for part, count in (("train", 2), ("test", 1)):
        for name in CIFAR10_CLASSES:
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                image_module.fromarray(pixels).save(folder / f"{i}.png")
    script = module("train_cifar10")
    assert script.main([str(tmp_path / "run"), "--root", str(tmp_path / "images"), "--epochs", "1", "--device", "cuda",
                        "--precision", precision, "--commit", "abc", *more]) == 0
    setting, ours = (script.kept(tmp_path / "run")[what] for what in ("setting", "minicnn"))
    assert setting["precision"] == precision and setting["cuda_graph"] == bool(more)
    assert setting["commit"] == "abc" and setting["GPU"] and setting["CuPy"]
    assert ours["of"] == 10 and ours["device"] == "cuda"
