"""Optimisers, step by step: by hand, and where PyTorch is installed against its own in float64; schedules; states."""
import math

import numpy as np
import pytest

import minicnn as mc
from minicnn.autograd import Tensor
from minicnn.backend import device_of
from minicnn.optim import SGD, AdamW, constant_schedule, cosine_schedule, step_schedule, warmup

SHAPES = [(4, 3, 3, 3), (5,), (2, 7), ()]


def parameters(dtype=np.float64, put=np.asarray, shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [Tensor(put(np.asarray(rng.standard_normal(shape), dtype)), requires_grad=True) for shape in shapes]


def give_gradients(params, step, put=np.asarray):
    """Made-up gradients of wide range; some parameters have none in some steps."""
    rng = np.random.default_rng([7, step])
    for i, p in enumerate(params):
        g = np.asarray(rng.standard_normal(p.shape) * 10.0 ** rng.integers(-3, 3), p.dtype)
        p.grad = None if (step + i) % 4 == 0 and step % 3 else Tensor(put(g))


def values(params):
    return [p.numpy().copy() for p in params]


def assert_same(a, b):
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


SETTINGS = [
    (SGD, {"lr": 0.1}), (SGD, {"lr": 0.1, "weight_decay": 0.05}), (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}), (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.05, "nesterov": True}), (SGD, {"lr": 0.0, "momentum": 0.9}),
    (AdamW, {}), (AdamW, {"lr": 0.01, "weight_decay": 0.0}), (AdamW, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}),
    (AdamW, {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.5})]
every_setting = pytest.mark.parametrize("kind, settings", SETTINGS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))


# ---------------------------------------------------------------- by hand
def sgd_by_hand(p, gradients, lr, momentum=0.0, weight_decay=0.0, nesterov=False):
    velocity = None
    for g in gradients:
        g = g + weight_decay * p
        velocity = g if velocity is None else momentum * velocity + g
        p = p - lr * (g + momentum * velocity if nesterov else velocity)
    return p


def adamw_by_hand(p, gradients, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """Both averages written out as sums over all gradients so far."""
    b1, b2 = betas
    for t in range(1, len(gradients) + 1):
        m = (1 - b1) * sum(b1 ** (t - i) * g for i, g in enumerate(gradients[:t], 1)) / (1 - b1 ** t)
        v = (1 - b2) * sum(b2 ** (t - i) * g * g for i, g in enumerate(gradients[:t], 1)) / (1 - b2 ** t)
        p = p - lr * weight_decay * p - lr * m / (np.sqrt(v) + eps)
    return p


@every_setting
def test_the_updates_are_the_documented_ones(kind, settings, device):
    rng, by_hand = np.random.default_rng(3), sgd_by_hand if kind is SGD else adamw_by_hand
    start, gradients = rng.standard_normal((3, 4)), [rng.standard_normal((3, 4)) for _ in range(6)]
    p = device.tensor(start)
    array, optimizer = p.data, kind([p], **settings)
    for g in gradients:
        p.grad = device.tensor(g, requires_grad=False)
        optimizer.step()
    np.testing.assert_allclose(p.numpy(), by_hand(start, gradients, **settings), rtol=1e-12)
    assert p.data is array, "a parameter moves in place"
    assert device_of(p.data) == device.name


@every_setting
@pytest.mark.parametrize("transposed", [False, True])
def test_large_parameters_move_by_the_same_rule(kind, settings, transposed, device):
    """Larger than any piece that an update may be cut into, and not a multiple of one; in either order of memory."""
    rng, by_hand = np.random.default_rng(3), sgd_by_hand if kind is SGD else adamw_by_hand
    start, gradients = rng.standard_normal((70, 1001)), [rng.standard_normal((70, 1001)) for _ in range(3)]
    array = device.put(start.T).T if transposed else device.put(start)
    p = Tensor(array, requires_grad=True)
    optimizer = kind([p], **settings)
    for g in gradients:
        p.grad = device.tensor(g, requires_grad=False)
        optimizer.step()
    np.testing.assert_allclose(p.numpy(), by_hand(start, gradients, **settings), rtol=1e-12, atol=1e-14)
    assert p.data is array


@every_setting
def test_a_gradient_is_not_written_into_nor_kept(kind, settings):
    p, g = Tensor(np.ones(3), requires_grad=True), np.array([1.0, -2.0, 3.0])
    optimizer = kind([p], **settings)
    p.grad = Tensor(g)
    for _ in range(3):
        optimizer.step()
    np.testing.assert_array_equal(g, [1, -2, 3])
    before = optimizer.state_dict()["memory"]["0"]
    g[...] = 1e6
    assert all(np.array_equal(before[name], v) for name, v in optimizer.state_dict()["memory"]["0"].items())


@every_setting
def test_a_parameter_without_gradient_stays_bit_for_bit_weight_decay_and_momentum_or_not(kind, settings):
    a, b = parameters(shapes=[(3,), (3,)])
    optimizer = kind([a, b], **settings)
    for step in range(3):
        give_gradients([a, b], step * 12)
        optimizer.step()
    held = b.numpy().copy()
    b.grad = None
    optimizer.step()
    a.requires_grad = False                         # what freezing does
    held_a = a.numpy().copy()
    optimizer.step()
    optimizer.zero_grad()
    assert_same([a.numpy(), b.numpy()], [held_a, held])


@pytest.mark.parametrize("kind, settings", [
    (SGD, {"lr": np.float64(0.1), "momentum": np.float64(0.9), "weight_decay": np.float64(0.01)}),
    (AdamW, {"lr": np.float64(0.1), "betas": tuple(np.array([0.9, 0.99])), "eps": np.float64(1e-8),
             "weight_decay": np.float64(0.01)})])
def test_numpy_numbers_among_the_settings_count_as_pythons(kind, settings):
    """np.float64(0.1) * float32 array is a float64 array; 0.1 * float32 array is not."""
    params, plain = parameters(np.float32), parameters(np.float32)

    def python(v):
        return tuple(map(float, v)) if isinstance(v, tuple) else float(v)

    optimizers = kind(params, **settings), kind(plain, **{name: python(v) for name, v in settings.items()})
    for step in range(3):
        for optimizer, own in zip(optimizers, (params, plain), strict=True):
            give_gradients(own, step)
            optimizer.step()
    assert_same(values(params), values(plain))
    assert all(type(v) in (float, bool, tuple) for group in optimizers[0].groups for k, v in group.items() if k != "params")
    for memory in optimizers[0].memory:
        assert all(v.dtype == np.float32 for v in memory.values() if hasattr(v, "dtype"))
    optimizers[0].lr = np.float64(0.2)
    assert type(optimizers[0].groups[0]["lr"]) is float


def test_zero_grad_forgets_and_backward_adds():
    p = Tensor(np.ones(3), requires_grad=True)
    optimizer = SGD([p], 0.1)
    for expected in (1, 2):
        p.sum().backward()
        np.testing.assert_array_equal(p.grad.numpy(), np.full(3, expected))
    optimizer.zero_grad()
    assert p.grad is None


# ---------------------------------------------------------------- against PyTorch, update by update
def torch_optimizer(kind, torch, params, **settings):
    return (torch.optim.SGD if kind is SGD else torch.optim.AdamW)(params, **settings)


def compare_with_pytorch(ours, theirs, mine, yours, steps=12, schedule=None):
    torch = pytest.importorskip("torch")
    for step in range(steps):
        if schedule is not None:
            ours.lr = schedule(step)
            for group in theirs.param_groups:
                group["lr"] = schedule(step)
        give_gradients(mine, step)
        for p, q in zip(mine, yours, strict=True):
            q.grad = None if p.grad is None else torch.from_numpy(p.grad.numpy().copy())
        ours.step()
        theirs.step()
        for i, (p, q) in enumerate(zip(mine, yours, strict=True)):
            expected = q.detach().numpy()
            np.testing.assert_allclose(p.numpy(), expected, rtol=0, atol=1e-13 * max(abs(expected).max(), 1),
                                       err_msg=f"parameter {i} after step {step}")


@every_setting
def test_every_update_is_pytorchs(kind, settings):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    mine = parameters()
    yours = [torch.from_numpy(p.numpy().copy()).requires_grad_() for p in mine]
    schedule = warmup(cosine_schedule(settings.get("lr", 1e-3), 12), 3)
    for how in (None, schedule):
        compare_with_pytorch(kind(mine, **settings), torch_optimizer(kind, torch, yours, **settings), mine, yours, schedule=how)


@pytest.mark.parametrize("kind, settings, own", [
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
     [{}, {"lr": 0.01, "momentum": 0.0}, {"weight_decay": 0.0, "nesterov": True}]),
    (AdamW, {"lr": 0.1}, [{"betas": (0.5, 0.9)}, {"weight_decay": 0.3, "lr": 0.2}, {"eps": 0.1}])])
def test_groups_have_settings_of_their_own_as_in_pytorch(kind, settings, own):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    mine = parameters()
    yours = [torch.from_numpy(p.numpy().copy()).requires_grad_() for p in mine]

    def grouped(params):
        return [{"params": params[:1], **own[0]}, {"params": params[1:2], **own[1]}, {"params": params[2:], **own[2]}]

    compare_with_pytorch(kind(grouped(mine), **settings), torch_optimizer(kind, torch, grouped(yours), **settings), mine, yours)


def test_the_learning_rate_of_all_groups_is_set_at_once():
    a, b = parameters(shapes=[(2,), (2,)])
    optimizer = SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1)
    assert (optimizer.lr, [group["lr"] for group in optimizer.groups]) == (0.5, [0.5, 0.1])
    optimizer.lr = 1
    assert [group["lr"] for group in optimizer.groups] == [1.0, 1.0]
    assert [id(p) for p in optimizer.parameters] == [id(a), id(b)]


# ---------------------------------------------------------------- states
@every_setting
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("way", ["memory", ".npz", ".safetensors"])
def test_a_state_continues_bit_for_bit(kind, settings, dtype, way, tmp_path, device):
    if way == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    if way != "memory" and device.name != "cpu":
        return              # a state is the host's, whatever the device
    straight = parameters(dtype, device.put)
    optimizer = kind(straight, **settings)
    for step in range(4):
        give_gradients(straight, step, device.put)
        optimizer.step()

    resumed = [Tensor(device.put(p.numpy()), requires_grad=True) for p in straight]
    state = optimizer.state_dict()
    if way != "memory":
        mc.save(tmp_path / f"state{way}", state)
        state = mc.load(tmp_path / f"state{way}")
    again = kind(resumed, lr=123.0)                 # every setting comes from the state
    again.load_state_dict(state)
    for step in range(4, 9):
        for own, params in ((optimizer, straight), (again, resumed)):
            give_gradients(params, step, device.put)
            own.step()
        assert_same(values(straight), values(resumed))
    assert all(device_of(v) == device.name for m in again.memory for v in m.values() if hasattr(v, "dtype"))


def test_a_state_is_a_copy():
    params = parameters()
    optimizer = SGD(params, 0.1, momentum=0.9)
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    held = state["memory"]["0"]["velocity"].copy()
    give_gradients(params, 3)
    optimizer.step()
    np.testing.assert_array_equal(state["memory"]["0"]["velocity"], held)
    other = SGD(parameters(), 0.1, momentum=0.9)
    other.load_state_dict(state)
    state["memory"]["0"]["velocity"][...] = 7
    np.testing.assert_array_equal(other.memory[0]["velocity"], held)


def trained(make, shapes=SHAPES):
    params = parameters(shapes=shapes)
    optimizer = make(params)
    give_gradients(params, 0)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("other, words", [
    (lambda: trained(lambda p: SGD([{"params": p[:1]}, {"params": p[1:]}], 0.1)), "2 groups"),
    (lambda: trained(lambda p: SGD(p, 0.1, momentum=0.9), [*SHAPES, (3,)]), "5 parameters"),
    (lambda: trained(lambda p: SGD(p, 0.1, momentum=0.9), [(4, 3, 3, 3), (6,), (2, 7), ()]),
     r"parameter 1 has shape \(5,\).*\(6,\)"),
    (lambda: trained(lambda p: AdamW(p, 0.1)), "betas")])
def test_a_state_of_another_optimizer_is_refused_before_anything_changes(other, words):
    optimizer = trained(lambda p: SGD(p, 0.3, momentum=0.9))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(other().state_dict())
    after = optimizer.state_dict()
    assert before["groups"] == after["groups"]
    assert_same([m["velocity"] for m in before["memory"].values()], [m["velocity"] for m in after["memory"].values()])


# ---------------------------------------------------------------- wrong arguments
W = Tensor(np.ones(3), requires_grad=True)


@pytest.mark.parametrize("make, words", [
    (lambda: SGD([], 0.1), "the list is empty"), (lambda: SGD([{"params": []}], 0.1), "the list is empty"),
    (lambda: SGD([np.ones(3)], 0.1), "not ndarray"), (lambda: SGD({"a": W}, 0.1), "not str"),
    (lambda: SGD([W, W], 0.1), "twice, or in two"), (lambda: SGD([{"params": [W]}, {"params": [W]}], 0.1), "two groups"),
    (lambda: SGD(W, 0.1), "a list"), (lambda: SGD([W * 2.0], 0.1), "computed"),
    (lambda: SGD([W], -0.1), "lr=-0.1"), (lambda: SGD([W], math.nan), "lr=nan"),
    (lambda: SGD([W], 0.1, momentum=-1), "momentum=-1"),
    (lambda: SGD([W], 0.1, weight_decay=-1e-4), "weight_decay=-0.0001"),
    (lambda: SGD([W], 0.1, nesterov=True), "set momentum, e.g. 0.9"), (lambda: SGD([{"params": W}], 0.1), "a list"),
    (lambda: SGD([{"params": [W], "momentun": 0.9}], 0.1), "no setting.*momentun"), (lambda: SGD([{"lr": 0.1}], 0.1), "params"),
    (lambda: SGD([{"params": [W], "lr": -1.0}], 0.1), "lr=-1.0"), (lambda: AdamW([W], betas=(0.9, 1.0)), "betas"),
    (lambda: AdamW([W], betas=(0.9,)), "betas"), (lambda: AdamW([W], betas=(-0.1, 0.9)), "betas"),
    (lambda: AdamW([W], eps=-1e-8), "eps"),
    (lambda: AdamW([W], -1.0), "lr=-1.0"), (lambda: AdamW([{"params": [W], "momentum": 0.9}]), "no setting.*momentum"),
    (lambda: cosine_schedule(0.1, 0), "steps=0")])
def test_wrong_arguments_are_refused_in_one_line(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_settings_by_position_are_pytorchs():
    assert SGD([W], 0.1, 0.9, 1e-4, True).groups[0] | {"params": 0} == {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True, "params": 0}
    assert AdamW([W]).groups[0] | {"params": 0} == {
        "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "params": 0}


# ---------------------------------------------------------------- schedules
def test_schedules():
    assert [constant_schedule(0.3)(step) for step in (0, 10 ** 6)] == [0.3, 0.3]
    steps = step_schedule(0.1, [100, 150])
    assert [steps(s) for s in (0, 99)] == [0.1, 0.1]
    assert [steps(s) for s in (100, 149, 150, 10 ** 6)] == pytest.approx([0.01, 0.01, 0.001, 0.001], rel=1e-12)
    assert step_schedule(1.0, [3], factor=0.5)(3) == 0.5
    cosine = cosine_schedule(0.4, 8, final=0.1)
    assert [cosine(s) for s in (0, 2, 4, 6, 8, 9, 100)] == pytest.approx(
        [0.4, 0.1 + 0.15 * (1 + 0.5 ** 0.5), 0.25, 0.1 + 0.15 * (1 - 0.5 ** 0.5), 0.1, 0.1, 0.1], rel=1e-12)
    assert cosine_schedule(0.4, 8)(8) == pytest.approx(0.0, abs=1e-15)


def test_warm_up_climbs_to_where_the_schedule_then_is():
    schedule = warmup(cosine_schedule(0.4, 20), 5, start=0.01)
    top = cosine_schedule(0.4, 20)(5)
    assert [schedule(s) for s in range(6)] == pytest.approx([0.01 + (top - 0.01) * s / 5 for s in range(6)], rel=1e-12)
    assert [schedule(s) for s in (5, 12, 30)] == [cosine_schedule(0.4, 20)(s) for s in (5, 12, 30)]
    assert warmup(constant_schedule(0.1), 0)(0) == 0.1


def test_cosine_and_step_schedules_are_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for ours, make in ((cosine_schedule(0.4, 10, 0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, 0.1)),
                       (step_schedule(0.4, [3, 7]), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7]))):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        scheduler = make(optimizer)
        for step in range(11):
            assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            scheduler.step()
