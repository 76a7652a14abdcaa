"""How weights begin: the spread that each rule asks for, its shape, and the same numbers from the same seed."""
import numpy as np
import pytest

from minicnn import initialization as init

CONV, DENSE = (96, 40, 3, 5), (300, 500)            # fan-in 600 and 500, fan-out 1440 and 300


def draw(initializer, shape, dtype=np.float64, seed=0):
    return initializer(shape, np.random.default_rng(seed), dtype)


def test_fans_count_the_products_that_meet_in_one_number():
    assert init.fans(CONV) == (40 * 15, 96 * 15)
    assert init.fans(DENSE) == (500, 300)
    assert init.fans((7, 1, 3, 3)) == (9, 63)


def test_fans_are_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for shape in (CONV, DENSE, (7, 1, 3, 3), (4, 5)):
        assert init.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.zeros(shape))


# (initialiser, is it uniform?, standard deviation for CONV, for DENSE)
RULES = {
    "normal": (init.normal(0.3), False, 0.3, 0.3),
    "uniform": (init.uniform(0.3), True, 0.3 / 3 ** 0.5, 0.3 / 3 ** 0.5),
    "he_normal, out by default": (init.he_normal(), False, (2 / 1440) ** 0.5, (2 / 300) ** 0.5),
    "he_normal in": (init.he_normal("in"), False, (2 / 600) ** 0.5, (2 / 500) ** 0.5),
    "he_uniform, in by default": (init.he_uniform(), True, (2 / 600) ** 0.5, (2 / 500) ** 0.5),
    "he_uniform out": (init.he_uniform("out"), True, (2 / 1440) ** 0.5, (2 / 300) ** 0.5),
    "xavier_normal": (init.xavier_normal(), False, (2 / 2040) ** 0.5, (2 / 800) ** 0.5),
    "xavier_uniform": (init.xavier_uniform(), True, (2 / 2040) ** 0.5, (2 / 800) ** 0.5),
    "fan_in_uniform": (init.fan_in_uniform(), True, 600 ** -0.5 / 3 ** 0.5, 500 ** -0.5 / 3 ** 0.5)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_the_spread_and_its_shape(rule, dtype):
    initializer, is_uniform, *spreads = RULES[rule]
    for shape, std in zip((CONV, DENSE), spreads, strict=True):
        w = draw(initializer, shape, dtype)
        assert (w.shape, w.dtype) == (shape, dtype)
        assert w.mean() == pytest.approx(0, abs=5 * std / w.size ** 0.5)        # five standard errors
        assert w.std() == pytest.approx(std, rel=0.01)
        within = (abs(w) < std).mean()                                          # of one standard deviation
        assert within == pytest.approx(3 ** -0.5 if is_uniform else 0.6827, abs=0.01)
        if is_uniform:
            bound = std * 3 ** 0.5
            assert bound * 0.99 < abs(w).max() <= bound * (1 + 1e-6)
        correlation = np.corrcoef(w.reshape(len(w), -1)[:2])[0, 1]
        assert abs(correlation) < 0.25, "filters are drawn one by one"


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_alone_decides(rule):
    initializer = RULES[rule][0]
    np.testing.assert_array_equal(draw(initializer, DENSE, seed=3), draw(initializer, DENSE, seed=3))
    assert not np.array_equal(draw(initializer, DENSE, seed=3), draw(initializer, DENSE, seed=4))
    rng = np.random.default_rng(3)
    assert not np.array_equal(initializer(DENSE, rng, np.float64), initializer(DENSE, rng, np.float64))


def test_a_numpy_number_does_not_widen_the_weights():
    for initializer in (init.normal(np.float64(0.1)), init.uniform(np.float64(0.1))):
        assert draw(initializer, DENSE, np.float32).dtype == np.float32


def test_zeros():
    w = draw(init.zeros, CONV, np.float32)
    assert (w.shape, w.dtype, w.any()) == (CONV, np.float32, False)


@pytest.mark.parametrize("rule", [init.he_normal, init.he_uniform])
def test_an_unknown_fan_is_refused_where_it_is_written(rule):
    with pytest.raises(ValueError, match="""fan='both' must be "in" or "out\""""):
        rule("both")
