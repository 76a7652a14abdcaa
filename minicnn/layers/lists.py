"""Lists of layers: one after the other, beside a shortcut, or side by side; and how neighbours in a list are run as one."""
from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.autograd import Tensor
from minicnn.kernels.precision import half_beside
from minicnn.layers.base import Layer, inside
from minicnn.layers.steps import Fused, FusedConv2d, ReLU
from minicnn.layers.summary import Shape
from minicnn.threads import blas_alone

_fusing: ContextVar[bool] = ContextVar("fusing", default=True)


@contextmanager
def fusion(on: bool) -> Iterator[None]:
    """Inside the block, run layer lists fused (as they are outside), or with fusion(False) layer by layer."""
    token = _fusing.set(on)
    try:
        yield
    finally:
        _fusing.reset(token)


def fused(layers: Iterable[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """The same list with neighbours joined where one pass over the numbers does for both; the parameters stay where they are.

    A convolution takes in the batch norm after it and the ReLU after that; a batch norm, or a residual addition, the ReLU after it.
    To see what a model runs: `for name, layer in fused(model.children()): print(name, layer)`.
    """
    joined: list[tuple[str, Layer]] = []
    for name, layer in layers:
        before, last = joined[-1] if joined else ("", None)
        both = None if last is None else last.join(layer)
        if last is None or both is None:
            joined.append((name, layer))
        else:
            if isinstance(both, Fused):
                both.first_name = _first(before, last)[0]
            joined[-1] = (f"{before}+{name}", both)
    return joined


def run(layers: Iterable[tuple[str, Layer]], x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
    """x through one layer after the other; an error names the layer."""
    for name, layer in layers:
        with inside(*_first(name, layer)):
            x = layer(x, train, rng)
    return x


def build_beside(layers: Iterable[tuple[str, Layer]], in_shape: Shape, rng: np.random.Generator,
                 dtype: np.dtype[Any]) -> list[Shape]:
    """Build each of the layers for the same input: their output shapes; an error names the layer."""
    shapes = []
    for name, layer in layers:
        with inside(name, layer):
            shapes.append(layer.build(in_shape, rng, dtype))
    return shapes


def run_beside(layers: Iterable[tuple[str, Layer]], x: Tensor, train: bool, rng: np.random.Generator | None) -> list[Tensor]:
    """What each of the layers makes of the same x; an error names the layer."""
    results = []
    for name, layer in layers:
        with inside(name, layer):
            results.append(layer(x, train, rng))
    return results


def _first(name: str, layer: Layer) -> tuple[str, Layer]:
    """What an error names: the layer, or the first of those that run as one."""
    return (layer.first_name, layer.first) if isinstance(layer, Fused) else (name, layer)


class Sequential(Layer):
    """Run a list of layers in order. An empty list is the identity; a list inside the list is a Sequential of its own.

    in_shape: builds the model at once, for images (C, H, W), with parameters drawn from `seed`.
    `rng`, which dropout draws from where the call passes none, begins from the seed too.

    Under `set_precision("bf16")` or `"fp16"`, given float32 on a GPU, it computes with images of that type inside.
    """

    def __init__(self, layers: Iterable[Layer | list[Any]], in_shape: Sequence[int] | None = None, seed: int = 0,
                 dtype: Any = np.float32) -> None:
        self.layers: list[Layer] = [_as_layer(layer, i) for i, layer in enumerate(layers)]
        self.rng = np.random.default_rng([seed, 1])
        if in_shape is not None:
            self.build(in_shape, np.random.default_rng(seed), dtype)

    is_list = True

    def children(self) -> Iterable[tuple[str, Layer]]:
        return [(str(i) if layer.name is None else layer.name, layer) for i, layer in enumerate(self.layers)]

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        shape = in_shape
        for name, layer in self.children():
            with inside(name, layer):
                shape = layer.build(shape, rng, dtype)
        return shape

    def __call__(self, x: Any, train: bool = False, rng: np.random.Generator | None = None) -> Tensor:
        half = half_beside(x.data if isinstance(x, Tensor) else x)
        with blas_alone():
            y = super().__call__(x if half is None else ops.astype(x, half), train, self.rng if rng is None else rng)
        return y if half is None else y.astype(np.float32)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return run(fused(self.children()) if _fusing.get() else self.children(), x, train, rng)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __repr__(self) -> str:
        inside = "".join(f"\n    ({name or '-'}) " + repr(layer).replace("\n", "\n    ") for name, layer in self.children())
        return f"Sequential([{inside}])" if inside else "Sequential([])"

    def _repr_html_(self) -> str:
        """For a notebook: `summary()` as a table; before it is built, what the list says."""
        if self.in_shape is None or self.out_shape is None:
            return f"<pre>{html.escape(repr(self))}</pre>"
        ends = " &rarr; ".join(" x ".join(map(str, shape)) for shape in (self.in_shape, self.out_shape))
        return f"<div><b>Sequential</b> {ends}, {self.dtype}</div>{self.summary()._repr_html_()}"


class Residual(Layer):
    """y = body(x) + shortcut(x); an empty shortcut is x itself.

    dx is the sum of what comes back through both: through an empty shortcut, dy unchanged.
    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015.
    """

    def __init__(self, body: Layer | list[Any], shortcut: Layer | list[Any] = []) -> None:     # noqa: B006 (read only)
        self.body = _as_layer(body, "body")
        self.shortcut = _as_layer(shortcut, "shortcut")

    def children(self) -> Iterable[tuple[str, Layer]]:
        return [("body" if self.body.name is None else self.body.name, self.body),
                ("shortcut" if self.shortcut.name is None else self.shortcut.name, self.shortcut)]

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        shapes = build_beside(self.children(), in_shape, rng, dtype)
        if shapes[0] != shapes[1]:
            raise ValueError(f"Residual adds its body, {in_shape} -> {shapes[0]}, to its shortcut, {in_shape} -> {shapes[1]}: "
                             "the two must end in one shape; give the shortcut a 1x1 convolution of the body's channels and stride")
        return shapes[0]

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        body, shortcut = self.branches(x, train, rng)
        return body + shortcut

    def join(self, following: Layer) -> Layer | None:
        return FusedResidual(self) if type(self) is Residual and type(following) is ReLU else None

    def branches(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> list[Tensor]:
        """What the body and the shortcut make of x."""
        return run_beside(self.children(), x, train, rng)

    def __repr__(self) -> str:
        inside = "".join(f"\n    ({name or '-'}) " + repr(branch).replace("\n", "\n    ") for name, branch in self.children())
        return f"Residual({inside})"


class Branches(Layer):
    """Run several layers or lists on the same input and join their channels, in order; an empty list joins the input itself.

    (C, H, W) -> (the sum of the branches' channels, P, Q).   dx is the sum of what comes back through the branches, each of which
    gets its own channels of dy.
    Source: Szegedy et al., "Going Deeper with Convolutions", 2014.
    """

    def __init__(self, *branches: Layer | list[Any]) -> None:
        if not branches:
            raise ValueError("Branches needs at least one branch, a layer or a list of layers: Branches([Conv2d(8, 1)], [])")
        self.layers = [_as_layer(branch, i) for i, branch in enumerate(branches)]

    def children(self) -> Iterable[tuple[str, Layer]]:
        return [(str(i) if layer.name is None else layer.name, layer) for i, layer in enumerate(self.layers)]

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        shapes = build_beside(self.children(), in_shape, rng, dtype)
        if len({shape[1:] for shape in shapes}) > 1:
            ends = ", ".join(f"{name} in {shape}" for (name, _), shape in zip(self.children(), shapes, strict=True))
            raise ValueError(f"Branches joins channels, so from {in_shape} its branches must end in one height and width; {ends}: "
                             "give them the same stride, and each kernel the padding that keeps the size")
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.concatenate(run_beside(self.children(), x, train, rng), axis=1)

    def __repr__(self) -> str:
        inside = "".join(f"\n    ({name or '-'}) " + repr(branch).replace("\n", "\n    ") for name, branch in self.children())
        return f"Branches({inside})"


class FusedResidual(Fused):
    """A residual addition and the ReLU after it; both are done by the convolution and batch norm that the body ends in."""

    def __init__(self, residual: Residual) -> None:
        self.residual = residual
        self.spans(residual, residual)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        steps = fused(self.residual.body.children())
        last = steps[-1][1] if type(self.residual.body) is Sequential and steps else None
        if not (isinstance(last, FusedConv2d) and last.norm is not None and not last.rectified):
            return ops.add_relu(*self.residual.branches(x, train, rng))
        (body_name, body), (shortcut_name, shortcut) = self.residual.children()
        with inside(body_name, body):
            before = run(steps[:-1], x, train, rng)         # first, as unfused: dropout draws in this order
        with inside(shortcut_name, shortcut):
            residual = shortcut(x, train, rng)
        with inside(body_name, body), inside(*_first(*steps[-1])):
            return last.onto(residual, before, train, rng)


def _as_layer(value: Any, where: int | str) -> Layer:
    if isinstance(value, list):
        return Sequential(value)
    if not isinstance(value, Layer):
        raise TypeError(f"item {where} of a layer list is {value!r}, not a layer: make it with e.g. ReLU(), and splice a list "
                        "of layers with *")
    return value
