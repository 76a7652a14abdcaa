"""The fully connected layer's operation."""
from __future__ import annotations

from minicnn.autograd import op
from minicnn.backend import Array, array_module, is_half, real_of
from minicnn.kernels.elementwise import as_images
from minicnn.kernels.linear import add_to_rows, product
from minicnn.ops.arithmetic import matmul
from minicnn.ops.movement import astype, sum, transpose, widened


@op(real=("weight", "bias"))
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """y = x weight^T + bias      dx = dy weight,  dweight = dy^T x,  dbias = sum over the batch of dy

    x: (N, in).   weight: (out, in).   bias: (out,) or None.   Returns (N, out).   All of one type; beside an x of half precision
    weight and bias are float32, and so are their gradients.
    """
    _check(x, weight, bias)
    y = product(x, as_images(weight, x).T)
    if bias is not None:
        add_to_rows(y, bias)
    return y


@linear.backward("x")
def linear_dx(dy, weight):
    return matmul(dy, astype(weight, dy.dtype))


@linear.backward("weight")
def linear_dweight(dy, x):
    return matmul(transpose(widened(dy)), widened(x))


@linear.backward("x", fused=True)
def linear_fused_dx(dy, weight):
    return product(dy, as_images(weight, dy))


@linear.backward("weight", fused=True)
def linear_fused_dweight(dy, x):
    if not is_half(x.dtype):
        return product(dy.T, x)
    return product(dy.T, x, array_module(x).empty((dy.shape[1], x.shape[1]), real_of(x.dtype)))


@linear.backward("bias")
def linear_dbias(dy):
    return sum(widened(dy), 0)


def _check(x: Array, weight: Array, bias: Array | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} must be (N, in) and weight {tuple(weight.shape)} (out, in) of one `in`; "
                         "images are flattened first, x.reshape(len(x), -1)")
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        raise ValueError(f"linear: bias {tuple(bias.shape)} must have one number for each of the {len(weight)} outputs "
                         f"of weight {tuple(weight.shape)}: ({len(weight)},)")
