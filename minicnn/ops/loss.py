"""What training makes small."""
from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.autograd import Tensor, op
from minicnn.backend import Array, device_of, is_array, to_device
from minicnn.kernels import loss as kernels
from minicnn.ops.activation import softmax
from minicnn.ops.movement import widened


def cross_entropy(logits: Any, labels: Any, label_smoothing: float = 0.0) -> Any:
    """The mean over the batch of -log(the probability that softmax(logits) gives to the label): a scalar, in nats.

    logits: (N, classes).   labels: (N,) integers; a NumPy array serves logits on any device, and is checked without waiting for it.
    label_smoothing: this share of the target is spread evenly over all classes.
    Of logits of half precision the loss is float32.
    Raises ValueError for a label that is no class: an index is never wrapped around.
    """
    labels = labels.data if isinstance(labels, Tensor) else labels if is_array(labels) else np.asarray(labels)
    _check(logits, labels, label_smoothing)
    data = logits.data if isinstance(logits, Tensor) else logits
    return softmax_cross_entropy(widened(logits), to_device(labels, device_of(data)), label_smoothing)


@op
def softmax_cross_entropy(logits: Array, labels: Array, label_smoothing: float = 0.0) -> Array:
    """y = mean_n (log sum_j e^(z_nj) - sum_j t_nj z_nj)      dz = dy (softmax(z) - t) / N

    with the target t: 1 at the label, 0 elsewhere, before smoothing. Labels are taken to be in range.
    """
    return kernels.cross_entropy(logits, labels, label_smoothing)


@softmax_cross_entropy.backward("logits")
def softmax_cross_entropy_dlogits(dy, logits, labels, label_smoothing):
    target = kernels.distribution(labels, logits.shape[1], label_smoothing, logits.dtype)
    return (softmax(logits) - target) * (dy * (1.0 / len(labels)))


@softmax_cross_entropy.backward("logits", fused=True)
def softmax_cross_entropy_fused_dlogits(dy, logits, labels, label_smoothing):
    return kernels.cross_entropy_grad(dy, logits, labels, label_smoothing)


def _check(logits: Any, labels: Array, label_smoothing: float) -> None:
    if logits.ndim != 2 or tuple(labels.shape) != tuple(logits.shape[:1]) or not len(labels):
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)} must be (N, classes) and labels {tuple(labels.shape)} (N,), "
                         "one label an image, with N of at least 1")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: labels must be integers, the index of each image's class, not {labels.dtype}; "
                        "one-hot rows become indices with onehot.argmax(1)")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing} must be a share between 0 and 1")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= logits.shape[1]:
        raise ValueError(f"cross_entropy: label {least if least < 0 else most} is no class: logits {tuple(logits.shape)} "
                         f"have the classes 0 to {logits.shape[1] - 1}")
