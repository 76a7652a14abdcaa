"""The tape: what it records, keeps and frees; one and many gradients; what is refused, in which words."""
import gc
import operator
import sys
import tracemalloc
import weakref

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from witnesses import Device, check_higher_order, derivative, host, inner, same, share_memory

import minicnn as mc
from minicnn import backend, ops
from minicnn.autograd import Node

A, B, C = np.random.default_rng(7).standard_normal((3, 2, 3))


def scale(factor=1.0, watch=None):
    """An op of its own for a test: y = factor x, which saves x without need and reports to `watch` when its backward runs."""
    @mc.op
    def scaled(x):
        return x * factor

    @scaled.backward("x")
    def scaled_dx(dy, x):
        if watch is not None:
            watch()
        return dy * factor

    return scaled


# ---------------------------------------------------------------- depth

def long_chain(x, length):
    for _ in range(length):
        x = x * 1.0001 + 0.0
    return x


def test_defect_a_deep_graph_hits_the_recursion_limit(device):
    x = device.tensor(A)
    assert sys.getrecursionlimit() < 10_000
    long_chain(x, 5_000).sum().backward()                   # 10,000 operations
    same(x.grad, np.full((2, 3), 1.0001 ** 5_000), 1e-9)


@pytest.mark.slow
def test_a_chain_of_100_000_operations():
    x = mc.Tensor(A, requires_grad=True)
    long_chain(x, 50_000).sum().backward()
    same(x.grad, np.full((2, 3), 1.0001 ** 50_000), 1e-8)


def test_a_deep_graph_is_differentiated_twice_and_dropped_without_recursion():
    x = mc.Tensor(A, requires_grad=True)
    y = x
    for _ in range(500):
        y = y * y * 0.5 + y * 0.5
        y = y * 0.5
    first, = mc.grad(y.sum(), x, create_graph=True)
    second, = mc.grad(first.sum(), x)
    assert np.isfinite(second.numpy()).all()
    undifferentiated = long_chain(x, 25_000)
    node = weakref.ref(undifferentiated.node)
    del undifferentiated, y, first                          # 50,000 nodes that link to one another go at once
    gc.collect()
    assert node() is None


def test_sharing_costs_no_more_than_its_nodes():
    """x + x, 60 times over, is 2^60 paths through 60 nodes."""
    x = y = mc.Tensor(A, requires_grad=True)
    for _ in range(60):
        y = y + y
    y.sum().backward()
    same(x.grad, np.full((2, 3), 2.0 ** 60))


# ---------------------------------------------------------------- freeing, keeping

def test_a_second_backward_through_a_freed_graph_says_so(device):
    x = device.tensor(A)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"the graph at (sum|mul) was freed by an earlier backward pass; .*retain_graph=True"):
        y.backward()
    z = ops.exp(x * 2.0)
    mc.grad(z.sum(), x)
    with pytest.raises(RuntimeError, match="freed"):
        mc.grad((z * 3.0).sum(), x)                         # a new end on a freed middle
    same(x.grad, 2 * A)                                     # and nothing was added on the way


def test_retain_graph_keeps_it_until_the_last_pass(device):
    x = device.tensor(A)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    mc.grad(y, x, retain_graph=True)
    same(mc.grad(y, x, create_graph=True)[0], 2 * A)        # create_graph keeps it too, unless told otherwise
    y.backward()
    same(x.grad, 4 * A)
    with pytest.raises(RuntimeError, match="freed"):
        y.backward()


def test_the_graph_frees_as_it_goes():
    """While the third of five backwards runs, what the two before it had saved is gone already."""
    alive, counts = [], []
    layer = scale(watch=lambda: counts.append(sum(ref() is not None for ref in alive)))
    x = mc.Tensor(A, requires_grad=True)
    y = x * 1.0
    for _ in range(5):
        alive.append(weakref.ref(y.data))
        y = layer(y)
    loss = y.sum()
    del y
    loss.backward()
    assert counts == [5, 4, 3, 2, 1]
    alive.clear()
    y = x * 1.0
    for _ in range(5):
        alive.append(weakref.ref(y.data))
        y = layer(y)
    loss = y.sum()
    loss.backward(retain_graph=True)
    assert counts[5:] == [5, 5, 5, 5, 5]


def test_only_what_was_passed_through_is_freed():
    """A gradient at an intermediate frees what lies above it; what lies below is still there."""
    x = mc.Tensor(A, requires_grad=True)
    h = x * x
    y = (h * h).sum()
    dh, = mc.grad(y, h)
    same(dh, 2 * A ** 2)
    h.backward(dh)
    same(x.grad, 4 * A ** 3)
    with pytest.raises(RuntimeError, match="freed"):
        y.backward()


# ---------------------------------------------------------------- what the tape keeps

def is_kept(make, requires_grad=(True,)):
    """Whether the array that the op under test was given survives when only its output is held."""
    x = mc.Tensor(A.reshape(1, 1, 2, 3), requires_grad=requires_grad[0])
    given = x * 2.0                                         # mul by a number keeps no array of it
    ref = weakref.ref(given.data)
    out = make(given)
    del given
    gc.collect()
    assert out is not None
    return ref() is not None


WEIGHT = np.random.default_rng(1).standard_normal((2, 1, 2, 2))


@pytest.mark.parametrize(("make", "kept"), [
    (lambda x: x + 1.0, False), (lambda x: x - x, False), (lambda x: -x, False), (lambda x: x * 3.0, False),
    (lambda x: x / 3.0, False),
    (lambda x: x.sum(), False), (lambda x: x.mean((2, 3)), False), (lambda x: x.transpose(), True), (lambda x: x[..., 1:], True),
    (lambda x: ops.pad(x, 1), False), (lambda x: ops.concatenate([x, x]), False), (lambda x: ops.where(A > 0, x, 0.0), False),
    (lambda x: ops.relu(x), False), (lambda x: ops.exp(x), False), (lambda x: ops.sqrt(x * x), True),
    (lambda x: ops.tanh(x), False),
    (lambda x: ops.sigmoid(x), False), (lambda x: ops.softmax(x), False), (lambda x: ops.log_softmax(x), False),
    (lambda x: ops.log(x * x + 1.0), True), (lambda x: x ** 3, True), (lambda x: x * x, True), (lambda x: ops.max(x), False),
    (lambda x: ops.max_pool2d(x, 2, 1), True), (lambda x: ops.avg_pool2d(x, 2, 1), False),
    (lambda x: ops.global_avg_pool2d(x), False),
    (lambda x: ops.adaptive_avg_pool2d(x, (1, 2)), False),
    (lambda x: ops.dropout(x, 0.5, train=True, rng=np.random.default_rng(0)), False),
    (lambda x: ops.conv2d(x, WEIGHT), False), (lambda x: ops.conv2d(x, mc.Tensor(WEIGHT, requires_grad=True)), True),
    (lambda x: ops.linear(x.reshape(2, 3), np.ones((1, 3))), False),
    (lambda x: ops.batch_norm(x, np.ones(1), np.ones(1), np.zeros(1), np.ones(1), train=False), False),
    (lambda x: ops.batch_norm(x, np.ones(1), np.ones(1), np.zeros(1), np.ones(1), train=True), True)])
def test_what_no_backward_names_is_not_kept(make, kept):
    """`kept` where a backward needs the input (or the output is a view of it), and nowhere else."""
    assert is_kept(make) == kept


def test_outputs_are_kept_by_name_alone():
    """relu's backward names y, add's nothing: of `relu(a + b)` one array stays, of `a + b` none."""
    a, b = (mc.Tensor(v, requires_grad=True) for v in (A, B))
    total = a + b
    y = ops.relu(total)
    refs = [weakref.ref(total.data), weakref.ref(y.data)]
    z = (y + 1.0) - 2.0
    del total, y
    assert [ref() is not None for ref in refs] == [False, True]
    z.backward(C)
    assert [ref() is not None for ref in refs] == [False, False]


def test_without_a_gradient_to_come_nothing_is_kept():
    assert not is_kept(lambda x: x * x * x, requires_grad=(False,))
    with mc.no_grad():
        assert not is_kept(lambda x: x * x * x)


def arrays_held(run):
    """Bytes of NumPy arrays (the Python objects around them apart) that are there when `run` has returned and not before."""
    gc.collect()
    tracemalloc.start()
    try:
        result = run()
        gc.collect()
        arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
    finally:
        tracemalloc.stop()
    del result
    return sum(trace.size for trace in arrays.traces)


def test_the_memory_of_a_chain_of_twenty_layers():
    """One activation a layer of conv + relu: relu's y, which is the next layer's x. With batch norm between, two. Of adds, none."""
    x = np.ones((4, 8, 16, 16), np.float32)
    weight = mc.Tensor(np.full((8, 8, 3, 3), 0.01, np.float32), requires_grad=True)
    gamma, beta = (mc.Tensor(np.full(8, v, np.float32), requires_grad=True) for v in (1, 0))

    def activations_kept(layer):
        def chain():
            y = mc.Tensor(x)
            for _ in range(20):
                y = layer(y)
            return y
        chain()                                             # the threads' workspaces stay: they are no activations
        return arrays_held(chain) / x.nbytes

    def conv(x):
        return ops.conv2d(x, weight, padding=1)

    def norm(x):
        return ops.batch_norm(x, gamma, beta, np.zeros(8, np.float32), np.ones(8, np.float32), train=True)

    assert 20 <= activations_kept(lambda x: ops.relu(conv(x))) < 20.1
    assert 40 <= activations_kept(lambda x: ops.relu(norm(conv(x)))) < 40.2
    assert 1 <= activations_kept(lambda x: x + gamma.reshape(1, 8, 1, 1)) < 1.1
    with mc.no_grad():
        assert 1 <= activations_kept(lambda x: ops.relu(norm(conv(x)))) < 1.1
    # A max-pool keeps what it was given, mostly a ReLU's result that is kept anyway, and its output, a quarter of that.
    def pool_of_relu(x):
        return ops.pad(ops.max_pool2d(ops.relu(x + gamma.reshape(1, 8, 1, 1))), ((0, 0), (0, 0), (4, 4), (4, 4)))

    pool = activations_kept(pool_of_relu)
    assert 1 + 20 * 1.25 <= pool < 1 + 20 * 1.25 + 0.1


def test_a_backward_pass_leaves_nothing_but_the_gradients_of_leaves():
    weight = mc.Tensor(np.full((8, 8, 3, 3), 0.01, np.float32), requires_grad=True)
    x = mc.Tensor(np.ones((4, 8, 16, 16), np.float32))

    def run():
        y = x
        for _ in range(10):
            y = ops.relu(ops.conv2d(y, weight, padding=1))
        loss = y.sum()
        loss.backward()
        return loss

    run()                                                   # the threads' workspaces stay: they are no gradients
    weight.grad = None
    assert weight.data.nbytes <= arrays_held(run) < weight.data.nbytes + 100


# ---------------------------------------------------------------- gradients at leaves

def test_gradients_accumulate(device):
    x = device.tensor(A)
    for times in (1, 2, 3):
        (x * x).backward(device.put(B))
        same(x.grad, times * 2 * A * B)
    x.grad = None
    (x * 3.0).sum().backward()
    same(x.grad, np.full((2, 3), 3.0))


def test_gradients_of_a_scalar_accumulate_too(device):
    """0-d arrays, of which NumPy's arithmetic makes scalars."""
    x = device.tensor(np.array(2.0))
    for times in (1, 2, 3):
        (x * x + x).backward()
        assert backend.is_array(x.grad.data)
        same(x.grad, np.array(times * 5.0))


def test_a_tensor_used_many_times_gets_every_share(device):
    x = device.tensor(A)
    y = x * x + x * 2.0 + ops.exp(x) + x
    y.backward(device.put(B))
    same(x.grad, B * (2 * A + 3 + np.exp(A)))


@pytest.mark.parametrize("make", [
    lambda a, b: a + b, lambda a, b: a + a + b, lambda a, b: a - b, lambda a, b: a + b + a + b, lambda a, b: (a + b).reshape(3, 2),
    lambda a, b: ops.concatenate([a, b]), lambda a, b: (a + b).T, lambda a, b: (a + b)[...],
    lambda a, b: ops.concatenate([a.T, b.T]).T[:, :3] + b,
    lambda a, b: ops.broadcast_to(a, (2, 3)) + ops.sum_to(b, (2, 3))])
def test_a_leafs_gradient_shares_memory_with_nothing(device, make):
    """A residual addition hands the same array to both sides: write into one gradient and look at the others."""
    a, b = device.tensors([A, B])
    y = make(a, b)
    dy = device.tensor(np.random.default_rng(0).standard_normal(y.shape), requires_grad=False)
    before = host(dy)
    y.backward(dy, retain_graph=True)
    expected = host(b.grad)
    a.grad.data[...] = 1e6
    same(b.grad, expected)
    same(dy, before)
    same(a, A)
    y.backward(dy)                                          # and the saved values are as they were
    same(b.grad, 2 * expected)
    assert not share_memory(a.grad, b.grad)


def test_a_seed_may_be_reused_by_its_owner(device):
    x = device.tensor(A)
    seed = device.put(B)
    for y in (x, x + 0.0, x.reshape(2, 3)):
        y.backward(seed, retain_graph=True)
    seed[...] = 0.0
    same(x.grad, 3 * B)


def test_gradients_that_grad_returns_are_their_own(device):
    x = device.tensor(A)
    h = x + 0.0
    seed = device.put(B)
    for_x, for_h = mc.grad(h + 0.0, [x, h], seed)
    for g in (for_x, for_h):
        assert not share_memory(g, seed)
    for_x.data[...] = 0.0
    same(for_h, B)
    assert x.grad is None                                   # grad leaves the leaves alone


def test_a_backward_may_return_two_views_of_one_array(device):
    """... and the engine, adding to one in place, must not add to the other."""
    @mc.op
    def total(a, b):
        return a + b

    @total.backward("a", "b")
    def total_dab(dy):
        g = dy * 2.0
        return g, g[...]

    for order in (1, -1):
        a, b = device.tensors([A, B])
        terms = [(a * 1.0).sum(), (total(a, b) * 1.0).sum()] if order == 1 else [(total(a, b) * 1.0).sum(), (b * 1.0).sum()]
        (terms[0] + terms[1]).backward()
        same(a.grad, np.full((2, 3), 3.0 if order == 1 else 2.0))
        same(b.grad, np.full((2, 3), 2.0 if order == 1 else 3.0))


# ---------------------------------------------------------------- grad()

def test_several_outputs_and_inputs(device):
    a, b, c = device.tensors([A, B, C])
    outputs = [a * b, b * c, (a + c).sum()]
    seeds = [device.put(C), device.tensor(A), None]
    da, db, dc = mc.grad(outputs, [a, b, c], seeds)
    same(da, C * B + 1)
    same(db, C * A + A * C)
    same(dc, A * B + 1)
    assert a.grad is b.grad is c.grad is None


def test_an_output_given_twice_and_an_input_given_twice(device):
    x = device.tensor(A)
    y = x * x
    first, again = mc.grad([y, y], [x, x], [device.put(B), device.put(C)])
    same(first, 2 * A * (B + C))
    same(again, 2 * A * (B + C))


def test_one_output_gradient_for_one_output_need_not_be_a_list(device):
    x = device.tensor(A)
    for seed in (device.put(B), device.tensor(B), [device.put(B)], (device.tensor(B),)):
        same(mc.grad(x * x, x, seed)[0], 2 * A * B)


def test_zeros_where_there_is_no_influence(device):
    x, other = device.tensors([A, np.zeros(4)])
    g, zero = mc.grad((x * 2.0).sum(), [x, other])
    same(g, np.full((2, 3), 2.0))
    assert (zero.shape, zero.dtype) == ((4,), np.float64)
    same(zero, np.zeros(4))
    assert backend.device_of(zero.data) == device.name
    constant = device.tensor(B, requires_grad=False)
    same(mc.grad((constant * 2.0).sum(), other)[0], np.zeros(4))                # nothing at all to differentiate
    zero, = mc.grad((x * 2.0).sum(), other, create_graph=True)
    same(zero, np.zeros(4))


def test_intermediates_as_inputs(device):
    x = device.tensor(A)
    h = ops.exp(x)
    k = h * h
    dh, dx, dk = mc.grad(k.sum(), [h, x, k], retain_graph=True)
    same(dh, 2 * np.exp(A))
    same(dx, 2 * np.exp(2 * A))
    same(dk, np.ones((2, 3)))
    same(mc.grad(k.sum(), [h])[0], 2 * np.exp(A))


def test_the_gradient_of_a_tensor_at_itself_is_the_output_gradient(device):
    x = device.tensor(A)
    same(mc.grad(x, x, device.put(B))[0], B)
    x.backward(device.put(C))
    same(x.grad, C)


def test_only_what_is_asked_for_is_computed():
    ran = []
    first, second = scale(watch=lambda: ran.append("first")), scale(watch=lambda: ran.append("second"))
    x, weight = (mc.Tensor(v, requires_grad=True) for v in (A, B))
    y = (first(x) * second(weight)).sum()
    mc.grad(y, weight, retain_graph=True)
    assert ran == ["second"]
    y.backward()
    assert sorted(ran) == ["first", "second", "second"]


def test_wanted_names_what_is_asked_for():
    asked = []

    @mc.op
    def product(a, b):
        return a * b

    @product.backward("a", "b")
    def product_dab(dy, a, b, wanted):
        asked.append(set(wanted))
        return (dy * b if "a" in wanted else None), (dy * a if "b" in wanted else None)

    a, b = (mc.Tensor(v, requires_grad=True) for v in (A, B))
    mc.grad(product(a, b).sum(), b)
    mc.grad(product(a, b.detach()).sum(), a)
    mc.grad(product(a, b).sum(), [a, b])
    assert asked == [{"b"}, {"a"}, {"a", "b"}]


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda x: (x * 2.0).backward(), ValueError, r"omitted for one element only; this output has shape \(2, 3\)"),
    (lambda x: mc.grad(x * 2.0, x), ValueError, r"omitted for one element only.*loss\.mean\(\)"),
    (lambda x: (x * 2.0).backward(np.ones((3, 2))), ValueError,
     r"float64\(2, 3\) needs an output gradient like it, not float64\(3, 2\)"),
    (lambda x: (x * 2.0).backward(np.ones((2, 3), np.float32)), ValueError, r"float64\(2, 3\).* not float32\(2, 3\)"),
    (lambda x: (x * 2.0).backward(np.ones(3)), ValueError, "needs an output gradient like it"),
    (lambda x: mc.grad([x * 2.0, x], x, [np.ones((2, 3))]), ValueError, "2 outputs need as many output gradients, not 1"),
    (lambda x: mc.grad([x * 2.0, x], x, np.ones((2, 3))), ValueError, "2 outputs need as many output gradients, not 1"),
    (lambda x: mc.grad(x.sum(), [x, mc.Tensor(B)]), ValueError, r"input 1, float64\(2, 3\), does not require a gradient"),
    (lambda x: mc.Tensor(A).sum().backward(), ValueError, "does not require a gradient"),
    (lambda x: x.detach().sum().backward(), ValueError, "does not require a gradient")])
def test_what_cannot_be_differentiated_is_said(call, error, words):
    x = mc.Tensor(A, requires_grad=True)
    with pytest.raises(error, match=words) as caught:
        call(x)
    assert "\n" not in str(caught.value)
    assert x.grad is None


# ---------------------------------------------------------------- recording or not

def test_no_grad_records_nothing_and_ends(device):
    x = device.tensor(A)
    with mc.no_grad():
        with mc.no_grad():
            assert not (x * 2.0).requires_grad
        assert not ops.exp(x).requires_grad                 # the inner end is not the outer's
        x.requires_grad = True                              # leaves can still be made
    assert (x * 2.0).requires_grad
    with pytest.raises(ZeroDivisionError), mc.no_grad():
        raise ZeroDivisionError
    assert (x * 2.0).requires_grad                          # also after an error inside


def test_a_backward_inside_no_grad_works():
    x = mc.Tensor(A, requires_grad=True)
    y = (x * x).sum()
    with mc.no_grad():
        y.backward()
    same(x.grad, 2 * A)


def test_create_graph_inside_no_grad_still_builds_its_graph(device):
    x = device.tensor(A)
    y = (x * x * x).sum()
    with mc.no_grad():
        g, = mc.grad(y, x, create_graph=True)
        assert g.requires_grad
        assert not (g * 2.0).requires_grad                  # and what follows is not recorded
    same(mc.grad(g.sum(), x)[0], 6 * A)


def test_a_first_order_pass_records_nothing(device):
    """Backwards receive plain arrays, so a gradient is a Tensor without history."""
    x, seed = device.tensors([A, B])
    g, = mc.grad(x * x, x, seed)
    assert not g.requires_grad
    (x * x).backward(seed)
    assert not x.grad.requires_grad


def test_the_output_gradient_is_differentiated_as_well(device):
    x, seed = device.tensors([A, B])
    g, = mc.grad(x * x, x, seed, create_graph=True)
    same(mc.grad(g, seed, device.put(C))[0], 2 * A * C)


def test_higher_orders_agree_with_powers(device):
    x = device.tensor(A)
    y = (x ** 5).sum()
    for expected in (5 * A ** 4, 20 * A ** 3, 60 * A ** 2, 120 * A, np.full((2, 3), 120.0), np.zeros((2, 3))):
        y, = mc.grad(y.sum(), x, create_graph=True)
        same(y, expected, 1e-12)


# ---------------------------------------------------------------- the protocol

def test_extra_outputs_come_out_as_plain_arrays(device):
    @mc.op(extras=("sign", "size"))
    def magnitude(x):
        sign = backend.array_module(x).sign(x)
        return x * sign, sign, x.size

    @magnitude.backward("x")
    def magnitude_dx(dy, sign):
        return dy * sign

    x = device.tensor(A)
    y, sign, size = magnitude(x)
    assert isinstance(y, mc.Tensor)
    assert backend.is_array(sign)
    assert size == 6
    y.backward(device.put(B))
    same(x.grad, B * np.sign(A))
    y, sign, size = magnitude(device.put(A))
    assert backend.is_array(y)
    assert backend.is_array(sign)


def test_a_list_argument_is_many_inputs(device):
    a, b = device.tensors([A, B])
    constant = device.put(C)
    y = ops.concatenate([a, constant, b, a], axis=0)
    seed = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(device.put(seed))
    same(a.grad, seed[:2] + seed[6:])
    same(b.grad, seed[4:6])
    z = ops.concatenate((device.put(A), device.tensor(B, requires_grad=False)))
    assert isinstance(z, mc.Tensor)
    assert not z.requires_grad


def test_a_gradient_of_its_own_is_added_to_in_place_and_handed_out(device):
    made = []

    @mc.op
    def doubled(x):
        """y = 2 x"""
        return 2 * x

    @doubled.backward("x")
    def doubled_backward(dy):
        made.append(2 * dy)
        return made[-1]

    x = device.tensor([1.0, 2.0], requires_grad=True)
    middle = doubled(x)
    total = doubled(middle) + doubled(middle) + doubled(middle)
    total.backward(device.put(np.ones(2)))
    assert len(made) == 4 and x.grad.data is made[3]                        # a leaf's
    np.testing.assert_array_equal(mc.Tensor(made[0]).numpy(), [6, 6])       # what three gave to one, in the first one's memory
    np.testing.assert_array_equal(x.grad.numpy(), [12, 12])


def test_a_backward_stays_an_ordinary_function(device):
    mul_da = next(rule.function for rule in ops.mul.composed if rule.targets == ("a",))
    same(mul_da(device.put(A), device.put(B), (2, 3)), A * B)


def test_defaults_and_keywords_reach_the_backward():
    @mc.op
    def shifted(x, by=2.0, *, times=3.0):
        return x * times + by

    @shifted.backward("x")
    def shifted_dx(dy, by, times):
        return dy * (times + by)

    for call, expected in ((shifted, 5.0), (lambda x: shifted(x, 1.0), 4.0), (lambda x: shifted(by=1.0, x=x, times=2.0), 3.0)):
        x = mc.Tensor(A, requires_grad=True)
        call(x).backward(B)
        same(x.grad, B * expected)
    for call in (lambda: shifted(), lambda: shifted(A, 1.0, 2.0), lambda: shifted(A, x=A), lambda: shifted(A, nosuch=1)):
        with pytest.raises(TypeError, match="shifted"):     # in Python's own words
            call()


def broken_op(backward, **how):
    @mc.op
    def twice(x, y_unused=None):
        return x * 2.0

    twice.backward("x", **how)(backward)
    return twice


@pytest.mark.parametrize(("backward", "error", "words"), [
    (lambda dy: dy[0], ValueError, r"gave `x`, of shape \(2, 3\), a gradient of shape \(3,\).*broadcast"),
    (lambda dy: dy.astype(np.float32), TypeError, "gave `x`, of float64, a gradient of float32"),
    (lambda dy: None, TypeError, "gave `x` a gradient of type NoneType"),
    (lambda dy: (dy, dy), TypeError, "returned 2 gradients for 1 arguments"),
    (lambda dy: 2.0, TypeError, r"gave `x` a gradient of type float; it must return an array of shape \(2, 3\)")])
def test_a_wrong_gradient_is_refused(backward, error, words):
    x = mc.Tensor(A, requires_grad=True)
    with pytest.raises(error, match=words):
        broken_op(backward)(x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(("declare", "words"), [
    (lambda op: op.backward("x")(lambda dy, nosuch: dy), r"names \['nosuch'\], unknown to twice"),
    (lambda op: op.backward("nosuch")(lambda dy: dy), r"names \['nosuch'\], unknown to twice"),
    (lambda op: [op.backward("x")(lambda dy: dy) for _ in range(2)], r"has a backward for \['x'\] already"),
    (lambda op: mc.op(lambda *arrays: arrays), r"takes \*arrays"),
    (lambda op: mc.op(lambda x, **how: x), r"takes \*how"),
    (lambda op: mc.op(lambda x, wanted: x), "'wanted'.* cannot name an argument"),
    (lambda op: mc.op(lambda x, y: x), "'y'.* cannot name an argument")])
def test_a_wrong_declaration_is_refused_at_once(declare, words):
    @mc.op
    def twice(x):
        return x * 2.0

    with pytest.raises(TypeError, match=words):
        declare(twice)


def test_an_argument_without_a_backward_is_refused_when_it_needs_one():
    @mc.op
    def product(a, b):
        return a * b

    product.backward("a")(lambda dy, b: dy * b)
    a, b = (mc.Tensor(v, requires_grad=True) for v in (A, B))
    with pytest.raises(TypeError, match=r"product has no backward for \['b'\].*t\.detach\(\)"):
        product(a, b)
    product(a, b.detach()).sum().backward()
    same(a.grad, B)
    with mc.no_grad():
        product(a, b)


def centred_op(**how):
    """y = (x - mean(x))^2, saving the mean: right at first order, a constant to the second."""
    @mc.op(extras=("mean",))
    def squared_distance(x):
        mean = x.mean(keepdims=True)
        return (x - mean) ** 2, mean

    @squared_distance.backward("x", **how)
    def fast(dy, x, mean):
        g = dy * (x - mean) * 2.0
        return g - g.mean(keepdims=True)

    return squared_distance


def test_saved_real_numbers_are_refused_at_second_order():
    op = centred_op()
    x = mc.Tensor(A, requires_grad=True)
    g, = mc.grad(op(x)[0], x, B)
    same(g, 2 * ((A - A.mean()) * B - ((A - A.mean()) * B).mean()))
    with pytest.raises(TypeError, match=r"names \['mean'\], which the tape holds as constants.*fused=True"):
        mc.grad(op(x)[0], x, B, create_graph=True)
    assert g is not None


def test_a_fused_backward_serves_the_first_order_and_a_composed_one_the_second():
    op = centred_op(fused=True)
    x = mc.Tensor(A, requires_grad=True)
    first, = mc.grad(op(x)[0], x, B)
    with pytest.raises(TypeError, match=r"no backward of second order for \['x'\]"):
        mc.grad(op(x)[0], x, B, create_graph=True)

    @op.backward("x")
    def composed(dy, x):
        g = dy * (x - ops.mean(x)) * 2.0
        return g - ops.mean(g)

    again, = mc.grad(op(x)[0], x, B, create_graph=True)
    same(again, first)
    check_higher_order(lambda x: op(x)[0], [A], Device("cpu"), 2)


def test_saved_integers_are_fine_at_second_order(device):
    check_higher_order(lambda x: ops.max_pool2d(x, 2, 1), [A.reshape(1, 1, 2, 3)], device, 2)


# ---------------------------------------------------------------- NumPy does not swallow a Tensor

@pytest.mark.parametrize("use", [np.asarray, np.array, lambda t: np.where(A > 0, t, 0), lambda t: np.concatenate([t, t]),
                                 lambda t: np.zeros((2, 3)).__setitem__(..., t), lambda t: np.pad(t, 1), np.float64])
def test_numpy_refuses_where_a_gradient_would_be_lost(use):
    x = mc.Tensor(A, requires_grad=True)
    for t in (x, x * 2.0):
        with pytest.raises(TypeError, match="would lose the gradient"):
            use(t)


def test_numpy_is_given_what_carries_no_gradient():
    t = mc.Tensor(A)
    np.testing.assert_array_equal(np.asarray(t), A)
    np.testing.assert_array_equal(np.where(A > 0, t, 0), np.where(A > 0, A, 0))
    assert np.asarray(t, dtype=np.float32).dtype == np.float32
    x = mc.Tensor(A, requires_grad=True)
    assert np.shares_memory(x.numpy(), x.data)              # numpy() never refuses
    np.testing.assert_array_equal(np.asarray(x.detach()), A)


def test_an_array_on_the_left_hands_over_to_the_op(device):
    k = device.put(B)
    for use, expected in ((lambda k, x: k + x, B + A), (lambda k, x: k - x, B - A), (lambda k, x: k * x, B * A),
                          (lambda k, x: k / x, B / A),
                          (lambda k, x: k @ x.T, B @ A.T), (lambda k, x: (k * k) ** x, (B * B) ** A),
                          (lambda k, x: np.float64(2.0) * x, 2 * A), (lambda k, x: 2 - x, 2 - A)):
        x = device.tensor(A)
        y = use(k, x)
        assert type(y) is mc.Tensor
        same(y, expected)
        y.sum().backward()
        assert x.grad is not None
    assert backend.is_array(k > device.tensor(A))           # a comparison is a mask, and a mask a plain array
    same(k > device.tensor(A), B > A)


# ---------------------------------------------------------------- dtypes and libraries

def test_python_numbers_never_promote(device):
    x = device.tensor(A.astype(np.float32) ** 2 + 1)
    mask = device.put(A > 0)
    for y in (x + 1, x - 1.5, 2 * x, x / 3, 1 / (x * x + 1), x ** 2, x ** 0.5, 2.0 ** x, x + True, x * mask, ops.maximum(x, 0),
              ops.where(mask, x, 0.0), ops.where(mask, 1, x), ops.pad(x, 1, value=0.5), x.mean(), x.var(), -x,
              x * np.float64(2.5), np.float64(2.5) * x, x ** np.float64(2.0), x + np.int64(3), x / np.bool_(True),
              ops.maximum(x, np.float64(0)),
              ops.pad(x, 1, value=np.float64(0.5)), ops.softmax(x), ops.cross_entropy(x, [0, 2], label_smoothing=np.float64(0.1))):
        assert y.dtype == np.float32
        g, = mc.grad(y.sum(), x)
        assert g.dtype == np.float32


@pytest.mark.parametrize("make", [
    lambda x, put: x * put(np.arange(3)), lambda x, put: x + put(np.ones((2, 3), np.int32)), lambda x, put: x ** put(np.arange(3)),
    lambda x, put: ops.concatenate([x, put(np.ones((1, 3), np.int64))]), lambda x, put: ops.where(x > 0, x, put(np.zeros(3, int)))])
def test_an_integer_array_that_would_promote_is_an_error(device, make):
    x = device.tensor(A.astype(np.float32))
    with pytest.raises(TypeError, match=r"made float64 of float32: an integer array.*astype\('float32'\)"):
        make(x, device.put)


@pytest.mark.parametrize("make", [
    lambda x, put: x * put(np.ones(3)), lambda x, put: put(np.ones(3)) * x, lambda x, put: x + put(np.array(2.0)),
    lambda x, put: ops.maximum(x, put(np.zeros((2, 3)))), lambda x, put: ops.concatenate([x, put(np.zeros((2, 3)))]),
    lambda x, put: ops.matmul(x, put(np.ones((3, 2)))), lambda x, put: ops.where(x > 0, x, put(np.zeros(3))),
    lambda x, put: ops.linear(x, put(np.ones((2, 3)))), lambda x, put: x * mc.Tensor(put(np.ones(3)), requires_grad=True),
    lambda x, put: ops.conv2d(x.reshape(1, 1, 2, 3), put(np.ones((1, 1, 1, 1))))])
def test_two_floating_types_in_one_op_are_an_error(device, make):
    x = device.tensor(A.astype(np.float32))
    with pytest.raises(TypeError, match=r"mixes float32 and float64 \(.*\).*one floating type: convert"):
        make(x, device.put)


@pytest.mark.parametrize("make", [
    lambda a, b: a + b, lambda a, b: b * a, lambda a, b: ops.concatenate([a, b]), lambda a, b: ops.where(a.data > 0, a, b),
    lambda a, b: ops.linear(a, b), lambda a, b: a @ b.T, lambda a, b: a[b.data > 0], lambda a, b: a.backward(b.data)])
def test_two_libraries_in_one_op_are_an_error(device, make):
    other = Device("standin" if device.name == "cpu" else "cpu")
    for a, b in ((device.tensor(A), other.tensor(B, requires_grad=False)),
                 (other.tensor(A), device.tensor(B, requires_grad=False))):
        with pytest.raises(TypeError,
                           match=rf"one array is on '({device}|{other})'.* and another on '.*must share a device.*t\.to\("):
            make(a, b)


def test_numpy_scalars_mix_with_every_library(device):
    x = device.tensor(A.astype(np.float32))
    y = x * np.float32(2.0)
    assert y.dtype == np.float32
    same(y, 2 * A.astype(np.float32), 1e-6)


# ---------------------------------------------------------------- the Tensor itself

def test_what_a_tensor_tells(device):
    x = device.tensor(A)
    assert (x.shape, x.ndim, x.size, x.dtype, len(x), x.requires_grad) == ((2, 3), 2, 6, np.float64, 2, True)
    assert x.grad is None
    same(x.T, A.T)
    for row, expected in zip(x, A, strict=True):
        same(row, expected)
    assert (x * 2.0).sum().item() == pytest.approx(2 * A.sum())
    assert float(x[0, 0]) == A[0, 0]
    assert bool(x[0, 0] != 0.0)
    assert "requires_grad=True" in repr(x)
    assert "from mul" in repr(x * 2.0)
    assert "float64" in repr(x.detach())
    assert {x: 1}[x] == 1                                   # hashed by identity
    for compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        for other in (device.tensor(B), device.put(B), 0.1):
            same(compare(x, other), compare(A, 0.1 if isinstance(other, float) else B))


def test_methods_are_the_ops(device):
    x = device.tensor(A)
    p = device.tensor(A * A + 1)
    for result, expected in ((x.sum(0), A.sum(0)), (x.sum(axis=1, keepdims=True), A.sum(1, keepdims=True)),
                             (x.mean(axis=0), A.mean(0)), (x.max(1), A.max(1)),
                             (x.var(axis=0, ddof=1), A.var(0, ddof=1)), (x.exp(), np.exp(A)), (p.log(), np.log(A * A + 1)),
                             (p.sqrt(), np.sqrt(A * A + 1)),
                             (x.reshape(3, 2), A.reshape(3, 2)), (x.reshape((3, -1)), A.reshape(3, 2)), (x.reshape(-1), A.ravel()),
                             (x.transpose(), A.T),
                             (x.transpose(1, 0), A.T), (x.transpose((1, 0)), A.T), (x[1, ::2], A[1, ::2]), (x @ x.T, A @ A.T),
                             (x ** 2, A ** 2)):
        assert result.requires_grad
        same(result, expected)


def test_errors_of_a_tensor():
    x = mc.Tensor(A, requires_grad=True)
    for call, error, words in (
            (lambda: x.item(), ValueError, r"one element of a Tensor; this one has shape \(2, 3\)"),
            (lambda: len(x.sum()), TypeError, "no length"),
            (lambda: mc.Tensor(x), TypeError, "a Tensor already"),
            (lambda: mc.Tensor(np.arange(3), requires_grad=True), TypeError, "only floating arrays have gradients, not int64"),
            (lambda: mc.Tensor(np.array(["a"])), TypeError, "real numbers"),
            (lambda: mc.Tensor(np.array([1j])), TypeError, "complex"),
            (lambda: mc.Tensor([object()]), TypeError, "object"),
            (lambda: setattr(x, "grad", mc.Tensor(np.ones(3))), ValueError,
             r"float64\(3,\) does not fit a Tensor of float64\(2, 3\)"),
            (lambda: setattr(mc.Tensor(A), "grad", mc.Tensor(A)), ValueError, "does not require a gradient")):
        with pytest.raises(error, match=words):
            call()


def test_requires_grad_can_be_set_and_taken_back():
    x = mc.Tensor(A)
    assert not (x * 2.0).requires_grad
    x.requires_grad = True
    y = x * 2.0
    x.requires_grad = False
    assert not (x * 2.0).requires_grad
    y.sum().backward()                                      # the tape built before goes on working
    assert x.grad is None
    assert isinstance(y.detach().node, Node | None)


# ---------------------------------------------------------------- random expressions

def _fit(f):
    """Make a binary operation that takes any two shapes: what does not broadcast is summed first."""
    def fitted(a, b):
        try:
            np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            a, b = a.sum(), b.sum()
        return f(a, b)
    return fitted


# (on Tensors, on NumPy arrays); none grows fast, none has a kink.
UNARY = [(ops.tanh, np.tanh), (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
         (lambda x: ops.exp(ops.tanh(x)), lambda x: np.exp(np.tanh(x))),
         (lambda x: ops.log(x * x + 1.0), lambda x: np.log(x * x + 1)),
         (lambda x: ops.sqrt(x * x + 1.0), lambda x: np.sqrt(x * x + 1)),
         (lambda x: -x, lambda x: -x), (lambda x: x.T, lambda x: x.T), (lambda x: x.sum(), lambda x: x.sum()),
         (lambda x: x.reshape(-1)[::-1], lambda x: x.reshape(-1)[::-1]),
         (lambda x: x.mean(keepdims=True), lambda x: x.mean(keepdims=True)),
         (lambda x: ops.pad(x.reshape(-1), 1), lambda x: np.pad(x.reshape(-1), 1)),
         (lambda x: ops.tanh(x) ** 3, lambda x: np.tanh(x) ** 3),
         (lambda x: ops.softmax(x.reshape(-1)), lambda x: np.exp(x.reshape(-1)) / np.exp(x).sum()),
         (lambda x: ops.concatenate([x.reshape(-1), x.reshape(-1) * 0.5]),
          lambda x: np.concatenate([x.reshape(-1), x.reshape(-1) * 0.5])),
         (lambda x: ops.tanh(x.reshape(1, -1) @ x.reshape(-1, 1)), lambda x: np.tanh(x.reshape(1, -1) @ x.reshape(-1, 1)))]
BINARY = [(_fit(f), _fit(f)) for f in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a / (b * b + 1.0))]
BINARY += [(_fit(lambda a, b: a * ops.tanh(b)), _fit(lambda a, b: a * np.tanh(b)))]


@st.composite
def programs(draw):
    """A few leaves, and steps that each apply an operation to earlier values: a random graph, shared nodes included."""
    shapes = draw(st.lists(st.sampled_from([(2, 3), (3,), (2, 1), (), (1, 3)]), min_size=1, max_size=3))
    steps = []
    for i in range(len(shapes), len(shapes) + draw(st.integers(1, 7))):
        earlier = st.integers(0, i - 1)
        steps.append((draw(st.integers(0, len(UNARY) + 2 * len(BINARY) - 1)), draw(earlier), draw(earlier)))
    return shapes, steps, draw(st.integers(0, 2**32 - 1))


def run_program(steps, values, side):
    values = list(values)
    for which, i, j in steps:
        if which < len(UNARY):
            values.append(UNARY[which][side](values[i]))
        else:
            values.append(BINARY[(which - len(UNARY)) % len(BINARY)][side](values[i], values[j]))
    return values[-1]


@hypothesis.given(programs())
def test_random_expressions_against_finite_differences(device, program):
    shapes, steps, seed = program
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(rng.uniform(-1, 1, shape)) for shape in shapes]
    leaves = device.tensors(arrays)
    y = run_program(steps, leaves, 0)
    expected = np.asarray(run_program(steps, arrays, 1))
    same(y, expected)
    c = np.asarray(rng.standard_normal(y.shape))
    gradients = mc.grad(y, leaves, device.put(c), retain_graph=True)
    direction = [np.asarray(rng.uniform(-1, 1, shape)) for shape in shapes]
    numeric = derivative(lambda *moved: inner(np.asarray(run_program(steps, moved, 1)), c), arrays, direction)
    analytic = sum(inner(g, d) for g, d in zip(gradients, direction, strict=True))
    scale = 1 + np.abs(expected * c).sum() + sum(np.abs(host(g)).sum() for g in gradients)
    assert abs(numeric - analytic) <= 1e-7 * scale
    for g, again in zip(gradients, mc.grad(y, leaves, device.put(c), create_graph=True), strict=True):
        same(again, g, 1e-9)
    check_higher_order(lambda *t: run_program(steps, t, 0), arrays, device, 2, limit=1e-5)


def test_an_input_named_twice_gets_two_gradients_of_their_own():
    x = mc.Tensor(np.arange(3.0), requires_grad=True)
    first, second = mc.grad((x * x).sum(), [x, x])
    first.data += 1.0
    same(second, 2 * x.data)
