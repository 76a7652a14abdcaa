"""minicnn: a from-scratch convolutional-network engine on NumPy and CuPy, made to be read.

    x = mc.Tensor(images, requires_grad=True)
    y = mc.ops.relu(mc.ops.conv2d(x, weight, padding=1))
    y.sum().backward()                      # x.grad
"""
from minicnn import ops
from minicnn.autograd import Op, Tensor, grad, no_grad, op
from minicnn.kernels.conv import col2im, im2col

__version__ = "0.1.0"

__all__ = ["Op", "Tensor", "col2im", "grad", "im2col", "no_grad", "op", "ops"]
