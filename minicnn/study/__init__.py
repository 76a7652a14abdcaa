"""A forward and a backward pass, laid open: recorded step by step, and shown.

    with mc.study.record() as tape:
        loss = mc.ops.cross_entropy(model(images, train=True), labels)
        loss.backward()
    for step in tape.steps:
        print(step.path, step.op, step.output.shape, step.forward_seconds, step.backward_seconds)
"""
from minicnn.study.recording import record
from minicnn.study.tape import LayerCall, Step, Tape, Value

__all__ = ["LayerCall", "Step", "Tape", "Value", "record"]
