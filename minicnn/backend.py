"""Which array library owns an array, and what this machine can compute on.

An operation asks the arrays it was given: NumPy arrays are computed by NumPy, CuPy arrays by CuPy, and both live in
one process. No setting, no environment variable and no global switch takes part. CuPy is optional and is imported only
by the probe below, the first time somebody asks for the GPU; an array can be CuPy's only if somebody has imported CuPy.

Devices are named by strings where a person chooses one: "cpu" (NumPy), "cuda" (CuPy), "auto" (the GPU where it works),
and the name of any further library that was let in with `adopt`.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import threadpoolctl

Array = Any  # np.ndarray, cupy.ndarray or an adopted library's: they share their methods but no base class


class BackendUnavailable(RuntimeError):
    """A device was asked for that does not work here. The message is the reason and the command that mends it."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason, cure)
        self.reason, self.cure = reason, cure

    def __str__(self) -> str:
        return f"no GPU to compute on: {self.reason}. To mend it: {self.cure}"


# ------------------------------------------------------------------------------------------------ whose array is this?

class _Library(NamedTuple):
    device: str
    module: ModuleType


_libraries: dict[str, _Library] = {"cpu": _Library("cpu", np)}  # and those adopted; CuPy is looked up in sys.modules
_owners: dict[type, _Library | None] = {}  # what was found for a type, so that every later look costs one dict access


def _owner(value: object) -> _Library | None:
    """The library whose array `value` is; None for anything that is not an array."""
    kind = type(value)
    try:
        return _owners[kind]
    except KeyError:
        _owners[kind] = owner = _find_owner(kind)
        return owner


def _find_owner(kind: type) -> _Library | None:
    candidates = list(_libraries.values())
    if "cupy" in sys.modules:
        candidates.append(_Library("cuda", sys.modules["cupy"]))
    for library in candidates:
        array_type = getattr(library.module, "ndarray", None)  # a half-imported CuPy has none yet
        if isinstance(array_type, type) and issubclass(kind, array_type):
            return library
    return None


def array_module(*arrays: object) -> ModuleType:
    """The library that owns `arrays`, to compute with: `xp = array_module(x, weight)`, then `xp.exp(x)`.

    Arguments that are not arrays (None, Python numbers, NumPy scalars) have no say; without any array it is NumPy.
    Raises TypeError where arrays of two libraries meet: nothing is copied between devices behind anybody's back.
    """
    found: _Library | None = None
    for array in arrays:
        owner = _owner(array)
        if owner is None:
            continue
        if found is None:
            found = owner
        elif owner.device != found.device:
            raise TypeError(
                f"one array is on {found.device!r} ({found.module.__name__}) and another on {owner.device!r} "
                f"({owner.module.__name__}); the arrays of one operation must share a device: "
                f'move one with t.to("{found.device}") or t.to("{owner.device}")')
    return np if found is None else found.module


def is_array(value: object) -> bool:
    """Whether `value` is an array of a known library. Python and NumPy scalars, lists and Tensors are not."""
    return _owner(value) is not None


def compiles_cuda(value: object) -> bool:
    """Whether `value` is an array of a library that compiles and runs CUDA sources, as CuPy does (`RawModule`)."""
    owner = _owner(value)
    return owner is not None and hasattr(owner.module, "RawModule")


def _known_owner(array: object) -> _Library:
    owner = _owner(array)
    if owner is None:
        raise TypeError(f"expected an array of NumPy or CuPy, not {type(array).__name__}: make one with np.asarray")
    return owner


def adopt(module: ModuleType, device: str) -> None:
    """Let in another library with NumPy's names, under a device name of its own.

    It needs `module.ndarray` (the array type, with a `get()` that returns a NumPy copy) and `module.asarray`.
    Raises ValueError for a name that is taken.
    """
    if device in ("cuda", "auto") or (device in _libraries and _libraries[device].module is not module):
        raise ValueError(f"the device name {device!r} is taken: adopt {module.__name__} under one that is none of "
                         f"{_device_names()}")
    _libraries[device] = _Library(device, module)
    _owners.clear()  # its arrays may have been looked at before, and found to be nobody's


# ------------------------------------------------------------------------------------------------ what numbers are they?

# Types of real numbers, by their letters, dtype.char: what is computed in, what a GPU stores images in besides, and all of them,
# long double too. E is bfloat16, which NumPy has from ml_dtypes.
REAL, HALF = "fd", "eE"
FLOATING = REAL + HALF + "g"


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether it is a type of real numbers, bfloat16 among them."""
    return dtype.char in FLOATING


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether it is float16 or bfloat16: in which a GPU stores images, and computes nothing."""
    return dtype.char in HALF


def real_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What is computed in where images are of this type: float32 for the half ones, else the type itself."""
    return _FLOAT32 if dtype.char in HALF else dtype


_FLOAT32: np.dtype[Any] = np.dtype(np.float32)


# ---------------------------------------------------------------------------------------------------- moving arrays

def device_of(array: Array) -> str:
    """Where an array lives: "cpu", "cuda", or the name its library was adopted under. TypeError for a non-array."""
    return _known_owner(array).device


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """The array as a NumPy array: itself if it is one, else a copy on the host, laid out alike. TypeError for a non-array."""
    if _known_owner(array).device == "cpu":
        return array  # type: ignore[no-any-return]
    return _moved(array, lambda whole: whole.get())  # type: ignore[no-any-return]


def library_of(device: str) -> Any:
    """The array library of a device that works: NumPy, CuPy, or what was adopted. Raises as `resolve_device` does."""
    wanted = resolve_device(device)
    return importlib.import_module("cupy") if wanted == "cuda" else _libraries[wanted].module


def to_device(array: Array, device: str) -> Array:
    """The array on `device` ("cpu", "cuda", "auto" or an adopted name): itself if it is there already, else a copy, laid out alike.

    Raises ValueError for an unknown device, BackendUnavailable for "cuda" where no GPU works, TypeError for a
    non-array.
    """
    current, wanted = device_of(array), resolve_device(device)
    if current == wanted:
        return array
    return _moved(to_numpy(array), library_of(wanted).asarray)


def _moved(array: Array, move: Callable[[Array], Array]) -> Array:
    """move(array), with its axes in memory as they were: by itself a copy from one library to another has them in their order.

    Filters lie as the kernels read them; if they lost that on the way, every pass over them would begin with a copy.
    """
    if array.ndim < 2:
        return move(array)
    order = memory_order(array)
    whole = array.transpose(order)
    if not whole.flags.c_contiguous:
        return move(array)
    return move(whole).transpose(sorted(range(array.ndim), key=order.__getitem__))


def memory_order(array: Array) -> list[int]:
    """Its axes from the longest stride to the shortest: the order in which its memory runs."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def resolve_device(device: str) -> str:
    """Turn a person's choice into a device that works: "auto" becomes "cuda" where a GPU works and "cpu" elsewhere.

    "auto" says why, once, where CuPy is installed and yet does not work. Raises ValueError for an unknown name and
    BackendUnavailable for "cuda" where no GPU works.
    """
    if device == "auto":
        status = cuda_status()
        if status.installed and not status.available:
            _warn_once(f"computing on the CPU; the GPU cannot be used: {status.reason}. To mend it: {status.cure}")
        return "cuda" if status.available else "cpu"
    if device == "cuda":
        status = cuda_status()
        if not status.available:
            raise BackendUnavailable(status.reason, status.cure)
    elif device not in _libraries:
        raise ValueError(f"unknown device {device!r}; choose one of {_device_names()}")
    return device


def _device_names() -> str:
    return ", ".join(f'"{name}"' for name in ("auto", "cuda", *_libraries))


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)  # at the line that called resolve_device


# ------------------------------------------------------------------------------------------------ does the GPU work?

@dataclass(frozen=True)
class Status:
    """What the probe found: whether CuPy computes, else the reason and the cure; `facts` are versions and device."""

    available: bool
    reason: str = ""
    cure: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether a CuPy is installed at all, working or not."""
        return "CuPy" in self.facts


@functools.cache
def cuda_status() -> Status:
    """Try the GPU out, once a process: import CuPy, ask its driver and device, multiply and add a 2 x 2 matrix.

    CuPy imports without complaint on a machine that has no driver, and reports a device on one that lacks the
    libraries to compute with, so nothing short of computing something tells. Never raises.
    """
    facts: dict[str, str] = {}
    try:
        cupy = _import_cupy(facts)
        _check_driver(cupy, facts)
        _check_device(cupy, facts)
        _check_arithmetic(cupy)
    except BackendUnavailable as problem:
        return Status(False, problem.reason, problem.cure, facts)
    except Exception as error:  # whatever else a CuPy may do, the CPU must stay usable
        return Status(False, f"CuPy fails in an unknown way ({_one_line(error)})",
                      "`python -c 'import cupy; cupy.show_config()'` may tell what it lacks", facts)
    return Status(True, facts=facts)


def _import_cupy(facts: dict[str, str]) -> Any:
    packages = _cupy_packages()
    if packages:
        facts["CuPy"] = ", ".join(f"{version} ({name})" for name, version in packages.items())
    if len(packages) > 1:
        raise BackendUnavailable(
            f"{len(packages)} CuPy packages are installed at once ({', '.join(packages)}), each over the other's files",
            _install(_cuda_major(_driver_version()), remove=packages))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cupy = importlib.import_module("cupy")
            facts.setdefault("CuPy", str(cupy.__version__))
    except Exception as error:  # a broken installation fails in any way it likes
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy" and not packages:
            raise _not_installed(_driver_version()) from error
        facts.setdefault("CuPy", "incomplete")
        raise BackendUnavailable(f"CuPy cannot be imported ({_one_line(error)})",
                                 _install(_cuda_major(_driver_version()), remove=packages)) from error
    return cupy


def _check_driver(cupy: Any, facts: dict[str, str]) -> None:
    driver, built_for = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    facts["CUDA of CuPy"] = _version(built_for)
    if driver == 0:
        raise BackendUnavailable("no NVIDIA driver answers on this machine",
                                 f"install the driver ({_DRIVERS}); start a container with `--gpus all`")
    facts["CUDA of the driver"] = _version(driver)
    if driver // 1000 < built_for // 1000:  # within one major version, an older driver still runs newer programs
        raise _driver_too_old(driver, built_for)


def _check_device(cupy: Any, facts: dict[str, str]) -> None:
    runtime = cupy.cuda.runtime
    try:
        if runtime.getDeviceCount() == 0:
            raise _no_device()
        properties = runtime.getDeviceProperties(runtime.getDevice())
        _, memory = runtime.memGetInfo()
    except runtime.CUDARuntimeError as error:
        if error.status == 100:  # cudaErrorNoDevice
            raise _no_device() from None
        if error.status == 35:  # cudaErrorInsufficientDriver
            raise _driver_too_old(runtime.driverGetVersion(), runtime.runtimeGetVersion()) from None
        raise _device_fails(error) from None
    name, capability = properties["name"].decode(), (properties["major"], properties["minor"])
    facts["device"] = f"{name}, compute capability {capability[0]}.{capability[1]}, {memory / 2**30:.1f} GiB"
    if runtime.runtimeGetVersion() >= 13000 and capability < (7, 5):
        raise BackendUnavailable(f"{name} (compute capability {capability[0]}.{capability[1]}) is older than CUDA 13 "
                                 "supports, which begins at 7.5", _install(12, remove=_cupy_packages()))


def _check_arithmetic(cupy: Any) -> None:
    """A matrix product and a sum need what everything else needs: memory, cuBLAS, NVRTC and the CUDA headers."""
    try:
        ones = cupy.ones((2, 2), dtype=np.float32)
        total = float((ones @ ones).sum())
    except MemoryError:
        raise BackendUnavailable("the GPU's memory is full",
                                 "end a process that holds it; `nvidia-smi` lists them") from None
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        raise _device_fails(error) from None
    except Exception as error:  # ImportError from cuBLAS, RuntimeErrors from NVRTC, CompileException without headers
        major = _cuda_major(cupy.cuda.runtime.runtimeGetVersion())
        raise BackendUnavailable(f"libraries of the CUDA toolkit are missing ({_one_line(error)})",
                                 _install(major, remove=_cupy_packages().keys() - {f"cupy-cuda{major}x"})) from error
    if total != 8.0:
        raise _device_fails(ArithmeticError(f"the entries of a 2 x 2 product of ones summed to {total}, not 8"))


# ---- what can be wrong, and the command that mends it

_DRIVERS = "`sudo ubuntu-drivers install` on Ubuntu, elsewhere from https://www.nvidia.com/drivers"


def _install(major: int, remove: Any = ()) -> str:
    """The command for CuPy with its own toolkit libraries, after removing the packages it would collide with."""
    command = f'pip install "cupy-cuda{major}x[ctk]"'
    return f"pip uninstall -y {' '.join(sorted(remove))} && {command}" if remove else command


def _not_installed(driver: int) -> BackendUnavailable:
    if driver == 0:
        return BackendUnavailable("CuPy is not installed, and no NVIDIA driver answers on this machine",
                                  "nothing to do without an NVIDIA GPU; with one, install its driver, then "
                                  f"{_install(13)}")
    if driver < 12000:
        return BackendUnavailable(f"CuPy is not installed, and the NVIDIA driver supports only CUDA {_version(driver)}",
                                  f"update the driver ({_DRIVERS}), then {_install(13)}")
    return BackendUnavailable("CuPy is not installed", _install(_cuda_major(driver)))


def _driver_too_old(driver: int, built_for: int) -> BackendUnavailable:
    update = f"update the driver ({_DRIVERS})"
    older = f"{_install(12, remove=_cupy_packages())} or "
    return BackendUnavailable(
        f"the NVIDIA driver supports CUDA {_version(driver)}, too old for this CuPy, built for {_version(built_for)}",
        older + update if driver // 1000 == 12 < built_for // 1000 else update)


def _no_device() -> BackendUnavailable:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return BackendUnavailable(f"the NVIDIA driver shows no GPU, CUDA_VISIBLE_DEVICES being {visible!r}",
                                  "`unset CUDA_VISIBLE_DEVICES`; then `nvidia-smi -L` must list a GPU")
    return BackendUnavailable("the NVIDIA driver finds no GPU",
                              "`nvidia-smi -L` must list one; start a container with `--gpus all`")


def _device_fails(error: Exception) -> BackendUnavailable:
    return BackendUnavailable(f"the GPU fails ({_one_line(error)})",
                              "`nvidia-smi` must show it healthy; after an update of the driver, reboot")


# ---- small questions

def _cupy_packages() -> dict[str, str]:
    """The installed distributions that provide `cupy`, with their versions; there must be no more than one."""
    names = ["cupy", *(f"cupy-cuda{major}x" for major in range(11, 20)),
             "cupy-rocm-4-3", "cupy-rocm-5-0", "cupy-rocm-7-0", "cupy-rocm-7-1", "amd-cupy"]
    from importlib import metadata  # slow to import, and only a GPU's probe asks

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _driver_version() -> int:
    """The newest CUDA the NVIDIA driver supports, 13000 for 13.0, asked without CuPy; 0 where no driver answers."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _cuda_major(version: int) -> int:
    """The extra to install, cuda12 or cuda13, for a driver or CuPy of this CUDA version (0: unknown, the newest)."""
    return 12 if 0 < version < 13000 else 13


def _version(number: int) -> str:
    """CUDA's own numbering, spelled out: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _one_line(error: Exception) -> str:
    """An error in one short line. CuPy frames some of its own in banners, the cause after "Original error:"."""
    cause = str(error).rpartition("Original error:")[2].replace("=", " ")
    return textwrap.shorten(f"{type(error).__name__}: {cause}", width=160, placeholder=" ...")


# --------------------------------------------------------------------------------------------------- in words

def describe() -> str:
    """The state of both backends for a person to read: versions, threads, and what keeps the GPU from computing."""
    lines = [f"CPU: works, with NumPy {np.__version__}", f"  BLAS                {_blas()}"]
    status = cuda_status()
    lines.append("GPU: works, with CuPy" if status.available else "GPU: not used")
    lines += [f"  {name:<18}  {value}" for name, value in status.facts.items()]
    if not status.available:
        lines += [f"  reason              {status.reason}", f"  to mend it          {status.cure}"]
    return "\n".join(lines)


def _blas() -> str:
    """NumPy's BLAS, its version and threads; Apple's Accelerate tells neither, and is known from NumPy's build."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    pools.sort(key=lambda pool: "numpy" not in pool["filepath"])  # SciPy and others may have brought their own
    if pools:
        return f"{pools[0]['internal_api']} {pools[0]['version']}, {pools[0]['num_threads']} threads on {cores} cores"
    build: Any = np.show_config(mode="dicts")
    return f"{build['Build Dependencies']['blas']['name']}, {cores} cores"
