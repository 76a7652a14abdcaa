"""Arrays to files and back: nested dicts of arrays, numbers and strings, in the format that the file's suffix names.

    .npz            NumPy's own, always there
    .safetensors    one flat table that other libraries read too; needs the safetensors library

A nested dict becomes a flat one whose names are joined with "/". Numbers and strings come back as arrays of no dimension.
Nothing in a file is ever executed. A file appears whole or not at all: it is written beside its place and moved there.
"""
from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minicnn.backend import to_numpy

SUFFIXES = (".npz", ".safetensors")


class WeightsError(ValueError):
    """A file that is not what its suffix says, or is damaged."""


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested dict of arrays, numbers and strings; the old file stays until the new one is whole."""
    write = {".npz": _write_npz, ".safetensors": _write_safetensors}[_suffix(path)]
    flat = _flatten(state)
    atomically(path, lambda temporary: write(temporary, flat))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote: a nested dict of NumPy arrays. Raises FileNotFoundError, or WeightsError for a bad file."""
    read = {".npz": _read_npz, ".safetensors": _read_safetensors}[_suffix(path)]
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist" if not Path(path).exists() else f"{path} is not a file")
    return _unflatten(read(path))


def atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Call write(temporary path), then move the result to `path` in one step; on any failure leave what was there."""
    path = Path(path)
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


def _flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    flat: dict[str, np.ndarray[Any, Any]] = {}
    for name, value in state.items():
        if "/" in name or not name:
            raise ValueError(f"{prefix}{name}: a name must not be empty or contain '/', which joins the names of nested dicts")
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = np.asarray(to_numpy(value) if hasattr(value, "shape") else value)
            if flat[prefix + name].dtype.kind not in "fiubU":
                raise TypeError(f"{prefix}{name}: {type(value).__name__} cannot be saved; use arrays, numbers and strings")
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = state
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return state


def _write_npz(path: str, flat: Mapping[str, np.ndarray[Any, Any]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in flat.items():            # np.savez's own parameters would clash with names such as "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise WeightsError(f"{path} is a single array, not an .npz archive of several")
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as error:
        if isinstance(error, (WeightsError, PermissionError)):
            raise
        raise WeightsError(f"{path} is damaged or not an .npz file ({error}); write it again with minicnn.save") from None


def _write_safetensors(path: str, flat: Mapping[str, np.ndarray[Any, Any]]) -> None:
    save_file = _safetensors().numpy.save_file
    strings = {name: str(a) for name, a in flat.items() if a.dtype.kind == "U"}
    tensors = {name: np.array(a, order="C") for name, a in flat.items() if name not in strings}
    save_file(tensors, path, strings or None)


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    library = _safetensors()
    try:
        with library.safe_open(path, "np") as file:
            strings = {name: np.asarray(text) for name, text in (file.metadata() or {}).items() if name != "format"}
            return {**{name: file.get_tensor(name) for name in file.keys()}, **strings}      # noqa: SIM118 (no dict)
    except (library.SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file ({error})") from None


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError('.safetensors files need the safetensors library: pip install "minicnn[train]", '
                          "or use a name that ends in .npz") from None
    return safetensors
