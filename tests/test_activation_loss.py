"""Activations, dropout and cross-entropy: kinks, stability at extremes, formulas, masks, labels that are no class."""
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import standin
from witnesses import Device, check_gradients, host, naive_cross_entropy, naive_log_softmax, naive_softmax, same

import minicnn as mc
from minicnn import ops

seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------- relu, sigmoid

def test_defect_relu_at_zero(device):
    """The kink: gradient 0 at 0, also at -0, and all of it above, however little above; an infinite dy leaks nothing through."""
    tiny = np.finfo(float).tiny
    x = device.tensor(np.array([-1.0, -tiny, -0.0, 0.0, tiny, 1.0]))
    y = ops.relu(x)
    y.backward(device.put(np.array([5.0, 5, 5, 5, 5, 7])))
    np.testing.assert_array_equal(host(y), [0, 0, 0, 0, tiny, 1])
    np.testing.assert_array_equal(host(x.grad), [0, 0, 0, 0, 5, 7])


def test_relu_lets_nan_through(device):
    np.testing.assert_array_equal(host(ops.relu(device.put(np.array([np.nan, -np.inf, np.inf])))), [np.nan, 0, np.inf])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_far_out(device, dtype):
    """0 and 1 at the ends, no overflow on the way, and the slope that is left where float can still tell."""
    x = device.tensor(np.array([-1e4, -800, -30, 0, 30, 800, 1e4], dtype))
    y = ops.sigmoid(x)
    assert y.dtype == dtype
    same(y, np.array([0, 0, 1 / (1 + math.exp(30)), 0.5, 1, 1, 1]), 1e-6)
    y.backward(device.put(np.ones(7, dtype)))
    assert host(y)[2] == pytest.approx(math.exp(-30), rel=1e-6)
    np.testing.assert_allclose(host(x.grad), [0, 0, math.exp(-30), 0.25, 0, 0, 0], rtol=1e-5, atol=1e-12)


@hypothesis.given(x=hnp.arrays(float, hnp.array_shapes(max_dims=3, max_side=3), elements=st.floats(-20, 20)))
def test_smooth_activations_against_loops(device, x):
    for fn, f in ((ops.sigmoid, lambda v: 1 / (1 + math.exp(-v))), (ops.tanh, math.tanh)):
        check_gradients(fn, np.vectorize(f, otypes=[float]), [x], device)


# ---------------------------------------------------------------- softmax

@hypothesis.given(shape=hnp.array_shapes(max_dims=3, max_side=4), data=st.data(), seed=seeds)
def test_softmax_and_log_softmax_against_loops(device, shape, data, seed):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = np.random.default_rng(seed).standard_normal(shape) * 3
    check_gradients(lambda x: ops.softmax(x, axis), lambda x: naive_softmax(x, axis), [x], device)
    check_gradients(lambda x: ops.log_softmax(x, axis), lambda x: naive_log_softmax(x, axis), [x], device)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_softmax_at_ten_thousand(device, shift, dtype):
    """exp(10,000) is infinite; the probabilities are those of the differences."""
    z = np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]], dtype) + dtype(shift)
    x = device.tensor(z)
    same(ops.softmax(x), naive_softmax(z.astype(float)), 1e-6)
    same(ops.log_softmax(x), naive_log_softmax(z.astype(float)), 1e-6)
    for y in (ops.softmax(x), ops.log_softmax(x)):
        g, = mc.grad(y, x, device.put(np.array([[1, 2, 3], [-1, 0, 4]], dtype)))
        assert np.isfinite(host(g)).all()
    far = device.tensor(np.array([[1e4, -1e4, 0.0]], dtype))
    np.testing.assert_array_equal(host(ops.softmax(far)), [[1, 0, 0]])
    np.testing.assert_array_equal(host(ops.log_softmax(far)), [[0, -2e4, -1e4]])
    loss = ops.cross_entropy(far, [1])
    assert loss.item() == 2e4
    loss.backward()
    np.testing.assert_array_equal(host(far.grad), [[1, -1, 0]])


def test_defect_an_output_gradient_of_ones_proves_nothing_about_softmax(device):
    """Probabilities sum to 1, so under ones every gradient is 0; a backward without its second term must fail a random one."""
    x = np.random.default_rng(0).standard_normal((2, 3))
    leaf = device.tensor(x)
    assert np.abs(host(mc.grad(ops.softmax(leaf).sum(), leaf)[0])).max() < 1e-15
    broken = mc.op(ops.softmax.forward)
    broken.backward("x")(lambda dy, y: y * dy)
    with pytest.raises(AssertionError, match="input 0"):
        check_gradients(broken, naive_softmax, [x], device)


# ---------------------------------------------------------------- dropout

def test_dropout_is_off_unless_training(device):
    x = device.tensor(np.ones((2, 3)))
    assert ops.dropout(x, 0.5, train=False) is x
    assert ops.dropout(x, 0.0, train=True) is x
    same(ops.dropout(device.put(np.ones(3)), 0.5, train=False), np.ones(3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_scales_what_it_keeps(device, p):
    """The kept are exactly 1 / (1 - p) times as large, about a share p is gone, and the gradient goes the same way."""
    x = device.tensor(np.full((100, 100), 3.0, np.float32))
    y = ops.dropout(x, p, train=True, rng=np.random.default_rng(0))
    assert y.dtype == np.float32
    values = host(y)
    kept = values != 0
    np.testing.assert_allclose(values[kept], 3.0 / (1 - p), rtol=1e-6)
    assert abs((~kept).mean() - p) < 0.02
    y.backward(device.put(np.full((100, 100), 2.0, np.float32)))
    np.testing.assert_allclose(host(x.grad), np.where(kept, 2.0 / (1 - p), 0), rtol=1e-6)


def test_dropping_everything_gives_zeros_not_nan(device):
    x = device.tensor(np.array([1.0, np.float64(1e300)]))
    y = ops.dropout(x, 1.0, train=True, rng=np.random.default_rng(0))
    y.backward(device.put(np.ones(2)))
    np.testing.assert_array_equal(host(y), [0, 0])
    np.testing.assert_array_equal(host(x.grad), [0, 0])


def test_one_seed_drops_the_same_on_every_device(device):
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    here, on_device = (ops.dropout(d.tensor(x), 0.5, train=True, rng=np.random.default_rng(7)) for d in (Device("cpu"), device))
    np.testing.assert_array_equal(host(on_device), host(here))
    rng = np.random.default_rng(7)
    first, second = (host(ops.dropout(device.put(x), 0.5, train=True, rng=rng)) for _ in range(2))
    assert (first != second).any()                          # a generator moves on


def test_dropout_checks_what_it_is_given(device):
    x = device.tensor(np.ones(3))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must be a share between 0 and 1"):
            ops.dropout(x, p, train=True, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"pass rng=numpy\.random\.default_rng"):
        ops.dropout(x, 0.5, train=True)


# ---------------------------------------------------------------- cross-entropy

@hypothesis.given(n=st.integers(1, 5), classes=st.integers(1, 5), smoothing=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=seeds)
def test_cross_entropy_against_loops(device, n, classes, smoothing, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((n, classes)) * 3, rng.integers(0, classes, n)
    check_gradients(lambda z: ops.cross_entropy(z, labels, smoothing), lambda z: naive_cross_entropy(z, labels, smoothing),
                    [logits], device)


def test_defect_one_hot_and_index_differ_by_the_number_of_classes(device):
    """The loss of indices is the one-hot formula, mean over images of -sum_j t_j log p_j, in value and in gradient."""
    rng = np.random.default_rng(2)
    logits, labels = rng.standard_normal((4, 7)), np.array([0, 6, 3, 3])
    one_hot = device.put(np.eye(7)[labels])
    by_index, by_formula = device.tensor(logits), device.tensor(logits)
    loss = ops.cross_entropy(by_index, labels)
    formula = -(one_hot * ops.log_softmax(by_formula)).sum() / 4
    same(loss, host(formula))
    loss.backward()
    formula.backward()
    same(by_index.grad, host(by_formula.grad))
    same(by_index.grad, (naive_softmax(logits) - np.eye(7)[labels]) / 4)
    assert ops.cross_entropy(device.tensor(np.zeros((3, 10))), [1, 2, 3]).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize("labels", [[2, 0], (2, 0), np.array([2, 0]), np.array([2, 0], np.uint8), np.array([2, 0], np.int32)])
def test_labels_of_any_integer_type_from_the_host(device, labels):
    z = np.random.default_rng(3).standard_normal((2, 3))
    expected = naive_cross_entropy(z, [2, 0])
    same(ops.cross_entropy(device.tensor(z), labels), expected)
    same(ops.cross_entropy(device.tensor(z), mc.Tensor(np.asarray(labels))), expected)


def test_labels_on_the_device(device):
    z = np.random.default_rng(3).standard_normal((2, 3))
    same(ops.cross_entropy(device.tensor(z), device.put(np.array([2, 0]))), naive_cross_entropy(z, [2, 0]))
    with pytest.raises(ValueError, match="label 3 is no class"):
        ops.cross_entropy(device.tensor(z), device.put(np.array([2, 3])))


@pytest.mark.parametrize(("labels", "error", "words"), [
    ([0, 3], ValueError, r"label 3 is no class: logits \(2, 3\) have the classes 0 to 2"),
    ([0, -1], ValueError, "label -1 is no class"),
    ([-100, 1], ValueError, "label -100 is no class"), ([0.0, 1.0], TypeError, r"must be integers.*not float64.*argmax\(1\)"),
    ([True, False], TypeError, "not bool"), (np.eye(3)[:2], ValueError, r"labels \(2, 3\)"), ([0], ValueError, r"\(2, 3\).*\(1,\)"),
    ([0, 1, 2], ValueError, r"labels \(3,\)"), (1, ValueError, r"labels \(\)"), ([[0], [1]], ValueError, r"labels \(2, 1\)")])
def test_labels_that_are_no_class_are_never_wrapped(device, labels, error, words):
    z = device.tensor(np.zeros((2, 3)))
    with pytest.raises(error, match=words) as caught:
        ops.cross_entropy(z, labels)
    assert "\n" not in str(caught.value)


def test_other_arguments_of_cross_entropy(device):
    for shape in ((3,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"must be \(N, classes\)"):
            ops.cross_entropy(device.tensor(np.zeros(shape)), [0, 1])
    with pytest.raises(ValueError, match="N of at least 1"):
        ops.cross_entropy(device.tensor(np.zeros((0, 3))), np.zeros(0, int))
    for smoothing in (-0.1, 1.5):
        with pytest.raises(ValueError, match="label_smoothing"):
            ops.cross_entropy(device.tensor(np.zeros((2, 3))), [0, 1], smoothing)


def test_the_loss_of_certainty(device):
    """Right beyond doubt costs nothing and pulls nowhere; a label of probability 0 costs what the logits say, not infinity."""
    z = device.tensor(np.array([[800.0, 0.0], [0.0, 800.0]]))
    loss = ops.cross_entropy(z, [0, 1])
    loss.backward()
    assert loss.item() == 0
    np.testing.assert_array_equal(host(z.grad), np.zeros((2, 2)))
    assert ops.cross_entropy(z, [1, 0]).item() == 800


def test_host_labels_are_checked_without_waiting_for_the_device():
    z = Device("standin").tensor(np.zeros((2, 3)))
    with standin.host_syncs() as syncs:
        ops.cross_entropy(z, np.array([0, 2])).backward()
        with pytest.raises(ValueError, match="label 3"):
            ops.cross_entropy(z, np.array([0, 3]))
    assert syncs == []
