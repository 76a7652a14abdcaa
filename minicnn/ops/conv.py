"""Convolution: three maps, each the others' derivative.

conv2d(x, weight) is linear in x and in weight. So its gradient in x is a linear map of dy that depends on weight alone
(`conv2d_input_grad`, the transposed convolution), its gradient in weight one that depends on x alone
(`conv2d_weight_grad`), and the derivatives of these two lead back to the three: gradients of any order.
"""
from __future__ import annotations

from typing import Any

from minicnn.autograd import op
from minicnn.backend import Array, is_array, real_of
from minicnn.kernels import conv as kernels
from minicnn.kernels.conv import affine
from minicnn.kernels.normalization import channel_total
from minicnn.kernels.windows import Windows
from minicnn.ops.activation import where_positive
from minicnn.ops.movement import astype, sum, widened


@op(real=("weight", "bias"))
def conv2d(x: Array, weight: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
           groups: int = 1, algorithm: str | None = None) -> Array:
    """Slide every filter over every image: cross-correlation with zero padding.

    y[n, k, p, q] = bias[k] + sum_{c, i, j} weight[k, c, i, j] x[n, c, p stride - padding + i dilation, q stride - ...]

    x: (N, C, H, W).   weight: (K, C / groups, kh, kw).   bias: (K,) or None.   All of one type; beside images of half precision
    weight and bias are float32, and so are their gradients.   Returns (N, K, P, Q) with
    P = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1, and Q alike.
    stride, padding, dilation: an int, or a pair (rows, columns).
    groups: filters k of a group see the channels of their group alone; groups = C is a depthwise convolution.
    algorithm: "im2col", "direct", "winograd" or "auto", for this call and its gradients; by default what `with
    minicnn.algorithm(...)` says around it.
    Raises ValueError where the shapes do not fit, or the algorithm cannot serve.
    """
    windows = Windows.of(_kernel_size(weight), stride, padding, dilation)
    _check(x, weight, bias, groups)
    return kernels.conv2d(x, weight, bias, windows, groups, algorithm)


@conv2d.backward("x")
def conv2d_dx(dy, weight, x_shape, stride, padding, dilation, groups, algorithm):
    return conv2d_input_grad(dy, weight, x_shape[2:], stride=stride, padding=padding,
                             dilation=dilation, groups=groups, algorithm=algorithm)


@conv2d.backward("weight")
def conv2d_dweight(dy, x, weight_shape, stride, padding, dilation, groups, algorithm):
    return conv2d_weight_grad(x, dy, weight_shape[2:], stride=stride, padding=padding,
                              dilation=dilation, groups=groups, algorithm=algorithm)


@conv2d.backward("bias")
def conv2d_dbias(dy):
    return total(dy)


@op(real=("weight", "bias"))
def conv2d_relu(x: Array, weight: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1, algorithm: str | None = None) -> Array:
    """y = max(conv2d(x, weight, bias), 0), each block rectified while it is in cache; arguments as for `conv2d`.

    dy reaches the convolution where y > 0; from there on the gradients are the convolution's.
    """
    windows = Windows.of(_kernel_size(weight), stride, padding, dilation)
    _check(x, weight, bias, groups)
    return kernels.conv2d(x, weight, bias, windows, groups, algorithm, finish=affine(None, None, None, True))


@conv2d_relu.backward("x", "weight", "bias")
def conv2d_relu_backward(dy, x, weight, y, stride, padding, dilation, groups, algorithm, wanted):
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "algorithm": algorithm}
    dz = where_positive(dy, y)
    return (conv2d_input_grad(dz, weight, x.shape[2:], **settings) if "x" in wanted else None,
            conv2d_weight_grad(x, dz, weight.shape[2:], **settings) if "weight" in wanted else None,
            total(dz) if "bias" in wanted else None)


@op(real=("weight", "scale", "shift"))
def conv2d_affine(x: Array, weight: Array, scale: Array, shift: Array, residual: Array | None = None, *, rectified: bool = False,
                  stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, algorithm: str | None = None) -> Array:
    """y = scale conv2d(x, weight) + shift + residual, and max(y, 0) if rectified; all of it to each block while it is in cache.

    A convolution, the batch norm after it as it is at inference, a residual addition and a ReLU, in one pass.
    scale, shift: (K,).   residual: like y, or None.   The others as for `conv2d`.

    With dz = dy where y > 0:   dresidual = dz,   dshift = sum dz,   dscale = sum dz conv2d(x, weight);
    scale dz reaches the convolution.
    """
    windows = Windows.of(_kernel_size(weight), stride, padding, dilation)
    _check(x, weight, shift, groups)
    if tuple(scale.shape) != tuple(shift.shape):
        raise ValueError(f"conv2d_affine: scale {tuple(scale.shape)} must have one number for each of the "
                         f"{len(weight)} filters, as shift has")
    out_shape = (len(x), len(weight), *windows.out_size(x.shape[2:]))
    if residual is not None and tuple(residual.shape) != out_shape:
        raise ValueError(f"conv2d_affine: residual {tuple(residual.shape)} must have the shape of the result, {out_shape}")
    return kernels.conv2d_affine(x, weight, scale, shift, residual, rectified, windows, groups, algorithm)


@conv2d_affine.backward("x", "weight", "scale", "shift", "residual")
def conv2d_affine_backward(dy, x, weight, scale, y, rectified, stride, padding, dilation, groups, algorithm, wanted):
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "algorithm": algorithm}
    dz = where_positive(dy, y) if rectified else dy
    scaled = astype(widened(dz) * scale.reshape(-1, 1, 1), dz.dtype)
    return (conv2d_input_grad(scaled, weight, x.shape[2:], **settings) if "x" in wanted else None,
            conv2d_weight_grad(x, scaled, weight.shape[2:], **settings) if "weight" in wanted else None,
            total(widened(dz) * widened(conv2d(x, weight, **settings))) if "scale" in wanted else None,
            total(dz) if "shift" in wanted else None,
            dz if "residual" in wanted else None)


@op(real=("weight",))
def conv2d_input_grad(dy: Array, weight: Array, in_size: tuple[int, int], *, stride: Any = 1, padding: Any = 0,
                      dilation: Any = 1, groups: int = 1, algorithm: str | None = None) -> Array:
    """(N, K, P, Q), (K, C / groups, kh, kw) -> (N, C, H, W): each output's number back to the pixels it saw, times the weight.

    dx[n, c, p stride - padding + i dilation, ...] += sum_k weight[k, c, i, j] dy[n, k, p, q]
    """
    windows = Windows.of(_kernel_size(weight), stride, padding, dilation)
    _check_output_grad("conv2d_input_grad", dy, len(weight), in_size, windows)
    return kernels.conv2d_input_grad(dy, weight, in_size, windows, groups, algorithm)


@conv2d_input_grad.backward("dy")
def conv2d_input_grad_ddy(g, weight, stride, padding, dilation, groups, algorithm):
    return conv2d(g, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, algorithm=algorithm)


@conv2d_input_grad.backward("weight")
def conv2d_input_grad_dweight(g, dy, weight_shape, stride, padding, dilation, groups, algorithm):
    return conv2d_weight_grad(g, dy, weight_shape[2:], stride=stride, padding=padding,
                              dilation=dilation, groups=groups, algorithm=algorithm)


@op(real=("y",))
def conv2d_weight_grad(x: Array, dy: Array, kernel_size: tuple[int, int], *, stride: Any = 1, padding: Any = 0,
                       dilation: Any = 1, groups: int = 1, algorithm: str | None = None) -> Array:
    """(N, C, H, W), (N, K, P, Q) -> (K, C / groups, kh, kw): how much of each output's number each weight is answerable for.

    dweight[k, c, i, j] = sum_{n, p, q} dy[n, k, p, q] x[n, c, p stride - padding + i dilation, ...]
    """
    windows = Windows.of(kernel_size, stride, padding, dilation)
    _check_output_grad("conv2d_weight_grad", dy, dy.shape[1], x.shape[2:], windows)
    return kernels.conv2d_weight_grad(x, dy, windows, groups, algorithm)


@conv2d_weight_grad.backward("x")
def conv2d_weight_grad_dx(g, dy, x_shape, stride, padding, dilation, groups, algorithm):
    return conv2d_input_grad(dy, g, x_shape[2:], stride=stride, padding=padding,
                             dilation=dilation, groups=groups, algorithm=algorithm)


@conv2d_weight_grad.backward("dy")
def conv2d_weight_grad_ddy(g, x, stride, padding, dilation, groups, algorithm):
    return conv2d(x, g, stride=stride, padding=padding, dilation=dilation, groups=groups, algorithm=algorithm)


def total(dy: Any) -> Any:
    """(N, K, P, Q) -> (K,): the sum of each channel, which is what a bias's gradient is."""
    return channel_total(dy) if is_array(dy) else sum(widened(dy), (0, 2, 3))


def _kernel_size(weight: Array) -> tuple[int, int]:
    if weight.ndim != 4:
        raise ValueError(f"conv2d: weight must have 4 axes (K, C / groups, kh, kw), not shape {tuple(weight.shape)}")
    return weight.shape[2:]


def _check(x: Array, weight: Array, bias: Array | None, groups: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"conv2d: x must have 4 axes (N, C, H, W), not shape {tuple(x.shape)}; "
                         "a single image becomes a batch with x[None]")
    c, (k, c_group) = x.shape[1], weight.shape[:2]
    if not isinstance(groups, int) or groups < 1 or c % groups or k % groups:
        raise ValueError(f"conv2d: groups={groups} must divide the {c} channels of x {tuple(x.shape)} "
                         f"and the {k} filters of weight {tuple(weight.shape)}")
    if c_group * groups != c:
        raise ValueError(f"conv2d: x {tuple(x.shape)} has {c} channels, but weight {tuple(weight.shape)} with groups={groups} "
                         f"reads {c_group * groups}: weight must be (K, C / groups, kh, kw) = (K, {c // groups}, kh, kw)")
    if real_of(x.dtype) != real_of(weight.dtype):
        raise TypeError(f"conv2d: x is {x.dtype} and weight {weight.dtype}; images of integers are converted first, "
                        f"with array.astype({str(weight.dtype)!r})")
    if bias is not None and tuple(bias.shape) != (k,):
        raise ValueError(f"conv2d: bias {tuple(bias.shape)} must have one number for each of the {k} filters: ({k},)")


def _check_output_grad(function: str, dy: Array, filters: int, in_size: Any, windows: Windows) -> None:
    p, q = windows.out_size(in_size)
    if dy.ndim != 4 or tuple(dy.shape[1:]) != (filters, p, q):
        raise ValueError(f"{function}: dy {tuple(dy.shape)} does not fit: {filters} filters of {windows.kernel_size} on an image "
                         f"of {tuple(in_size)} give (N, {filters}, {p}, {q}); check the sizes, stride, padding and dilation")
