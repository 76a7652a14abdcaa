"""The hypothesis strategies for other people's tests: what they draw is valid, varied, and shrinks to what a person can read."""
import functools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from minicnn import ops
from minicnn.kernels import direct
from minicnn.kernels.windows import Windows, pair
from minicnn.testing import gradcheck, strategies

SEARCH = hypothesis.settings(max_examples=3000, derandomize=True, database=None, deadline=None,
                             suppress_health_check=list(hypothesis.HealthCheck))


def pairs(options, *names):
    return [pair(options[name], name) for name in names]


# ---------------------------------------------------------------- valid, and as an oracle computes them
@given(strategies.conv_cases())
def test_convolutions_are_valid(case):
    x, weight, bias, options = case
    y = ops.conv2d(x, weight, bias, **options)
    stride, padding, dilation = pairs(options, "stride", "padding", "dilation")
    expected = direct.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=options["groups"])
    assert y.size > 0
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert len(case.arrays) == (2 if bias is None else 3)


@given(strategies.pool_cases(ties=None))
def test_poolings_are_valid(case):
    largest, mean = ops.max_pool2d(case.x, **case.options), ops.avg_pool2d(case.x, **case.options)
    assert largest.shape == mean.shape and largest.size > 0
    assert np.isfinite(largest).all() and np.isfinite(mean).all()              # every window sees a pixel
    if not case.options["ceil_mode"]:
        kernel_size, padding = pairs(case.options, "kernel_size", "padding")
        stride = pair(case.options["stride"] or kernel_size, "stride")
        np.testing.assert_array_equal(largest, direct.max_pool2d(case.x, kernel_size, stride, padding))


@given(strategies.norm_cases())
def test_normalisations_are_valid(case):
    assert (case.running_var > 0).all() and case.x.size // case.x.shape[1] >= 2
    y = ops.batch_norm(case.x, case.weight, case.bias, case.running_mean.copy(), case.running_var.copy(), **case.options)
    assert y.shape == case.x.shape and np.isfinite(y).all()


@given(strategies.loss_cases())
def test_losses_are_valid(case):
    assert np.isfinite(ops.cross_entropy(case.logits, case.labels, **case.options))


@given(strategies.broadcastable_pairs())
def test_pairs_broadcast(arrays):
    a, b = arrays
    np.testing.assert_array_equal(ops.add(a, b), np.add(a, b))


@given(st.data())
def test_arrays_have_the_shape_the_dtype_and_the_kind_that_was_asked_for(data):
    x = data.draw(strategies.arrays((3, 4), np.float32, ties=True))
    assert x.shape == (3, 4) and x.dtype == np.float32 and abs(x).max() <= 2 and (4 * x == np.round(4 * x)).all()
    assert len(np.unique(data.draw(strategies.arrays((20,))))) == 20
    assert data.draw(strategies.arrays((9,), positive=True)).min() >= 0.5
    assert data.draw(strategies.arrays(strategies.shapes(2, 2, 3))).ndim == 2
    labels = data.draw(strategies.labels(6, 3))
    assert labels.shape == (6,) and labels.dtype == np.int64 and set(labels) <= {0, 1, 2}


@given(strategies.conv_cases(np.float32), strategies.norm_cases(np.float32, train=True), strategies.pool_cases(np.float32))
def test_the_dtype_is_every_arrays(conv, norm, pool):
    assert {a.dtype for a in (*conv.arrays, *norm[:5], pool.x)} == {np.dtype(np.float32)} and norm.options["train"]


@hypothesis.settings(max_examples=5)
@given(strategies.conv_cases(more=2), strategies.pool_cases(more=2), strategies.norm_cases(train=True))
def test_in_somebodys_gradient_check(conv, pool, norm):
    assert gradcheck(lambda *a: ops.conv2d(*a, **conv.options), conv.arrays)
    assert gradcheck(lambda x: ops.max_pool2d(x, **pool.options), pool.x)
    assert gradcheck(lambda *a: ops.batch_norm(*a, norm.running_mean.copy(), norm.running_var.copy(), **norm.options), norm[:3])


# ---------------------------------------------------------------- varied
def kernel(case):
    return case.weight.shape[2:]


CONVOLUTIONS = {
    "a stride as an int": lambda c: isinstance(c.options["stride"], int) and c.options["stride"] > 1,
    "a stride as a pair of two sizes": lambda c: isinstance(c.options["stride"], tuple) and len(set(c.options["stride"])) == 2,
    "padding as a pair": lambda c: isinstance(c.options["padding"], tuple) and max(c.options["padding"]) > 0,
    "dilation over more than one pixel": lambda c: pair(c.options["dilation"], "")[0] == 2 and kernel(c)[0] > 1,
    "groups": lambda c: c.options["groups"] > 1 and c.weight.shape[1] > 1,
    "depthwise": lambda c: c.options["groups"] == c.x.shape[1] == len(c.weight) > 1,
    "a kernel of one pixel": lambda c: kernel(c) == (1, 1),
    "an even kernel that is not square": lambda c: kernel(c)[0] == 2 and kernel(c)[1] == 3,
    "an image of one pixel": lambda c: c.x.shape[2:] == (1, 1),
    "an image of one pixel under a padded kernel": lambda c: c.x.shape[2:] == (1, 1) and min(kernel(c)) > 1,
    "an even and an odd side": lambda c: c.x.shape[2] % 2 == 0 and c.x.shape[3] % 2 == 1,
    "pixels that no window reaches": lambda c: pair(c.options["stride"], "")[0] > kernel(c)[0] and c.x.shape[2] > 3,
    "no bias": lambda c: c.bias is None,
    "a bias": lambda c: c.bias is not None,
    "several images": lambda c: len(c.x) > 1,
}


def windows(case):
    stride = case.options["stride"]
    kernel_size = case.options["kernel_size"]
    return Windows.of(kernel_size, kernel_size if stride is None else stride, case.options["padding"])


def hangs_over(case):
    size, without = case.x.shape[2:], windows(case)
    with_ceil = Windows(without.kernel_size, without.stride, without.padding, ceil_mode=True)
    return case.options["ceil_mode"] and not larger_than_the_image(case) and with_ceil.out_size(size) != without.out_size(size)


def larger_than_the_image(case):
    window = windows(case)
    return any(k > n + 2 * p for k, n, p in zip(window.kernel_size, case.x.shape[2:], window.padding, strict=True))


POOLINGS = {
    "overlap": lambda c: windows(c).stride[0] < windows(c).kernel_size[0],
    "gaps": lambda c: windows(c).stride[1] > windows(c).kernel_size[1],
    "the stride of the kernel": lambda c: c.options["stride"] is None and windows(c).kernel_size[0] > 1,
    "padding on one side only": lambda c: sorted(windows(c).padding) == [0, 1],
    "padding as an int": lambda c: c.options["padding"] == 1,
    "a window over the edge": hangs_over,
    "a window larger than the image": larger_than_the_image,
    "an image of one pixel": lambda c: c.x.shape[2:] == (1, 1) and max(windows(c).kernel_size) > 1,
    "equal pixels": lambda c: len(np.unique(c.x)) < c.x.size,
    "a pair as a kernel": lambda c: isinstance(c.options["kernel_size"], tuple) and len(set(c.options["kernel_size"])) == 2,
}
NORMALISATIONS = {
    "training on two values": lambda c: c.options["train"] and c.x.size == 2 * c.x.shape[1],
    "inference": lambda c: not c.options["train"],
    "one image": lambda c: len(c.x) == 1,
    "several channels": lambda c: c.x.shape[1] > 1,
}
PAIRS = {
    "one lacks an axis": lambda ab: ab[0].ndim < ab[1].ndim,
    "the other lacks an axis": lambda ab: ab[0].ndim > ab[1].ndim,
    "both are stretched": lambda ab: np.broadcast(*ab).size > max(a.size for a in ab),
    "a scalar": lambda ab: ab[0].ndim == 0 and ab[1].size > 1,
}
STRATEGIES = {"conv": (strategies.conv_cases(), CONVOLUTIONS), "pool": (strategies.pool_cases(ties=None), POOLINGS),
              "norm": (strategies.norm_cases(), NORMALISATIONS), "pair": (strategies.broadcastable_pairs(), PAIRS)}


@functools.cache
def drawn(name):
    """Four hundred examples of a strategy, the same ones every time."""
    examples = []

    @hypothesis.settings(SEARCH, max_examples=400, phases=[hypothesis.Phase.generate])
    @given(STRATEGIES[name][0])
    def collect(example):
        examples.append(example)
    collect()
    return examples


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, (_, features) in STRATEGIES.items() for what in features])
def test_the_strategy_draws_it(name, what):
    feature = STRATEGIES[name][1][what]
    assert any(map(feature, drawn(name)))


# ---------------------------------------------------------------- shrinking
def test_a_case_shrinks_to_its_smallest():
    plain = hypothesis.find(strategies.conv_cases(), lambda case: True, settings=SEARCH)
    assert plain.x.shape == (1, 1, 1, 1) and plain.weight.shape == (1, 1, 1, 1) and plain.bias is None
    assert plain.options == {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    grouped = hypothesis.find(strategies.conv_cases(), lambda case: case.options["groups"] > 1, settings=SEARCH)
    assert grouped.x.shape == (1, 2, 1, 1) and grouped.options == {"stride": 1, "padding": 0, "dilation": 1, "groups": 2}
    wide = hypothesis.find(strategies.pool_cases(), lambda c: ops.max_pool2d(c.x, **c.options).shape[3] > 1, settings=SEARCH)
    assert wide.x.shape == (1, 1, 1, 2) and wide.options["kernel_size"] == 1 and not wide.options["ceil_mode"]


# ---------------------------------------------------------------- hypothesis is optional
def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_package_does_not_import_hypothesis():
    done = run("import sys, minicnn as mc; mc.testing.specimens; sys.exit('hypothesis' in sys.modules)")
    assert done.returncode == 0, done.stderr
    assert run("import sys, minicnn as mc; mc.testing.strategies; sys.exit('hypothesis' not in sys.modules)").returncode == 0


def test_without_hypothesis_one_line_says_how_to_get_it():
    done = run("import sys; sys.modules['hypothesis'] = None\nimport minicnn.testing as t\nt.gradcheck\nt.strategies")
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last == 'ImportError: minicnn.testing.strategies needs hypothesis: pip install hypothesis'
    with pytest.raises(AttributeError, match="stratagems"):
        import minicnn.testing
        _ = minicnn.testing.stratagems
