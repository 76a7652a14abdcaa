"""The optimisers' rules over plain arrays: how a step moves parameters, in place.

Where the loss is scaled, so that gradients of half precision do not vanish, an array of five numbers beside the parameters,
`scaling`, says by how much, and whether this step is left out because a gradient overflowed. The host need not know.
"""
from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.kernels.dispatch import has_cuda_for_real
from minicnn.kernels.elementwise import in_place

# In `scaling`: the scale, its inverse in the step that runs, whether the step's gradients are all finite, whether all have been
# since the scale was last looked at, and for how many steps it has stayed.
SCALE, INVERSE, FINITE, ALL_FINITE, STAYED = range(5)


@has_cuda_for_real
def sgd(params: list[Array], grads: list[Array], velocities: list[Array] | None, lr: float, momentum: float, weight_decay: float,
        nesterov: bool, scaling: Array | None = None) -> None:
    """g + weight_decay p -> g,  momentum v + g -> v,  p - lr v -> p  (nesterov: p - lr (g + momentum v)); v None: no momentum."""
    grads = unscaled(grads, scaling)
    if not grads:
        return

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


@has_cuda_for_real
def adamw(params: list[Array], grads: list[Array], ms: list[Array], vs: list[Array], t: int, lr: float, betas: tuple[float, float],
          eps: float, weight_decay: float, scaling: Array | None = None) -> None:
    """p (1 - lr weight_decay) -> p,   then Adam's rule for the t-th time (t = 1 at first)."""
    grads = unscaled(grads, scaling)
    if not grads:
        return
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


def unscaled(grads: list[Array], scaling: Array | None) -> list[Array]:
    """The gradients of the loss itself; an empty list where one of them overflowed, and the step is left out."""
    if scaling is None:
        return grads
    return [g * scaling[INVERSE] for g in grads] if bool(scaling[FINITE]) else []


@has_cuda_for_real
def find_overflow(grads: list[Array], scaling: Array) -> None:
    """Enter into `scaling` whether all gradients are finite, and the inverse of the scale: for the step that follows."""
    finite = all(bool(array_module(g).isfinite(g).all()) for g in grads)
    scaling[INVERSE] = 1.0 / scaling[SCALE]
    scaling[FINITE] = finite
    scaling[ALL_FINITE] *= finite


@has_cuda_for_real
def adapt(scaling: Array, growth: float, backoff: float, interval: int) -> None:
    """Move the scale: down where a gradient overflowed, up where none has for so many steps, as long as its inverse is not 0."""
    scaling[STAYED] += 1
    if not bool(scaling[ALL_FINITE]):
        scaling[SCALE] *= backoff
        scaling[STAYED] = 0
    elif bool(scaling[STAYED] >= interval):
        with np.errstate(over="ignore"):
            more = scaling[SCALE] * growth
        if bool(1.0 / more > 0):
            scaling[SCALE] = more
        scaling[STAYED] = 0
    scaling[ALL_FINITE] = 1
