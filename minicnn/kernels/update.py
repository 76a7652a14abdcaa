"""The optimisers' rules over plain arrays: how a step moves parameters, in place."""
from __future__ import annotations

from minicnn.backend import Array, array_module
from minicnn.kernels.dispatch import has_cuda
from minicnn.kernels.elementwise import in_place


@has_cuda
def sgd(params: list[Array], grads: list[Array], velocities: list[Array] | None, lr: float, momentum: float, weight_decay: float,
        nesterov: bool) -> None:
    """g + weight_decay p -> g,  momentum v + g -> v,  p - lr v -> p  (nesterov: p - lr (g + momentum v)); v None: no momentum."""
    def one(p: Array, g: Array, velocity: Array) -> None:
        if weight_decay:
            g = g + p * weight_decay
        if velocities is not None:
            velocity *= momentum
            velocity += g
            g = g + velocity * momentum if nesterov else velocity
        p -= g * lr

    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        in_place(one, p, g, p if velocities is None else velocities[i])


@has_cuda
def adamw(params: list[Array], grads: list[Array], ms: list[Array], vs: list[Array], t: int, lr: float, betas: tuple[float, float],
          eps: float, weight_decay: float) -> None:
    """p (1 - lr weight_decay) -> p,   then Adam's rule for the t-th time (t = 1 at first)."""
    b1, b2 = betas
    xp = array_module(params[0])

    def one(p: Array, g: Array, m: Array, v: Array) -> None:
        p *= 1.0 - lr * weight_decay
        m += (g - m) * (1.0 - b1)
        v *= b2
        v += g * g * (1.0 - b2)
        root = xp.sqrt(v)
        root *= (1.0 - b2 ** t) ** -0.5
        root += eps
        p -= m / root * (lr / (1.0 - b1 ** t))

    for p, g, m, v in zip(params, grads, ms, vs, strict=True):
        in_place(one, p, g, m, v)
