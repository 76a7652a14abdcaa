"""What the CUDA kernels must agree on with the portable ones: each case runs both and says how far they are apart.

Each case goes through the functions that the engine calls, so the launches are tried with the kernels. Sizes are odd, windows
overlap and leave gaps, numbers are equal, arrays are empty or of one element; and limits are lowered (`small`), so that loops over
blocks, chunks and parts are taken several times.

Of half precision the portable kernels are given the same numbers in float32: so what is left is how the results are rounded.
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from minicnn.backend import array_module, is_half, real_of, to_device, to_numpy
from minicnn.kernels import elementwise, im2col, loss, normalization, pooling, precision, update, winograd
from minicnn.kernels import linear as linear_kernels
from minicnn.kernels.cuda import elementwise as cuda_elementwise
from minicnn.kernels.cuda import im2col as cuda_im2col
from minicnn.kernels.cuda import launch as cuda_launch
from minicnn.kernels.cuda import loss as cuda_loss
from minicnn.kernels.cuda import normalization as cuda_normalization
from minicnn.kernels.cuda import pooling as cuda_pooling
from minicnn.kernels.cuda import source
from minicnn.kernels.cuda import winograd as cuda_winograd
from minicnn.kernels.elementwise import Affine
from minicnn.kernels.windows import Windows, channels_first

Case = Callable[[str, type], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Enter a case by the name of its function; it is called with a device and a type of numbers."""
    CASES[function.__name__] = function
    return function


def halves() -> list[np.dtype]:
    """The types of half precision that are at hand here."""
    found = [np.dtype(np.float16)]
    with contextlib.suppress(ImportError):
        found.append(precision.half_type("bf16"))
    return found


def wide(array):
    """A half array in float32, and anything else as it is."""
    return array.astype(np.float32) if isinstance(array, np.ndarray) and is_half(array.dtype) else array


@contextlib.contextmanager
def small() -> Iterator[None]:
    """Limits so low that small arrays take several blocks, chunks and parts."""
    limits = [(cuda_launch, "MOST_BLOCKS", 3), (cuda_elementwise, "MOST_BLOCKS", 2), (cuda_im2col, "COLUMN_BYTES", 3000),
              (cuda_launch, "MOST_ROWS", 5), (cuda_launch, "MOST_ALONG", 2), (cuda_loss, "MOST_BLOCKS", 2),
              (cuda_normalization, "MOST_CHUNKS", 7), (cuda_normalization, "LEAST_ROWS", 2),
              (cuda_winograd, "SPECTRUM_BYTES", 20000),
              *((module, "THREADS", 8) for module in (cuda_launch, cuda_elementwise, cuda_im2col, cuda_pooling))]
    with contextlib.ExitStack() as stack:
        for module, name, value in limits:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def agree(device, dtype, function, *arguments, tolerance=None, exact=False):
    """function of the arguments on NumPy and on the device: the same numbers, as far as the order of sums allows."""
    def put(value):
        if isinstance(value, Affine):
            return Affine(put(value.scale), put(value.shift), put(value.residual), value.rectified)
        if isinstance(value, list):
            return [put(v) for v in value]
        return to_device(value, device) if isinstance(value, np.ndarray) else value

    def widened(value):
        if isinstance(value, Affine):
            return Affine(value.scale, value.shift, wide(value.residual), value.rectified)
        return wide(value)

    half = is_half(np.dtype(dtype))
    expected, actual = function(*map(widened, arguments) if half else arguments), function(*(put(a) for a in arguments))
    expected, actual = (r if isinstance(r, tuple) else (r,) for r in (expected, actual))
    assert len(expected) == len(actual)
    limit = 0 if exact else {"e": 2 ** -9, "E": 2 ** -6}[np.dtype(dtype).char] if half else tolerance or (
        2e-5 if dtype is np.float32 else 1e-12)
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        if e is None:
            assert a is None, f"{function.__name__}: result {i} is there"
            continue
        a = to_numpy(a)
        if half:
            assert a.dtype in (dtype, np.float32), (function.__name__, i, a.dtype)
            with np.errstate(all="ignore"):
                e, a = wide(e.astype(a.dtype)), wide(a)
        assert a.shape == e.shape, (function.__name__, i, a.shape, e.shape)
        assert a.dtype == e.dtype == real_of(np.dtype(dtype)), (function.__name__, i, a.dtype, e.dtype)
        for special in (np.isnan, np.isposinf, np.isneginf):
            assert np.array_equal(special(a), special(e)), (function.__name__, i)
        a, e = np.nan_to_num(a), np.nan_to_num(e)
        far = np.abs(a - e).max(initial=0) / max(np.abs(e).max(initial=0), 1e-30)
        assert far <= limit, f"{function.__name__}: result {i} is {far:.1e} of the largest number off, more than {limit:.0e}"


def normal(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def normal_real(rng, dtype, *shape):
    """Of what there is one of a channel, which is float32 beside images of half precision."""
    return normal(rng, real_of(np.dtype(dtype)), *shape)


def rng_of(name):
    return np.random.default_rng(list(name.encode()))


# ---------------------------------------------------------------- convolution
WINDOWS = [Windows.of(3, 1, 1), Windows.of(3, 2, 1), Windows.of((2, 3), (3, 1), (0, 2)), Windows.of(1), Windows.of(1, 2),
           Windows.of(3, 2, 0, 2), Windows.of((1, 5), (2, 3), (0, 2), (1, 2)), Windows.of(7, 2, 3), Windows.of(2, 3, 1),
           Windows.of(5, 1, 0)]
CONVOLVED = [(2, 9, 8, 3, 5), (1, 11, 9, 4, 2), (3, 9, 9, 8, 3), (0, 9, 9, 3, 2)]     # N, H, W, C, K


def convolutions(name, dtype, windows=WINDOWS, sizes=CONVOLVED):
    rng = rng_of(name)
    for some in windows:
        for n, h, w, c, k in sizes:
            p, q = some.out_size((h, w))
            yield (some, normal(rng, dtype, n, h, w, c), normal(rng, dtype, *some.kernel_size, c, k),
                   normal(rng, dtype, n, p, q, k), normal_real(rng, dtype, k))


@case
def convolve(device, dtype):
    for windows, image, filters, _, bias in convolutions("convolve", dtype):
        agree(device, dtype, im2col.convolve, image, filters, None, windows)
        agree(device, dtype, im2col.convolve, image, filters, bias, windows)


@case
def convolve_and_finish(device, dtype):
    windows, image, filters, dy, bias = next(convolutions("finish", dtype))
    scale, residual = bias[::-1].copy(), dy.reshape(-1, dy.shape[3])
    for finish in (Affine(rectified=True), Affine(scale, bias, residual, True), Affine(residual=residual), Affine(scale, bias)):
        agree(device, dtype, im2col.convolve, image, filters, None, windows, finish)
    agree(device, dtype, im2col.convolve, image, filters, bias, windows, Affine(None, None, residual, True))


@case
def convolve_input_grad(device, dtype):
    for windows, image, filters, dy, _ in convolutions("input", dtype):
        agree(device, dtype, im2col.convolve_input_grad, dy, filters, image.shape[1:3], windows)


@case
def convolve_weight_grad(device, dtype):
    for windows, image, _, dy, _ in convolutions("weight", dtype):
        agree(device, dtype, im2col.convolve_weight_grad, image, dy, windows)


@case
def winograd_maps(device, dtype):
    windows = [Windows.of(3, 1, padding) for padding in (0, 1, (2, 0))]
    for some, image, filters, dy, bias in convolutions("winograd", dtype, windows):
        residual = dy.reshape(-1, dy.shape[3])
        for finish in (None, Affine(residual=residual, rectified=True)):
            agree(device, dtype, winograd.convolve, image, filters, bias, some, finish)
        agree(device, dtype, winograd.convolve, image, filters, None, some, Affine(bias, bias, residual, True))
        agree(device, dtype, winograd.convolve_input_grad, dy, filters, image.shape[1:3], some)
        agree(device, dtype, winograd.convolve_weight_grad, image, dy, some)


@case
def one_pixel(device, dtype):
    for some, image, filters, dy, bias in convolutions("one", dtype, [Windows.of(3, 1, 1)], [(1, 1, 1, 1, 1), (1, 1, 2, 4, 1)]):
        for kernels in (im2col, winograd):
            agree(device, dtype, kernels.convolve, image, filters, bias, some)
            agree(device, dtype, kernels.convolve_input_grad, dy, filters, image.shape[1:3], some)
            agree(device, dtype, kernels.convolve_weight_grad, image, dy, some)


@case
def product(device, dtype):
    rng = rng_of("product")
    for m, k, n in ((5, 7, 3), (1, 300, 1), (0, 3, 2), (3, 0, 2), (64, 2, 130)):
        agree(device, dtype, linear_kernels.product, normal(rng, dtype, m, k), normal(rng, dtype, k, n))
        agree(device, dtype, linear_kernels.product, normal(rng, dtype, k, m).T, normal(rng, dtype, n, k).T)


@case
def add_to_rows(device, dtype):
    def added(y, bias):
        y = y.copy()
        linear_kernels.add_to_rows(y, bias)
        return y

    rng = rng_of("rows")
    for m, n in ((3, 5), (1, 1), (0, 4), (70, 12)):
        agree(device, dtype, added, normal(rng, dtype, m, n), normal_real(rng, dtype, n))


# ---------------------------------------------------------------- pooling
POOLS = [Windows.of(2, 2), Windows.of(3, 2, 1), Windows.of(3, 1, 1), Windows.of((2, 3), (1, 2), (1, 0)), Windows.of(2, 3),
         Windows.of(3, 2, 0, 1, True), Windows.of(1)]


def pooled(name, dtype):
    rng = rng_of(name)
    for windows in POOLS:
        for n, c, h, w in ((2, 3, 9, 7), (1, 8, 4, 6), (0, 2, 5, 5), (3, 1, 6, 6)):
            x = normal(rng, dtype, n, h, w, c)
            ties = rng.integers(0, 2, x.shape).astype(dtype)            # many equal pixels in a window
            holes = np.where(rng.random(x.shape) < 0.2, np.nan, x).astype(dtype)
            depths = np.where(rng.random(x.shape) < 0.5, -np.inf, x).astype(dtype)
            for image in (x, ties, holes, depths):
                yield windows, channels_first(image)


@case
def max_pool2d(device, dtype):
    for windows, x in pooled("max", dtype):
        agree(device, dtype, pooling.max_pool2d, x, windows, exact=True)


@case
def max_pool2d_grad(device, dtype):
    rng = rng_of("max grad")
    for windows, x in pooled("max grad", dtype):
        y = pooling.max_pool2d(wide(x), windows).astype(dtype)
        dy = channels_first(normal(rng, dtype, *y.transpose(0, 2, 3, 1).shape))
        agree(device, dtype, pooling.max_pool2d_grad, dy, x, y, windows)


# ---------------------------------------------------------------- normalisation and passes
NORMALIZED = [(4, 3, 5, 6), (2, 40, 3, 3), (1, 1, 1, 2), (130, 2, 1, 1), (3, 16, 7, 5)]     # N, C, H, W


def batches(name, dtype):
    """(x, weight, bias, another like x): of mean 0, and of one a hundred times the deviation"""
    rng = rng_of(name)
    for n, c, h, w in NORMALIZED:
        for centre in (0, 100):
            x = channels_first((rng.standard_normal((n, h, w, c)) + centre).astype(dtype))
            yield x, normal_real(rng, dtype, c), normal_real(rng, dtype, c), channels_first(normal(rng, dtype, n, h, w, c))


@case
def normalize(device, dtype):
    tolerance = 2e-4 if dtype is np.float32 else 1e-11             # of a mean that is 100 deviations, both lose two digits
    for x, weight, bias, residual in batches("normalize", dtype):
        agree(device, dtype, normalization.normalize, x, weight, bias, 1e-5, tolerance=tolerance)
        agree(device, dtype, normalization.normalize, x, weight, bias, 1e-5, True, residual, tolerance=tolerance)


@case
def normalize_grad(device, dtype):
    tolerance = 2e-3 if dtype is np.float32 else 1e-10
    for x, weight, bias, dy in batches("normalize grad", dtype):
        if x.size == 2 and is_half(x.dtype):
            continue                                        # of two numbers the gradient is 0, but for eps and for rounding
        y, mean, var = normalization.normalize(wide(x), weight, bias, 1e-5, True)
        y = y.astype(dtype)
        for want, result in ((True, None), (True, y), (False, y), (False, None)):
            agree(device, dtype, normalization.normalize_grad, dy, x, weight, mean, var, 1e-5, want, result, tolerance=tolerance)


@case
def follow(device, dtype):
    rng = rng_of("follow")

    def moved(running_mean, running_var, mean, var):
        running_mean, running_var = running_mean.copy(), running_var.copy()
        normalization.follow(running_mean, running_var, mean, var, 0.1, 7)
        return running_mean, running_var

    for c in (1, 33):
        agree(device, dtype, moved, *(normal(rng, dtype, c) for _ in range(4)))


@case
def channel_affine(device, dtype):
    for x, weight, bias, _ in batches("affine", dtype):
        agree(device, dtype, normalization.channel_affine, x, weight, bias)


@case
def channel_total(device, dtype):
    for x, *_ in batches("total", dtype):
        agree(device, dtype, normalization.channel_total, x)


@case
def passes(device, dtype):
    rng = rng_of("passes")
    for shape in ((), (1,), (0,), (3, 5), (2, 3, 4, 5), (1000,)):
        a, b = normal(rng, dtype, *shape), normal(rng, dtype, *shape)
        if a.size > 3:
            a.reshape(-1)[:3] = np.nan, 0, -0.0
        agree(device, dtype, elementwise.relu, a, exact=True)
        agree(device, dtype, elementwise.relu_grad, b, a, exact=True)
        agree(device, dtype, elementwise.add_relu, a, b, exact=True)
        agree(device, dtype, accumulated, a, b, exact=True)
    x = channels_first(normal(rng, dtype, 2, 5, 4, 3))                                          # of two layouts
    agree(device, dtype, elementwise.relu_grad, np.ascontiguousarray(x), x, exact=True)
    agree(device, dtype, accumulated, np.ascontiguousarray(x), x, exact=True)
    agree(device, dtype, accumulated, x, np.ascontiguousarray(x), exact=True)
    agree(device, dtype, accumulated, x[:, :, :4:2], x[:, :, 1:4:2], exact=True)                # with gaps


def accumulated(a, b):
    """a + b written over the first of two copies of a, beside which nothing is to change."""
    both = array_module(a).stack([a, a])
    elementwise.accumulate(both[0, ...], b)
    return both


@case
def types(device, dtype):
    """Each number to the nearest that there is; of two as near, to the even one; and back as it was."""
    rng = rng_of("types")
    finest = 2.0 ** -{"f": 23, "d": 52, "e": 10, "E": 7}[np.dtype(dtype).char]
    halfway = 1 + finest * (np.arange(64) + 0.5)
    odd = np.array([0x7f800001, 0x7fffffff, 0xff800001], np.uint32).view(np.float32)         # no numbers, by their last bits
    special = [*odd, np.nan, np.inf, -np.inf, 0, -0.0, 65504, 65519.9, 65520, 3e38, 1e-8, 6e-8, 1e-5, 1e-38]
    real = real_of(np.dtype(dtype))
    with np.errstate(all="ignore"):
        for numbers in (rng.standard_normal((3, 5, 7)), halfway, halfway * 1.00001, special, [], 1.5,
                        channels_first(np.ones((2, 3, 4, 5)))):
            x = np.array(numbers, real)
            agree(device, dtype, elementwise.cast, x, np.dtype(dtype), exact=True)
            agree(device, real.type, elementwise.cast, x.astype(dtype), real, exact=True)


# ---------------------------------------------------------------- the loss, and the step
@case
def cross_entropy(device, dtype):
    rng = rng_of("loss")
    for n, classes in ((1, 1), (5, 3), (3, 300), (9, 2)):
        logits, labels = 5 * normal(rng, dtype, n, classes), rng.integers(0, classes, n)
        logits[0] += 1000                                               # e^1000 is no float
        for smoothing in (0.0, 0.1):
            agree(device, dtype, loss.cross_entropy, logits, labels, smoothing)
            agree(device, dtype, loss.cross_entropy_grad, np.array(-1.5, dtype), logits, labels.astype(np.int32), smoothing,
                  tolerance=1e-4 if dtype is np.float32 else None)


def parameters(name, dtype):
    rng = rng_of(name)
    shapes = [(3, 2), (1,), (), (5000,), (0,), (4, 3, 3, 3)]
    return [[channels_first(normal(rng, dtype, *s)) if len(s) == 4 else normal(rng, dtype, *s) for s in shapes] for _ in range(4)]


@case
def sgd(device, dtype):
    def moved(params, grads, velocities, *settings):
        params, velocities = [p.copy(order="K") for p in params], velocities and [v.copy(order="K") for v in velocities]
        update.sgd(params, grads, velocities, *settings)
        return *params, *(velocities or ())

    params, grads, velocities, _ = parameters("sgd", dtype)
    agree(device, dtype, moved, params, grads, velocities, 0.1, 0.9, 1e-2, False)
    agree(device, dtype, moved, params, grads, velocities, 0.1, 0.9, 0.0, True)
    agree(device, dtype, moved, params, grads, None, 0.1, 0.0, 1e-2, False)
    for finite in (0, 1):
        agree(device, dtype, moved, params, grads, velocities, 0.1, 0.9, 1e-2, False, np.array([4, 0.25, finite, 1, 0], dtype))


@case
def adamw(device, dtype):
    def moved(params, grads, ms, vs, *settings):
        params, ms, vs = ([a.copy(order="K") for a in arrays] for arrays in (params, ms, vs))
        update.adamw(params, grads, ms, vs, *settings)
        return *params, *ms, *vs

    params, grads, ms, vs = parameters("adamw", dtype)
    for t in (1, 10):
        agree(device, dtype, moved, params, grads, ms, [np.asarray(abs(v)) for v in vs], t, 0.01, (0.9, 0.999), 1e-8, 0.1)
    for finite in (0, 1):
        agree(device, dtype, moved, params, grads, ms, [np.asarray(abs(v)) for v in vs], 3, 0.01, (0.9, 0.999), 1e-8, 0.1,
              np.array([4, 0.25, finite, 1, 0], dtype))


@case
def scaling_of_the_loss(device, dtype):
    """What is remembered of the scale, over steps of which some overflow, in any place."""
    def remembered(steps, scaling):
        scaling, seen = scaling.copy(), []
        for grads in steps:
            update.find_overflow(grads, scaling)
            seen.append(scaling.copy())
            update.adapt(scaling, 2.0, 0.5, 2)
            seen.append(scaling.copy())
        return tuple(seen)

    grads, *_ = parameters("scaling", dtype)
    steps = [grads]
    for k, place, wrong in ((0, (2, 1), np.inf), (None, None, None), (3, -1, np.nan), (None, None, None), (None, None, None),
                            (1, 0, -np.inf), (3, 4096, np.inf), (5, (3, 2, 1, 0), np.nan)):
        step = [g.copy(order="K") for g in grads]
        if k is not None:
            step[k][place] = wrong
        steps.append(step)
    agree(device, dtype, remembered, steps, np.array([1024, 0, 0, 1, 0], dtype), exact=True)


# The cases that go through the kernels of a file.
OF_FILE = {"im2col": ["convolve", "convolve_input_grad", "convolve_weight_grad"], "pooling": ["max_pool2d", "max_pool2d_grad"],
           "normalization": ["normalize", "normalize_grad", "follow", "channel_total"],
           "elementwise": ["passes", "normalize", "types"], "loss": ["cross_entropy"],
           "update": ["sgd", "adamw", "scaling_of_the_loss"], "winograd": ["winograd_maps"]}

# The cases that there are of half precision, too.
OF_HALF = ["convolve", "convolve_and_finish", "convolve_input_grad", "convolve_weight_grad", "product", "add_to_rows", "max_pool2d",
           "max_pool2d_grad", "normalize", "normalize_grad", "channel_affine", "channel_total", "passes", "types"]


def plant(old: str, new: str) -> None:
    """Put a fault into the sources for as long as this process lives."""
    whole = {file: source.text(file) for file in source.files()}
    assert any(old in text for text in whole.values()), old
    source.text = lambda file: whole[file].replace(old, new)                # type: ignore[assignment]


def under_a_sanitizer(which: str) -> None:
    """Run what a sanitizer is to watch, which wants a process of its own."""
    if which == "thread":       # kernels whose threads meet, on a few blocks: each of their threads is one of the system's
        NORMALIZED[:] = [(4, 33, 3, 2)]
        for name in ("normalize", "normalize_grad", "channel_total", "cross_entropy", "scaling_of_the_loss"):
            CASES[name]("cushim", np.float32)
        return
    for function in CASES.values():
        for limits in (contextlib.nullcontext, small):
            with limits():
                function("cushim", np.float32)
    for name in OF_HALF:
        CASES[name]("cushim", np.dtype(np.float16))


if __name__ == "__main__":
    import cushim

    from minicnn import backend

    backend.adopt(cushim.with_cuda(), "cushim")
    if sys.argv[2:]:
        plant(*sys.argv[2:])
    under_a_sanitizer(sys.argv[1])
