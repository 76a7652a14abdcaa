"""minicnn, as the benchmarks see it: on NumPy, and its models on any device."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import threadpoolctl
from cases import Case, arrays, output_gradient
from timing import Task

import minicnn as mc
from minicnn.accelerator import Captured
from minicnn.backend import to_device
from minicnn.kernels.windows import channels_first, channels_last


class Engine:
    """variant: "captured", a training step as a CUDA graph; or an algorithm, by which models convolve."""

    def __init__(self, threads: int, variant: str = "", device: str = "cpu") -> None:
        mc.set_num_threads(threads)
        self.device, self.variant = device, variant

    def versions(self) -> dict[str, str]:
        pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        blas = [f"{pool['internal_api']} {pool['version']}" for pool in pools]
        return {"minicnn": mc.__version__, "NumPy": np.__version__, "NumPy's BLAS": ", ".join(blas) or "unknown"}

    def tasks(self, case: Case) -> dict[str, Task]:
        return self._model(case) if case.kind == "model" else self._operation(case)

    def _operation(self, case: Case) -> dict[str, Task]:
        function = operation(case)
        inputs: dict[str, Any] = arrays(case)
        for name in inputs.keys() - {"labels"}:
            array = laid_out(inputs[name]) if name in case.images else inputs[name]
            inputs[name] = mc.Tensor(array, requires_grad=name not in case.constants)
        wanted = [inputs[name] for name in inputs if name not in case.constants]
        dy = laid_out(output_gradient(function(**inputs).shape))
        return {"forward": Task(lambda: None, lambda _: function(**inputs)),
                "backward": Task(lambda: function(**inputs), lambda y: mc.grad(y, wanted, dy))}

    def _model(self, case: Case) -> dict[str, Task]:
        model = build(case).to(self.device)
        optimizer = mc.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        x, labels = arrays(case).values()
        x = to_device(x, self.device)

        def inference(_: None) -> mc.Tensor:
            with mc.no_grad():
                return model(x)

        def training_step(_: None) -> float:
            optimizer.zero_grad()
            loss = mc.ops.cross_entropy(model(x, train=True), labels)
            loss.backward()
            optimizer.step()
            return float(loss)

        def gradients() -> Any:
            optimizer.zero_grad()
            loss = mc.ops.softmax_cross_entropy(model(x, train=True), there)
            loss.backward()
            return loss.data

        def captured_step(graph: Captured[Any]) -> float:
            loss = graph()
            optimizer.step()
            return float(loss)

        if self.variant == "captured":
            there = to_device(labels, self.device)
            return {"training step": Task(lambda: Captured(gradients, self.device), captured_step)}
        tasks = {"inference": Task(lambda: None, inference), "training step": Task(lambda: None, training_step)}
        return {name: by(self.variant, task) for name, task in tasks.items()} if self.variant else tasks


def by(algorithm: str, task: Task) -> Task:
    """The task with every convolution by that algorithm, where it can."""
    def run(prepared: Any) -> Any:
        with mc.algorithm(algorithm):
            return task.run(prepared)

    return Task(task.prepare, run)


def build(case: Case) -> mc.layers.Sequential:
    return mc.models.build(case.name, in_shape=case.images["x"], **case.options)


def operation(case: Case) -> Callable[..., mc.Tensor]:
    """The function to call with the case's inputs by name."""
    if case.kind == "batch_norm":
        channels, = case.weights["weight"]
        return partial(mc.ops.batch_norm, running_mean=np.zeros(channels, np.float32), running_var=np.ones(channels, np.float32),
                       train=True)
    return partial(getattr(mc.ops, case.kind), **case.options)


def laid_out(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Activations as the layers of this library hand them to each other: channels-last. Pictures arrive as they are stored."""
    if array.ndim != 4 or array.shape[1] == 3:
        return array
    laid: np.ndarray[Any, Any] = channels_first(channels_last(array))
    return laid
