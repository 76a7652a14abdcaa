"""The benchmarks run and report what they measured, with PyTorch and without. Nothing here asserts a time."""
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import minicnn as mc

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a file of the folder as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def no_pytorch(monkeypatch, tmp_path):
    """Processes that are started from here do not find PyTorch."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def run(*arguments):
    command = [sys.executable, BENCHMARKS / "run.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def rows(output, title):
    """The table under `title`: one dict a line, by the head of the column; columns are two blanks apart."""
    lines = output.partition(title)[2].partition("\n\n")[0].splitlines()[1:]
    ends = [(m.start(), m.end()) for m in re.finditer("-+", lines[1])]
    return [{lines[0][a:b].strip(): line[a:b].strip() for a, b in ends} for line in [lines[0], *lines[2:]]][1:]


# ---------------------------------------------------------------- the command
def test_without_pytorch_minicnn_is_measured_alone(no_pytorch, tmp_path):
    done = run("--quick", "--threads", 1, "--models", "resnet20", "--ops", "linear", "cross_entropy",
               "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "PyTorch is not measured: ModuleNotFoundError: No module named 'torch'" in done.stderr
    table = rows(done.stdout, "Operations:")
    assert [(row["operation"], row["task"]) for row in table] == [
        (name, task) for name in ("linear 1568->256", "linear 256->256", "linear 128->62", "cross_entropy 1000 classes")
        for task in ("forward", "backward")]
    assert table[0].keys() == {"operation", "batch", "task", "minicnn"}
    models = rows(done.stdout, "Models:")
    assert [(row["model"], row["batch"], row["task"]) for row in models] == [
        ("resnet20", "2", "inference"), ("resnet20", "2", "training step")]
    assert float(models[1]["minicnn"]) > 0
    assert 20 < float(models[1]["minicnn MB"]) < 500                # a Python with NumPy and a small model

    document = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"].keys() >= {"date", "CPU", "cores", "threads", "Python", "NumPy", "NumPy's BLAS", "minicnn"}
    assert document["environment"]["threads"] == 1
    assert len(document["measurements"]) == 10
    for measurement in document["measurements"]:
        assert measurement["seconds"].keys() == {"minicnn"}
        assert len(measurement["seconds"]["minicnn"]) == document["repeats"] == 2


def test_with_pytorch_both_of_its_formats_are_measured(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = run("--quick", "--threads", 1, "--models", "--ops", "relu", "--repeats", 3, "--batch", 2,
               "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "Models:" not in done.stdout
    table = rows(done.stdout, "Operations:")
    assert len(table) == 8
    for row in table:
        assert row["batch"] == "2"
        assert row["variant"] in ("contiguous", "channels_last")
        assert float(row["ratio"]) > 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert "PyTorch" in document["environment"]
    for measurement in document["measurements"]:
        assert measurement["seconds"].keys() == {"minicnn", "PyTorch contiguous", "PyTorch channels_last"}
        assert all(len(times) == 3 and min(times) > 0 for times in measurement["seconds"].values())


@pytest.mark.slow
def test_everything_quick_with_pytorch(module):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    done = run("--quick", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert {row["operation"].split()[0] for row in rows(done.stdout, "Operations:")} == {
        "conv2d", "max_pool2d", "avg_pool2d", "global_avg_pool2d", "batch_norm", "relu", "add", "linear", "cross_entropy"}
    steps = [row for row in rows(done.stdout, "Models:") if row["task"] == "training step"]
    assert [row["model"] for row in steps] == list(module("cases").MODELS)
    assert all(float(row["PyTorch MB"].replace(",", "")) > 0 for row in steps)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--repeats", "0"], "--repeats: '0' is not a number of at least 1"),
    (["--ops", "convolution"], "--ops: invalid choice: 'convolution'"),
    (["--models", "alexnet"], "--models: invalid choice: 'alexnet'"),
    (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json: cannot be written (No such file or directory)"),
])
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments, complaint):
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


# ---------------------------------------------------------------- workers
def test_a_failing_request_names_the_library_and_the_case(module):
    run_, cases = module("run"), module("cases")
    case, _ = cases.model("resnet20", quick=True)
    with run_.Worker(run_.SIDES[0], threads=1) as worker, \
            pytest.raises(run_.WorkerFailed, match="minicnn, asked for prepare alexnet: ValueError: no model is called 'alexnet'"):
        worker.ask(do="prepare", case=asdict(replace(case, name="alexnet")), shortest=0.0)


def test_a_worker_that_died_is_noticed(module):
    run_ = module("run")
    with run_.Worker(run_.SIDES[0], threads=1) as worker:
        worker.ask(do="hello")
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(run_.WorkerFailed, match="minicnn ended with code -9 when asked for repeat forward"):
            worker.ask(do="repeat", task="forward")


def test_what_a_library_prints_does_not_reach_the_answers(tmp_path):
    (tmp_path / "engine_loud.py").write_text(
        "print('a banner')\nclass Engine:\n    def __init__(self, threads, variant): print('hello')\n"
        "    def versions(self): return {'loud': '1'}\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, BENCHMARKS / "worker.py", "engine_loud", "", "1"], input='{"do": "hello"}\n',
                          capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == {"versions": {"loud": "1"}}
    assert done.stderr == "a banner\nhello\n"


def test_peak_memory_is_in_bytes(module):
    # Through a shell, since a process inherits the peak of the one that started it, here pytest's.
    code = "import worker; block = bytearray(b'x') * 300_000_000; print(worker.peak_memory())"
    done = subprocess.run(f'"{sys.executable}" -c "{code}"; true', shell=True, cwd=BENCHMARKS, capture_output=True, text=True)
    assert 300e6 < int(done.stdout) < 450e6


def test_the_parent_imports_no_numerical_library():
    """Or its own size would count as the peak memory of every worker."""
    done = subprocess.run([sys.executable, "-c", "import run, sys; print(sorted(sys.modules))"], cwd=BENCHMARKS,
                          capture_output=True, text=True)
    assert "'report'" in done.stdout
    assert not [name for name in ("numpy", "torch", "minicnn", "threadpoolctl") if f"'{name}'" in done.stdout]


def test_progress_is_plain_lines_without_tqdm(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)          # importing it raises ImportError
    selected = module("cases").operations(quick=True)[:2]
    assert list(module("run").progress(selected)) == selected
    assert capsys.readouterr().err.splitlines() == [f"1/2 {selected[0].name}", f"2/2 {selected[1].name}"]


# ---------------------------------------------------------------- what is timed
@pytest.mark.parametrize(("table", "model", "but"), [
    ("VGG16", mc.models.vgg16, ()), ("RESNET18", mc.models.resnet18, ()), ("RESNET50", mc.models.resnet50, ("RESNET18",))])
def test_the_tables_hold_every_convolution_of_the_models(module, table, model, but):
    cases = module("cases")
    small = {"hidden": 1, "pool": 1} if table == "VGG16" else {}
    found = set()
    for _, layer in model(in_shape=(3, 224, 224), num_classes=1, **small).walk():
        if isinstance(layer, mc.layers.Conv2d):
            channels, height, width = layer.in_shape
            kernel, = set(layer.windows.kernel_size)
            assert height == width
            assert layer.windows.padding == (kernel // 2, kernel // 2)
            assert (layer.bias is not None) == (table == "VGG16")
            found.add((channels, height, layer.out_channels, kernel, layer.windows.stride[0]))
    others = {row for name in but for row in getattr(cases, name)}
    assert len(set(getattr(cases, table))) == len(getattr(cases, table))
    assert set(getattr(cases, table)) == found - others


def test_full_size_cases_have_names_of_their_own(module):
    cases = module("cases")
    everything = cases.operations()                 # of two with one name it would keep one
    assert sum(case.kind == "conv2d" for case in everything) == len(cases.VGG16) + len(cases.RESNET18) + len(cases.RESNET50)
    assert sum(case.kind != "conv2d" for case in everything) == 19
    assert {case.kind for case in everything} == set(cases.OPERATIONS)


@pytest.fixture
def engines(module, memory_format):
    """minicnn's engine and PyTorch's, in one process: fine for values, not for times."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    threads, ours_before = torch.get_num_threads(), mc.get_num_threads()
    ours, theirs = module("engine_minicnn").Engine(1), module("engine_pytorch").Engine(1, memory_format)
    yield ours, theirs
    mc.set_num_threads(ours_before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_both_libraries_compute_the_same_operations(module, engines):
    ours, theirs = engines
    for case in module("cases").operations(quick=True):
        case = replace(case, batch=2)
        mine, other = ours.tasks(case), theirs.tasks(case)
        assert list(mine) == list(other) == ["forward", "backward"]
        assert_close(mine["forward"].run(None), other["forward"].run(None), case.name)
        gradients = [tasks["backward"].run(tasks["backward"].prepare()) for tasks in (mine, other)]
        assert len(gradients[0]) == len(gradients[1]) == len({*case.images, *case.weights}.difference(case.constants))
        for a, b in zip(*gradients):
            assert_close(a, b, f"{case.name}, backward")


@pytest.mark.parametrize(("name", "memory_format"), [
    ("vgg11", "channels_last"), ("resnet18", "contiguous"), ("resnet20", "contiguous"), ("resnet20", "channels_last")])
def test_both_libraries_run_the_same_models(module, engines, name):
    """Equal weights give equal logits; after two training steps, momentum at work in the second, they still do."""
    case = replace(module("cases").model(name, quick=True)[0], batch=4)
    if name == "vgg11":
        case = replace(case, options={**case.options, "dropout": 0.0})        # which would be drawn at random
    if name == "resnet18":                              # few numbers a channel make batch norm magnify what was rounded
        case = replace(case, images={**case.images, "x": (3, 64, 64)})
    mine, other = (engine.tasks(case) for engine in engines)
    with mc.algorithm("im2col"):        # rounds as PyTorch does: what Winograd rounds otherwise may open or close a ReLU at zero
        take_steps(mine, other, name)


def take_steps(mine, other, name):
    for _ in range(3):
        logits = [tasks["inference"].run(tasks["inference"].prepare()) for tasks in (mine, other)]
        assert_close(*logits, name, tolerance=1e-3)
        losses = [tasks["training step"].run(tasks["training step"].prepare()) for tasks in (mine, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def assert_close(ours, theirs, what, tolerance=1e-4):
    """float32: the largest difference, relative to the largest number."""
    ours, theirs = ours.numpy(), theirs.detach().numpy()
    assert ours.shape == theirs.shape, what
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), what


# ---------------------------------------------------------------- the clock
@pytest.fixture
def clock(module, monkeypatch):
    """A clock that only moves when it is told to, in place of the real ones."""
    class Clock:
        def __init__(self):
            self.now = self.used = 0.0

        def advance(self, seconds):
            self.now += seconds

    clock, timing = Clock(), module("timing")
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timing.time, "process_time", lambda: clock.used)
    monkeypatch.setattr(timing.time, "sleep", clock.advance)
    return clock


def test_preparation_is_not_timed(module, clock):
    timing = module("timing")
    task = timing.Task(lambda: clock.advance(100.0), lambda _: clock.advance(0.25))
    assert timing.once(task) == 0.25
    assert timing.repetition(task, calls=4) == 0.25


def test_a_repetition_is_as_many_calls_as_take_long_enough(module, clock):
    timing = module("timing")
    first = iter([5.0])                             # the first call is slow, and does not count
    task = timing.Task(lambda: None, lambda _: clock.advance(next(first, 0.125)))
    assert timing.warm_up(task, shortest=1.0) == 8
    assert timing.warm_up(task, shortest=0.0) == 1
    assert timing.warm_up(task, shortest=1e6) == 100


def test_rest_ends_when_the_threads_do_or_in_the_end_anyway(module, clock, monkeypatch):
    timing = module("timing")
    spinning = iter([0.01] * 5)

    def sleep(seconds):
        clock.advance(seconds)
        clock.used += next(spinning, 0.0)

    monkeypatch.setattr(timing.time, "sleep", sleep)
    timing.fall_asleep()
    assert clock.now == pytest.approx(0.06)         # five naps with the processor in use, one without
    spinning = iter([0.01] * 1000)
    timing.fall_asleep(limit=0.5)
    assert clock.now == pytest.approx(0.56, abs=0.011)


# ---------------------------------------------------------------- the report
@pytest.fixture
def measured(module):
    Measurement = module("report").Measurement
    return [
        Measurement("relu", "relu", 4, "forward", {"minicnn": [0.001, 0.009, 0.003], "PyTorch contiguous": [0.004, 0.005, 0.006],
                                                   "PyTorch channels_last": [0.002, 0.001, 0.9]}),
        Measurement("vgg16", "model", 4, "training step", {"minicnn": [4.0, 4.4, 3.6], "PyTorch contiguous": [2.0, 2.0, 2.0],
                                                           "PyTorch channels_last": [5.0, 5.0, 5.0]},
                    {"minicnn": 2_500_000_000, "PyTorch contiguous": 1_250_000_000}),
    ]


def test_the_report_shows_medians_and_the_faster_variant(module, measured):
    text = module("report").text({"CPU": "a fast one"}, measured, repeats=3)
    assert "a fast one" in text
    assert rows(text, "Operations:") == [{
        "operation": "relu", "batch": "4", "task": "forward", "minicnn": "3.00", "PyTorch": "2.00", "ratio": "1.50",
        "variant": "channels_last"}]
    assert rows(text, "Models:") == [{                                      # milliseconds an image: 4 s over 4 images
        "model": "vgg16", "batch": "4", "task": "training step", "minicnn": "1000.00", "PyTorch": "500.00", "ratio": "2.00",
        "variant": "contiguous", "minicnn MB": "2,500", "PyTorch MB": "1,250"}]


def test_the_document_holds_every_number(module, measured):
    document = json.loads(json.dumps(module("report").document({"CPU": "a fast one"}, measured, repeats=3)))
    first, second = document["measurements"]
    assert first["seconds"]["PyTorch channels_last"] == [0.002, 0.001, 0.9]
    assert first["median_ms"] == {"minicnn": 3.0, "PyTorch contiguous": 5.0, "PyTorch channels_last": 2.0}
    assert first["ratio"] == {"PyTorch": 1.5}
    assert first["fastest"] == {"PyTorch": "PyTorch channels_last"}
    assert second["peak_bytes"] == {"minicnn": 2_500_000_000, "PyTorch contiguous": 1_250_000_000}


def test_what_was_measured_before_a_failure_is_reported(module, monkeypatch, capsys, measured):
    run_ = module("run")

    class Silent:
        def __init__(self, side, threads):
            self.side = side

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, **request):
            return {"versions": {self.side.library: "1.0"}}

    def fails_later(*_):
        yield measured[0]
        raise run_.WorkerFailed("out of memory")

    monkeypatch.setattr(run_, "Worker", Silent)
    monkeypatch.setattr(run_, "run", fails_later)
    assert run_.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "relu" in shown.out
    assert "stopped: out of memory" in shown.err
