"""Every operation in the table of `cases.py`, on every device: its value, its gradients, their gradients, its dtype."""
import numpy as np
import pytest
import standin
from op_cases import CASES
from witnesses import Device, check_gradients, check_higher_order, host, same

import minicnn as mc
from minicnn import backend
from minicnn.autograd import Node, Op

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_value_and_gradients(case, device):
    check_gradients(case.on(device), case.expected, case.inputs, device)


@pytest.mark.parametrize("order", [2, 3])
@each_case
def test_gradients_of_gradients(case, device, order):
    check_higher_order(case.on(device), case.inputs, device, order)


@each_case
def test_plain_arrays_give_a_plain_array(case, device):
    """No Tensor in, no Tensor out, and the same numbers; the arguments come out as they went in."""
    arrays = [device.put(a) for a in case.inputs]
    y = case.on(device)(*arrays)
    assert backend.is_array(y) or (device.name == "cpu" and isinstance(y, np.float64))     # a last step by NumPy's own operator
    same(y, case.expected(*case.inputs))
    for array, before in zip(arrays, case.inputs, strict=True):
        np.testing.assert_array_equal(host(array), before)


def in_float32(case, device):
    """The case's output, its gradients, and then the gradients of these, all from float32 arrays."""
    leaves = device.tensors([a.astype(np.float32) for a in case.inputs])
    y = case.on(device, np.float32)(*leaves)
    dy = device.tensor(np.random.default_rng(0).standard_normal(y.shape, dtype=np.float32))
    first = mc.grad(y, leaves, dy, retain_graph=True)
    graph = mc.grad(y, leaves, dy, create_graph=True)
    second = mc.grad([(g * g).sum() for g in graph], [*leaves, dy])
    return y, first, [*graph, *second]


@each_case
def test_float32_stays_float32(case, device):
    y, first, rest = in_float32(case, device)
    assert {t.dtype for t in (y, *first, *rest)} == {np.dtype(np.float32)}
    leaves = device.tensors(case.inputs)
    exact = case.on(device)(*leaves)
    same(y, exact, 1e-5)
    dy = device.tensor(np.asarray(np.random.default_rng(0).standard_normal(y.shape, dtype=np.float32), float))
    for g, expected in zip(first, mc.grad(exact, leaves, dy), strict=True):
        same(g, expected, 1e-4)


@each_case
def test_defect_a_numpy_scalar_makes_everything_float64(case, monkeypatch):
    """Not one float64 array is made on the way, which the stand-in sees and a result's dtype alone would not tell."""
    made, init = [], standin.ndarray.__init__

    def watched(self, array):
        made.append(array.dtype)
        init(self, array)

    monkeypatch.setattr(standin.ndarray, "__init__", watched)
    in_float32(case, Device("standin"))
    assert np.float32 in made
    assert np.float64 not in made


def test_the_table_covers_every_backward_of_every_op(monkeypatch):
    """Each registered backward, composed and fused, runs for some case: a new op without a case fails here."""
    covered, pull = set(), Node.pull

    def watched(self, dy, leads, create_graph, written):
        covered.update((self.op.__name__, key if isinstance(key, str) else key[0], bool(self.op.fused) and not create_graph)
                       for key, parent in self.parents.items() if parent in leads)
        return pull(self, dy, leads, create_graph, written)

    monkeypatch.setattr(Node, "pull", watched)
    for case in CASES:
        in_float32(case, Device("cpu"))
    every_op = [op for op in vars(mc.ops).values() if isinstance(op, Op)]
    assert len(every_op) >= 30
    expected = {(op.__name__, target, fused) for op in every_op for fused, rules in ((False, op.composed), (True, op.fused))
                for rule in rules for target in rule.targets}
    assert expected - covered == set()
    assert len({case.name for case in CASES}) == len(CASES)
