"""Transfer learning: a model that was trained on one thing as the beginning of another.

A classifier is a body, which turns an image into a few hundred numbers, and a head, the last fully connected layer, which weighs
them for each class. The body's edges, textures and shapes serve other images too; only the head is of its classes. So a new model
gets the old body and a fresh head, and either the head alone is trained, on what the body makes of each image, or all of it, the
body slowly.

Source: Yosinski, Clune, Bengio, Lipson, "How Transferable are Features in Deep Neural Networks?", 2014.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minicnn.autograd import Tensor, no_grad
from minicnn.backend import to_device, to_numpy
from minicnn.data import ImageSet, Normalize, batches
from minicnn.layers import Layer, LoadReport, Sequential, fused
from minicnn.layers.base import unwrapped
from minicnn.layers.lists import run

Array = np.ndarray[Any, Any]


def steps(model: Sequential) -> list[tuple[str, Layer]]:
    """The layers that run one after the other, with their paths; lists inside the list are laid open."""
    found: list[tuple[str, Layer]] = []
    for name, layer in model.children():
        inside = steps(layer) if type(layer) is Sequential else [("", layer)]
        found += [(".".join(part for part in (name, path) if part), step) for path, step in inside]
    return found


def head_of(model: Sequential) -> tuple[str, Layer]:
    """The last layer of all, which must be a fully connected one, and its path. ValueError otherwise."""
    path, layer = steps(model)[-1] if len(model) else ("", model)
    if layer.parameter_names != ("weight", "bias") or layer.in_shape is None or len(layer.in_shape) != 1:
        raise ValueError(f"the model ends in {layer!r}; to be given a new head, it must end in a Linear layer")
    return path, layer


def load_body(model: Sequential, state: Mapping[str, Any]) -> LoadReport:
    """Take over everything but the head, which stays as the model's seed has drawn it. ValueError where something does not fit."""
    path, _ = head_of(model)
    own = {name: array for name, array in model.state_dict().items() if name.rpartition(".")[0] == path}
    body = {name: array for name, array in unwrapped(state).items() if name.rpartition(".")[0] != path}
    return model.load_state_dict({**body, **own})


def freeze_body(model: Sequential) -> None:
    """Hold everything but the head still: parameters and running statistics."""
    model.freeze()
    head_of(model)[1].unfreeze()


def features(model: Sequential, dataset: ImageSet, normalize: Normalize, batch_size: int = 256,
             on_batch: Callable[[int], None] | None = None) -> Array:
    """What the body makes of each image, at inference: (N, C, H, W) -> (N, D), in the model's dtype, on its device.

    on_batch: called behind each batch with the number of images that are done.
    """
    body, found, done = fused(steps(model)[:-1]), [], 0
    with no_grad():
        for images, _ in batches(dataset, batch_size, seed=0, epoch=0, shuffle=False):
            x = Tensor(to_device(normalize(images, model.dtype or np.float32), model.device))
            found.append(to_numpy(run(body, x, train=False, rng=None).data))
            done += len(images)
            if on_batch:
                on_batch(done)
    whole: Array = np.concatenate(found)
    return whole
