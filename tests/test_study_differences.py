"""A step's gradient against differences: right ones, wrong ones, kinks; and that the part of a step stands for the whole."""
import numpy as np
import pytest

import minicnn as mc
from minicnn.study.differences import SAMPLES, check

RNG = np.random.default_rng(5)


def recorded(run, *arrays):
    """The tape of <run(arrays), random>, of float64 arrays that all want a gradient."""
    with mc.study.record() as tape:
        y = run(*(mc.Tensor(a, requires_grad=True) for a in arrays))
        y.backward(np.random.default_rng(1).normal(size=y.shape))
    return tape


def normal(*shape):
    return RNG.normal(size=shape)


def checked(step, argument, count=SAMPLES, **options):
    return check(step, argument, np.random.default_rng(0), count, **options)


WHOLE = {
    "plain": lambda x, w, b: mc.ops.conv2d(x, w, b, padding=1),
    "stride": lambda x, w, b: mc.ops.conv2d(x, w, b, stride=2),
    "stride over padding": lambda x, w, b: mc.ops.conv2d(x, w, b, stride=(3, 2), padding=(2, 1)),
    "dilation": lambda x, w, b: mc.ops.conv2d(x, w, b, dilation=2, padding=2),
    "all of it": lambda x, w, b: mc.ops.conv2d(x, w, b, stride=2, padding=(1, 2), dilation=(2, 1)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_part_of_a_convolution_that_a_number_moves_is_enough(name):
    """Every number of every gradient: the backward on the part is what the whole backward gave, and differences agree."""
    step, = recorded(WHOLE[name], normal(2, 2, 6, 5), normal(2, 2, 3, 3), normal(2)).steps
    for argument in ("x", "weight", "bias"):
        samples = checked(step, argument, 10**6)
        assert len(samples) == step.input_grads[argument].size
        for s in samples:
            assert s.right and s.backward == pytest.approx(s.recorded, rel=1e-9, abs=1e-12) and s.error < 1e-4


@pytest.mark.parametrize("groups", [2, 4])
def test_a_group_sees_its_channels_alone(groups):
    x, weight = normal(1, 4, 4, 4), normal(4, 4 // groups, 3, 3)
    step, = recorded(lambda x, w: mc.ops.conv2d(x, w, padding=1, groups=groups), x, weight).steps
    for argument in ("x", "weight"):
        assert all(s.right and s.backward == pytest.approx(s.recorded, rel=1e-9, abs=1e-12) for s in checked(step, argument, 10**6))


CALLS = {
    "linear": (lambda x, w, b: mc.ops.linear(x, w, b), [(3, 5), (4, 5), (4,)]),
    "normalize": (lambda x, w, b: mc.ops.normalize(x, w, b, 1e-5)[0], [(3, 2, 4, 4), (2,), (2,)]),
    "affine": (lambda x, w, b: mc.ops.affine(x, w, b), [(2, 3, 4, 4), (3,), (3,)]),
    "pool": (lambda x: mc.ops.max_pool2d(x, 3, 2, 1), [(2, 3, 7, 7)]),
    "average": (lambda x: mc.ops.avg_pool2d(x, 2), [(2, 3, 6, 6)]),
    "relu": (lambda x: mc.ops.relu(x), [(4, 9)]),
    "broadcast": (lambda a, b: a * b, [(3, 4), (4,)]),
    "list": (lambda a, b: mc.ops.concatenate([a, b], axis=1), [(2, 3), (2, 2)]),
    "loss": (lambda z: mc.ops.cross_entropy(z, np.array([0, 2, 1])), [(3, 4)]),
    "scalar": (lambda x: x.sum(), [(2, 2)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_right_gradients_agree(name):
    run, shapes = CALLS[name]
    for step in recorded(run, *(normal(*shape) for shape in shapes)):
        assert step.input_grads
        for argument, gradient in step.input_grads.items():
            samples = checked(step, argument)
            assert len({s.at for s in samples}) == len(samples) == min(SAMPLES, gradient.size)
            assert all(s.recorded == gradient[s.at] for s in samples)
            assert all(s.right and s.kink is None and s.backward == pytest.approx(s.recorded, rel=1e-9, abs=1e-12)
                       and abs(s.numeric - s.recorded) <= 1e-6 * max(1, abs(s.recorded)) for s in samples)


def test_the_largest_number_is_among_those_drawn_and_those_that_are_shown():
    gradient = normal(2, 8, 30, 30)
    step, = recorded(lambda x: x * gradient, normal(2, 8, 30, 30)).steps
    samples = checked(step, "a", among=lambda at: at[0] == 0 and at[1] == 3)
    largest = tuple(map(int, np.unravel_index(np.abs(step.input_grads["a"]).argmax(), gradient.shape)))
    assert len(samples) == SAMPLES and largest in {s.at for s in samples}
    assert sum(s.at[:2] == (0, 3) for s in samples) >= 10
    assert len({s.at[:2] for s in samples}) > 5


def test_a_wrong_backward_is_seen_where_it_is_wrong():
    @mc.op
    def cube(x):
        return x * x * x

    @cube.backward("x")
    def cube_dx(dy, x):
        wrong = np.ones_like(x)
        wrong[1] = 1.1
        return dy * x * x * 3.0 * wrong

    step, = recorded(lambda x: cube(x), np.array([0.5, -1.2, 2.0, 0.1])).steps
    samples = checked(step, "x")
    assert [s.right for s in samples] == [True, False, True, True]
    assert samples[1].error == pytest.approx(0.1 / 1.1, rel=1e-4) and samples[1].numeric == pytest.approx(samples[1].recorded / 1.1)


def test_a_kink_says_so_and_holds_the_gradient_between_its_slopes():
    step, = recorded(lambda x: mc.ops.relu(x), np.array([0.0, 1.0, -1.0])).steps
    zero, one, minus = checked(step, "x")
    g = float(step.grad[0])
    assert zero.right and zero.kink == pytest.approx((0.0, g)) and zero.recorded == 0.0
    assert one.kink is None and minus.kink is None and one.right and minus.right

    tie = np.zeros((1, 1, 2, 2))
    step, = recorded(lambda x: mc.ops.max_pool2d(x, 2), tie).steps
    assert all(s.right and s.kink is not None for s in checked(step, "x"))

    @mc.op
    def steep(x):
        return np.maximum(x, 0)

    @steep.backward("x")
    def steep_dx(dy, x):
        return dy * np.where(x == 0, 3.0, x > 0)

    step, = recorded(lambda x: steep(x), np.array([0.0, 1.0])).steps
    at_kink, beside = checked(step, "x")
    assert not at_kink.right and at_kink.kink is not None and beside.right


@pytest.mark.parametrize("apart", [3e-8, 5e-9, 3e-10])
def test_a_kink_close_by_is_told_from_a_wrong_gradient(apart):
    """Two candidates of a maximum that are nearly equal: the usual steps lead from the one to the other."""
    x = np.array([[[[0.5, 0.5 - apart], [-1.0, 2.0]], [[1.0, 1.0 - apart], [-3.0, 0.0]]]]) - 1.0
    step, = recorded(lambda x: mc.ops.max_pool2d(x, (1, 2)), x).steps
    assert all(s.right for s in checked(step, "x"))
    step.operation = mc.op(lambda x, windows: mc.ops.max_of_windows.forward(x, windows))
    step.operation.backward("x")(lambda dy, x, y, windows: 0.7 * mc.ops.max_of_windows.composed[0].function(dy, x, y, windows))
    assert not any(s.right and s.kink is None for s in checked(step, "x") if s.recorded)


@pytest.mark.parametrize("apart", [1e-10, 3e-9, 5e-9, 2e-8, 1e-7])
def test_on_one_kink_and_near_another(apart):
    """A pixel that is equal to one neighbour, and nearly equal to another: no step shows one corner alone."""
    x = np.array([[[[0.5, -9.0, -9.0], [-9.0, 0.5, -9.0], [-9.0, -9.0, 0.5 - apart]]]])
    step, = recorded(lambda x: mc.ops.max_pool2d(x, 2, 1), x).steps
    middle = next(s for s in checked(step, "x") if s.at == (0, 0, 1, 1))
    assert middle.right and middle.kink is not None
    step.operation = mc.op(lambda x, windows: mc.ops.max_of_windows.forward(x, windows))
    step.operation.backward("x")(lambda dy, x, y, windows: 3.0 * mc.ops.max_of_windows.composed[0].function(dy, x, y, windows))
    assert not next(s for s in checked(step, "x") if s.at == (0, 0, 1, 1)).right


def test_float32_is_compared_with_float64():
    x, w = normal(1, 2, 5, 5).astype(np.float32), normal(3, 2, 3, 3).astype(np.float32)
    with mc.study.record() as tape:
        y = mc.ops.conv2d(mc.Tensor(x, requires_grad=True), mc.Tensor(w, requires_grad=True))
        y.backward(np.ones(y.shape, np.float32))
    samples = checked(tape.steps[0], "weight")
    assert all(s.right and s.error < 1e-7 for s in samples)
    assert any(s.recorded != s.backward for s in samples)               # the rounding of float32 is there to be seen
    assert all(s.recorded == pytest.approx(s.backward, rel=1e-4, abs=1e-5) for s in samples)
