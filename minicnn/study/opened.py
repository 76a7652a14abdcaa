"""A step opened up: the numbers with which the page computes a convolution, a pooling or a batch norm again, pixel by pixel.

A few filters and channels are taken, and of a large image a square of outputs with the pixels that they see; the numbers of that
square are exact, so that what the page adds up is what the engine wrote, up to rounding. Everything is of the first image.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minicnn.study.pictures import exact
from minicnn.study.tape import Host, Step, Tape

FEW = 4                 # filters and channels that are opened
NUMBERS = 33_000        # of the input, and of the output's gradient, that a convolution's part has at most


def opened(step: Step, share: float = 1.0) -> dict[str, Any] | None:
    """What the page needs to open this step; None for an operation that it cannot open, or without gradients.

    share: of the numbers that it may take, so that the page of a model with many convolutions does not grow without end.
    """
    open_up = OPENED.get(step.op)
    return open_up(step, share) if open_up and step.grad is not None and step.output.array.ndim == 4 else None


def share_of_each(tape: Tape) -> float:
    """The share of the numbers that each step of this tape may take: all, as long as there are no more than 24 convolutions."""
    return min(1.0, 24 / max(1, sum(step.op == "conv2d" for step in tape.steps)))


def _liveliest(planes: Host, most: int) -> list[int]:
    """The channels of (C, H, W) whose numbers differ most, in order: a channel that is 0 everywhere shows nothing."""
    spread = planes.reshape(len(planes), -1).std(axis=1)
    return sorted(int(c) for c in np.argsort(-spread, kind="stable")[:most])


# ---------------------------------------------------------------- convolution
def _convolution(step: Step, share: float) -> dict[str, Any]:
    x, weight, y, dy = step.inputs["x"].array, step.inputs["weight"].array, step.output.array, step.grad
    assert dy is not None
    geometry = {name: [int(n) for n in np.broadcast_to(step.options[name], 2)] for name in ("stride", "padding", "dilation")}
    kernel, groups = list(weight.shape[2:]), int(step.options["groups"])
    of_outputs, of_pixels = _square(x.shape[1:], y.shape[1:], kernel, geometry, int(share * NUMBERS))
    most = max(1, round(share * FEW))
    filters, channels = _liveliest(y[0], most), _liveliest(x[0], most)
    per_group, in_group = weight.shape[1], len(weight) // groups
    by_channel = np.stack([weight[c // per_group * in_group:(c // per_group + 1) * in_group, c % per_group] for c in channels])
    bias = step.inputs.get("bias")
    dx, dweight = step.input_grads.get("x"), step.input_grads.get("weight")
    return {
        "kind": "convolution", **geometry, "kernel": kernel, "groups": groups, "images": len(x),
        "in": list(x.shape[1:]), "out": list(y.shape[1:]), "outputs": of_outputs, "pixels": of_pixels,
        "filters": filters, "channels": channels,
        "x": exact(_cut(x[0], of_pixels)), "dy": exact(_cut(dy[0], of_outputs)), "y": exact(_cut(y[0, filters], of_outputs)),
        "weight": exact(weight[filters]), "by_channel": exact(by_channel),
        "bias": None if bias is None else exact(bias.array[filters]),
        "dx": None if dx is None else exact(_cut(dx[0, channels], of_pixels)),
        "dweight": None if dweight is None else exact(np.stack([_of_pairs(dweight, k, channels, in_group) for k in filters])),
        "shares": exact(_by_image(x[:, channels], dy[:, filters], kernel, geometry))}


def _by_image(x: Host, dy: Host, kernel: list[int], geometry: dict[str, list[int]]) -> Host:
    """What each image adds to the weight's gradient, from the definition, in float64: (N, filters, channels, kh, kw)."""
    sides = [(p, p) for p in geometry["padding"]]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *sides))
    found = np.empty((len(x), dy.shape[1], x.shape[1], *kernel))
    for i, j in np.ndindex(*kernel):
        rows, columns = (slice(at * d, at * d + (n - 1) * s + 1, s) for at, n, s, d in
                         zip((i, j), dy.shape[2:], geometry["stride"], geometry["dilation"], strict=True))
        found[..., i, j] = np.einsum("nkpq,ncpq->nkc", dy.astype(np.float64), padded[:, :, rows, columns], optimize=True)
    return found


def _of_pairs(dweight: Host, k: int, channels: list[int], in_group: int) -> Host:
    """dweight of one filter in these channels of the input; NaN for a channel that the filter does not see."""
    first = k // in_group * dweight.shape[1]
    return np.stack([dweight[k, c - first] if 0 <= c - first < dweight.shape[1] else np.full(dweight.shape[2:], np.nan)
                     for c in channels])


def _square(in_shape: tuple[int, ...], out_shape: tuple[int, ...], kernel: list[int],
            geometry: dict[str, list[int]], most: int) -> tuple[list[int], list[int]]:
    """[first row, first column, rows, columns] of the outputs that are opened, and of the pixels (padding too) that they see."""
    def sees(outputs: int, axis: int) -> int:
        return (outputs - 1) * geometry["stride"][axis] + geometry["dilation"][axis] * (kernel[axis] - 1) + 1

    def too_much(rows: int, columns: int) -> bool:
        return max(in_shape[0] * sees(rows, 0) * sees(columns, 1), out_shape[0] * rows * columns) > most

    size = [out_shape[1], out_shape[2]]
    while too_much(*size) and max(size) > 1:
        longer = 0 if size[0] >= size[1] else 1
        size[longer] -= 1
    first = [(out_shape[1 + axis] - size[axis]) // 2 for axis in (0, 1)]
    starts = [first[axis] * geometry["stride"][axis] - geometry["padding"][axis] for axis in (0, 1)]
    return [*first, *size], [*starts, sees(size[0], 0), sees(size[1], 1)]


def _cut(planes: Host, part: list[int]) -> Host:
    """(C, H, W) -> (C, rows, columns); zeros where the part is outside of the image."""
    top, left, rows, columns = part
    found = np.zeros((len(planes), rows, columns), planes.dtype)
    inside = [slice(max(0, start), max(0, min(n, start + count)))
              for start, count, n in zip((top, left), (rows, columns), planes.shape[1:], strict=True)]
    to = [slice(s.start - start, s.stop - start) for s, start in zip(inside, (top, left), strict=True)]
    found[:, to[0], to[1]] = planes[:, inside[0], inside[1]]
    return found


# ---------------------------------------------------------------- pooling
def _pooling(step: Step, share: float) -> dict[str, Any] | None:
    x, y, dy, dx = step.inputs["x"].array, step.output.array, step.grad, step.input_grads.get("x")
    if dx is None or dy is None:
        return None
    windows = step.options["windows"]
    geometry = {"stride": list(windows.stride), "padding": list(windows.padding), "dilation": list(windows.dilation)}
    channels = _liveliest(x[0], FEW)
    few = (FEW,)            # here a channel needs no other
    of_outputs, of_pixels = _square((*few, *x.shape[2:]), (*few, *y.shape[2:]), list(windows.kernel_size), geometry, 2500)
    return {"kind": "pooling", **geometry, "kernel": list(windows.kernel_size), "in": list(x.shape[1:]), "out": list(y.shape[1:]),
            "outputs": of_outputs, "pixels": of_pixels, "channels": channels,
            "x": exact(_cut(x[0, channels], of_pixels)), "y": exact(_cut(y[0, channels], of_outputs)),
            "dy": exact(_cut(dy[0, channels], of_outputs)), "dx": exact(_cut(dx[0, channels], of_pixels))}


# ---------------------------------------------------------------- batch norm
def _batch_norm(step: Step, share: float) -> dict[str, Any] | None:
    x, dy, dx = step.inputs["x"].array, step.grad, step.input_grads.get("x")
    if dx is None or dy is None:
        return None
    channels = _liveliest(dy[0], FEW)
    # In float64, over the whole batch: what the page cannot know from the first image.
    wide, back = x[:, channels].astype(np.float64), dy[:, channels].astype(np.float64)
    mean = step.extras["batch_mean"][channels].astype(np.float64)
    inv_std = (step.extras["batch_var"][channels].astype(np.float64) + step.options["eps"]) ** -0.5
    x_hat = (wide - mean[:, None, None]) * inv_std[:, None, None]
    side = [0, 0, min(x.shape[2], 24), min(x.shape[3], 24)]
    gamma, beta = step.inputs["weight"].array, step.inputs["bias"].array
    return {"kind": "batch norm", "channels": channels, "pixels": side, "numbers": int(x[:, 0].size),
            "mean": mean.tolist(), "inv_std": inv_std.tolist(), "gamma": gamma[channels].tolist(), "beta": beta[channels].tolist(),
            "mean_dy": back.mean((0, 2, 3)).tolist(), "mean_dy_x_hat": (back * x_hat).mean((0, 2, 3)).tolist(),
            "x": exact(_cut(x[0, channels], side)), "dy": exact(_cut(dy[0, channels], side)),
            "dx": exact(_cut(dx[0, channels], side))}


OPENED: dict[str, Callable[[Step, float], dict[str, Any] | None]] = {
    "conv2d": _convolution, "max_of_windows": _pooling, "normalize": _batch_norm}
