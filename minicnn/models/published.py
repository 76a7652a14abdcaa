"""Weights that somebody has published, for the models they are of: resnet18(weights="imagenet").

torchvision's were trained on pixels divided by 255, less the mean (0.485, 0.456, 0.406) of red, green and blue, divided by their
deviation (0.229, 0.224, 0.225); GoogLeNet's, which come from elsewhere, on (pixel / 255 - 0.5) / 0.5. The classes are ImageNet's
1000.
"""
from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minicnn.layers import Sequential
from minicnn.layers.base import unwrapped
from minicnn.weights import SUFFIXES, WeightsError, load
from minicnn.weights.fetch import cache_folder, fetch, file_name

Weights = str | os.PathLike[str]

TORCHVISION = "https://download.pytorch.org/models/"

# {what to call them: {model: address}}. torchvision's first version (V1) of each.
PUBLISHED = {
    "imagenet": {
        "vgg11": TORCHVISION + "vgg11-8a719046.pth",
        "vgg13": TORCHVISION + "vgg13-19584684.pth",
        "vgg16": TORCHVISION + "vgg16-397923af.pth",
        "vgg19": TORCHVISION + "vgg19-dcbb9e9d.pth",
        "vgg11_bn": TORCHVISION + "vgg11_bn-6002323d.pth",
        "vgg13_bn": TORCHVISION + "vgg13_bn-abd245e5.pth",
        "vgg16_bn": TORCHVISION + "vgg16_bn-6c64b313.pth",
        "vgg19_bn": TORCHVISION + "vgg19_bn-c79401a0.pth",
        "resnet18": TORCHVISION + "resnet18-f37072fd.pth",
        "resnet34": TORCHVISION + "resnet34-b627a593.pth",
        "resnet50": TORCHVISION + "resnet50-0676ba61.pth",
        "resnet101": TORCHVISION + "resnet101-63fe2227.pth",
        "resnet152": TORCHVISION + "resnet152-394f9c45.pth",
        "googlenet": TORCHVISION + "googlenet-1378be20.pth",
    },
}

# What was done to the pixels: (mean, deviation) of pixel / 255. torchvision's GoogLeNet brings what was normalised by ImageNet's to
# (pixel / 255 - 0.5) / 0.5 by itself (transform_input).
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = {"googlenet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

# Heads that a model has in its training alone, in torchvision's files; {model: how their names begin}.
AUXILIARY = {"googlenet": ("aux1.", "aux2.")}


class Model(Protocol):
    """A model function.

    weights: "imagenet", the path of a file, or its http or https address; None draws them from the seed. They must fit: those of
    another model, or of another number of classes, raise load_state_dict's ValueError.
    """

    __name__: str

    def __call__(self, num_classes: int = ..., in_shape: Sequence[int] = ..., *, weights: Weights | None = None,
                 **options: Any) -> Sequential: ...


def takes_weights(build: Callable[..., Sequential]) -> Model:
    """Give a model function the keyword `weights`; the rest stays as it is."""

    @functools.wraps(build)
    def built(*sizes: Any, weights: Weights | None = None, **options: Any) -> Sequential:
        if weights is None:
            return build(*sizes, **options)
        state, form = of_model(build.__name__, read(find(build.__name__, weights)))
        model = build(*sizes, **{**form, **options})
        model.load_state_dict(state)
        return model

    given = list(inspect.signature(build).parameters.values())
    of_place = [parameter for parameter in given if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    weights = inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Weights | None")
    setattr(built, "__signature__", inspect.signature(build).replace(parameters=[*of_place, weights, *given[len(of_place):]]))     # noqa: B010
    return built


def of_model(model: str, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the state, options) for the model function of that name, from a checkpoint of it.

    The state is without auxiliary heads, which only training needs. The options are what the state itself says of the model's form:
    of GoogLeNet the kernel of the third branch, of a ResNet for CIFAR its shortcuts.
    """
    state = {name: array for name, array in unwrapped(checkpoint).items() if not name.startswith(AUXILIARY.get(model, ()))}
    kernel = state.get("inception3a.branch3.1.conv.weight")
    if model == "googlenet" and getattr(kernel, "ndim", 0) == 4:
        return state, {"branch5x5": int(kernel.shape[-1])}      # type: ignore[union-attr]
    if "layer2.0.shortcut.0.weight" in state:
        return state, {"shortcut": "B"}
    return state, {}


def pixels_of(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, deviation) of pixel / 255, a number a channel, that the model's "imagenet" weights expect to have been taken off."""
    return PIXELS.get(model, IMAGENET_PIXELS)


def read(path: Weights) -> dict[str, Any]:
    """`load` of a file that may have been fetched: a damaged one of those is to be deleted, or it would stay so for ever."""
    try:
        return load(path)
    except WeightsError as error:
        if cache_folder() in Path(path).parents:
            raise WeightsError(f"{error}; it was fetched: delete {path}, and it is fetched again") from None
        raise


def find(model: str, weights: Weights) -> Path:
    """The file of a model's weights, fetched where it is not here yet. ValueError where there are none; FetchError."""
    url = weights if isinstance(weights, str) else ""
    if url in PUBLISHED:
        if model not in PUBLISHED[url]:
            raise ValueError(f"{model} has no {url!r} weights; those that have: {', '.join(PUBLISHED[url])}")
        url = PUBLISHED[url][model]
    elif "://" not in url:
        if Path(weights).suffix not in SUFFIXES:
            raise ValueError(f"weights={str(weights)!r} is none of {', '.join(map(repr, PUBLISHED))}, a file that ends in "
                             f"{', '.join(SUFFIXES)}, or the address of one")
        return Path(weights)
    name = file_name(url)
    if Path(name).suffix not in SUFFIXES:                   # before it is fetched
        raise ValueError(f"{name}: the suffix names the format, and is none of {', '.join(SUFFIXES)}")
    return fetch(url)
