"""Softmax cross-entropy over plain arrays."""
from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.dispatch import has_cuda_for_real


@has_cuda_for_real
def cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> Array:
    """(N, classes), (N,) -> the mean over the batch of log sum_j e^(z_nj) - sum_j t_nj z_nj, of no dimension."""
    z = logits - logits.max(axis=1, keepdims=True)          # the same loss, and no overflow
    target = distribution(labels, z.shape[1], label_smoothing, z.dtype)
    return (np.log(np.exp(z).sum(axis=1)) - (target * z).sum(axis=1)).mean()


@has_cuda_for_real
def cross_entropy_grad(dy: Array, logits: Array, labels: Array, label_smoothing: float) -> Array:
    """dL/dlogits = dy (softmax(logits) - t) / N; dy of no dimension."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    target = distribution(labels, logits.shape[1], label_smoothing, logits.dtype)
    return (e / e.sum(axis=1, keepdims=True) - target) * (dy * (1.0 / len(labels)))


def distribution(labels: Array, classes: int, label_smoothing: float, dtype: np.dtype[Any]) -> Array:
    """(N,) -> t, (N, classes), which the prediction is compared with: 1 at the label, before some of it is spread over all."""
    hit = (labels[:, None] == array_module(labels).arange(classes)).astype(dtype)
    return hit * (1.0 - label_smoothing) + label_smoothing / classes if label_smoothing else hit
