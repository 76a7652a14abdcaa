"""Layers: operations that own their parameters and infer their sizes, and lists of them.

A layer is made with what a reader wants to say (`Conv2d(64, 3, padding=1)`), and learns the rest, once, in
`build(in_shape, rng, dtype)`: channels come from the layer before it. A list of layers is a Python list; `Sequential` runs
one in order, and `Residual` adds a list's result to its input. Nothing is allocated later than `build`.

A layer has no mode: `layer(x)` is inference, `layer(x, train=True)` is training.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np

from minicnn import initialization, ops
from minicnn.autograd import Tensor
from minicnn.backend import Array, device_of, is_array, resolve_device, to_device, to_numpy
from minicnn.initialization import Initializer
from minicnn.kernels.windows import Windows, pair

Shape = tuple[int, ...]


class Layer:
    """One step of a model. A subclass says how its sizes follow (`infer`) and what it computes (`forward`)."""

    parameter_names: tuple[str, ...] = ()       # attributes that hold a Tensor (or None), in the order of state_dict
    buffer_names: tuple[str, ...] = ()          # attributes that hold an array that is kept, but not learned

    name: str | None = None                     # unnamed: the index in its list; "": its children stand in its parent's namespace
    in_shape: Shape | None = None               # of one image, without the batch axis; known once built
    out_shape: Shape | None = None
    dtype: np.dtype[Any] | None = None

    # ------------------------------------------------------------ what a subclass writes
    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        """Make the parameters for this input shape; return the output shape. ValueError where the input does not fit."""
        return in_shape

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        """What it computes of a batch that has been checked; `rng` is for what is random in training."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(self, x, train, rng)")

    def multiply_adds(self) -> int:
        """Multiplications (each with its addition) that one image costs in convolutions and matrix products."""
        return 0

    def children(self) -> Iterable[tuple[str, Layer]]:
        """(name, layer) of the layers directly inside, in the order of state_dict."""
        return ()

    # ------------------------------------------------------------ what every layer does
    def named(self, name: str) -> Self:
        """Give it a name for state_dict and messages, and return it."""
        self.name = name
        return self

    def build(self, in_shape: Sequence[int], rng: np.random.Generator, dtype: Any = np.float32) -> Shape:
        """Learn the input's shape (C, H, W), or (features,), make the parameters, return the output's shape. Once."""
        if self.out_shape is not None:
            raise RuntimeError(f"this {type(self).__name__} is built already, for an input of {self.in_shape}: a layer stands in "
                               "one place of one model; make another one for another place ([layer] * 2 repeats the same object)")
        self.dtype = _floating(dtype)
        self.in_shape = tuple(int(n) for n in in_shape)
        out_shape = self.infer(self.in_shape, rng, self.dtype)
        self._check_names()
        self.out_shape = out_shape
        return out_shape

    def __call__(self, x: Any, train: bool = False, rng: np.random.Generator | None = None) -> Tensor:
        """Run a batch (an array or a Tensor, batch axis first) through it."""
        in_shape = self._built_for()
        x = x if isinstance(x, Tensor) else Tensor(x)
        if x.ndim != len(in_shape) + 1:
            raise ValueError(f"an input of shape {x.shape} has {x.ndim} axes; it must be a batch of {in_shape}, with "
                             f"{len(in_shape) + 1} axes: a single one becomes a batch with x[None]")
        if x.dtype != self.dtype:
            raise TypeError(f"an input of {x.dtype} in a layer of {self.dtype}: convert it with x.astype({str(self.dtype)!r}), "
                            "or the model with model.astype(...)")
        return self.forward(x, train, rng)

    def walk(self, path: str = "") -> Iterator[tuple[str, Layer]]:
        """(path, layer) of itself and of every layer inside, in order."""
        yield path, self
        for name, child in self.children():
            yield from child.walk(".".join(part for part in (path, name) if part))

    def named_parameters(self) -> dict[str, Tensor]:
        """What it learns, by path."""
        return {name: p for name, _, p in self._entries() if isinstance(p, Tensor)}

    def parameters(self) -> list[Tensor]:
        """What it learns, in the order of state_dict."""
        return list(self.named_parameters().values())

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every parameter and buffer by its path, as NumPy copies."""
        return {name: np.array(to_numpy(value.data if isinstance(value, Tensor) else value), order="C")
                for name, _, value in self._entries()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadReport:
        """Take over parameters and buffers by name, converted to the model's dtype and device.

        A checkpoint that wraps them ({"state_dict": ...}, names that begin with "module.") is unwrapped. Old files lack
        num_batches_tracked; that is accepted. strict=False loads what fits and reports the rest.
        Raises ValueError that lists every missing, unexpected and mismatched name, before anything is changed.
        """
        entries = {name: (owner, value) for name, owner, value in self._entries()}
        given = {name: _on_the_host(name, value) if name in entries else value for name, value in _unwrapped(state).items()}
        report = LoadReport(
            missing=[n for n in entries if n not in given and not n.endswith("num_batches_tracked")],
            unexpected=[n for n in given if n not in entries],
            mismatched=[f"{n}: {given[n].shape} given, {tuple(value.shape)} here"
                        for n, (_, value) in entries.items() if n in given and given[n].shape != tuple(value.shape)])
        if strict and any(report):
            raise ValueError(f"the state does not fit the model. {report}. strict=False loads what fits")
        for name, (owner, value) in entries.items():
            if name in given and given[name].shape == tuple(value.shape):
                owner._set(name.rpartition(".")[2], given[name])
        return report

    def freeze(self, parameters: bool = True, statistics: bool = True) -> Self:
        """Hold parameters, running statistics, or both still, here and in every layer inside; the other stays as it was.

        Frozen parameters get no gradient. Frozen statistics do not move, and normalise even under train=True.
        """
        return self._set_frozen(parameters, statistics, True)

    def unfreeze(self, parameters: bool = True, statistics: bool = True) -> Self:
        """Let parameters, running statistics, or both move again."""
        return self._set_frozen(parameters, statistics, False)

    def astype(self, dtype: Any) -> Self:
        """Convert every parameter and floating buffer, in place."""
        self._built_for()
        dtype = _floating(dtype)
        self._map_arrays(lambda array: array.astype(dtype))
        for _, layer in self.walk():
            layer.dtype = dtype
        return self

    def to(self, device: str) -> Self:
        """Move every parameter and floating buffer to "cpu", "cuda" or "auto", in place."""
        self._built_for()
        where = resolve_device(device)
        self._map_arrays(lambda array: to_device(array, where))
        return self

    @property
    def device(self) -> str:
        """Where its parameters lie; "cpu" without any."""
        return next((device_of(p.data) for p in self.parameters()), "cpu")

    def summary(self) -> Summary:
        """Output shape, parameters, multiply-adds and bytes of activation of each layer, for one image; print it."""
        self._built_for()
        rows = [Row(path or "(itself)", type(layer).__name__, layer.out_shape,
                    sum(p.size for p in layer._own(layer.parameter_names).values()), layer.multiply_adds(),
                    int(np.prod(layer.out_shape)) * layer.dtype.itemsize)
                for path, layer in self.walk()
                if layer.out_shape is not None and layer.dtype is not None and not isinstance(layer, Sequential)]
        return Summary(rows)

    def __repr__(self) -> str:
        """The call that made it, without what is default."""
        said = []
        for p in inspect.signature(type(self)).parameters.values():
            value = getattr(self, f"_with_{p.name}", getattr(self, p.name, p.default))
            if p.default is p.empty:
                said.append(repr(value))
            elif not callable(value) and value != p.default:
                said.append(f"{p.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"

    # ------------------------------------------------------------ parts
    def _built_for(self) -> Shape:
        """The input shape it was built for; RuntimeError before."""
        if self.in_shape is None or self.out_shape is None:
            raise RuntimeError(f"this {type(self).__name__} is not built, so it has no sizes and no parameters yet: call "
                               "layer.build(in_shape, rng, dtype), or give its model's list an input, Sequential(layers, in_shape)")
        return self.in_shape

    def _check_names(self) -> None:
        paths = [path for path, _, _ in self._entries()]
        twice = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
        if twice:
            raise ValueError(f"two layers have the name {twice[0]!r}; name one of them otherwise with .named(...)")

    def _own(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _entries(self) -> Iterator[tuple[str, Layer, Any]]:
        """(path of the entry, the layer that owns it, its Tensor or array) in the order of state_dict."""
        for path, layer in self.walk():
            for name, value in layer._own((*layer.parameter_names, *layer.buffer_names)).items():
                yield (f"{path}.{name}" if path else name), layer, value

    def _set(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Put an array of the host in place of a parameter's or buffer's, in its dtype and on its device."""
        old = getattr(self, name)
        data = old.data if isinstance(old, Tensor) else old
        new = to_device(np.array(array, dtype=data.dtype, order="C"), device_of(data))
        if isinstance(old, Tensor):
            old.data = new
        else:
            setattr(self, name, new)

    def _map_arrays(self, change: Any) -> None:
        for path, layer, value in list(self._entries()):
            if isinstance(value, Tensor):
                value.data = change(value.data)
                value.requires_grad = value.requires_grad       # a new leaf, of the new dtype
            elif value.dtype.kind == "f":
                setattr(layer, path.rpartition(".")[2], change(value))

    def _set_frozen(self, parameters: bool, statistics: bool, frozen: bool) -> Self:
        self._built_for()
        for _, layer in self.walk():
            if parameters:
                for p in layer._own(layer.parameter_names).values():
                    p.requires_grad = not frozen
            if statistics and isinstance(layer, BatchNorm2d):
                layer.statistics_frozen = frozen
        return self


class LoadReport(NamedTuple):
    """What load_state_dict found: names the state lacks, names the model lacks, names whose shapes differ."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __str__(self) -> str:
        found = {name: getattr(self, name) for name in self._fields}
        return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items() if names) or "everything fits"


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    inner = state.get("state_dict", state)
    if inner and all(name.startswith("module.") for name in inner):
        return {name.removeprefix("module."): value for name, value in inner.items()}
    return dict(inner)


def _on_the_host(name: str, value: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(to_numpy(value) if is_array(value) else value.numpy() if isinstance(value, Tensor) else value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"the state's {name} is of {array.dtype}; it must be an array of numbers")
    return array


def _floating(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype.kind != "f":
        raise TypeError(f"a layer computes in floating point, not {dtype}: use float32 or float64")
    return dtype            # type: ignore[no-any-return]


# ---------------------------------------------------------------- the summary
class Row(NamedTuple):
    """One layer of a summary."""

    path: str
    kind: str
    out_shape: Shape
    parameters: int
    multiply_adds: int
    activation_bytes: int


class Summary:
    """A model layer by layer, for one image. `print` it, or read `.rows` and the totals."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.parameters = sum(row.parameters for row in rows)
        self.multiply_adds = sum(row.multiply_adds for row in rows)
        self.activation_bytes = sum(row.activation_bytes for row in rows)

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "parameters", "multiply-adds", "activation bytes")
        body = [(row.path, row.kind, " x ".join(map(str, row.out_shape)), *(f"{n:,}" for n in row[3:])) for row in self.rows]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}", f"{self.activation_bytes:,}")
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        line = "  ".join("-" * w for w in widths)

        def aligned(cells: Sequence[str]) -> str:
            return "  ".join(c.ljust(w) if i < 3 else c.rjust(w)
                             for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()
        return "\n".join([aligned(head), line, *map(aligned, body), line, aligned(total)])

    __repr__ = __str__


# ---------------------------------------------------------------- layers with parameters
class Conv2d(Layer):
    """Convolution (`ops.conv2d`): (C, H, W) -> (out_channels, P, Q).

    weight: (out_channels, C / groups, kh, kw), by He et al.'s fan-out normal;  bias: zeros, if any.
    """

    parameter_names = ("weight", "bias")

    def __init__(self, out_channels: int, kernel_size: Any = 3, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                 groups: int = 1, bias: bool = True, weight_init: Initializer = initialization.he_normal("out")) -> None:
        self.windows = Windows.of(kernel_size, stride, padding, dilation)
        self.out_channels, self.kernel_size, self.stride, self.padding = out_channels, kernel_size, stride, padding
        self.dilation, self.groups, self.weight_init = dilation, groups, weight_init
        self._with_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not (_count(groups) and _count(out_channels)) or out_channels % groups:
            raise ValueError(f"Conv2d: groups={groups!r} must divide out_channels={out_channels!r}, both integers of at least 1")

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c, h, w = _image_shape("Conv2d", in_shape)
        if c % self.groups:
            raise ValueError(f"groups={self.groups} must divide the {c} channels of the input {in_shape}")
        out_size = self.windows.out_size((h, w))
        shape = (self.out_channels, c // self.groups, *self.windows.kernel_size)
        self.weight = Tensor(self.weight_init(shape, rng, dtype), requires_grad=True)
        self.bias = Tensor(np.zeros(self.out_channels, dtype), requires_grad=True) if self._with_bias else None
        return (self.out_channels, *out_size)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding,          # type: ignore[no-any-return]
                          dilation=self.dilation, groups=self.groups)

    def multiply_adds(self) -> int:
        assert self.weight is not None and self.out_shape is not None
        return int(self.weight.size * np.prod(self.out_shape[1:]))


class BatchNorm2d(Layer):
    """Batch normalisation (`ops.batch_norm`): (C, H, W) -> the same, each channel by itself.

    weight: ones;  bias, running_mean: zeros;  running_var: ones;  all (C,).
    num_batches_tracked counts training batches, as PyTorch's files do; it stays on the host.
    """

    parameter_names = ("weight", "bias")
    buffer_names = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, momentum: float = 0.1, eps: float = 1e-5) -> None:
        self.momentum, self.eps = momentum, eps
        self.statistics_frozen = False
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.running_mean: Array = None
        self.running_var: Array = None
        self.num_batches_tracked: Array = None

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c = _image_shape("BatchNorm2d", in_shape)[0]
        self.weight = Tensor(np.ones(c, dtype), requires_grad=True)
        self.bias = Tensor(np.zeros(c, dtype), requires_grad=True)
        self.running_mean, self.running_var = np.zeros(c, dtype), np.ones(c, dtype)
        self.num_batches_tracked = np.zeros((), np.int64)
        return in_shape

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        learning = train and not self.statistics_frozen
        y = ops.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, train=learning,
                           momentum=self.momentum, eps=self.eps)
        self.num_batches_tracked += learning
        return y                        # type: ignore[no-any-return]


class Linear(Layer):
    """Fully connected (`ops.linear`): (in,) -> (out_features,).

    weight: (out_features, in), uniform within 1 / sqrt(in);  bias: the same, or zeros with a weight_init of your own.
    """

    parameter_names = ("weight", "bias")

    def __init__(self, out_features: int, *, bias: bool = True, weight_init: Initializer | None = None) -> None:
        self.out_features, self.weight_init = out_features, weight_init
        self._with_bias = bias
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if not _count(out_features):
            raise ValueError(f"Linear: out_features={out_features!r} must be an integer of at least 1")

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        if len(in_shape) != 1:
            raise ValueError(f"Linear reads a vector, (features,), not {in_shape}: put Flatten() or GlobalAvgPool2d() before it")
        bound = initialization.uniform(in_shape[0] ** -0.5)
        weight_init, bias_init = (bound, bound) if self.weight_init is None else (self.weight_init, initialization.zeros)
        self.weight = Tensor(weight_init((self.out_features, *in_shape), rng, dtype), requires_grad=True)
        if self._with_bias:
            self.bias = Tensor(bias_init((self.out_features,), rng, dtype), requires_grad=True)
        return (self.out_features,)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.linear(x, self.weight, self.bias)            # type: ignore[no-any-return]

    def multiply_adds(self) -> int:
        assert self.weight is not None
        return self.weight.size


# ---------------------------------------------------------------- layers without
class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.relu(x)              # type: ignore[no-any-return]


class _Pool(Layer):
    pool: Any

    def __init__(self, kernel_size: Any = 2, stride: Any = None, padding: Any = 0, ceil_mode: bool = False) -> None:
        self.kernel_size, self.stride, self.padding, self.ceil_mode = kernel_size, stride, padding, ceil_mode
        self.windows = Windows.of(kernel_size, kernel_size if stride is None else stride, padding, 1, ceil_mode)

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        c, h, w = _image_shape(type(self).__name__, in_shape)
        return (c, *self.windows.out_size((h, w)))

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return type(self).pool(x, self.kernel_size, self.stride, self.padding, self.ceil_mode)      # type: ignore[no-any-return]


class MaxPool2d(_Pool):
    """The largest of each window (`ops.max_pool2d`)."""
    pool = staticmethod(ops.max_pool2d)


class AvgPool2d(_Pool):
    """The mean of each window (`ops.avg_pool2d`)."""
    pool = staticmethod(ops.avg_pool2d)


class AdaptiveAvgPool2d(Layer):
    """Means over output_size windows that share the image out (`ops.adaptive_avg_pool2d`): (C, H, W) -> (C, P, Q)."""

    def __init__(self, output_size: Any) -> None:
        self.output_size = pair(output_size, "output_size", 1)

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return (_image_shape("AdaptiveAvgPool2d", in_shape)[0], *self.output_size)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.adaptive_avg_pool2d(x, self.output_size)     # type: ignore[no-any-return]


class GlobalAvgPool2d(Layer):
    """The mean of each channel: (C, H, W) -> (C,)."""

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return _image_shape("GlobalAvgPool2d", in_shape)[:1]

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.global_avg_pool2d(x)                         # type: ignore[no-any-return]


class Flatten(Layer):
    """(C, H, W) -> (C * H * W,)"""

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        return (int(np.prod(in_shape)),)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return x.reshape(len(x), int(np.prod(x.shape[1:])))


class Dropout(Layer):
    """Zero a random share p of the numbers in training (`ops.dropout`)."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: p={p} must be a share between 0 and 1")
        self.p = p

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        return ops.dropout(x, self.p, train=train, rng=rng)     # type: ignore[no-any-return]


# ---------------------------------------------------------------- lists of layers
class Sequential(Layer):
    """Run a list of layers in order. An empty list is the identity; a list inside the list is a Sequential of its own.

    in_shape: builds the model at once, for images (C, H, W), with parameters drawn from `seed`.
    `rng`, which dropout draws from where the call passes none, begins from the seed too.
    """

    def __init__(self, layers: Iterable[Layer | list[Any]], in_shape: Sequence[int] | None = None, seed: int = 0,
                 dtype: Any = np.float32) -> None:
        self.layers: list[Layer] = [_as_layer(layer, i) for i, layer in enumerate(layers)]
        self.rng = np.random.default_rng([seed, 1])
        if in_shape is not None:
            self.build(in_shape, np.random.default_rng(seed), dtype)

    def children(self) -> Iterable[tuple[str, Layer]]:
        return [(str(i) if layer.name is None else layer.name, layer) for i, layer in enumerate(self.layers)]

    def infer(self, in_shape: Shape, rng: np.random.Generator, dtype: np.dtype[Any]) -> Shape:
        shape = in_shape
        for name, layer in self.children():
            with _inside(name, layer):
                shape = layer.build(shape, rng, dtype)
        return shape

    def __call__(self, x: Any, train: bool = False, rng: np.random.Generator | None = None) -> Tensor:
        return super().__call__(x, train, self.rng if rng is None else rng)

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        for name, layer in self.children():
            with _inside(name, layer):
                x = layer(x, train, rng)
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __repr__(self) -> str:
        inside = "".join(f"\n    ({name or '-'}) " + repr(layer).replace("\n", "\n    ") for name, layer in self.children())
        return f"Sequential([{inside}])" if inside else "Sequential([])"


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
        shapes = []
        for name, branch in self.children():
            with _inside(name, branch):
                shapes.append(branch.build(in_shape, rng, dtype))
        if shapes[0] != shapes[1]:
            raise ValueError(f"Residual adds its body, {in_shape} -> {shapes[0]}, to its shortcut, {in_shape} -> {shapes[1]}: "
                             "the two must end in one shape; give the shortcut a 1x1 convolution of the body's channels and stride")
        return shapes[0]

    def forward(self, x: Tensor, train: bool, rng: np.random.Generator | None) -> Tensor:
        results = []
        for name, branch in self.children():
            with _inside(name, branch):
                results.append(branch(x, train, rng))
        return results[0] + results[1]

    def __repr__(self) -> str:
        inside = "".join(f"\n    ({name or '-'}) " + repr(branch).replace("\n", "\n    ") for name, branch in self.children())
        return f"Residual({inside})"


def _as_layer(value: Any, where: int | str) -> Layer:
    if isinstance(value, list):
        return Sequential(value)
    if not isinstance(value, Layer):
        raise TypeError(f"item {where} of a layer list is {value!r}, not a layer: make it with e.g. ReLU(), and splice a list "
                        "of layers with *")
    return value


def _count(n: Any) -> bool:
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool) and int(n) >= 1


def _image_shape(kind: str, in_shape: Shape) -> Shape:
    if len(in_shape) != 3:
        raise ValueError(f"{kind} reads images (C, H, W), not {in_shape}")
    return in_shape


@contextmanager
def _inside(name: str, layer: Layer) -> Iterator[None]:
    """Put the layer's path in front of an error's message: each list on the way out adds its part."""
    try:
        yield
    except Exception as error:
        path, kind, message = getattr(error, "_location", ("", type(layer).__name__, str(error)))
        path = ".".join(part for part in (name, path) if part)
        setattr(error, "_location", (path, kind, message))      # noqa: B010 (no attribute that mypy knows)
        error.args = (f"{path} ({kind}): {message}",)
        raise
