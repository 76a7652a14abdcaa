"""How strong the gradient is along the depth of a model, with and without its residual paths and its batch norms.

The same layer list, the same weights, the same batch; only the shortcuts, or the norms, are taken out (or put in: a model without
any batch norm gets one behind each convolution). Each is run forward and backward once, in training.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.autograd import Node, Recorder, watched_by
from minicnn.backend import to_device, to_numpy
from minicnn.layers import BatchNorm2d, Branches, Conv2d, Layer, Linear, Residual, Sequential, fusion


class Line(NamedTuple):
    """One variant: the norm of the gradient at the output of each convolution and fully connected layer, from the image on."""

    residual: bool
    batch_norm: bool
    loss: float
    norms: list[float]          # ||dL/dy||, Euclidean
    given: bool                 # whether it is the model as it was given


def gradient_norms(model: Sequential, images: Any, labels: Any, seed: int = 0) -> list[Line]:
    """A model's gradient along its depth: as it is, and without (or with) residual paths, batch norm, and both.

    images: (N, C, H, W), normalised.   labels: (N,).   The model stays as it is.
    """
    kinds = {type(layer) for _, layer in model.walk()}
    has_residual, has_norm = Residual in kinds, BatchNorm2d in kinds
    found = []
    for residual in [True, False] if has_residual else [False]:
        for batch_norm in [True, False]:
            given = (residual, batch_norm) == (has_residual, has_norm)
            variant = changed(model, residual, batch_norm)
            loss, norms = _norms(variant, images, labels, seed)
            found.append(Line(residual, batch_norm, loss, norms, given))
    return found


def changed(model: Sequential, residual: bool, batch_norm: bool) -> Sequential:
    """A copy with the same weights: without residual paths or without batch norms where these are False; where batch_norm is True
    and the model has none, with one behind each convolution."""
    variant = copy.deepcopy(model)
    add_norms = batch_norm and not any(type(layer) is BatchNorm2d for _, layer in model.walk())
    rng = np.random.default_rng(0)

    def change(layer: Layer) -> Layer:
        if isinstance(layer, (Sequential, Branches)):
            layer.layers = [change(inner) for inner in layer.layers]
        if isinstance(layer, Residual):
            layer.body, layer.shortcut = change(layer.body), change(layer.shortcut)
            if not residual:
                return _in_place_of(layer, layer.body)
        if type(layer) is BatchNorm2d and not batch_norm:
            return _in_place_of(layer, _built(Sequential([]), layer.out_shape, rng, layer))
        if type(layer) is Conv2d and add_norms:
            norm = _built(BatchNorm2d(), layer.out_shape, rng, layer).to(layer.device)
            both = Sequential([copy.copy(layer).named("conv"), norm])
            both.in_shape, both.out_shape, both.dtype = layer.in_shape, layer.out_shape, layer.dtype
            return _in_place_of(layer, both)
        return layer

    changed_model = change(variant)
    assert isinstance(changed_model, Sequential)
    return changed_model


def _in_place_of(layer: Layer, other: Layer) -> Layer:
    other.name = layer.name
    return other


def _built(layer: Layer, in_shape: Any, rng: np.random.Generator, like: Layer) -> Layer:
    layer.build(in_shape, rng, like.dtype)
    return layer


class _Norms(Recorder):
    """Notes the norm of each output gradient of a convolution or a matrix product, and keeps nothing else."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def pulled(self, node: Node, dy: Any, gradients: Iterator[tuple[Node, Any, bool]]) -> Iterator[tuple[Node, Any, bool]]:
        """Look at dy, and hand on."""
        if node.op is not None and node.op.__name__ in ("conv2d", "linear"):
            self.norms.append(float(np.linalg.norm(to_numpy(dy).astype(np.float64))))
        return gradients


def _norms(model: Sequential, images: Any, labels: Any, seed: int) -> tuple[float, list[float]]:
    seen = _Norms()
    with np.errstate(all="ignore"), fusion(False), watched_by(seen):       # without norms the numbers may leave float32's range
        loss = ops.cross_entropy(model(to_device(images, model.device), train=True, rng=np.random.default_rng(seed)), labels)
        loss.backward()
    return float(loss.item()), seen.norms[::-1]


def weighted_layers(model: Sequential) -> list[str]:
    """The paths of the convolutions and fully connected layers, in the order of `gradient_norms`' numbers."""
    return [path for path, layer in model.walk() if type(layer) in (Conv2d, Linear)]
