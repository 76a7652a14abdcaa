"""Every operation of the package, and two small models, through the gradient checks: what `minicnn gradcheck` prints."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.kernels import pooling
from minicnn.kernels.windows import Windows
from minicnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from minicnn.testing.checking import Report, check, check_second, layer_function
from minicnn.testing.function import Function


class Result(NamedTuple):
    """One line of the table."""

    name: str
    order: int                  # 1: gradients, 2: gradients of gradients
    inputs: int                 # arrays whose gradients were compared, over all cases of this name
    worst: float                # relative error
    seconds: float
    ok: bool
    message: str                # what is wrong, where something is


class Case(NamedTuple):
    """A call to check: fn(*inputs)."""

    fn: Callable[..., Any]
    inputs: Sequence[Any]


def check_everything(on_result: Callable[[Result], None] | None = None, second_order: bool = True) -> list[Result]:
    """Check every op of `minicnn.ops`, a small VGG and a small ResNet, to second order; on_result hears of each at once."""
    results = []
    for result in _results(second_order):
        if on_result is not None:
            on_result(result)
        results.append(result)
    return results


def _results(second_order: bool) -> Iterator[Result]:
    orders = (1, 2) if second_order else (1,)
    for name in ops.__all__:
        for order in orders:
            yield _result(name, order, partial(_calls, name))
    for name, model in small_models().items():
        for mode in ("inference", "training"):
            for order in orders:
                yield _result(f"{name}, {mode}", order, partial(_model_calls, model, mode == "training"))


def _calls(name: str) -> list[Function]:
    return [Function(case.fn, case.inputs) for case in CASES[name]]


def _model_calls(model: Layer, train: bool) -> list[Function]:
    return [layer_function(model, IN_SHAPE, train, batch=3, seed=0)]


def _result(name: str, order: int, functions: Callable[[], list[Function]]) -> Result:
    began, reports, worst, message = time.perf_counter(), list[Report](), math.nan, ""
    try:
        for function in functions():
            reports.append((check if order == 1 else check_second)(function))
        worst = max(report.worst for report in reports)
    except Exception as error:      # whatever goes wrong with one is said in its line, and the others are checked
        message = f"{type(error).__name__}: {error}"
        worst = getattr(error, "relative_error", None) or math.nan
    return Result(name, order, sum(report.inputs for report in reports), worst, time.perf_counter() - began, not message, message)


# ---------------------------------------------------------------- the operations
def _numbers(*shape: int) -> np.ndarray[Any, Any]:
    """Random numbers of either sign, none near 0, all different."""
    rng = np.random.default_rng(shape)
    return np.asarray(rng.uniform(0.2, 1.5, shape) * rng.choice([-1.0, 1.0], shape))


def _positive(*shape: int) -> np.ndarray[Any, Any]:
    return np.abs(_numbers(*shape))


def _batch_norm(train: bool) -> Callable[..., Any]:
    """With statistics of its own at each call: training moves them."""
    return lambda x, weight, bias: ops.batch_norm(x, weight, bias, np.array([0.1, -0.2]), np.array([0.5, 2.0]), train=train)


def _each(fn: Callable[..., Any], *inputs: Any) -> list[Case]:
    return [Case(fn, inputs)]


X, ROW, COLUMN, SCALAR = _numbers(3, 4), _numbers(4), _numbers(3, 1), np.array(1.5)
IMAGE, CHANNEL = _numbers(2, 2, 4, 5), _numbers(2)
LABELS = np.array([2, 0, 3])
OVERLAPPING = Windows.of(3, 2, 1)
WINNERS = pooling.winners(IMAGE, pooling.max_pool2d(IMAGE, OVERLAPPING), OVERLAPPING)

CASES: dict[str, list[Case]] = {
    "adaptive_avg_pool2d": [Case(lambda x, size=size: ops.adaptive_avg_pool2d(x, size), [IMAGE]) for size in ((3, 2), 1, (4, 5))],
    "add": [Case(ops.add, [X, ROW]), Case(ops.add, [COLUMN, ROW]), Case(lambda x: x + x, [X])],
    "add_relu": _each(ops.add_relu, X, _numbers(3, 4)),
    "affine": _each(ops.affine, IMAGE, CHANNEL, -CHANNEL),
    "astype": _each(lambda x: ops.astype(ops.astype(x, np.longdouble), np.float64), X),
    "avg_pool2d": [Case(lambda x: ops.avg_pool2d(x, 2), [IMAGE]), Case(lambda x: ops.avg_pool2d(x, 3, 2, 1, True), [IMAGE])],
    "batch_norm": [Case(_batch_norm(train), [IMAGE, CHANNEL, -CHANNEL]) for train in (True, False)],
    "broadcast_to": _each(lambda x: ops.broadcast_to(x, (2, 3, 4)), COLUMN),
    "concatenate": _each(lambda a, b: ops.concatenate([a, b, a], 1), X, COLUMN),
    "conv2d": [
        Case(lambda x, weight, bias: ops.conv2d(x, weight, bias, padding=1), [IMAGE, _numbers(3, 2, 3, 3), _numbers(3)]),
        Case(lambda x, weight: ops.conv2d(x, weight, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
             [IMAGE, _numbers(3, 2, 2, 3)]),
        Case(lambda x, weight, bias: ops.conv2d(x, weight, bias, groups=2), [IMAGE, _numbers(4, 1, 2, 2), ROW]),
    ],
    "conv2d_affine": [
        Case(lambda x, weight, scale, shift, plus: ops.conv2d_affine(x, weight, scale, shift, plus, rectified=True, padding=1),
             [IMAGE, _numbers(3, 2, 3, 3), _numbers(3), _numbers(3), _numbers(2, 3, 4, 5)]),
        Case(lambda x, weight, scale, shift: ops.conv2d_affine(x, weight, scale, shift, stride=2, algorithm="direct"),
             [IMAGE, _numbers(3, 2, 3, 3), _numbers(3), _numbers(3)]),
    ],
    "conv2d_input_grad": _each(lambda dy, weight: ops.conv2d_input_grad(dy, weight, (4, 5), stride=2, padding=1),
                               _numbers(2, 3, 2, 3), _numbers(3, 2, 3, 3)),
    "conv2d_relu": [
        Case(lambda x, weight, bias: ops.conv2d_relu(x, weight, bias, padding=1), [IMAGE, _numbers(3, 2, 3, 3), _numbers(3)]),
        Case(lambda x, weight, bias: ops.conv2d_relu(x, weight, bias, padding=1, algorithm="winograd"),
             [IMAGE, _numbers(3, 2, 3, 3), _numbers(3)]),
    ],
    "conv2d_weight_grad": _each(lambda x, dy: ops.conv2d_weight_grad(x, dy, (3, 3), stride=2, padding=1),
                                IMAGE, _numbers(2, 3, 2, 3)),
    "cross_entropy": [Case(lambda z, s=s: ops.cross_entropy(z, LABELS, s), [X]) for s in (0.0, 0.1)],
    "div": [Case(ops.div, [X, ROW]), Case(ops.div, [SCALAR, COLUMN])],
    "dropout": [Case(lambda x: ops.dropout(x, 0.4, train=True, rng=np.random.default_rng(0)), [X]),
                Case(lambda x: ops.dropout(x, 0.4, train=False), [X])],
    "exp": _each(ops.exp, X),
    "getitem": [Case(lambda x: x[1:, ::2], [X]), Case(lambda x: x[np.array([0, 2, 0])], [X]), Case(lambda x: x[..., None, 1], [X])],
    "give_to_winner": _each(lambda dy: ops.give_to_winner(dy, WINNERS, (4, 5), OVERLAPPING), _numbers(2, 2, 2, 3)),
    "global_avg_pool2d": _each(ops.global_avg_pool2d, IMAGE),
    "linear": [Case(ops.linear, [X, _numbers(5, 4), _numbers(5)]), Case(ops.linear, [X, _numbers(5, 4)])],
    "log": _each(ops.log, _positive(3, 4)),
    "log_softmax": [Case(lambda x, axis=axis: ops.log_softmax(x, axis), [X]) for axis in (-1, 0)],
    "matmul": [Case(ops.matmul, [X, ROW]), Case(ops.matmul, [_numbers(3), X]),
               Case(ops.matmul, [_numbers(2, 1, 3, 4), _numbers(5, 4, 2)])],
    "matrix_product": _each(ops.matrix_product, _numbers(2, 3, 4), _numbers(4, 2)),
    "max": [Case(lambda x, axis=axis: ops.max(x, axis), [_numbers(2, 3, 4)]) for axis in (None, 1, (0, 2))],
    "max_of_last": _each(lambda x: ops.max_of_last(x)[0], X),
    "max_pool2d": [Case(lambda x: ops.max_pool2d(x), [IMAGE]), Case(lambda x: ops.max_pool2d(x, 3, 2, 1, True), [IMAGE])],
    "max_of_windows": _each(lambda x: ops.max_of_windows(x, OVERLAPPING), IMAGE),
    "maximum": [Case(ops.maximum, [X, ROW]), Case(lambda x: ops.maximum(x, 0.3), [X])],
    "mean": [Case(lambda x: ops.mean(x), [X]), Case(lambda x: ops.mean(x, (0, 2), True), [_numbers(2, 3, 4)])],
    "min": _each(lambda x: ops.min(x, 0), X),
    "minimum": [Case(ops.minimum, [X, ROW]), Case(lambda x: ops.minimum(0.3, x), [X])],
    "mul": [Case(ops.mul, [X, ROW]), Case(lambda x: x * x, [X])],
    "neg": _each(ops.neg, X),
    "normalize": _each(lambda x, weight, bias: ops.normalize(x, weight, bias, 1e-5)[0], IMAGE, CHANNEL, -CHANNEL),
    "normalize_relu": _each(lambda x, weight, bias: ops.normalize_relu(x, weight, bias, 1e-5)[0], IMAGE, CHANNEL, -CHANNEL),
    "pad": _each(lambda x: ops.pad(x, ((1, 0), (0, 2)), 0.5), X),
    "place": [Case(lambda x: ops.place(x, np.s_[1:4, ::2], (5, 7)), [X]),
              Case(lambda x: ops.place(x, np.array([1, 0, 1]), (2, 4)), [X])],
    "power": [Case(ops.power, [_positive(3, 4), ROW]), Case(lambda x: x ** 3, [X]), Case(lambda x: 2.0 ** x, [X])],
    "relu": _each(ops.relu, X),
    "reshape": _each(lambda x: ops.reshape(x, (2, -1)), X),
    "sigmoid": _each(ops.sigmoid, X),
    "simam": [Case(ops.simam, [IMAGE]), Case(lambda x: ops.simam(x, 0.5), [_numbers(2, 3, 1, 2)])],
    "softmax": [Case(lambda x, axis=axis: ops.softmax(x, axis), [X]) for axis in (-1, 0)],
    "softmax_cross_entropy": _each(lambda z: ops.softmax_cross_entropy(z, LABELS, 0.2), X),
    "sqrt": _each(ops.sqrt, _positive(3, 4)),
    "sub": [Case(ops.sub, [X, ROW]), Case(ops.sub, [SCALAR, COLUMN])],
    "sum": [Case(lambda x: ops.sum(x), [X]), Case(lambda x: ops.sum(x, (0, -1), True), [_numbers(2, 3, 4)])],
    "sum_to": _each(lambda x: ops.sum_to(x, (3, 1)), _numbers(2, 3, 4)),
    "take_from_winner": _each(lambda x: ops.take_from_winner(x, WINNERS, OVERLAPPING), IMAGE),
    "tanh": _each(ops.tanh, X),
    "to": _each(lambda x: ops.to(x, "cpu"), X),
    "transpose": [Case(lambda x, axes=axes: ops.transpose(x, axes), [_numbers(2, 3, 4)]) for axes in (None, (1, 2, 0), (-1, 0, 1))],
    "var": [Case(lambda x: ops.var(x), [X]), Case(lambda x: ops.var(x, (0, 2), 1, True), [_numbers(2, 3, 4)])],
    "where": _each(lambda a, b: ops.where(X > 0, a, b), COLUMN, ROW),
    "window_spread": _each(lambda dy: ops.window_spread(dy, (4, 5), OVERLAPPING), _numbers(2, 2, 2, 3)),
    "window_sum": _each(lambda x: ops.window_sum(x, OVERLAPPING), IMAGE),
}


# ---------------------------------------------------------------- the models
IN_SHAPE = (3, 8, 8)


def small_models() -> dict[str, Layer]:
    """The two architectures in small, not yet built: all their kinds of layer, few channels."""
    return {"small VGG": small_vgg(), "small ResNet": small_resnet()}


def small_vgg() -> Sequential:
    """Convolutions with and without batch norm, ReLU and max-pool; then a classifier with dropout."""
    return Sequential([
        Conv2d(4, 3, padding=1), BatchNorm2d(), ReLU(), Conv2d(4, 3, padding=1), ReLU(), MaxPool2d(2),
        Conv2d(6, 3, padding=1), BatchNorm2d(), ReLU(), AvgPool2d(2), Flatten(), Linear(8), ReLU(), Dropout(0.5), Linear(3)])


def small_resnet() -> Sequential:
    """A stem with an overlapping pool; a block with the identity as shortcut, one with a projection; the mean of each channel."""
    def conv_bn(channels: int, kernel_size: int, stride: int = 1) -> list[Layer]:
        return [Conv2d(channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False), BatchNorm2d()]

    return Sequential([
        *conv_bn(4, 3), ReLU(), MaxPool2d(3, 2, 1),
        Residual([*conv_bn(4, 3), ReLU(), *conv_bn(4, 3)]), ReLU(),
        Residual([*conv_bn(6, 3, 2), ReLU(), *conv_bn(6, 3)], conv_bn(6, 1, 2)), ReLU(),
        GlobalAvgPool2d(), Linear(3)])
