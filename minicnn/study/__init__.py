"""A forward and a backward pass, laid open: recorded step by step, and shown.

    with mc.study.record() as tape:
        loss = mc.ops.cross_entropy(model(images, train=True), labels)
        loss.backward()
    for step in tape.steps:
        print(step.path, step.op, step.output.shape, step.forward_seconds, step.backward_seconds)

And what is read off such passes: which pixels a layer sees (`receptive_fields`, `effective_receptive_field`), which ones a class's
score hangs on (`saliency`, `grad_cam`), and what residual additions are for (the module `compare`).
"""
from minicnn.study.attribution import Cam, grad_cam, saliency
from minicnn.study.receptive import Field, effective_receptive_field, receptive_fields
from minicnn.study.recording import record
from minicnn.study.tape import LayerCall, Step, Tape, Value

__all__ = [
    "Cam", "Field", "LayerCall", "Step", "Tape", "Value",
    "effective_receptive_field", "grad_cam", "receptive_fields", "record", "saliency",
]
