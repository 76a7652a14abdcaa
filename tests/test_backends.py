"""One code on every backend: NumPy's numbers, no waiting of the host, nothing that leaves the device, and ways between them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import standin
from op_cases import CASES
from witnesses import Device, host, same

import minicnn as mc
from minicnn import backend, ops

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CPU = Device("cpu")


# ---------------------------------------------------------------- the same numbers

def run(case, device):
    """Output, gradients, and the gradient of their sum of squares, in float32."""
    leaves = device.tensors([a.astype(np.float32) for a in case.inputs])
    y = case.on(device, np.float32)(*leaves)
    dy = device.put(np.random.default_rng(0).standard_normal(y.shape, dtype=np.float32))
    first = mc.grad(y, leaves, dy, retain_graph=True)
    graph = mc.grad(y, leaves, dy, create_graph=True)
    return [y, *first, *mc.grad([(g * g).sum() for g in graph], leaves)]


@each_case
def test_every_op_computes_what_numpy_computes_and_stays_where_it_is(case, device):
    for result, expected in zip(run(case, device), run(case, CPU), strict=True):
        assert backend.device_of(result.data) == device.name
        assert result.dtype == np.float32
        same(result, host(expected), 0 if device.name == "cpu" else 1e-4)      # on the CPU it is the same run twice, to the bit


# ---------------------------------------------------------------- nothing waits for the device

def small_network(x, labels, parameters, running, dropout_rng):
    """Every operation a training step of VGG or ResNet goes through."""
    w1, g1, b1, w2, bias2, w3, bias3 = parameters
    y = ops.conv2d(x, w1, padding=1)
    y = ops.relu(ops.batch_norm(y, g1, b1, *running, train=True))
    y = ops.max_pool2d(y, 3, 2, 1)
    y = ops.relu(ops.conv2d(y, w2, bias2, stride=1, padding=1) + y)                     # a residual addition
    y = ops.concatenate([y[:, :, ::2, ::2], ops.avg_pool2d(y, 2)], axis=1)
    y = ops.pad(y, ((0, 0), (0, 0), (1, 0), (0, 1)))
    y = ops.adaptive_avg_pool2d(y, (2, 1)).reshape(len(y), -1)
    y = ops.dropout(y, 0.3, train=True, rng=dropout_rng)
    logits = ops.linear(y, w3, bias3)
    return ops.cross_entropy(logits, labels, label_smoothing=0.1) + 1e-4 * (w1 * w1).sum()


def network_arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 3, 3), 4, 4, (4, 4, 3, 3), 4, (10, 16), 10]
    parameters = [(rng.standard_normal(s) * 0.3 + (i == 1)).astype(dtype) for i, s in enumerate(shapes)]
    return rng.standard_normal((5, 3, 8, 8)).astype(dtype), rng.integers(0, 10, 5), parameters, [np.zeros(4, dtype),
                                                                                                 np.ones(4, dtype)]


def training_step(device, dtype=np.float32, order=1):
    x, labels, parameters, running = network_arrays(dtype)
    leaves, running = device.tensors(parameters), [device.put(r) for r in running]
    loss = small_network(device.tensor(x, requires_grad=False), labels, leaves, running, np.random.default_rng(1))
    gradients = mc.grad(loss, leaves, create_graph=order > 1)
    if order > 1:                                           # a Hessian-vector product
        gradients = mc.grad([(g * g.detach()).sum() for g in gradients], leaves)
    return loss, gradients, running


@pytest.mark.parametrize("order", [1, 2])
def test_a_training_step_never_waits_for_the_device(order):
    """No float(), no bool(), no boolean mask, no upload of an index: labels come from the host and are checked there."""
    with standin.host_syncs() as syncs:
        training_step(Device("standin"), order=order)
    assert syncs == []


def test_inference_never_waits_for_the_device():
    device = Device("standin")
    x, _, (w, g, b, *_), running = network_arrays()
    tensors, running = device.tensors([x, w, g, b]), [device.put(r) for r in running]
    with standin.host_syncs() as syncs, mc.no_grad():
        y = ops.batch_norm(ops.conv2d(*tensors[:2]), *tensors[2:], *running, train=False)
        ops.softmax(ops.global_avg_pool2d(ops.relu(y)))
    assert syncs == []


@pytest.mark.parametrize("order", [1, 2])
def test_a_training_step_agrees_with_numpy(device, order):
    for dtype, limit in ((np.float64, 1e-9), (np.float32, 1e-3)):
        loss, gradients, running = training_step(device, dtype, order)
        expected_loss, expected, expected_running = training_step(CPU, dtype, order)
        same(loss, host(expected_loss), limit)
        for g, e in zip([*gradients, *running], [*expected, *expected_running], strict=True):
            same(g, host(e), limit)


@pytest.mark.parametrize("order", [1, 2])
def test_a_float32_step_makes_no_float64_array(monkeypatch, order):
    """Every array that comes into being on the stand-in is looked at, those that are gone at the end of a line included."""
    made, init = [], standin.ndarray.__init__

    def watched(self, array):
        made.append(array.dtype)
        init(self, array)

    monkeypatch.setattr(standin.ndarray, "__init__", watched)
    training_step(Device("standin"), np.float32, order)
    assert len(made) > 100
    assert np.float64 not in made


# ---------------------------------------------------------------- both in one process, and between them

def test_two_backends_take_turns_in_one_process(device):
    """No switch is set: an op goes where its arrays are."""
    results = []
    for where in (CPU, device, CPU, device):
        x, weight = where.tensors([np.ones((1, 1, 3, 3)), np.full((1, 1, 2, 2), 2.0)])
        y = ops.relu(ops.conv2d(x, weight)).sum()
        y.backward()
        assert backend.device_of(weight.grad.data) == where.name
        results.append(host(weight.grad))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_gradient_finds_its_way_back_from_another_device(device):
    x = CPU.tensor(np.array([1.0, 2.0, 3.0]))
    there = x.to(device.name)
    assert backend.device_of(there.data) == device.name
    (there * there).sum().backward()
    assert backend.device_of(x.grad.data) == "cpu"
    same(x.grad, np.array([2.0, 4.0, 6.0]))
    y = (x.to(device.name) ** 3).to("cpu").sum()
    g, = mc.grad(y, x, create_graph=True)
    same(mc.grad(g.sum(), x)[0], np.array([6.0, 12.0, 18.0]))
    assert x.to("cpu") is x
    t = device.tensor(np.ones(2))
    assert t.to(device.name) is t
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        x.to("tpu")


def test_defect_the_gpu_path_calls_numpy_on_device_data():
    """np.arange, np.zeros or np.asarray beside device data: the ops that need an index or a mask of their own make it there."""
    device = Device("standin")
    z = device.tensor(np.array([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]))
    for y in (z.max(), z.max(1), ops.cross_entropy(z, [1, 2]), z[:, device.put(np.array([0, 0]))], ops.concatenate([z, z]),
              ops.max_pool2d(z.reshape(1, 1, 2, 3), 2, 1, 1), ops.adaptive_avg_pool2d(z.reshape(1, 1, 2, 3), (1, 2)),
              ops.dropout(z, 0.5, train=True, rng=np.random.default_rng(0))):
        g, = mc.grad(y.sum(), z, create_graph=True)
        assert type(y.data) is type(g.data) is standin.ndarray


def test_reading_a_result_is_what_waits():
    """item(), float(), numpy(), printing: the host asks, and the host waits."""
    t = Device("standin").tensor(np.array(2.0))
    for read in (lambda: t.item(), lambda: float(t), lambda: t.numpy(), lambda: repr(t), lambda: bool(t)):
        with standin.host_syncs() as syncs:
            read()
        assert len(syncs) == 1


# ---------------------------------------------------------------- the suite's own switch

def test_require_gpu_turns_skips_into_failures():
    """In a process that can see no GPU: `-m gpu` skips with the reason, and under MINICNN_REQUIRE_GPU=1 it fails with it."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-rs",
               f"{here.parent}/test_movement.py", "-k", "test_var or test_the_gradient_of_a_view"]
    for require, code, words in (("0", 0, "2 skipped"), ("1", 1, "2 errors")):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "MINICNN_REQUIRE_GPU": require}
        done = subprocess.run(command, env=environment, cwd=here.parent.parent, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert words in done.stdout
        assert "To mend it:" in done.stdout                 # the probe's own words
        assert ("MINICNN_REQUIRE_GPU=1, and this GPU test did not run" in done.stdout) == (require == "1")
