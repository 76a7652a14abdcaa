"""minicnn: a from-scratch convolutional-network engine on NumPy and CuPy, made to be read.

    x = mc.Tensor(images, requires_grad=True)
    y = mc.ops.relu(mc.ops.conv2d(x, weight, padding=1))
    y.sum().backward()                      # x.grad
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minicnn import data, initialization, layers, models, ops, optim
from minicnn.autograd import Op, Tensor, grad, no_grad, op
from minicnn.kernels.conv import col2im, im2col
from minicnn.weights import load, save

if TYPE_CHECKING:
    from minicnn import testing

__version__ = "0.1.0"

__all__ = [
    "Op", "Tensor", "col2im", "data", "grad", "im2col", "initialization", "layers", "load", "models", "no_grad", "op", "ops",
    "optim", "save", "testing",
]


def __getattr__(name: str) -> Any:
    """`mc.testing` is imported when somebody asks for it: a program that only computes does not wait for its specimens."""
    if name == "testing":
        return import_module("minicnn.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
