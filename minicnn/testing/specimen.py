"""Backward rules, wrong and right, to try a gradient checker on.

`specimens`: wrong ones, which a checker must refuse, and right ones, each tricky in some way, which it must accept.
`second_order_specimens`: every first derivative is right (or consistent), and `is_correct` speaks of the second.
All are made with `mc.op`, as anybody's operations are.

    for s in mc.testing.specimens:
        assert my_checker(s.fn, s.inputs) == s.is_correct, s.name
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.autograd import Op, Tensor, op
from minicnn.kernels import normalization
from minicnn.kernels.windows import Windows

Rule = Callable[..., Any]


class Specimen(NamedTuple):
    """A function of Tensors, and where to check it."""

    name: str
    fn: Callable[..., Any]
    inputs: list[np.ndarray[Any, Any]]
    is_correct: bool


def _wrong(name: str, fn: Callable[..., Any], *inputs: np.ndarray[Any, Any]) -> Specimen:
    return Specimen(f"wrong: {name}", fn, list(inputs), False)


def _right(name: str, fn: Callable[..., Any], *inputs: np.ndarray[Any, Any]) -> Specimen:
    return Specimen(f"right: {name}", fn, list(inputs), True)


def _op(forward: Callable[..., Any], **backwards: Rule) -> Op:
    """An operation from its forward and one backward an argument."""
    operation = op(forward)
    for argument, backward in backwards.items():
        operation.backward(argument)(backward)
    return operation


def _numbers(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random numbers of either sign between 0.3 and 2: nothing at a kink, nothing negligible."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.uniform(0.3, 2.0, shape) * rng.choice([-1.0, 1.0], shape))


def _at(array: Any, index: Any, factor: float) -> Any:
    """A copy with one part multiplied."""
    changed = np.array(array)
    changed[index] *= factor
    return changed


X, Y, ROW, SQUARE = _numbers(3, 4), _numbers(3, 4, seed=1), _numbers(4, seed=2), _numbers(4, 4, seed=3)
IMAGE, FILTERS = _numbers(2, 2, 4, 4), _numbers(2, 2, 3, 3, seed=1)
WEIGHT, BIAS = np.abs(_numbers(2, seed=2)), _numbers(2, seed=3)
TIES = np.array([[1.0, 2.0, 2.0, -1.0], [3.0, 1.5, 0.5, 0.5], [2.0, 2.0, 2.0, 2.5]])
WITH_ZEROS = np.array([[0.0, 1.0, -2.0, 0.0], [0.5, 0.0, -0.5, 3.0]])


# ---------------------------------------------------------------- operations with one rule left open
def _exp(x: Rule) -> Op:
    return _op(lambda x: np.exp(x), x=x)


def _square(x: Rule) -> Op:
    return _op(lambda x: x * x, x=x)


def _double(x: Rule) -> Op:
    return _op(lambda x: 2.0 * x, x=x)


def _mul(a: Rule = lambda dy, b: dy * b, b: Rule = lambda dy, a: dy * a) -> Op:
    return _op(lambda a, b: a * b, a=a, b=b)


def _add_row(row: Rule) -> Op:
    return _op(lambda x, row: x + row, x=lambda dy: dy.copy(), row=row)


def _relu(x: Rule) -> Op:
    return _op(lambda x: np.maximum(x, 0.0), x=x)


def _sigmoid(x: Rule) -> Op:
    return _op(lambda x: 1.0 / (1.0 + np.exp(-x)), x=x)


def _probabilities(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _softmax(x: Rule) -> Op:
    return _op(_probabilities, x=x)


def _linear(x: Rule = lambda dy, weight: dy @ weight, weight: Rule = lambda dy, x: dy.T @ x,
            bias: Rule = lambda dy: dy.sum(0)) -> Op:
    return _op(lambda x, weight, bias: x @ weight.T + bias, x=x, weight=weight, bias=bias)


def _largest_of_row(given: Rule) -> Op:
    """given(x): which elements get the gradient of their row's maximum, and how much of it."""
    return _op(lambda x: x.max(-1), x=lambda dy, x: dy[..., None] * given(x))


def _largest(x: Any) -> Any:
    """Where the largest of each row is; of equals all."""
    return x == x.max(-1, keepdims=True)


def _last_largest(x: Any) -> Any:
    hit = _largest(x)[..., ::-1]
    return (hit & (hit.cumsum(-1) == 1))[..., ::-1]


def _conv_dx(dy: Any, weight: Any) -> Any:
    return ops.conv2d_input_grad(dy, weight, (4, 4), padding=1)


def _conv_dweight(dy: Any, x: Any) -> Any:
    return ops.conv2d_weight_grad(x, dy, (3, 3), padding=1)


def _conv(x: Rule = _conv_dx, weight: Rule = _conv_dweight) -> Op:
    return _op(lambda x, weight: ops.conv2d(x, weight, padding=1), x=x, weight=weight)


def _normalized(x: Any, eps: float = 0.1) -> tuple[Any, Any]:
    """(x - mean) / std and 1 / std of each channel; eps is large, so that forgetting it shows."""
    inv_std = (x.var((0, 2, 3), keepdims=True) + eps) ** -0.5
    return (x - x.mean((0, 2, 3), keepdims=True)) * inv_std, inv_std


def _batch_norm_dx(of_mean: float = 1.0, of_var: float = 1.0) -> Rule:
    """Batch norm's backward for x; a factor of 0 forgets what comes through the mean, or through the variance."""
    def dx(dy: Any, x: Any, weight: Any) -> Any:
        x_hat, inv_std = _normalized(x)
        through_mean, through_var = dy.mean((0, 2, 3), keepdims=True), x_hat * (dy * x_hat).mean((0, 2, 3), keepdims=True)
        return weight.reshape(-1, 1, 1) * inv_std * (dy - of_mean * through_mean - of_var * through_var)
    return dx


def _scale_and_shift(x: Any, weight: Any, bias: Any) -> Any:
    return _normalized(x)[0] * weight.reshape(-1, 1, 1) + bias.reshape(-1, 1, 1)


def _batch_norm(x: Rule = _batch_norm_dx(), weight: Rule = lambda dy, x: (dy * _normalized(x)[0]).sum((0, 2, 3)),
                bias: Rule = lambda dy: dy.sum((0, 2, 3))) -> Op:
    return _op(_scale_and_shift, x=x, weight=weight, bias=bias)


def _cross_entropy(dlogits: Callable[[Any, Any], Any]) -> Op:
    """Mean cross-entropy of (N, classes) with labels 0, 1, 2, ...; dlogits(probabilities, one-hot)."""
    def loss(z: Any) -> Any:
        return -np.log(np.diagonal(_probabilities(z))).mean()
    return _op(loss, z=lambda dy, z: dy * dlogits(_probabilities(z), np.eye(*z.shape)))


# ---------------------------------------------------------------- operations that keep what they should not
def _remembers_first() -> Op:
    """The cache is filled once and never again."""
    first: dict[str, Any] = {}

    def square(x: Any) -> Any:
        first.setdefault("x", x.copy())
        return x * x
    return _op(square, x=lambda dy: 2.0 * dy * first["x"])


def _remembers_latest() -> Op:
    """The way of a layer with `self.x`: right until the layer is used twice before the backward pass."""
    latest: dict[str, Any] = {}

    def square(x: Any) -> Any:
        latest["x"] = x.copy()
        return x * x
    return _op(square, x=lambda dy: 2.0 * dy * latest["x"])


def _adds_up() -> Op:
    """A buffer that is added to, and never set to zero."""
    total: dict[tuple[int, ...], Any] = {}

    def triple_dx(dy: Any) -> Any:
        total[dy.shape] = total.get(dy.shape, 0.0) + 3.0 * dy
        return total[dy.shape].copy()
    return _op(lambda x: 3.0 * x, x=triple_dx)


def _draws_again() -> Op:
    """Dropout whose backward draws a mask of its own."""
    rng = np.random.default_rng(0)
    return _op(lambda x: x * (np.random.default_rng(1).random(x.shape) < 0.5), x=lambda dy: dy * (rng.random(dy.shape) < 0.5))


def _writes_into_dy() -> Op:
    def relu_dx(dy: Any, x: Any) -> Any:
        dy *= x > 0
        return dy
    return _relu(relu_dx)


def _writes_into_x() -> Op:
    def relu(x: Any) -> Any:
        x *= x > 0
        return x.copy()
    return _op(relu, x=lambda dy, y: dy * (y > 0))


def _fused_forgets_when_alone() -> Op:
    """A joint backward that prepares what x needs only when weight is asked for as well."""
    product = _op(lambda x, weight: x * weight)

    @product.backward("x", "weight")
    def product_backward(dy: Any, x: Any, weight: Any, wanted: Any) -> Any:
        return (dy * weight if "weight" in wanted else dy), dy * x
    return product


def _fused_unlike_composed() -> Op:
    """The fast backward is right; the one made of ops, which only create_graph uses, is not."""
    square = _square(lambda dy, x: dy * x)
    square.backward("x", fused=True)(lambda dy, x: 2.0 * dy * x)
    return square


def _fused_with_wrong_count() -> Callable[..., Any]:
    """Batch normalisation's fused backward, fed the unbiased variance where the forward used the biased one."""
    @op(extras=("mean", "var"))
    def operation(x: Any, weight: Any, bias: Any) -> Any:
        return normalization.normalize(x, weight, bias, 0.1)

    @operation.backward("x", "weight", "bias", fused=True)
    def fused_backward(dy: Any, x: Any, weight: Any, mean: Any, var: Any) -> Any:
        m = x.size // x.shape[1]
        return normalization.normalize_grad(dy, x, weight, mean, var * m / (m - 1), 0.1, True)
    return lambda x, weight, bias: operation(x, weight, bias)[0]


def _pool_into_padding(padding: int = 1) -> Op:
    """A padded average pool whose backward cuts the padding off at the far side only."""
    windows = Windows.of(3, 2)

    def pool(x: Any) -> Any:
        around = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        return ops.window_sum(np.pad(x, around), windows) / 9.0

    def pool_dx(dy: Any, x_shape: Any) -> Any:
        h, w = x_shape[2:]
        return ops.window_spread(dy, (h + 2 * padding, w + 2 * padding), windows)[:, :, :h, :w] / 9.0
    return _op(pool, x=pool_dx)


def _max_pool(given: Rule) -> Op:
    """2 x 2 windows side by side; given(windows): which of the four pixels get the gradient."""
    def windows(x: Any) -> Any:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)

    def pool_dx(dy: Any, x: Any) -> Any:
        n, c, h, w = x.shape
        pixels = (given(windows(x)) * dy[..., None]).reshape(n, c, h // 2, w // 2, 2, 2)
        return pixels.transpose(0, 1, 2, 4, 3, 5).reshape(x.shape)
    return _op(lambda x: windows(x).max(-1), x=pool_dx)


# ---------------------------------------------------------------- wrong
_WRONG = (
    # Arithmetic.
    _wrong("sign", _exp(lambda dy, y: -dy * y), X),
    _wrong("factor", _square(lambda dy, x: dy * x), X),
    _wrong("one part in a thousand", _mul(b=lambda dy, a: dy * a * 1.001), X, Y),
    _wrong("one part in a thousand of one element", _double(lambda dy: _at(2.0 * dy, (0, 0), 1.001)), X),
    _wrong("last corner", _double(lambda dy: _at(2.0 * dy, (-1, -1), 0.0)), X),
    _wrong("exponent not lowered", _op(lambda x: x ** 3, x=lambda dy, x: dy * 3.0 * x ** 3), X),
    _wrong("swapped inputs", _mul(lambda dy, a: dy * a, lambda dy, b: dy * b), X, Y),
    _wrong("only the first argument right", _op(lambda a, b: a / b, a=lambda dy, b: dy / b, b=lambda dy, a, b: dy * a / b ** 2),
           X, Y),
    _wrong("zero gradient", _sigmoid(lambda dy: np.zeros_like(dy)), X),
    _wrong("zero gradient behind rounding", _op(lambda x: (x + 1e10) - 1e10, x=lambda dy: np.zeros_like(dy)), X),
    _wrong("gradient handed through", _op(lambda x: np.tanh(x), x=lambda dy: dy.copy()), X),
    _wrong("used twice, counted once", lambda x, product=_mul(b=lambda dy: 0.0 * dy): product(x, x), X),
    _wrong("one factor cut off the tape", lambda x: ops.mul(x, Tensor(x.data)), X),
    _wrong("all cut off the tape", lambda x: Tensor(x.data * 2.0), X),
    _wrong("tiny outputs", _op(lambda x: 1e-9 * x * x, x=lambda dy, x: 1e-9 * dy * x), X),
    _wrong("huge outputs", _op(lambda x: 1e9 * x * x, x=lambda dy, x: 1.001e9 * 2.0 * dy * x), X),
    _wrong("behind a large constant", _op(lambda x: 1e3 + 1e-6 * x * x, x=lambda dy, x: 1e-6 * dy * x), X),
    _wrong("tiny inputs", _op(lambda x: np.log(x), x=lambda dy, x: 1.01 * dy / x), np.abs(X) * 1e-6),
    _wrong("right at ones only", _op(lambda x: x ** 3, x=lambda dy, x: 3.0 * dy * x), np.ones((3, 4))),
    # Broadcasting, moving, adding up.
    _wrong("broadcast axis not summed", _add_row(lambda dy: dy[0].copy()), X, ROW),
    _wrong("broadcast axis averaged", _add_row(lambda dy: dy.mean(0)), X, ROW),
    _wrong("another axis summed", _add_row(lambda dy: dy.sum(1)), SQUARE, ROW),
    _wrong("permutation not undone", _op(lambda x: x.transpose(1, 2, 0).copy(), x=lambda dy: dy.transpose(1, 2, 0)),
           _numbers(3, 3, 3)),
    _wrong("parts swapped", _op(lambda a, b: np.concatenate([a, b]), a=lambda dy: dy[3:].copy(), b=lambda dy: dy[:3].copy()),
           X, Y),
    _wrong("reshaped in another order", _op(lambda x: x.reshape(4, 3).copy(), x=lambda dy: dy.reshape(3, 4, order="F")), X),
    _wrong("taken twice, counted once", _op(lambda x: x[[0, 2, 0]], x=lambda dy: np.stack([dy[2], 0.0 * dy[0], dy[1]])), X),
    _wrong("missing 1 / N", _op(lambda x: x.mean(0), x=lambda dy, x: np.broadcast_to(dy, x.shape).copy()), X),
    _wrong("right for equal output gradients", _double(lambda dy: np.full_like(dy, 2.0 * dy.mean())), X),
    _wrong("running sum not turned round", _op(lambda x: x.cumsum(1), x=lambda dy: dy.cumsum(1)), X),
    # Matrices.
    _wrong("transposed weight", _linear(x=lambda dy, weight: dy @ weight.T), X, SQUARE, ROW),
    _wrong("transposed weight gradient", _linear(weight=lambda dy, x: x.T @ dy), SQUARE, SQUARE + 0.5, ROW),
    _wrong("error only in the bias", _linear(bias=lambda dy: dy.mean(0)), X, SQUARE, ROW),
    _wrong("first matrix of the batch only", _op(lambda a, b: a @ b, a=lambda dy, b: dy @ b.T, b=lambda dy, a: a[0].T @ dy[0]),
           _numbers(2, 3, 4), SQUARE),
    # Convolution and pooling.
    _wrong("off by one pixel", _conv(x=lambda dy, weight: np.roll(_conv_dx(dy, weight), 1, 3)), IMAGE, FILTERS),
    _wrong("filters turned round", _conv(x=lambda dy, weight: _conv_dx(dy, weight[..., ::-1, ::-1])), IMAGE, FILTERS),
    _wrong("rows and columns of a filter swapped", _conv(x=lambda dy, weight: _conv_dx(dy, weight.transpose(0, 1, 3, 2))),
           IMAGE, FILTERS),
    _wrong("last column of windows forgotten", _conv(weight=lambda dy, x: _conv_dweight(_at(dy, np.s_[..., -1], 0.0), x)),
           IMAGE, FILTERS),
    _wrong("one channel", _conv(x=lambda dy, weight: _at(_conv_dx(dy, weight), np.s_[:, 1], 1.01)), IMAGE, FILTERS),
    _wrong("bias of the first image only", _op(lambda x, bias: x + bias.reshape(-1, 1, 1), x=lambda dy: dy.copy(),
                                               bias=lambda dy: dy[0].sum((1, 2))), IMAGE, BIAS),
    _wrong("padding cut off at the wrong side", _pool_into_padding(), IMAGE),
    _wrong("pool gives to the first pixel", _max_pool(lambda windows: np.arange(4) == 0), _numbers(1, 2, 4, 4)),
    _wrong("pool gives a tie to all", _max_pool(_largest), np.round(_numbers(1, 2, 4, 4))),
    _wrong("tie given to all", _largest_of_row(_largest), TIES),
    _wrong("tie given to none", _largest_of_row(lambda x: _largest(x) & (_largest(x).sum(-1, keepdims=True) == 1)), TIES),
    _wrong("tie of two inputs given to both", _op(lambda a, b: np.maximum(a, b), a=lambda dy, a, b: dy * (a >= b),
                                                  b=lambda dy, a, b: dy * (b >= a)),
           np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])),
    _wrong("least instead of largest", _largest_of_row(lambda x: _largest(-x)), X),
    # Activations.
    _wrong("relu lets everything through", _relu(lambda dy: dy.copy()), X),
    _wrong("relu asks the output gradient", _relu(lambda dy, x: dy * (x > 0) * (dy > 0)), X),
    _wrong("relu's threshold off zero", _relu(lambda dy, x: dy * (x > 0.4)), X),
    _wrong("outside the slopes of a kink", _op(lambda x: np.abs(x), x=lambda dy, x: dy * (np.sign(x) + 2.0 * (x == 0))),
           WITH_ZEROS),
    _wrong("of the input instead of the output", _sigmoid(lambda dy, x: dy * x * (1.0 - x)), X),
    _wrong("softmax as if elementwise", _softmax(lambda dy, y: dy * y * (1.0 - y)), X),
    _wrong("log-softmax's sum taken for 1", _op(lambda x: np.log(_probabilities(x)), x=lambda dy, y: dy - np.exp(y)), X),
    _wrong("dropout not scaled", _op(lambda x: x * np.eye(3, 4) / 0.25, x=lambda dy: dy * np.eye(3, 4)), X),
    _wrong("dropout draws again", _draws_again(), X),
    _wrong("output gradient clipped", _double(lambda dy: 2.0 * np.clip(dy, -1.0, 1.0)), X),
    # Batch normalisation and loss.
    _wrong("batch norm without its mean terms", _batch_norm(_batch_norm_dx(0.0, 0.0)), IMAGE, WEIGHT, BIAS),
    _wrong("batch norm with a constant mean", _batch_norm(_batch_norm_dx(0.0, 1.0)), IMAGE + 1.0, WEIGHT, BIAS),
    _wrong("batch norm with a constant variance", _batch_norm(_batch_norm_dx(1.0, 0.0)), IMAGE, WEIGHT, BIAS),
    _wrong("batch norm over N - 1", _fused_with_wrong_count(), IMAGE, WEIGHT, BIAS),
    _wrong("batch norm's weight sees the input", _batch_norm(weight=lambda dy, x: (dy * x).sum((0, 2, 3))), IMAGE, WEIGHT, BIAS),
    _wrong("batch norm's eps forgotten", _batch_norm(weight=lambda dy, x: (dy * _normalized(x, 0.0)[0]).sum((0, 2, 3))),
           IMAGE, WEIGHT, BIAS),
    _wrong("batch norm by running statistics", _batch_norm(x=lambda dy, weight: dy * weight.reshape(-1, 1, 1) / np.sqrt(1.1)),
           IMAGE, WEIGHT, BIAS),
    _wrong("batch norm, one channel's bias", _batch_norm(bias=lambda dy: _at(dy.sum((0, 2, 3)), 1, 1.01)), IMAGE, WEIGHT, BIAS),
    _wrong("loss not divided by the batch", _cross_entropy(lambda p, hot: p - hot), X),
    _wrong("loss divided by the classes", _cross_entropy(lambda p, hot: (p - hot) / p.shape[1]), X),
    _wrong("loss without its softmax", _cross_entropy(lambda p, hot: -hot / len(p)), X),
    # What depends on more than the inputs and the output gradient.
    _wrong("keeps the first input", _remembers_first(), X),
    _wrong("keeps the latest input", _remembers_latest(), X),
    _wrong("adds to a buffer", _adds_up(), X),
    _wrong("writes into the output gradient", _writes_into_dy(), X),
    _wrong("writes into its input", _writes_into_x(), X.copy()),         # its own copy: the others share X
    _wrong("right in company only", _fused_forgets_when_alone(), X, Y),
    _wrong("fused unlike composed", _fused_unlike_composed(), X),
    _wrong("reads memory as it lies", _double(lambda dy: 2.0 * dy.ravel(order="K").reshape(dy.shape)), X),
)


# ---------------------------------------------------------------- right, but tricky
def _train_batch_norm(x: Any, weight: Any, bias: Any) -> Any:
    return ops.batch_norm(x, weight, bias, np.zeros(2), np.ones(2), train=True)


def _bias_before_batch_norm(x: Any, bias: Any) -> Any:
    """Batch normalisation takes any bias out again: a gradient of 0, up to rounding."""
    return _train_batch_norm(x + ops.reshape(bias, (-1, 1, 1)), WEIGHT, BIAS)


_RIGHT = (
    _right("relu at zeros", ops.relu, WITH_ZEROS),
    _right("relu almost at zero", ops.relu, np.array([3e-7, -3e-7, 1e-9, -1e-5, 1.0])),
    _right("leaky relu at zeros", _op(lambda x: np.where(x > 0, x, 0.1 * x), x=lambda dy, x: dy * np.where(x > 0, 1.0, 0.1)),
           WITH_ZEROS),
    _right("absolute value at zeros", _op(lambda x: np.abs(x), x=lambda dy, x: dy * np.sign(x)), WITH_ZEROS),
    _right("a step up, at the step", _op(lambda x: x + (x > 1.0), x=lambda dy: dy.copy()), np.array([1.0, 2.0, 0.5])),
    _right("equal candidates of a maximum", lambda x: ops.max(x, 1), TIES),
    _right("equal candidates, the last wins", _largest_of_row(_last_largest), TIES),
    _right("equal candidates share", _largest_of_row(lambda x: _largest(x) / _largest(x).sum(-1, keepdims=True)), TIES),
    _right("equal candidates of a minimum", lambda x: ops.min(x, 1), -TIES),
    _right("equal inputs of maximum", ops.maximum, TIES, np.ones((3, 4))),
    _right("candidates almost equal", lambda x: ops.max(x), np.array([1.0, 1.0 + 1e-5, 1.0 + 2e-5])),
    _right("equal pixels under overlapping windows", lambda x: ops.max_pool2d(x, 3, 1, 1), np.round(_numbers(1, 1, 4, 4))),
    _right("zeros under overlapping windows", lambda x: ops.max_pool2d(ops.relu(x), 3, 2, 1), _numbers(1, 2, 5, 5) - 1.0),
    _right("large numbers", lambda x: x * x, 1e6 * X),
    _right("large numbers through a division", ops.div, 1e6 * X, 1e6 * Y),
    _right("tiny numbers", lambda x: x * x * x, 1e-6 * X),
    _right("tiny numbers added to 1", lambda x: x + 1.0, 1e-6 * X),
    _right("tiny and large side by side", ops.log, np.array([1e-6, 1.0, 1e6])),
    _right("tiny and large side by side, squared", lambda x: x * x, np.array([1e-6, -1.0, 1e6, 0.0])),
    _right("tiny outputs", lambda x: x * x * 1e-9, X),
    _right("flat at zero", lambda x: x ** 3, np.zeros((2, 3))),
    _right("small part of a large output", lambda x: x * x * 1e-6 + 1e3, X),
    _right("rounding swallowed by a detour", lambda x: (x + 1e6) - 1e6, X),
    _right("batch norm of small differences", _train_batch_norm, IMAGE * 1e-3 + 10.0, WEIGHT, BIAS),
    _right("saturated", ops.sigmoid, np.array([40.0, -40.0, 800.0, 0.0])),
    _right("exponentials that nearly overflow", ops.log_softmax, np.array([[700.0, -700.0, 1.0], [1e3, 1e3, -1e3]])),
    _right("close to the end of the domain", ops.log, np.array([1e-8, 2.0, 0.5])),
    _right("steep", ops.sqrt, np.array([1e-10, 1.0, 4.0])),
    _right("broadcast both ways", ops.mul, _numbers(3, 1), _numbers(1, 4)),
    _right("broadcast of a scalar", ops.div, X, np.array(2.0)),
    _right("one input twice", lambda x: x * x + ops.relu(x), X),
    _right("one array for two inputs", ops.add, X, Y),
    _right("output is the input", lambda x: x, X),
    _right("output is a view", lambda x: ops.transpose(x), X),
    _right("a scalar", ops.exp, np.array(0.7)),
    _right("no elements", ops.exp, np.zeros((0, 3))),
    _right("one element", lambda x: ops.sum(x * x), np.array([0.5])),
    _right("constant", lambda x: x * 0.0 + 2.0, X),
    _right("constant, off the tape", lambda x: Tensor(np.ones(3)), X),
    _right("constant in all but name", lambda x: ops.sum(ops.softmax(x), 1), X),
    _right("an input without influence", lambda x, unused: x * 2.0, X, Y),
    _right("a gradient that cancels", _bias_before_batch_norm, IMAGE, BIAS),
    _right("dropout with a fixed mask", lambda x: ops.dropout(x, 0.5, train=True, rng=np.random.default_rng(0)), X),
    _right("integers among the inputs", ops.cross_entropy, X, np.array([0, 3, 1])),
    _right("several outputs", lambda x, y: (x * y, ops.sum(x), ops.exp(y)), X, Y),
    _right("not in C order", ops.matmul, np.asfortranarray(X), SQUARE[::-1, ::2]),
)

specimens: tuple[Specimen, ...] = (*_WRONG, *_RIGHT)


# ---------------------------------------------------------------- the second derivative
def _still(x: Any) -> Any:
    """x as a constant, where it is a Tensor of the graph."""
    return x.detach() if isinstance(x, Tensor) else x


def _of_constant_statistics() -> Op:
    """Batch norm whose backward takes the mean and the deviation of x for constants."""
    operation = _op(_scale_and_shift)

    @operation.backward("x", "weight", "bias")
    def operation_backward(dy: Any, x: Any, weight: Any) -> Any:
        over = (0, 2, 3)
        mean, inv_std = ops.mean(_still(x), over, True), (ops.var(_still(x), over, 0, True) + 0.1) ** -0.5
        x_hat = (x - mean) * inv_std
        centred_dy = dy - ops.mean(dy, over, True) - x_hat * ops.mean(dy * x_hat, over, True)
        return ops.reshape(weight, (-1, 1, 1)) * inv_std * centred_dy, ops.sum(dy * x_hat, over), ops.sum(dy, over)
    return operation


second_order_specimens: tuple[Specimen, ...] = (
    _wrong("output held still", _exp(lambda dy, y: dy * _still(y)), X),
    _wrong("input held still", _op(lambda x: x ** 3, x=lambda dy, x: dy * (3.0 * _still(x) ** 2)), X),
    _wrong("input taken for a number", _square(lambda dy, x: dy * 2.0 * (x.numpy() if isinstance(x, Tensor) else x)), X),
    _wrong("one of two factors held still", _sigmoid(lambda dy, y: dy * y * (1.0 - _still(y))), X),
    _wrong("output gradient held still", _mul(a=lambda dy, b: _still(dy) * b), X, Y),
    _wrong("the other input held still", _mul(b=lambda dy, a: dy * _still(a)), X, Y),
    _wrong("softmax's sum held still", _softmax(lambda dy, y: y * (dy - _still(ops.sum(dy * y, -1, True)))), X),
    _wrong("batch norm's statistics held still", _of_constant_statistics(), IMAGE, WEIGHT, BIAS),
    _wrong("filters held still", _conv(x=lambda dy, weight: _conv_dx(dy, _still(weight))), IMAGE, FILTERS),
    _right("powers", lambda x: x ** 3, X),
    _right("no second derivative", lambda x: ops.sum(x, 0), X),
    _right("relu at zeros", ops.relu, WITH_ZEROS),
    _right("equal candidates of a maximum", lambda x: ops.max(x, 1), TIES),
    _right("equal pixels under overlapping windows", lambda x: ops.max_pool2d(x, 3, 1, 1), np.round(_numbers(1, 1, 4, 4))),
    _right("convolution", _conv(), IMAGE, FILTERS),
    _right("batch norm", _train_batch_norm, IMAGE, WEIGHT, BIAS),
    _right("cross-entropy", ops.cross_entropy, X, np.array([0, 3, 1])),
    _right("a first derivative that is another's", _fused_unlike_composed(), X),        # gradcheck's business
)
