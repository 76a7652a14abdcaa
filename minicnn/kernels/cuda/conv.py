"""A convolution with what follows it, on a GPU."""
from __future__ import annotations

from minicnn.backend import Array
from minicnn.kernels import conv
from minicnn.kernels.windows import Windows


def conv2d_affine(x: Array, weight: Array, scale: Array, shift: Array, residual: Array | None, rectified: bool, windows: Windows,
                  groups: int, algorithm: str | None) -> Array:
    """max(scale conv2d(x, weight) + shift + residual, 0): the pass that adds and rectifies scales for nothing."""
    return conv.conv2d(x, weight, None, windows, groups, algorithm, conv.affine(scale, shift, residual, rectified))
