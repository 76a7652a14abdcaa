"""Linear maps that move, copy and add: adjoint pairs, drawn indices and axes, and what does not fit."""
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import check_gradients, host, inner, same

import minicnn as mc
from minicnn import ops

seeds = st.integers(0, 2**32 - 1)
SHAPE = (2, 3, 4)
X = np.random.default_rng(3).standard_normal(SHAPE)


def check_adjoint(forward, backward, x, device, seed=0):
    """<forward(x), c> == <x, backward(c)> for a random c, which for a linear map says all."""
    y = forward(device.put(x))
    c = np.asarray(np.random.default_rng(seed).standard_normal(np.shape(y)))
    back = backward(device.put(c))
    assert tuple(back.shape) == x.shape
    assert inner(y, c) == pytest.approx(inner(x, back), rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------- adjoint pairs

@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (1,), ()])
def test_sum_and_broadcast_to(device, axis):
    kept = tuple(1 if i in ops.movement.axes_of(axis, 3) else n for i, n in enumerate(SHAPE))
    check_adjoint(lambda x: ops.sum(x, axis, keepdims=True), lambda c: ops.broadcast_to(c, SHAPE), X, device)
    check_adjoint(lambda c: ops.broadcast_to(c, SHAPE), lambda x: ops.sum_to(x, kept), X[:1, :1, :1] * np.ones(kept), device)


@pytest.mark.parametrize(("x", "to"),
                         [((3,), (2, 3)), ((1,), (4,)), ((), (2, 2)), ((2, 1, 3), (5, 2, 4, 3)), ((1, 1), (1, 1)),
                          ((0, 1), (0, 4))])
def test_broadcast_to_and_sum_to(device, x, to):
    check_adjoint(lambda v: ops.broadcast_to(v, to), lambda c: ops.sum_to(c, x),
                  np.asarray(np.random.default_rng(0).standard_normal(x)), device)


def test_reshape_transpose_pad_concatenate(device):
    check_adjoint(lambda x: ops.reshape(x, (4, -1)), lambda c: ops.reshape(c, SHAPE), X, device)
    check_adjoint(lambda x: ops.transpose(x, (2, 0, 1)), lambda c: ops.transpose(c, (1, 2, 0)), X, device)
    check_adjoint(lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 3))), lambda c: ops.getitem(c, (slice(None), slice(1, 4), slice(0, 4))),
                  X, device)


@hypothesis.given(index=hnp.basic_indices(SHAPE, allow_newaxis=True, allow_ellipsis=True))
def test_getitem_and_place_with_basic_indices(device, index):
    """Integers, slices of any step, ellipses and None, alone or in a tuple."""
    check_adjoint(lambda x: ops.getitem(x, index), lambda c: ops.place(c, index, SHAPE), X, device)
    same(device.tensor(X)[index], X[index])


@hypothesis.given(index=hnp.integer_array_indices(SHAPE, result_shape=hnp.array_shapes(max_dims=2, max_side=4)))
def test_getitem_and_place_with_arrays_of_indices(device, index):
    """The same place may be taken many times, and then gets every share back."""
    on_device = tuple(device.put(i) for i in index)
    check_adjoint(lambda x: ops.getitem(x, on_device), lambda c: ops.place(c, on_device, SHAPE), X, device)


@hypothesis.given(mask=hnp.arrays(bool, st.sampled_from([SHAPE, SHAPE[:2], SHAPE[:1]])))
def test_getitem_and_place_with_masks(device, mask):
    on_device = device.put(mask)
    check_adjoint(lambda x: ops.getitem(x, on_device), lambda c: ops.place(c, on_device, SHAPE), X, device)


@pytest.mark.parametrize("index",
                         [[0, 1, 0], [-1, 0], np.array([1, 1, 1]), (slice(None), [2, 0, 2]), np.int64(1),
                          (0, [1, 1], slice(None, None, 2))])
def test_a_place_named_twice_gets_both_shares(device, index):
    def put(part):
        return device.put(part) if isinstance(part, np.ndarray) else part

    on_device = tuple(map(put, index)) if isinstance(index, tuple) else put(index)
    check_gradients(lambda x: x[on_device], lambda x: x[index], [X], device)


# ---------------------------------------------------------------- reductions

@hypothesis.given(shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=3), data=st.data(), seed=seeds)
def test_reductions_over_any_axes(device, shape, data, seed):
    axis = data.draw(st.none() | hnp.valid_tuple_axes(len(shape)) | st.integers(-len(shape), len(shape) - 1))
    keepdims = data.draw(st.booleans())
    rng = np.random.default_rng(seed)
    x = (rng.permutation(int(np.prod(shape))).reshape(shape) - 3.0) / 2
    for fn, oracle in ((ops.sum, np.sum), (ops.mean, np.mean), (ops.var, np.var), (ops.max, np.max), (ops.min, np.min)):
        check_gradients(lambda x, fn=fn: fn(x, axis, keepdims=keepdims), lambda x, o=oracle: o(x, axis=axis, keepdims=keepdims),
                        [x], device)


def test_var_divides_by_the_count_less_ddof(device):
    x = device.tensor(X)
    same(x.var(), np.asarray(X.var()))
    same(x.var((0, 2), ddof=1), X.var((0, 2), ddof=1))
    same(x.var(1, 2), X.var(1, ddof=2))
    same(x[0, 0, :1].var(), np.zeros(()))
    with pytest.raises(ValueError, match="var of 1 values with ddof=1 divides by 0"):
        x[0, 0, 0].var(ddof=1)
    big = device.tensor(1e8 + X)                            # from the centred values, not as a difference of squares
    same(big.var(), np.asarray(X.var()), 1e-7)


# ---------------------------------------------------------------- what does not fit

@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda x: x.sum(3), ValueError, "axis 3 does not exist in an array of 3 axes; valid axes are -3 to 2"),
    (lambda x: x.mean((0, -4)), ValueError, "axis -4 does not exist"),
    (lambda x: ops.max(x, 5), ValueError, "axis 5 does not exist"),
    (lambda x: ops.max(x[:0]), ValueError, r"the largest of no values.*\(0, 3, 4\)"),
    (lambda x: x.reshape(5, 5), ValueError, "reshape"),
    (lambda x: ops.broadcast_to(x, (2, 3, 5)), ValueError, "broadcast"),
    (lambda x: ops.concatenate([]), ValueError, "at least one"),
    (lambda x: ops.concatenate([x, x[:, :1]]), ValueError,
     r"shapes \[\(2, 3, 4\), \(2, 1, 4\)\] must be equal in every other axis"),
    (lambda x: ops.concatenate([x, x[0]]), ValueError, r"\(3, 4\)"),
    (lambda x: ops.concatenate([x, x], axis=3), ValueError, "axis 3"),
    (lambda x: ops.pad(x, ((1, 1),)), ValueError, "for each of the 3 axes"), (lambda x: ops.pad(x, -1), ValueError, "at least 0"),
    (lambda x: x.transpose(0, 1), ValueError, "axes"), (lambda x: x[5], IndexError, "5")])
def test_what_does_not_fit_is_said(device, call, error, words):
    with pytest.raises(error, match=words):
        call(device.tensor(X))


# ---------------------------------------------------------------- the gradient of a view

def test_the_gradient_of_a_view_is_not_a_view_of_the_gradient(device):
    """Many slices of one array: each share is added, none overwrites another, and dy stays as it was."""
    x = device.tensor(X)
    dy = device.put(np.ones((2, 3, 2)))
    y = x[..., :2] + x[..., 1:3] + x[..., 2:] + x[..., ::-2]
    y.backward(dy)
    np.testing.assert_array_equal(host(x.grad), np.broadcast_to([1, 3, 2, 2], SHAPE))
    np.testing.assert_array_equal(host(dy), np.ones((2, 3, 2)))


def test_writing_into_a_gradient_does_not_reach_the_forward(device):
    x = device.tensor(X)
    y = x.reshape(6, 4)
    g, = mc.grad(y, x, device.put(np.ones((6, 4))))
    g.data[...] = 7.0
    same(x, X)
    same(y, X.reshape(6, 4))


def test_pad_and_place_keep_the_order_of_memory(device):
    """Channels-last images stay so: what they are added to lies so too, and a sum of two layouts takes many times as long."""
    images = device.put(np.random.default_rng(0).standard_normal((2, 5, 6, 3))).transpose(0, 3, 1, 2)
    padded = ops.pad(images, ((0, 0), (1, 2), (0, 0), (0, 0)), 0.5)
    placed = ops.place(padded, (slice(None), slice(None), slice(None, None, 2)), (2, 6, 10, 6))
    for y in (padded, placed):
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    same(padded, np.pad(host(images), ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=0.5))
    expected = np.zeros((2, 6, 10, 6))
    expected[:, :, ::2] = host(padded)
    same(placed, expected)
    assert ops.pad(device.put(np.ones((2, 3))), 1).flags.c_contiguous
