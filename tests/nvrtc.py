"""NVIDIA's run-time compiler, which CuPy compiles with, called by itself: it needs no GPU and no driver."""
from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

FLAGS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")         # as CuPy compiles a RawModule with --std=c++17


@functools.cache
def compiler() -> ctypes.CDLL | None:
    """The compiler of the package nvidia-cuda-nvrtc, if it is installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*") if "builtins" not in path.name)
    return ctypes.CDLL(str(found[-1])) if found else None


def architectures() -> list[int]:
    """The compute capabilities that it compiles for: 75 for 7.5."""
    nvrtc, count = compiler(), ctypes.c_int()
    assert nvrtc is not None
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(found)
    return list(found)


def compiled(code: str, architecture: int, *flags: str) -> tuple[int, str]:
    """The size of the machine code in bytes, 0 where the compiler refuses; and what it says, warnings too."""
    nvrtc, program = compiler(), ctypes.c_void_p()
    assert nvrtc is not None
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
    options = [option.encode() for option in (*FLAGS, *flags, f"-arch=sm_{architecture}")]
    refused = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if not refused:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return (0 if refused else size.value), log.value.decode().strip()
