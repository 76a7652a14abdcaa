"""Which kernel at which shape. The shapes are read off the models' own layers, each once, however many layers share it."""
from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minicnn import models
from minicnn.kernels.windows import Windows
from minicnn.layers import BatchNorm2d, Conv2d, Layer, Linear, MaxPool2d, Residual, Sequential

Shape = tuple[int, ...]

MODELS = ("vgg16", "resnet50", "resnet20")      # whose layers are timed unless others are named
LARGE_BATCH, SMALL_BATCH = 4, 128               # images at 224 x 224, where a hundred would fill a small machine, and at 32 x 32
QUICK_SIDE, QUICK_BATCH = 64, 2                 # `--quick`: shows that everything runs, measures nothing

KERNELS_OF: dict[type[Layer], tuple[str, ...]] = {
    Conv2d: ("im2col", "col2im", "conv2d", "conv2d_input_grad", "conv2d_weight_grad"),
    MaxPool2d: ("max_pool2d", "max_pool2d_grad"),
    BatchNorm2d: ("batch_norm", "batch_norm_grad"),
    Linear: ("linear", "linear_input_grad", "linear_weight_grad"),
    Residual: ("residual_add",),
}
KERNELS = tuple(kernel for kernels in KERNELS_OF.values() for kernel in kernels)
CONVOLUTIONS = ("conv2d", "conv2d_input_grad", "conv2d_weight_grad")       # those with a choice of algorithm


@dataclass(frozen=True)
class Case:
    """A kernel at the shape of a layer. in_shape, out_shape: of one image, as the layer has them."""

    kernel: str
    in_shape: Shape
    out_shape: Shape
    windows: Windows | None         # of a convolution or a pool
    batch: int
    models: tuple[str, ...]         # in which such a layer stands
    algorithm: str = ""             # of a convolution

    @property
    def shape(self) -> str:
        """Its shapes in one word, "64x56x56-128x28x28-3x3": in, out, window; "64x56x56" where the layer changes nothing."""
        parts = [self.in_shape] if self.in_shape == self.out_shape and self.windows is None else [self.in_shape, self.out_shape]
        if self.windows is not None:
            parts.append(self.windows.kernel_size)
        return "-".join("x".join(map(str, part)) for part in parts)

    @property
    def name(self) -> str:
        """All that tells it from others: "conv2d winograd 64x56x56-64x56x56-3x3"."""
        return " ".join(part for part in (self.kernel, self.algorithm, self.shape) if part)


# ---------------------------------------------------------------- from the models
def default_batch(model: str, quick: bool = False) -> int:
    """Images in a batch of this model."""
    if quick:
        return QUICK_BATCH
    return SMALL_BATCH if _default_side(model) == 32 else LARGE_BATCH


def build(model: str, quick: bool = False) -> Sequential:
    """The model, built for the images it is made for; quick: for small ones, with a hundredth of the parameters."""
    return models.build(model, in_shape=_in_shape(model, quick), **_options(model, quick))


def _blueprint(model: str, quick: bool) -> Sequential:
    """The same with whatever was in memory for weights: to read shapes off, without seconds of drawing random numbers."""
    unbuilt: Sequential = getattr(models, model)(in_shape=None, **_options(model, quick))
    for _, layer in unbuilt.walk():
        if isinstance(layer, (Conv2d, Linear)):
            layer.weight_init = lambda shape, rng, dtype: np.empty(shape, dtype)
    unbuilt.build(_in_shape(model, quick), np.random.default_rng(0))
    return unbuilt


def _in_shape(model: str, quick: bool) -> Shape:
    side = QUICK_SIDE if quick else _default_side(model)
    return 3, side, side


def _options(model: str, quick: bool) -> dict[str, Any]:
    return {"hidden": 64, "pool": 1} if quick and model.startswith("vgg") else {}


def _default_side(model: str) -> int:
    """CIFAR's ResNets, of depth 6 n + 2, and Network in Network read 32 x 32 pixels; the others 224 x 224."""
    depth = re.fullmatch(r"resnet(\d+)", model)
    return 32 if model == "nin" or (depth and int(depth[1]) in (20, 32, 44, 56, 110)) else 224


@functools.cache
def of_model(model: str, quick: bool = False) -> tuple[Case, ...]:
    """Every different kernel that a training step of this model calls, with the model's usual batch."""
    built = _blueprint(model, quick)
    assert built.in_shape is not None
    found = (case for _, layer in built.walk() for case in _of_layer(layer, built.in_shape))
    return tuple(dict.fromkeys(replace(case, models=(model,), batch=default_batch(model, quick)) for case in found))


def _of_layer(layer: Layer, pictures: Shape) -> Iterator[Case]:
    for kernel in KERNELS_OF.get(type(layer), ()):
        windows = getattr(layer, "windows", None)
        pointwise = windows is not None and windows.kernel_size == (1, 1)
        if kernel in ("im2col", "col2im") and pointwise:
            continue                                        # the image itself, or a pick of its pixels
        if kernel == "conv2d_input_grad" and layer.in_shape == pictures:
            continue                                        # nobody asks for the gradient of the pictures
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{layer!r}: grouped convolutions are not among what is timed")
        assert layer.in_shape is not None and layer.out_shape is not None
        in_shape = layer.out_shape if kernel == "residual_add" else layer.in_shape
        yield Case(kernel, in_shape, layer.out_shape, windows, 0, ())


def of_models(names: Sequence[str] = MODELS, quick: bool = False, batch: int | None = None) -> list[Case]:
    """The cases of several models, each once, kernel by kernel. batch: instead of the models' own."""
    merged: dict[Case, tuple[str, ...]] = {}
    for name in names:
        for case in of_model(name, quick):
            key = replace(case, models=(), batch=batch or case.batch)
            merged[key] = (*merged.get(key, ()), name)
    cases = [replace(case, models=found) for case, found in merged.items()]
    return sorted(cases, key=lambda case: KERNELS.index(case.kernel))       # stable: inside, as in the models


# ---------------------------------------------------------------- chosen
def choose(words: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Those that the words mean: kernels, algorithms, models, shapes (whole or a part, 64x56x56), patterns (conv2d*, *-3x3).

    Words of one sort are alternatives; of each sort that was given, one must fit. No word: all.
    Raises ValueError for a word that fits nothing, and where no case fits them all together.
    """
    sorts: dict[str, list[str]] = {}
    for word in words:
        sorts.setdefault(_sort(word, cases), []).append(word)
    chosen = [case for case in cases if all(any(_fits(word, case) for word in alternatives) for alternatives in sorts.values())]
    if not chosen:
        raise ValueError(f"no kernel is called all of {' '.join(words)}; words of one sort are alternatives, "
                         "those of different sorts (kernel, algorithm, shape, model, pattern) must fit together")
    return chosen


def _fits(word: str, case: Case) -> bool:
    whole = (case.kernel, case.shape, case.name, f"{case.kernel} {case.shape}", *case.models)
    if _is_pattern(word):
        return any(fnmatch.fnmatchcase(text, word) for text in whole)
    return word in whole or f"-{word}-" in f"-{case.shape}-" or (word == case.algorithm and word not in KERNELS)


def _is_pattern(word: str) -> bool:
    return any(sign in word for sign in "*?[")


def _sort(word: str, cases: Sequence[Case]) -> str:
    """What kind of a word it is; ValueError where it fits nothing."""
    if not any(_fits(word, case) for case in cases):
        known = list(dict.fromkeys(text for case in cases
                                   for text in (case.kernel, case.algorithm, *case.models, *case.shape.split("-"), case.shape)))
        close = difflib.get_close_matches(word, known, 1)
        raise ValueError(f"{word!r} fits no kernel, shape or model here" + (f"; did you mean {close[0]!r}?" if close else
                         f". The kernels are {', '.join(KERNELS)}"))
    if _is_pattern(word):
        return "pattern"
    if word in KERNELS:
        return "kernel"             # im2col, which is an algorithm's name, too
    if any(word == case.algorithm for case in cases):
        return "algorithm"
    return "model" if word in models.names() else "shape"
