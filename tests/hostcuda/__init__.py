"""CuPy itself on a machine without a device: CUDA's runtime, driver and cuBLAS done by the host.

CuPy is full of C that decides what is launched, copied and allocated, and with which arguments; only at the end does it call
CUDA. Here these last calls are our own (runtime.cpp, cublas.cpp), and its kernels, like ours, are compiled by g++. So
`pytest -m gpu` runs on the real CuPy, whose manners the stand-in of the other tests only imitates:

    MINICNN_HOST_CUDA=1 MINICNN_REQUIRE_GPU=1 python -m pytest -m gpu

It knows the inside of one version of CuPy, 14.2, and refuses others. What it cannot show: speed; a device's arithmetic (fused
multiply-adds, an exp of its own, products on tensor cores); memory that the host cannot reach; streams, whose orders are done
at once; the libraries that CuPy was built with: CUB is left out, and Thrust's sorting is NumPy's; and
kernels of CuPy's that exchange numbers within a warp, as a cumsum of thousands does, which do not compile.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import cushim
import numpy as np

HERE = Path(__file__).parent
VERSION = "14.2."
FOLDER = Path(tempfile.gettempdir(), f"minicnn-hostcuda-{os.getuid()}")
FLAGS = ["-std=c++20", "-fPIC", "-w"]
# How C's types are named in CuPy's signatures; last come a pointer at options, and whether a method was overridden.
TYPES: dict[str, Any] = {"int": ctypes.c_int, "unsigned int": ctypes.c_uint, "size_t": ctypes.c_size_t,
                         "intptr_t": ctypes.c_ssize_t, "float": ctypes.c_float, "PyObject *": ctypes.py_object,
                         "PyObject": ctypes.py_object}


def wanted() -> bool:
    return os.environ.get("MINICNN_HOST_CUDA") == "1"


def install() -> None:
    """Put the host in the device's place, and import CuPy; before anything else has imported it."""
    if "hostcuda_runtime" in sys.modules:                       # done when this Python was started
        return
    if "cupy" in sys.modules:
        raise RuntimeError("CuPy has been imported already: its modules have found CUDA's own functions")
    if not _version().startswith(VERSION):
        raise RuntimeError(f"this knows CuPy {VERSION}* from inside, not {_version()}: pip install 'cupy-cuda13x==14.2.*'")
    os.environ["CUPY_ACCELERATORS"] = ""                        # no CUB, which is compiled for a device
    _load_cublas()
    runtime, driver = (importlib.import_module(f"cupy_backends.cuda.api.{name}") for name in ("runtime", "driver"))
    ours = _runtime()
    for module in (runtime, driver):
        for name, signature, address in ours.install(module):
            setattr(module, name, _python_function(signature, address))
    importlib.import_module("cupy")
    compiler, thrust = (importlib.import_module(f"cupy.cuda.{name}") for name in ("compiler", "thrust"))
    module_type = importlib.import_module("cupy.cuda.function").Module

    def compiled(source: str, options: tuple[str, ...] = (), **_: Any) -> Any:
        module = module_type()
        module.load(_compiled(source, options))
        return module

    compiler._compile_module_with_cache = compiled
    thrust.sort, thrust.argsort = _sort, _argsort
    folders = [str(HERE / "startup"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))      # for those that this one starts


@functools.cache
def _version() -> str:
    """CuPy's, which is not imported for it."""
    text = Path(*_path_of("cupy"), "_version.py").read_text(encoding="utf-8")
    return re.search(r"__version__ = ['\"](.*?)['\"]", text).group(1)                   # type: ignore[union-attr]


def _python_function(signature: str, address: int) -> Any:
    """A C function of CuPy's as Python sees it, which has neither its last argument nor, of some, the one before."""
    result, parameters = re.fullmatch(r"(.*?) ?\((.*)\)", signature).groups()           # type: ignore[union-attr]
    names = [name for name in parameters.split(", ") if name != "void"]
    kinds = [ctypes.c_int if "skip_dispatch" in n else ctypes.c_void_p if "optional_args" in n else TYPES[n] for n in names]
    hidden = [0 if "skip_dispatch" in n else None for n in names if "skip_dispatch" in n or "optional_args" in n]
    function = ctypes.PYFUNCTYPE(TYPES[result], *kinds)(address)
    return lambda *given: function(*given[:len(kinds) - len(hidden)], *hidden)


# ---------------------------------------------------------------- what g++ makes
def _made(name: str, text: str, *options: str) -> Path:
    """A shared object of a text in C++; one that was made before is not made again."""
    made = FOLDER / f"{name}-{_digest(text, *options)}.so"
    if not made.exists():
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        _run_compiler([*FLAGS, "-shared", "-x", "c++", *options], text, made)
    return made


def _digest(*texts: str) -> str:
    """Of what goes in, and of those who make something of it: Python's headers, CuPy's, and g++."""
    return hashlib.sha256("\0".join([*texts, sys.version, _version(), _gcc()]).encode()).hexdigest()[:24]


@functools.cache
def _gcc() -> str:
    return subprocess.run([cushim.compiler() or "g++", "--version"], capture_output=True, text=True, check=True).stdout


def _run_compiler(options: list[str], text: str, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as own:
        source, made = Path(own, "source"), Path(own, "made")
        source.write_text(text, encoding="utf-8")
        done = subprocess.run([cushim.compiler() or "g++", *options, "-o", str(made), str(source)], capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise RuntimeError(f"g++ refuses {into.name}:\n{done.stderr[:4000]}")
        made.replace(into)                                      # whole, or not there


def _runtime() -> Any:
    """runtime.cpp as a Python module, whose functions are found by cublas.cpp."""
    made = _made("runtime", (HERE / "runtime.cpp").read_text(encoding="utf-8"), "-O2", "-I", sysconfig.get_paths()["include"])
    ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("hostcuda_runtime", made)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_cublas() -> None:
    """cublas.cpp by the name of NVIDIA's library, which CuPy then finds loaded; what nobody calls here answers "not supported"."""
    extension, = (Path(entry) / "cuda" / "libs" for entry in _path_of("cupy_backends"))
    asked = next(extension.glob("cublas.*.so")).read_bytes()
    library = re.search(rb"libcublas\.so\.\d+", asked).group().decode()                 # type: ignore[union-attr]
    text = (HERE / "cublas.cpp").read_text(encoding="utf-8")
    names = {name.decode() for name in re.findall(rb"\0(cublas[A-Z]\w+)(?=\0)", asked)}
    others = [f"API {name}() {{ return NOT_SUPPORTED; }}" for name in sorted(names) if not _defines(text, name)]
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    versions = FOLDER / f"{library}.map"
    if not versions.exists():
        versions.write_text(f"{library} {{ global: cublas*; local: *; }};\n", encoding="utf-8")
    lt = library.replace("cublas", "cublasLt")                  # the one that NVIDIA's is built on, which CuPy looks for first
    for made in (_made("cublasLt", "", f"-Wl,-soname,{lt}"),
                 _made("cublas", "\n".join([text, *others]), "-O3", f"-Wl,-soname,{library},--version-script,{versions}")):
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


def _defines(text: str, name: str) -> bool:
    return f"API {name}(" in text or bool(re.fullmatch(r"cublas[SD]gemm(_v2|Batched)", name))     # these by a macro


def _path_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("MINICNN_HOST_CUDA=1 needs CuPy: pip install 'cupy-cuda13x==14.2.*'")
    return list(spec.submodule_search_locations)


def _compiled(source: str, options: tuple[str, ...]) -> bytes:
    """What the runtime is to load: where the kernels of a source lie, and which of them have threads that wait for each other."""
    if "<cupy/" in source:                                      # CuPy's own
        made = _kernels_of_cupy(source)
        meeting = cushim.KERNEL.findall(source) if "__syncthreads" in source else []
    else:
        made, meeting = cushim.build(source, tuple(o for o in options if o.startswith("-D"))), sorted(cushim.meeting(source))
    return "|".join([str(made), *meeting, ""]).encode()


def _kernels_of_cupy(source: str) -> Path:
    cupy = Path(*_path_of("cupy"))
    includes = [f"-I{folder}" for folder in (HERE, HERE / "include", HERE.parent, cupy / "_core" / "include")]
    options = ["-O0", "-ffp-contract=off", *includes]           # there are hundreds, of small arrays: to compile them takes longest
    entries = "".join(f"SHIM_ENTRY({name})\n" for name in cushim.KERNEL.findall(source))
    return _made("cupy", f'#include "{_header(tuple(options))}"\n{source}\n{entries}', *options)


@functools.cache
def _header(options: tuple[str, ...]) -> Path:
    """kernels.h, compiled once for all: g++ takes the .gch beside it."""
    parts = HERE / "kernels.h", cushim.HEADER, *sorted(HERE.glob("include/**/*.*h"))
    texts = [path.read_text(encoding="utf-8") for path in parts]
    header = FOLDER / f"kernels-{_digest(*texts, *options)}.h"
    if not header.with_suffix(".h.gch").exists():
        header.write_text(texts[0], encoding="utf-8")
        _run_compiler([*FLAGS, *options, "-x", "c++-header"], texts[0], header.with_suffix(".h.gch"))
    return header


# ---------------------------------------------------------------- in the place of Thrust
def _at(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address), dtype).reshape(shape)


def _sort(dtype: Any, data: int, keys: int, shape: tuple[int, ...]) -> None:
    _at(data, dtype, shape).sort(axis=-1)


def _argsort(dtype: Any, indices: int, data: int, keys: int, shape: tuple[int, ...]) -> None:
    _at(indices, np.intp, shape)[...] = np.argsort(_at(data, dtype, shape), axis=-1, kind="stable")
