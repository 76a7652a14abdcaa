"""The order in which a data set is seen, as a function of numbers that a checkpoint can hold."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .ahead import ahead
from .imageset import Images, ImageSet, Labels
from .pictures import ImageFiles

Augmentation = Callable[[Any, np.random.Generator], Images]

# first words of the spawn keys below: what a generator is for, so that no two uses share a stream
ORDER, AUGMENTATION = 0, 1


def steps_per_epoch(images: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches in one pass over so many images; the last may be smaller, unless it is dropped."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; a batch holds at least one image")
    return images // batch_size if drop_last else -(-images // batch_size)


def batches(dataset: ImageSet, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True,
            augmentation: Augmentation | None = None, originals: bool = False, start: int = 0,
            drop_last: bool = False) -> Iterator[tuple[Images, Labels]]:
    """The batches (images (n, C, H, W) uint8, labels (n,)) of one epoch, from step `start` on, as copies.

    Every image comes once an epoch. The order is a function of (seed, epoch), and what `augmentation(images, rng)`
    draws from its generator one of (seed, epoch, step): no generator is carried from batch to batch, so a run that is
    resumed at step k sees, to the bit, what it would have seen uninterrupted, and batches may be made in any order.

    Those of images that stay in their files (`ImageFiles`) are made on threads, ahead of who takes them.
    originals: `augmentation` gets such images as they are in their files, a list of (C, h, w), each of its own size; it has to
    resize them, which takes time, so that those of any set are then made ahead.

    Raises ValueError, at the call, for a batch size below 1, a negative seed or epoch, no batch at all, or a `start`
    outside of the epoch (its end is inside: no batch is left).
    """
    steps = steps_per_epoch(len(dataset), batch_size, drop_last=drop_last)
    if min(seed, epoch) < 0:
        raise ValueError(f"seed={seed}, epoch={epoch}; neither can be negative")
    if steps == 0:
        raise ValueError(f"{dataset.name}: {len(dataset)} images make no batch of {batch_size}; lower the batch size")
    if not 0 <= start <= steps:
        raise ValueError(f"start={start}, but the epoch has {steps} steps; give 0 to {steps}")
    order = _generator(seed, ORDER, epoch).permutation(len(dataset)) if shuffle else np.arange(len(dataset))

    pictures = dataset.images
    in_files = isinstance(pictures, ImageFiles)
    take = pictures.originals if isinstance(pictures, ImageFiles) and originals else pictures.__getitem__

    def batch(step: int) -> tuple[Images, Labels]:
        chosen = order[step * batch_size:(step + 1) * batch_size]
        images, labels = take(chosen), dataset.labels[chosen]
        if augmentation is not None:
            images = augmentation(images, _generator(seed, AUGMENTATION, epoch, step))
        return images, labels

    return ahead(batch, range(start, steps)) if in_files or originals else map(batch, range(start, steps))


def _generator(seed: int, *key: int) -> np.random.Generator:
    """A stream of its own for every (seed, key); plain default_rng(seed), which others use, is none of them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
