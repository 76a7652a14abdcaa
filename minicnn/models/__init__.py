"""Models: functions that hand a list of layers to Sequential and return it built.

Every one takes `weights`, as published.py says: "imagenet", the path of a file, or its address.
"""
from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from minicnn.layers import Sequential
from minicnn.models.inception import googlenet
from minicnn.models.network_in_network import nin
from minicnn.models.resnet import (
    resnet18, resnet20, resnet32, resnet34, resnet44, resnet50, resnet56, resnet101, resnet110, resnet152,
)
from minicnn.models.vgg import vgg11, vgg11_bn, vgg13, vgg13_bn, vgg16, vgg16_bn, vgg19, vgg19_bn

_BUILDERS: dict[str, Callable[..., Sequential]] = {f.__name__: f for f in (
    vgg11, vgg13, vgg16, vgg19, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn,
    resnet18, resnet34, resnet50, resnet101, resnet152,
    resnet20, resnet32, resnet44, resnet56, resnet110,
    nin, googlenet)}

__all__ = ["build", "default_in_shape", "names", *_BUILDERS]


def names() -> list[str]:
    """The names that `build` knows."""
    return list(_BUILDERS)


def default_in_shape(name: str) -> tuple[int, ...]:
    """(C, H, W) of the images that a model is made for, where nothing else is said."""
    return tuple(inspect.signature(_BUILDERS[name]).parameters["in_shape"].default)


def build(name: str, num_classes: int | None = None, in_shape: Sequence[int] | None = None, **options: Any) -> Sequential:
    """The model of that name; what is not given takes the model's own default."""
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, 1)
        raise ValueError(f"no model is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
                         + f" The models are {', '.join(_BUILDERS)}")
    given = {"num_classes": num_classes, "in_shape": in_shape}
    return _BUILDERS[name](**{k: v for k, v in given.items() if v is not None}, **options)
