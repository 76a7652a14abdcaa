"""Gradient checks, for the operations of this package and for anybody's.

gradcheck(fn, inputs)           first derivatives against differences
gradgradcheck(fn, inputs)       second derivatives
check_layer(layer, in_shape)    a layer or a whole model, every parameter by name
specimens                       backward rules, wrong and right, to try a gradient checker on; second_order_specimens likewise
strategies                      hypothesis strategies for valid convolutions, poolings and normalisations (needs hypothesis)
"""
from __future__ import annotations

from importlib import import_module
from typing import Any

from minicnn.testing.checking import check_layer, gradcheck, gradgradcheck
from minicnn.testing.function import GradcheckError
from minicnn.testing.specimen import Specimen, second_order_specimens, specimens

__all__ = [
    "GradcheckError", "Specimen", "check_layer", "gradcheck", "gradgradcheck", "second_order_specimens", "specimens", "strategies",
]


def __getattr__(name: str) -> Any:
    """`strategies` is imported when somebody asks for it, since only it needs hypothesis."""
    if name == "strategies":
        return import_module("minicnn.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
