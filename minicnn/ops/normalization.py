"""Batch normalisation.

In training each channel is shifted and scaled to mean 0 and variance 1 over the batch, then by learned numbers:

    x_hat = (x - mean) / sqrt(var + eps),     y = weight x_hat + bias

At inference mean and var are running averages, constants, and the whole is one number times x plus another.
Source: Ioffe, Szegedy, "Batch Normalization", 2015.
"""
from __future__ import annotations

from typing import Any

from minicnn.autograd import op
from minicnn.backend import Array, is_array, is_floating, real_of
from minicnn.kernels import normalization as kernels
from minicnn.ops.activation import add_relu, relu, where_positive
from minicnn.ops.movement import astype, mean, reshape, sum, widened

OVER = (0, 2, 3)        # a channel's numbers: all images, all pixels


def batch_norm(x: Any, weight: Any, bias: Any, running_mean: Array, running_var: Array, *, train: bool,
               momentum: float = 0.1, eps: float = 1e-5, rectified: bool = False, residual: Any = None) -> Any:
    """Normalise every channel: (N, C, H, W) -> (N, C, H, W); weight, bias, running_mean, running_var: (C,).

    train=True: by the batch's own mean and biased variance; the running arrays move towards them in place,
    running += momentum (batch - running), with the unbiased variance (over m - 1 of the m = N H W numbers).
    train=False: by the running arrays, which stay as they are.
    rectified: max(y, 0) in the same passes.   residual: like x, added before.
    Raises ValueError for shapes that do not fit, and in training for one number a channel: its variance is no estimate.
    """
    _check(x, weight, bias, running_mean, running_var)
    if not train:
        y = affine(x, *scale_and_shift(weight, bias, running_mean, running_var, eps))
        if residual is not None:
            return add_relu(y, residual) if rectified else y + residual
        return relu(y) if rectified else y
    m = x.shape[0] * x.shape[2] * x.shape[3]
    if m < 2:
        raise ValueError(f"batch_norm: x {tuple(x.shape)} has {m} value a channel, and training needs at least 2 to have a "
                         "variance: use a larger batch or image, or train=False")
    if residual is not None and rectified:
        y, batch_mean, batch_var = normalize_add_relu(x, weight, bias, residual, eps)
    else:
        y, batch_mean, batch_var = (normalize_relu if rectified else normalize)(x, weight, bias, eps)
        y = y if residual is None else y + residual
    kernels.follow(running_mean, running_var, batch_mean, batch_var, momentum, m)
    return y


def scale_and_shift(weight: Any, bias: Any, mean: Any, var: Array, eps: float) -> tuple[Any, Any]:
    """scale and shift, (C,) both, with which batch norm by constant statistics is scale x + shift: arrays, if all is arrays."""
    if all(map(is_array, (weight, bias, mean))):
        return kernels.scale_and_shift(weight, bias, mean, var, eps)
    scale = weight * (var + eps) ** -0.5
    return scale, bias - scale * (mean.copy() if is_array(mean) else mean)      # kept: later training steps move the array in place


@op(extras=("batch_mean", "batch_var"), real=("weight", "bias"))
def normalize(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """y = weight (x - mean) / sqrt(var + eps) + bias, with the batch's mean and biased variance of each channel

    dbias = sum dy,   dweight = sum dy x_hat,   dx = weight / sqrt(var + eps) (dy - mean(dy) - x_hat mean(dy x_hat))

    The last two terms of dx: moving one number moves the mean and the variance that all the others are measured by.
    """
    return kernels.normalize(x, weight, bias, eps)


@normalize.backward("x", "weight", "bias")
def normalize_backward(dy, x, weight, eps):
    dtype, x, dy = x.dtype, widened(x), widened(dy)
    centred = x - mean(x, OVER, keepdims=True)              # computed again from x, so that its own derivative exists
    inv_std = (mean(centred * centred, OVER, keepdims=True) + eps) ** -0.5
    x_hat = centred * inv_std
    dx = _per_channel(weight) * inv_std * (dy - mean(dy, OVER, keepdims=True) - x_hat * mean(dy * x_hat, OVER, keepdims=True))
    return astype(dx, dtype), sum(dy * x_hat, OVER), sum(dy, OVER)


@normalize.backward("x", "weight", "bias", fused=True)
def normalize_fused_backward(dy, x, weight, batch_mean, batch_var, eps, wanted):
    return kernels.normalize_grad(dy, x, weight, batch_mean, batch_var, eps, "x" in wanted)


@op(extras=("batch_mean", "batch_var"), real=("weight", "bias"))
def normalize_relu(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """y = max(normalize(x, weight, bias), 0), with the same statistics      dy counts where y > 0"""
    return kernels.normalize(x, weight, bias, eps, rectified=True)


@normalize_relu.backward("x", "weight", "bias")
def normalize_relu_backward(dy, x, weight, y, eps):
    return normalize_backward(where_positive(dy, y), x, weight, eps)


@normalize_relu.backward("x", "weight", "bias", fused=True)
def normalize_relu_fused_backward(dy, x, weight, y, batch_mean, batch_var, eps, wanted):
    return kernels.normalize_grad(dy, x, weight, batch_mean, batch_var, eps, "x" in wanted, y)


@op(extras=("batch_mean", "batch_var"), real=("weight", "bias"))
def normalize_add_relu(x: Array, weight: Array, bias: Array, residual: Array, eps: float) -> tuple[Array, Array, Array]:
    """y = max(normalize(x, weight, bias) + residual, 0), with the same statistics: the end of a residual block

    dy counts where y > 0; so much reaches the residual, and the batch norm.
    """
    if residual.shape != x.shape:
        raise ValueError(f"normalize_add_relu: residual {tuple(residual.shape)} must have the shape of x, {tuple(x.shape)}")
    return kernels.normalize(x, weight, bias, eps, rectified=True, residual=residual)


@normalize_add_relu.backward("x", "weight", "bias", "residual")
def normalize_add_relu_backward(dy, x, weight, y, eps):
    dz = where_positive(dy, y)
    return *normalize_backward(dz, x, weight, eps), dz


@normalize_add_relu.backward("x", "weight", "bias", "residual", fused=True)
def normalize_add_relu_fused_backward(dy, x, weight, y, batch_mean, batch_var, eps, wanted):
    dz = where_positive(dy, y)
    if wanted == {"residual"}:
        return None, None, None, dz
    return *kernels.normalize_grad(dz, x, weight, batch_mean, batch_var, eps, "x" in wanted), dz


@op(real=("scale", "shift"))
def affine(x: Array, scale: Array, shift: Array) -> Array:
    """y = scale x + shift, one number of each a channel      dx = dy scale,  dscale = sum dy x,  dshift = sum dy"""
    return kernels.channel_affine(x, scale, shift)


@affine.backward("x")
def affine_dx(dy, scale):
    return astype(widened(dy) * _per_channel(scale), dy.dtype)


@affine.backward("scale")
def affine_dscale(dy, x):
    return sum(widened(dy) * widened(x), OVER)


@affine.backward("shift")
def affine_dshift(dy):
    return sum(widened(dy), OVER)


def _per_channel(v: Any) -> Any:
    return reshape(v, (1, -1, 1, 1))


def _check(x: Any, weight: Any, bias: Any, running_mean: Array, running_var: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"batch_norm: x must have 4 axes (N, C, H, W), not shape {tuple(x.shape)}")
    if not is_floating(x.dtype):
        raise TypeError(f"batch_norm: x must be floating, not {x.dtype}: sums of small integers overflow; "
                        "convert images with array.astype('float32')")
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    other = {name: str(v.dtype) for name, v in named.items() if v.dtype != real_of(x.dtype)}
    if other:
        raise TypeError(f"batch_norm: x is of {x.dtype}, but {', '.join(f'{name} of {dtype}' for name, dtype in other.items())}; "
                        "all must be of one floating type (beside images of half precision, float32): convert with "
                        "array.astype(...)")
    for name, v in named.items():
        if tuple(v.shape) != (x.shape[1],):
            raise ValueError(f"batch_norm: {name} {tuple(v.shape)} must have one number for each of the {x.shape[1]} channels "
                             f"of x {tuple(x.shape)}: ({x.shape[1]},)")
