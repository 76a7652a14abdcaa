"""Reading a pickle without running it.

A pickle is a program for a small machine with a stack and a memo: "push this string", "make a dict of what lies above the mark",
"call this function with that tuple". Python's own `pickle.load` calls whatever functions the program names, so whoever wrote the
file decides what runs here. This machine does the stacking itself, and calls nothing that it was not given by name:

    read(file, functions)       functions: {"collections OrderedDict": dict, "torch._utils _rebuild_tensor_v2": rebuild, ...}

It knows the instructions that PyTorch's files are written in (protocol 2, and what protocols up to 5 add for plain data), and every
other one, every other name, a stack that runs empty, ends in one PickleError. Nothing can be larger in memory than in the file by
more than a constant factor: no instruction reserves memory for a length that it only claims, and functions that are called
again and again with one large argument are stopped (`Machine.spend`).

Source: Python's `pickletools`, which documents every instruction.
"""
from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from minicnn.weights.archives import Refused

Array = np.ndarray[Any, Any]
LARGEST = 64 << 20              # bytes of one pickle; those of checkpoints, whose numbers lie elsewhere, have a hundredth of it


class PickleError(ValueError):
    """A pickle that is damaged, or that asks for what is not given."""


class NotGiven(PickleError, Refused):
    """A pickle that asks for a name that it is not given, or for what cannot be made of what it holds."""


class Mark:
    """Where a list of things on the stack begins."""


class Global:
    """A name that the pickle may use, and what stands for it here; never called but by REDUCE."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function


def read(file: BinaryIO, functions: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None,
         largest: int = LARGEST) -> Any:
    """The value that the pickle at the file's position stands for; leaves the position behind it.

    functions: what each name of the form "module name" means: a function to be called with arguments, or a plain value.
    persistent: what a persistent id, a reference to something outside of the pickle, means.
    largest: bytes that it may take.
    """
    limited = _Limited(file, largest)
    machine = Machine(functions, persistent, limited)
    try:
        for instruction, argument, position in pickletools.genops(limited):      # type: ignore[arg-type]
            if instruction.name == "STOP":
                return machine.pop()
            step = STEPS.get(instruction.name)
            if step is None:
                raise PickleError(f"the instruction {instruction.name} at byte {position} is none that a checkpoint needs")
            step(machine, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, RecursionError, EOFError) as error:
        raise PickleError(f"a damaged pickle ({type(error).__name__}: {error})") from None
    raise PickleError("the pickle has no end")


class _Limited:
    """A file of which no more than so many bytes can be read."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self.file, self.limit, self.left = file, limit, limit

    def read(self, count: int) -> bytes:
        """As a file's."""
        if count > self.left:
            raise PickleError(f"it wants {count:,} bytes of a pickle, and the limit is {self.limit:,}")
        found = self.file.read(count)
        self.left -= len(found)
        return found

    def readline(self) -> bytes:
        """As a file's."""
        found = self.file.readline(self.left + 1)
        self.left -= len(found)
        if self.left < 0:
            raise PickleError(f"a line of the pickle is longer than the limit, {self.limit:,}")
        return found

    def tell(self) -> int:
        """As a file's."""
        return self.file.tell()


class Machine:
    """The stack, the memo, and what names and references mean."""

    def __init__(self, functions: Mapping[str, Any], persistent: Callable[[Any], Any] | None, file: _Limited) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.functions, self.persistent, self.file = functions, persistent, file
        self.spent = 0

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the topmost value off."""
        value = self.stack.pop()
        if value is Mark:
            raise PickleError("a value is missing")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Everything above the topmost mark, which goes too."""
        place = len(self.stack) - 1
        while self.stack[place] is not Mark:
            place -= 1
            if place < 0:
                raise PickleError("a mark is missing")
        items = self.stack[place + 1:]
        del self.stack[place:]
        return items

    def top(self, kind: type) -> Any:
        """The topmost value, which must be of a kind."""
        if not isinstance(self.stack[-1], kind):
            raise PickleError(f"a {kind.__name__} is missing")
        return self.stack[-1]

    # ------------------------------------------------------------ instructions that take more than a line
    def keep(self, place: int | None = None) -> None:
        """Note the topmost value down; without a place, under the next number."""
        if self.stack[-1] is Mark:
            raise PickleError("a value is missing")
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def find(self, name: str) -> None:
        """Push what a name means. Names of a pickle are two words, the module's and its own."""
        if name not in self.functions:
            raise NotGiven(f"asks for {name.replace(' ', '.', 1)}, and plain arrays need no such thing: nothing was run")
        self.push(Global(name, self.functions[name]))

    def find_from_stack(self) -> None:
        """STACK_GLOBAL: the same, the two words on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a name is missing")
        self.find(f"{module} {name}")

    def spend(self, arguments: tuple[Any, ...]) -> None:
        """Count what a function is given, and may copy. All of it stands in an honest file, so it is not much more than that."""
        self.spent += sum(len(argument) for argument in arguments if hasattr(argument, "__len__"))
        if self.spent > 8 * (self.file.limit - self.file.left) + 4096:
            raise PickleError("it makes much more of its numbers than it has")

    def call(self) -> None:
        """REDUCE: a function and a tuple of arguments become its result."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not callable(function.function) or not isinstance(arguments, tuple):
            raise PickleError("it calls what is no function")
        self.spend(arguments)
        self.push(function.function(*arguments))

    def set_state(self) -> None:
        """BUILD: attributes of an object. Only our own stand-ins have any use for them; a dict's are left out."""
        state = self.pop()
        if hasattr(self.stack[-1], "set_state"):
            self.spend(state if isinstance(state, tuple) else ())
            self.stack[-1].set_state(state)
        elif not isinstance(self.stack[-1], dict):
            raise PickleError(f"it sets attributes of a {type(self.stack[-1]).__name__}")

    def refer(self) -> None:
        """BINPERSID: a persistent id becomes what it means."""
        if self.persistent is None:
            raise PickleError("it refers to something outside, and there is nothing")
        self.push(self.persistent(self.pop()))

    def extend(self, items: list[Any]) -> None:
        """APPENDS: the items to the end of the list below them."""
        self.top(list).extend(items)

    def make_dict(self) -> None:
        """DICT: keys and values above the mark become a dict."""
        items = self.pop_to_mark()
        self.push({})
        self.fill(items)

    def fill(self, items: list[Any]) -> None:
        """SETITEMS: keys and values, in turn, into the dict below them."""
        if len(items) % 2 or not all(type(key) in (str, int) for key in items[::2]):        # to hash a deep tuple may crash
            raise PickleError("a dict has a key without a value, or one that is neither a string nor an integer")
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))


def _last(machine: Machine, count: int) -> list[Any]:
    """The topmost values, in the order in which they were pushed."""
    return [machine.pop() for _ in range(count)][::-1]


# What each instruction does to the machine m with its argument a.
STEPS: dict[str, Callable[[Machine, Any], object]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "MARK": lambda m, a: m.push(Mark),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "UNICODE", "BINUNICODE",
                     "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING", "BINSTRING",
                     "SHORT_BINSTRING"), lambda m, a: m.push(a)),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "LIST": lambda m, a: m.push(m.pop_to_mark()),
    "TUPLE": lambda m, a: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, a: m.push(tuple(_last(m, 1))),
    "TUPLE2": lambda m, a: m.push(tuple(_last(m, 2))),
    "TUPLE3": lambda m, a: m.push(tuple(_last(m, 3))),
    "DICT": lambda m, a: m.make_dict(),
    "APPEND": lambda m, a: m.extend(_last(m, 1)),
    "APPENDS": lambda m, a: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, a: m.fill(_last(m, 2)),
    "SETITEMS": lambda m, a: m.fill(m.pop_to_mark()),
    "BINPUT": lambda m, a: m.keep(a),
    "LONG_BINPUT": lambda m, a: m.keep(a),
    "PUT": lambda m, a: m.keep(a),
    "MEMOIZE": lambda m, a: m.keep(),
    "BINGET": lambda m, a: m.push(m.memo[a]),
    "LONG_BINGET": lambda m, a: m.push(m.memo[a]),
    "GET": lambda m, a: m.push(m.memo[a]),
    "GLOBAL": lambda m, a: m.find(a),
    "STACK_GLOBAL": lambda m, a: m.find_from_stack(),
    "REDUCE": lambda m, a: m.call(),
    "BUILD": lambda m, a: m.set_state(),
    "BINPERSID": lambda m, a: m.refer(),
}


# ---------------------------------------------------------------- NumPy's names, which stand for these
def _encode(text: Any, coding: Any = "latin1") -> bytes:
    """_codecs.encode, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or coding not in ("latin1", "latin-1"):
        raise PickleError("bytes are written in an unknown way")
    return text.encode("latin-1")


class NumpyType:
    """numpy.dtype, of a plain number."""

    def __init__(self, name: Any, *rest: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?(f[248]|[iu][1248]|b1|c8|c16)", name):
            raise PickleError("a NumPy type that is no plain number's")
        self.dtype = np.dtype(name)

    def set_state(self, state: Any) -> None:
        """(version, byte order, ...)"""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise PickleError("a NumPy type's state is none")
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """numpy.ndarray, filled by its state."""

    def __init__(self, *arguments: Any) -> None:
        self.array: Array | None = None

    def set_state(self, state: Any) -> None:
        """(version, shape, type, whether column by column, the bytes)"""
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple) and isinstance(state[2], NumpyType)):
            raise PickleError("a NumPy array's state is none")
        _, shape, kind, by_columns, numbers = state
        numbers = numbers.encode("latin-1") if isinstance(numbers, str) else numbers        # Python 2's strings are bytes
        self.array = np.frombuffer(numbers, kind.dtype).reshape(shape, order="F" if by_columns else "C").copy()


def _numpy_scalar(kind: Any, numbers: Any) -> NumpyArray:
    if not isinstance(kind, NumpyType) or not isinstance(numbers, bytes) or len(numbers) != kind.dtype.itemsize:
        raise PickleError("a NumPy number is none")
    made = NumpyArray()
    made.array = np.frombuffer(numbers, kind.dtype)[0]
    return made


NUMPY: dict[str, Any] = {
    "_codecs encode": _encode,
    "numpy dtype": NumpyType,
    "numpy ndarray": None,
    **{f"{core}.multiarray {name}": function for core in ("numpy.core", "numpy._core")
       for name, function in (("scalar", _numpy_scalar), ("_reconstruct", NumpyArray))},
}
