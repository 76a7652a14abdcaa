"""The laboratory: what it chooses, checks, counts, keeps, compares and draws. Nothing here asserts a time."""
import io
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import minicnn as mc
from minicnn import backend, cli
from minicnn.bench import cases, engine, kernels, laboratory, measure, plot, results, rival, roofline, tables, tune, whole, worker
from minicnn.bench.cases import Case
from minicnn.bench.measure import Care, Spread
from minicnn.bench.witness import relative_error, sample
from minicnn.kernels import algorithms, direct
from minicnn.kernels.windows import Windows
from minicnn.layers import BatchNorm2d, Conv2d, MaxPool2d


@pytest.fixture
def minicnn(tmp_path, monkeypatch, capfd):
    """minicnn("bench", "kernels") -> (status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        return status, *capfd.readouterr()
    return run


def case(kernel="conv2d", in_shape=(3, 9, 8), channels=4, kernel_size=3, batch=2, **steps):
    """A case of odd sizes."""
    if kernel.startswith("linear"):
        return Case(kernel, (10,), (7,), None, batch, ())
    if kernel in ("residual_add", "batch_norm", "batch_norm_grad"):
        return Case(kernel, in_shape, in_shape, None, batch, ())
    windows = Windows.of(kernel_size, **steps)
    channels = in_shape[0] if kernel.startswith("max_pool2d") else channels
    return Case(kernel, in_shape, (channels, *windows.out_size(in_shape[1:])), windows, batch, ())


def every_kernel(**more):
    return [case(kernel, **{"padding": 1, "stride": 2, **more}) for kernel in cases.KERNELS]


def result_of(one, arrays=None):
    return kernels.KERNELS[one.kernel].start(one, kernels.arrays(one) if arrays is None else arrays)()


# ---------------------------------------------------------------- which cases
def test_every_layer_of_a_model_is_a_case():
    model = cases.build("resnet50", quick=True)
    found = cases.of_models(["resnet50"], quick=True)
    for kind, kernel in ((Conv2d, "conv2d_weight_grad"), (MaxPool2d, "max_pool2d"), (BatchNorm2d, "batch_norm")):
        layers = {(layer.in_shape, layer.out_shape, getattr(layer, "windows", None))
                  for _, layer in model.walk() if isinstance(layer, kind)}
        assert layers == {(c.in_shape, c.out_shape, c.windows) for c in found if c.kernel == kernel}
    assert {c.kernel for c in found} == set(cases.KERNELS)
    assert len({(c.name, c.batch) for c in found}) == len(found), "a shape's word tells it from all others"


def test_no_input_gradient_of_pictures_and_no_columns_of_single_pixels():
    found = cases.of_models(["resnet50"], quick=True)
    assert not [c for c in found if c.kernel == "conv2d_input_grad" and c.in_shape[0] == 3]
    assert [c for c in found if c.kernel == "conv2d_weight_grad" and c.in_shape[0] == 3]
    assert not [c for c in found if c.kernel in ("im2col", "col2im") and c.windows.kernel_size == (1, 1)]


def test_models_share_cases():
    both = cases.of_models(["resnet20", "resnet32"], quick=True)
    assert {c.models for c in both} == {("resnet20", "resnet32")}
    assert [replace(c, models=()) for c in both] == [replace(c, models=()) for c in cases.of_models(["resnet20"], quick=True)]
    assert {c.batch for c in both} == {cases.QUICK_BATCH} and {c.batch for c in cases.of_models(["resnet20"])} == {128}
    assert {c.batch for c in cases.of_models(["resnet20"], batch=5)} == {5}


def test_sizes_of_the_default_models():
    assert {c.in_shape for c in cases.of_models(["vgg16"]) if c.kernel == "linear"} == {(25088,), (4096,)}
    assert len([c for c in cases.of_models(["vgg16"]) if c.kernel == "conv2d"]) == 9        # of 13 layers
    assert cases.of_models(["resnet20"])[0].in_shape == (3, 32, 32)
    assert cases._default_side("resnet18") == cases._default_side("vgg11_bn") == cases._default_side("googlenet") == 224
    assert cases._default_side("nin") == 32
    assert cases.default_batch("resnet110") == 128 and cases.default_batch("resnet101") == 4


def chosen(*words, names=("resnet20", "resnet18")):
    return cases.choose(words, cases.of_models(names, quick=True))


def test_words_choose():
    assert {c.kernel for c in chosen("im2col", "col2im")} == {"im2col", "col2im"}
    assert {c.kernel for c in chosen("conv2d")} == {"conv2d"}
    assert {c.kernel for c in chosen("conv2d*")} == set(cases.CONVOLUTIONS)
    assert {c.shape for c in chosen("16x64x64-32x32x32-3x3")} == {"16x64x64-32x32x32-3x3"}
    of_a_part = chosen("16x64x64")
    assert {c.kernel for c in of_a_part} >= {"conv2d", "batch_norm", "residual_add"}
    assert all((16, 64, 64) in (c.in_shape, c.out_shape) for c in of_a_part)
    assert {c.shape for c in chosen("conv2d", "16x64x64", "7x7")} == {
        "3x64x64-16x64x64-3x3", "16x64x64-16x64x64-3x3", "16x64x64-32x32x32-3x3", "3x64x64-64x32x32-7x7"}, "shapes are alternatives"
    assert all("resnet18" in c.models for c in chosen("resnet18", "linear"))
    assert len(chosen()) == len(cases.of_models(["resnet20", "resnet18"], quick=True))


@pytest.mark.parametrize("words, said", [
    (["conv2"], "did you mean 'conv2d'"), (["99x99x99"], "fits no kernel, shape or model"), (["pool*"], "fits no kernel"),
    (["linear", "16x64x64"], "no kernel is called all of linear 16x64x64"),
])
def test_words_that_choose_nothing(words, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*")):
        chosen(*words)


def test_grouped_convolutions_are_refused():
    layer = Conv2d(4, 3, groups=2)
    layer.build((4, 8, 8), np.random.default_rng(0))
    with pytest.raises(ValueError, match="groups=2.*grouped"):
        list(cases._of_layer(layer, (3, 8, 8)))


# ---------------------------------------------------------------- is it right?
@pytest.mark.parametrize("one", every_kernel() + every_kernel(stride=1, in_shape=(5, 7, 9), batch=1), ids=lambda one: one.name)
def test_every_kernel_agrees_with_its_witness(one):
    arrays = kernels.arrays(one)
    assert relative_error(result_of(one, arrays), sample(one, arrays)) < 2e-6


def damages(result):
    """The ways in which a kernel goes wrong."""
    yield "a corner", lambda y: y.__setitem__((0,) * y.ndim, y.flat[0] + 1)
    yield "a scale", lambda y: y.__imul__(np.float32(1.001))
    yield "the last image", lambda y: y.__setitem__(-1, 0)
    yield "not a number", lambda y: y.__setitem__((0,) * y.ndim, np.nan)
    if result.ndim == 4 and result.shape[3] > 1:
        yield "one to the right", lambda y: y.__setitem__(..., np.roll(y, 1, axis=3))


@pytest.mark.parametrize("one", every_kernel(), ids=lambda one: one.kernel)
def test_its_witness_sees_damage(one):
    arrays = kernels.arrays(one)
    expected, right = sample(one, arrays), result_of(one, arrays)
    for name, damage in damages(right):
        wrong = np.array(right)
        damage(wrong)
        assert relative_error(wrong, expected) > laboratory.LARGEST_ERROR, name
    assert relative_error(right[..., :1], expected) == math.inf
    assert relative_error(right[:, :1], expected) == math.inf


STEPS = [{"stride": 2, "padding": 1}, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
         {"kernel_size": 1, "stride": 2}]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_the_witnesses_are_the_definition(steps):
    """All of it, by loops over every index that share nothing with them."""
    one = case(in_shape=(2, 7, 8), channels=3, **steps)
    a = kernels.arrays(replace(one, kernel="conv2d")) | kernels.arrays(replace(one, kernel="conv2d_weight_grad"))
    a = {name: array.astype(np.float64) for name, array in a.items()}
    taken = {name: getattr(one.windows, name) for name in ("stride", "padding", "dilation")}
    dx, dweight, _ = direct.conv2d_grads(a["dy"], a["x"], a["weight"], **taken)
    expected = {"conv2d": direct.conv2d(a["x"], a["weight"], **taken), "conv2d_input_grad": dx, "conv2d_weight_grad": dweight}
    for kernel, whole_result in expected.items():
        assert relative_error(whole_result, sample(replace(one, kernel=kernel), a)) < 1e-14


def test_the_pools_witnesses_are_the_definition():
    one = case("max_pool2d", in_shape=(2, 7, 8), stride=2, padding=1)
    a = {name: array.astype(np.float64) for name, array in kernels.arrays(replace(one, kernel="max_pool2d_grad")).items()}
    a["x"] = np.round(a["x"])                                           # many ties
    window = (one.windows.kernel_size, one.windows.stride, one.windows.padding)
    assert relative_error(direct.max_pool2d(a["x"], *window), sample(one, a)) == 0
    grad = replace(one, kernel="max_pool2d_grad")
    assert relative_error(direct.max_pool2d_grad(a["dy"], a["x"], *window), sample(grad, a)) < 1e-15


def test_inputs_lie_in_memory_as_layers_hand_them_on():
    arrays = kernels.arrays(case(in_shape=(5, 9, 8)))
    assert arrays["x"].transpose(0, 2, 3, 1).flags.c_contiguous and arrays["weight"].transpose(2, 3, 1, 0).flags.c_contiguous
    assert kernels.arrays(case(in_shape=(3, 9, 8)))["x"].flags.c_contiguous
    assert all(np.array_equal(array, kernels.arrays(case(in_shape=(5, 9, 8)))[name]) for name, array in arrays.items())


@pytest.mark.parametrize("one", every_kernel(in_shape=(5, 9, 8)), ids=lambda one: one.kernel)
def test_kernels_run_on_another_device(one):
    arrays = kernels.arrays(one)
    moved, seconds = measure.upload(arrays, "standin")
    assert seconds > 0 and all(backend.device_of(array) == "standin" for array in moved.values())
    assert all(moved[name].strides == array.strides for name, array in arrays.items())
    result = result_of(one, moved)
    assert backend.device_of(result) == "standin"
    assert relative_error(backend.to_numpy(result), sample(one, arrays)) < 2e-6


# ---------------------------------------------------------------- what it costs
def test_operations_are_the_models_own_count():
    for _, layer in cases.build("resnet20", quick=True).walk():
        if isinstance(layer, Conv2d):
            one = Case("conv2d", layer.in_shape, layer.out_shape, layer.windows, 3, ())
            for kernel in cases.CONVOLUTIONS:
                assert kernels.operations(replace(one, kernel=kernel)) == 2 * 3 * layer.multiply_adds()


def test_costs_by_hand():
    conv = case(in_shape=(3, 8, 8), channels=4, kernel_size=3, batch=2, padding=1)
    x, y, weight, columns = 2 * 3 * 64, 2 * 4 * 64, 4 * 27, 2 * 27 * 64
    assert kernels.least_bytes(conv) == 4 * (x + y + weight)
    assert kernels.least_bytes(replace(conv, kernel="im2col")) == 4 * (x + columns) and kernels.operations(case("im2col")) == 0
    assert kernels.operations(replace(conv, kernel="col2im")) == columns
    pool = case("max_pool2d", in_shape=(3, 8, 8), kernel_size=2, stride=2)
    assert (kernels.operations(pool), kernels.least_bytes(pool)) == (3 * 2 * 3 * 16, 4 * (x + 2 * 3 * 16))
    assert kernels.least_bytes(case("batch_norm_grad", in_shape=(3, 8, 8))) == 4 * 3 * x
    assert kernels.least_bytes(case("residual_add", in_shape=(3, 8, 8))) == 4 * 3 * x
    assert kernels.operations(case("linear_weight_grad")) == 2 * 2 * 10 * 7
    assert kernels.least_bytes(case("linear_input_grad")) == 4 * (2 * 7 + 7 * 10 + 2 * 10)


def test_the_roof_is_the_tighter_limit():
    roof = roofline.Roof(gflops=100.0, gbytes=10.0)
    assert roof.seconds(operations=200 * 10**9, least_bytes=10**9) == 2.0
    assert roof.seconds(operations=10**9, least_bytes=30 * 10**9) == 3.0


def test_the_roofs_are_measured_on_every_device():
    for device in ("cpu", "standin"):
        assert all(limit > 0 for limit in roofline.measure(device, 2, quick=True))


# ---------------------------------------------------------------- time and memory
def test_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0) and Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]).width == 2.0


def test_repetitions_come_after_the_warm_up_and_last_long_enough():
    told = iter([9.0, 0.002] + [0.001, 0.003, 0.002, 0.002, 0.002] * 3)
    care = Care(repeats=3, shortest=0.01, warm_up=2)
    assert measure.repeat(lambda: None, lambda call: next(told), care) == pytest.approx([0.002] * 3)
    assert list(told) == []
    told = iter([1.0, 2.0, 3.0])
    assert measure.repeat(lambda: None, lambda call: next(told), Care.quick(3)) == [1.0, 2.0, 3.0]


def test_the_clocks_time_the_call_once():
    calls = []
    seconds, result = measure.once(lambda: calls.append(1) or "result", measure.wall)
    assert (len(calls), result) == (1, "result") and seconds > 0


def test_a_gpu_is_timed_by_its_events():
    told = []

    class Event:
        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("synchronize")

    like_cupy = SimpleNamespace(cuda=SimpleNamespace(Event=Event, get_elapsed_time=lambda start, end: 250.0))
    assert measure.events(like_cupy)(lambda: told.append("call")) == 0.25
    assert told == ["record", "call", "record", "synchronize"]


def test_temporary_memory_is_what_a_call_holds_beside_its_result():
    kept = []

    def call():
        first = np.empty(5_000_000, np.uint8)
        del first
        kept.append(mc.Tensor([1.0]))
        second = np.empty(3_000_000, np.uint8)
        return second[:].copy()
    found = measure.temporary_bytes(call, "cpu")
    assert found == pytest.approx(3_000_000, rel=0.05)              # 6 MB at most at once, of which 3 are the result
    assert measure.temporary_bytes(lambda: np.empty(4_000_000, np.uint8), "cpu") < 200_000
    assert measure.temporary_bytes(call, "standin") is None


def test_temporary_memory_knows_the_workspaces_that_are_there_already():
    from minicnn.threads import workspace

    def call():
        workspace("test_bench", (2_000_000,), np.uint8)
    call()
    assert measure.temporary_bytes(call, "cpu") == pytest.approx(2_000_000, rel=0.05)


def test_temporary_memory_of_a_gpu_is_what_its_pool_has_grown_by():
    held, told = [1000], []

    def call():
        held[0] += 700
        return SimpleNamespace(nbytes=200)
    pool = SimpleNamespace(free_all_blocks=lambda: told.append("freed"), total_bytes=lambda: held[0])
    device = SimpleNamespace(synchronize=lambda: told.append("waited"))
    like_cupy = SimpleNamespace(get_default_memory_pool=lambda: pool, cuda=SimpleNamespace(Device=lambda: device))
    assert measure._temporary_on_gpu(call, like_cupy) == 500 and told == ["freed", "waited"]


def test_threads_are_given_back():
    from minicnn.threads import get_num_threads, num_threads
    before = get_num_threads()
    with pytest.raises(KeyError), num_threads(3):
        assert get_num_threads() == 3
        raise KeyError
    assert get_num_threads() == before


def test_the_reference_is_the_first_algorithm():
    assert set(engine.algorithms(Windows.of(3, padding=1), "cpu")) == {"im2col", "direct", "winograd"}
    assert engine.algorithms(Windows.of(3, padding=1), "cpu")[0] == "im2col"
    assert "winograd" not in engine.algorithms(Windows.of(3, 2, 1), "cpu")
    assert "winograd" not in engine.algorithms(Windows.of(3, padding=1), "standin")


# ---------------------------------------------------------------- minicnn bench kernels
def test_bench_kernels(minicnn, tmp_path):
    status, out, err = minicnn("bench", "kernels", "--quick", "resnet20", "16x64x64", "--threads", 1, "--backend", "cpu",
                               "--json", "found.json")
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    surroundings, rows = found["environment"], found["results"]
    assert {"date", "minicnn", "Python", "NumPy", "BLAS", "CPU", "cores", "threads", "system"} <= surroundings.keys()
    assert surroundings["threads"] == 1 and surroundings["NumPy"] == np.__version__
    assert found["settings"] == {"words": ["resnet20", "16x64x64"], "batch": None, "repeats": 2, "quick": True, "backend": "cpu"}
    assert found["roofline"]["cpu"]["gflops"] > 0 and found["roofline"]["cpu"]["gbytes"] > 0
    assert {row["kernel"] for row in rows} == {*cases.KERNELS_OF[Conv2d], *cases.KERNELS_OF[BatchNorm2d], "residual_add"}
    for row in rows:
        assert len(row["seconds"]) == 2 and row["error"] <= laboratory.LARGEST_ERROR and row["first_call"] > 0
        assert row["temporary_bytes"] >= 0 and row["transfer"] is None and row["backend"] == "cpu"
    same = [row["algorithm"] for row in rows if (row["kernel"], row["shape"]) == ("conv2d", "16x64x64-16x64x64-3x3")]
    assert sorted(same) == ["direct", "im2col", "winograd"]
    table = [line for line in out.splitlines() if line.startswith(cases.KERNELS)]
    assert len(table) == len(rows) and all(row["shape"] in line for row, line in zip(rows, table, strict=True))
    assert results.read(str(tmp_path / "found.json")) == found


@pytest.mark.parametrize("word", ["winograd", "*winograd*"])
def test_an_algorithm_is_chosen_by_name(word):
    found = laboratory._choose([word, "conv2d"], cases.of_models(["resnet20"], True), ["cpu", "standin"])
    assert {(device, one.algorithm) for device, one in found} == {("cpu", "winograd")}
    both = laboratory._choose(["conv2d", "im2col"], cases.of_models(["resnet20"], True), ["cpu"])
    assert {(one.kernel, one.algorithm) for _, one in both} == {
        ("im2col", ""), *(("conv2d", name) for name in algorithms.ALGORITHMS)}, "im2col is the kernel's name here"


def test_each_algorithm_is_the_one_that_is_timed(monkeypatch):
    seen = []
    monkeypatch.setitem(kernels.KERNELS, "conv2d", kernels.KERNELS["conv2d"]._replace(
        start=lambda one, a: seen.append(algorithms._wish.get()) or kernels._conv2d(one, a)))
    roof = roofline.Roof(1.0, 1.0)
    for variant in laboratory._variants(case(in_shape=(4, 8, 8), padding=1), "cpu"):
        laboratory.measured(variant, "cpu", roof, Care.quick())
    assert seen == ["im2col", "direct", "winograd"]


def test_a_wrong_kernel_is_not_timed(minicnn, tmp_path, monkeypatch):
    right = kernels.KERNELS["residual_add"]
    monkeypatch.setitem(kernels.KERNELS, "residual_add", right._replace(start=lambda one, a: lambda: a["x"] - a["other"]))
    status, out, err = minicnn("bench", "kernels", "--quick", "resnet20", "residual_add", "--threads", 1, "--json", "found.json")
    assert (status, err) == (1, "")
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    assert rows and all(row["problem"] == "WRONG" and row["seconds"] == [] and row["error"] > 0.1 for row in rows)
    assert f"{len(rows)} of {len(rows)} are wrong" in out and "residual_add 16x64x64" in out


def test_too_little_memory_is_a_row_not_the_end(minicnn, tmp_path, monkeypatch):
    def starved(one, arrays=kernels.arrays):
        if one.in_shape[0] == 16:
            raise MemoryError
        return arrays(one)
    monkeypatch.setattr(kernels, "arrays", starved)
    status, out, err = minicnn("bench", "kernels", "--quick", "resnet20", "residual_add", "--json", "found.json")
    assert (status, err) == (0, "") and "1 of 3 found too little memory; a smaller --batch" in out
    assert [row.get("problem") for row in json.loads((tmp_path / "found.json").read_text())["results"]] == ["memory", None, None]


def test_what_was_measured_before_an_interruption_is_kept(minicnn, tmp_path, monkeypatch):
    def interrupted(one, device, roof, care, row=laboratory.measured):
        if one.in_shape[0] == 64:
            raise KeyboardInterrupt
        return row(one, device, roof, care)
    monkeypatch.setattr(laboratory, "measured", interrupted)
    status, _, err = minicnn("bench", "kernels", "--quick", "resnet20", "residual_add", "--json", "found.json")
    assert (status, err) == (130, "minicnn: interrupted\n")
    assert len(results.read(str(tmp_path / "found.json"))["results"]) == 2


def test_not_a_number_is_wrong_and_its_file_still_json(minicnn, tmp_path, monkeypatch):
    right = kernels.KERNELS["residual_add"]
    monkeypatch.setitem(kernels.KERNELS, "residual_add", right._replace(start=lambda one, a: lambda: a["x"] * np.float32("nan")))
    assert minicnn("bench", "kernels", "--quick", "resnet20", "residual_add", "16x64x64", "--json", "found.json")[0] == 1

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    row, = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)["results"]
    assert row["problem"] == "WRONG" and row["error"] is None


@pytest.mark.parametrize("typed, status, words", [
    ("kernels conv2 --quick", 1, "did you mean 'conv2d'"),
    ("kernels --batch 0", 2, "argument --batch"),
    ("kernels --bach 2", 2, "did you mean --batch?"),
    ("kernels resnet20 --quick --json nowhere/found.json", 1, "nowhere/found.json: No such file"),
    ("kernels resnet20 --quick --json .", 1, "Is a directory"),
    ("models vgg61", 1, "did you mean 'vgg1"),
    ("models --layer", 2, "did you mean --layers?"),
    ("tune --quick", 1, "name another file with --out"), ("tune --out nowhere/table.json", 1, "nowhere/table.json: No such file"),
    ("", 2, "WHAT"), ("kernel", 2, "did you mean kernels?"),
    ("compare a.json", 2, "B"), ("compare a.json b.json", 1, "a.json: No such file"),
    ("plot a.json", 1, "a.json: No such file"),
])
def test_one_clear_line(minicnn, tmp_path, typed, status, words):
    found, out, err = minicnn("bench", *typed.split())
    assert (found, out) == (status, "") and err.startswith("minicnn: error: ") and err.count("\n") == 1 and words in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- PyTorch's column
def test_without_pytorch_it_says_so(minicnn, monkeypatch):
    monkeypatch.setattr(rival.importlib.util, "find_spec", lambda name: None)
    status, out, err = minicnn("bench", "kernels", "--quick", "resnet20", "linear", "--pytorch")
    assert status == 1 and err == "minicnn: error: --pytorch needs PyTorch, which is not installed: pip install torch\n"


@pytest.mark.parametrize("one", every_kernel(), ids=lambda one: one.kernel)
def test_pytorch_is_asked_for_the_same(one):
    torch = pytest.importorskip("torch", reason="the rival is PyTorch")
    arrays = kernels.arrays(one)
    result = rival.call_of(torch, one, {name: torch.from_numpy(array) for name, array in arrays.items()})()
    result = result[0] if isinstance(result, tuple) else result
    assert relative_error(result.numpy(), sample(one, arrays)) < 2e-6


def test_the_rivals_answers(monkeypatch):
    pytest.importorskip("torch", reason="the rival is PyTorch")
    one, out = case("conv2d", padding=1), io.StringIO()
    unknown = {**rival.asdict(one), "kernel": "fft"}
    asked = [json.dumps({"case": fields, "care": Care.quick(3)}) for fields in (rival.asdict(one), unknown)]
    monkeypatch.setattr(sys, "argv", ["rival", "1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(asked) + "\n"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(rival, "fall_asleep", lambda: None)
    rival.main()
    monkeypatch.undo()
    version, answer, failed = map(json.loads, out.getvalue().splitlines())
    assert "version" in version and len(answer["seconds"]) == 3 and failed["failed"].startswith("KeyError")
    assert rival.case_of(json.loads(asked[0])["case"]) == one


def test_a_column_for_pytorch():
    row = made_row(seconds=[0.002] * 3) | {"pytorch_seconds": [0.003] * 3}
    columns = tables.kernel_columns(20, gpu=False, pytorch=True)
    line = tables.line(columns, tables.kernel_cells(row, gpu=False, pytorch=True))
    assert line.endswith("3.00      1.50") and "speed-up" in tables.head(columns)
    row["pytorch_seconds"] = None
    assert tables.kernel_cells(row, gpu=False, pytorch=True)[-2:] == ["-", "-"]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("pytorch", [False, True])
@pytest.mark.parametrize("problem", [None, "WRONG", "memory"])
def test_rows_have_the_headings_columns(gpu, pytorch, problem):
    row = made_row() if problem is None else made_row(seconds=[]) | {"problem": problem, "error": None}
    assert len(tables.kernel_cells(row, gpu, pytorch)) == len(tables.kernel_columns(20, gpu, pytorch))


# ---------------------------------------------------------------- minicnn bench models
def test_bench_models(minicnn, tmp_path):
    status, out, err = minicnn("bench", "models", "resnet20", "--quick", "--threads", 1, "--backend", "cpu", "--json", "found.json")
    assert (status, err) == (0, "")
    found = results.read(str(tmp_path / "found.json"))
    assert found["settings"]["names"] == ["resnet20"] and found["environment"]["threads"] == 1
    assert [row["task"] for row in found["results"]] == list(worker.TASKS)
    for row in found["results"]:
        assert (row["model"], row["batch"], len(row["seconds"])) == ("resnet20", 2, 2)
        assert row["peak_bytes"] is None or 20e6 < row["peak_bytes"] < 2e9
        ms = 1e3 * Spread.of(row["seconds"]).median
        line, = (line for line in out.splitlines() if line.startswith(f"resnet20  {row['task']}"))
        assert f"{2e3 / ms:.1f}" in line and f"{ms / 2:.2f}" in line


def request(**more):
    return {"model": "resnet20", "backend": "cpu", "threads": 1, "quick": True, "batch": 2, "care": Care.quick(), **more}


def test_layer_by_layer():
    found = worker.answer(request(do="layers"))["layers"]
    model = cases.build("resnet20", quick=True)
    leaves = {row.path: row.kind for row in model.summary().rows}
    assert {row["path"]: row["kind"].replace("addition", "Residual") for row in found} == leaves
    assert all(row["inference"] > 0 and row["forward"] > 0 and row["backward"] > 0 for row in found)
    times = {row["path"]: [row[part] for part in results.LAYER_PARTS] for row in found}
    assert times["layer1.0.conv1"] == times["layer1.2.conv2"], "equal layers are timed once"
    table = whole.layer_table([{"task": "inference", "seconds": [1.0], "layers": found},
                               {"task": "training step", "seconds": [2.0]}])
    assert all(f"{row['path']} " in table for row in found) and "all 9 " in table
    assert "1000 ms (inference), 2000 ms (training step)" in table


def test_a_training_step_trains():
    model = cases.build("resnet20", quick=True)
    step = worker.task(model, "training step", 2, "cpu")
    before = model.state_dict()
    step()
    moved = model.state_dict()
    assert all((moved[name] != before[name]).any() for name in ("conv1.weight", "linear.weight", "bn1.running_mean"))
    assert worker.task(model, "inference", 2, "cpu")().shape == (2, 10)
    assert all(np.array_equal(value, model.state_dict()[name]) for name, value in moved.items()), "inference changes nothing"


def test_a_model_that_fails_is_a_row(minicnn, tmp_path, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="")
    monkeypatch.setattr(whole.subprocess, "run", lambda *words, **more: killed)
    monkeypatch.setattr(results, "_commit", lambda: None)               # git would be killed, too
    status, out, _ = minicnn("bench", "models", "resnet20", "--quick", "--layers", "--json", "found.json", "--backend", "cpu")
    assert status == 1 and "ended with code -9; -9 is mostly a lack of memory: try a smaller --batch" in out
    assert results.read(str(tmp_path / "found.json"))["results"][0]["seconds"] == []


def test_a_worker_says_why_it_failed(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request(do="time", task="inference", model="vgg61")) + "\n"))
    monkeypatch.setattr(sys, "stdout", out)
    worker.main()
    monkeypatch.undo()
    assert "no model is called 'vgg61'" in json.loads(out.getvalue())["failed"]


# ---------------------------------------------------------------- files
def made_row(kernel="conv2d", algorithm="im2col", shape="16x8x8-16x8x8-3x3", seconds=(0.001, 0.001, 0.001), **more):
    return {"kernel": kernel, "algorithm": algorithm, "shape": shape, "batch": 2, "backend": "cpu", "operations": 10**6,
            "least_bytes": 10**5, "roof_seconds": 1e-4, "error": 1e-7, "first_call": 0.01, "transfer": None, "temporary_bytes": 10,
            "models": ["resnet20"], "seconds": list(seconds), **more}


def made_file(path, rows, kind="kernels", environment=(), settings=(), **more):
    surroundings = {"date": "2026-01-01", "minicnn": "0.1.0", "CPU": "a CPU", "threads": 2, **dict(environment)}
    content = results.document(kind, surroundings, {"quick": False, "repeats": 9, **dict(settings)}, rows,
                               roofline={"cpu": {"gflops": 100.0, "gbytes": 10.0}}, **more)
    results.write(str(path), content)
    return str(path)


NO_FILES = {
    "not JSON": ("milk, eggs", "is not JSON"), "empty": ("", "is not JSON"), "bytes": (b"\xff\xfe\x00", "is not JSON"),
    "a list": ("[]", "holds no results"), "another's": ('{"format": "minicnn bench 99"}', "holds no results"),
    "deep": ("[" * 100_000, "is not JSON"),
    "no rows": (json.dumps(results.document("kernels", {}, {}, None)), "results must be a list"),
    "no settings": (json.dumps({"format": results.FORMAT, "kind": "kernels", "results": []}), "must be objects"),
    "a kind": (json.dumps({"format": results.FORMAT, "kind": [], "results": []}), "holds no results"),
    "no times": (json.dumps(results.document("kernels", {}, {}, [{"kernel": "conv2d"}])), r"results[0] has no list of seconds"),
    "negative": (json.dumps(results.document("kernels", {}, {}, [made_row(seconds=[-1.0])])), r"results[0] has no list of seconds"),
    "no shape": (json.dumps(results.document("kernels", {}, {}, [{k: v for k, v in made_row().items() if k != "shape"}])),
                 "does not say its shape"),
    "text for a number": (json.dumps(results.document("kernels", {}, {}, [made_row(operations="many")])), "operations"),
    "text for a peak": (json.dumps(results.document("models", {}, {}, [
        {"model": "m", "task": "t", "batch": 1, "backend": "cpu", "seconds": [1.0], "peak_bytes": "much"}])), "peak_bytes"),
    "a roof": (json.dumps(results.document("kernels", {}, {}, [made_row()], roofline={"cpu": 3})), "roofline"),
    "layers": (json.dumps(results.document("models", {}, {}, [
        {"model": "m", "task": "t", "batch": 1, "backend": "cpu", "seconds": [1.0], "layers": [{"kind": "ReLU"}]}])), "layers"),
}


@pytest.mark.parametrize("content, words", NO_FILES.values(), ids=NO_FILES)
def test_bad_files_are_one_clear_line(minicnn, tmp_path, content, words):
    (tmp_path / "bad.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    good = made_file("good.json", [made_row()])
    for command in (["compare", "bad.json", good], ["compare", good, "bad.json"], ["plot", "bad.json"]):
        status, _, err = minicnn("bench", *command)
        assert status == 1 and err.startswith("minicnn: error: bad.json ") and err.count("\n") == 1 and words in err, command
    assert not (tmp_path / "bad.png").exists()


# ---------------------------------------------------------------- minicnn bench compare
def compared(minicnn, before, after, **more):
    a, b = made_file("a.json", before), made_file("b.json", after, **more)
    status, out, err = minicnn("bench", "compare", a, b)
    assert (status, err) == (0, "")
    return out


def test_compare_tells_what_changed_beyond_the_noise(minicnn):
    steady, wide = [0.99e-3, 1e-3, 1.01e-3] * 3, [0.8e-3, 1e-3, 1.2e-3] * 3
    rows = {"a": steady, "b": steady, "c": wide, "d": steady, "e": [1e-3] * 9}
    later = {"a": [2 * s for s in steady], "b": [s / 2 for s in steady], "c": [1.3 * s for s in wide], "d": steady,
             "e": [1.02e-3] * 9}
    out = compared(minicnn, [made_row(shape=name, seconds=s) for name, s in rows.items()],
                   [made_row(shape=name, seconds=s) for name, s in later.items()])
    assert ("slower    2.00x  conv2d im2col a batch 2: 1.00 -> 2.00 ms\n"
            "faster    2.00x  conv2d im2col b batch 2: 1.00 -> 0.500 ms\n") in out
    assert "2 of 5 changed; 3 within the noise" in out and "differ by more than the sum of both spreads" in out
    assert "im2col c" not in out and "im2col e" not in out and "NOTE" not in out


def test_compare_tells_what_is_in_one_file_alone(minicnn):
    out = compared(minicnn, [made_row(), made_row("linear", "", "4-5")], [made_row(), made_row("linear", "", "7-8")])
    assert "0 of 1 changed" in out
    assert "only in a.json: 1, such as linear 4-5" in out and "only in b.json: 1, such as linear 7-8" in out
    assert "nothing is in both files" in compared(minicnn, [made_row(shape="x")], [made_row(shape="y")])


def test_compare_leaves_out_what_was_not_timed(minicnn):
    assert "0 of 1 changed" in compared(minicnn, [made_row()], [made_row(seconds=[])])


@pytest.mark.parametrize("environment, settings, note", [
    ({"CPU": "another"}, {}, "NOTE  other machines: what differs is not the code's alone: CPU a CPU / another"),
    ({"GPU": "H1"}, {}, "GPU none / H1"), ({"threads": 4}, {}, "NOTE  other versions or threads: threads 2 / 4"),
    ({}, {"repeats": 3}, "NOTE  other settings: repeats 9 / 3"), ({}, {"quick": True}, "NOTE  measured with --quick"),
])
def test_compare_says_when_files_are_of_different_machines(minicnn, environment, settings, note):
    out = compared(minicnn, [made_row()], [made_row()], environment=environment, settings=settings)
    assert any(line.startswith("NOTE") and note in line for line in out.splitlines())


def test_compare_models(minicnn):
    def row(task, seconds, peak):
        return {"model": "vgg16", "task": task, "batch": 4, "backend": "cpu", "seconds": [seconds] * 5, "peak_bytes": peak}
    made_file("a.json", [row("inference", 1.0, 10**9), row("training step", 3.0, None)], "models")
    made_file("b.json", [row("inference", 1.0, 2 * 10**9), row("training step", 2.0, 10**9)], "models")
    _, out, _ = minicnn("bench", "compare", "a.json", "b.json")
    assert "larger    2.00x  vgg16 inference batch 4: 1,000 -> 2,000 MB of peak memory" in out
    assert "faster    1.50x  vgg16 training step batch 4: 3000 -> 2000 ms" in out and "2 of 2 changed" in out
    made_file("c.json", [made_row()])
    status, _, err = minicnn("bench", "compare", "a.json", "c.json")
    assert status == 1 and "a.json holds models and c.json kernels" in err


# ---------------------------------------------------------------- minicnn bench plot
def drawn_rows():
    times = {"im2col": 1e-3, "direct": 2e-3, "winograd": 5e-4}
    rows = [made_row(kernel, algorithm, shape, [seconds * scale] * 3) for kernel in cases.CONVOLUTIONS
            for shape, scale in (("16x8x8-16x8x8-3x3", 1), ("32x8x8-32x8x8-3x3", 2)) for algorithm, seconds in times.items()]
    return [*rows, made_row("im2col", "", "16x8x8-16x8x8-3x3", operations=0), made_row("residual_add", "", "16x8x8")]


@pytest.mark.parametrize("name, magic", [("picture.svg", b"<?xml")])
def test_plot_writes_pictures(minicnn, tmp_path, name, magic):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    made_file("found.json", drawn_rows())
    status, out, err = minicnn("bench", "plot", "found.json", "--out", name)
    assert (status, out, err) == (0, f"in {name}: 20 kernels\n", "") and (tmp_path / name).read_bytes().startswith(magic)


def test_the_roofline_holds_every_kernel_that_computes():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found = json.loads(json.dumps(results.document("kernels", {"CPU": "a CPU", "threads": 2}, {}, drawn_rows(),
                                                   roofline={"cpu": {"gflops": 100.0, "gbytes": 10.0}})))
    figure = plot._kernels(found, found["results"])
    roof, *bars = figure.axes
    assert len(roof.collections) == 19 and roof.get_xscale() == roof.get_yscale() == "log"
    assert roof.collections[0].get_offsets().tolist() == [[10.0, 1.0]]              # operations a byte, GFLOP/s
    slope, flat = (line.get_xydata() for line in roof.lines)
    assert np.allclose(slope[:, 1], 10 * slope[:, 0]) and set(flat[:, 1]) == {100.0} and slope[-1, 0] == flat[0, 0] == 10.0
    assert len(bars) == 3 and all(len(axes.patches) == 6 for axes in bars)
    assert bars[0].patches[0].get_width() == pytest.approx(2.0), "the shape that takes the longest comes first"
    assert [text.get_text() for text in bars[-1].get_legend().get_texts()] == ["im2col", "direct", "winograd"]


@pytest.mark.parametrize("rows", [[made_row("linear", "", "4-5")], [made_row("im2col", "", "4-5", operations=0)], [made_row()],
                                  [made_row(), made_row() | {"backend": "cuda"}]])
def test_plot_of_little(minicnn, tmp_path, rows):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    made_file("found.json", rows)
    assert minicnn("bench", "plot", "found.json")[0] == 0 and (tmp_path / "found.png").exists()


@pytest.mark.parametrize("layers", [False, True])
def test_plot_of_models(minicnn, tmp_path, layers):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    parts = [{"path": "a", "kind": kind, "out_shape": [1], "inference": 1.0, "forward": 1.0, "backward": 0.0}
             for kind in ("Conv2d", "Odd")]
    rows = [{"model": "vgg16", "task": task, "batch": 4, "backend": "cpu", "seconds": [1.0], "peak_bytes": None}
            for task in worker.TASKS]
    if layers:
        rows[0]["layers"] = parts
    made_file("found.json", rows, "models")
    assert minicnn("bench", "plot", "found.json")[0] == 0 and (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_cannot(minicnn, tmp_path, monkeypatch):
    made_file("found.json", [made_row()])
    made_file("nothing.json", [made_row(seconds=[])])
    assert "ends in one of .png, .svg, .pdf" in minicnn("bench", "plot", "found.json", "--out", "picture.gif")[2]
    assert "there is nothing to draw" in minicnn("bench", "plot", "nothing.json")[2]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = minicnn("bench", "plot", "found.json")
    assert (status, err) == (1, "minicnn: error: pictures need matplotlib, which is not installed: pip install matplotlib\n")
    assert not (tmp_path / "found.png").exists()


# ---------------------------------------------------------------- minicnn bench tune
def test_tune_writes_the_table_that_auto_reads(minicnn, tmp_path, monkeypatch):
    some = [one for one in tune.to_measure(quick=True) if one.in_shape[0] <= 16]
    assert {one.kernel for one in tune.to_measure(quick=True)} == set(cases.CONVOLUTIONS)
    assert {one.windows.kernel_size for one in some} == {(3, 3)} and {one.batch for one in some} == {1, 2}
    assert {max(one.windows.stride) for one in some} == {1, 2}
    monkeypatch.setattr(tune, "to_measure", lambda quick: some)
    fastest = {"conv2d": "winograd", "conv2d_input_grad": "direct", "conv2d_weight_grad": "im2col"}
    monkeypatch.setattr(tune, "times", lambda one, care: {name: 2.0 - (name == fastest[one.kernel])
                                                          for name in algorithms.ALGORITHMS})
    status, out, err = minicnn("bench", "tune", "--quick", "--threads", 1, "--out", "table.json")
    assert (status, err) == (0, "") and f"in table.json: {len(some)} convolutions" in out
    monkeypatch.setattr(algorithms, "TABLE", tmp_path / "table.json")
    for cache in (algorithms._table, algorithms._nearest):
        cache.cache_clear()
    try:
        array, windows = np.zeros(1, np.float32), Windows.of(3, padding=1)
        for kernel, name in fastest.items():
            assert algorithms.choose(None, tune.TABLE_NAMES[kernel], array, windows, 1, 16, 16, 4096) == name
    finally:
        for cache in (algorithms._table, algorithms._nearest):
            cache.cache_clear()
    assert json.loads((tmp_path / "table.json").read_text())["measured"]["threads"] == 1


def test_tune_leaves_out_what_is_wrong(monkeypatch):
    one = case(in_shape=(4, 8, 8), padding=1)
    assert set(tune.times(one, Care.quick())) == {"im2col", "direct", "winograd"}
    right = kernels.KERNELS["conv2d"]
    monkeypatch.setitem(kernels.KERNELS, "conv2d", right._replace(start=lambda one, a: (
        (lambda: 2 * right.start(one, a)()) if one.algorithm == "winograd" else right.start(one, a))))
    assert set(tune.times(one, Care.quick())) == {"im2col", "direct"}
    assert tune.entry(one, {"im2col": 2.0, "direct": 1.0}) == {
        "channels": 4, "filters": 4, "pixels": 128, "stride": 1, "algorithm": "direct"}


# ---------------------------------------------------------------- around it
def test_importing_minicnn_leaves_the_laboratory_alone():
    code = "import sys, minicnn, minicnn.cli; print([name for name in sys.modules if name.startswith('minicnn.bench')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(results.minicnn, "__file__", str(tmp_path / "minicnn" / "__init__.py"))
    assert results._commit() is None


def test_a_process_falls_asleep():
    began = time.monotonic()
    rival.fall_asleep(limit=0.5)
    assert time.monotonic() >= began
