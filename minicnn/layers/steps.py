"""The layers that compute something: convolution, batch norm, linear, ReLU, pooling, and what neighbours among them become."""
from __future__ import annotations

from typing import Any

import numpy as np

from minicnn import initialization, ops
from minicnn.autograd import Tensor, is_recording
from minicnn.backend import Array
from minicnn.initialization import Initializer
from minicnn.kernels.conv import filters_first, filters_last
from minicnn.kernels.windows import Windows, pair
from minicnn.layers.base import Layer, image_shape, is_count
from minicnn.layers.summary import Shape
from minicnn.ops.normalization import scale_and_shift


# ---------------------------------------------------------------- layers with parameters
class Conv2d(Layer):
    """Convolution (`ops.conv2d`): (C, H, W) -> (out_channels, P, Q).

    weight: (out_channels, C / groups, kh, kw), by He et al.'s fan-out normal;  bias: zeros, if any.
    """

    parameter_names = ("weight", "bias")

    def __init__(self, out_channels: int, kernel_size: Any = 3, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                 groups: int = 1, bias: bool = True, weight_init: Initializer = initialization.he_normal("out")) -> None:
        self.windows = Windows.of(kernel_size, stride, padding, dilation)
        self.out_channels, self.kernel_size, self.stride, self.padding = out_channels, kernel_size, stride, padding
        self.dilation, self.groups, self.weight_init = dilation, groups, weight_init
        self._with_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not (is_count(groups) and is_count(out_channels)) or out_channels % groups:
            raise ValueError(f"Conv2d: groups={groups!r} must divide out_channels={out_channels!r}, both integers of at least 1")

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c, h, w = image_shape("Conv2d", in_shape)
        if c % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {c} channels of the input {in_shape}")
        out_size = self.windows.out_size((h, w))
        shape = (self.out_channels, c // self.groups, *self.windows.kernel_size)
        drawn = self.weight_init(shape, rng, dtype)
        self.weight = Tensor(filters_first(filters_last(drawn)), requires_grad=True)        # in memory as the kernels read them
        self.bias = Tensor(np.zeros(self.out_channels, dtype), requires_grad=True) if self._with_bias else None
        return (self.out_channels, *out_size)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """How the filters slide: the options of `ops.conv2d`."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def multiply_adds(self) -> int:
        assert self.weight is not None and self.out_shape is not None
        return int(self.weight.size * np.prod(self.out_shape[1:]))

    def join(self, following: Layer) -> Layer | None:
        if type(self) is Conv2d and type(following) is BatchNorm2d:
            return FusedConv2d(self, norm=following)
        return FusedConv2d(self, rectified=True) if type(self) is Conv2d and type(following) is ReLU else None


class BatchNorm2d(Layer):
    """Batch normalisation (`ops.batch_norm`): (C, H, W) -> the same, each channel by itself.

    weight: ones;  bias, running_mean: zeros;  running_var: ones;  all (C,).
    num_batches_tracked counts training batches, as PyTorch's files do; it stays on the host.
    """

    parameter_names = ("weight", "bias")
    buffer_names = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, momentum: float = 0.1, eps: float = 1e-5) -> None:
        self.momentum, self.eps = momentum, eps
        self.statistics_frozen = False
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.running_mean: Array = None
        self.running_var: Array = None
        self.num_batches_tracked: Array = None

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c = image_shape("BatchNorm2d", in_shape)[0]
        self.weight = Tensor(np.ones(c, dtype), requires_grad=True)
        self.bias = Tensor(np.zeros(c, dtype), requires_grad=True)
        self.running_mean, self.running_var = np.zeros(c, dtype), np.ones(c, dtype)
        self.num_batches_tracked = np.zeros((), np.int64)
        return in_shape

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None, rectified: bool = False,
                residual: Tensor | None = None) -> Tensor:
        learning = self.learns(train)
        y = ops.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, train=learning,
                           momentum=self.momentum, eps=self.eps, rectified=rectified, residual=residual)
        self.num_batches_tracked += learning
        return y

    def join(self, following: Layer) -> Layer | None:
        return FusedBatchNorm2d(self) if type(self) is BatchNorm2d and type(following) is ReLU else None

    def learns(self, train: bool) -> bool:
        """Whether it normalises by the batch's own statistics, and its running ones move."""
        return train and not self.statistics_frozen


class Linear(Layer):
    """Fully connected (`ops.linear`): (in,) -> (out_features,).

    weight: (out_features, in), uniform within 1 / sqrt(in);  bias: the same, or zeros with a weight_init of your own.
    """

    parameter_names = ("weight", "bias")

    def __init__(self, out_features: int, *, bias: bool = True, weight_init: Initializer | None = None) -> None:
        self.out_features, self.weight_init = out_features, weight_init
        self._with_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not is_count(out_features):
            raise ValueError(f"Linear: out_features={out_features!r} must be an integer of at least 1")

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        if len(in_shape) != 1:
            raise ValueError(f"Linear reads a vector, (features,), not {in_shape}: put Flatten() or GlobalAvgPool2d() before it")
        bound = initialization.uniform(in_shape[0] ** -0.5)
        weight_init, bias_init = (bound, bound) if self.weight_init is None else (self.weight_init, initialization.zeros)
        self.weight = Tensor(weight_init((self.out_features, *in_shape), rng, dtype), requires_grad=True)
        if self._with_bias:
            self.bias = Tensor(bias_init((self.out_features,), rng, dtype), requires_grad=True)
        return (self.out_features,)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def multiply_adds(self) -> int:
        assert self.weight is not None
        return self.weight.size


# ---------------------------------------------------------------- layers without
class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.relu(x)


class _Pool(Layer):
    pool: Any

    def __init__(self, kernel_size: Any = 2, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> None:
        self.kernel_size, self.stride, self.padding, self.ceil_mode = kernel_size, stride, padding, ceil_mode
        self.windows = Windows.of(kernel_size, kernel_size if stride is None else stride, padding, 1, ceil_mode)

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c, h, w = image_shape(type(self).__name__, in_shape)
        return (c, *self.windows.out_size((h, w)))

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return type(self).pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode)


class MaxPool2d(_Pool):
    """The largest of each window (`ops.max_pool2d`)."""
    pool = staticmethod(ops.max_pool2d)


class AvgPool2d(_Pool):
    """The mean of each window (`ops.avg_pool2d`)."""
    pool = staticmethod(ops.avg_pool2d)


class AdaptiveAvgPool2d(Layer):
    """Means over output_size windows that share the image out (`ops.adaptive_avg_pool2d`): (C, H, W) -> (C, P, Q)."""

    def __init__(self, output_size: Any) -> None:
        self.output_size = pair(output_size, "output_size", 1)

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return (image_shape("AdaptiveAvgPool2d", in_shape)[0], *self.output_size)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.adaptive_avg_pool2d(x, self.output_size)


class GlobalAvgPool2d(Layer):
    """The mean of each channel: (C, H, W) -> (C,)."""

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return image_shape("GlobalAvgPool2d", in_shape)[:1]

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.global_avg_pool2d(x)


class Flatten(Layer):
    """(C, H, W) -> (C * H * W,)"""

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return (int(np.prod(in_shape)),)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return x.reshape(len(x), int(np.prod(x.shape[1:])))


class SimAM(Layer):
    """Scale each pixel by how much it stands out of its channel (`ops.simam`): (C, H, W) -> the same. No parameters.

    e_lambda: the lambda of the paper. In a residual block it stands behind the last batch norm of the body.
    """

    def __init__(self, e_lambda: float = 1e-4) -> None:
        self.e_lambda = e_lambda

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        _, h, w = image_shape("SimAM", in_shape)
        if h * w < 2:
            raise ValueError(f"SimAM measures a pixel by the others of its channel, and {in_shape} has one pixel a channel: "
                             "leave it out where the image has shrunk so far")
        return in_shape

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.simam(x, self.e_lambda)


class Dropout(Layer):
    """Zero a random share p of the numbers in training (`ops.dropout`)."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: p={p} must be a share between 0 and 1")
        self.p = p

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.dropout(x, self.p, train=train, rng=rng)


# ---------------------------------------------------------------- neighbours that run as one
# Only exact types are joined: a subclass may compute something else.
class Fused(Layer):
    """Layers that run as one; it owns nothing and reads the parameters of its parts. Errors name the first of them."""

    first: Layer
    first_name: str

    def spans(self, first: Layer, last: Layer) -> None:
        """It reads what the first reads and gives what the last gives."""
        self.first = first
        self.in_shape, self.out_shape, self.dtype = first.in_shape, last.out_shape, first.dtype


class FusedConv2d(Fused):
    """A convolution with the batch norm and the ReLU that follow it.

    In training the batch norm needs the whole convolution's statistics first, and rectifies what it normalises. At inference it
    is one number times each channel plus another, done to each block of the convolution while it is in cache:

        y = scale (w * x) + shift,      scale = weight / sqrt(var + eps),   shift = bias - scale mean
    """

    def __init__(self, conv: Conv2d, norm: BatchNorm2d | None = None, rectified: bool = False) -> None:
        self.conv, self.norm, self.rectified = conv, norm, rectified
        self.spans(conv, norm or conv)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        conv, norm = self.conv, self.norm
        if norm is None:
            return (ops.conv2d_relu if self.rectified else ops.conv2d)(x, conv.weight, conv.bias, **conv.settings)
        if norm.learns(train):
            return norm.forward(conv.forward(x, train, rng), train, rng, rectified=self.rectified)
        return self.at_inference(x, None, self.rectified)

    def join(self, following: Layer) -> Layer | None:
        return None if self.rectified or type(following) is not ReLU else FusedConv2d(self.conv, self.norm, rectified=True)

    def onto(self, residual: Tensor, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        """max(this of x + residual, 0), in the passes that the batch norm takes."""
        assert self.norm is not None
        if self.norm.learns(train):
            return self.norm.forward(self.conv.forward(x, train, rng), train, rng, rectified=True, residual=residual)
        return self.at_inference(x, residual, rectified=True)

    def at_inference(self, x: Tensor, residual: Tensor | None, rectified: bool) -> Tensor:
        """The same by the running statistics, with a residual that is added before the ReLU."""
        conv, norm = self.conv, self.norm
        assert norm is not None and norm.weight is not None and norm.bias is not None
        weight, bias, shifted = (p if p is None or is_recording() else p.data for p in (norm.weight, norm.bias, conv.bias))
        mean = norm.running_mean if shifted is None else norm.running_mean - shifted        # arrays, where these will do
        scale, shift = scale_and_shift(weight, bias, mean, norm.running_var, norm.eps)
        return ops.conv2d_affine(x, conv.weight, scale, shift, residual, rectified=rectified, **conv.settings)


class FusedBatchNorm2d(Fused):
    """A batch norm and the ReLU after it."""

    def __init__(self, norm: BatchNorm2d) -> None:
        self.norm = norm
        self.spans(norm, norm)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return self.norm.forward(x, train, rng, rectified=True)
