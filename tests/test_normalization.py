"""Batch normalisation: both modes, running statistics, drawn shapes, float32 with a large mean, what does not fit."""
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import check_gradients, host, naive_batch_norm, nothing_written, same

import minicnn as mc
from minicnn import ops


@st.composite
def batches(draw, least=2):
    """(x, weight, bias) with at least `least` numbers a channel."""
    shape = tuple(draw(st.integers(1, 3)) for _ in range(4))
    hypothesis.assume(shape[0] * shape[2] * shape[3] >= least)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal(shape) * rng.uniform(0.5, 3) + rng.uniform(-3, 3)
    return x, rng.standard_normal(shape[1]), rng.standard_normal(shape[1])


def statistics(device, channels, dtype=np.float64):
    return device.put(np.zeros(channels, dtype)), device.put(np.ones(channels, dtype))


def in_training(device, eps=1e-5):
    return lambda x, w, b: ops.batch_norm(x, w, b, *statistics(device, x.shape[1], x.dtype), train=True, eps=eps)


@hypothesis.given(case=batches())
def test_training_against_loops(device, case):
    """Not with a tiny variance: differences of a function as steep as 1 / sqrt(eps) would say little."""
    check_gradients(in_training(device, eps=0.1), lambda x, w, b: naive_batch_norm(x, w, b, 0.1), case, device, limit=1e-7)


@hypothesis.given(case=batches(least=1))
def test_inference_against_loops(device, case):
    rng = np.random.default_rng(4)
    mean, var = rng.standard_normal(case[0].shape[1]), rng.uniform(0.5, 2, case[0].shape[1])

    def by_hand(x, w, b):
        y = np.zeros(x.shape)
        for n, c, h, v in np.ndindex(*x.shape):
            y[n, c, h, v] = w[c] * (x[n, c, h, v] - mean[c]) / math.sqrt(var[c] + 1e-5) + b[c]
        return y

    check_gradients(lambda x, w, b: ops.batch_norm(x, w, b, device.put(mean), device.put(var), train=False), by_hand, case, device)


def naive_batch_norm_grads(dy, x, weight, eps):
    """The chain rule number by number: y_k moves with x_i directly, through the mean and through the variance."""
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(len(weight)), np.zeros(len(weight))
    for c in range(len(weight)):
        values, g = x[:, c].ravel(), dy[:, c].ravel()
        m = len(values)
        mean = math.fsum(values) / m
        var = math.fsum((v - mean) ** 2 for v in values) / m
        std = math.sqrt(var + eps)
        dbias[c] = math.fsum(g)
        dweight[c] = math.fsum(gk * (v - mean) / std for gk, v in zip(g, values, strict=True))
        d = []
        for i, vi in enumerate(values):
            d.append(math.fsum(gk * weight[c] * (((k == i) - 1 / m) / std - (vk - mean) * (vi - mean) / (m * std ** 3))
                               for k, (gk, vk) in enumerate(zip(g, values, strict=True))))
        dx[:, c] = np.reshape(d, x[:, c].shape)
    return dx, dweight, dbias


@hypothesis.given(case=batches())
def test_gradients_against_the_chain_rule_and_fused_against_composed(device, case):
    x, weight, _ = case
    leaves = device.tensors(case)
    y = in_training(device)(*leaves)
    dy = np.random.default_rng(5).standard_normal(x.shape)
    seed = device.put(dy)
    with nothing_written():
        fused = mc.grad(y, leaves, seed, retain_graph=True)
        composed = mc.grad(y, leaves, seed, create_graph=True)
    # Relative to the terms: of two numbers a channel, say, dx is what their cancelling leaves, a share of eps.
    total = np.abs(dy).sum()
    scales = total * np.abs(weight).max() / math.sqrt(x.var((0, 2, 3)).min() + 1e-5), total, total
    for scale, f, c, expected in zip(scales, fused, composed, naive_batch_norm_grads(dy, x, weight, 1e-5), strict=True):
        for g in (f, c):
            assert g.shape == expected.shape
            assert np.abs(host(g) - expected).max() <= 1e-12 * scale


def test_only_what_is_asked_for(device):
    """A frozen scale, or a first layer: any subset of the three gradients, each as in the full set."""
    x, w, b = (np.random.default_rng(6).standard_normal(s) for s in ((3, 2, 2, 2), 2, 2))
    dy = device.put(np.random.default_rng(7).standard_normal(x.shape))
    full = mc.grad(in_training(device)(*(leaves := device.tensors([x, w, b]))), leaves, dy)
    for wanted in ((0,), (1,), (2,), (0, 2), (1, 2)):
        tensors = [device.tensor(a, requires_grad=i in wanted) for i, a in enumerate((x, w, b))]
        for create_graph in (False, True):
            got = mc.grad(in_training(device)(*tensors), [tensors[i] for i in wanted], dy, create_graph=create_graph)
            for i, g in zip(wanted, got, strict=True):
                same(g, full[i])


# ---------------------------------------------------------------- running statistics

def test_defect_the_running_variance_is_biased_or_momentum_inverted(device):
    """running += momentum (batch - running), momentum the weight of the new batch; the variance over m - 1."""
    x = np.random.default_rng(8).standard_normal((3, 2, 2, 2)) * 2 + 1
    mean, var = device.put(np.array([5.0, 6.0])), device.put(np.array([7.0, 8.0]))
    w, b = device.put(np.ones(2)), device.put(np.zeros(2))
    expected_mean, expected_var = np.array([5.0, 6.0]), np.array([7.0, 8.0])
    for momentum in (0.1, 0.3, 1.0, 0.0):
        ops.batch_norm(device.put(x), w, b, mean, var, train=True, momentum=momentum)
        expected_mean = (1 - momentum) * expected_mean + momentum * x.mean((0, 2, 3))
        expected_var = (1 - momentum) * expected_var + momentum * x.var((0, 2, 3), ddof=1)
        same(mean, expected_mean)
        same(var, expected_var)


def test_defect_statistics_per_activation_instead_of_per_channel(device):
    """Two channels of very different scale: each comes out with mean 0 and variance 1, but no pixel and no image by itself does."""
    x = np.random.default_rng(9).standard_normal((4, 2, 3, 3)) * [[[1.0]], [[100.0]]] + [[[-5.0]], [[50.0]]]
    y = host(in_training(device)(device.put(x), device.put(np.ones(2)), device.put(np.zeros(2))))
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var((0, 2, 3)), 1, rtol=1e-4)
    assert np.abs(y.mean((0,))).max() > 0.1                  # single pixels are not normalised
    assert np.abs(y.mean((1, 2, 3))).max() > 0.01            # nor single images


def test_inference_leaves_the_statistics_alone(device):
    mean, var = device.put(np.array([1.0])), device.put(np.array([2.0]))
    ops.batch_norm(device.tensor(np.ones((2, 1, 2, 2))), device.tensor(np.ones(1)), device.tensor(np.ones(1)), mean, var,
                   train=False)
    np.testing.assert_array_equal(host(mean), [1.0])
    np.testing.assert_array_equal(host(var), [2.0])


def test_statistics_move_once_a_forward_and_never_in_a_backward(device):
    leaves = device.tensors([np.random.default_rng(10).standard_normal((2, 2, 2, 2)), np.ones(2), np.zeros(2)])
    mean, var = statistics(device, 2)
    y = ops.batch_norm(*leaves, mean, var, train=True)
    after = host(mean), host(var)
    g = mc.grad((y * y).sum(), leaves, create_graph=True)
    mc.grad(g[0].sum(), leaves)
    same(mean, after[0], 0)
    same(var, after[1], 0)


def test_defect_the_backward_at_inference_crashes_or_reads_moved_statistics(device):
    """A later training step moves the running arrays in place; the gradient is that of the statistics the forward used."""
    (x, dy), (w, b) = np.random.default_rng(0).standard_normal((2, 2, 2, 2, 2)), np.random.default_rng(1).standard_normal((2, 2))
    mean, var = np.array([0.5, -1.0]), np.array([2.0, 0.3])

    def gradients(disturb):
        leaves, running = device.tensors([x, w, b]), (device.put(mean), device.put(var))
        y = ops.batch_norm(*leaves, *running, train=False)
        if disturb:
            for array in running:
                array[...] = 1e3
        return mc.grad(y, leaves, device.put(dy))

    std = np.sqrt(var + 1e-5)[:, None, None]
    expected = [dy * w[:, None, None] / std, (dy * (x - mean[:, None, None]) / std).sum((0, 2, 3)), dy.sum((0, 2, 3))]
    for disturb in (False, True):
        for g, e in zip(gradients(disturb), expected, strict=True):
            same(g, e)


def test_training_keeps_its_own_statistics_too(device):
    leaves = device.tensors([np.random.default_rng(11).standard_normal((2, 2, 2, 2)), np.ones(2), np.zeros(2)])
    dy = device.put(np.random.default_rng(12).standard_normal((2, 2, 2, 2)))
    expected = mc.grad(in_training(device)(*leaves), leaves, dy)
    mean, var = statistics(device, 2)
    y = ops.batch_norm(*leaves, mean, var, train=True, momentum=1.0)
    mean[...] = var[...] = 99.0
    for g, e in zip(mc.grad(y, leaves, dy), expected, strict=True):
        same(g, host(e), 0)


# ---------------------------------------------------------------- numbers that are hard

@pytest.mark.parametrize(("mean", "std"), [(1e3, 0.1), (1e3, 1.0), (-1e4, 3.0)])
def test_float32_with_a_large_mean_and_a_small_deviation(device, mean, std):
    """As exact as float32 can tell the numbers from their mean (half a unit in the last place of the mean, over std): the variance
    is of the centred values, where E[x^2] - E[x]^2 would be off by more than itself."""
    rng = np.random.default_rng(13)
    x = (mean + std * rng.standard_normal((8, 3, 16, 16))).astype(np.float32)
    dy = rng.standard_normal(x.shape, dtype=np.float32)
    w, b = np.ones(3, np.float32), np.zeros(3, np.float32)

    def run(dtype, create_graph):
        leaves = device.tensors([a.astype(dtype) for a in (x, w, b)])
        y = in_training(device)(*leaves)
        return [y, *mc.grad(y, leaves, device.put(dy.astype(dtype)), create_graph=create_graph)]

    limit = 2 * np.finfo(np.float32).eps * abs(mean) / std
    exact = run(np.float64, False)
    for create_graph in (False, True):
        y, dx, dweight, dbias = run(np.float32, create_graph)
        assert {t.dtype for t in (y, dx, dweight, dbias)} == {np.dtype(np.float32)}
        same(y, exact[0], limit)
        same(dx, exact[1], limit)
        for g, expected in ((dweight, exact[2]),
                            (dbias, exact[3])):        # against what they are sums of: they may come out near 0
            assert np.abs(host(g) - host(expected)).max() <= limit * np.abs(dy).sum((0, 2, 3)).min()


def test_a_constant_channel_is_not_divided_by_zero(device):
    leaves = device.tensors([np.full((2, 1, 2, 2), 3.0), np.array([2.0]), np.array([0.5])])
    y = in_training(device)(*leaves)
    np.testing.assert_array_equal(host(y), np.full((2, 1, 2, 2), 0.5))
    for g in mc.grad(y, leaves, device.put(np.random.default_rng(0).standard_normal((2, 1, 2, 2)))):
        assert np.isfinite(host(g)).all()


def test_adding_a_constant_changes_nothing(device):
    """The output, and with it every gradient, is blind to a shift of a channel: so dx sums to 0, and along x - mean nearly so."""
    x, dy = np.random.default_rng(14).standard_normal((2, 3, 2, 4, 4))
    leaves = device.tensors([x, np.array([1.5, -0.5]), np.zeros(2)])
    g = host(mc.grad(in_training(device, eps=1e-12)(*leaves), leaves[0], device.put(dy))[0])
    np.testing.assert_allclose(g.sum((0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose((g * (x - x.mean((0, 2, 3), keepdims=True))).sum((0, 2, 3)), 0, atol=1e-9)
    assert np.abs(g).max() > 0.1


def test_defect_an_output_gradient_of_ones_proves_nothing(device):
    """Under it dx is 0. A broken backward, without the terms of the mean and the variance, must fail a random one."""
    x = np.random.default_rng(15).standard_normal((3, 2, 2, 2))
    leaves = device.tensors([x, np.ones(2), np.zeros(2)])
    assert np.abs(host(mc.grad(in_training(device)(*leaves).sum(), leaves[0])[0])).max() < 1e-12

    @mc.op
    def broken(x, weight, bias):
        x_hat = (x - x.mean((0, 2, 3), keepdims=True)) / (x.var((0, 2, 3), keepdims=True) + 1e-5) ** 0.5
        return x_hat * weight.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)

    @broken.backward("x", "weight", "bias")
    def broken_dx(dy, x, weight):
        inv_std = (x.var((0, 2, 3), keepdims=True) + 1e-5) ** -0.5
        x_hat = (x - x.mean((0, 2, 3), keepdims=True)) * inv_std
        return dy * inv_std * weight.reshape(-1, 1, 1), (dy * x_hat).sum((0, 2, 3)), dy.sum((0, 2, 3))

    with pytest.raises(AssertionError, match="input 0"):
        check_gradients(broken, naive_batch_norm, [x, np.ones(2), np.zeros(2)], device)


# ---------------------------------------------------------------- errors

def test_one_value_a_channel_has_no_variance(device):
    x, w, b = (device.tensor(a) for a in (np.ones((1, 3, 1, 1)), np.ones(3), np.zeros(3)))
    mean, var = statistics(device, 3)
    with pytest.raises(ValueError, match=r"\(1, 3, 1, 1\) has 1 value a channel.*larger batch or image, or train=False"):
        ops.batch_norm(x, w, b, mean, var, train=True)
    np.testing.assert_array_equal(host(mean), np.zeros(3))               # raised before any work
    same(ops.batch_norm(x, w, b, mean, var, train=False), np.full((1, 3, 1, 1), 1 / math.sqrt(1 + 1e-5)))
    with pytest.raises(ValueError, match="has 0 value"):
        ops.batch_norm(device.tensor(np.ones((0, 3, 2, 2))), w, b, mean, var, train=True)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("wrong", ["weight", "bias", "running_mean", "running_var"])
def test_what_does_not_fit_is_said(device, wrong, train):
    arrays = {name: device.put(np.ones(4 if name == wrong else 3)) for name in ("weight", "bias", "running_mean", "running_var")}
    rule = rf"batch_norm: {wrong} \(4,\) must have one number for each of the 3 channels of x \(2, 3, 2, 2\): \(3,\)"
    with pytest.raises(ValueError, match=rule):
        ops.batch_norm(device.put(np.ones((2, 3, 2, 2))), **arrays, train=train)
    with pytest.raises(ValueError, match=r"4 axes \(N, C, H, W\), not shape \(2, 3\)"):
        ops.batch_norm(device.put(np.ones((2, 3))), **arrays, train=train)


@pytest.mark.parametrize("train", [True, False])
def test_images_of_integers_are_told_to_convert(device, train):
    w, b = device.put(np.ones(3, np.float32)), device.put(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match=r"must be floating, not uint8.*astype\('float32'\)"):
        ops.batch_norm(device.put(np.full((2, 3, 2, 2), 200, np.uint8)), w, b, *statistics(device, 3, np.float32), train=train)
