"""The recording of a pass: every step, every gradient, layers and their hooks, as plain data; and nothing where nobody records."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import minicnn as mc
from minicnn.autograd import recorder
from minicnn.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential

LABELS = np.array([1, 0, 2])


def small(dtype=np.float64, names=("conv1", "block")):
    return Sequential([Conv2d(4, 3, padding=1).named(names[0]), BatchNorm2d(), ReLU(),
                       Residual([Conv2d(4, 3, padding=1), ReLU()]).named(names[1]),
                       GlobalAvgPool2d(), Linear(3).named("head")], in_shape=(2, 5, 5), seed=3, dtype=dtype)


def images(dtype=np.float64):
    return np.random.default_rng(0).normal(size=(3, 2, 5, 5)).astype(dtype)


def recorded(model, x, **options):
    with mc.study.record(**options) as tape:
        loss = mc.ops.cross_entropy(model(x, train=True), LABELS)
        loss.backward()
    return tape, loss


def test_every_step_with_its_layer_its_values_and_its_times():
    x = mc.Tensor(images(), requires_grad=True)
    tape, loss = recorded(small(), x)
    assert [(s.path, s.layer, s.op) for s in tape.steps[:6]] == [
        ("conv1", "Conv2d", "conv2d"), ("1", "BatchNorm2d", "normalize"), ("2", "ReLU", "relu"),
        ("block.body.0", "Conv2d", "conv2d"), ("block.body.1", "ReLU", "relu"), ("block", "Residual", "add")]
    assert tape.steps[-1].op == "softmax_cross_entropy" and tape.steps[-1].path == ""
    assert tape.steps[-1].output.array == loss.item() and tape.steps[-1].grad == 1.0
    for step in tape.steps:
        assert step.forward_seconds > 0 and step.backward_seconds > 0
        assert step.output.made_by == step.number and step.grad.shape == step.output.shape
        assert all(type(v.array) is np.ndarray for v in step.inputs.values())
    conv, norm = tape.steps[0], tape.steps[1]
    assert norm.inputs["x"] is conv.output and conv.output.used_by == [1]
    assert conv.inputs["weight"].name == "conv1.weight" and conv.inputs["weight"].kind == "parameter"
    assert conv.inputs["x"].name == "input" and conv.options["padding"] == 1
    assert conv.multiply_adds == 3 * 4 * 25 * 2 * 9 and tape.steps[2].multiply_adds == 0
    assert tape.steps[-2].multiply_adds == 3 * 3 * 4
    assert {"x", "weight"} <= set(conv.kept) and conv.kept_bytes == conv.kept["x"].nbytes + conv.kept["weight"].nbytes
    assert "batch_var" in norm.kept and np.allclose(norm.kept["batch_mean"], conv.output.array.mean((0, 2, 3)))


def test_every_gradient_of_the_pass_is_there():
    model, x = small(), mc.Tensor(images(), requires_grad=True)
    tape, _ = recorded(model, x)
    by_name = {v.name: v for v in tape.values}
    for name, p in model.named_parameters().items():
        assert np.array_equal(by_name[name].grad, p.grad.numpy()), name
    assert np.array_equal(by_name["input"].grad, x.grad.numpy())
    # Of what a step made: what `grad` says of it, on an unrecorded pass with that value as its input.
    relu = tape.steps[2].output
    assert relu.used_by == [3, 5]                               # the body, and the shortcut around it
    h = mc.Tensor(relu.array, requires_grad=True)
    out = h
    for layer in model.layers[3:]:
        out = layer(out, train=True)
    expected, = mc.grad(mc.ops.cross_entropy(out, LABELS), h)
    assert np.allclose(relu.grad, expected.numpy(), rtol=1e-12, atol=0)
    add = tape.steps[5]
    assert np.allclose(tape.steps[3].input_grads["x"] + add.input_grads["b"], relu.grad, rtol=1e-12)
    assert np.array_equal(add.input_grads["a"], add.grad)


def test_only_what_is_asked_for_has_a_gradient():
    model = small()
    tape, _ = recorded(model, images())
    assert set(tape.steps[0].input_grads) == {"weight", "bias"} and tape.steps[0].inputs["x"].grad is None
    with mc.study.record() as tape, mc.no_grad():
        model(images())
    assert len(tape) > 10 and all(s.kept == {} and s.grad is None and s.backward_seconds is None for s in tape)
    assert all(step.inputs["x"] is before.output for before, step in zip(tape.steps, tape.steps[1:], strict=False)
               if step.op == "relu")                            # values are known without the engine's tape, too


def test_fused_or_as_the_list_is_written():
    x = images()
    plain, loss = recorded(small(), x)
    joined, other = recorded(small(), x, fused=True)
    assert "normalize_relu" not in {s.op for s in plain} and "normalize_relu" in {s.op for s in joined}
    assert len(joined) < len(plain) and joined.steps[0].path == "conv1"
    assert loss.item() == pytest.approx(other.item(), rel=1e-12)


def test_what_is_recorded_is_what_happens_unrecorded():
    model, again = small(), small()
    with mc.layers.fusion(False):
        mc.ops.cross_entropy(again(images(), train=True), LABELS).backward()
    recorded(model, images())
    for name, p in model.named_parameters().items():
        assert np.array_equal(p.grad.numpy(), again.named_parameters()[name].grad.numpy()), name
    assert recorder() is None


def test_the_recording_is_a_copy():
    model = small()
    tape, _ = recorded(model, images())
    weight = tape.steps[0].inputs["weight"]
    before, grad = weight.array.copy(), weight.grad.copy()
    mc.optim.SGD(model.parameters(), lr=1.0, momentum=0.9).step()
    model.parameters()[0].grad.data[...] = 7
    assert np.array_equal(weight.array, before) and np.array_equal(weight.grad, grad)


def test_an_argument_twice_a_list_and_a_number():
    with mc.study.record() as tape:
        x = mc.Tensor(np.array([1.0, -2.0]), requires_grad=True)
        y = mc.ops.concatenate([x * x, x * 3.0, np.ones(2)])
        y.sum().backward()
    square, triple, joined, _ = tape.steps
    assert [s.op for s in tape] == ["mul", "mul", "concatenate", "sum"] and square.path == square.layer == ""
    assert square.inputs["a"] is square.inputs["b"] and square.inputs["a"].used_by == [0, 1]
    assert np.array_equal(square.input_grads["a"], [1, -2]) and np.array_equal(square.input_grads["b"], [1, -2])
    assert np.array_equal(square.inputs["a"].grad, [5, -1]) and square.inputs["a"].kind == "leaf"
    assert triple.options == {"b": 3.0}
    assert list(joined.inputs) == ["arrays[0]", "arrays[1]", "arrays[2]"] and joined.inputs["arrays[2]"].kind == "constant"
    assert joined.options == {"axis": 0}


def test_layers_and_their_hooks():
    seen = []
    model = small()
    with mc.study.record() as tape:
        tape.on_forward("block", lambda call: seen.append(("forward", call.path, call.output.array.shape, call.output.grad)))
        tape.on_backward("block*", lambda call: seen.append(("backward", call.path, call.layer, call.output.grad is not None)))
        tape.on_backward("head", lambda call: seen.append(("bias", tape.steps[call.first].inputs["bias"].grad is not None)))
        mc.ops.cross_entropy(model(images(), train=True), LABELS).backward()
    assert seen[0] == ("forward", "block", (3, 4, 5, 5), None)
    assert seen[1] == ("bias", True)
    assert [s[1] for s in seen[2:]] == ["block.body.1", "block.body.0", "block.body", "block"] and all(s[3] for s in seen[2:])
    whole, block = tape.layers[0], next(c for c in tape.layers if c.path == "block")
    assert (whole.path, whole.depth, whole.first, whole.behind) == ("", 0, 0, len(tape) - 1)
    assert [tape.steps[i].op for i in range(block.first, block.behind)] == ["conv2d", "relu", "add"]
    shortcut = next(c for c in tape.layers if c.path == "block.shortcut")
    assert shortcut.first == shortcut.behind and shortcut.output is shortcut.input
    assert [s.number for s in tape.steps_of("block")] == [3, 4, 5]


def test_a_layer_is_through_behind_its_first_step_even_if_that_keeps_nothing():
    class Minus(mc.layers.Layer):
        def forward(self, x, train, rng):
            return mc.ops.exp(-x)                   # the negative keeps nothing for its backward

    layer, seen = Minus(), []
    layer.build((3,), np.random.default_rng(0), np.float64)
    with mc.study.record() as tape:
        tape.on_backward("*", lambda call: seen.append([s.backward_seconds is not None for s in tape.steps[:2]]))
        layer(mc.Tensor(np.ones((1, 3)), requires_grad=True)).sum().backward()
    assert [s.op for s in tape] == ["neg", "exp", "sum"] and tape.steps[0].kept == {} and seen == [[True, True]]


def test_an_error_inside_leaves_no_recorder_behind():
    with pytest.raises(ValueError, match="head"), mc.study.record() as tape:
        Sequential([Linear(2).named("head")], in_shape=(3,))(np.ones((1, 4), np.float32))
    assert recorder() is None and tape.steps == []


def test_second_order_is_recorded_too():
    x = mc.Tensor(np.array([2.0]), requires_grad=True)
    with mc.study.record() as tape:
        g, = mc.grad((x * x * x).sum(), x, create_graph=True)
        g.sum().backward()
    assert x.grad.numpy() == pytest.approx([12.0])
    assert [s.op for s in tape.steps[:3]] == ["mul", "mul", "sum"] and len(tape) > 5         # the backwards are steps themselves


def test_nobody_waits_for_it_who_does_not_ask():
    code = "import sys, minicnn; assert 'minicnn.study' not in sys.modules; print(minicnn.study.record.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "record\n"


def test_json_is_json_whatever_is_in_it():
    model = small(names=('a"b</script>\u2028', "block"))
    tape, _ = recorded(model, np.where(images() > 2, np.nan, images()))
    data = json.loads(tape.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert data["steps"][0]["path"] == 'a"b</script>\u2028' and data["steps"][0]["op"] == "conv2d"
    assert data["values"][0]["array"]["shape"] == [4, 2, 3, 3] and "numbers" not in data["values"][0]["array"]
    tape, _ = recorded(small(), images())
    data = json.loads(tape.to_json(arrays=True))
    weight = next(v for v in data["values"] if v["name"] == "head.weight")
    value = next(v for v in tape.values if v.name == "head.weight")
    assert np.array_equal(np.reshape(weight["grad"]["numbers"], weight["grad"]["shape"]), value.grad)
    assert data["steps"][0]["kept"]["padding"] == 1 and data["layers"][1]["path"] == "conv1"


def test_dot_has_the_branches():
    tape, _ = recorded(small(names=('a"b\\', "block")), images())
    dot = tape.to_dot()
    edges = set(re.findall(r"^  (\w+) -> (\w+) ", dot, re.M))
    assert {("s2", "s3"), ("s2", "s5"), ("s4", "s5")} <= edges         # around the block, and through it
    assert 'label="conv2d\\na\\"b\\\\"' in dot and dot.count("{") == dot.count("}") == 1


def test_on_every_backend(device):
    x = device.put(images())
    model = small()
    model._map_arrays(device.put)
    tape, _ = recorded(model, mc.Tensor(x, requires_grad=True))
    assert all(type(v.array) is np.ndarray and type(v.grad) is np.ndarray for v in tape.values if v.kind != "constant")
