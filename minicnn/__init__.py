"""minicnn: a from-scratch convolutional-network engine on NumPy and CuPy, made to be read.

    x = mc.Tensor(images, requires_grad=True)
    y = mc.ops.relu(mc.ops.conv2d(x, weight, padding=1))
    y.sum().backward()                      # x.grad
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minicnn import initialization, layers, models, ops, optim
from minicnn.autograd import Op, Tensor, grad, no_grad, op
from minicnn.kernels.algorithms import algorithm
from minicnn.kernels.im2col import col2im, im2col
from minicnn.kernels.precision import get_precision, set_precision
from minicnn.threads import get_num_threads, set_num_threads
from minicnn.weights import load, save

if TYPE_CHECKING:
    from minicnn import data, testing

__version__ = "0.1.0"

__all__ = [
    "Op", "Tensor", "algorithm", "col2im", "data", "get_num_threads", "get_precision", "grad", "im2col", "initialization", "layers",
    "load", "models", "no_grad", "op", "ops", "optim", "save", "set_num_threads", "set_precision", "testing",
]


def __getattr__(name: str) -> Any:
    """`mc.data`, `mc.testing` and `mc.study` are imported when somebody asks: a program that only computes need not wait."""
    if name in ("data", "testing", "study"):
        return import_module(f"minicnn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
