"""A stand-in for CuPy, so that the code meant for a GPU is held to CuPy's manners on a machine without one.

Used as the array library itself (`import standin as xp`), it has CuPy's names, computes with NumPy, and refuses what
CuPy 14 refuses. The tables below are the names and keywords it lets through: all of them exist in CuPy (a test compares
them with the real one where it is installed), and what is not in them is refused, though CuPy may well have it.

Imitated:
- No implicit way to NumPy. `np.asarray(a)` raises TypeError, and so does any operation that mixes with a NumPy array,
  0-d ones included; Python and NumPy scalars are welcome. `np.exp(a)` and `np.sum(a)` are handed on to the stand-in's.
- Reductions give 0-d arrays, never scalars, and a 0-d array is no index, no range and no hash key.
- What makes the host wait for the device is recorded: float, int, bool, complex, item, tolist, get, printing, `in`,
  boolean masks (in assignments too), nonzero, unique, bincount; and, since it costs about as much, an index array that
  must be uploaded first. `with host_syncs() as syncs:` collects their names.
- What CuPy lacks: names (errstate, einsum_path, ...); keywords (ufuncs' where=, reductions' where= and initial=,
  correction=, as_strided's writeable=, device=); every ufunc.reduce but add's and multiply's; array flags to write to.
- Integer index arrays that point outside wrap around instead of raising, so that an unchecked label does harm here too.
- New results of ufuncs, `where` and reductions are C-contiguous whatever their inputs were; views are NumPy's views.
- `ascontiguousarray` of an array without axes gives it one.
- No floating-point warnings; dtypes are numbers and booleans only.

Stricter than CuPy: functions refuse NumPy arrays everywhere (CuPy's `sum` hands them to their own method; assignment
through an index array uploads them), `.at` is add's alone, views by as_strided and sliding windows are read-only.

Not imitated: speed, memory, streams, several devices; undefined results (two assignments to one element, additions to
one element in another order), flushed denormals, CuPy's rounding; the identity of `a.base`; exception classes beyond
TypeError where CuPy raises another.
"""
from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

# ---------------------------------------------------------------- what CuPy has: after `*` by keyword only

UFUNCS = """
add subtract multiply divide true_divide floor_divide remainder mod power negative positive absolute abs sign square
sqrt cbrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan arcsin arccos arctan arctan2 sinh cosh tanh
maximum minimum fmax fmin greater greater_equal less less_equal equal not_equal logical_and logical_or logical_xor
logical_not bitwise_and bitwise_or bitwise_xor invert left_shift right_shift isfinite isinf isnan signbit floor ceil
trunc rint
"""

REDUCTIONS = """
all(a, axis, *, out, keepdims)
any(a, axis, *, out, keepdims)
argmax(a, axis, *, out, keepdims)
argmin(a, axis, *, out, keepdims)
max(a, axis, *, out, keepdims)
mean(a, axis, dtype, *, out, keepdims)
min(a, axis, *, out, keepdims)
prod(a, axis, dtype, *, out, keepdims)
std(a, axis, dtype, *, out, ddof, keepdims)
sum(a, axis, dtype, *, out, keepdims)
var(a, axis, dtype, *, out, ddof, keepdims)
"""

FUNCTIONS = """
amax(a, axis, *, out, keepdims)
amin(a, axis, *, out, keepdims)
arange(start, stop, step, dtype)
argsort(a, axis, kind)
array_split(ary, indices_or_sections, axis)
bincount(x, weights, minlength)
broadcast_arrays(*a)
broadcast_shapes(*shape)
broadcast_to(array, shape)
can_cast(from_, to, casting)
clip(a, a_min, a_max, *, out)
concatenate(tup, axis, *, out, dtype, casting)
copyto(dst, src, casting, where)
cumsum(a, axis, dtype, *, out)
diag(v, k)
dot(a, b, *, out)
einsum(*a)
empty(shape, dtype, order)
empty_like(prototype, dtype, order, *, shape)
expand_dims(a, axis)
eye(N, M, k, dtype)
flatnonzero(a)
flip(a, axis)
full(shape, fill_value, dtype, order)
full_like(a, fill_value, dtype, order, *, shape)
hstack(tup)
isclose(a, b, rtol, atol, *, equal_nan)
linspace(start, stop, num, endpoint)
matmul(x1, x2, *, out)
may_share_memory(a, b)
moveaxis(a, source, destination)
ndim(a)
nonzero(a)
ones(shape, dtype, order)
ones_like(a, dtype, order, *, shape)
outer(a, b, *, out)
pad(array, pad_width, mode, *, constant_values)
promote_types(type1, type2)
ravel(a, order)
repeat(a, repeats, axis)
reshape(a, newshape, order)
result_type(*a)
roll(a, shift, axis)
shape(a)
shares_memory(a, b)
sort(a, axis, kind)
split(ary, indices_or_sections, axis)
squeeze(a, axis)
stack(tup, axis, *, out, dtype, casting)
swapaxes(a, axis1, axis2)
tensordot(a, b, axes)
tile(A, reps)
trace(a, offset, axis1, axis2, dtype)
transpose(a, axes)
tril(m, k)
triu(m, k)
unique(ar, return_index, return_inverse, return_counts, axis)
vstack(tup)
zeros(shape, dtype, order)
zeros_like(a, dtype, order, *, shape)
"""

METHODS = """
argsort(axis, kind)
astype(dtype, order, casting, *, copy)
clip(min, max, *, out)
copy(order)
cumsum(axis, dtype, *, out)
diagonal(offset, axis1, axis2)
dot(b, *, out)
fill(value)
flatten(order)
item()
nonzero()
ravel(order)
repeat(repeats, axis)
reshape(*shape, order)
round(decimals, *, out)
sort(axis, kind)
squeeze(axis)
swapaxes(axis1, axis2)
tolist()
trace(offset, axis1, axis2, dtype)
transpose(*axes)
view(dtype)
"""

PLAIN = """
bool bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp complex64 complex128
floating integer number generic dtype finfo iinfo issubdtype newaxis inf nan pi e
"""  # the very objects of NumPy, in CuPy too

ATTRIBUTES = "shape dtype ndim size strides nbytes itemsize T mT real"
TAKE_ARRAYS = """self a b x x1 x2 array ary ar A tup v m prototype from_ dst src where weights out value fill_value
a_min a_max min max"""  # the parameters that may be arrays; all others are the host's: shapes, axes, counts, dtypes
WAITS = "nonzero flatnonzero unique bincount item tolist"


def signatures(table: str) -> dict[str, tuple[list[str], list[str]]]:
    """{name: (parameters that may be given by position, parameters by keyword only)}; `*name` takes any number."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for line in table.strip().split("\n"):
        name, _, parameters = line.rstrip(")").partition("(")
        position: list[str] = []
        keyword: list[str] = []
        here = position
        for parameter in filter(None, parameters.split(", ")):
            if parameter != "*":
                here.append(parameter)
            if parameter.startswith("*"):
                here = keyword
        found[name] = position, keyword
    return found


# ---------------------------------------------------------------- waiting for the device

_watchers: list[list[str]] = []


@contextlib.contextmanager
def host_syncs() -> Iterator[list[str]]:
    """Collect the names of what made the host wait for the device inside the `with` block, in order."""
    seen: list[str] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [watcher for watcher in _watchers if watcher is not seen]


def _sync(what: str) -> None:
    if orders is not None:
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} waits for a stream that is being captured")
    for seen in _watchers:
        seen.append(what)


# ---------------------------------------------------------------- while a stream is captured

orders: list[Callable[[], object]] | None = None       # what is asked for meanwhile, in order; None: it is done at once


def _done(compute: Callable[[], Any], *inputs: Any) -> Any:
    """compute(); or, while a stream is captured, the memory for its result alone, in which there are no numbers yet.

    What is a view of an input is one all the same, as nothing has to be computed for it.
    """
    made = compute()
    if orders is None or not isinstance(made, (np.ndarray, np.generic)):
        return made
    made = np.asarray(made)
    if any(isinstance(value, np.ndarray) and np.may_share_memory(made, value) for value in inputs):
        return made
    orders.append(lambda: np.copyto(made, compute()))
    made.fill(np.nan if made.dtype.kind == "f" else -1 if made.dtype.kind == "i" else 1)
    return made


def _written(write: Callable[[], object]) -> None:
    """write(); while a stream is captured, later."""
    write() if orders is None else orders.append(write)


# ---------------------------------------------------------------- in and out of NumPy

def _down(value: Any) -> Any:
    """The NumPy array inside a stand-in array, also within a list; a NumPy array itself is on the wrong side."""
    if type(value) is ndarray:
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: CuPy does not mix with NumPy arrays; move it first")
    return type(value)(map(_down, value)) if type(value) in (list, tuple) else value


def _host_only(value: Any) -> Any:
    """A shape, an axis, a count: nothing that lives on the device, not even as a 0-d array."""
    if type(value) is ndarray:
        raise TypeError("'ndarray' object cannot be interpreted as an integer")
    for part in value if type(value) in (list, tuple) else ():
        _host_only(part)
    return value


def _operand(value: Any) -> Any:
    """As `_down`, for ufuncs: they take arrays and scalars, neither lists nor None."""
    if type(value) is ndarray or isinstance(value, (int, float, complex, np.generic)):
        return _down(value)
    raise TypeError(f"Unsupported type {type(value)}")


def _up(value: Any) -> Any:
    """NumPy's result as CuPy gives it: arrays wrapped, scalars as 0-d arrays, all else as it is."""
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    return type(value)(map(_up, value)) if type(value) in (list, tuple) else value


def _index(key: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """NumPy's index for CuPy's: integer arrays wrap around the axis they address, and nothing becomes a scalar."""
    def axes(part: Any) -> int:
        """How many axes of the array this part of the index addresses."""
        return 0 if part is None or part is Ellipsis else part.ndim if getattr(part, "dtype", 0) == np.bool_ else 1

    parts = list(key) if isinstance(key, tuple) else [key]
    for i, part in enumerate(parts):
        if type(part) is ndarray:
            parts[i] = part._host
        elif isinstance(part, (list, np.ndarray)):
            _sync("index from the host")
            parts[i] = np.asarray(part, None if len(part) else int)
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # a[0] of a vector is then a 0-d view, not a scalar
    axis, skipped = 0, len(shape) - sum(map(axes, parts))
    for i, part in enumerate(parts):
        if isinstance(part, np.ndarray) and part.dtype.kind == "b":
            _sync("boolean mask")  # CuPy counts its True first
        elif isinstance(part, np.ndarray) and part.dtype.kind in "iu" and 0 <= axis < len(shape):
            parts[i] = part.astype(int) % max(shape[axis], 1)
        axis += skipped if part is Ellipsis else axes(part)
    return tuple(parts)


def _let_through(name: str, positional: list[str], keyword: list[str], compute: Callable[..., Any],
                 reduction: bool = False) -> Callable[..., Any]:
    """`compute`, a function or method of NumPy's, called only with what CuPy's of that name takes."""
    known, arrays, takes_any = {*positional, *keyword}, set(TAKE_ARRAYS.split()), positional[-1].startswith("*")

    def lower(parameter: str, value: Any) -> Any:
        return _down(value) if parameter.lstrip("*") in arrays else _host_only(value)

    def call(*args: Any, **kwargs: Any) -> Any:
        if unknown := kwargs.keys() - known:
            raise TypeError(f"{name}() got an unexpected keyword argument {min(unknown)!r}: CuPy's has none")
        if len(args) > len(positional) and not takes_any:
            raise TypeError(f"{name}() takes {positional} by position, and was given {len(args)} arguments")
        if reduction and type(args[0]) is not ndarray:
            raise TypeError(f"{name}() reduces an array on the device, not {type(args[0])}")
        if name in WAITS.split():
            _sync(name)
        parameters = itertools.chain(positional, itertools.repeat(positional[-1]))
        host_args = [lower(parameter, arg) for parameter, arg in zip(parameters, args, strict=False)]
        host_kwargs = {key: lower(key, value) for key, value in kwargs.items()}

        def computed() -> Any:
            with np.errstate(all="ignore"):
                result = compute(*host_args, **host_kwargs)
            return np.asarray(result, order="C") if reduction else result

        if kwargs.get("out") is not None:
            _written(computed)
            return kwargs["out"]
        result = _done(computed, *(part for value in host_args for part in (value if type(value) is list else [value])))
        if args and result is host_args[0]:
            return args[0]  # such as astype(..., copy=False) to the dtype it has
        return _up(result)

    return call


# ---------------------------------------------------------------- ufuncs

class ufunc:
    """An elementwise function with the little that CuPy's have: out=, dtype=, casting=."""

    def __init__(self, name: str) -> None:
        self.__name__, self._numpy = name, getattr(np, name)

    def __call__(self, *args: Any, out: Any = None, dtype: Any = None, casting: str = "same_kind",
                 **unknown: Any) -> Any:
        if unknown:
            raise TypeError(f"Wrong arguments {unknown}")
        if len(args) == self._numpy.nin + 1:
            *args, out = args  # type: ignore[assignment]
        if type(out) is tuple:
            (out,) = out
        host_args, host_out = [*map(_operand, args)], {} if out is None else {"out": _operand(out)}

        def computed() -> Any:
            with np.errstate(all="ignore"):
                return self._numpy(*host_args, **host_out, dtype=dtype, casting=casting, order="C")

        if out is None:
            return _up(_done(computed))
        _written(computed)
        return out

    def reduce(self, array: Any, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        if self.__name__ not in ("add", "multiply"):
            raise NotImplementedError(f"`cupy_{self.__name__}.reduce` is not supported yet")
        reduction = array.sum if self.__name__ == "add" else array.prod
        return reduction(axis, dtype, out=out, keepdims=keepdims)

    def at(self, a: Any, indices: Any, b: Any) -> None:
        if self.__name__ != "add":
            raise NotImplementedError(f"`cupy_{self.__name__}.at` is not supported yet")
        if a.dtype.char not in "efdiILQ":
            raise TypeError(f"CuPy adds atomically to floats, int32, uint32 and uint64, not to {a.dtype}")
        np.add.at(a._host, _index(indices, a.shape), _down(b))


# ---------------------------------------------------------------- the array

class ndarray:
    """A NumPy array behind CuPy's manners. Its other methods and operators are filled in from the tables, below."""

    __slots__ = ("_host",)
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        if host.dtype.kind not in "biufc" and host.dtype.name != "bfloat16":        # which CuPy has by ml_dtypes, too
            raise ValueError(f"Unsupported dtype {host.dtype}")
        self._host = host

    def get(self) -> np.ndarray[Any, Any]:
        """A copy in NumPy's hands."""
        _sync("get")
        return self._host.copy()

    def take(self, indices: Any, axis: int | None = None) -> ndarray:
        whole, axis = (self.ravel(), 0) if axis is None else (self, axis)
        return whole[(slice(None),) * (axis % whole.ndim) + (asarray(indices),)]

    @property
    def base(self) -> ndarray | None:
        return None if self._host.base is None else ndarray(np.asarray(self._host.base))

    @property
    def data(self) -> SimpleNamespace:
        """Where its memory begins: `data.ptr`."""
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    def __getitem__(self, key: Any) -> ndarray:
        index = _index(key, self.shape)
        return ndarray(_done(lambda: self._host[index], self._host))

    def __setitem__(self, key: Any, value: Any) -> None:
        index, given = _index(key, self.shape), _operand(value)

        def write() -> None:
            with np.errstate(all="ignore"):
                self._host[index] = given

        _written(write)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __contains__(self, value: Any) -> bool:
        _sync("in")
        return _down(value) in self._host

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Somebody called a ufunc of NumPy's on this array: answer with the stand-in's of that name."""
        mine = _names.get(function.__name__)
        if type(kwargs.get("out")) is tuple:
            (kwargs["out"],) = kwargs["out"]
        return NotImplemented if mine is None else getattr(mine, method)(*inputs, **kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Somebody called another function of NumPy's: the stand-in's of that name answers, or NumPy's TypeError."""
        path = [*function.__module__.split(".")[1:], function.__name__]
        try:
            mine: Any = functools.reduce(getattr, path, sys.modules[__name__])
        except AttributeError:
            return NotImplemented
        return mine(*args, **kwargs)


def _operator(name: str, swap: bool = False, in_place: bool = False) -> Callable[[ndarray, Any], Any]:
    def method(self: ndarray, other: Any) -> Any:
        if in_place:
            return _names[name](self, other, out=self)
        if getattr(other, "__array_ufunc__", ()) is None:
            return NotImplemented  # it has opted out of NumPy's and CuPy's arithmetic: its own operator answers
        return _names[name](other, self) if swap else _names[name](self, other)
    return method


def _conversion(convert: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any) -> Any:
        _sync(convert.__name__)
        return convert(self._host, *args)
    return method


_ARITHMETIC = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
               "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
               "lshift": "left_shift", "rshift": "right_shift"}
_COMPARISONS = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
                "ne": "not_equal"}
_SIGNS = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}

for _op, _name in {**_ARITHMETIC, **_COMPARISONS, "matmul": "matmul"}.items():
    setattr(ndarray, f"__{_op}__", _operator(_name))
for _op, _name in {**_ARITHMETIC, "matmul": "matmul"}.items():
    setattr(ndarray, f"__r{_op}__", _operator(_name, swap=True))
for _op, _name in _ARITHMETIC.items():
    setattr(ndarray, f"__i{_op}__", _operator(_name, in_place=True))
for _op, _name in _SIGNS.items():
    setattr(ndarray, f"__{_op}__", functools.partialmethod(lambda self, name: _names[name](self), _name))
for _convert in (float, int, complex, bool, str, repr, format):
    setattr(ndarray, f"__{_convert.__name__}__", _conversion(_convert))
for _name in ATTRIBUTES.split():
    setattr(ndarray, _name, property(functools.partial(lambda name, self: _up(getattr(self._host, name)), _name)))
for _name, (_position, _keyword) in signatures(METHODS).items():
    setattr(ndarray, _name, _let_through(_name, ["self", *_position], _keyword, getattr(np.ndarray, _name)))
for _name, (_position, _keyword) in signatures(REDUCTIONS).items():
    setattr(ndarray, _name, _let_through(_name, _position, _keyword, getattr(np.ndarray, _name), reduction=True))


# ---------------------------------------------------------------- the module's functions

def array(obj: Any, dtype: Any = None, copy: bool = True) -> Any:
    if type(obj) is ndarray:
        return obj.astype(obj.dtype if dtype is None else dtype, copy=copy)
    if orders is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: something is sent from the host while a stream is captured")
    return ndarray(np.array(obj, dtype=dtype, order="C"))           # whatever the layout was


def asarray(a: Any, dtype: Any = None) -> Any:
    return array(a, dtype, copy=False)


def asnumpy(a: Any) -> Any:
    return a.get() if type(a) is ndarray else np.asarray(a)


def ascontiguousarray(a: Any, dtype: Any = None) -> Any:
    a = asarray(a, dtype)
    if not a.ndim:
        return a.reshape(1)                                         # CuPy's have an axis, as NumPy's have
    return a if a.flags.c_contiguous else a.copy()


def take(a: ndarray, indices: Any, axis: int | None = None) -> ndarray:
    return a.take(indices, axis)


def take_along_axis(a: ndarray, indices: ndarray, axis: int) -> ndarray:
    return ndarray(np.take_along_axis(_down(a), _down(indices) % a.shape[axis], axis))


def put_along_axis(arr: ndarray, indices: ndarray, values: Any, axis: int) -> None:
    np.put_along_axis(_down(arr), _down(indices) % arr.shape[axis], _operand(values), axis)


def where(condition: ndarray, x: Any, y: Any) -> ndarray:
    given = _down(condition.astype(bool)), _operand(x), _operand(y)
    return ndarray(_done(lambda: np.asarray(np.where(*given), order="C")))


lib = SimpleNamespace(stride_tricks=SimpleNamespace(
    as_strided=_let_through("as_strided", ["x", "shape", "strides"], [],
                            functools.partial(np.lib.stride_tricks.as_strided, writeable=False)),
    sliding_window_view=_let_through("sliding_window_view", ["x", "window_shape", "axis"], [],
                                     np.lib.stride_tricks.sliding_window_view)))

_names: dict[str, Any] = {  # apart from this module's own, where `sum` and `max` would hide Python's
    **{name: getattr(np, name) for name in PLAIN.split()},
    **{name: ufunc(name) for name in UFUNCS.split()},
    **{name: _let_through(name, *how, getattr(np, name)) for name, how in signatures(FUNCTIONS).items()},
    **{name: _let_through(name, *how, getattr(np, name), reduction=True)
       for name, how in signatures(REDUCTIONS).items()}}


def __getattr__(name: str) -> Any:
    try:
        return _names[name]
    except KeyError:
        raise AttributeError(f"the stand-in has no {name!r}: CuPy has none, or the tables here still lack it") from None
