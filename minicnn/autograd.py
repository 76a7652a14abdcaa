"""Tensors, the tape, and what an operation is. This file knows no operation by name.

An operation is a forward and its backwards: plain functions on arrays, side by side.

    @op
    def mul(a, b):
        return a * b

    @mul.backward("a")
    def mul_da(dy, b):          # dy is dL/dy; what else it needs, it names
        return dy * b

    @mul.backward("b")
    def mul_db(dy, a):
        return dy * a

After the output gradient, a backward names arguments of the forward (`a`), the shape of one (`a_shape`), the output (`y`),
an extra output of the forward, or `wanted` (which gradients are asked for). The tape keeps what is named, and nothing else.

In a first-order pass a backward receives plain arrays, so nothing is recorded. With `create_graph=True` it receives
Tensors tied back to the nodes they came from, so the very same lines build the graph of the gradient.

The tape is a graph of nodes that link to nodes, never to Tensors: an activation that no backward names is freed as soon
as the program drops it. Parents are born before their children, so the order of birth is a topological order and the
reverse pass is a loop, not a recursion.
"""
from __future__ import annotations

import functools
import html
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, overload

import numpy as np

from minicnn.backend import FLOATING, Array, array_module, compiles_cuda, is_array, is_floating, is_half, to_numpy

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)
_clock = itertools.count()

# Filled by ops/arithmetic.py: the only way down from an operator of Tensor to an op.
OPERATORS: dict[str, Callable[..., Any]] = {}

Key = str | tuple[str, int]         # an argument's name, or (name, position) inside an argument that is a list


@contextmanager
def _record(on: bool) -> Iterator[None]:
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad() -> AbstractContextManager[None]:
    """Nothing that is computed inside is recorded, so nothing is kept for a backward pass.

    >>> with no_grad():
    ...     logits = model(images)      # doctest: +SKIP
    """
    return _record(False)


def is_recording() -> bool:
    """Whether what is computed now can be differentiated: not inside `no_grad`."""
    return _recording.get()


class Recorder:
    """Who watches: told of every call that has a Tensor among its arguments, of every backward, and of every layer that runs.

    This one only lets things happen. `minicnn.study` has one that writes them down; without any, nothing is done for it.
    """

    def forward(self, op: Op, values: dict[str, Any]) -> Any:
        """Run a forward on plain arrays."""
        return op.forward(**values)

    def called(self, op: Op, values: dict[str, Any], parents: Mapping[Key, Node], extras: Sequence[Any], out: Tensor) -> None:
        """Behind a call: its arguments as arrays, the nodes that some came from, the extra outputs, and the output."""

    def pulled(self, node: Node, dy: Any, gradients: Iterator[tuple[Node, Any, bool]]) -> Iterator[tuple[Node, Any, bool]]:
        """Hand on what the backwards of `node` yield for the output gradient dy; they run as they are asked."""
        return gradients

    def layer(self, layer: Any, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Run a layer on x."""
        return run()


def recorder() -> Recorder | None:
    """Who watches what is computed now, if anybody."""
    return _recorder.get()


@contextmanager
def watched_by(recorder: Recorder) -> Iterator[None]:
    """Inside the block, tell this recorder of everything."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


class Node:
    """A recorded call: the nodes it came from, and what its backwards name. A leaf has no op and may hold a gradient."""

    __slots__ = ("op", "parents", "saved", "shape", "dtype", "born", "grad", "__weakref__")

    def __init__(self, like: Array, op: Op | None = None, parents: dict[Key, Node] | None = None,
                 saved: dict[str, Any] | None = None) -> None:
        self.op = op
        self.parents = parents or {}
        self.saved = saved              # None: a leaf, or freed by a backward pass
        self.shape: tuple[int, ...] = like.shape
        self.dtype: np.dtype[Any] = like.dtype
        self.born = next(_clock)
        self.grad: Tensor | None = None

    def pull(self, dy: Any, leads: set[Node], create_graph: bool, written: set[Node]) -> Iterator[tuple[Node, Any, bool]]:
        """Yield (parent, its gradient, is the array nobody else's?) for the parents in `leads`; compute nothing else.

        written: the nodes whose gradient is handed out or added to; for any other the last is False, unasked.
        """
        assert self.op is not None and self.saved is not None
        saved = self._tied() if create_graph else self.saved
        asked = {key for key, parent in self.parents.items() if parent in leads}
        for rule in self.op.rules(create_graph):
            wanted = {key for key in asked if _argument(key) in rule.targets}
            if not wanted:
                continue
            asked -= wanted
            if create_graph:
                rule.refuse_saved_real_numbers(self.op, self.saved)
            names = {_argument(key) for key in wanted}
            gradients = rule.function(dy, **{name: names if name == "wanted" else saved[name] for name in rule.names})
            flat = rule.by_key(gradients, self.parents)
            for key in sorted(wanted, key=str):
                g, parent = _as_array(flat[key]), self.parents[key]
                _check_gradient(rule, key, g, parent)
                own = not create_graph and parent in written and _is_its_own(
                    g, (dy, *self.saved.values(), *(other for k, other in flat.items() if k != key)))
                yield parent, g, own
        if asked:
            raise TypeError(f"{self.op.__name__} has no backward of second order for {sorted(map(_argument, asked))}: "
                            "one registered with fused=True serves the first order alone; register another beside it, made of ops")

    def _tied(self) -> dict[str, Any]:
        """What was saved, as Tensors of the graph again: inputs tied to their nodes, the output to this one."""
        assert self.saved is not None
        tied = dict(self.saved)
        for name, value in self.saved.items():
            if name == "y":
                tied[name] = Tensor.tied(value, self)
            elif name in self.parents:
                tied[name] = Tensor.tied(value, self.parents[name])
            elif isinstance(value, (list, tuple)) and any((name, i) in self.parents for i in range(len(value))):
                tied[name] = [Tensor.tied(v, self.parents[name, i]) if (name, i) in self.parents else v
                              for i, v in enumerate(value)]
        return tied


def _argument(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _is_its_own(g: Any, others: Iterable[Any]) -> bool:
    """Whether g can be written to: memory of its own, each number of it once, none of it in the others."""
    if not getattr(g.flags, "writeable", True) or any(step == 0 for n, step in zip(g.shape, g.strides, strict=True) if n > 1):
        return False
    return not any(_shares_memory(g, other) for other in others)


def _shares_memory(g: Any, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_shares_memory(g, v) for v in value)
    return isinstance(value, type(g)) and bool(array_module(g).may_share_memory(g, value))


def _check_gradient(rule: Rule, key: Key, g: Any, parent: Node) -> None:
    name = key if isinstance(key, str) else f"{key[0]}[{key[1]}]"
    if not (isinstance(g, Tensor) or is_array(g)):
        raise TypeError(f"{rule.function.__name__} gave `{name}` a gradient of type {type(g).__name__}; "
                        f"it must return an array of shape {parent.shape} for it")
    if g.shape != parent.shape:
        raise ValueError(f"{rule.function.__name__} gave `{name}`, of shape {parent.shape}, a gradient of shape {g.shape}; "
                         "the two must be equal (was an axis broadcast in the forward and not summed in the backward?)")
    if g.dtype != parent.dtype:
        raise TypeError(f"{rule.function.__name__} gave `{name}`, of {parent.dtype}, a gradient of {g.dtype}; "
                        "the two must be equal (a NumPy float64 array in the backward promotes, a Python number does not)")


class Rule(NamedTuple):
    """One backward: the function, the arguments whose gradients it returns, and what it names after the output gradient."""

    function: Callable[..., Any]
    targets: tuple[str, ...]
    names: tuple[str, ...]

    def by_key(self, gradients: Any, parents: Mapping[Key, Node]) -> dict[Key, Any]:
        """What the function returned, one entry for every parent."""
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        if len(gradients) != len(self.targets):
            raise TypeError(f"{self.function.__name__} returned {len(gradients)} gradients for {len(self.targets)} "
                            f"arguments {list(self.targets)}; return one for each, as a tuple")
        found = dict(zip(self.targets, gradients, strict=True))
        return {key: found[key] if isinstance(key, str) else found[key[0]][key[1]]
                for key in parents if _argument(key) in found}

    def refuse_saved_real_numbers(self, op: Op, saved: Mapping[str, Any]) -> None:
        """A saved mean is a constant to the tape although it moves with the input: wrong, silently, at second order."""
        real = [name for name in self.names if name in op.extras and is_floating(saved[name].dtype)]
        if real:
            raise TypeError(f"{self.function.__name__} names {real}, which the tape holds as constants although they move with "
                            f"the inputs of {op.__name__}, so its second derivative would be wrong: "
                            "compute them again from the inputs here, or register this backward with fused=True")


class Op:
    """A forward and its backwards. Called with a Tensor among its arguments it returns a Tensor and records the call;
    called with arrays alone it returns arrays and records nothing."""

    __name__: str

    def __init__(self, forward: Callable[..., Any], extras: Sequence[str] = (), real: Sequence[str] = ()) -> None:
        functools.update_wrapper(self, forward)
        parameters = inspect.signature(forward).parameters
        variadic = [p.name for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if variadic:
            raise TypeError(f"{forward.__name__} takes *{variadic[0]}; an op names its arguments: take a list instead")
        clash = {"y", "wanted", *extras}.intersection(parameters)
        if clash:
            raise TypeError(f"{forward.__name__}: {sorted(clash)} cannot name an argument; backwards use it for something else")
        self.forward = forward
        self.extras = tuple(extras)
        self.real = frozenset(real)
        self.arguments = tuple(parameters)
        self.positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters.values())
        self.defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
        self.composed: list[Rule] = []
        self.fused: list[Rule] = []
        self._plans: dict[frozenset[str], tuple[tuple[str, str, bool], ...]] = {}

    def __repr__(self) -> str:
        return f"<op {self.__name__}({', '.join(self.arguments)})>"

    def backward(self, *targets: str, fused: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the backward of these arguments (one gradient each, in this order; a tuple where there are several).

        fused=True: a faster twin for the first-order pass, which receives plain arrays and may name saved real numbers.
        """
        known = {*self.arguments, *self.extras, *(f"{a}_shape" for a in self.arguments), "y", "wanted"}

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            names = tuple(inspect.signature(function).parameters)[1:]          # the first is the output gradient
            unknown = {*names} - known | {*targets} - {*self.arguments}
            if unknown:
                raise TypeError(f"{function.__name__} names {sorted(unknown)}, unknown to {self.__name__}; after the output "
                                f"gradient a backward may name {sorted(known)}, and its targets are arguments")
            rules = self.fused if fused else self.composed
            twice = {t for rule in rules for t in rule.targets if t in targets}
            if twice:
                raise TypeError(f"{self.__name__} has a backward for {sorted(twice)} already: the gradient would count twice")
            rules.append(Rule(function, targets, names))
            self._plans.clear()
            return function                         # stays a plain function, to be called on plain arrays

        return register

    def rules(self, create_graph: bool) -> list[Rule]:
        """The backwards to try, in order: fused ones first where they are allowed."""
        return self.composed if create_graph else self.fused + self.composed

    def _plan(self, parents: frozenset[str]) -> tuple[tuple[str, str, bool], ...]:
        """What to save when only `parents` can want a gradient: (name, the value's name, is it the shape alone?)."""
        plan = self._plans.get(parents)
        if plan is None:
            missing = parents.difference(*(rule.targets for rule in self.composed + self.fused))
            if missing:
                raise TypeError(f"{self.__name__} has no backward for {sorted(missing)}; register one with "
                                f"@{self.__name__}.backward({sorted(missing)[0]!r}), or pass an array or t.detach()")
            names = {n for r in self.composed + self.fused if not parents.isdisjoint(r.targets) for n in r.names} - {"wanted"}
            plan = tuple((n, n, False) if n in self.arguments or not n.endswith("_shape") else (n, n[:-6], True)
                         for n in sorted(names))
            self._plans[parents] = plan
        return plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > self.positional or not kwargs.keys().isdisjoint(self.arguments[:len(args)]):
            return self.forward(*args, **kwargs)            # Python's own words for a call that does not fit
        values: dict[str, Any] = {}
        parents: dict[Key, Node] = {}
        any_tensor = False
        for name, value in itertools.chain(zip(self.arguments, args, strict=False), kwargs.items()):
            if type(value) is Tensor:
                any_tensor = True
                if value.node is not None:
                    parents[name] = value.node
                value = value.data
            elif type(value) in (list, tuple) and any(type(v) is Tensor for v in value):
                any_tensor = True
                parents.update({(name, i): v.node for i, v in enumerate(value) if type(v) is Tensor and v.node is not None})
                value = type(value)(v.data if type(v) is Tensor else v for v in value)
            values[name] = value
        floating = self._check_agreement(values)
        for name, value in values.items():
            if isinstance(value, np.generic):       # a number like Python's: beside arrays it promotes nothing
                values[name] = np.asarray(value) if floating is None and value.dtype.kind == "f" else value.item()
        watcher = _recorder.get() if any_tensor else None
        result = self.forward(**values) if watcher is None else watcher.forward(self, values)
        y, *extras = result if self.extras else (result,)
        y = _as_array(y)
        if floating is not None and y.dtype != floating and is_floating(y.dtype) and "y" not in self.real:
            raise TypeError(f"{self.__name__} made {y.dtype} of {floating}: an integer array among its arguments promotes it; "
                            f"convert that with array.astype({str(floating)!r})")
        if not any_tensor:
            return (y, *extras) if self.extras else y
        node = None
        if parents and _recording.get():
            plan = self._plan(frozenset(map(_argument, parents)))
            scope = {**self.defaults, **values, **dict(zip(self.extras, extras, strict=True)), "y": y}
            node = Node(y, self, parents, {n: _shape(scope[v]) if is_shape else scope[v] for n, v, is_shape in plan})
        out = Tensor.tied(y, node)
        if watcher is not None:
            watcher.called(self, values, parents, extras, out)
        return (out, *extras) if self.extras else out

    def _check_agreement(self, values: Mapping[str, Any]) -> np.dtype[Any] | None:
        """One library and one floating type an op, before any work is done. Returns the type, if any argument is floating."""
        arrays = [v for value in values.values() for v in (value if type(value) in (list, tuple) else (value,)) if is_array(v)]
        array_module(*arrays)
        kinds = {a.dtype for a in arrays if a.dtype.char in FLOATING}
        if self.real and any(map(is_half, kinds)) and self.real != {"y"}:
            return self._check_beside_half(values)
        if len(kinds) > 1:
            named = ", ".join(f"{n}: {v.dtype}{tuple(v.shape)}" for n, v in values.items() if is_array(v))
            raise TypeError(f"{self.__name__} mixes {' and '.join(sorted(str(k) for k in kinds))} ({named}); "
                            "an op works in one floating type: convert one side with array.astype(...) or model.astype(...)")
        return next(iter(kinds), None)

    def _check_beside_half(self, values: Mapping[str, Any]) -> np.dtype[Any]:
        """The same where arguments are of half precision: those that `real` names must be float32 beside them."""
        given: dict[str, np.dtype[Any]] = {n: v.dtype for n, v in values.items() if is_array(v) and is_floating(v.dtype)}
        others = {kind for name, kind in given.items() if name not in self.real}
        if len(others) != 1 or any(given[name] != np.float32 for name in self.real & given.keys()):
            named = ", ".join(f"{name}: {kind}" for name, kind in given.items())
            raise TypeError(f"{self.__name__} was given {named}: beside images of half precision, all of one type, what else there "
                            f"is ({', '.join(sorted(self.real))}) is float32; convert with astype(...)")
        if not compiles_cuda(next(v for v in values.values() if is_array(v))):
            raise TypeError(f"{self.__name__} was given {next(iter(others))}: with half precision only a GPU computes; here, "
                            "convert with astype('float32')")
        return others.pop()


def _shape(value: Any) -> Any:
    return [v.shape for v in value] if isinstance(value, (list, tuple)) else np.shape(value)


def _as_array(value: Any) -> Any:
    """NumPy's arithmetic on arrays without axes gives scalars; CuPy's does not."""
    return np.asarray(value) if isinstance(value, np.generic) else value


@overload
def op(forward: Callable[..., Any], *, extras: Sequence[str] = (), real: Sequence[str] = ()) -> Op: ...
@overload
def op(forward: None = None, *, extras: Sequence[str] = (), real: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]: ...
def op(forward: Callable[..., Any] | None = None, *, extras: Sequence[str] = (),
       real: Sequence[str] = ()) -> Op | Callable[[Callable[..., Any]], Op]:
    """Make an operation of a function from arrays to an array; register its backwards with `.backward(...)`.

    extras: names of further outputs, `return y, first_extra, ...`, kept for the backwards that name them. They come out
    as plain arrays and carry no gradient.
    real: names of arguments that are float32 where the others are of half precision, such as weights beside images; of "y", if the
    result's type is the operation's own affair.

    >>> @op
    ... def cube(x):
    ...     return x * x * x
    >>> @cube.backward("x")
    ... def cube_dx(dy, x):
    ...     return dy * x * x * 3.0
    """
    return Op(forward, extras, real) if forward is not None else functools.partial(Op, extras=extras, real=real)


class Tensor:
    """An array, and where on the tape it came from.

    array: of NumPy or CuPy (kept, not copied), or anything NumPy makes one of. Only floating arrays have gradients.
    """

    __slots__ = ("data", "node", "__weakref__")
    __array_ufunc__ = None              # array * Tensor asks the Tensor, in NumPy and in CuPy

    data: Array
    node: Node | None

    def __init__(self, array: Any, requires_grad: bool = False) -> None:
        if isinstance(array, Tensor):
            raise TypeError("that is a Tensor already; t.detach() gives one without history")
        self.data = array if is_array(array) else np.asarray(array)
        if self.data.dtype.kind not in "fiub" and not is_floating(self.data.dtype):
            raise TypeError(f"a Tensor holds real numbers, integers or booleans, not {self.data.dtype}")
        self.node = None
        self.requires_grad = requires_grad

    @classmethod
    def tied(cls, data: Array, node: Node | None) -> Tensor:
        """A Tensor that stands at `node` of the tape."""
        tensor = cls.__new__(cls)
        tensor.data, tensor.node = data, node
        return tensor

    # What it is.
    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        return int(self.data.ndim)

    @property
    def size(self) -> int:
        return int(self.data.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype          # type: ignore[no-any-return]

    @property
    def T(self) -> Tensor:
        return self.transpose()

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient can reach it. Setting it makes a leaf of the Tensor, or cuts it off the tape."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted and not is_floating(self.data.dtype):
            raise TypeError(f"only floating arrays have gradients, not {self.data.dtype}; use array.astype('float32') first")
        self.node = Node(self.data) if wanted else None

    @property
    def grad(self) -> Tensor | None:
        """The gradient that `backward` left at this leaf; a Tensor, or None."""
        return self.node.grad if self.node is not None else None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self.node is None:
            raise ValueError("this Tensor does not require a gradient, so it can hold none; set t.requires_grad = True first")
        if value is not None and (value.shape, value.dtype) != (self.shape, self.dtype):
            raise ValueError(f"a gradient of {value.dtype}{value.shape} does not fit a Tensor of {self.dtype}{self.shape}")
        self.node.grad = value

    # Ways out.
    def detach(self) -> Tensor:
        """The same array, without history."""
        return Tensor.tied(self.data, None)

    def numpy(self) -> np.ndarray[Any, Any]:
        """Its values as a NumPy array (not a copy where they lie in one already), whatever the tape holds."""
        return to_numpy(self.data)

    def item(self) -> float | int | bool:
        """The value of a Tensor with one element, as a Python number."""
        if self.data.size != 1:
            raise ValueError(f"item() reads the one element of a Tensor; this one has shape {self.shape}")
        return self.data.item()         # type: ignore[no-any-return]

    def astype(self, dtype: Any) -> Tensor:
        """The same numbers in another type; of floating ones the gradient comes back in this one."""
        return OPERATORS["astype"](self, dtype)     # type: ignore[no-any-return]

    def to(self, device: str) -> Tensor:
        """On "cpu", "cuda" or "auto"; gradients find their way back."""
        return OPERATORS["to"](self, device)    # type: ignore[no-any-return]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self.node is not None:       # else np.where(mask, tensor, 0) would drop the gradient without a word
            raise TypeError("NumPy would lose the gradient of this Tensor: use an op of minicnn.ops, "
                            "or t.detach() / t.numpy() where none is meant")
        return np.array(self.data, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        where = "" if self.node is None else ", requires_grad=True" if self.node.op is None else f", from {self.node.op.__name__}"
        return f"Tensor({np.array2string(self.numpy(), prefix='Tensor(', threshold=100)}, dtype={self.dtype}{where})"

    def _repr_html_(self) -> str:
        """For a notebook: what it is, in one line; its numbers; of many, only how large they are, and the first few to open."""
        values = self.numpy()
        about = f"<b>Tensor</b> {' x '.join(map(str, self.shape)) or 'scalar'}, {self.dtype}"
        if self.node is not None:
            about += ", a leaf that requires a gradient" if self.node.op is None else f", from {html.escape(self.node.op.__name__)}"
        if self.grad is not None:
            about += f"; gradient of norm {np.linalg.norm(self.grad.numpy()):.4g}"
        if values.ndim <= 2 and values.size <= 100:
            form = ".4g" if values.dtype.kind == "f" else ""
            rows = "".join("<tr>" + "".join(f"<td>{value:{form}}</td>" for value in row) + "</tr>" for row in np.atleast_2d(values))
            return f"<div>{about}</div><table>{rows}</table>"
        numbers = html.escape(np.array2string(values, threshold=100, precision=4))
        spread = f"; from {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}" if values.size else ""
        return f"<details><summary>{about}{spread}</summary><pre>{numbers}</pre></details>"

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a Tensor of no dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> float:
        return float(self.item())

    # The reverse pass.
    def backward(self, grad: Any = None, retain_graph: bool = False) -> None:
        """Add d<self, grad>/d(leaf) to the `.grad` of every leaf this came from.

        grad: an array or Tensor like self; may be omitted when self has one element.
        retain_graph: keep the graph for another pass, instead of freeing it on the way.
        Raises RuntimeError when an earlier pass has freed the graph.
        """
        if self.node is None:
            raise ValueError("this Tensor does not require a gradient: nothing it came from was made with requires_grad=True, "
                             "or it was computed inside no_grad()")
        leaves = {node for node in _ancestors([self.node]) if node.op is None}
        found = _propagate([(self, _as_seed(grad))], leaves, create_graph=False, retain_graph=retain_graph)
        for leaf, g in found.items():
            leaf.grad = Tensor.tied(g if leaf.grad is None else _as_array(leaf.grad.data + g), None)

    # Arithmetic: each goes through the table to an op.
    def __add__(self, other: Any) -> Tensor: return OPERATORS["add"](self, other)           # type: ignore[no-any-return]
    def __radd__(self, other: Any) -> Tensor: return OPERATORS["add"](other, self)          # type: ignore[no-any-return]
    def __sub__(self, other: Any) -> Tensor: return OPERATORS["sub"](self, other)           # type: ignore[no-any-return]
    def __rsub__(self, other: Any) -> Tensor: return OPERATORS["sub"](other, self)          # type: ignore[no-any-return]
    def __mul__(self, other: Any) -> Tensor: return OPERATORS["mul"](self, other)           # type: ignore[no-any-return]
    def __rmul__(self, other: Any) -> Tensor: return OPERATORS["mul"](other, self)          # type: ignore[no-any-return]
    def __truediv__(self, other: Any) -> Tensor: return OPERATORS["div"](self, other)       # type: ignore[no-any-return]
    def __rtruediv__(self, other: Any) -> Tensor: return OPERATORS["div"](other, self)      # type: ignore[no-any-return]
    def __pow__(self, exponent: Any) -> Tensor: return OPERATORS["power"](self, exponent)   # type: ignore[no-any-return]
    def __rpow__(self, base: Any) -> Tensor: return OPERATORS["power"](base, self)          # type: ignore[no-any-return]
    def __matmul__(self, other: Any) -> Tensor: return OPERATORS["matmul"](self, other)     # type: ignore[no-any-return]
    def __rmatmul__(self, other: Any) -> Tensor: return OPERATORS["matmul"](other, self)    # type: ignore[no-any-return]
    def __neg__(self) -> Tensor: return OPERATORS["neg"](self)                              # type: ignore[no-any-return]
    def __getitem__(self, index: Any) -> Tensor: return OPERATORS["getitem"](self, index)   # type: ignore[no-any-return]

    # A comparison is a mask, and a mask is a constant: a plain array.
    def __gt__(self, other: Any) -> Array: return self.data > _plain(other)
    def __ge__(self, other: Any) -> Array: return self.data >= _plain(other)
    def __lt__(self, other: Any) -> Array: return self.data < _plain(other)
    def __le__(self, other: Any) -> Array: return self.data <= _plain(other)
    def __eq__(self, other: Any) -> Array: return self.data == _plain(other)
    def __ne__(self, other: Any) -> Array: return self.data != _plain(other)
    __hash__ = object.__hash__

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPERATORS["sum"](self, axis, keepdims)           # type: ignore[no-any-return]

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPERATORS["mean"](self, axis, keepdims)          # type: ignore[no-any-return]

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPERATORS["max"](self, axis, keepdims)           # type: ignore[no-any-return]

    def var(self, axis: Any = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        return OPERATORS["var"](self, axis, ddof, keepdims)     # type: ignore[no-any-return]

    def exp(self) -> Tensor: return OPERATORS["exp"](self)      # type: ignore[no-any-return]
    def log(self) -> Tensor: return OPERATORS["log"](self)      # type: ignore[no-any-return]
    def sqrt(self) -> Tensor: return OPERATORS["sqrt"](self)    # type: ignore[no-any-return]

    def reshape(self, *shape: Any) -> Tensor:
        return OPERATORS["reshape"](self, shape[0] if len(shape) == 1 else shape)       # type: ignore[no-any-return]

    def transpose(self, *axes: Any) -> Tensor:
        return OPERATORS["transpose"](self, axes[0] if len(axes) == 1 else axes or None)     # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    return value.data if type(value) is Tensor else value


def _as_seed(grad: Any) -> Tensor | None:
    return grad if grad is None or type(grad) is Tensor else Tensor(grad)


def _ancestors(nodes: Iterable[Node | None]) -> list[Node]:
    """Every node that these came from, themselves included, youngest first."""
    seen: set[Node] = set()
    stack = [node for node in nodes if node is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            if node.op is not None and node.saved is None:
                raise RuntimeError(f"the graph at {node.op.__name__} was freed by an earlier backward pass; "
                                   "ask for all gradients in one pass, or keep the graph with retain_graph=True")
            seen.add(node)
            stack.extend(node.parents.values())
    return sorted(seen, key=lambda node: node.born, reverse=True)


def _propagate(seeds: Sequence[tuple[Tensor, Tensor | None]], targets: set[Node], *, create_graph: bool,
               retain_graph: bool) -> dict[Node, Any]:
    """The gradients of sum(<output, seed>) at the nodes in `targets`, those that the outputs depend on."""
    checked = [(output, _checked_seed(output, seed)) for output, seed in seeds]
    order = _ancestors(output.node for output, _ in seeds)
    leads = set(targets)                                # the nodes from which a target can be reached
    for node in reversed(order):
        if any(parent in leads for parent in node.parents.values()):
            leads.add(node)

    arrivals = Counter(itertools.chain((output.node for output, _ in checked), *(node.parents.values() for node in order)))
    written = targets | {node for node, count in arrivals.items() if node is not None and count > 1}

    gradients: dict[Node, Any] = {}
    owned: set[Node] = set()                            # of these: whose gradient is an array that nobody else has
    found: dict[Node, Any] = {}

    def deposit(node: Node, g: Any, fresh: bool) -> None:
        if node not in gradients:
            gradients[node] = g                         # may be another's array: look, do not touch
            if fresh:
                owned.add(node)
        elif node in owned and g.ndim:
            OPERATORS["accumulate"](gradients[node], g)
        elif fresh and g.ndim:                          # the later one is the one that can be written to
            OPERATORS["accumulate"](g, gradients[node])
            gradients[node] = g
            owned.add(node)
        else:
            gradients[node] = gradients[node] + g
            if not create_graph:
                owned.add(node)

    for output, seed in checked:
        if output.node in leads:
            deposit(output.node, seed if create_graph else seed.data, fresh=False)
    watcher = _recorder.get()
    with _record(create_graph):                         # create_graph inside no_grad still builds its graph
        for node in order:
            if node not in gradients:
                continue
            dy = _as_array(gradients.pop(node))
            if node in targets:
                # A leaf never shares its gradient's memory with anyone.
                found[node] = dy if create_graph or node in owned else dy.copy()
            if any(parent in leads for parent in node.parents.values()):
                pulled = node.pull(dy, leads, create_graph, written)
                for parent, g, fresh in pulled if watcher is None else watcher.pulled(node, dy, pulled):
                    deposit(parent, g, fresh)
                if not retain_graph:
                    node.saved, node.parents = None, {}         # free as it goes
    return found


def _checked_seed(output: Tensor, seed: Tensor | None) -> Tensor:
    if seed is None:
        if output.size != 1:
            raise ValueError(f"an output gradient can be omitted for one element only; this output has shape {output.shape}: "
                             "pass a gradient of that shape, or reduce it first (loss.mean())")
        return Tensor.tied(array_module(output.data).ones_like(output.data), None)
    if (seed.shape, seed.dtype) != (output.shape, output.dtype):
        raise ValueError(f"an output of {output.dtype}{output.shape} needs an output gradient like it, "
                         f"not {seed.dtype}{seed.shape}")
    array_module(output.data, seed.data)
    return seed


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Any = None, *, create_graph: bool = False, retain_graph: bool | None = None) -> list[Tensor]:
    """The gradients of sum(<output, grad_output>) with respect to each input; `.grad` of the leaves stays as it is.

    grad_outputs: one a output (an array, a Tensor, or None for an output with one element).
    create_graph: the gradients are Tensors of the graph themselves, so that they can be differentiated again.
    retain_graph: keep the graph; by default it is kept exactly when create_graph asks for one.
    Returns a list of Tensors, zeros for an input that the outputs do not depend on.
    """
    output_list = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    input_list = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    single = grad_outputs is None or isinstance(grad_outputs, Tensor) or is_array(grad_outputs)
    seed_list = [grad_outputs] * (len(output_list) if grad_outputs is None else 1) if single else list(grad_outputs)
    if len(seed_list) != len(output_list):
        raise ValueError(f"{len(output_list)} outputs need as many output gradients, not {len(seed_list)}")
    for i, x in enumerate(input_list):
        if x.node is None:
            raise ValueError(f"input {i}, {x.dtype}{x.shape}, does not require a gradient; make it Tensor(..., requires_grad=True)")
    seeds = [(output, _as_seed(seed)) for output, seed in zip(output_list, seed_list, strict=True) if output.node is not None]
    found = _propagate(seeds, {x.node for x in input_list if x.node is not None}, create_graph=create_graph,
                       retain_graph=create_graph if retain_graph is None else retain_graph)
    results: list[Tensor] = []
    for x in input_list:
        assert x.node is not None
        g = found.get(x.node)
        g = array_module(x.data).zeros_like(x.data) if g is None else g
        if not isinstance(g, Tensor):
            twice = any(g is result.data for result in results)         # an input that was named twice
            g = Tensor.tied(g.copy() if twice else g, None)
        results.append(g)
    return results
