"""Plain NumPy, as the benchmarks see it: convolution the way it is mostly written after first reading about im2col.

Channels first, (N, C, H, W) in C order. A convolution gathers the columns of the whole batch, multiplies them by the filters in
one product on NumPy's BLAS, and keeps them for its backward. Every other step is the plain expression: nothing is fused, no memory
is used again, no pass is saved. What is left of the difference to minicnn is what an engine is for.

The models are translated layer by layer from minicnn's own lists, with their parameters, so that both compute the same numbers.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import threadpoolctl
from cases import Case, arrays
from engine_minicnn import build
from timing import Task

import minicnn.layers as layers
from minicnn.kernels.windows import Windows
from minicnn.models.resnet import PadShortcut

Array = np.ndarray[Any, Any]


class Engine:
    def __init__(self, threads: int, variant: str = "") -> None:
        threadpoolctl.threadpool_limits(threads, user_api="blas")      # NumPy's other work is on one thread, always

    def versions(self) -> dict[str, str]:
        return {"plain": f"whole-batch im2col in NumPy {np.__version__}"}

    def tasks(self, case: Case) -> dict[str, Task]:
        """Of models; single operations are not its matter."""
        if case.kind != "model":
            return {}
        model = translate(build(case))
        optimizer = SGD(model, lr=0.01, momentum=0.9, weight_decay=1e-4)
        x, labels = arrays(case).values()

        def training_step(_: None) -> float:
            loss, dlogits = cross_entropy(model.forward(x, train=True), labels)
            model.backward(dlogits)
            optimizer.step()
            return loss

        return {"inference": Task(lambda: None, lambda _: model.forward(x, train=False)),
                "training step": Task(lambda: None, training_step)}


# ---------------------------------------------------------------- im2col
def im2col(x: Array, windows: Windows, fill: float = 0.0) -> Array:
    """(N, C, H, W) -> (N, C, kh, kw, P, Q): what each output sees through each tap of its window; padding is `fill`."""
    (kh, kw), (sh, sw), (ph, pw) = windows.kernel_size, windows.stride, windows.padding
    p, q = windows.out_size(x.shape[2:])
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=fill)
    columns = np.empty((*x.shape[:2], kh, kw, p, q), x.dtype)
    for i in range(kh):
        for j in range(kw):
            columns[:, :, i, j] = padded[:, :, i:i + sh * p:sh, j:j + sw * q:sw]
    return columns


def col2im(columns: Array, windows: Windows, shape: tuple[int, ...]) -> Array:
    """The adjoint, (N, C, kh, kw, P, Q) -> `shape`, (N, C, H, W): every entry is added to the pixel that it came from."""
    (kh, kw), (sh, sw), (ph, pw) = windows.kernel_size, windows.stride, windows.padding
    (n, c, h, w), (p, q) = shape, columns.shape[4:]
    padded = np.zeros((n, c, h + 2 * ph, w + 2 * pw), columns.dtype)
    for i in range(kh):
        for j in range(kw):
            padded[:, :, i:i + sh * p:sh, j:j + sw * q:sw] += columns[:, :, i, j]
    return padded[:, :, ph:ph + h, pw:pw + w]


# ---------------------------------------------------------------- layers
class Layer:
    """y = forward(x, train); after train=True, dx = backward(dy), which leaves the parameters' gradients in `gradients`."""

    def __init__(self, **parameters: Array) -> None:
        self.parameters, self.gradients = parameters, dict[str, Array]()

    def forward(self, x: Array, train: bool) -> Array:
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        raise NotImplementedError

    def walk(self) -> Iterator[Layer]:
        """The layers that own parameters, in the order of minicnn's `parameters()`."""
        yield self


class Sequential(Layer):
    def __init__(self, inside: list[Layer]) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Array, train: bool) -> Array:
        for layer in self.inside:
            x = layer.forward(x, train)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.inside):
            dy = layer.backward(dy)
        return dy

    def walk(self) -> Iterator[Layer]:
        for layer in self.inside:
            yield from layer.walk()


class Residual(Layer):
    def __init__(self, body: Layer, shortcut: Layer) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Array, train: bool) -> Array:
        return self.body.forward(x, train) + self.shortcut.forward(x, train)

    def backward(self, dy: Array) -> Array:
        return self.body.backward(dy) + self.shortcut.backward(dy)

    def walk(self) -> Iterator[Layer]:
        yield from self.body.walk()
        yield from self.shortcut.walk()


class PadChannels(Layer):
    """Shortcut option A: every stride-th pixel, and `side` zero channels before and behind."""

    def __init__(self, stride: int, side: int) -> None:
        super().__init__()
        self.stride, self.side = stride, side

    def forward(self, x: Array, train: bool) -> Array:
        self.shape = x.shape
        return np.pad(x[:, :, ::self.stride, ::self.stride], ((0, 0), (self.side, self.side), (0, 0), (0, 0)))

    def backward(self, dy: Array) -> Array:
        dx = np.zeros(self.shape, dy.dtype)
        dx[:, :, ::self.stride, ::self.stride] = dy[:, self.side:self.side + self.shape[1]]
        return dx


class Conv2d(Layer):
    """weight: (K, C, kh, kw);  bias: (K,), or none;  (N, C, H, W) -> (N, K, P, Q)"""

    def __init__(self, windows: Windows, **parameters: Array) -> None:
        super().__init__(**parameters)
        self.windows = windows

    def forward(self, x: Array, train: bool) -> Array:
        columns = im2col(x, self.windows)
        if train:
            self.shape, self.columns = x.shape, columns
        y = np.tensordot(columns, self.parameters["weight"], ((1, 2, 3), (1, 2, 3)))            # (N, P, Q, K)
        if "bias" in self.parameters:
            y = y + self.parameters["bias"]
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    def backward(self, dy: Array) -> Array:
        self.gradients["weight"] = np.tensordot(dy, self.columns, ((0, 2, 3), (0, 4, 5)))
        if "bias" in self.parameters:
            self.gradients["bias"] = dy.sum(axis=(0, 2, 3))
        columns = np.tensordot(self.parameters["weight"], dy, (0, 1))                           # (C, kh, kw, N, P, Q)
        return col2im(columns.transpose(3, 0, 1, 2, 4, 5), self.windows, self.shape)


class BatchNorm2d(Layer):
    """weight, bias: (C,);  each channel by the mean and variance of the batch, or at inference by the running ones."""

    def __init__(self, momentum: float, eps: float, **parameters: Array) -> None:
        super().__init__(**parameters)
        self.momentum, self.eps = momentum, eps
        self.running_mean, self.running_var = np.zeros_like(parameters["bias"]), np.ones_like(parameters["bias"])

    def forward(self, x: Array, train: bool) -> Array:
        mean, var = self.running_mean, self.running_var
        if train:
            mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
            count = x.size // x.shape[1]
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var * count / (count - 1)
        self.std = np.sqrt(var + self.eps)
        self.x_hat = (x - channelwise(mean)) / channelwise(self.std)
        return channelwise(self.parameters["weight"]) * self.x_hat + channelwise(self.parameters["bias"])

    def backward(self, dy: Array) -> Array:
        """With means over everything but the channel:  dx = weight / std (dy - mean(dy) - x_hat mean(dy x_hat))"""
        self.gradients["weight"] = (dy * self.x_hat).sum(axis=(0, 2, 3))
        self.gradients["bias"] = dy.sum(axis=(0, 2, 3))
        count = dy.size // dy.shape[1]
        mean_dy, mean_dy_x = (channelwise(self.gradients[name] / count) for name in ("bias", "weight"))
        return channelwise(self.parameters["weight"] / self.std) * (dy - mean_dy - self.x_hat * mean_dy_x)


def channelwise(vector: Array) -> Array:
    """(C,) -> (1, C, 1, 1), beside images"""
    return vector[None, :, None, None]


class Linear(Layer):
    """weight: (out, in);  bias: (out,), or none;  (N, in) -> (N, out)"""

    def forward(self, x: Array, train: bool) -> Array:
        self.x = x
        y = x @ self.parameters["weight"].T
        return y + self.parameters["bias"] if "bias" in self.parameters else y

    def backward(self, dy: Array) -> Array:
        self.gradients["weight"] = dy.T @ self.x
        if "bias" in self.parameters:
            self.gradients["bias"] = dy.sum(axis=0)
        return dy @ self.parameters["weight"]


class ReLU(Layer):
    def forward(self, x: Array, train: bool) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class Dropout(Layer):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.rng = p, np.random.default_rng(0)

    def forward(self, x: Array, train: bool) -> Array:
        if not train:
            return x
        self.scale = np.asarray(self.rng.random(x.shape, np.float32) >= self.p, x.dtype) / np.float32(1 - self.p)
        return x * self.scale

    def backward(self, dy: Array) -> Array:
        return dy * self.scale


class MaxPool2d(Layer):
    """(N, C, H, W) -> (N, C, P, Q)"""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, x: Array, train: bool) -> Array:
        columns = im2col(x, self.windows, fill=-np.inf)
        n, c, kh, kw, p, q = self.columns_shape = columns.shape
        columns = columns.reshape(n, c, kh * kw, p, q)
        self.shape, self.where = x.shape, columns.argmax(axis=2, keepdims=True)
        return np.take_along_axis(columns, self.where, axis=2)[:, :, 0]

    def backward(self, dy: Array) -> Array:
        n, c, kh, kw, p, q = self.columns_shape
        columns = np.zeros((n, c, kh * kw, p, q), dy.dtype)
        np.put_along_axis(columns, self.where, dy[:, :, None], axis=2)
        return col2im(columns.reshape(self.columns_shape), self.windows, self.shape)


class AdaptiveAvgPool2d(Layer):
    """Means over `out_size` windows, from floor(p H / P) to ceil((p + 1) H / P):  (N, C, H, W) -> (N, C, P, Q)"""

    def __init__(self, out_size: tuple[int, int]) -> None:
        super().__init__()
        self.out_size = out_size

    def forward(self, x: Array, train: bool) -> Array:
        self.shape = x.shape
        y = np.empty((*x.shape[:2], *self.out_size), x.dtype)
        for p, q, rows, columns in self.windows():
            y[:, :, p, q] = x[:, :, rows, columns].mean(axis=(2, 3))
        return y

    def backward(self, dy: Array) -> Array:
        dx = np.zeros(self.shape, dy.dtype)
        for p, q, rows, columns in self.windows():
            window = dx[:, :, rows, columns]
            window += dy[:, :, p, q, None, None] / (window.shape[2] * window.shape[3])
        return dx

    def windows(self) -> Iterator[tuple[int, int, slice, slice]]:
        rows, columns = ([slice(i * n // out, -(-(i + 1) * n // out)) for i in range(out)]
                         for n, out in zip(self.shape[2:], self.out_size))
        yield from ((p, q, rows[p], columns[q]) for p in range(len(rows)) for q in range(len(columns)))


class Flatten(Layer):
    def forward(self, x: Array, train: bool) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.shape)


# ---------------------------------------------------------------- loss and optimiser
def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The mean over the batch of -log softmax at the label, and its gradient.  logits: (N, classes), labels: (N,)"""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    images = np.arange(len(labels))
    gradient = np.exp(log_p)
    gradient[images, labels] -= 1
    return float(-log_p[images, labels].mean()), gradient / np.float32(len(labels))


class SGD:
    """v = momentum v + dw + weight_decay w,   w = w - lr v"""

    def __init__(self, model: Layer, lr: float, momentum: float, weight_decay: float) -> None:
        self.model, self.lr, self.momentum, self.weight_decay = model, lr, momentum, weight_decay
        self.velocities = [{name: np.zeros_like(value) for name, value in layer.parameters.items()} for layer in model.walk()]

    def step(self) -> None:
        for layer, velocity in zip(self.model.walk(), self.velocities):
            for name, value in layer.parameters.items():
                velocity[name] = self.momentum * velocity[name] + layer.gradients[name] + self.weight_decay * value
                layer.parameters[name] = value - self.lr * velocity[name]


# ---------------------------------------------------------------- the same layer list, in plain NumPy
def translate(layer: layers.Layer) -> Layer:
    """A built layer as one of these, with the same parameters."""
    parameters = {name: np.array(getattr(layer, name).data, order="C")
                  for name in layer.parameter_names if getattr(layer, name) is not None}
    match layer:
        case layers.Sequential():
            return Sequential([translate(inner) for inner in layer.layers])
        case layers.Residual():
            return Residual(translate(layer.body), translate(layer.shortcut))
        case PadShortcut(in_shape=(channels, _, _)):
            return PadChannels(layer.stride, (layer.channels - channels) // 2)
        case layers.Conv2d(groups=1, windows=Windows(dilation=(1, 1))):
            return Conv2d(layer.windows, **parameters)
        case layers.BatchNorm2d():
            return BatchNorm2d(layer.momentum, layer.eps, **parameters)
        case layers.Linear():
            return Linear(**parameters)
        case layers.ReLU():
            return ReLU()
        case layers.Dropout():
            return Dropout(layer.p)
        case layers.MaxPool2d(ceil_mode=False):
            return MaxPool2d(layer.windows)
        case layers.AdaptiveAvgPool2d():
            return AdaptiveAvgPool2d(layer.output_size)
        case layers.GlobalAvgPool2d():
            return Sequential([AdaptiveAvgPool2d((1, 1)), Flatten()])
        case layers.Flatten():
            return Flatten()
    raise TypeError(f"no plain layer is known for {layer!r}: add it to translate()")
