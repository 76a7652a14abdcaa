"""The checker against the wrong backward rules it must refuse and the tricky right ones it must accept; and the set itself."""
import importlib.util

import numpy as np
import pytest

import minicnn as mc
from minicnn.testing import GradcheckError, gradcheck, gradgradcheck, second_order_specimens, specimen, specimens

WRONG = [s for s in specimens if not s.is_correct]
RIGHT = [s for s in specimens if s.is_correct]


def each(some):
    return pytest.mark.parametrize("s", some, ids=lambda s: s.name)


# ---------------------------------------------------------------- the verdicts
@each(specimens)
def test_the_verdict_is_right_whatever_the_seed(s):
    for seed in range(10):
        assert gradcheck(s.fn, s.inputs, seed=seed, raise_exception=False) == s.is_correct, f"seed {seed}"


@each(WRONG)
def test_wrong_ones_do_not_pass_at_ten_times_the_tolerance(s):
    for seed in range(2):
        assert not gradcheck(s.fn, s.inputs, rtol=1e-4, atol=1e-6, seed=seed, raise_exception=False)


@each(RIGHT)
def test_right_ones_do_not_fail_at_a_tenth_of_the_tolerance(s):
    for seed in range(2):
        assert gradcheck(s.fn, s.inputs, rtol=1e-6, atol=1e-8, seed=seed)


@each(specimens)
def test_the_verdict_is_right_element_by_element(s):
    assert gradcheck(s.fn, s.inputs, elementwise=True, raise_exception=False) == s.is_correct


@each(second_order_specimens)
def test_the_verdict_on_the_second_derivative(s):
    for seed in range(2):
        assert gradgradcheck(s.fn, s.inputs, seed=seed, raise_exception=False) == s.is_correct, f"seed {seed}"


@each([s for s in second_order_specimens if not s.is_correct])
def test_wrong_second_derivatives_have_right_first_ones(s):
    """So it is gradgradcheck that finds them, and nothing else would."""
    assert gradcheck(s.fn, s.inputs)


# ---------------------------------------------------------------- the reasons
REASONS = {
    "sign": "-1 times what they should be",
    "missing 1 / N": "3 times what they should be",
    "last corner": "is wrong at (2, 3): 0 by backward",
    "one part in a thousand of one element": "1 of its 12 elements is wrong",
    "only the first argument right": "the gradient of input 1 is wrong",
    "error only in the bias": "the gradient of input 2 is wrong",
    "one channel": "is wrong at (0, 1, ",
    "right at ones only": "are they special",
    "tie given to all": "at a kink (input 0 at (0, 1) (0, 2)) the gradient is given to too many",
    "tie given to none": "at a kink (input 0 at (0, 1) (0, 2)) the gradient is given to too many or too few",
    "tie of two inputs given to both": "at a kink (input 0 at (0,), input 1 at (0,))",
    "outside the slopes of a kink": "the slopes on either side of a kink",
    "output gradient clipped": "not linear in the output gradient",
    "dropout draws again": "a second backward pass through the same graph gives another gradient",
    "adds to a buffer": "a second backward pass through the same graph gives another gradient",
    "keeps the first input": "numbers of another call",
    "keeps the latest input": "depends on what was computed before",
    "writes into the output gradient": "writes into the output gradient",
    "writes into its input": "changes input 0",
    "right in company only": "changes when some others are not asked for",
    "fused unlike composed": "made of ops differs from the fused one",
    "reads memory as it lies": "in memory in another order",
}


@pytest.mark.parametrize("name", REASONS)
def test_it_is_refused_for_the_right_reason(name):
    s, = (s for s in specimens if s.name == f"wrong: {name}")
    with pytest.raises(GradcheckError) as caught:
        gradcheck(s.fn, s.inputs)
    assert REASONS[name] in str(caught.value)


# ---------------------------------------------------------------- the set
def test_there_are_many_of_each_kind():
    assert len(WRONG) >= 20 and len(RIGHT) >= 10
    assert sum(not s.is_correct for s in second_order_specimens) >= 5
    for some in (specimens, second_order_specimens):
        assert len({s.name for s in some}) == len(some)
        assert all(s.name.startswith("right: " if s.is_correct else "wrong: ") for s in some)


def test_a_specimen_is_what_it_says_a_tuple_of_four():
    for name, fn, inputs, is_correct in (*specimens, *second_order_specimens):
        assert isinstance(name, str) and callable(fn) and isinstance(is_correct, bool)
        assert all(type(x) is np.ndarray and x.dtype in (np.float64, np.int64) for x in inputs)


def test_inputs_are_the_same_in_every_process():
    spec = importlib.util.spec_from_file_location("another_specimen", specimen.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    for first, second in zip(specimens, again.specimens, strict=True):
        assert first.name == second.name
        assert all(np.array_equal(a, b) for a, b in zip(first.inputs, second.inputs, strict=True))


def numeric_jacobian_products(s, dy):
    """d<fn, dy>/dx by the plainest differences there are, nothing of the checker's: for smooth functions of numbers around 1."""
    def outputs(inputs):
        y = s.fn(*[mc.Tensor(x) for x in inputs])
        return y.numpy()
    found = []
    for i, x in enumerate(s.inputs):
        g = np.zeros(x.shape)
        for index in np.ndindex(*x.shape):
            moved = [[v.copy() for v in s.inputs] for _ in range(2)]
            moved[0][i][index] += 1e-5
            moved[1][i][index] -= 1e-5
            g[index] = (dy * (outputs(moved[0]) - outputs(moved[1]))).sum() / 2e-5
        found.append(g)
    return found


NOT_BY_NUMBERS = {"tie given to all", "tie given to none", "tie of two inputs given to both", "pool gives a tie to all",
                  "outside the slopes of a kink", "right at ones only", "tiny inputs", "behind a large constant", "huge outputs",
                  "right for equal output gradients", "keeps the first input", "keeps the latest input", "adds to a buffer",
                  "writes into the output gradient", "writes into its input", "right in company only", "fused unlike composed",
                  "reads memory as it lies", "dropout draws again"}


@each([s for s in WRONG if s.name.removeprefix("wrong: ") not in NOT_BY_NUMBERS])
def test_what_is_called_wrong_is_wrong(s):
    """By a witness that shares no code with the checker; the others are wrong in ways that plain differences do not see."""
    leaves = [mc.Tensor(x, requires_grad=True) for x in s.inputs]
    y = s.fn(*leaves)
    dy = np.random.default_rng(5).normal(size=y.shape)
    numeric = numeric_jacobian_products(s, dy)
    analytic = [np.zeros(x.shape) for x in leaves] if y.node is None else [g.numpy() for g in mc.grad(y, leaves, dy)]
    errors = [abs(a - n).max() / abs(n).max() for a, n in zip(analytic, numeric, strict=True)]
    assert max(errors) > 1e-4
