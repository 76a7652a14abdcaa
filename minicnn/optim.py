"""Optimisers: how a gradient moves a parameter, by PyTorch's rules; and schedules, functions from a step to a learning rate.

`params` is a list of Tensors, or of groups: dicts with "params" and settings of their own ({"params": ..., "lr": 0.01}).
Parameters move in place. One without a gradient, frozen ones among them, is left exactly as it is.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minicnn.autograd import Tensor
from minicnn.backend import Array, array_module, device_of, to_device, to_numpy
from minicnn.kernels.elementwise import in_place

Schedule = Callable[[int], float]


class Optimizer:
    """What optimisers share: groups of parameters, each with settings, and what is remembered of each parameter."""

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        name = type(self).__name__
        given = self._listed(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        self.groups: list[dict[str, Any]] = []
        for group in groups:
            unknown = group.keys() - {"params"} - settings.keys()
            if unknown or "params" not in group:
                raise ValueError(f"{name} has no setting {sorted(unknown)}; it has {sorted(settings)}" if unknown else
                                 f'{name}: a group needs its parameters, {{"params": [...]}}; this one has {sorted(group)} alone')
            self.groups.append({k: _number(v) for k, v in {**settings, **group}.items() if k != "params"})
            self.groups[-1]["params"] = self._listed(group["params"])
            self._check(self.groups[-1])
        self.parameters: list[Tensor] = [p for group in self.groups for p in group["params"]]
        wrong = [type(p).__name__ for p in self.parameters if not isinstance(p, Tensor)]
        if wrong or not self.parameters:
            raise ValueError(f"{name} moves a list of Tensors, such as model.parameters(); "
                             + (f"not {wrong[0]}" if wrong else "the list is empty"))
        computed = [p.shape for p in self.parameters if p.node is not None and p.node.op is not None]
        if computed:
            raise ValueError(f"{name}: a Tensor of shape {computed[0]} was computed from others, so no gradient stays with it; "
                             "give the Tensors that it came from, made with requires_grad=True")
        if len({id(p) for p in self.parameters}) < len(self.parameters):
            raise ValueError(f"{name}: a parameter stands in the list twice, or in two groups; each may be moved once a step")
        self.memory: list[dict[str, Any]] = [{} for _ in self.parameters]

    def update(self, p: Array, g: Array, memory: dict[str, Any], settings: Mapping[str, Any]) -> None:
        """Move one parameter's array in place. `memory` keeps what the rule remembers of it."""
        raise NotImplementedError

    def _listed(self, params: Iterable[Any]) -> list[Any]:
        if isinstance(params, Tensor):              # its rows would be new Tensors, and nobody's parameters
            raise ValueError(f"{type(self).__name__} moves a list of Tensors; a single one goes into a list too: [tensor]")
        return list(params)

    def _check(self, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            if name in ("lr", "momentum", "weight_decay", "eps") and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be at least 0")

    @property
    def lr(self) -> float:
        """The learning rate of the first group; setting it sets every group's."""
        return float(self.groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.groups:
            group["lr"] = float(value)

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        i = 0
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p.data, p.grad.data, self.memory[i], group)
                i += 1

    def zero_grad(self) -> None:
        """Forget the gradients; `backward` adds to them."""
        for p in self.parameters:
            if p.requires_grad:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory, as nested dicts of numbers and NumPy copies."""
        return {"groups": {str(i): {k: v for k, v in group.items() if k != "params"} for i, group in enumerate(self.groups)},
                "memory": {str(i): {k: np.array(to_numpy(v)) if hasattr(v, "shape") else v for k, v in memory.items()}
                           for i, memory in enumerate(self.memory)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, for the same parameters in the same order."""
        groups, memory = state["groups"], state.get("memory", {})
        if len(groups) != len(self.groups) or any(int(i) >= len(self.parameters) for i in memory):
            raise ValueError(f"the state is of {len(groups)} groups and {len(memory)} parameters; this {type(self).__name__} has "
                             f"{len(self.groups)} groups and {len(self.parameters)} parameters")
        for i, settings in groups.items():
            own = self.groups[int(i)].keys() - {"params"}
            if settings.keys() != own:
                raise ValueError(f"the state has the settings {sorted(settings)} and {type(self).__name__} has {sorted(own)}: "
                                 "was it saved by another optimiser?")
        for i, remembered in memory.items():
            p = self.parameters[int(i)]
            for name, value in remembered.items():
                if _is_remembered_array(value) and np.shape(value) != p.shape:
                    raise ValueError(f"parameter {i} has shape {p.shape}, but its {name} in the state has {np.shape(value)}")
        for i, settings in groups.items():
            self.groups[int(i)].update({k: _number(v) for k, v in settings.items()})
        self.memory = [{} for _ in self.parameters]
        for i, remembered in memory.items():
            p = self.parameters[int(i)].data
            self.memory[int(i)] = {k: to_device(np.array(v, p.dtype), device_of(p)) if _is_remembered_array(v) else _number(v)
                                   for k, v in remembered.items()}


def _is_remembered_array(value: Any) -> bool:
    """Arrays like the parameter are floating, of no dimension too where the parameter is; the rest are counts."""
    return np.asarray(value).dtype.kind == "f"


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's: np.float64(0.1) would turn float32 parameters into float64."""
    if isinstance(value, tuple):
        return tuple(map(_number, value))
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

        g <- g + weight_decay p
        v <- momentum v + g              (v is 0 at first)
        p <- p - lr v                    (nesterov: p - lr (g + momentum v))

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0,
                 nesterov: bool = False) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def _check(self, settings: Mapping[str, Any]) -> None:
        super()._check(settings)
        if settings["nesterov"] and not settings["momentum"]:
            raise ValueError("SGD: nesterov=True looks ahead along the momentum, which is 0; set momentum, e.g. 0.9")

    def update(self, p: Array, g: Array, memory: dict[str, Any], settings: Mapping[str, Any]) -> None:
        momentum = settings["momentum"]
        if momentum and not memory:
            memory["velocity"] = array_module(p).zeros_like(p)

        def one(p: Array, g: Array, velocity: Array) -> None:
            if settings["weight_decay"]:
                g = g + p * settings["weight_decay"]
            if momentum:
                velocity *= momentum
                velocity += g
                g = g + velocity * momentum if settings["nesterov"] else velocity
            p -= g * settings["lr"]

        in_place(one, p, g, memory.get("velocity", p))


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

        p <- p - lr weight_decay p
        m <- b1 m + (1 - b1) g,     v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2) -> None:
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)

    def _check(self, settings: Mapping[str, Any]) -> None:
        super()._check(settings)
        if len(settings["betas"]) != 2 or not all(0.0 <= b < 1.0 for b in settings["betas"]):
            raise ValueError(f"AdamW: betas={settings['betas']} must be two numbers, each at least 0 and below 1")

    def update(self, p: Array, g: Array, memory: dict[str, Any], settings: Mapping[str, Any]) -> None:
        xp, lr, (b1, b2) = array_module(p), settings["lr"], settings["betas"]
        if not memory:
            memory.update(t=0, m=xp.zeros_like(p), v=xp.zeros_like(p))
        memory["t"] += 1
        t = memory["t"]

        def one(p: Array, g: Array, m: Array, v: Array) -> None:
            p *= 1.0 - lr * settings["weight_decay"]
            m += (g - m) * (1.0 - b1)
            v *= b2
            v += g * g * (1.0 - b2)
            root = xp.sqrt(v)
            root *= (1.0 - b2 ** t) ** -0.5
            root += settings["eps"]
            p -= m / root * (lr / (1.0 - b1 ** t))

        in_place(one, p, g, memory["m"], memory["v"])


# ---------------------------------------------------------------- schedules: step -> learning rate
def constant_schedule(lr: float) -> Schedule:
    """The same at every step."""
    return lambda step: lr


def step_schedule(lr: float, milestones: Sequence[int], factor: float = 0.1) -> Schedule:
    """lr, multiplied by `factor` at each of the milestones (steps)."""
    return lambda step: lr * factor ** sum(step >= m for m in milestones)


def cosine_schedule(lr: float, steps: int, final: float = 0.0) -> Schedule:
    """Half a cosine from lr at step 0 to `final` at step `steps` and after (Loshchilov, Hutter, "SGDR", 2017)."""
    if steps < 1:
        raise ValueError(f"cosine_schedule: steps={steps} must be at least 1")
    return lambda step: final + (lr - final) * (1.0 + math.cos(math.pi * min(step / steps, 1.0))) / 2.0


def warmup(schedule: Schedule, steps: int, start: float = 0.0) -> Schedule:
    """A straight line from `start` to where `schedule` is after the first `steps` steps, then `schedule` itself."""
    return lambda step: schedule(step) if step >= steps else start + (schedule(steps) - start) * step / steps
