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
from minicnn.kernels import update as kernels
from minicnn.kernels.elementwise import laid_out_like

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
        """A rule of one's own: move one parameter's array in place. `memory` keeps what the rule remembers of it."""
        raise NotImplementedError(f"{type(self).__name__} has no update(self, p, g, memory, settings)")

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

    def step(self, scaling: Array | None = None) -> None:
        """Move every parameter that has a gradient.   scaling: of a loss that is scaled, handed over by a GradScaler."""
        i = 0
        for group in self.groups:
            memories = self.memory[i:i + len(group["params"])]
            moving = [(p.data, p.grad.data, memory) for p, memory in zip(group["params"], memories, strict=True)
                      if p.grad is not None]
            if moving:
                params, grads, moved = (list(column) for column in zip(*moving, strict=True))
                self.update_all(params, grads, moved, group, scaling)
            i += len(memories)

    def update_all(self, params: list[Array], grads: list[Array], memories: list[dict[str, Any]],
                   settings: Mapping[str, Any], scaling: Array | None) -> None:
        """Move the arrays of a group's parameters in place: by default one by one, by `update`."""
        for p, g, memory in zip(params, kernels.unscaled(grads, scaling), memories, strict=scaling is None):
            self.update(p, g, memory, settings)

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
            self.memory[int(i)] = {k: _beside(p, v) if _is_remembered_array(v) else _number(v)
                                   for k, v in remembered.items()}


def _beside(p: Array, value: Any) -> Array:
    """A remembered array where the parameter is, and laid out as it is."""
    laid = like(p)
    laid[...] = to_device(np.array(value, p.dtype), device_of(p))
    return laid


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

    def update_all(self, params: list[Array], grads: list[Array], memories: list[dict[str, Any]],
                   settings: Mapping[str, Any], scaling: Array | None) -> None:
        momentum, decay = settings["momentum"], settings["weight_decay"]
        velocities = None
        if momentum:
            for p, memory in zip(params, memories, strict=True):
                if not memory:
                    memory["velocity"] = like(p)
            velocities = [memory["velocity"] for memory in memories]
        kernels.sgd(params, grads, velocities, settings["lr"], momentum, decay, settings["nesterov"], scaling)


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

    def update_all(self, params: list[Array], grads: list[Array], memories: list[dict[str, Any]],
                   settings: Mapping[str, Any], scaling: Array | None) -> None:
        for p, memory in zip(params, memories, strict=True):
            if not memory:
                memory.update(t=0, m=like(p), v=like(p))
            memory["t"] += 1
        for t in sorted({memory["t"] for memory in memories}):          # one that was frozen for a while has made fewer steps
            some = [(p, g, memory["m"], memory["v"]) for p, g, memory in zip(params, grads, memories, strict=True)
                    if memory["t"] == t]
            ps, gs, ms, vs = (list(column) for column in zip(*some, strict=True))
            kernels.adamw(ps, gs, ms, vs, t, settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"], scaling)


def like(p: Array) -> Array:
    """Zeros that lie in memory as the parameter does."""
    return laid_out_like(p, lambda order: array_module(p).zeros([p.shape[axis] for axis in order], p.dtype))


class GradScaler:
    """Scales the loss, so that gradients too small for float16 do not become 0; the optimiser takes the scale off again.

        s L -> backward -> s g,     then  s g / s  moves the parameters

    A step whose gradients are not all finite is left out, and s multiplied by `backoff_factor`; behind `growth_interval` steps in a
    row that were not left out, by `growth_factor`. All of this happens on the device, and nobody waits for it (but an optimiser
    with an `update` of its own). Of AdamW, a step that is left out counts among its steps all the same, unlike PyTorch's: the first
    are shorter then. As PyTorch's:

        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3.2.
    """

    def __init__(self, init_scale: float = 2.0 ** 16, growth_factor: float = 2.0, backoff_factor: float = 0.5,
                 growth_interval: int = 2000) -> None:
        if not isinstance(init_scale, (int, float, np.integer, np.floating)):
            raise TypeError(f"GradScaler: init_scale={init_scale!r} must be a number, no device: it goes where the loss is")
        if not (0 < init_scale < math.inf and growth_factor > 1 and 0 < backoff_factor < 1 and growth_interval >= 1):
            raise ValueError(f"GradScaler: init_scale={init_scale} must be positive, growth_factor={growth_factor} above 1, "
                             f"backoff_factor={backoff_factor} between 0 and 1, growth_interval={growth_interval} at least 1")
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self._scaling: Array = np.array([init_scale, 1.0 / init_scale, 1, 1, 0], np.float32)        # see kernels/update.py

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, scaled; call backward on it."""
        self._lie_beside(loss.data)
        scaled: Tensor = loss * self._scaling[kernels.SCALE]
        return scaled

    def step(self, optimizer: Optimizer) -> None:
        """optimizer.step(), with gradients of the loss as it was; none where one of them is infinite, or no number."""
        grads = [p.grad.data for p in optimizer.parameters if p.grad is not None]
        if grads:
            self._lie_beside(grads[0])
            kernels.find_overflow(grads, self._scaling)
            optimizer.step(self._scaling)

    def update(self) -> None:
        """Move the scale, behind the steps of all optimisers that share the loss."""
        kernels.adapt(self._scaling, self.growth_factor, self.backoff_factor, self.growth_interval)

    def _lie_beside(self, array: Array) -> None:
        """Put what is remembered where the array is, in its type: once, as a rule."""
        if device_of(array) != device_of(self._scaling) or array.dtype != self._scaling.dtype:
            self._scaling = to_device(to_numpy(self._scaling).astype(array.dtype), device_of(array))

    def get_scale(self) -> float:
        """By how much the next loss is scaled. The host waits for the device."""
        return float(to_numpy(self._scaling)[kernels.SCALE])

    def state_dict(self) -> dict[str, Any]:
        """The scale, and for how many steps it has stayed."""
        held = to_numpy(self._scaling)
        return {"scale": float(held[kernels.SCALE]), "stayed": int(held[kernels.STAYED])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        scale = float(state["scale"])
        self._scaling = np.array([scale, 1.0 / scale, 1, 1, float(state["stayed"])], np.float32)


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
