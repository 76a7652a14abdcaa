"""Independent witnesses of the engine: what each operation must give, found without the code under test.

- Values: `oracle` functions on NumPy arrays, from the definition (loops where the operation is more than a line).
- Gradients: central differences of the oracle along random directions, with a random output gradient. Not of one number
  at a time, and never with an output gradient of ones, under which batch norm and softmax have none.
- Gradients of gradients: central differences of the engine's own gradient, whose order below has been checked already.

`cases.py` is the table of operations that go through all of this, on every device.
"""
from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import standin

import minicnn as mc
from minicnn import backend
from minicnn.autograd import Node

# ---------------------------------------------------------------- arrays on a device, and back


@dataclass(frozen=True)
class Device:
    """Puts a test's NumPy arrays where the test is to run."""

    name: str

    def __str__(self) -> str:
        return self.name

    def put(self, array: Any) -> Any:
        """A copy of the array on this device, so that no test writes into another's numbers."""
        array = np.asarray(array)
        return array.copy() if self.name == "cpu" else backend.to_device(array, self.name)

    def tensor(self, array: Any, requires_grad: bool = True) -> mc.Tensor:
        return mc.Tensor(self.put(array), requires_grad=requires_grad)

    def tensors(self, arrays: Sequence[Any], requires_grad: bool = True) -> list[mc.Tensor]:
        return [self.tensor(array, requires_grad) for array in arrays]


def host(value: Any) -> np.ndarray[Any, Any]:
    """The numbers of a Tensor, or of an array of any library, as a NumPy array of their own."""
    array = value.data if isinstance(value, mc.Tensor) else value
    return np.array(backend.to_numpy(array) if backend.is_array(array) else array)


def share_memory(a: Any, b: Any) -> bool:
    a, b = (v.data if isinstance(v, mc.Tensor) else v for v in (a, b))
    backend.array_module(a, b)                              # both on one device
    return np.shares_memory(_lying_at(a), _lying_at(b))


def _lying_at(array: Any) -> np.ndarray[Any, Any]:
    """An array of NumPy's at the addresses of this one, never to be read: CuPy's own `shares_memory` says yes of any two arrays
    without axes (14.2, whose kernels read such an array into a variable, and it compares addresses of that)."""
    if isinstance(array, np.ndarray):
        return array
    lies = {"version": 3, "shape": array.shape, "strides": array.strides, "typestr": f"|V{array.itemsize}",
            "data": (array.data.ptr, False)}
    return np.asarray(SimpleNamespace(__array_interface__=lies))


@contextlib.contextmanager
def read_only(*values: Any) -> Iterator[None]:
    """Writing into these raises, as far as NumPy holds their memory (CuPy has no such flag)."""
    arrays = [v.data if isinstance(v, mc.Tensor) else v for v in values]
    held = [a._host if type(a) is standin.ndarray else a for a in arrays]
    held = sorted((a for a in held if isinstance(a, np.ndarray)), key=lambda a: a.base is not None)     # owners come first
    before = [a.flags.writeable for a in held]
    for a in held:
        a.flags.writeable = False
    try:
        yield
    finally:
        for a, writeable in zip(held, before, strict=True):
            a.flags.writeable = writeable


@contextlib.contextmanager
def nothing_written() -> Iterator[None]:
    """While a backward runs, its output gradient and all that the tape saved for it are read-only."""
    pull = Node.pull

    def guarded(self: Node, dy: Any, *how: Any) -> Any:
        assert self.saved is not None
        with read_only(dy, *self.saved.values()):
            return iter(list(pull(self, dy, *how)))

    Node.pull = guarded  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Node.pull = pull  # type: ignore[method-assign]


# ---------------------------------------------------------------- comparison

def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest number expected; 0 where both are nothing but equal infinities or NaNs."""
    actual, expected = host(actual).astype(float), host(expected).astype(float)
    alike = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    difference = np.where(alike, 0.0, np.abs(actual - np.where(alike, 0.0, expected)))
    if difference.size == 0 or difference.max() == 0:
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)])
    return float(difference.max() / max(finite.max(initial=0.0), np.finfo(float).tiny))


def same(actual: Any, expected: Any, limit: float = 1e-10, what: str = "result") -> None:
    """Assert equal shapes, and numbers to within a relative error (NaN for NaN, infinity for infinity)."""
    expected = host(expected)
    assert tuple(actual.shape) == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {expected.shape}"
    error = relative_error(actual, expected)
    numbers = f"actual\n{host(actual)}\nexpected\n{expected}"
    assert error <= limit, f"{what}: relative error {error:.2e}, more than {limit:.0e}\n{numbers}"


def inner(a: Any, b: Any) -> float:
    return float((host(a).astype(float) * host(b).astype(float)).sum())


# ---------------------------------------------------------------- directional derivatives

STEP = 5e-4


def derivative(f: Callable[..., float], arrays: Sequence[np.ndarray[Any, Any]],
               directions: Sequence[np.ndarray[Any, Any]]) -> float:
    """d/dt f(arrays + t directions) at t = 0, by four points: wrong by STEP^4 / 30 times f's fifth derivative."""
    def at(t: float) -> float:
        return f(*[a + t * STEP * d for a, d in zip(arrays, directions, strict=True)])
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)


def directions_like(arrays: Sequence[Any], rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    return [rng.uniform(-1, 1, np.shape(a)) for a in arrays]


def check_gradients(fn: Callable[..., Any], oracle: Callable[..., Any], arrays: Sequence[Any], device: Device, *,
                    seed: int = 0, limit: float = 1e-8) -> list[mc.Tensor]:
    """The first-order pass of `fn` against central differences of `oracle`, each input by itself.

    Also holds that no backward writes into what it was given, that no leaf's gradient shares memory with anything, and
    that the pass which builds a graph (create_graph) gives the same numbers.
    """
    rng = np.random.default_rng(seed)
    leaves = device.tensors(arrays)
    y = fn(*leaves)
    expected = np.asarray(oracle(*arrays))
    assert backend.device_of(y.data) == device.name
    same(y, expected, 1e-10, "forward")
    c = np.asarray(rng.standard_normal(y.shape))
    dy = device.tensor(c, requires_grad=False)
    with nothing_written(), read_only(dy):
        y.backward(dy, retain_graph=True)
    gradients = [leaf.grad for leaf in leaves]
    # Relative to what the derivative is a sum of, since the sum itself may come out near 0.
    for i, (array, g) in enumerate(zip(arrays, gradients, strict=True)):
        assert g is not None, f"no gradient arrived at input {i}"
        assert (g.shape, g.dtype) == (array.shape, array.dtype)
        direction = rng.uniform(-1, 1, array.shape)
        others = [np.zeros(a.shape) for a in arrays]
        others[i] = direction
        numeric = derivative(lambda *moved: inner(oracle(*moved), c), arrays, others)
        analytic = inner(g, direction)
        scale = np.abs(host(g) * direction).sum() + np.abs(expected * c).sum()
        assert abs(numeric - analytic) <= limit * scale, f"input {i}: {analytic:.12g} by backward, {numeric:.12g} by differences"
    for (i, a), (j, b) in itertools.combinations([*enumerate(gradients), ("output", dy), *enumerate(leaves)], 2):
        assert a is b or not share_memory(a, b), f"the gradient of {i} shares memory with {j}"
    with nothing_written():
        composed = mc.grad(y, leaves, dy, create_graph=True)
    for i, (g, again) in enumerate(zip(gradients, composed, strict=True)):
        same(again, g, 1e-9, f"gradient of input {i} with create_graph=True")
    return gradients  # type: ignore[return-value]


def tower(fn: Callable[..., Any], tensors: Sequence[mc.Tensor], directions: Sequence[Sequence[mc.Tensor]]) -> Any:
    """<fn(x), c>, differentiated along one direction after another; the last of `tensors` is c, so dy is an input as well."""
    if not directions:
        *x, c = tensors
        return (fn(*x) * c).sum()
    *below, last = directions
    value = tower(fn, tensors, below)
    gradients = mc.grad(value, tensors, create_graph=True)
    products = [(g * d).sum() for g, d in zip(gradients, last, strict=True)]
    return sum(products[1:], products[0])


def check_higher_order(fn: Callable[..., Any], arrays: Sequence[Any], device: Device, order: int, *, seed: int = 0,
                       limit: float = 1e-7) -> None:
    """The directional derivative of order `order`, of everything in every input and in dy, against differences of the one below."""
    rng = np.random.default_rng(seed)
    with mc.no_grad():
        shape = fn(*device.tensors(arrays)).shape
    arrays = [*arrays, np.asarray(rng.standard_normal(shape))]
    directions = [directions_like(arrays, rng) for _ in range(order)]
    on_device = [[device.tensor(d, requires_grad=False) for d in level] for level in directions]
    scale = 1.0

    def below(*moved: Any) -> float:
        nonlocal scale
        value = tower(fn, device.tensors(moved), on_device[:-1]).item()
        scale = max(scale, abs(value))
        return float(value)

    analytic = tower(fn, device.tensors(arrays), on_device).item()
    numeric = derivative(below, arrays, directions[-1])
    assert abs(numeric - analytic) <= limit * max(scale, abs(analytic)), (
        f"order {order}: {analytic:.12g} by backward, {numeric:.12g} by differences of order {order - 1}")


# ---------------------------------------------------------------- naive oracles: loops over every number

def window_starts(n: int, k: int, stride: int, padding: int, ceil_mode: bool) -> list[int]:
    """Where windows of k begin on n pixels: as long as they fit, and in ceil_mode one more that begins on or before the image."""
    starts = list(range(-padding, n + padding - k + 1, stride))
    last = starts[-1] if starts else -padding - stride          # which fits none: the one after it may be the first
    if ceil_mode and last + k < n + padding and last + stride < n:
        starts.append(last + stride)
    return starts


def pool_windows(x: np.ndarray[Any, Any], kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
                 ceil_mode: bool) -> tuple[tuple[int, int], Iterator[tuple[tuple[int, ...], list[tuple[int, int]], int]]]:
    """The output's size; then for each output (n, c, p, q) the pixels its window sees, row by row, and its area with padding."""
    rows, columns = (window_starts(*args, ceil_mode) for args in zip(x.shape[2:], kernel_size, stride, padding, strict=True))

    def every() -> Iterator[tuple[tuple[int, ...], list[tuple[int, int]], int]]:
        for n, c, p, q in np.ndindex(*x.shape[:2], len(rows), len(columns)):
            seen, area = [], 0
            for i, j in np.ndindex(*kernel_size):
                h, w = rows[p] + i, columns[q] + j
                area += h < x.shape[2] + padding[0] and w < x.shape[3] + padding[1]
                if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]:
                    seen.append((h, w))
            yield (n, c, p, q), seen, area

    return (len(rows), len(columns)), every()


def _beats(a: float, b: float) -> bool:
    return a > b or (math.isnan(a) and not math.isnan(b))


def naive_max_pool(x: np.ndarray[Any, Any], kernel_size: tuple[int, int], stride: tuple[int, int],
                   padding: tuple[int, int] = (0, 0), ceil_mode: bool = False, dy: Any = None) -> np.ndarray[Any, Any]:
    """The largest pixel of each window (NaN beats all, the first of equals wins); with dy, the gradient that the winners get."""
    size, windows = pool_windows(x, kernel_size, stride, padding, ceil_mode)
    y, dx = np.zeros((*x.shape[:2], *size)), np.zeros(x.shape)
    for (n, c, p, q), seen, _ in windows:
        best = seen[0]
        for pixel in seen[1:]:
            if _beats(x[n, c, *pixel], x[n, c, *best]):
                best = pixel
        y[n, c, p, q] = x[n, c, *best]
        if dy is not None:
            dx[n, c, *best] += dy[n, c, p, q]
    return y if dy is None else dx


def naive_avg_pool(x: np.ndarray[Any, Any], kernel_size: tuple[int, int], stride: tuple[int, int],
                   padding: tuple[int, int] = (0, 0), ceil_mode: bool = False, dy: Any = None) -> np.ndarray[Any, Any]:
    """The sum of what each window sees over its area, padding counted; with dy, the gradient."""
    size, windows = pool_windows(x, kernel_size, stride, padding, ceil_mode)
    y, dx = np.zeros((*x.shape[:2], *size)), np.zeros(x.shape)
    for (n, c, p, q), seen, area in windows:
        for pixel in seen:
            y[n, c, p, q] += x[n, c, *pixel] / area
            if dy is not None:
                dx[n, c, *pixel] += dy[n, c, p, q] / area
    return y if dy is None else dx


def naive_adaptive_avg_pool(x: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    y = np.zeros((*x.shape[:2], *size))
    for n, c, p, q in np.ndindex(*y.shape):
        rows, columns = (range(math.floor(i * m / parts), math.ceil((i + 1) * m / parts))
                         for i, m, parts in zip((p, q), x.shape[2:], size, strict=True))
        y[n, c, p, q] = sum(x[n, c, h, w] for h in rows for w in columns) / (len(rows) * len(columns))
    return y


def naive_im2col(x: np.ndarray[Any, Any], kernel_size: tuple[int, int], stride: tuple[int, int] = (1, 1),
                 padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1)) -> np.ndarray[Any, Any]:
    n_images, channels, *size = x.shape
    p_size, q_size = (len(range(0, n + 2 * p - d * (k - 1), s))
                      for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True))
    columns = np.zeros((n_images, channels, *kernel_size, p_size, q_size))
    for n, c, i, j, p, q in np.ndindex(*columns.shape):
        h, w = p * stride[0] - padding[0] + i * dilation[0], q * stride[1] - padding[1] + j * dilation[1]
        if 0 <= h < size[0] and 0 <= w < size[1]:
            columns[n, c, i, j, p, q] = x[n, c, h, w]
    return columns.reshape(n_images, channels * math.prod(kernel_size), p_size * q_size)


def naive_batch_norm(x: np.ndarray[Any, Any], weight: Any, bias: Any, eps: float = 1e-5) -> np.ndarray[Any, Any]:
    """Each channel by its own mean and biased variance, summed exactly."""
    y = np.zeros(x.shape)
    for c in range(x.shape[1]):
        values = [float(v) for v in x[:, c].ravel()]
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        y[:, c] = weight[c] * (x[:, c] - mean) / math.sqrt(var + eps) + bias[c]
    return y


def naive_simam(x: np.ndarray[Any, Any], eps: float = 1e-4) -> np.ndarray[Any, Any]:
    """Each pixel by its distance from its channel's mean, against the variance over n - 1, summed exactly."""
    y = np.zeros(x.shape)
    for n, c in np.ndindex(*x.shape[:2]):
        values = [float(v) for v in x[n, c].ravel()]
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        for h, w in np.ndindex(*x.shape[2:]):
            e = (x[n, c, h, w] - mean) ** 2 / (4 * (var + eps)) + 0.5
            y[n, c, h, w] = x[n, c, h, w] / (1 + math.exp(-e))
    return y


def naive_softmax(x: np.ndarray[Any, Any], axis: int = -1) -> np.ndarray[Any, Any]:
    rows = np.moveaxis(x, axis, -1)
    y = np.zeros(rows.shape)
    for at in np.ndindex(*rows.shape[:-1]):
        largest = max(rows[at])
        powers = [math.exp(v - largest) for v in rows[at]]
        y[at] = [p / math.fsum(powers) for p in powers]
    return np.moveaxis(y, -1, axis)


def naive_log_softmax(x: np.ndarray[Any, Any], axis: int = -1) -> np.ndarray[Any, Any]:
    rows = np.moveaxis(x, axis, -1)
    y = np.zeros(rows.shape)
    for at in np.ndindex(*rows.shape[:-1]):
        largest = max(rows[at])
        y[at] = [v - largest - math.log(math.fsum(math.exp(w - largest) for w in rows[at])) for v in rows[at]]
    return np.moveaxis(y, -1, axis)


def naive_cross_entropy(logits: np.ndarray[Any, Any], labels: Any, label_smoothing: float = 0.0) -> np.ndarray[Any, Any]:
    """-sum_j target_j log p_j, averaged over the images."""
    log_p, (images, classes) = naive_log_softmax(logits), logits.shape
    losses = []
    for n in range(images):
        target = [label_smoothing / classes + (1 - label_smoothing) * (j == labels[n]) for j in range(classes)]
        losses.append(-math.fsum(t * v for t, v in zip(target, log_p[n], strict=True)))
    return np.array(math.fsum(losses) / images)


def naive_matmul(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    row, column = a if a.ndim > 1 else a[None], b if b.ndim > 1 else b[:, None]
    lead = np.broadcast_shapes(row.shape[:-2], column.shape[:-2])
    row, column = np.broadcast_to(row, lead + row.shape[-2:]), np.broadcast_to(column, lead + column.shape[-2:])
    y = np.zeros((*lead, row.shape[-2], column.shape[-1]))
    for *at, i, j in np.ndindex(*y.shape):
        y[*at, i, j] = math.fsum(row[*at, i, k] * column[*at, k, j] for k in range(row.shape[-1]))
    y = y if a.ndim > 1 else y[..., 0, :]
    return y if b.ndim > 1 else y[..., 0]
