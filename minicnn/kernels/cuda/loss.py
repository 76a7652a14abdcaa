"""Softmax cross-entropy on a GPU: see loss.cu."""
from __future__ import annotations

from minicnn.backend import Array, array_module
from minicnn.kernels.cuda.launch import launch

THREADS = 128               # as loss.cu has them
MOST_BLOCKS = 1 << 16       # images at a time


def cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> Array:
    """(N, classes), (N,) -> the mean loss, of no dimension."""
    z, t = _laid(logits, labels)
    each, loss = array_module(z).empty(len(z), z.dtype), array_module(z).empty((), z.dtype)
    launch("loss", "losses", min(len(z), MOST_BLOCKS), THREADS, z, t, each, *z.shape, label_smoothing)
    launch("loss", "total", 1, THREADS, each, loss, len(z))
    return loss


def cross_entropy_grad(dy: Array, logits: Array, labels: Array, label_smoothing: float) -> Array:
    """dL/dlogits = dy (softmax(logits) - target) / N."""
    z, t = _laid(logits, labels)
    dz = array_module(z).empty(z.shape, z.dtype)
    launch("loss", "losses_grad", min(len(z), MOST_BLOCKS), THREADS, dy, z, t, dz, *z.shape, label_smoothing)
    return dz


def _laid(logits: Array, labels: Array) -> tuple[Array, Array]:
    return array_module(logits).ascontiguousarray(logits), labels.astype("int64", copy=False)
