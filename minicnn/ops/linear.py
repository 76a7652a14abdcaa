"""The fully connected layer's operation."""
from __future__ import annotations

from minicnn.autograd import op
from minicnn.backend import Array
from minicnn.kernels.linear import product
from minicnn.ops.arithmetic import matmul
from minicnn.ops.movement import sum, transpose


@op
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x weight^T + bias      dx = dy weight,  dweight = dy^T x,  dbias = sum over the batch of dy

    x: (N, in).   weight: (out, in).   bias: (out,) or None.   Returns (N, out).
    """
    _check(x, weight, bias)
    y = product(x, weight.T)
    if bias is not None:
        y += bias
    return y


@linear.backward("x")
def linear_dx(dy, weight):
    return matmul(dy, weight)


@linear.backward("weight")
def linear_dweight(dy, x):
    return matmul(transpose(dy), x)


@linear.backward("x", fused=True)
def linear_fused_dx(dy, weight):
    return product(dy, weight)


@linear.backward("weight", fused=True)
def linear_fused_dweight(dy, x):
    return product(dy.T, x)


@linear.backward("bias")
def linear_dbias(dy):
    return sum(dy, 0)


def _check(x: Array, weight: Array, bias: Array | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} must be (N, in) and weight {tuple(weight.shape)} (out, in) of one `in`; "
                         "images are flattened first, x.reshape(len(x), -1)")
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        raise ValueError(f"linear: bias {tuple(bias.shape)} must have one number for each of the {len(weight)} outputs "
                         f"of weight {tuple(weight.shape)}: ({len(weight)},)")
