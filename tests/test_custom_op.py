"""Somebody else's operation: written in a few lines, checked to second order, and told in one sentence what is wrong with it."""
import numpy as np
import pytest

import minicnn as mc
from minicnn import ops
from minicnn.testing import GradcheckError, gradcheck, gradgradcheck

X = np.random.default_rng(0).normal(size=(3, 4))
Y = np.random.default_rng(1).normal(size=4)


# ---------------------------------------------------------------- right ones, as a stranger writes them
@mc.op
def swish(x, beta):
    """y = x / (1 + e^(-beta x))"""
    return x / (1.0 + np.exp(-beta * x))


@swish.backward("x")
def swish_dx(dy, x, beta, x_shape):
    s = ops.sigmoid(x * beta)
    return ops.sum_to(dy * (s + beta * x * s * (1.0 - s)), x_shape)


@swish.backward("beta")
def swish_dbeta(dy, x, beta, beta_shape):
    s = ops.sigmoid(x * beta)
    return ops.sum_to(dy * x * x * s * (1.0 - s), beta_shape)


@mc.op(extras=("order",))
def sort(x):
    """In order along the last axis. Where each number came from is an integer: safe to name at any order."""
    order = x.argsort(-1)
    return np.take_along_axis(x, order, -1), order


@sort.backward("x")
def sort_dx(dy, order):
    rows = np.arange(len(order))[:, None]
    return ops.place(dy, (rows, order), order.shape)


@mc.op
def stack(arrays):
    return np.stack(arrays)


@stack.backward("arrays")
def stack_darrays(dy, arrays_shape):
    return ([dy[i] for i in range(len(arrays_shape))],)


@pytest.mark.parametrize(("fn", "inputs"), [
    (swish, [X, Y]), (lambda x: swish(x, 2.0), [X]), (lambda x: sort(x)[0], [X]), (lambda x: sort(x)[0] * sort(x)[0], [X]),
    (lambda a, b: stack([a, b, a]), [X, X + 1]),
], ids=["swish", "swish of a number", "sort", "sort squared", "stack"])
def test_a_strangers_operation_is_right_to_second_order(fn, inputs):
    assert gradcheck(fn, inputs)
    assert gradgradcheck(fn, inputs)


def test_it_takes_part_in_a_graph_like_any_other():
    x = mc.Tensor(X, requires_grad=True)
    loss = ops.sum(swish(x, mc.Tensor(Y)) * 2.0)
    gradient, = mc.grad(loss, x, create_graph=True)
    second, = mc.grad(gradient.sum(), x)
    s = 1 / (1 + np.exp(-Y * X))
    np.testing.assert_allclose(gradient.numpy(), 2 * (s + Y * X * s * (1 - s)), rtol=1e-12)
    np.testing.assert_allclose(second.numpy(), 2 * Y * s * (1 - s) * (2 + Y * X * (1 - 2 * s)), rtol=1e-10)


def test_a_backward_in_plain_numpy_serves_the_first_order_alone():
    cube = mc.op(lambda x: x ** 3)

    @cube.backward("x")
    def cube_dx(dy, x):
        return dy * np.multiply(3.0, np.square(x))
    assert gradcheck(cube, X)
    beside_a_fused_backward = lambda x: ops.normalize(ops.reshape(cube(x), (3, 4, 1, 1)), Y, Y, 0.1)[0]     # noqa: E731
    assert gradcheck(beside_a_fused_backward, X)
    with pytest.raises(TypeError):
        gradgradcheck(cube, X)


# ---------------------------------------------------------------- what is wrong is said in one sentence
def product():
    @mc.op
    def product(a, b):
        return a * b
    return product


def with_backward(function):
    """product, whose backward for a is this."""
    operation = product()
    function.__name__ = "product_da"
    operation.backward("a")(function)
    return lambda a: operation(a, X)


@mc.op(extras=("norm",))
def unit(x):
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / norm, norm


@unit.backward("x")
def unit_dx(dy, y, norm):
    return (dy - y * ops.sum(dy * y, -1, keepdims=True)) / norm


def unknown_name():
    @product().backward("a")
    def product_da(dy, c):
        return dy


def unknown_target():
    @product().backward("c")
    def product_dc(dy, a):
        return dy


COMPLAINTS = {
    "a name nobody knows": (unknown_name, TypeError, ["product_da names ['c']", "unknown to product", "'a', 'a_shape', 'b'"]),
    "a target nobody knows": (unknown_target, TypeError,
                              ["product_dc names ['c']", "unknown to product", "its targets are arguments"]),
    "a wrong shape": (lambda: gradcheck(with_backward(lambda dy, b: (dy * b).sum(0)), X), ValueError,
                      ["product_da gave `a`, of shape (3, 4), a gradient of shape (4,)", "must be equal"]),
    "a wrong dtype": (lambda: gradcheck(with_backward(lambda dy, b: (dy * b).astype(np.float32)), X), TypeError,
                      ["product_da gave `a`, of float64, a gradient of float32", "must be equal"]),
    "too many gradients": (lambda: gradcheck(with_backward(lambda dy, a, b: (dy * b, dy * a)), X), TypeError,
                           ["product_da returned 2 gradients for 1 arguments ['a']", "return one for each"]),
    "no array": (lambda: gradcheck(with_backward(lambda dy: None), X), TypeError,
                 ["product_da gave `a` a gradient of type NoneType", "must return an array of shape (3, 4)"]),
    "no backward": (lambda: gradcheck(product(), [X, X]), TypeError,
                    ["product has no backward for ['a', 'b']", "@product.backward('a')", "t.detach()"]),
    "a saved real number at second order": (lambda: gradgradcheck(lambda x: unit(x)[0], X), TypeError,
                                            ["unit_dx names ['norm']", "its second derivative would be wrong", "fused=True"]),
}


@pytest.mark.parametrize("what", COMPLAINTS)
def test_the_complaint_is_one_sentence_that_names_the_culprit(what):
    call, error, words = COMPLAINTS[what]
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, GradcheckError)


def test_a_saved_real_number_is_right_at_first_order():
    assert gradcheck(lambda x: unit(x)[0], X)


def test_a_fused_backward_may_name_it_and_is_held_to_the_composed_one():
    """The same operation with both kinds of backward passes; with a composed backward that differs, neither order does."""
    def unit_with(factor):
        @mc.op(extras=("norm",))
        def operation(x):
            return unit.forward(x)

        @operation.backward("x")
        def operation_dx(dy, x):
            norm = ops.sqrt(ops.sum(x * x, -1, keepdims=True))
            y = x / norm
            return (dy - y * ops.sum(dy * y, -1, keepdims=True)) / norm * factor
        operation.backward("x", fused=True)(unit_dx)
        return lambda x: operation(x)[0]

    assert gradcheck(unit_with(1.0), X) and gradgradcheck(unit_with(1.0), X)
    with pytest.raises(GradcheckError, match="made of ops differs from the fused one"):
        gradcheck(unit_with(1.1), X)
