"""PyTorch's checkpoints, without PyTorch: both formats read, the newer one written. Nothing in a file is ever run.

A checkpoint is a pickle of nested dicts in which each tensor is a call, `_rebuild_tensor_v2(storage, offset, size, stride, ...)`,
and each storage, a run of numbers that several tensors may look at, is a persistent id ("storage", its type, its key, ...).

    since 1.6   a zip archive, nothing compressed:      NAME/data.pkl  NAME/byteorder  NAME/version  NAME/data/KEY ...
    before      pickles one after the other:            a magic number, a version, facts of the machine, the value, the keys;
                                                        then, in the order of the keys, the length and the numbers of each storage

So a tensor is a view of a part of the file, which is mapped where it is large (archives.py); of the old format, where a number
begins at an odd place, a copy.

Source: torch/serialization.py and torch/_utils.py of PyTorch 2.13; what the formats contain was read there.
"""
from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import numpy as np

from minicnn.weights import archives
from minicnn.weights.archives import Refused
from minicnn.weights.pickled import NUMPY, Global, NotGiven, NumpyArray, PickleError, read

Array = np.ndarray[Any, Any]
Order = Literal["<", ">"]           # of the bytes of a number

DEEPEST = 100                       # dicts and lists inside each other
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001

# The type of a storage's numbers, as NumPy has it; bfloat16, which it has not, is read as the upper halves of float32.
KINDS = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "bfloat16", "Long": "i8", "Int": "i4", "Short": "i2",
         "Char": "i1", "Byte": "u1", "Bool": "b1", "ComplexFloat": "c8", "ComplexDouble": "c16"}
DTYPES = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "bfloat16", "int64": "i8", "int32": "i4", "int16": "i2",
          "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "b1", "complex64": "c8",
          "complex128": "c16"}


# ---------------------------------------------------------------- what stands for what in the pickle
@dataclass
class Storage:
    """A run of numbers; `memory` is found when all of the pickle is read."""

    kind: str | None                # as in KINDS; None: bytes, whose type each tensor tells
    numel: int
    memory: memoryview | None = None
    arrays: dict[str, Array] = field(default_factory=dict)

    def array(self, kind: str, order: Order) -> Array:
        """All of it as one array, made once."""
        if kind not in self.arrays:
            assert self.memory is not None
            if kind == "bfloat16":
                halves = np.frombuffer(self.memory, order + "u2")
                self.arrays[kind] = (halves.astype(np.uint32) << 16).view(np.float32)
            else:
                found = np.frombuffer(self.memory, np.dtype(kind).newbyteorder(order))
                self.arrays[kind] = (np.require(found, requirements="A") if found.dtype.isnative    # old files begin at odd places
                                     else found.astype(found.dtype.newbyteorder("=")))
        return self.arrays[kind]


def item_size(kind: str) -> int:
    """Bytes of a number."""
    return 2 if kind == "bfloat16" else np.dtype(kind).itemsize


@dataclass
class TensorOf:
    """A view of a storage, counted in its numbers."""

    storage: Storage
    kind: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, order: Order) -> Array:
        """The view, as NumPy's."""
        numbers = self.storage.array(self.kind, order)
        step = numbers.itemsize
        return np.ndarray(self.size, numbers.dtype, numbers, self.offset * step, tuple(s * step for s in self.stride))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, kind: str | None = None) -> TensorOf:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2. What follows is requires_grad and hooks, which say nothing about the
    numbers, and what a view does to them: "conj" and "neg", whose storage holds other numbers than the tensor."""
    if not isinstance(storage, Storage):
        raise PickleError("a tensor has no storage")
    if any(isinstance(more, dict) and (more.get("conj") or more.get("neg")) for more in rest):
        raise NotGiven("holds a conjugated or negated view, whose numbers are not in the file: save its resolve_conj() or "
                       "resolve_neg()")
    sizes = [offset, *_tuple(size), *_tuple(stride)]
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in sizes) or len(size) != len(stride) or len(size) > 32:
        raise PickleError("a tensor's offset, size and stride are none")
    kind = kind or storage.kind
    if kind is None:
        raise PickleError("a tensor has no type")
    count = storage.numel // (1 if storage.kind else item_size(kind))
    if 0 not in size and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= count:
        raise PickleError(f"a tensor of {size} reaches over the end of its storage of {count} numbers")
    return TensorOf(storage, kind, offset if 0 not in size else 0, size, stride)


def _tensor_of_type(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any,
                    *rest: Any) -> TensorOf:
    """torch._utils._rebuild_tensor_v3: a storage of bytes, and the type beside it."""
    name = dtype.function if isinstance(dtype, Global) else None
    if name not in DTYPES:
        raise PickleError("a tensor has no type")
    return _tensor(storage, offset, size, stride, kind=DTYPES[name])


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise PickleError("an OrderedDict is made of what are no pairs")
    if not all(type(key) in (str, int) for key, _ in pairs):
        raise PickleError("an OrderedDict has a key that is neither a string nor an integer")
    return {key: value for key, value in pairs}         # noqa: C416 (keys have been looked at)


def _counter(counts: Any = ()) -> dict[Any, Any]:
    """collections.Counter, in which MultiStepLR keeps its milestones."""
    return _ordered_dict([*counts.items()] if isinstance(counts, dict) else counts)


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise PickleError("a size is missing")
    return tuple(value)


def _text(*arguments: Any) -> str:
    """torch.device: its words, "cuda:0"."""
    if not all(type(a) in (str, int) for a in arguments):
        raise PickleError("a device has no name")
    return ":".join(map(str, arguments))


NAMES: dict[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "collections Counter": _counter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_type,
    "torch._utils _rebuild_parameter": _parameter,
    **{f"torch {name}Storage": Storage(kind, 0) for name, kind in KINDS.items()},
    "torch.storage UntypedStorage": Storage(None, 0),
    **{f"torch {name}": name for name in DTYPES},
    "torch Size": _tuple,
    "torch device": _text,
    **NUMPY,
}


class Plain:
    """Nested dicts of arrays of what the pickle stood for. Names that are integers become strings; numbers, arrays.

    What stands in several places is converted once, and shared: a small file cannot spell out a billion of them.
    """

    def __init__(self, order: Order) -> None:
        self.order: Order = order
        self.done: dict[int, Any] = {}
        self.begun: set[int] = set()

    def of(self, value: Any, depth: int = 0) -> Any:
        """The same, nested as it is."""
        if not isinstance(value, (dict, list, tuple, str)):
            return self.leaf(value)
        key = id(value)
        if key not in self.done:
            if isinstance(value, str):                      # NumPy keeps four bytes a letter
                self.done[key] = self.leaf(value)
            elif depth > DEEPEST or key in self.begun:
                raise PickleError(f"dicts and lists lie more than {DEEPEST} deep inside each other")
            else:
                self.begun.add(key)
                self.done[key] = self.inside(value, depth + 1)
        return self.done[key]

    def inside(self, value: Any, depth: int) -> Any:
        """A dict, list or tuple of what is in it."""
        if not isinstance(value, dict):
            return type(value)(self.of(item, depth) for item in value)
        found = {str(name): self.of(item, depth) for name, item in value.items()}
        if len(found) < len(value):
            raise PickleError("two names of a dict are the same")
        return found

    def leaf(self, value: Any) -> Any:
        """What is no dict, list or tuple."""
        if isinstance(value, TensorOf):
            return value.array(self.order)
        if isinstance(value, NumpyArray) and value.array is not None:
            return np.asarray(value.array)
        if isinstance(value, Global) and isinstance(value.function, str):
            return np.asarray(value.function)               # torch.float32 as a setting
        if isinstance(value, (bool, float, str)) or (isinstance(value, int) and -1 << 63 <= value < 1 << 64):
            return np.asarray(value)
        if value is None:
            return None
        raise Refused(f"holds a {type(value).__name__}, which is none of dicts, lists, tensors, numbers and strings")


# ---------------------------------------------------------------- reading
def read_pytorch(path: Any) -> dict[str, Any]:
    """The value of a checkpoint: nested dicts of arrays. Refused, PickleError, or whatever zipfile raises, for a bad file."""
    with open(path, "rb") as file:
        whole = archives.contents(file)
        file.seek(0)
        value = (_read_zip if bytes(whole[:4]) == b"PK\x03\x04" else _read_legacy)(file, whole)
    if not isinstance(value, dict):
        raise Refused(f"holds a {type(value).__name__}, and not a dict of tensors")
    return value


def _read_zip(file: BinaryIO, whole: memoryview) -> Any:
    import zipfile  # slow to import, and only files need it

    entries = archives.entries(zipfile.ZipFile(file), len(whole))
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PickleError(f"the archive has {len(pickles)} entries data.pkl, and a checkpoint has one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise Refused("is a program of TorchScript, not a checkpoint: save the model's state_dict()")

    def entry(name: str) -> memoryview:
        if name not in entries:
            raise PickleError(f"the archive has no entry {name[:100]}")
        return archives.stored(whole, entries[name], check=len(whole) < archives.LARGE)     # of a mapped file, not all is read

    order: Order = ">" if f"{root}byteorder" in entries and bytes(entry(f"{root}byteorder")) == b"big" else "<"
    storages: dict[str, Storage] = {}

    def persistent(reference: Any) -> Storage:
        kind, key, numel = _reference(reference)
        if key not in storages:
            storage = storages[key] = Storage(kind, numel)
            storage.memory = _numbers(entry(f"{root}data/{key}"), storage)
        return storages[key]

    return Plain(order).of(read(io.BytesIO(entry(pickles[0])), NAMES, persistent))


def _read_legacy(file: BinaryIO, whole: memoryview) -> Any:
    if read(file, {}) != MAGIC or read(file, {}) != VERSION:
        raise PickleError("it is neither of PyTorch's formats")
    machine = read(file, {})
    order: Order = "<" if not isinstance(machine, dict) or machine.get("little_endian", True) else ">"
    storages: dict[str, Storage] = {}

    def persistent(reference: Any) -> Storage:
        kind, key, numel = _reference(reference)
        if isinstance(reference, tuple) and len(reference) > 5 and reference[5] is not None:
            raise PickleError("a storage that is a view of another: no PyTorch since 0.4 writes such files")
        return storages.setdefault(key, Storage(kind, numel))

    value = read(file, NAMES, persistent)
    keys = read(file, {})
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or not storages.keys() <= {*keys}:
        raise PickleError("the list of storages is damaged")
    place = file.tell()
    for key in keys:
        numel, = struct.unpack_from(order + "q", whole, place) if place + 8 <= len(whole) else (-1,)
        storage = storages.get(key)
        if storage is None or storage.kind is None or numel != storage.numel:
            raise PickleError("the list of storages is damaged, or the file is cut short")
        end = place + 8 + numel * item_size(storage.kind)
        storage.memory = _numbers(whole[place + 8:end], storage)
        place = end
    return Plain(order).of(value)


def _reference(reference: Any) -> tuple[str | None, str, int]:
    """("storage", its type, its key, where it was, how many numbers) -> the type's kind, the key, the count."""
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise PickleError("a reference to what is no storage")
    _, kind, key, _, numel = reference[:5]
    if not isinstance(kind, Global) or not isinstance(kind.function, Storage) or type(key) is not str \
            or type(numel) is not int or numel < 0:
        raise PickleError("a reference to a storage is damaged")
    return kind.function.kind, key, numel


def _numbers(found: memoryview, storage: Storage) -> memoryview:
    """Its numbers, which must be there."""
    size = storage.numel * (item_size(storage.kind) if storage.kind else 1)
    if len(found) < size:
        raise PickleError(f"a storage should have {size:,} bytes and has {len(found):,}: the file is cut short")
    return found[:size]


# ---------------------------------------------------------------- writing
def write_pytorch(path: str, state: Mapping[str, Any]) -> None:
    """Nested dicts, lists and tuples of arrays, numbers, strings and None as a zip checkpoint, which torch.load(weights_only=True)
    reads; of unsigned integers of more than a byte that of PyTorch 2.3 and newer."""
    import zipfile

    writer = Writer()
    pickle = writer.pickle(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(writer.storages):
            with archives.new_entry(archive, f"archive/data/{key}") as entry:
                entry.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B") if array.size else b"")
        archive.writestr("archive/version", "3\n")


class Writer:
    """The pickle of a checkpoint, protocol 2, and the arrays that its storages are to hold."""

    def __init__(self) -> None:
        self.storages: list[Array] = []

    def pickle(self, value: Any) -> bytes:
        """All of it: PROTO 2, the instructions, STOP."""
        return b"\x80\x02" + self.value(value) + b"."

    def value(self, value: Any) -> bytes:
        """The instructions that push it."""
        if isinstance(value, Mapping):
            items = b"".join(self.value(str(name)) + self.value(item) for name, item in value.items())
            return b"}(" + items + b"u"                                             # EMPTY_DICT MARK ... SETITEMS
        if isinstance(value, list):
            return b"](" + b"".join(map(self.value, value)) + b"e"                  # EMPTY_LIST MARK ... APPENDS
        if isinstance(value, tuple):
            return self.tuple([self.value(item) for item in value])
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"                                    # NEWTRUE, NEWFALSE
        if isinstance(value, int):
            return self.integer(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)                                  # BINFLOAT
        if isinstance(value, np.ndarray) and (value.dtype.kind != "U" or value.ndim):
            return self.tensor(value)
        text = str(value).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text                           # BINUNICODE

    def integer(self, value: int) -> bytes:
        """The instruction that pushes it."""
        if -1 << 31 <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)                                  # BININT
        length = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)        # LONG1

    def tuple(self, parts: Sequence[bytes]) -> bytes:
        """The instructions that push a tuple of what others push."""
        return b"(" + b"".join(parts) + b"t"                                        # MARK ... TUPLE

    def tensor(self, array: Array) -> bytes:
        """REDUCE of _rebuild_tensor_v2 with (storage, 0, size, stride, requires_grad, an empty OrderedDict of hooks).

        Newer types have no storage of their own: _rebuild_tensor_v3 of one of bytes, with the type as its last argument.
        """
        native = array.dtype.newbyteorder("=")
        storages = {np.dtype(kind): name for name, kind in KINDS.items() if kind != "bfloat16"}
        newer = {np.dtype(kind): name for name, kind in DTYPES.items() if kind != "bfloat16" and np.dtype(kind) not in storages}
        if native not in storages and native not in newer:
            raise TypeError(f"an array of {array.dtype} has no counterpart in PyTorch's checkpoints")
        key, stride = str(len(self.storages)), np.cumprod([1, *array.shape[:0:-1]])[::-1] if array.ndim else ()
        self.storages.append(array)
        place, numel = ((b"ctorch.storage\nUntypedStorage\n", array.nbytes) if native in newer
                        else (f"ctorch\n{storages[native]}Storage\n".encode(), array.size))
        storage = self.tuple([self.value("storage"), place, self.value(key), self.value("cpu"), self.integer(numel)])
        storage += b"Q"                                                             # BINPERSID
        version, last = (b"3", [f"ctorch\n{newer[native]}\n".encode()]) if native in newer else (b"2", [])
        return b"ctorch._utils\n_rebuild_tensor_v" + version + b"\n" + self.tuple([
            storage, self.integer(0), self.tuple([self.integer(int(n)) for n in array.shape]),
            self.tuple([self.integer(int(n)) for n in stride]), self.value(False), b"ccollections\nOrderedDict\n)R", *last]) + b"R"
