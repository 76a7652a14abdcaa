"""The optimisers' rules on a GPU: one launch for all parameters, see update.cu.

The kernel finds the arrays by lists of their addresses, which are sent to the device where they are not there already. Parameters,
and what is remembered of them, stay where they are; gradients come to lie elsewhere from step to step, and their list goes along.
"""
from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module, memory_order
from minicnn.kernels.cuda.launch import launch, run

CHUNK, THREADS = 4096, 256  # numbers of a parameter for a block, and its threads, as update.cu has them


def sgd(params: list[Array], grads: list[Array], velocities: list[Array] | None, lr: float, momentum: float, weight_decay: float,
        nesterov: bool, scaling: Array | None = None) -> None:
    """g + weight_decay p -> g,  momentum v + g -> v,  p - lr v -> p  (nesterov: p - lr (g + momentum v)); v None: no momentum."""
    _for_all("sgd", params, grads, [velocities], scaling, lr, momentum, weight_decay, int(nesterov))


def adamw(params: list[Array], grads: list[Array], ms: list[Array], vs: list[Array], t: int, lr: float, betas: tuple[float, float],
          eps: float, weight_decay: float, scaling: Array | None = None) -> None:
    """p (1 - lr weight_decay) -> p,   then Adam's rule for the t-th time (t = 1 at first)."""
    b1, b2 = betas
    _for_all("adamw", params, grads, [ms, vs], scaling,
             1.0 - lr * weight_decay, b1, b2, lr / (1.0 - b1 ** t), (1.0 - b2 ** t) ** -0.5, eps)


def find_overflow(grads: list[Array], scaling: Array) -> None:
    """Enter into `scaling` whether all gradients are finite, and the inverse of the scale: for the step that follows."""
    xp, dtype = array_module(*grads), grads[0].dtype
    laid = [xp.ascontiguousarray(g.transpose(memory_order(g))) for g in grads]
    sizes, owner, part, blocks = _chunks(xp, tuple(g.size for g in laid))
    overflowed = xp.empty(blocks, np.int32)
    addresses = _sent(xp, tuple(g.data.ptr for g in laid))
    run(xp, dtype, "update", "overflows", blocks, THREADS, addresses, sizes, owner, part, overflowed)
    run(xp, dtype, "update", "settle", 1, THREADS, overflowed, scaling, blocks)


def adapt(scaling: Array, growth: float, backoff: float, interval: int) -> None:
    """Move the scale: down where a gradient overflowed, up where none has for so many steps."""
    launch("update", "adapt", 1, 1, scaling, growth, backoff, interval)


def _for_all(kernel: str, params: list[Array], grads: list[Array], memories: list[list[Array] | None], *settings: Any) -> None:
    """Run the kernel over parameters, gradients and what is remembered of each, number by number as they lie in memory."""
    xp, dtype = array_module(*params), params[0].dtype
    laid = [_like(p, g) for p, g in zip(params, grads, strict=True)]
    for p, *remembered in zip(params, *(memory for memory in memories if memory is not None), strict=True):
        for m in remembered:
            if not m.transpose(memory_order(p)).flags.c_contiguous:
                raise ValueError(f"{kernel}: what is remembered of a parameter must lie in memory as it does, not with strides "
                                 f"{m.strides} beside {p.strides}: make it with optim.like")
    lists = [None if arrays is None else _sent(xp, tuple(a.data.ptr for a in arrays)) for arrays in (params, laid, *memories)]
    sizes, owner, part, blocks = _chunks(xp, tuple(p.size for p in params))
    run(xp, dtype, "update", kernel, blocks, THREADS, *lists, sizes, owner, part, *settings)


def _like(p: Array, g: Array) -> Array:
    """The gradient in the order in which the parameter's memory runs, which must have no gaps."""
    order = memory_order(p)
    if not p.transpose(order).flags.c_contiguous:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} with strides {p.strides} does not fill its memory: an optimiser "
                         "on a GPU moves arrays that do; make it contiguous")
    if g.dtype != p.dtype:
        raise TypeError(f"a parameter is of {p.dtype} and its gradient of {g.dtype}")
    return array_module(g).ascontiguousarray(g.transpose(order))


@functools.lru_cache(maxsize=64)
def _sent(xp: ModuleType, numbers: tuple[int, ...]) -> Array:
    """A list of integers on the device."""
    return xp.asarray(np.array(numbers, np.int64))


@functools.lru_cache(maxsize=64)
def _chunks(xp: ModuleType, sizes: tuple[int, ...]) -> tuple[Array, Array, Array, int]:
    """Sizes on the device; for each block the number of its parameter, and which chunk of that; how many blocks."""
    counts = [-(-size // CHUNK) for size in sizes]
    owner = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    part = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    return xp.asarray(np.array(sizes, np.int64)), xp.asarray(owner), xp.asarray(part), len(owner)
