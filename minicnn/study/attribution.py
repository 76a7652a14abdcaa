"""Which pixels a class's score hangs on: two answers, both read off one backward pass.

saliency    how much the score moves when a pixel does: |dy_c/dx|.
            Source: Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks", 2013.
grad_cam    where a late layer holds what speaks for the class: its channels, each weighed by the score's mean gradient in it.
            Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017.

The score y_c is the class's logit, as in both papers: a probability also rises where the other classes fall. Images are what the
model reads, normalised floats (C, H, W); it runs at inference.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn.autograd import Recorder, Tensor, grad, watched_by
from minicnn.backend import to_device, to_numpy
from minicnn.layers import AdaptiveAvgPool2d, AvgPool2d, Dropout, GlobalAvgPool2d, Layer, MaxPool2d, Sequential, fusion
from minicnn.transfer import steps

Array = np.ndarray[Any, Any]
POOLS = (MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, GlobalAvgPool2d)


def saliency(model: Sequential, image: Array, target: int | None = None) -> Array:
    """|dy_c/dx|, of the colour channels the largest: an image (C, H, W) -> (H, W).

    target: the class c; by default the one that the model takes the image for.
    """
    gradient: Array = np.abs(input_gradient(model, image, target)).max(axis=0)
    return gradient


def input_gradient(model: Sequential, image: Array, target: int | None = None) -> Array:
    """dy_c/dx, with its signs: (C, H, W) -> (C, H, W)."""
    x = as_input(model, image[None])
    logits = scores(model(x))
    y = logits[0, _class(logits, target)]
    return to_numpy(grad(y, x)[0].data)[0]


class Cam(NamedTuple):
    """What Grad-CAM found at a layer: heat (P, Q), at least 0; weights (K,), one a channel; the class; the layer's path."""

    heat: Array
    weights: Array
    target: int
    layer: str

    def enlarged(self, size: tuple[int, int]) -> Array:
        """The heat at the image's size (H, W), interpolated."""
        return enlarge(self.heat, size)


def grad_cam(model: Sequential, image: Array, target: int | None = None, layer: str | None = None) -> Cam:
    """heat = max(sum_k alpha_k A_k, 0)   with   alpha_k = mean over (p, q) of dy_c/dA_k[p, q]

    A (K, P, Q) is what the layer makes of the image (C, H, W). target: the class c, by default the likeliest.
    layer: the path of one that gives an image; by default the last before the pooling that ends the body (`last_image_layer`).
    """
    path = last_image_layer(model) if layer is None else layer
    output, seen = run_to(model, as_input(model, image[None]), path)
    if seen.ndim != 4:
        raise ValueError(f"Grad-CAM needs a layer that gives an image, and {path} gives {seen.shape[1:]}; by default it takes "
                         f"{last_image_layer(model)}")
    logits = scores(output)
    c = _class(logits, target)
    activation, gradient = to_numpy(seen.data)[0], to_numpy(grad(logits[0, c], seen)[0].data)[0]
    weights = gradient.mean(axis=(1, 2))
    return Cam(np.maximum(np.tensordot(weights, activation, 1), 0), weights, c, path)


def last_image_layer(model: Sequential) -> str:
    """The path of the last layer that gives an image and is no pooling and no dropout: what is left of the image there is where
    things are, and what the channels say is the most that the body knows."""
    for path, layer in reversed(steps(model)):
        if layer.out_shape is not None and len(layer.out_shape) == 3 and not isinstance(layer, (*POOLS, Dropout)):
            return path
    raise ValueError("the model has no layer that gives an image (C, H, W)")


# ---------------------------------------------------------------- running a model to look at it
def as_input(model: Sequential, images: Array) -> Tensor:
    """A batch (N, C, H, W) as a Tensor that gradients reach, as the model computes, where it lies. ValueError for other shapes."""
    if model.in_shape is None or images.shape[1:] != model.in_shape:
        raise ValueError(f"an image of shape {images.shape[1:]} for a model that reads {model.in_shape}: the two must be equal")
    return Tensor(to_device(images.astype(model.dtype or np.float32), model.device), requires_grad=True)


def run_to(model: Sequential, x: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Run the model, at inference and layer by layer: (its output, what the layer at `path` makes of x)."""
    watcher = Watcher(layer_at(model, path))
    with watched_by(watcher), fusion(False):
        output = model(x)
    assert watcher.seen is not None
    return output, watcher.seen


class Watcher(Recorder):
    """Keeps what one layer gives."""

    def __init__(self, watched: Layer) -> None:
        self.watched = watched
        self.seen: Tensor | None = None

    def layer(self, layer: Layer, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a layer; what the watched one gives is kept, too."""
        y = run()
        if layer is self.watched:
            self.seen = y
        return y


def layer_at(model: Sequential, path: str) -> Layer:
    """The layer of that path, as `summary()` and `state_dict()` name it, or a list of layers. ValueError where there is none."""
    found = dict(model.walk())
    if path not in found:
        raise ValueError(f"the model has no layer {path!r}; its layers are {', '.join(name for name in found if name)}")
    return found[path]


def scores(output: Tensor) -> Tensor:
    """A model's output, which must be a number a class; ValueError otherwise."""
    if output.ndim != 2:
        raise ValueError(f"the model gives {output.shape[1:]} for an image; attribution needs one number a class")
    return output


def _class(logits: Tensor, target: int | None) -> int:
    if target is None:
        return int(logits.data[0].argmax())
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target={target}: the model has {logits.shape[1]} classes, 0 to {logits.shape[1] - 1}")
    return int(target)


def enlarge(image: Array, size: tuple[int, int]) -> Array:
    """(P, Q) -> (H, W), linear between the pixels' centres: A image B^T, with a matrix for the rows and one for the columns."""
    a, b = (_between(n, to) for n, to in zip(image.shape, size, strict=True))
    enlarged: Array = a @ image @ b.T
    return enlarged


def _between(n: int, to: int) -> Array:
    """(to, n): row i has the shares of the two of n pixels between whose centres the centre of pixel i of `to` lies."""
    at = np.clip((np.arange(to) + 0.5) * n / to - 0.5, 0, n - 1)
    left = np.minimum(at.astype(int), max(0, n - 2))
    shares = np.zeros((to, n))
    shares[np.arange(to), left] = 1 - (at - left)
    shares[np.arange(to), np.minimum(left + 1, n - 1)] += at - left
    return shares
