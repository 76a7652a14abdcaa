"""A fresh process that measures one model: it reads a line of JSON, answers by one, and ends.

    python -m minicnn.bench.worker

    {"do": "time", "task": "inference", ...}    -> {"seconds": [...], "first_call": ...}
    {"do": "peak", "task": ...}                 -> {"peak_bytes": ...}      of this process, or of the GPU's pool
    {"do": "layers", ...}                       -> {"layers": [...]}        every layer by itself
    anything that fails                         -> {"failed": "..."}

Fresh, because a peak is one of a process, and because nothing that ran before may have warmed or filled anything.
"""
from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import minicnn as mc
from minicnn.backend import Array, to_device
from minicnn.bench import cases, engine, kernels, measure
from minicnn.bench.measure import Call, Care
from minicnn.layers import Layer, Residual, Sequential
from minicnn.threads import num_threads

TASKS = ("inference", "training step")


def main() -> None:
    """Answer one request."""
    answers, sys.stdout = sys.stdout, sys.stderr            # what a library prints must not mix with the answer
    try:
        found = answer(json.loads(sys.stdin.readline()))
    except (MemoryError, ValueError, RuntimeError, OSError) as error:
        found = {"failed": "out of memory; a smaller --batch takes less" if isinstance(error, MemoryError) else str(error)}
    print(json.dumps(found), file=answers, flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for."""
    device, care = request["backend"], Care(*request["care"])
    with num_threads(request["threads"]):
        model = cases.build(request["model"], request["quick"]).to(device)
        if request["do"] == "layers":
            return {"layers": list(by_layer(model, request["batch"], device, care))}
        call, clock = task(model, request["task"], request["batch"], device), measure.clock_of(device)
        if request["do"] == "peak":
            call()
            call()                                          # the second has the optimiser's memory beside it
            return {"peak_bytes": peak_bytes(device)}
        first_call = clock(call)
        return {"first_call": first_call, "seconds": measure.repeat(call, clock, care)}


def task(model: Sequential, name: str, batch: int, device: str) -> Call:
    """What is timed: inference, or a training step with SGD and momentum, on random pictures."""
    assert model.in_shape is not None
    rng = np.random.default_rng(0)
    x = to_device(rng.standard_normal((batch, *model.in_shape), dtype=np.float32), device)
    labels = to_device(rng.integers(0, 10, batch), device)
    if name == "inference":
        def infer() -> mc.Tensor:
            with mc.no_grad():
                return model(x)
        return infer
    optimizer = mc.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss = mc.ops.cross_entropy(model(x, train=True), labels)
        loss.backward()
        optimizer.step()
    return step


def peak_bytes(device: str) -> int | None:
    """The most memory that was ever resident in this process, or taken by the GPU's pool; None where the system does not tell."""
    if device == "cuda":
        return int(engine.module_of(device).get_default_memory_pool().total_bytes())
    try:                                                    # of this program alone; ru_maxrss begins with its parent's
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _peak_by_getrusage()


def _peak_by_getrusage() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024            # macOS counts bytes, others kibibytes


# ---------------------------------------------------------------- layer by layer
def by_layer(model: Sequential, batch: int, device: str, care: Care) -> Iterator[dict[str, Any]]:
    """Each layer without layers inside, timed by itself on random input; equal layers once. Seconds: medians.

    A residual's addition is a row of its own. What the model fuses or shares is not seen here: the sum may differ from the whole.
    """
    known: dict[tuple[str, Any], dict[str, float]] = {}
    for path, layer in model.walk():
        if not isinstance(layer, Residual) and (isinstance(layer, Sequential) or any(True for _ in layer.children())):
            continue
        key = repr(layer) if not isinstance(layer, Residual) else "addition", (layer.in_shape, layer.out_shape)
        if key not in known:
            known[key] = _one_layer(layer, batch, device, care, first=layer.in_shape == model.in_shape)
        yield {"path": path, "kind": "addition" if isinstance(layer, Residual) else type(layer).__name__,
               "out_shape": list(layer.out_shape or ()), **known[key]}


def _one_layer(layer: Layer, batch: int, device: str, care: Care, first: bool) -> dict[str, float]:
    """Seconds of its inference, of its forward in training, and of its backward (0 where there is nothing to differentiate by)."""
    care = care._replace(warm_up=max(1, care.warm_up))
    clock, rng = measure.clock_of(device), np.random.default_rng(0)
    adds = isinstance(layer, Residual)
    shape = layer.out_shape if adds else layer.in_shape
    assert shape is not None
    inputs = [mc.Tensor(_random(batch, shape, device), requires_grad=not first) for _ in range(2 if adds else 1)]
    forward: Callable[[bool], mc.Tensor] = (lambda train: inputs[0] + inputs[1]) if adds else (
        lambda train: layer(inputs[0], train, rng))

    def inference() -> mc.Tensor:
        with mc.no_grad():
            return forward(False)

    wanted = [*([] if first else inputs), *([] if adds else layer.parameters())]
    found = {"inference": median(measure.repeat(inference, clock, care)),
             "forward": median(measure.repeat(lambda: forward(True), clock, care)), "backward": 0.0}
    if wanted:
        y = forward(True)
        dy = _random(batch, y.shape[1:], device)
        found["backward"] = median(measure.repeat(lambda: mc.grad(y, wanted, dy, retain_graph=True), clock, care))
    return found


def _random(batch: int, shape: tuple[int, ...], device: str) -> Array:
    array = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    return measure.upload({"x": kernels.laid_out("x", array)}, device)[0]["x"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's to hear; it ends this process
    main()
