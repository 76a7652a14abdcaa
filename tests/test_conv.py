"""Convolution and its three maps, im2col and col2im: drawn geometry against loops, memory, layouts, corners, errors."""
import tracemalloc
from typing import NamedTuple
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import host, inner, naive_im2col, nothing_written, read_only, same

import minicnn as mc
from minicnn import ops, threads
from minicnn.backend import array_module
from minicnn.kernels import conv as kernels
from minicnn.kernels import direct, im2col, tapwise

# ---------------------------------------------------------------- drawn cases

class Conv(NamedTuple):
    """The arrays of a convolution, and how it was called; `pairs` are the same settings as pairs."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    how: dict

    @property
    def pairs(self):
        return {k: v if k == "groups" or isinstance(v, tuple) else (v, v) for k, v in self.how.items()}

    @property
    def window(self):
        return {k: v for k, v in self.how.items() if k != "groups"}


@st.composite
def conv_cases(draw, max_groups=3, min_batch=0):
    """Any kernel, stride, padding (also larger than the kernel), dilation and groups, on images from the smallest that fits."""
    def setting(least, most):
        return draw(st.integers(least, most) | st.tuples(st.integers(least, most), st.integers(least, most)))

    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    how = {"stride": setting(1, 3), "padding": setting(0, 4), "dilation": setting(1, 3), "groups": draw(st.integers(1, max_groups))}
    pairs = Conv(None, None, None, how).pairs
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, pairs["dilation"], strict=True)]
    size = [max(1, r - 2 * p) + draw(st.integers(0, 3)) for r, p in zip(reach, pairs["padding"], strict=True)]
    groups, n = how["groups"], draw(st.integers(min_batch, 2))
    c, k = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Conv(rng.standard_normal((n, c, *size)), rng.standard_normal((k, c // groups, *kernel)), rng.standard_normal(k), how)


def relaid(array, how):
    """The same numbers in other memory: channels last, every second of a larger array, backwards, or Fortran's order."""
    xp = array_module(array)
    if how == "channels last":
        return xp.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if how == "every second":
        every_second = (slice(None, None, 2),) * array.ndim
        larger = xp.zeros(tuple(2 * n for n in array.shape), array.dtype)
        larger[every_second] = array
        return larger[every_second]
    if how == "backwards":
        return xp.ascontiguousarray(array[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    return xp.ascontiguousarray(array.T).T if how == "Fortran" else array


LAYOUTS = ["contiguous", "channels last", "every second", "backwards", "Fortran"]


def check_conv(device, case, layout="contiguous", dy=None):
    """Forward and all three gradients against the loops of `direct`, to 1e-10."""
    expected = direct.conv2d(case.x, case.weight, case.bias, **case.pairs)
    dy = np.random.default_rng(0).standard_normal(expected.shape) if dy is None else dy
    given = [mc.Tensor(relaid(device.put(a), layout) if a.ndim == 4 else device.put(a), requires_grad=True)
             for a in (case.x, case.weight, case.bias)]
    with read_only(*given):
        y = ops.conv2d(*given, **case.how)
    same(y, expected, what="y")
    seed = relaid(device.put(dy), layout)
    with nothing_written(), read_only(seed):
        y.backward(seed)
    for name, tensor, g in zip(("x", "weight", "bias"), given, direct.conv2d_grads(dy, case.x, case.weight, **case.pairs),
                               strict=True):
        same(tensor.grad, g, what=f"gradient of {name}")


@hypothesis.given(case=conv_cases(), layout=st.sampled_from(LAYOUTS))
def test_against_loops(device, case, layout):
    check_conv(device, case, layout)


@hypothesis.given(case=conv_cases(min_batch=1), block=st.sampled_from([1, 64, 300, 1000, 4000]))
def test_blocks_cut_rows_and_images_anywhere(device, case, block):
    """Columns of a few bytes a block: one row at a time, some rows, some images; the numbers are the same."""
    with mock.patch.multiple(im2col, COLUMN_BYTES=block, LIBRARY_BYTES=block, LEAST_ROWS=1):
        check_conv(device, case)


@hypothesis.given(case=conv_cases(min_batch=1))
def test_the_three_maps_are_each_others_adjoints(device, case):
    """<conv2d(x, w), dy> == <x, conv2d_input_grad(dy, w)> == <w, conv2d_weight_grad(x, dy)>."""
    x, weight = device.put(case.x), device.put(case.weight)
    y = ops.conv2d(x, weight, **case.how)
    dy = device.put(np.random.default_rng(1).standard_normal(y.shape))
    dx = ops.conv2d_input_grad(dy, weight, case.x.shape[2:], **case.how)
    dweight = ops.conv2d_weight_grad(x, dy, case.weight.shape[2:], **case.how)
    size = np.abs(host(y)).ravel() @ np.abs(host(dy)).ravel() + 1e-300
    assert abs(inner(y, dy) - inner(case.x, dx)) <= 1e-12 * size
    assert abs(inner(y, dy) - inner(case.weight, dweight)) <= 1e-12 * size


@hypothesis.given(case=conv_cases(max_groups=1))
def test_im2col_and_col2im(device, case):
    """im2col against loops; col2im as its adjoint; a convolution as one product with the columns."""
    kernel, window = case.weight.shape[2:], {k: v for k, v in case.pairs.items() if k != "groups"}
    columns = mc.im2col(device.put(case.x), kernel, **case.window)
    same(columns, naive_im2col(case.x, kernel, **window), 0)
    c = np.random.default_rng(2).standard_normal(columns.shape)
    given = device.put(c)
    with read_only(given):
        image = mc.col2im(given, case.x.shape[2:], kernel, **case.window)
    assert tuple(image.shape) == (case.x.shape if len(case.x) else (0, case.x.shape[1], *case.x.shape[2:]))
    assert inner(columns, c) == pytest.approx(inner(case.x, image), rel=1e-12, abs=1e-12)
    y = np.einsum("kr,nrp->nkp", case.weight.reshape(len(case.weight), -1), host(columns))
    same(ops.conv2d(device.put(case.x), device.put(case.weight), **case.how).reshape(y.shape), y)


def test_col2im_counts_how_many_windows_saw_a_pixel(device):
    """A picture of ones through both: 3x3 windows at every pixel, the corner is in 4 of them and the middle in 9."""
    ones = device.put(np.ones((1, 2, 4, 4)))
    back = mc.col2im(mc.im2col(ones, 3, padding=1), (4, 4), 3, padding=1)
    expected = np.outer([2, 3, 3, 2], [2, 3, 3, 2])
    np.testing.assert_array_equal(host(back), np.broadcast_to(expected, (1, 2, 4, 4)))


def test_layouts_of_im2col(device):
    """Row (c, i, j), column (p, q), both row-major; it copies, whatever the image's memory."""
    x = np.arange(2 * 2 * 3 * 3, dtype=float).reshape(2, 2, 3, 3)
    columns = mc.im2col(device.put(x), 2)
    assert tuple(columns.shape) == (2, 8, 4)
    np.testing.assert_array_equal(host(columns)[1, 4 + 2 * 1 + 0], [x[1, 1, 1, 0], x[1, 1, 1, 1], x[1, 1, 2, 0], x[1, 1, 2, 1]])
    source = device.put(x[:, :, :1, :1])
    columns = mc.im2col(source, 1)
    columns[...] = -1.0
    np.testing.assert_array_equal(host(source), x[:, :, :1, :1])


# ---------------------------------------------------------------- corners, each by name

def numbers(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(("x", "weight", "how"), [
    ((1, 1, 1, 1), (1, 1, 1, 1), {}), ((2, 3, 1, 1), (4, 3, 1, 1), {}), ((1, 1, 1, 1), (2, 1, 3, 3), {"padding": 1}),
    ((1, 1, 1, 1), (1, 1, 2, 2), {"padding": 5, "stride": 3}), ((2, 2, 3, 4), (3, 2, 3, 4), {}),
    ((1, 2, 2, 2), (2, 2, 4, 6), {"padding": (1, 2)}),
    ((1, 2, 3, 3), (2, 2, 2, 2), {"padding": 7}), ((1, 1, 9, 9), (1, 1, 2, 2), {"stride": 5}),
    ((1, 1, 5, 5), (1, 1, 2, 2), {"stride": (1, 4), "dilation": (4, 1)}),
    ((2, 4, 3, 3), (4, 1, 3, 3), {"groups": 4, "padding": 1}), ((2, 2, 3, 3), (6, 1, 2, 2), {"groups": 2}),
    ((0, 2, 4, 4), (3, 2, 3, 3), {"padding": 1}),
    ((1, 2, 5, 1), (2, 2, 3, 1), {"padding": (1, 0)}), ((2, 3, 4, 4), (2, 3, 1, 1), {"stride": 2}),
    ((1, 1, 3, 3), (1, 1, 1, 1), {"padding": 2, "stride": 2})],
    ids=str)
def test_corners(device, x, weight, how):
    """1x1 images and kernels, padding beyond the kernel, kernels as large as the padded image, one channel, no image at all."""
    how = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **how}
    check_conv(device, Conv(numbers(*x), numbers(*weight, seed=6), numbers(weight[0], seed=7), how))


def test_an_output_gradient_that_is_one_number_everywhere(device):
    """The gradient of y.sum() is a broadcast view, of stride 0, which no kernel may write into or misread."""
    x, weight, bias = device.tensors([numbers(2, 2, 4, 4), numbers(3, 2, 3, 3), numbers(3)])
    ops.conv2d(x, weight, bias, padding=1).sum().backward()
    expected = direct.conv2d_grads(np.ones((2, 3, 4, 4)), host(x), host(weight), padding=(1, 1))
    for tensor, g in zip((x, weight, bias), expected, strict=True):
        same(tensor.grad, g)


def test_only_the_gradients_that_are_asked_for_run():
    """The first layer's input gradient, the dearest, is never computed unless wanted."""
    x, weight = mc.Tensor(numbers(1, 1, 4, 4)), mc.Tensor(numbers(1, 1, 3, 3), requires_grad=True)
    with mock.patch.object(kernels, "conv2d_input_grad", side_effect=AssertionError("nobody asked for it")):
        ops.conv2d(x, weight).sum().backward()
    with mock.patch.object(kernels, "conv2d_weight_grad", side_effect=AssertionError("nobody asked for it")):
        x.requires_grad = True
        mc.grad(ops.conv2d(x, weight).sum(), x)


def test_float32_is_as_exact_as_float32_can_be(device):
    x, weight = numbers(2, 16, 9, 9).astype(np.float32), numbers(8, 16, 3, 3).astype(np.float32)
    y = ops.conv2d(device.put(x), device.put(weight), padding=1, algorithm="im2col")
    assert y.dtype == np.float32
    same(y, ops.conv2d(x.astype(float), weight.astype(float), padding=1), 1e-6)


# ---------------------------------------------------------------- memory

def peak(run):
    """Bytes, the workspaces that the kernels keep among them: none are left from before."""
    vars(threads._mine).pop("workspaces", None)
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("which", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"])
def test_the_column_matrix_of_the_whole_batch_never_exists(which):
    """What every further image adds to the peak is a few images, not the 9 that its columns are."""
    c, size = 8, 16
    image = c * size * size * 4
    weight = np.ones((c, c, 3, 3), np.float32)

    def at(n):
        x = np.ones((n, c, size, size), np.float32)
        call = {"conv2d": lambda: ops.conv2d(x, weight, padding=1),
                "conv2d_input_grad": lambda: ops.conv2d_input_grad(x, weight, (size, size), padding=1),
                "conv2d_weight_grad": lambda: ops.conv2d_weight_grad(x, x, (3, 3), padding=1)}[which]
        return peak(call)

    with mock.patch.multiple(im2col, COLUMN_BYTES=2 * 10 * image, LEAST_ROWS=1, LEAST_ROWS_OF_A_SUM=1), \
            mock.patch.object(tapwise, "BLOCK_BYTES", 2 * image), mc.algorithm("im2col"):
        a_further_image = (at(24) - at(8)) / 16 / image
        assert a_further_image < 3                          # a copy in channels-last memory of what came in, and the output
        assert at(8) < (2 * 9 + 2 * 8 + 8) * image          # one block of columns, the copies, the block's padded images
        assert 9 * 24 * image > at(24) * 2                  # the matrix would not even fit in twice the peak


def test_large_images_are_cut_into_rows():
    """A single image whose columns exceed COLUMN_BYTES does not make them all at once either."""
    x = np.ones((1, 4, 64, 64), np.float32)
    weight = np.ones((4, 4, 5, 5), np.float32)
    columns = 25 * x.nbytes
    with mock.patch.multiple(im2col, COLUMN_BYTES=x.nbytes, LEAST_ROWS=1), mc.algorithm("im2col"):
        assert peak(lambda: ops.conv2d(x, weight, padding=2)) < columns / 4


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize(("x", "weight", "bias", "how", "words"), [
    ((2, 3, 5, 5), (4, 2, 3, 3), None, {}, ["(2, 3, 5, 5)", "(4, 2, 3, 3)", "3 channels", "reads 2", "(K, 3, kh, kw)"]),
    ((2, 4, 5, 5), (4, 4, 3, 3), None, {"groups": 2}, ["(2, 4, 5, 5)", "(4, 4, 3, 3)", "groups=2", "(K, 2, kh, kw)"]),
    ((2, 4, 5, 5), (3, 2, 3, 3), None, {"groups": 2}, ["groups=2", "4 channels", "3 filters", "(2, 4, 5, 5)", "(3, 2, 3, 3)"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"groups": 2}, ["groups=2", "(2, 3, 5, 5)"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"groups": 0}, ["groups=0"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), (3,), {}, ["bias (3,)", "4 filters", "(4,)"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), (4, 1), {}, ["bias (4, 1)", "(4,)"]),
    ((3, 5, 5), (4, 3, 3, 3), None, {}, ["(3, 5, 5)", "(N, C, H, W)", "x[None]"]),
    ((2, 3, 5, 5), (4, 3, 3), None, {}, ["weight", "(4, 3, 3)", "(K, C / groups, kh, kw)"]),
    ((2, 3, 2, 5), (4, 3, 3, 3), None, {}, ["2 x 5", "3 x 3", "smaller than the window", "padding"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"dilation": 3}, ["5 x 5", "7 x 7", "dilation=(3, 3)"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"stride": 0}, ["stride=0", "at least 1"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"stride": (1, 2, 3)}, ["stride=(1, 2, 3)", "pair (rows, columns)"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"padding": -1}, ["padding=-1", "at least 0"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"padding": 1.0}, ["padding=1.0", "integer"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"padding": "same"}, ["padding='same'"]),
    ((2, 3, 5, 5), (4, 3, 3, 3), None, {"dilation": True}, ["dilation=True"])], ids=str)
def test_what_does_not_fit_is_said(device, x, weight, bias, how, words):
    """Both shapes, the rule and the cure in one line, before any work is done."""
    arrays = [None if shape is None else device.tensor(np.ones(shape)) for shape in (x, weight, bias)]
    work = mock.patch.object(kernels, "channels_last", side_effect=AssertionError("work was done"))
    with work, pytest.raises(ValueError) as error:
        ops.conv2d(*arrays, **how)
    assert [w for w in words if w not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_images_of_integers_are_told_to_convert(device):
    weight = device.put(np.ones((4, 3, 3, 3), np.float32))
    with pytest.raises(TypeError, match=r"x is uint8 and weight float32.*astype\('float32'\)"):
        ops.conv2d(device.put(np.ones((2, 3, 5, 5), np.uint8)), weight)


def test_output_gradients_that_do_not_fit(device):
    """The other two maps are public as well, and check what they are given."""
    x, weight = device.put(np.ones((2, 3, 5, 5))), device.put(np.ones((4, 3, 3, 3)))
    for shape in ((2, 4, 4, 3), (2, 3, 3, 3), (4, 3, 3), (2, 4, 5, 5)):
        with pytest.raises(ValueError, match=r"conv2d_input_grad: dy \(.*\(N, 4, 3, 3\)") as error:
            ops.conv2d_input_grad(device.put(np.ones(shape)), weight, (5, 5))
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match=r"conv2d_weight_grad: dy \(2, 4, 4, 4\).*\(N, 4, 3, 3\)"):
        ops.conv2d_weight_grad(x, device.put(np.ones((2, 4, 4, 4))), (3, 3))


@pytest.mark.parametrize(("call", "words"), [
    (lambda put: mc.im2col(put(np.ones((3, 5, 5))), 3), ["im2col", "(3, 5, 5)", "(N, C, H, W)"]),
    (lambda put: mc.im2col(put(np.ones((1, 3, 2, 2))), 3), ["2 x 2", "3 x 3"]),
    (lambda put: mc.im2col(put(np.ones((1, 3, 5, 5))), 0), ["kernel_size=0"]),
    (lambda put: mc.col2im(put(np.ones((9, 9))), (5, 5), 3), ["col2im", "(9, 9)", "(N, C*kh*kw, P*Q)"]),
    (lambda put: mc.col2im(put(np.ones((1, 10, 9))), (5, 5), 3), ["(1, 10, 9)", "C*9"]),
    (lambda put: mc.col2im(put(np.ones((1, 9, 8))), (5, 5), 3), ["(1, 9, 8)", "3*3=9", "in_size"])])
def test_errors_of_im2col_and_col2im(device, call, words):
    with pytest.raises(ValueError) as error:
        call(device.put)
    assert [w for w in words if w not in str(error.value)] == []
