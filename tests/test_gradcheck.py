"""gradcheck, gradgradcheck, check_layer and the table of all operations: what they accept, what they refuse, what they say.

`test_specimens.py` holds them to a large set of wrong rules; here each promise is broken on purpose, one at a time.
"""
import copy

import numpy as np
import pytest
import standin

import minicnn as mc
from minicnn import layers, ops
from minicnn.autograd import Op
from minicnn.testing import GradcheckError, check_layer, checking, gradcheck, gradgradcheck, table
from minicnn.testing.function import Function

X = np.random.default_rng(0).normal(size=(3, 4))
IMAGE = np.random.default_rng(1).normal(size=(2, 3, 4, 4))
FILTERS = np.random.default_rng(2).normal(size=(2, 3, 3, 3))


def times(factor, forward=lambda x: 2.0 * x):
    """2 x, with a backward that says `factor` dy (a number, or an array of x's shape)."""
    double = mc.op(forward)
    double.backward("x")(lambda dy: dy * factor)
    return double


def refusal(fn, inputs, **options):
    """What gradcheck says against it."""
    with pytest.raises(GradcheckError) as caught:
        gradcheck(fn, inputs, **options)
    return caught.value


def conv(x, weight):
    return ops.conv2d(x, weight, padding=1)


# ---------------------------------------------------------------- what goes in
@pytest.mark.parametrize("inputs", [X, [X], (X,), mc.Tensor(X), [mc.Tensor(X, requires_grad=True)], X[:, ::2],
                                    np.asfortranarray(X), X[0, 0:1]])
def test_one_input_or_a_list_of_arrays_or_tensors(inputs):
    assert gradcheck(ops.tanh, inputs) is True
    assert gradgradcheck(ops.tanh, inputs) is True


def test_every_floating_input_is_checked_whether_or_not_it_asks_for_a_gradient():
    second_wrong = mc.op(lambda a, b: a * b)
    second_wrong.backward("a")(lambda dy, b: dy * b)
    second_wrong.backward("b")(lambda dy, a: dy * (a + 1.0))
    error = refusal(second_wrong, [mc.Tensor(X, requires_grad=True), mc.Tensor(X + 1)])
    assert error.input == "input 1"


def test_integers_are_handed_on_as_they_came():
    seen = []

    def pick(x, rows, labels):
        seen.append((type(rows), type(labels)))
        return ops.getitem(x, rows) * 2.0
    assert gradcheck(pick, [X, np.array([0, 2]), mc.Tensor(np.array([1, 2]))])
    assert set(seen) == {(np.ndarray, mc.Tensor)}


def test_the_callers_inputs_and_gradients_stay_as_they_are():
    t = mc.Tensor(X.copy(), requires_grad=True)
    assert gradcheck(lambda a, b: a * b, [t, X]) and gradgradcheck(lambda a, b: a * b, [t, X])
    assert t.grad is None and np.array_equal(t.data, X)


@pytest.mark.parametrize(("inputs", "error", "words"), [
    (X.astype(np.float32), TypeError, ["input 0", "float32", "astype('float64')"]),
    ([X, 2.0], TypeError, ["input 1", "float", "lambda"]),
    ([np.arange(3)], ValueError, ["floating"]),
])
def test_inputs_that_cannot_be_checked(inputs, error, words):
    for check in (gradcheck, gradgradcheck):
        with pytest.raises(error) as caught:
            check(ops.relu, inputs)
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("fn", [lambda x: x.numpy(), lambda x: (x * 2.0, x.numpy()), lambda x: (),
                                lambda x: mc.Tensor(np.arange(3)), ops.max_of_last])
def test_an_output_that_carries_no_gradient_is_an_error_not_a_pass(fn):
    with pytest.raises(TypeError, match="must return a"):
        gradcheck(fn, X)


def test_on_every_device(device):
    """Arrays of any library: the function is evaluated where they lie, and a wrong rule is refused there as well."""
    x, weight = device.put(IMAGE), device.put(FILTERS)
    assert gradcheck(conv, [x, weight]) and gradgradcheck(conv, [x, weight])
    assert gradcheck(lambda x: ops.max_pool2d(ops.relu(x), 2), device.put(np.round(IMAGE[:1, :1])))
    assert not gradcheck(times(2.001), [x], raise_exception=False)
    seen = []
    gradcheck(lambda x: (seen.append(type(x.data)), x * 2.0)[1], [x])
    assert set(seen) == {type(x)}


def test_from_one_device_to_another():
    assert gradcheck(lambda x: x.to("standin") * standin.asarray(X), X)
    assert gradgradcheck(lambda x: ops.exp(x.to("standin")).to("cpu"), X)


# ---------------------------------------------------------------- what is said
def test_the_report_names_input_index_both_values_step_and_seed():
    factor = np.full((3, 4), 2.0)
    factor[1, 2] = 2.5
    wrong = times(factor)
    error = refusal(lambda x, y: x * ops.exp(y) + wrong(y), [X, X + 1], seed=7)
    assert error.input == "input 1" and error.index == (1, 2)
    assert error.analytic / error.numeric != pytest.approx(1, abs=1e-3)
    assert error.relative_error == pytest.approx(abs(error.analytic - error.numeric) / max(abs(error.analytic), abs(error.numeric)))
    text = str(error)
    for words in ("input 1", "(1, 2)", f"{error.analytic:.9g}", f"{error.numeric:.9g}", "step ", "seed 7",
                  "1 of its 12 elements is wrong", "mc.testing.gradcheck(fn, inputs, seed=7, elementwise=True)"):
        assert words in text
    assert "\n" not in text


def test_the_numbers_of_the_report_are_the_derivative_and_what_backward_says():
    """With one output, dy scales both values alike: their quotient is the rule's."""
    error = refusal(lambda x: ops.sum(times(3.0)(x)), np.array([0.5, 1.5]))
    assert error.analytic / error.numeric == pytest.approx(1.5, rel=1e-6)
    assert "2 of its 2 elements are wrong, 1.5 times what they should be" in str(error)


def test_the_same_seed_says_the_same_and_its_line_of_code_shows_the_same_element():
    factor = np.full((3, 4), 2.0)
    factor[2, 0] = -1.0
    wrong, inputs = times(factor), X
    first = refusal(wrong, inputs, seed=3)
    assert str(first) == str(refusal(wrong, inputs, seed=3)) != str(refusal(wrong, inputs, seed=4))
    line = str(first).partition("element by element: ")[2]
    with pytest.raises(GradcheckError) as again:
        eval(line, {"mc": mc, "fn": wrong, "inputs": inputs})
    assert (again.value.index, again.value.analytic) == (first.index, first.analytic)


def test_options_that_were_changed_stand_in_the_line_of_code():
    error = refusal(times(3.0), X, eps=1e-5, rtol=1e-4, atol=0.0)
    assert "gradcheck(fn, inputs, eps=1e-05, rtol=0.0001, atol=0.0, seed=0, elementwise=True)" in str(error)


def test_false_instead_of_an_error():
    assert gradcheck(times(3.0), X, raise_exception=False) is False
    assert gradgradcheck(_exp_of_a_constant(), X, raise_exception=False) is False
    assert check_layer(_Scale(1.5), (2,), raise_exception=False) is False


# ---------------------------------------------------------------- what is computed
def test_tolerances_are_used():
    assert gradcheck(times(2.001), X, rtol=1e-2)
    assert not gradcheck(times(2.001), X, raise_exception=False)
    near_zero = mc.op(lambda x: x * x)
    near_zero.backward("x")(lambda dy, x: dy * (2.0 * x + 1e-4))
    assert gradcheck(near_zero, X, atol=1e-2)
    assert not gradcheck(near_zero, X, raise_exception=False)


@pytest.mark.parametrize("eps", [1e-6, 1e-4])
def test_steps_are_eps_times_the_size_of_the_numbers(eps):
    points = []

    def linear(x):
        points.append(np.array(x.data))
        return x * 3.0
    assert gradcheck(linear, 1e3 * X, eps=eps)
    size = 1e3 * np.sqrt(np.mean(X ** 2))
    moved = [np.abs(p - 1e3 * X).max() / size for p in points]
    steps = [m for m in moved if 0 < m < 0.004]           # about 0.01: the point beside; 0: the point itself
    assert steps and all(0.5 * eps < m < 1.6 * eps for m in steps)


def test_large_inputs_take_few_evaluations_and_elementwise_two_an_element():
    calls = []

    def counted(x):
        calls.append(1)
        return ops.tanh(x)
    assert gradcheck(counted, np.linspace(-2.0, 2.0, 5000))
    directional = len(calls)
    assert directional < 30
    calls.clear()
    assert gradcheck(counted, np.linspace(-2.0, 2.0, 500), elementwise=True)
    assert 1000 < len(calls) < 1000 + directional


def test_a_few_wrong_elements_of_many_are_enough():
    calls = []

    def wrong(x):
        calls.append(1)
        return times(3.0)(x)
    assert "at least 1" in str(refusal(wrong, np.linspace(1.0, 2.0, 5000)))
    assert len(calls) < 500


def test_each_input_is_checked_where_the_others_are_constants():
    """As the weights of a frozen model are: asking for one gradient alone takes another way through the tape."""
    def only_in_company(x, weight):
        return x * weight if weight.requires_grad else x.detach() * weight
    assert "the gradient of input 0 changes when some others are not asked for" in str(refusal(only_in_company, [X, X + 1]))


def test_inputs_are_moved_each_on_its_own_and_jointly():
    moved = set()

    def noted(x, y):
        moved.add(tuple(1e-8 < abs(t.data - base).max() < 1e-4 for t, base in ((x, X), (y, X + 1))))
        return x * y
    assert gradcheck(noted, [X, X + 1])
    assert moved == {(False, False), (True, False), (False, True), (True, True)}


def test_elementwise_finds_what_is_lost_in_a_sum():
    factor = np.full(2000, 2.0)
    factor[1234] = 2.0 * (1 + 1e-4)
    error = refusal(times(factor), np.linspace(1.0, 2.0, 2000), elementwise=True)
    assert error.index == (1234,) and error.relative_error == pytest.approx(1e-4, rel=1e-2)


def test_output_gradients_are_random_and_of_either_sign():
    """All-ones output gradients make softmax's and batch norm's gradients vanish, so that zeros would pass for right."""
    seen = []

    def noted_dx(dy):
        seen.append(dy)
        return dy * 1.0
    noted = mc.op(lambda x: x * 1.0)
    noted.backward("x")(noted_dx)
    assert gradcheck(noted, X)
    assert all((dy > 0).any() and (dy < 0).any() and len(np.unique(abs(dy))) == X.size for dy in seen)
    vanishing = mc.op(lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True))
    vanishing.backward("x")(lambda dy: dy * 0.0)
    assert not gradcheck(vanishing, X, raise_exception=False)


def test_an_input_is_checked_where_another_is_wrong_too():
    text = str(refusal(lambda x, y, z: times(3.0)(x) * times(-2.0)(y) + z, [X, X + 1, X]))
    assert "so are those of input" in text and "input 2" not in text


# ---------------------------------------------------------------- functions that cannot be checked
def test_a_random_function_is_told_apart_from_a_wrong_one():
    rng = np.random.default_rng(0)
    assert "different outputs for the same inputs" in str(refusal(lambda x: ops.dropout(x, 0.5, train=True, rng=rng), X))


def test_moving_statistics_are_told_apart_from_a_wrong_rule():
    mean, var = np.zeros(3), np.ones(3)

    def moves(x):
        ops.batch_norm(x, np.ones(3), np.zeros(3), mean, var, train=True)
        return ops.batch_norm(x, np.ones(3), np.zeros(3), mean, var, train=False)
    assert "different outputs for the same inputs" in str(refusal(moves, IMAGE))


def test_outputs_and_gradients_that_are_not_finite():
    with np.errstate(all="ignore"):
        assert "NaN or infinity at these inputs" in str(refusal(ops.log, -abs(X)))
        assert "the gradient of input 0 is" in str(refusal(ops.sqrt, np.array([1.0, 0.0])))


def test_errors_of_the_function_come_through():
    def fails(x):
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        gradcheck(fails, X)


def test_a_function_that_refuses_other_points_is_checked_at_its_own():
    """The checker also looks beside the inputs; a function that is defined on a line only has nothing there."""
    def on_its_line(x):
        if abs(float(x.data[0]) - 1.0) > 1e-3:
            raise ValueError("off the line")
        return x * 2.0
    line = np.array([1.0])
    assert gradcheck(on_its_line, line)
    assert not gradcheck(lambda x: times(3.0)(on_its_line(x)), line, raise_exception=False)


# ---------------------------------------------------------------- kinks
WITH_ZEROS = np.array([0.0, 1.0, -2.0, 0.0, 0.5])


def slope_at_zero(slope):
    """relu with this derivative at 0."""
    relu = mc.op(lambda x: np.maximum(x, 0.0))
    relu.backward("x")(lambda dy, x: dy * np.where(x == 0, slope, x > 0))
    return relu


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5, 1.0])
def test_any_slope_between_those_on_either_side_is_a_choice(slope):
    assert gradcheck(slope_at_zero(slope), WITH_ZEROS)
    assert gradcheck(slope_at_zero(slope), WITH_ZEROS, elementwise=True)


@pytest.mark.parametrize("slope", [-0.1, 1.1, 7.0])
def test_a_slope_outside_is_wrong_also_at_a_kink(slope):
    error = refusal(slope_at_zero(slope), WITH_ZEROS)
    assert error.index in [(0,), (3,)] and "either side of a kink" in str(error)


def test_a_wrong_element_does_not_hide_among_kinks():
    wrong = mc.op(lambda x: np.maximum(x, 0.0))
    wrong.backward("x")(lambda dy, x: dy * (x > 0) * np.where(x == 0.5, 1.01, 1.0))
    assert refusal(wrong, WITH_ZEROS).index == (4,)


def test_a_wrong_output_does_not_hide_behind_the_kink_of_another():
    """At 0 the element feeds a kink and a smooth output: the kink's slopes leave room, the other's rule is off by less."""
    both = mc.op(lambda x: np.stack([np.abs(x), 2.0 * x]))
    both.backward("x")(lambda dy, x: dy[0] * np.sign(x) + dy[1] * 2.1)
    for seed in range(5):
        error = refusal(both, np.array([0.0, 0.0]), seed=seed)
        assert "kink" not in str(error)


def test_where_everything_is_at_a_kink_nothing_is_called_right():
    assert "every element of input 0 is at a kink" in str(refusal(ops.relu, np.zeros(4)))
    assert "every element of input 1 is at a kink" in str(refusal(ops.maximum, [np.array([1.0, 2.0]), np.ones(1)]))
    assert gradcheck(ops.maximum, [np.array([1.0, 2.0]), np.array([1.0, 1.0])])


def test_rounding_is_no_kink():
    """x by way of 1e7 moves in little steps; an element that is wrong there is wrong, whichever it is."""
    x = np.random.default_rng(3).normal(size=40)
    for element in range(40):
        factor = np.ones(40)
        factor[element] = 1.5
        assert refusal(times(factor, lambda x: (x + 1e7) - 1e7), x, rtol=1e-3).index == (element,)


def test_ties_of_a_pool_are_kept_out_and_counted():
    image = np.array([[1.0, 1.0, 0.0, 2.0], [0.5, 0.25, 3.0, 0.75]]).reshape(1, 1, 2, 4)
    report = checking.check(Function(lambda x: ops.max_pool2d(x), [image]))
    assert report == (1, 8, 2, report.worst) and report.worst < 1e-9


def test_a_kink_within_the_first_step_is_no_kink_for_a_shorter_one():
    assert checking.check(Function(ops.relu, [np.array([2e-7, -4e-7, 1.0])])).kinks == 0
    assert refusal(times(np.array([1.0, 0.5, 1.0]), lambda x: np.maximum(x, 0.0)), np.array([2e-7, 4e-7, 1.0])).index == (1,)


# ---------------------------------------------------------------- second derivatives
def _exp_of_a_constant():
    exp = mc.op(lambda x: np.exp(x))
    exp.backward("x")(lambda dy, y: dy * (y.detach() if isinstance(y, mc.Tensor) else y))
    return exp


def test_second_derivatives_are_checked_with_respect_to_inputs_and_output_gradient():
    assert gradcheck(_exp_of_a_constant(), X)
    with pytest.raises(GradcheckError) as caught:
        gradgradcheck(_exp_of_a_constant(), X)
    assert caught.value.input == "input 0" and "gradgradcheck(fn, inputs" in str(caught.value)
    frozen_dy = mc.op(lambda x: 3.0 * x)
    frozen_dy.backward("x")(lambda dy: 3.0 * (dy.detach() if isinstance(dy, mc.Tensor) else dy))
    with pytest.raises(GradcheckError) as caught:
        gradgradcheck(frozen_dy, X)
    assert caught.value.input == "the output gradient"


def test_several_outputs_have_several_output_gradients():
    assert gradgradcheck(lambda x, y: (x * y, ops.sum(x * x), ops.exp(y)), [X, X + 1])
    wrong = _exp_of_a_constant()
    with pytest.raises(GradcheckError):
        gradgradcheck(lambda x, y: (x * y, wrong(y)), [X, X + 1])


# ---------------------------------------------------------------- layers and models
class _Scale(layers.Layer):
    """y = weight x, whose backward says `factor` times the right gradient of weight."""

    parameter_names = ("weight",)

    def __init__(self, factor):
        self.weight = None
        self.scaled = mc.op(lambda x, weight: x * weight)
        self.scaled.backward("x")(lambda dy, weight, x_shape: ops.sum_to(dy * weight, x_shape))
        self.scaled.backward("weight")(lambda dy, x, weight_shape: ops.sum_to(dy * x, weight_shape) * factor)

    def infer(self, in_shape, rng, dtype):
        self.weight = mc.Tensor(np.ones(in_shape, dtype), requires_grad=True)
        return in_shape

    def forward(self, x, train, rng):
        return self.scaled(x, self.weight)


EVERY_LAYER = [
    (layers.Conv2d(4, 3, stride=2, padding=1), (3, 6, 6)), (layers.Conv2d(4, (1, 3), groups=2, bias=False), (2, 4, 5)),
    (layers.BatchNorm2d(), (3, 4, 4)), (layers.Linear(4), (5,)), (layers.ReLU(), (3, 4)), (layers.MaxPool2d(2), (2, 4, 4)),
    (layers.AvgPool2d(3, 2, 1), (2, 5, 5)), (layers.AdaptiveAvgPool2d((2, 3)), (2, 5, 5)), (layers.GlobalAvgPool2d(), (3, 4, 4)),
    (layers.Flatten(), (2, 3, 3)), (layers.Dropout(0.5), (3, 4)),
    (layers.Residual([layers.Conv2d(2, 3, padding=1), layers.BatchNorm2d()]), (2, 4, 4)),
]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("layer", "in_shape"), EVERY_LAYER, ids=lambda value: type(value).__name__)
def test_every_layer_is_right_to_second_order(layer, in_shape, train):
    assert check_layer(layer, in_shape, train=train)
    assert check_layer(layer, in_shape, train=train, second_order=True)


def test_a_wrong_parameter_is_named_by_its_path():
    block = layers.Sequential([layers.Linear(3).named("conv1"), _Scale(1.01).named("scale")])
    model = layers.Sequential([layers.Sequential([block]).named("layer1"), layers.Linear(2).named("fc")])
    with pytest.raises(GradcheckError) as caught:
        check_layer(model, (4,), seed=5)
    assert caught.value.input == "layer1.0.scale.weight"
    assert "mc.testing.check_layer(layer, (4,), train=False, seed=5, elementwise=True)" in str(caught.value)
    assert "so are those" not in str(caught.value)


def test_a_wrong_rule_leads_to_the_parameters_before_it():
    """A convolution that hands back a wrong dx spoils every parameter before it and none behind it."""
    class WrongDx(layers.Layer):
        def forward(self, x, train, rng):
            return times(2.02)(x)
    model = layers.Sequential([layers.Linear(3).named("before"), WrongDx(), layers.Linear(2).named("behind")], in_shape=(4,))
    with pytest.raises(GradcheckError) as caught:
        check_layer(model, (4,))
    assert caught.value.input in ("x", "before.weight", "before.bias") and "behind" not in str(caught.value)


def test_the_layer_stays_as_it_is():
    """Built or not, in float32, in the middle of training: weights, statistics, random state and gradients are the caller's."""
    unbuilt = layers.Sequential([layers.Conv2d(2), layers.BatchNorm2d(), layers.Dropout(0.5)])
    built = layers.Sequential(copy.deepcopy(unbuilt.layers), in_shape=(1, 5, 5))
    built(np.zeros((2, 1, 5, 5), np.float32), train=True)
    before, random = built.state_dict(), built.rng.bit_generator.state
    assert check_layer(unbuilt, (1, 5, 5), train=True) and check_layer(built, (1, 5, 5), train=True)
    assert unbuilt.out_shape is None and built.dtype == np.float32 and built.rng.bit_generator.state == random
    after = built.state_dict()
    assert all(np.array_equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert all(p.grad is None for p in built.parameters())


def test_special_values_of_a_fresh_layer_hide_nothing():
    """With weight 1, as built, a backward that forgets to multiply by it is right."""
    class Forgetful(_Scale):
        def __init__(self):
            super().__init__(1.0)
            self.scaled = mc.op(lambda x, weight: x * weight)
            self.scaled.backward("x")(lambda dy: dy * 1.0)
            self.scaled.backward("weight")(lambda dy, x: (dy * x).sum(0))
    with pytest.raises(GradcheckError) as caught:
        check_layer(Forgetful(), (4,))
    assert caught.value.input == "x" and "moved by about" not in str(caught.value)


def test_a_frozen_layer_is_checked_as_it_computes():
    norm = layers.BatchNorm2d()
    norm.build((2, 3, 3), np.random.default_rng(0))
    assert check_layer(norm.freeze(), (2, 3, 3), train=True)
    assert not any(p.requires_grad for p in norm.parameters())


def test_a_parameter_that_two_layers_share_is_one_parameter():
    first, second = layers.Linear(4), layers.Linear(4)
    model = layers.Sequential([first, layers.ReLU(), second], in_shape=(4,))
    second.weight = first.weight
    names = checking.layer_function(model, (4,), False, 3, 0).names
    assert names == ["x", "0.weight", "0.bias", "2.bias"]
    assert check_layer(model, (4,))


def test_a_layer_on_another_device_is_checked_there():
    model = layers.Sequential([layers.Conv2d(2), layers.BatchNorm2d(), layers.ReLU()], in_shape=(1, 5, 5)).to("standin")
    assert check_layer(model, (1, 5, 5), train=True)
    assert model.device == "standin"


def test_a_built_layer_has_its_shape():
    model = layers.Sequential([layers.Linear(2)], in_shape=(4,))
    with pytest.raises(ValueError, match=r"built for inputs of \(4,\), not \(5,\)"):
        check_layer(model, (5,))


def test_a_deep_model_takes_a_few_evaluations_a_parameter():
    calls = []

    class Counted(layers.Layer):
        def forward(self, x, train, rng):
            calls.append(1)
            return x
    depth = 25
    model = layers.Sequential([Counted(), *(layer for _ in range(depth) for layer in (layers.Linear(3), layers.ReLU()))])
    assert check_layer(model, (3,))
    assert 2 * depth < len(calls) < 4 * 2 * depth           # a weight and a bias a layer


# ---------------------------------------------------------------- the table
@pytest.fixture(scope="module")
def results():
    heard = []
    found = table.check_everything(on_result=heard.append)
    assert heard == found
    return found


def test_the_table_has_every_operation_and_both_models(results):
    assert set(table.CASES) == set(ops.__all__)
    names = {result.name for result in results}
    assert set(ops.__all__) < names
    assert {name.partition(",")[0] for name in names - set(ops.__all__)} == {"small VGG", "small ResNet"}
    for name in names:
        assert [result.order for result in results if result.name == name] == [1, 2]


def test_everything_is_right(results):
    assert [(result.name, result.order, result.message) for result in results if not result.ok] == []
    assert all(result.worst < 1e-6 and result.inputs > 0 and result.seconds > 0 for result in results)


def test_first_order_only():
    heard = []

    def stop(result):
        heard.append(result)
        if len(heard) == 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        table.check_everything(on_result=stop, second_order=False)
    assert [result.order for result in heard] == [1, 1, 1]


def backward_rules():
    for name in ops.__all__:
        operation = getattr(ops, name)
        if isinstance(operation, Op):
            for kind in ("composed", "fused"):
                for k, rule in enumerate(getattr(operation, kind)):
                    for at, target in enumerate(rule.targets):
                        yield pytest.param(name, kind, k, at, id=f"{name}-{kind}-{target}")


@pytest.mark.parametrize(("name", "kind", "k", "at"), list(backward_rules()))
def test_every_backward_that_is_off_by_a_thousandth_is_noticed(name, kind, k, at, monkeypatch):
    """Each rule of each operation, broken in turn: the operation's own cases in the table must refuse it."""
    rule = getattr(getattr(ops, name), kind)[k]

    def off(value):
        return [off(v) for v in value] if isinstance(value, list) else value * 1.001

    def broken(output_gradient, /, **named):
        gradients = rule.function(output_gradient, **named)
        if not isinstance(gradients, tuple):
            return off(gradients)
        return tuple(off(g) if i == at and g is not None else g for i, g in enumerate(gradients))

    rules = list(getattr(getattr(ops, name), kind))
    rules[k] = rule._replace(function=broken)
    monkeypatch.setattr(getattr(ops, name), kind, rules)
    assert not all(gradcheck(case.fn, case.inputs, raise_exception=False) for case in table.CASES[name])


def test_what_is_wrong_stands_in_its_line_and_the_others_go_on(monkeypatch):
    rule = ops.relu.composed[0]
    monkeypatch.setattr(ops.relu, "composed", [rule._replace(function=lambda dy, y: -rule.function(dy, y))])
    monkeypatch.delitem(table.CASES, "exp")
    monkeypatch.setattr(table, "small_models", dict)
    wrong = {(result.name, result.order): result for result in table.check_everything() if not result.ok}
    assert set(wrong) == {("relu", 1), ("exp", 1), ("exp", 2)}
    assert wrong["relu", 1].worst == pytest.approx(2.0) and "the gradient of input 0 is wrong" in wrong["relu", 1].message
    assert "exp" in wrong["exp", 1].message
