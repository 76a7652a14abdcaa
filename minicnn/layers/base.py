"""What every layer does: learn its sizes once, check what it is given, keep and hand over its parameters."""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np

from minicnn.autograd import Tensor, recorder
from minicnn.backend import device_of, is_array, is_half, resolve_device, to_device, to_numpy
from minicnn.layers.summary import Row, Shape, Summary


class Layer:
    """One step of a model. A subclass says how its sizes follow (`infer`) and what it computes (`forward`)."""

    parameter_names: tuple[str, ...] = ()       # attributes that hold a Tensor (or None), in the order of state_dict
    buffer_names: tuple[str, ...] = ()          # attributes that hold an array that is kept, but not learned

    name: str | None = None                     # unnamed: the index in its list; "": its children stand in its parent's namespace
    is_list = False                             # whether it only runs the layers inside
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

    def join(self, following: Layer) -> Layer | None:
        """One layer that does what this one and the following one do, in fewer passes; None where there is none."""
        return None

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
        if x.dtype != self.dtype and not (is_half(x.dtype) and self.dtype == np.float32):
            raise TypeError(f"an input of {x.dtype} in a layer of {self.dtype}: convert it with x.astype({str(self.dtype)!r}), "
                            "or the model with model.astype(...)")
        watcher = recorder()
        return self.forward(x, train, rng) if watcher is None else watcher.layer(self, x, lambda: self.forward(x, train, rng))

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

        A checkpoint that wraps them ({"state_dict": ...} or "model", names that begin with "module.") is unwrapped. Old files
        lack num_batches_tracked; that is accepted. strict=False loads what fits and reports the rest.
        Raises MisfitError, a ValueError that lists every missing, unexpected and mismatched name, before anything is changed.
        """
        entries = {name: (owner, value) for name, owner, value in self._entries()}
        given = unwrapped(state)
        found = {name: _on_the_host(given[name]) for name in entries if name in given}
        fitting = {name: array for name, array in found.items()
                   if array is not None and array.shape == tuple(entries[name][1].shape)}
        report = LoadReport(
            missing=[n for n in entries if n not in given and not n.endswith("num_batches_tracked")],
            unexpected=[n for n in given if n not in entries],
            mismatched=[f"{n}: {_described(given[n], array)} given, {tuple(entries[n][1].shape)} here"
                        for n, array in found.items() if n not in fitting])
        if strict and any(report):
            raise MisfitError(report)
        for name, array in fitting.items():
            entries[name][0]._set(name.rpartition(".")[2], array)
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
                if layer.out_shape is not None and layer.dtype is not None and not layer.is_list]
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
        host = np.empty_like(to_numpy(data))            # in the same order of axes in memory
        host[...] = array
        new = to_device(host, device_of(data))
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
            if statistics and hasattr(layer, "statistics_frozen"):
                layer.statistics_frozen = frozen
        return self


class LoadReport(NamedTuple):
    """What load_state_dict found: names the state lacks, names the model lacks, names whose shapes differ."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def words(self, most: int | None = None) -> str:
        """What does not fit, of each kind so many at most."""
        def listed(names: list[str]) -> str:
            left = len(names) - (len(names) if most is None else most)
            return ", ".join(names[:most]) + (f", ... and {left} more" if left > 0 else "")

        found = {name: getattr(self, name) for name in self._fields}
        return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in found.items() if names) or "everything fits"

    def __str__(self) -> str:
        return self.words()


class MisfitError(ValueError):
    """A state that does not fit its model; `report` says what of it."""

    def __init__(self, report: LoadReport) -> None:
        super().__init__(f"the state does not fit the model. {report}. strict=False loads what fits")
        self.report = report


WRAPPERS = ("state_dict", "model_state_dict", "model", "net")      # under which checkpoints keep a state, beside other things


def unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a model's state, in a checkpoint that may keep it beside other things, wrapped again and again."""
    while (inner := next((state[name] for name in WRAPPERS if isinstance(state.get(name), Mapping)), None)) is not None:
        state = inner
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def _on_the_host(value: Any) -> np.ndarray[Any, Any] | None:
    """The value as an array of numbers, if it is one."""
    try:
        array = np.asarray(to_numpy(value) if is_array(value) else value.numpy() if isinstance(value, Tensor) else value)
    except ValueError:                              # lists of unequal lengths
        return None
    return array if array.dtype.kind in "fiub" else None


def _described(value: Any, array: np.ndarray[Any, Any] | None) -> str:
    if array is not None:
        return f"{array.shape}"
    return "None" if value is None else f"an array of {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"


def _floating(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype.kind != "f" or is_half(dtype):
        raise TypeError(f"a layer's parameters are float32 or float64, not {dtype}"
                        + (': half precision is for images, on a GPU, see minicnn.set_precision' if is_half(dtype) else ""))
    return dtype


def is_count(n: Any) -> bool:
    """Whether n is an integer of at least 1, and no bool."""
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool) and int(n) >= 1


def image_shape(kind: str, in_shape: Shape) -> Shape:
    """in_shape, which must be (C, H, W) for a layer of this kind; ValueError otherwise."""
    if len(in_shape) != 3:
        raise ValueError(f"{kind} reads images (C, H, W), not {in_shape}")
    return in_shape


@contextmanager
def inside(name: str, layer: Layer) -> Iterator[None]:
    """Put the layer's path in front of an error's message: each list on the way out adds its part."""
    try:
        yield
    except Exception as error:
        path, kind, message = getattr(error, "_location", ("", type(layer).__name__, str(error)))
        path = ".".join(part for part in (name, path) if part)
        setattr(error, "_location", (path, kind, message))      # noqa: B010 (no attribute that mypy knows)
        error.args = (f"{path} ({kind}): {message}",)
        raise
