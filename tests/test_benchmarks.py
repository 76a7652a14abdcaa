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
from minicnn.threads import num_threads

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TOO_MANY = 10 ** 13             # images in a batch: more than any machine can address


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


def run(*arguments, script="run.py"):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
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


def test_plain_numpy_is_one_more_rival_of_the_models(no_pytorch, tmp_path):
    done = run("--quick", "--threads", 1, "--models", "resnet20", "--ops", "cross_entropy", "--plain",
               "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    operation, _ = rows(done.stdout, "Operations:")
    assert operation.keys() == {"operation", "batch", "task", "minicnn"}
    inference, step = rows(done.stdout, "Models:")
    assert list(step) == ["model", "batch", "task", "minicnn", "plain", "ratio", "minicnn MB", "plain MB"]
    assert inference["plain MB"] == "-"
    assert float(step["ratio"]) > 0
    assert 20 < float(step["plain MB"]) < 500
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"]["plain"] == f"whole-batch im2col in NumPy {np.__version__}"
    assert [sorted(m["seconds"]) for m in document["measurements"]] == [["minicnn"]] * 2 + [["minicnn", "plain"]] * 2


def test_a_case_that_does_not_fit_in_memory_is_a_line_of_the_report(no_pytorch):
    done = run("--quick", "--threads", 1, "--models", "resnet20", "--ops", "--plain", "--batch", TOO_MANY)
    assert done.returncode == 0, done.stderr
    for row in rows(done.stdout, "Models:"):
        assert {row["minicnn"], row["plain"], row["ratio"], row["minicnn MB"], row["plain MB"]} == {"-"}
    words = done.stdout.partition("Out of memory:\n")[2].splitlines()
    assert len(words) == 4
    assert words[3].startswith(f"  resnet20, batch {TOO_MANY}, training step: plain, asked for prepare resnet20: ")
    assert "Unable to allocate" in words[3]


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


def test_a_killed_worker_ran_out_of_memory_and_can_begin_again(module):
    run_ = module("run")
    with run_.Worker(run_.SIDES[0], threads=1) as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(run_.OutOfMemory, match="was killed, mostly for a lack of memory"):
            worker.ask(do="hello")
        worker.restart()
        assert "minicnn" in worker.ask(do="hello")["versions"]


def test_who_lacks_memory_leaves_the_case_to_the_others(module):
    """One cannot prepare it, one cannot repeat it a second time; what the third measures stays, and both begin again."""
    run_, cases = module("run"), module("cases")

    class Stub:
        def __init__(self, library, fails):
            self.side, self.fails, self.asked, self.restarts = run_.Side(library, "", ""), fails, [], 0

        def ask(self, **request):
            self.asked.append(request["do"])
            if self.asked.count(self.fails) == 2 or self.fails == "prepare":
                raise run_.OutOfMemory(f"{self.side.name} has no memory")
            return {"tasks": ["inference"], "seconds": 0.5}

        def restart(self):
            self.restarts += 1

    workers = [Stub("minicnn", ""), Stub("early", "prepare"), Stub("late", "repeat")]
    case = cases.model("resnet20", quick=True)[0]
    measured, = run_.measure(case, workers, run_.Care(repeats=3, shortest=0.0, rest=False))
    assert measured.seconds == {"minicnn": [0.5] * 3}
    assert measured.out_of_memory == {"early": "early has no memory", "late": "late has no memory"}
    assert [worker.restarts for worker in workers] == [0, 1, 1]
    assert [worker.asked.count("repeat") for worker in workers] == [3, 0, 2]


def test_peak_memory_that_does_not_fit_is_told_from_the_times(module, monkeypatch, measured):
    run_, (_, step) = module("run"), measured
    step.peak_bytes.clear()

    def ask(self, **request):
        if self.side.library == "PyTorch":
            raise run_.OutOfMemory("PyTorch has no memory")
        return {"bytes": 1_000_000}

    monkeypatch.setattr(run_.Worker, "ask", ask)
    run_.add_peak_memory(module("cases").model("resnet20", quick=True)[1], step, run_.SIDES, threads=1)
    assert step.peak_bytes == {"minicnn": 1_000_000}
    assert step.out_of_memory == {"PyTorch contiguous": "PyTorch has no memory"}        # the faster of its formats
    text = module("report").text({}, [step], repeats=3)
    assert rows(text, "Models:")[0].items() >= {"PyTorch": "500.00", "ratio": "2.00", "PyTorch MB": "-"}.items()
    assert text.endswith("Out of memory:\n  vgg16, batch 4, training step: PyTorch has no memory")


def test_a_lack_of_memory_is_known_by_each_library(module):
    lacks = module("worker").is_lack_of_memory
    with pytest.raises(MemoryError) as error:
        np.empty(TOO_MANY * 1000)
    assert lacks(error.value)
    assert not lacks(ValueError("no model is called 'alexnet'"))
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(RuntimeError) as error:
        torch.empty(TOO_MANY * 1000)
    assert lacks(error.value)


@pytest.mark.skipif(not os.access("/proc/self/oom_score_adj", os.W_OK), reason="this system does not rank processes for that")
def test_who_is_at_work_is_the_first_to_go():
    code = ("import worker\nscore = worker.Path('/proc/self/oom_score_adj')\nprint(score.read_text())\n"
            "with worker.first_to_go():\n    print(score.read_text())\nprint(score.read_text())")
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    before, at_work, after = done.stdout.split()
    assert (at_work, after) == ("1000", before)


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


@pytest.mark.parametrize("script", ["run", "scaling"])
def test_the_parent_imports_no_numerical_library(script):
    """Or its own size would count as the peak memory of every worker."""
    done = subprocess.run([sys.executable, "-c", f"import {script}, sys; print(sorted(sys.modules))"], cwd=BENCHMARKS,
                          capture_output=True, text=True)
    assert "'report'" in done.stdout
    assert not [name for name in ("numpy", "torch", "minicnn", "threadpoolctl", "matplotlib") if f"'{name}'" in done.stdout]


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


@pytest.mark.parametrize(("name", "options"), [
    ("vgg11_bn", {"hidden": 16, "pool": 3, "dropout": 0.0}),           # windows that overlap: 2 x 2 pixels to 3 x 3
    ("resnet18", {}), ("resnet50", {}), ("resnet20", {}), ("resnet20", {"shortcut": "B"})])
def test_plain_numpy_has_minicnns_gradients(module, name, options):
    """In float64, where a ReLU at zero does not open for one of them alone."""
    cases, plain = module("cases"), module("engine_plain")
    case = replace(cases.model(name, quick=True, batch=3, side=64)[0], options={**options, "dtype": np.float64})
    x, labels = cases.arrays(case).values()
    x = x.astype(np.float64)
    ours = plain.build(case)
    model = plain.translate(ours)
    logits = ours(x, train=True)
    loss = mc.ops.cross_entropy(logits, labels)
    loss.backward()
    their_logits = model.forward(x, train=True)
    their_loss, dlogits = plain.cross_entropy(their_logits, labels)
    model.backward(dlogits)
    np.testing.assert_allclose(their_logits, logits.numpy(), rtol=0, atol=1e-9 * np.abs(their_logits).max())
    assert their_loss == pytest.approx(float(loss), rel=1e-9)
    theirs = [layer.gradients[name] for layer in model.walk() for name in layer.parameters]
    assert len(theirs) == len(ours.parameters())
    largest = max(np.abs(gradient).max() for gradient in theirs)       # a bias before a batch norm has none of its own
    for (path, parameter), gradient in zip(ours.named_parameters().items(), theirs):
        np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-6, atol=1e-9 * largest, err_msg=path)
    np.testing.assert_allclose(model.forward(x, train=False), ours(x).numpy(), rtol=1e-8)       # by the running statistics


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "resnet20"])
def test_plain_numpy_trains_the_same_models_in_float32(module, name):
    cases, plain = module("cases"), module("engine_plain")
    case = cases.model(name, quick=True, batch=4, side=64)[0]
    case = replace(case, options={"hidden": 64, "pool": 1, "dropout": 0.0} if name == "vgg11_bn" else {})
    with num_threads(1), mc.algorithm("im2col"):                     # and the BLAS's threads as before, afterwards
        mine, other = (engine.Engine(1, "").tasks(case) for engine in (module("engine_minicnn"), plain))
        assert list(mine) == list(other) == ["inference", "training step"]
        for _ in range(3):
            logits, theirs = (tasks["inference"].run(None) for tasks in (mine, other))
            assert theirs.dtype == np.float32                           # twice the bytes would not be a fair rival
            assert np.abs(logits.numpy() - theirs).max() <= 1e-3 * np.abs(theirs).max()
            losses = [tasks["training step"].run(None) for tasks in (mine, other)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_plain_dropout_keeps_the_mean_and_its_mask(module):
    dropout = module("engine_plain").Dropout(0.25)
    x = np.ones((100, 1000), np.float32)
    y = dropout.forward(x, train=True)
    assert y.dtype == np.float32
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.01)
    assert y.mean() == pytest.approx(1.0, abs=0.01)
    np.testing.assert_array_equal(dropout.backward(2 * x), 2 * y)
    assert dropout.forward(x, train=False) is x


def test_plain_max_pool_never_sees_the_padding(module):
    x = -1 - np.random.default_rng(0).random((2, 3, 7, 8))              # a zero of the padding would be the largest
    pool = mc.layers.MaxPool2d(3, stride=2, padding=1)
    pool.build((3, 7, 8), np.random.default_rng(0), np.float64)
    plain = module("engine_plain").translate(pool)
    inputs = mc.Tensor(x, requires_grad=True)
    y = pool(inputs)
    np.testing.assert_array_equal(plain.forward(x, train=True), y.numpy())
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dx, = mc.grad(y, [inputs], dy)
    np.testing.assert_allclose(plain.backward(dy), dx.numpy(), rtol=1e-12)


def test_plain_sgd_moves_as_minicnns(module):
    """By settings whose every part shows."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}
    rng = np.random.default_rng(0)
    linear = mc.layers.Linear(4)
    linear.build((3,), rng, np.float64)
    plain = module("engine_plain")
    layer = plain.translate(linear)
    ours, theirs = mc.optim.SGD(linear.parameters(), **settings), plain.SGD(layer, **settings)
    for _ in range(3):
        for name, parameter in linear.named_parameters().items():
            layer.gradients[name] = rng.standard_normal(parameter.shape)
            parameter.grad = mc.Tensor(layer.gradients[name])
        ours.step()
        theirs.step()
    for name, parameter in linear.named_parameters().items():
        np.testing.assert_allclose(layer.parameters[name], parameter.numpy(), rtol=1e-12)


@pytest.mark.parametrize("layer", [mc.layers.Conv2d(4, dilation=2), mc.layers.Conv2d(4, groups=2),
                                   mc.layers.MaxPool2d(2, ceil_mode=True), mc.layers.AvgPool2d(2)])
def test_what_plain_numpy_does_not_know_it_refuses(module, layer):
    layer.build((4, 8, 8), np.random.default_rng(0))
    with pytest.raises(TypeError, match=f"no plain layer is known for {layer.__class__.__name__}"):
        module("engine_plain").translate(layer)


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


@pytest.fixture
def silent():
    """A worker that has no process, and whose library is always there."""
    class Silent:
        def __init__(self, side, threads):
            self.side = side

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, **request):
            return {"versions": {self.side.library: "1.0"}}

    return Silent


def test_what_was_measured_before_a_failure_is_reported(module, monkeypatch, capsys, measured, silent):
    run_ = module("run")

    def fails_later(*_):
        yield measured[0]
        raise run_.WorkerFailed("out of memory")

    monkeypatch.setattr(run_, "Worker", silent)
    monkeypatch.setattr(run_, "run", fails_later)
    assert run_.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "relu" in shown.out
    assert "stopped: out of memory" in shown.err


# ---------------------------------------------------------------- scaling
def scaling(*arguments):
    return run(*arguments, script="scaling.py")


def test_scaling_measures_each_study_in_a_table_of_its_own(no_pytorch, tmp_path):
    done = scaling("--quick", "--model", "resnet20", "--threads", 1, 2, "--batches", 1, 4, "--sizes", 32, 48, "--repeats", 3,
                   "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("PyTorch is not measured") == 1
    expected = {"threads": ["1", "2"], "batch": ["1", "4"], "size": ["32", "48"]}
    for title, (study, values) in zip(("Threads:", "Batch:", "Image size:"), expected.items()):
        table = rows(done.stdout, title)
        assert table[0].keys() == {"task", study, "minicnn"}
        assert [(row["task"], row[study]) for row in table] == [
            (task, value) for task in ("inference", "training step") for value in values]
        assert all(float(row["minicnn"]) > 0 for row in table)
    assert "Threads: resnet20, batch 2, 64 x 64 pixels; milliseconds an image, medians of 3\n" in done.stdout

    document = json.loads((tmp_path / "out.json").read_text())
    assert document["environment"].keys() >= {"date", "CPU", "cores", "threads", "Python", "NumPy", "minicnn"}
    assert document["repeats"] == 3
    assert len(document["measurements"]) == 12
    for measurement in document["measurements"]:
        assert measurement["case"] == "resnet20"
        assert len(measurement["seconds"]["minicnn"]) == 3
    assert [(m["study"], m["threads"], m["batch"], m["pixels"]) for m in document["measurements"][::2]] == [
        ("threads", 1, 2, 64), ("threads", 2, 2, 64), ("batch", CORES, 1, 64), ("batch", CORES, 4, 64),
        ("size", CORES, 2, 32), ("size", CORES, 2, 48)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
def test_scaling_quick_with_pytorch_and_a_figure(name, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = scaling("--quick", "--model", name, "--plot", tmp_path / "out.svg")
    assert done.returncode == 0, done.stderr
    for title in ("Threads:", "Batch:", "Image size:"):
        for row in rows(done.stdout, title):
            assert row["variant"] in ("contiguous", "channels_last")
            assert float(row["ratio"]) > 0
    assert "<svg" in (tmp_path / "out.svg").read_text()


def test_scaling_goes_on_after_what_does_not_fit_in_memory(no_pytorch):
    done = scaling("--quick", "--model", "resnet20", "--threads", "--sizes", "--batches", TOO_MANY, 2)
    assert done.returncode == 0, done.stderr
    assert [(row["batch"], row["minicnn"] != "-") for row in rows(done.stdout, "Batch:")] == [
        ("2", True), (str(TOO_MANY), False)] * 2
    assert f"Out of memory:\n  resnet20, batch {TOO_MANY}, inference: minicnn, asked for prepare resnet20: " in done.stdout


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--model", "alexnet"], "--model: invalid choice: 'alexnet'"),
    (["--batches", "2", "0"], "--batches: '0' is not a number of at least 1"),
    (["--sizes", "big"], "--sizes: 'big' is not a number of at least 1"),
    (["--threads", "--batches", "--sizes"], "nothing is left to measure"),
    (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json: cannot be written (No such file or directory)"),
    (["--plot", "out.txt"], "--plot out.txt: a picture's name ends in one of .png, .svg, .pdf"),
    (["--plot", "no/such/folder/out.svg"], "--plot no/such/folder/out.svg: there is no folder no/such/folder"),
])
def test_scaling_refuses_wrong_arguments(arguments, complaint):
    done = scaling(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_scaling_says_at_once_that_matplotlib_is_missing(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        module("scaling").main(["--plot", "out.svg"])
    assert "--plot needs matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_the_points_of_the_studies(module, monkeypatch):
    scaling_ = module("scaling")
    monkeypatch.setattr(scaling_, "cores", lambda: 2)

    def found(*arguments):
        return [(p.study, p.value, p.threads, p.case.batch, p.pixels) for p in scaling_.points(scaling_.parse(arguments))
                if p.case.tasks == ("training step",)]

    assert found() == [
        ("threads", 1, 1, 16, 224), ("threads", 2, 2, 16, 224),
        *(("batch", n, 2, n, 224) for n in (1, 2, 4, 8, 16, 32, 64)),
        *(("size", n, 2, 4, n) for n in (32, 64, 128, 224, 320, 448))]
    assert found("--model", "vgg16", "--batches", "--sizes") == [("threads", 1, 1, 8, 224), ("threads", 2, 2, 8, 224)]
    assert found("--model", "resnet20", "--threads", "--sizes", "48", "--batches", "3") == [
        ("batch", 3, 2, 3, 32), ("size", 48, 2, 4, 48)]


def test_each_point_is_measured_by_workers_of_its_threads(module, monkeypatch, silent):
    """New ones where the number changes, and the sides that are there alone."""
    scaling_, started = module("scaling"), []

    def start(side, threads):
        started.append((side.name, threads))
        return silent(side, threads)

    monkeypatch.setattr(scaling_, "cores", lambda: 2)
    monkeypatch.setattr(scaling_, "Worker", start)
    monkeypatch.setattr(scaling_, "measure", lambda case, workers, care: [[worker.side.name for worker in workers]])
    args = scaling_.parse(["--quick", "--threads", "1", "2", "--batches", "1", "--sizes"])
    sides = module("run").SIDES[:2]
    found = list(scaling_.run(scaling_.points(args), sides, module("run").Care.of(args)))
    names = ["minicnn", "PyTorch contiguous"]
    assert started == [(name, threads) for threads in (1, 2) for name in names]
    assert [(point.study, point.threads, who) for point, who in found] == [
        (study, threads, names) for study, threads in (("threads", 1), ("threads", 2), ("batch", 2)) for _ in range(2)]


@pytest.fixture
def scaled(module):
    """Two batches: PyTorch is faster in one format and then in the other; the larger does not fit into minicnn's memory."""
    Measurement, cases, Point = module("report").Measurement, module("cases"), module("scaling").Point

    def at(batch, seconds, **lacking):
        case = cases.model("resnet18", batch=batch)[0]
        return Point("batch", 2, case), Measurement("resnet18", "model", batch, "inference", seconds, out_of_memory=lacking)

    return [at(2, {"minicnn": [0.02, 0.04, 0.03], "PyTorch contiguous": [0.06] * 3, "PyTorch channels_last": [0.04] * 3}),
            at(8, {"PyTorch contiguous": [0.08] * 3, "PyTorch channels_last": [0.16] * 3}, minicnn="no memory left")]


def test_a_scaling_table_is_of_medians_an_image(module, scaled):
    text = module("scaling").text({"CPU": "a fast one"}, scaled, repeats=3)
    assert rows(text, "Batch: resnet18, 2 threads, 224 x 224 pixels; milliseconds an image, medians of 3") == [
        {"task": "inference", "batch": "2", "minicnn": "15.00", "PyTorch": "20.00", "ratio": "0.75", "variant": "channels_last"},
        {"task": "inference", "batch": "8", "minicnn": "-", "PyTorch": "10.00", "ratio": "-", "variant": "contiguous"}]
    assert text.endswith("Out of memory:\n  resnet18, batch 8, inference: no memory left")


def test_a_scaling_panel_draws_what_the_table_says(module, scaled, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from minicnn.plots import new_figure

    axes = new_figure(4, 4).subplots()
    module("scaling").panel(axes, "batch", scaled)
    drawn = {line.get_label(): np.round(line.get_xydata(), 9).tolist() for line in axes.lines}
    assert drawn == {"minicnn, inference": [[2, 15]], "PyTorch, inference": [[2, 20], [8, 10]]}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("images a batch", "milliseconds an image")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "8"]

    surroundings = {"CPU": "a fast one", "cores": 2, "minicnn": "1.0", "NumPy": "2.0"}
    for name in ("out.svg", "out.png", "out.pdf"):
        module("scaling").plot(tmp_path / name, surroundings, scaled)
        assert (tmp_path / name).stat().st_size > 1000


def test_an_interrupted_scaling_keeps_what_it_has(module, monkeypatch, capsys, tmp_path, scaled, silent):
    scaling_ = module("scaling")

    def is_interrupted(*_):
        yield scaled[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling_, "Worker", silent)
    monkeypatch.setattr(scaling_, "run", is_interrupted)
    assert scaling_.main(["--json", str(tmp_path / "out.json")]) == 1
    shown = capsys.readouterr()
    assert "15.00" in shown.out
    assert "stopped: interrupted" in shown.err
    assert [m["batch"] for m in json.loads((tmp_path / "out.json").read_text())["measurements"]] == [2]


# ---------------------------------------------------------------- how long a trainer waits for its images
def test_every_way_to_load_is_timed(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="JPEG files need Pillow: pip install pillow")
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "photographs" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    done = run("--quick", "--data", tmp_path / "photographs", "--json", tmp_path / "out.json", script="loading.py")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [*found["seconds"]] == ["once, into memory", "ahead, on threads", "ahead, random crops", "when needed"]
    for name, seconds in found["seconds"].items():
        assert len(seconds["step"]) == len(seconds["waiting"]) == 2
        assert all(0 <= wait < step for wait, step in zip(seconds["waiting"], seconds["step"], strict=True))
        assert re.search(rf"^{name} .* %  ", done.stdout, re.M)
