"""Every algorithm of the convolution, for all three maps, against loops and a float64 reference; and how one is chosen."""
import contextlib
import json
import threading
import time
from typing import NamedTuple
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import Device, host, relative_error, same

import minicnn as mc
from minicnn import ops
from minicnn.kernels import algorithms, conv, direct, im2col, tapwise, winograd
from minicnn.kernels.algorithms import ALGORITHMS
from minicnn.kernels.windows import Windows

MAPS = ("forward", "input_grad", "weight_grad")
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def numbers(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def channels_last(array):
    """The same numbers with the channels next to each other in memory, as the kernels leave theirs."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def filters_last(weight):
    """The same filters in memory as (kh, kw, C, K), as layers keep theirs."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).transpose(3, 2, 0, 1)


class Conv(NamedTuple):
    """A convolution's arrays and settings; dy: an output gradient that fits."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    dy: np.ndarray
    how: dict

    def by(self, algorithm):
        """y, dx and dweight, each map asked for the algorithm."""
        return (ops.conv2d(self.x, self.weight, self.bias, **self.how, algorithm=algorithm),
                ops.conv2d_input_grad(self.dy, self.weight, self.x.shape[2:], **self.how, algorithm=algorithm),
                ops.conv2d_weight_grad(self.x, self.dy, self.weight.shape[2:], **self.how, algorithm=algorithm))


def check(case, expected, limit, algorithm):
    for which, found, right in zip(MAPS, case.by(algorithm), expected, strict=True):
        assert found.dtype == case.x.dtype
        same(found, right, limit, f"{which} by {algorithm}")


def loops(case):
    """The three maps as kernels.direct writes them out."""
    dx, dweight, _ = direct.conv2d_grads(case.dy, case.x, case.weight, **case.how)
    return direct.conv2d(case.x, case.weight, case.bias, **case.how), dx, dweight


@contextlib.contextmanager
def cut_small(size):
    """Blocks of about `size` tiles, rows or pixels, so that small images are cut in every way that large ones are."""
    with mock.patch.multiple(im2col, COLUMN_BYTES=size * 200, LEAST_ROWS=1), \
            mock.patch.object(tapwise, "BLOCK_BYTES", size * 200), \
            mock.patch.multiple(winograd, _tiles_a_block=lambda c, k: size, SPECTRUM_STEP=size):
        yield


# ---------------------------------------------------------------- the same numbers
@st.composite
def cases(draw, kernel=st.just((3, 3)), any_window=False):
    """Sizes 1 to 13, of which most are no multiple of a tile's 4; padding 0 to 2; memory in either order."""
    kernel, pairs = draw(kernel), st.tuples(st.integers(1, 3), st.integers(1, 3))
    how = {"stride": draw(pairs), "dilation": draw(pairs), "groups": draw(st.integers(1, 2))} if any_window else {}
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    how = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, **how, "padding": padding}
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, how["dilation"], strict=True)]
    size = [draw(st.integers(max(1, r - 2 * p), 13)) for r, p in zip(reach, how["padding"], strict=True)]
    groups, n = how["groups"], draw(st.integers(1, 4))
    c, k = draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**32 - 1))
    x, weight = numbers(n, groups * c, *size, seed=seed), numbers(k, c, *kernel, seed=seed + 1)
    if draw(st.booleans()):
        x, weight = channels_last(x), filters_last(weight)
    windows = Windows.of(kernel, how["stride"], how["padding"], how["dilation"])
    dy = numbers(n, k, *windows.out_size(tuple(size)), seed=seed + 2)
    return Conv(x, weight, numbers(k, seed=seed + 3), channels_last(dy) if draw(st.booleans()) else dy, how)


@hypothesis.given(case=cases(), size=st.sampled_from([1, 2, 3, 5, 1000]), few=st.booleans())
def test_three_by_three_against_loops(threads, case, size, few):
    """Winograd also with its steps taken for all tiles at once (`few`), which real layers of many channels choose."""
    expected = loops(case)
    with cut_small(size), mock.patch.object(winograd, "_few_tiles", lambda *_: few):
        for algorithm in ALGORITHMS:
            check(case, expected, 1e-11, algorithm)


@hypothesis.given(case=cases(st.tuples(st.integers(1, 4), st.integers(1, 4)), any_window=True), size=st.sampled_from([1, 3, 1000]))
def test_any_other_convolution_against_loops(threads, case, size):
    expected = loops(case)
    with cut_small(size):
        for algorithm in ("direct", "im2col", "auto"):
            check(case, expected, 1e-11, algorithm)


def by_einsum(case):
    """The three maps in float64, of stride 1: one product over all windows, nothing shared with the kernels."""
    x, weight, dy = (a.astype(np.float64) for a in (case.x, case.weight, case.dy))
    (ph, pw), (p, q) = case.how["padding"], dy.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], (2, 3))
    dx = np.zeros_like(padded)
    for i, j in np.ndindex(*weight.shape[2:]):
        dx[:, :, i:i + p, j:j + q] += np.einsum("nkpq,kc->ncpq", dy, weight[:, :, i, j], optimize=True)
    return (np.einsum("ncpqij,kcij->nkpq", seen, weight, optimize=True) + case.bias.astype(float)[:, None, None],
            dx[:, :, ph:ph + x.shape[2], pw:pw + x.shape[3]], np.einsum("ncpqij,nkpq->kcij", seen, dy, optimize=True))


def layer(n, channels, filters, size, seed=0):
    """A 3x3 layer as it is met in a network: rectified images, He's weights, float32, memory as the layers keep it."""
    x = np.maximum(numbers(n, channels, size, size, seed=seed, dtype=np.float32), 0)
    weight = numbers(filters, channels, 3, 3, seed=seed + 1, dtype=np.float32) * np.float32((2 / (9 * channels)) ** 0.5)
    dy = numbers(n, filters, size, size, seed=seed + 2, dtype=np.float32)
    return Conv(channels_last(x), filters_last(weight), numbers(filters, seed=seed + 3, dtype=np.float32), channels_last(dy),
                {"stride": 1, "dilation": 1, "groups": 1, "padding": (1, 1)})


def check_error(case, few):
    expected = by_einsum(case)
    with mock.patch.object(winograd, "_few_tiles", lambda *_: few):
        for which, found, right in zip(MAPS, case.by("winograd"), expected, strict=True):
            assert found.dtype == np.float32
            error = relative_error(found, right)
            assert 0 < error < 2e-5, f"{which}: {error:.1e}"


SMALL = [(2, 3, 16, 32), (2, 16, 16, 32), (2, 32, 32, 16), (4, 64, 64, 8), (2, 3, 64, 30), (2, 64, 128, 14)]
LARGE = [(2, 64, 64, 56), (2, 128, 128, 56), (2, 128, 256, 28), (2, 256, 256, 28), (2, 256, 512, 14), (4, 512, 512, 14),
         (4, 512, 512, 7), (16, 512, 512, 14)]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("shape", SMALL + [pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE], ids=str)
def test_winograds_rounding_on_the_layers_of_vgg_and_resnet(shape, few):
    """(images, channels, filters, size), against float64: below 2e-5 of the largest number, in every map."""
    check_error(layer(*shape), few)


@each_algorithm
def test_no_images_at_all(algorithm, threads):
    for dtype in (np.float32, np.float64):
        x, weight = np.zeros((0, 3, 5, 6), dtype), numbers(4, 3, 3, 3, dtype=dtype)
        case = Conv(x, weight, numbers(4, dtype=dtype), np.zeros((0, 4, 5, 6), dtype), {"padding": 1})
        y, dx, dweight = case.by(algorithm)
        assert (y.shape, dx.shape) == ((0, 4, 5, 6), x.shape)
        np.testing.assert_array_equal(dweight, np.zeros_like(weight))


@each_algorithm
def test_nothing_is_written_into_what_is_given(algorithm, threads):
    case = layer(3, 8, 12, 13)
    arrays = (case.x, case.weight, case.bias, case.dy)
    before = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    case.by(algorithm)
    for a, b in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- the same bits
def dawdling(kernel, rng=np.random.default_rng(0)):
    """The kernel, which now and then takes longer, so that blocks end in another order."""
    def slow(*args):
        time.sleep(float(rng.uniform(0, 1e-3)))
        return kernel(*args)
    return slow


@each_algorithm
@pytest.mark.parametrize("few", [False, True])
def test_the_same_threads_give_the_same_bits(algorithm, threads, few):
    """Whichever thread is held up on the way."""
    case = layer(5, 8, 12, 13)
    with cut_small(20), mock.patch.object(winograd, "_few_tiles", lambda *_: few):
        expected = case.by(algorithm)
        for _ in range(2):
            with mock.patch.object(winograd.ToSpectrum, "__call__", dawdling(winograd.ToSpectrum.__call__)), \
                    mock.patch.object(im2col, "columns", dawdling(im2col.columns)):
                for which, found, right in zip(MAPS, case.by(algorithm), expected, strict=True):
                    np.testing.assert_array_equal(found, right, err_msg=which)


# ---------------------------------------------------------------- what is done to each block
@pytest.mark.parametrize(("algorithm", "groups"), [("direct", 1), ("im2col", 1), ("winograd", 1), ("direct", 2), ("im2col", 2)])
@pytest.mark.parametrize("few", [False, True])
def test_finish_sees_every_row_once_after_the_bias(algorithm, threads, groups, few):
    """(m, K) and the number of its first row; what it writes stands in the result."""
    case = layer(3, 4, 6, 11)
    weight, windows = case.weight[:, :4 // groups], Windows.of(3, 1, 1)
    plain = conv.conv2d(case.x, weight, case.bias, windows, groups, algorithm)
    seen, lock = [], threading.Lock()

    def finish(rows, first):
        assert rows.shape[1] == 6
        with lock:
            seen.extend(range(first, first + len(rows)))
        rows *= np.arange(first, first + len(rows), dtype=rows.dtype)[:, None]

    with cut_small(4), mock.patch.object(winograd, "_few_tiles", lambda *_: few):
        y = conv.conv2d(case.x, weight, case.bias, windows, groups, algorithm, finish)
    assert sorted(seen) == list(range(3 * 11 * 11))
    same(y, plain * np.arange(3 * 11 * 11).reshape(3, 1, 11, 11), 1e-5)


# ---------------------------------------------------------------- choosing
@contextlib.contextmanager
def spied():
    """Collect (map, algorithm) of every kernel that runs."""
    used = []

    def noting(which, name, kernel):
        def noted(*args):
            used.append((which, name))
            return kernel(*args)
        return noted

    with contextlib.ExitStack() as stack:
        for which, table in zip(MAPS, (conv.FORWARD, conv.INPUT_GRAD, conv.WEIGHT_GRAD), strict=True):
            stack.enter_context(mock.patch.dict(table, {name: noting(which, name, k) for name, k in table.items()}))
        yield used


def used_by(run):
    with spied() as used:
        run()
    return {name for _, name in used}


def step(x, weight, **how):
    """Forward and backward of both arguments."""
    x, weight = mc.Tensor(x, requires_grad=True), mc.Tensor(weight, requires_grad=True)
    y = ops.conv2d(x, weight, padding=1, **how)
    y.sum().backward()
    return y.numpy(), x.grad.numpy(), weight.grad.numpy()


X, WEIGHT = numbers(2, 3, 9, 9, dtype=np.float32), numbers(4, 3, 3, 3, dtype=np.float32)


@each_algorithm
def test_one_call_names_the_algorithm_of_all_its_maps(algorithm):
    with spied() as used:
        step(X, WEIGHT, algorithm=algorithm)
    assert sorted(used) == sorted((which, algorithm) for which in MAPS)


@each_algorithm
def test_a_block_names_the_algorithm_of_all_calls_inside(algorithm):
    with spied() as used, mc.algorithm(algorithm):
        step(X, WEIGHT)
        ops.conv2d_relu(X, WEIGHT)
        ops.conv2d_affine(X, WEIGHT, np.ones(4, np.float32), np.zeros(4, np.float32))
    assert set(used) == {(which, algorithm) for which in MAPS}
    assert len(used) == 5


def test_the_innermost_block_counts_and_the_call_before_it():
    def conv2d(**how):
        return used_by(lambda: ops.conv2d(X, WEIGHT, **how))

    outside = conv2d()
    with mc.algorithm("direct"):
        assert conv2d() == {"direct"}
        with mc.algorithm("winograd"):
            assert conv2d() == {"winograd"}
            assert conv2d(algorithm="im2col") == {"im2col"}
            with mc.algorithm("auto"):
                assert conv2d() == outside
        assert conv2d() == {"direct"}
        with pytest.raises(KeyError), mc.algorithm("im2col"):
            raise KeyError
        assert conv2d() == {"direct"}
    assert conv2d() == outside


def test_a_block_is_its_own_threads_alone():
    found = []
    with mc.algorithm("direct"):
        other = threading.Thread(target=lambda: found.append(algorithms._wish.get()))
        other.start()
        other.join()
    assert found == ["auto"]


@pytest.mark.parametrize("name", ["fft", "Winograd", "", None, 3])
def test_an_unknown_algorithm_is_refused_with_the_known_ones(name):
    calls = [lambda: mc.algorithm(name).__enter__()]
    if name is not None:                                    # None: what the block around says
        calls.append(lambda: ops.conv2d(X, WEIGHT, algorithm=name))
    for call in calls:
        with pytest.raises(ValueError, match="no algorithm") as error:
            call()
        assert all(repr(word) in str(error.value) for word in (name, *ALGORITHMS, "auto"))
    assert algorithms._wish.get() == "auto"


@pytest.mark.parametrize(("shape", "how"), [
    ((4, 3, 5, 5), {}), ((4, 3, 3, 3), {"stride": 2}), ((4, 3, 3, 3), {"stride": (1, 2)}), ((4, 3, 3, 3), {"dilation": 2}),
    ((4, 3, 3, 3), {"padding": 3}), ((4, 3, 1, 1), {}), ((4, 3, 3, 1), {})], ids=str)
def test_winograd_says_what_it_cannot_in_a_call_and_steps_aside_in_a_block(shape, how):
    weight = numbers(*shape)
    x = numbers(2, 3, 9, 9)
    with pytest.raises(ValueError, match='"winograd" computes 3x3 convolutions of stride 1') as error:
        ops.conv2d(x, weight, **how, algorithm="winograd")
    assert '"im2col"' in str(error.value) and "\n" not in str(error.value)
    expected = ops.conv2d(x, weight, **how, algorithm="im2col")
    with mc.algorithm("winograd"), spied() as used:
        np.testing.assert_array_equal(ops.conv2d(x, weight, **how), expected)
    assert used == [("forward", "im2col")]


def test_winograd_and_groups():
    x, weight = numbers(2, 4, 9, 9), numbers(4, 2, 3, 3)
    with pytest.raises(ValueError, match="groups"):
        ops.conv2d(x, weight, groups=2, algorithm="winograd")
    expected = ops.conv2d(x, weight, groups=2, algorithm="im2col")
    with mc.algorithm("winograd"), spied() as used:
        np.testing.assert_array_equal(ops.conv2d(x, weight, groups=2), expected)
    assert {name for _, name in used} == {"im2col"}


def test_winograd_is_for_numpys_arrays():
    x, weight = Device("standin").put(X), Device("standin").put(WEIGHT)
    with pytest.raises(ValueError, match="on NumPy arrays"):
        ops.conv2d(x, weight, algorithm="winograd")
    with mc.algorithm("winograd"):
        same(ops.conv2d(x, weight), ops.conv2d(X, WEIGHT, algorithm="im2col"), 1e-6)
    assert used_by(lambda: step(x, weight)) == {"im2col"}


@pytest.mark.parametrize("algorithm", ["direct", "im2col"])
def test_the_other_algorithms_on_another_librarys_arrays(algorithm):
    device = Device("standin")
    for shape, how in (((4, 3, 3, 3), {}), ((4, 3, 2, 3), {"stride": 2, "dilation": (1, 2)})):
        x, weight = numbers(2, 3, 9, 9), numbers(*shape)
        y = ops.conv2d(x, weight, algorithm="im2col", **how)
        dy = numbers(*y.shape)
        case = Conv(x, weight, None, dy, how)
        there = Conv(device.put(x), device.put(weight), None, device.put(dy), how)
        for found, right in zip(there.by(algorithm), case.by("im2col"), strict=True):
            same(host(found), right, 1e-12)


# ---------------------------------------------------------------- "auto"
def test_float64_is_by_the_reference():
    shapes = [(2, 3, 9, 9), (1, 64, 16, 16), (1, 128, 8, 8)]
    for n, c, h, w in shapes:
        assert used_by(lambda n=n, c=c, h=h, w=w: step(numbers(n, c, h, w), numbers(c, c, 3, 3))) == {"im2col"}


def table():
    return json.loads(algorithms.TABLE.read_text(encoding="utf-8"))


def test_the_table_of_auto_has_its_form():
    """{"measured": where and when, "fastest": {map: [{"channels", "filters", "pixels", "stride", "algorithm"}, ...]}}"""
    assert set(table()) == {"measured", "fastest"}
    assert {"CPU", "NumPy", "threads"} <= set(table()["measured"])
    assert set(table()["fastest"]) == set(MAPS)
    for rows in table()["fastest"].values():
        assert len(rows) >= 10
        for row in rows:
            assert set(row) == {"channels", "filters", "pixels", "stride", "algorithm"}
            assert row["algorithm"] in ALGORITHMS and (row["stride"] == 1 or row["algorithm"] != "winograd")
            assert all(type(row[size]) is int and row[size] >= 1 for size in ("channels", "filters", "pixels", "stride"))
        assert {row["stride"] for row in rows} == {1, 2}


def test_auto_takes_what_was_fastest_on_the_nearest_shape():
    rows = [{"channels": 8, "filters": 8, "pixels": 100, "stride": 1, "algorithm": "winograd"},
            {"channels": 512, "filters": 8, "pixels": 100, "stride": 1, "algorithm": "direct"},
            {"channels": 8, "filters": 8, "pixels": 10000, "stride": 1, "algorithm": "im2col"},
            {"channels": 8, "filters": 8, "pixels": 100, "stride": 2, "algorithm": "direct"}]
    windows, array = Windows.of(3, 1, 1), np.zeros(1, np.float32)

    def chosen(channels, filters, pixels, array=array, windows=windows, groups=1):
        return algorithms.choose(None, "forward", array, windows, groups, channels, filters, pixels)

    algorithms._nearest.cache_clear()
    try:
        with mock.patch.object(algorithms, "_table", lambda: {"forward": rows}):
            assert chosen(8, 8, 100) == chosen(16, 16, 200) == chosen(3, 8, 300) == "winograd"
            assert chosen(512, 8, 100) == chosen(2048, 64, 50) == "direct"
            assert chosen(8, 8, 10000) == chosen(8, 8, 1500) == "im2col"
            assert chosen(8, 8, 0) in ALGORITHMS
            assert chosen(8, 8, 100, array.astype(np.float64)) == "im2col"
            assert chosen(8, 8, 100, windows=Windows.of(3, 2, 1)) == chosen(512, 8, 9, windows=Windows.of(3, (1, 2), 1)) == "direct"
            assert chosen(8, 8, 100, windows=Windows.of(3, 1, 3)) == "im2col", "Winograd cannot, and nothing else was measured"
            assert chosen(8, 8, 100, windows=Windows.of(5, 1, 1)) == chosen(8, 8, 100, groups=2) == "im2col"
    finally:
        algorithms._nearest.cache_clear()


def test_auto_computes_what_the_others_do(threads):
    for shape in SMALL:
        case = layer(*shape)
        check(case, by_einsum(case), 2e-5, None)
