"""Arrays to files and back: nested dicts of arrays, numbers and strings, in the format that the file's suffix names.

    .npz                    NumPy's own, always there
    .safetensors            one flat table that other libraries read too; needs the safetensors library
    .pth, .pt, .th          PyTorch's checkpoints, without PyTorch (pytorch.py)

In the first two a nested dict becomes a flat one whose names are joined with "/"; the third keeps lists, tuples and None, too.
Numbers and strings come back as arrays of no dimension. Nothing in a file is ever executed. A file appears whole or not at all: it
is written beside its place and moved there.

A large file is mapped into memory, and its arrays are views of it (archives.py): all that `save` writes. Copies are only those that
another program has compressed, or put where a number begins at an odd place, and bfloat16. Of an .npz the checksums are compared
all the same, since a run's checkpoints rely on them: so all of it is read once, which takes no memory from others.
"""
from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.autograd import Tensor
from minicnn.backend import is_array, to_numpy
from minicnn.weights import archives

if TYPE_CHECKING:
    import zipfile

PYTORCH = (".pth", ".pt", ".th")
SUFFIXES = (".npz", ".safetensors", *PYTORCH)
LONGEST_HEADER = 1 << 14            # bytes of an .npy before its numbers; NumPy takes no more than 10,000 letters of them
CHUNK = 1 << 18                     # bytes that are unpacked at a time

# The types of numbers in .safetensors, but for BF16, which NumPy has not.
SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
               "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8"}
MARK = "minicnn"                    # stands in the metadata of a .safetensors whose other metadata are strings of the state
OWN_WORDS = (MARK, "format")        # which no string of a state can be called there


class WeightsError(ValueError):
    """A file that is not what its suffix says, or is damaged."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested dict of arrays, numbers and strings; the old file stays until the new one is whole.

    A PyTorch checkpoint also takes None, lists and tuples, and gives them back; in the other formats a list of numbers is an array.
    """
    suffix = _suffix(path)
    if suffix in PYTORCH:
        nested = _nested(state)
        atomically(path, lambda temporary: _write_pytorch(temporary, nested))
    else:
        flat, write = _flatten(state), {".npz": _write_npz, ".safetensors": _write_safetensors}[suffix]
        atomically(path, lambda temporary: write(temporary, flat))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote, or another library: a nested dict of NumPy arrays.

    bfloat16, which NumPy has not, becomes float32. Of a PyTorch checkpoint, names that are integers become strings, and lists
    stay lists.
    Raises FileNotFoundError, or WeightsError for a bad file.
    """
    suffix = _suffix(path)
    if suffix in PYTORCH:
        _check_there(path)
        return _read_pytorch(path)
    read = {".npz": _read_npz, ".safetensors": _read_safetensors}[suffix]
    _check_there(path)
    return _unflatten(read(path), path)


def _check_there(path: str | os.PathLike[str]) -> None:
    """A file that is missing, or that may not be read, is no damaged one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist" if not Path(path).exists() else f"{path} is not a file")
    with open(path, "rb"):
        pass                                        # what this raises, no permission for one, is no sign of damage


def atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Call write(temporary path), then move the result to `path` in one step; on any failure leave what was there."""
    try:
        _write_and_move(Path(path), write)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None         # not the temporary file, which nobody knows


def _write_and_move(path: Path, write: Callable[[str], None]) -> None:
    import tempfile  # slow to import, as zipfile is, and only files need them

    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())                 # on the disk before it takes the old one's name
        os.chmod(temporary, 0o666 & ~_umask())      # mkstemp's files are their owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: the suffix names the format, and {suffix or 'none'} is none of {', '.join(SUFFIXES)}")
    return suffix


def _flatten(state: Mapping[str, Any], folder: str = "") -> dict[str, np.ndarray[Any, Any]]:
    flat: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in state.items():
        whole = _joined(folder, name)
        if isinstance(value, Mapping):
            flat.update(_flatten(value, whole))
        else:
            flat[whole] = _as_array(whole, value)
    return flat


def _nested(value: Any, name: str = "") -> Any:
    """The value as it is nested, of dicts, lists, tuples, None and arrays; Python's numbers and strings stay what they are."""
    if isinstance(value, Mapping):
        return {part: _nested(item, _joined(name, part)) for part, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_nested(item, name) for item in value)
    if value is None:
        return None
    array = _as_array(name, value)
    return value if type(value) in (bool, int, float, str) else array


def _joined(folder: str, name: Any) -> str:
    """What an entry of a dict is called from outside, if that is a name that would come back."""
    whole = f"{folder}/{name}" if folder else f"{name}"
    if not isinstance(name, str):
        raise TypeError(f"{whole}: names are strings, and this is a {type(name).__name__}: write str({name!r})")
    if "/" in name or not name:
        raise ValueError(f"{whole}: a name must not be empty or contain '/', which joins the names of nested dicts")
    return whole


def _as_array(name: str, value: Any) -> np.ndarray[Any, Any]:
    value = value.data if isinstance(value, Tensor) else value
    try:
        array = np.asarray(to_numpy(value) if is_array(value) else value)
    except ValueError:                              # lists of unequal lengths
        array = np.asarray(None)
    if array.dtype.kind not in "fiubU":
        raise TypeError(f"{name}: {type(value).__name__} cannot be saved; use arrays, numbers and strings")
    return array


def _unflatten(flat: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = state
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or last in inner:
            raise WeightsError(f"{path}: the name {name!r} and another stand for an array and for the folder it would be in")
        inner[last] = value
    return state


def _write_npz(path: str, flat: Mapping[str, np.ndarray[Any, Any]]) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in flat.items():            # np.savez's own parameters would clash with names such as "file"
            with archives.new_entry(archive, f"{name}.npy") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    import zipfile

    with _telling(path, "an .npz file", "; write it again with minicnn.save"), open(path, "rb") as file:
        whole, archive = archives.contents(file), zipfile.ZipFile(file)
        entries = archives.entries(archive, len(whole))
        arrays = {name.removesuffix(".npy"): _array(archives.stored(whole, entry) if entry.compress_type == zipfile.ZIP_STORED
                                                    else _unpacked(archive, entry)) for name, entry in entries.items()}
        if len(arrays) < len(entries):
            raise ValueError("two arrays have one name")
        return arrays


def _array(found: memoryview) -> np.ndarray[Any, Any]:
    """The array of an .npy, where it lies; a copy where a number would begin at an odd place, as other programs write them."""
    file = io.BytesIO(found[:LONGEST_HEADER])
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    return _view(found[file.tell():], shape, dtype, fortran)


def _view(numbers: memoryview, shape: Sequence[int], dtype: np.dtype[Any], fortran: bool = False) -> np.ndarray[Any, Any]:
    """These bytes, all of them, as an array; a copy only where they begin at an odd place."""
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError(f"an array {tuple(shape)} of {dtype} in {len(numbers):,} bytes")
    return np.require(np.ndarray(shape, dtype, numbers, order="F" if fortran else "C"), requirements="A")


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of a compressed entry: as many as it says, which `archives.entries` has looked at."""
    whole, came = memoryview(bytearray(entry.file_size)), 0
    with archive.open(entry) as file:               # which compares the checksum at the end
        while part := file.read(CHUNK):
            whole[came:came + len(part)] = part
            came += len(part)
    if came < len(whole):
        raise ValueError(f"the entry {entry.filename[:100]} is cut short")
    return whole


def _write_safetensors(path: str, flat: Mapping[str, np.ndarray[Any, Any]]) -> None:
    library = _safetensors()
    strings = {name: str(a) for name, a in flat.items() if a.dtype.kind == "U"}
    unfit = [name for name, a in flat.items()
             if name in OWN_WORDS or (a.ndim if name in strings else a.dtype.itemsize > 8)]
    if unfit:
        raise ValueError(f"{unfit[0]}: a .safetensors file cannot hold it (no arrays of strings, no numbers of over 8 bytes, "
                         f"nothing called {' or '.join(OWN_WORDS)}, its own words); save to .npz")
    tensors = {name: np.array(a, order="C") for name, a in flat.items() if name not in strings}
    try:
        library.numpy.save_file(tensors, path, {**strings, MARK: "strings"} if strings else None)
    except library.SafetensorError as error:        # a full disk, for one
        raise OSError(errno.EIO, _one_line(error)) from None


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The library checks the file; then its arrays are where its table says.

    A length of 8 bytes, a table in JSON of so many, then the numbers, from the first offset of the table on to the second.
    """
    import json

    library = _safetensors()
    with _telling(path, "a safetensors file"), library.safe_open(path, "np") as checked, open(path, "rb") as file:
        whole, said = archives.contents(file), checked.metadata() or {}
        begin = 8 + int.from_bytes(whole[:8], "little")
        table = json.loads(bytes(whole[8:begin]))
        arrays = {name: _typed(table[name], whole[begin:]) for name in checked.keys()}      # noqa: SIM118 (no dict)
        texts = {name: np.asarray(text) for name, text in said.items() if name not in OWN_WORDS} if MARK in said else {}
        if twice := arrays.keys() & texts:
            raise ValueError(f"{min(twice)!r} is an array and a text")
        return {**arrays, **texts}


def _typed(row: Mapping[str, Any], numbers: memoryview) -> np.ndarray[Any, Any]:
    """The array of a row of a .safetensors file's table, where it lies; bfloat16, the upper halves of float32, widened."""
    kind, shape, (start, end) = row["dtype"], row["shape"], row["data_offsets"]
    if kind == "BF16":
        halves = _view(numbers[start:end], shape, np.dtype("<u2"))
        return (halves.astype(np.uint32) << 16).view(np.float32)
    if kind not in SAFETENSORS:
        raise archives.Refused(f"has numbers of a type that NumPy has not, {kind}")
    return _view(numbers[start:end], shape, np.dtype(SAFETENSORS[kind]))


def _write_pytorch(path: str, state: Mapping[str, Any]) -> None:
    from minicnn.weights.pytorch import write_pytorch

    write_pytorch(path, state)


def _read_pytorch(path: str | os.PathLike[str]) -> dict[str, Any]:
    from minicnn.weights.pytorch import read_pytorch

    with _telling(path, "a PyTorch checkpoint"):
        return read_pytorch(path)


@contextmanager
def _telling(path: str | os.PathLike[str], what: str, cure: str = "") -> Iterator[None]:
    """Turn what reading a bad file raises, and it is anything, into WeightsError; but not what the machine is to blame for."""
    try:
        yield
    except archives.Refused as error:
        raise WeightsError(f"{path} is refused: it {_one_line(error)}") from None
    except Exception as error:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise                                   # EINVAL: a place before the file's beginning, which only the file names
        raise WeightsError(f"{path} is damaged or not {what} ({_one_line(error)}){cure}") from None


def _one_line(error: Exception) -> str:
    words = " ".join(f"{error}".split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}..."              # some quote half the file


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError('.safetensors files need the safetensors library: pip install safetensors, '
                          "or use a name that ends in .npz") from None
    return safetensors
