"""Elementwise arithmetic and its broadcasting, choosing between values, products of matrices: shapes at random, corners by name.

Every operation's value and gradients are held against differences in test_every_op.py; here are drawn shapes and the corners.
"""
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import check_gradients, host, naive_matmul, same

import minicnn as mc
from minicnn import ops

seeds = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------- broadcasting

def naive_broadcast(f, a, b):
    """f of every pair, found by index: an axis of length 1 (or a missing one) always gives its one element."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    y = np.zeros(shape)

    def element(x, at):
        return x[tuple(i if n != 1 else 0 for i, n in zip(at[len(at) - x.ndim:], x.shape, strict=True))]

    for at in np.ndindex(*shape):
        y[at] = f(float(element(a, at)), float(element(b, at)))
    return y


BINARY = {"add": (ops.add, lambda a, b: a + b), "sub": (ops.sub, lambda a, b: a - b), "mul": (ops.mul, lambda a, b: a * b),
          "div": (ops.div, lambda a, b: a / b), "power": (ops.power, lambda a, b: a ** b)}


@pytest.mark.parametrize("name", BINARY)
@hypothesis.given(shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=3, min_side=0), seed=seeds)
def test_broadcasting(device, name, shapes, seed):
    """Values element by element; every gradient sums over the copies of its input and has the input's own shape."""
    fn, f = BINARY[name]
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.uniform(0.5, 2.0, shape)) for shape in shapes.input_shapes)
    check_gradients(fn, lambda a, b: naive_broadcast(f, a, b), [a, b], device)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2,)), ((4,), (3,)), ((2, 3), (3, 2))])
def test_shapes_that_do_not_broadcast_are_an_error(device, a, b):
    for fn in (ops.add, ops.mul, ops.maximum):
        with pytest.raises(ValueError):
            fn(device.tensor(np.ones(a)), device.tensor(np.ones(b)))


@hypothesis.given(shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), mask_seed=seeds)
def test_where_gives_each_side_its_own(device, shape, mask_seed):
    rng = np.random.default_rng(mask_seed)
    mask, a, b = rng.random(shape) > 0.5, rng.standard_normal(shape), rng.standard_normal(shape[-1:])
    condition = device.put(mask)
    check_gradients(lambda a, b: ops.where(condition, a, b), lambda a, b: np.where(mask, a, b), [a, b], device)


# ---------------------------------------------------------------- corners

def gradient(fn, *arrays, device, dy=1.0):
    leaves = device.tensors([np.asarray(a, float) for a in arrays])
    y = fn(*leaves)
    return [host(g) for g in mc.grad(y, leaves, device.put(np.full(y.shape, dy)))]


def test_of_equals_the_first_argument_gets_the_gradient(device):
    for fn in (ops.maximum, ops.minimum):
        da, db = gradient(fn, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], device=device, dy=2.0)
        np.testing.assert_array_equal(da, [2, 2, 2])
        np.testing.assert_array_equal(db, [0, 0, 0])
    x, = gradient(lambda x: ops.maximum(x, x), [1.0, -1.0], device=device)
    np.testing.assert_array_equal(x, [1, 1])


def test_nan_wins_and_the_gradient_is_given_out_once(device):
    a, b = [np.nan, 1.0, np.nan, 1.0], [1.0, np.nan, np.nan, 2.0]
    for fn, numpys in ((ops.maximum, np.maximum), (ops.minimum, np.minimum)):
        same(fn(device.put(a), device.put(b)), numpys(a, b))
        da, db = gradient(fn, a, b, device=device)
        np.testing.assert_array_equal(da + db, np.ones(4))
        assert da[0] == 1                                   # NaN on the left is what came out


def test_a_tie_of_max_goes_to_the_first_in_row_major_order(device):
    x = np.array([[1.0, 3.0, 3.0], [3.0, 0.0, 3.0]])
    g, = gradient(ops.max, x, device=device, dy=5.0)
    np.testing.assert_array_equal(g, [[0, 5, 0], [0, 0, 0]])
    g, = gradient(lambda x: ops.max(x, 0), x, device=device)
    np.testing.assert_array_equal(g, [[0, 1, 1], [1, 0, 0]])
    g, = gradient(lambda x: ops.max(x, 1), x, device=device)
    np.testing.assert_array_equal(g, [[0, 1, 0], [1, 0, 0]])
    g, = gradient(lambda x: ops.max(x, (1, 0)), x, device=device)               # the order of `axis` does not matter
    np.testing.assert_array_equal(g, [[0, 1, 0], [0, 0, 0]])
    g, = gradient(ops.min, -x, device=device)
    np.testing.assert_array_equal(g, [[0, 1, 0], [0, 0, 0]])
    g, = gradient(ops.max, [1.0, np.nan, 2.0], device=device)
    np.testing.assert_array_equal(g, [0, 1, 0])
    if device.name != "cuda":                                                   # of several NaN, CuPy's argmax takes another
        g, = gradient(ops.max, [1.0, np.nan, np.nan], device=device)
        np.testing.assert_array_equal(g, [0, 1, 0])
    assert np.isnan(ops.max(device.tensor([1.0, np.nan])).item())


@pytest.mark.parametrize(("exponent", "x", "y", "dx"), [
    (0, [0.0, 2.0], [1, 1], [0, 0]), (1, [0.0, -2.0], [0, -2], [1, 1]), (2, [0.0, -2.0], [0, 4], [0, -4]),
    (3, [0.0, -2.0], [0, -8], [0, 12]),
    (0.0, [0.0, 2.0], [1, 1], [0, 0]), (1.5, [0.0, 4.0], [0, 8], [0, 3])])
def test_powers_at_zero_and_below(device, exponent, x, y, dx):
    t = device.tensor(np.array(x))
    same(t ** exponent, np.array(y, float))
    np.testing.assert_array_equal(gradient(lambda t: t ** exponent, x, device=device)[0], dx)


def test_higher_derivatives_of_a_power_end_at_zero(device):
    """x^2 at x = 0: 0, 0, 2, 0, 0, ... and never 0 / 0."""
    x = device.tensor(np.zeros(2))
    y = x ** 2
    for expected in (0.0, 2.0, 0.0, 0.0):
        y, = mc.grad(y.sum(), x, create_graph=True)
        np.testing.assert_array_equal(host(y), [expected, expected])


def test_the_exponents_gradient_is_zero_where_the_logarithm_is_not_real(device):
    _, de = gradient(ops.power, [0.0, -2.0, 3.0], [2.0, 3.0, 2.0], device=device)
    same(de, np.array([0.0, 0.0, 9 * np.log(3.0)]))
    same(gradient(lambda e: 0.0 ** e, [1.0, 2.0], device=device)[0], np.zeros(2))
    same(gradient(lambda e: 3 ** e, [1.0, 2.0], device=device)[0], np.log(3.0) * np.array([3.0, 9.0]))


def test_roots_and_logarithms_at_their_edge(device):
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(gradient(ops.sqrt, [0.0, 4.0], device=device)[0], [np.inf, 0.25])
        np.testing.assert_array_equal(gradient(ops.log, [0.0, 4.0], device=device)[0], [np.inf, 0.25])


def test_where_keeps_the_other_sides_infinity_out(device):
    """The gradient of the side that was not chosen is 0, however wild dy is elsewhere."""
    condition = device.put(np.array([True, False]))
    a, b = device.tensors([np.ones(2), np.ones(2)])
    ops.where(condition, a, b).backward(device.put(np.array([np.inf, 1.0])))
    np.testing.assert_array_equal(host(a.grad), [np.inf, 0])
    np.testing.assert_array_equal(host(b.grad), [0, 1])


# ---------------------------------------------------------------- products of matrices

@hypothesis.given(shapes=hnp.mutually_broadcastable_shapes(signature="(m?,k),(k,n?)->(m?,n?)", max_dims=2, max_side=3, min_side=0),
                  seed=seeds)
def test_matmul(device, shapes, seed):
    """Vectors, matrices, stacks that broadcast, empty ones."""
    rng = np.random.default_rng(seed)
    a, b = (np.asarray(rng.standard_normal(shape)) for shape in shapes.input_shapes)
    check_gradients(lambda a, b: a @ b, naive_matmul, [a, b], device)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 3)), ((3,), (4,)), ((2, 3), (2,)), ((4,), (3, 4)), ((5, 2, 3), (4, 2))])
def test_matmul_of_what_does_not_fit(device, a, b):
    with pytest.raises(ValueError) as error:
        ops.matmul(device.tensor(np.ones(a)), device.tensor(np.ones(b)))
    assert str(a) in str(error.value)
    assert str(b) in str(error.value)
    with pytest.raises(ValueError, match=r"at least one axis.*multiply by a number with \*"):
        device.tensor(np.ones((2, 2))) @ 2.0


@pytest.mark.parametrize(("x", "weight", "bias", "words"), [
    ((2, 3), (4, 2), None, [(2, 3), (4, 2)]), ((2, 3, 1), (4, 3), None, [(2, 3, 1), (4, 3)]), ((3,), (4, 3), None, [(3,), (4, 3)]),
    ((2, 3), (4, 3), (3,), [(3,), (4, 3), (4,)]), ((2, 3), (4, 3), (1, 4), [(1, 4), (4, 3)])])
def test_linear_of_what_does_not_fit(device, x, weight, bias, words):
    with pytest.raises(ValueError, match="linear:") as error:
        ops.linear(*(None if s is None else device.tensor(np.ones(s)) for s in (x, weight, bias)))
    assert all(str(w) in str(error.value) for w in words)
    assert "\n" not in str(error.value)


@hypothesis.given(n=st.integers(0, 4), n_in=st.integers(1, 4), n_out=st.integers(1, 4), bias=st.booleans(), seed=seeds)
def test_linear(device, n, n_in, n_out, bias, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((n, n_in)), rng.standard_normal((n_out, n_in)), *([rng.standard_normal(n_out)] if bias else [])]
    check_gradients(ops.linear, lambda x, w, b=0.0: naive_matmul(x, w.T) + b, arrays, device)
