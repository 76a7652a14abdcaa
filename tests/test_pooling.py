"""Pooling: drawn geometry against loops; ties, minus infinity, NaN, padding, the overhanging windows of ceil_mode; errors."""
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import check_gradients, host, inner, naive_adaptive_avg_pool, naive_avg_pool, naive_max_pool, nothing_written, same

import minicnn as mc
from minicnn import ops
from minicnn.kernels import direct, pooling
from minicnn.kernels.windows import Windows


@st.composite
def pools(draw, values="distinct"):
    """(x, settings as given, the same as pairs): overlapping and gapped windows, padding up to half the kernel."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw(st.none() | st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    ceil_mode = draw(st.booleans())
    steps = kernel if stride is None else stride if isinstance(stride, tuple) else (stride, stride)
    least = [max(1, k - 2 * p - (s - 1 if ceil_mode else 0)) for k, p, s in zip(kernel, padding, steps, strict=True)]
    size = [n + draw(st.just(0) | st.integers(0, 4)) for n in least]
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 2)), *size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = {"distinct": lambda: rng.permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 1.0,
         "ties": lambda: rng.integers(-1, 2, shape) * 1.0,
         "wild": lambda: rng.choice([-np.inf, -1.0, 1.0, np.inf, np.nan], shape)}[values]()
    pairs = {"kernel_size": kernel, "stride": steps, "padding": padding, "ceil_mode": ceil_mode}
    return x, {**pairs, "stride": stride}, pairs


def check_pool(device, fn, naive, x, how, pairs):
    t = device.tensor(x)
    y = fn(t, **how)
    same(y, naive(x, **pairs))
    dy = np.random.default_rng(0).standard_normal(y.shape)
    with nothing_written():
        y.backward(device.put(dy))
    same(t.grad, naive(x, **pairs, dy=dy))


@hypothesis.given(case=pools())
def test_max_pool_against_loops(device, case):
    check_pool(device, ops.max_pool2d, naive_max_pool, *case)


@hypothesis.given(case=pools(values="ties"))
def test_of_equals_the_first_in_row_major_order_gets_everything(device, case):
    check_pool(device, ops.max_pool2d, naive_max_pool, *case)


@hypothesis.given(case=pools(values="wild"))
def test_infinities_and_nan(device, case):
    """NaN beats everything; a window of nothing but minus infinity still has a winner, a real pixel."""
    check_pool(device, ops.max_pool2d, naive_max_pool, *case)


@hypothesis.given(case=pools())
def test_avg_pool_against_loops(device, case):
    """Zeros of the padding count; what hangs over beyond the padding does not."""
    check_pool(device, ops.avg_pool2d, naive_avg_pool, *case)


@hypothesis.given(case=pools())
def test_the_pools_are_adjoint_pairs(device, case):
    """<window_sum(x), c> == <x, window_spread(c)>, and <take_from_winner(x), c> == <x, give_to_winner(c)>."""
    x, _, pairs = case
    windows, on_device = Windows.of(**pairs), device.put(x)
    total = ops.window_sum(on_device, windows)
    y = ops.max_of_windows(on_device, windows)
    winner = pooling.winners(on_device, y, windows)
    c = device.put(np.random.default_rng(1).standard_normal(total.shape))
    assert inner(total, c) == pytest.approx(inner(x, ops.window_spread(c, x.shape[2:], windows)), rel=1e-12, abs=1e-12)
    same(ops.take_from_winner(on_device, winner, windows), y, 0)
    assert inner(y, c) == pytest.approx(inner(x, ops.give_to_winner(c, winner, x.shape[2:], windows)), rel=1e-12, abs=1e-12)


@hypothesis.given(case=pools(values="ties"))
def test_the_reading_version_agrees(case):
    """kernels.direct, which students read, with loops written apart from it."""
    x, _, pairs = case
    hypothesis.assume(not pairs.pop("ceil_mode"))
    dy = np.random.default_rng(0).standard_normal(naive_max_pool(x, **pairs).shape)
    for fn, backward, naive in ((direct.max_pool2d, direct.max_pool2d_grad, naive_max_pool),
                                (direct.avg_pool2d, direct.avg_pool2d_grad, naive_avg_pool)):
        same(fn(x, *pairs.values()), naive(x, **pairs))
        same(backward(dy, x, *pairs.values()), naive(x, **pairs, dy=dy))


@hypothesis.given(n=st.integers(0, 2), size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
                  to=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_adaptive_avg_pool_against_loops(device, n, size, to):
    """Smaller, equal, larger outputs; windows that overlap where the division leaves a rest."""
    x = np.random.default_rng(2).standard_normal((n, 2, *size))
    check_gradients(lambda x: ops.adaptive_avg_pool2d(x, to), lambda x: naive_adaptive_avg_pool(x, to), [x], device)


def test_global_avg_pool(device):
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 5))
    check_gradients(ops.global_avg_pool2d, lambda x: naive_adaptive_avg_pool(x, (1, 1))[:, :, 0, 0], [x], device)


def test_an_adaptive_pool_to_one_size_takes_an_int(device):
    x = device.put(np.random.default_rng(3).standard_normal((1, 2, 6, 7)))
    same(ops.adaptive_avg_pool2d(x, 3), host(ops.adaptive_avg_pool2d(x, (3, 3))), 0)


# ---------------------------------------------------------------- peers' defects, by name

def test_defect_max_pool_padded_with_zero(device):
    """All-negative images stay negative at the rim; the padding never wins and never takes gradient."""
    x = device.tensor(-1.0 - np.arange(16.0).reshape(1, 1, 4, 4))
    y = ops.max_pool2d(x, 3, 2, 1)
    np.testing.assert_array_equal(host(y), [[[[-1, -2], [-5, -6]]]])
    y.backward(device.put(np.ones((1, 1, 2, 2))))
    np.testing.assert_array_equal(host(x.grad)[0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4])


def test_defect_a_tie_handed_to_all_four_positions(device):
    x = device.tensor(np.full((1, 1, 2, 4), 3.0))
    ops.max_pool2d(x).backward(device.put(np.array([[[[5.0, 7.0]]]])))
    np.testing.assert_array_equal(host(x.grad), [[[[5, 0, 7, 0], [0, 0, 0, 0]]]])


def test_defect_the_backward_of_a_padded_pool_indexes_unpadded_data(device):
    """The one large pixel, in each place in turn, gets the gradient of every window that sees it, and no other pixel any of it."""
    for h, w in np.ndindex(3, 3):
        x = np.zeros((1, 1, 3, 3))
        x[0, 0, h, w] = 9.0
        t = device.tensor(x)
        y = ops.max_pool2d(t, 3, 1, 1)
        y.backward(device.put((host(y) == 9.0).astype(float)))
        expected = np.zeros((3, 3))
        expected[h, w] = (2 + (h == 1)) * (2 + (w == 1))
        np.testing.assert_array_equal(host(t.grad)[0, 0], expected)


def test_a_window_of_minus_infinity_gives_its_gradient_to_a_pixel(device):
    """None of it is lost to the padding, which is minus infinity as well."""
    x = device.tensor(np.full((1, 1, 2, 2), -np.inf))
    y = ops.max_pool2d(x, 2, 1, 1)
    y.backward(device.put(np.ones((1, 1, 3, 3))))
    np.testing.assert_array_equal(host(x.grad)[0, 0], [[4, 2], [2, 1]])


def test_nan_is_not_hidden(device):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 1, 2] = np.nan
    y = host(ops.max_pool2d(device.put(x)))[0, 0]
    np.testing.assert_array_equal(y, [[0, np.nan], [0, 0]])
    x[...] = np.nan
    x[0, 0, 0, 0] = np.inf
    assert np.isnan(host(ops.max_pool2d(device.put(x)))).all()


def test_a_window_over_the_far_edge(device):
    """ceil_mode on 5 pixels: two whole windows of 2, and a third that sees one pixel."""
    x = device.put(np.arange(25.0).reshape(1, 1, 5, 5))
    np.testing.assert_array_equal(host(ops.max_pool2d(x, 2, ceil_mode=True))[0, 0], [[6, 8, 9], [16, 18, 19], [21, 23, 24]])
    np.testing.assert_array_equal(host(ops.avg_pool2d(x, 2, ceil_mode=True))[0, 0], [[3, 5, 6.5], [13, 15, 16.5], [20.5, 22.5, 24]])
    assert ops.max_pool2d(x, 2).shape == (1, 1, 2, 2)
    # The only window is larger than the image, but begins in it and would have been the last of a larger one's.
    np.testing.assert_array_equal(host(ops.max_pool2d(x[..., :2, :2], 3, 2, ceil_mode=True))[0, 0], [[6]])
    np.testing.assert_array_equal(host(ops.avg_pool2d(x[..., :2, :2], 3, 2, ceil_mode=True))[0, 0], [[3]])
    # The last window would begin in the far padding: it is left out.
    assert ops.max_pool2d(device.put(np.zeros((1, 1, 2, 2))), 2, 3, 1, ceil_mode=True).shape == (1, 1, 1, 1)


def test_large_windows_number_their_taps_without_overflow(device):
    """More taps than a byte counts: the last one can win too, and get its gradient."""
    x = np.zeros((1, 1, 17, 17))
    x[0, 0, 16, 16] = 1.0
    t = device.tensor(x)
    y = ops.max_pool2d(t, 17)
    assert y.item() == 1.0
    y.backward()
    np.testing.assert_array_equal(host(t.grad), x)


def test_a_pixel_that_no_window_sees_has_no_gradient(device):
    """Windows side by side, as many pixels as they have in all, and yet the padding pushes the last pixel out."""
    for dtype in (np.float32, np.float64):
        for _ in range(3):                                  # memory that was used before holds something
            x = device.tensor(np.array([[[[5.0, 2.0, 3.0]]]], dtype))
            y = ops.max_pool2d(x, (1, 3), None, (0, 1))
            y.backward(device.put(np.full(y.shape, 7.0, dtype)))
            np.testing.assert_array_equal(host(x.grad), [[[[7, 0, 0]]]])


def test_winners_take_a_byte_each():
    winner = pooling.winners(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 2, 2)), Windows.of(3, 2, 1))
    assert winner.dtype == np.uint8


def test_overlapping_windows_add_up(device):
    x = device.tensor(np.array([[[[0.0, 1, 0], [0, 9, 0], [0, 0, 0]]]]))
    ops.max_pool2d(x, 2, 1).sum().backward()
    np.testing.assert_array_equal(host(x.grad)[0, 0], [[0, 0, 0], [0, 4, 0], [0, 0, 0]])


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d])
@pytest.mark.parametrize(("shape", "how", "words"), [
    ((3, 4, 4), {}, ["(3, 4, 4)", "(N, C, H, W)", "x[None]"]),
    ((1, 1, 2, 2), {"kernel_size": 3}, ["2 x 2", "3 x 3", "smaller than the window"]),
    ((1, 1, 3, 1), {"kernel_size": 3, "stride": 2, "ceil_mode": True}, ["3 x 1", "3 x 3", "smaller than the window"]),
    ((1, 1, 4, 4), {"padding": 2}, ["padding (2, 2)", "half of kernel_size (2, 2)"]),
    ((1, 1, 4, 4), {"kernel_size": (4, 1), "padding": 1}, ["half"]),
    ((1, 1, 4, 4), {"stride": 0}, ["stride=0"]), ((1, 1, 4, 4), {"kernel_size": 0}, ["kernel_size=0"]),
    ((1, 1, 4, 4), {"padding": -1}, ["padding=-1"])], ids=str)
def test_what_does_not_fit_is_said(device, pool, shape, how, words):
    with pytest.raises(ValueError) as error:
        pool(device.put(np.ones(shape)), **how)
    assert [w for w in words if w not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_adaptive_and_global_pools_check_too(device):
    for call in (lambda x: ops.adaptive_avg_pool2d(x, 2), ops.global_avg_pool2d):
        with pytest.raises(ValueError, match=r"\(3, 4, 4\)"):
            call(device.put(np.ones((3, 4, 4))))
    with pytest.raises(ValueError, match="output_size=0"):
        ops.adaptive_avg_pool2d(device.put(np.ones((1, 1, 4, 4))), 0)


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d, ops.global_avg_pool2d, lambda x: ops.adaptive_avg_pool2d(x, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_images_of_integers_are_told_to_convert(device, pool, dtype):
    """Bytes would overflow in a sum without a word, and minus infinity is none of them."""
    with pytest.raises(TypeError, match=rf"must be floating, not {np.dtype(dtype)}.*astype\('float32'\)"):
        pool(device.put(np.full((1, 1, 4, 4), 200).astype(dtype)))


def test_a_gradient_of_a_gradient_through_two_pools(device):
    """Max-pool after average pool of squares: the second order exists and sees both."""
    x = device.tensor(np.arange(1.0, 17).reshape(1, 1, 4, 4))
    y = ops.max_pool2d(ops.avg_pool2d(x * x, 3, 1, 1), 2).sum()
    g, = mc.grad(y, x, create_graph=True)
    h, = mc.grad(g.sum(), x)
    same(host(h) * host(x), host(g))                        # y is a quadratic form with a diagonal matrix
