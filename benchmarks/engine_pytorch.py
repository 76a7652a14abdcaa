"""PyTorch, as the benchmarks see it: in one of its two memory formats, with models translated layer by layer from minicnn's."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import Case, arrays, output_gradient
from engine_minicnn import build
from timing import Task
from torch import nn
from torch.nn.utils import skip_init

import minicnn.layers as layers
from minicnn.models.resnet import PadShortcut

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Engine:
    def __init__(self, threads: int, variant: str, device: str = "cpu", cast: AbstractContextManager[Any] | None = None) -> None:
        """device: of models; their forwards run inside `cast`."""
        torch.set_num_threads(threads)
        self.format, self.device, self.cast = FORMATS[variant], device, cast or nullcontext()

    def versions(self) -> dict[str, str]:
        return {"PyTorch": str(torch.__version__)}

    def tasks(self, case: Case) -> dict[str, Task]:
        return self._model(case) if case.kind == "model" else self._operation(case)

    def _operation(self, case: Case) -> dict[str, Task]:
        function = operation(case)
        inputs = {name: self._tensor(array).requires_grad_(name not in case.constants) for name, array in arrays(case).items()}
        wanted = [inputs[name] for name in inputs if name not in case.constants]
        dy = self._tensor(np.asarray(output_gradient(function(**inputs).shape)))
        return {"forward": Task(lambda: None, lambda _: function(**inputs)),
                "backward": Task(lambda: function(**inputs), lambda y: torch.autograd.grad(y, wanted, dy))}

    def _model(self, case: Case) -> dict[str, Task]:
        model = translate(build(case)).to(self.device, memory_format=self.format)       # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        x, labels = (self._tensor(array).to(self.device) for array in arrays(case).values())

        def inference(_: object) -> torch.Tensor:
            with torch.inference_mode(), self.cast:
                logits: torch.Tensor = model(x)
                return logits

        def training_step(_: object) -> float:
            optimizer.zero_grad()
            with self.cast:
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return {"inference": Task(model.eval, inference), "training step": Task(model.train, training_step)}

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.contiguous(memory_format=self.format) if tensor.ndim == 4 else tensor


def operation(case: Case) -> Callable[..., torch.Tensor]:
    """The function to call with the case's inputs by name."""
    channels = case.weights["weight"][0] if case.kind == "batch_norm" else 0
    mean, var = torch.zeros(channels), torch.ones(channels)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "conv2d": lambda x, weight, bias=None, **options: F.conv2d(x, weight, bias, **options),
        "linear": lambda x, weight, bias: F.linear(x, weight, bias),
        "max_pool2d": lambda x, **window: F.max_pool2d(x, **window),
        "avg_pool2d": lambda x, **window: F.avg_pool2d(x, **window),
        "global_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "batch_norm": lambda x, weight, bias: F.batch_norm(x, mean, var, weight, bias, training=True),
        "relu": lambda x: F.relu(x),
        "add": lambda a, b: a + b,
        "cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels),
    }
    return partial(functions[case.kind], **case.options)


# ---------------------------------------------------------------- the same layer list, in PyTorch
def translate(layer: layers.Layer) -> nn.Module:
    """A built layer as a module with the same parameters, written as PyTorch's own models are: in place."""
    match layer:
        case layers.Sequential():
            return nn.Sequential(*map(translate, layer.layers))
        case layers.Residual():
            return Residual(translate(layer.body), translate(layer.shortcut))
        case layers.Conv2d():
            assert layer.in_shape is not None
            return _with_parameters(layer, skip_init(
                nn.Conv2d, layer.in_shape[0], layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, bias=layer.bias is not None))
        case layers.BatchNorm2d():
            assert layer.in_shape is not None
            return _with_parameters(layer, nn.BatchNorm2d(layer.in_shape[0], layer.eps, layer.momentum))
        case layers.Linear():
            assert layer.in_shape is not None
            return _with_parameters(layer, skip_init(nn.Linear, layer.in_shape[0], layer.out_features, bias=layer.bias is not None))
        case layers.ReLU():
            return nn.ReLU(inplace=True)
        case layers.MaxPool2d():
            return nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding, ceil_mode=layer.ceil_mode)
        case layers.AdaptiveAvgPool2d():
            return nn.AdaptiveAvgPool2d(layer.output_size)
        case layers.GlobalAvgPool2d():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case layers.Flatten():
            return nn.Flatten()
        case layers.Dropout():
            return nn.Dropout(layer.p)
        case PadShortcut():
            return Padded(layer)
    raise TypeError(f"no module of PyTorch is known for {layer!r}: add it to translate()")


def _with_parameters(layer: layers.Conv2d | layers.BatchNorm2d | layers.Linear, module: nn.Module) -> nn.Module:
    for name in layer.parameter_names:
        parameter = getattr(layer, name)
        if parameter is not None:
            setattr(module, name, nn.Parameter(torch.from_numpy(np.ascontiguousarray(parameter.data))))     # in PyTorch's layout
    return module


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        y += self.shortcut(x)
        return y


class Padded(nn.Module):
    """Shortcut option A: every stride-th pixel, and zero channels on both sides."""

    def __init__(self, layer: PadShortcut) -> None:
        super().__init__()
        assert layer.in_shape is not None
        self.stride, self.side = layer.stride, (layer.channels - layer.in_shape[0]) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.side, self.side))
