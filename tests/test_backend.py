"""Which library owns an array, moving arrays, and what the probe of the GPU makes of every way CuPy can fail."""
import importlib.metadata
import subprocess
import sys
import timeit
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import standin

from minicnn import backend
from minicnn.backend import BackendUnavailable

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No adopted library, nothing probed, nothing said yet, no CuPy in sight; all put back afterwards."""
    monkeypatch.setattr(backend, "_libraries", {"cpu": backend._libraries["cpu"]})
    monkeypatch.setattr(backend, "_owners", {})
    monkeypatch.setattr(importlib.metadata, "version", versions())
    monkeypatch.setattr(backend, "_driver_version", lambda: 0)
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ModuleNotFoundError, as if not installed
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    caches = (backend.cuda_status, backend._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def adopted():
    backend.adopt(standin, "standin")
    return standin.asarray(X)


def versions(**packages):
    """importlib.metadata.version of an environment with these packages (underscores for hyphens) and no other CuPy."""
    installed = {name.replace("_", "-"): version for name, version in packages.items()}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]
    return version


# ---------------------------------------------------------------- whose array is this?

def test_the_arrays_choose_the_library(adopted):
    assert backend.array_module(X) is np
    assert backend.array_module(X, None, 2.0, X, np.float32(3)) is np
    assert backend.array_module() is np
    assert backend.array_module(None, 1) is np
    assert backend.array_module(adopted) is standin
    assert backend.array_module(None, adopted, 2, adopted) is standin


def test_two_libraries_in_one_operation_are_refused(adopted):
    for arrays in ((X, adopted), (X, None, adopted)):
        with pytest.raises(TypeError) as error:
            backend.array_module(*arrays)
        message = str(error.value)
        for part in ("'cpu' (numpy)", "'standin' (standin)", "must share a device", 't.to("cpu")', 't.to("standin")'):
            assert part in message
        assert "\n" not in message


def test_what_is_an_array(adopted):
    assert backend.is_array(X)
    assert backend.is_array(adopted)
    assert backend.is_array(np.ma.masked_array([1.0]))  # subclasses too
    for value in (None, 1.0, [1.0], np.float32(1), "x", standin, np):
        assert not backend.is_array(value)


def test_asking_costs_well_under_a_microsecond():
    def seconds(*arrays):
        return min(timeit.repeat(lambda: backend.array_module(*arrays), number=2000, repeat=20)) / 2000

    assert seconds(X, X) < 1e-6


def test_a_library_adopted_late_is_recognised_at_once():
    array = standin.asarray(X)
    assert not backend.is_array(array)
    backend.adopt(standin, "standin")
    assert backend.device_of(array) == "standin"
    backend.adopt(standin, "standin")  # again: nothing new


def test_arrays_lie_in_memory_after_a_move_as_they_did_before():
    """A copy between libraries has the axes in their order by itself; filters would then be copied before every use."""
    backend.adopt(standin, "standin")
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    for array in (x, x.transpose(0, 3, 1, 2), x.transpose(3, 2, 0, 1), x[:, :, ::2], x[0, 0], x.T[:, :0]):
        there = backend.to_device(array, "standin")
        back = backend.to_numpy(there)
        np.testing.assert_array_equal(back, array)
        if array.size == x.size:
            assert there.strides == back.strides == array.strides


@pytest.mark.parametrize("name", ["cpu", "cuda", "auto"])
def test_a_taken_device_name_cannot_be_adopted(name):
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        backend.adopt(standin, name)


def test_cupy_is_recognised_without_being_imported(monkeypatch):
    assert backend.device_of(X) == "cpu"
    cupy = fake_cupy()
    array = cupy.ndarray(X)
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # somebody else has imported it
    monkeypatch.setattr(importlib, "import_module", None)
    assert backend.array_module(array) is cupy
    assert backend.device_of(array) == "cuda"
    np.testing.assert_array_equal(backend.to_numpy(array), X)
    with pytest.raises(TypeError, match=r"'cpu' \(numpy\) and another on 'cuda' \(cupy\)"):
        backend.array_module(X, array)


def test_a_half_imported_cupy_does_no_harm(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    assert backend.array_module(X, 1.0) is np


def test_importing_and_computing_import_no_cupy():
    program = ("import sys; from minicnn import backend; import numpy as np; backend.array_module(np.ones(2));"
               "backend.to_device(np.ones(2), 'cpu'); assert 'cupy' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------- moving arrays

def test_round_trips(adopted):
    there = backend.to_device(X, "standin")
    assert backend.device_of(there) == "standin"
    back = backend.to_device(there, "cpu")
    assert type(back) is np.ndarray
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, X)
    there[0] = -1.0
    back[1] = -2.0
    assert X[0, 1] == 1  # both are copies
    assert backend.to_numpy(there)[1, 0] == 3


def test_an_array_that_is_there_already_comes_back_itself(adopted):
    assert backend.to_device(X, "cpu") is X
    assert backend.to_device(X, "auto") is X
    assert backend.to_device(adopted, "standin") is adopted
    assert backend.to_numpy(X) is X


@pytest.mark.parametrize("move", [backend.to_numpy, backend.device_of, lambda value: backend.to_device(value, "cpu")])
@pytest.mark.parametrize("value", [None, 1.0, [1.0], np.float64(1)])
def test_only_arrays_move(move, value):
    with pytest.raises(TypeError, match=rf"not {type(value).__name__}: make one with np.asarray"):
        move(value)


@pytest.mark.parametrize("device", ["gpu", "cuda:0", "", None, "CPU"])
def test_unknown_devices(device, adopted):
    with pytest.raises(ValueError, match='choose one of "auto", "cuda", "cpu", "standin"'):
        backend.to_device(X, device)


def test_resolving_names(adopted):
    assert backend.resolve_device("cpu") == "cpu"
    assert backend.resolve_device("standin") == "standin"


# ---------------------------------------------------------------- the probe, branch by branch

class CUDARuntimeError(RuntimeError):
    """As CuPy's: a RuntimeError with the number of CUDA's error."""

    def __init__(self, status):
        texts = {35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
                 100: "cudaErrorNoDevice: no CUDA-capable device is detected", 999: "cudaErrorUnknown: unknown error"}
        super().__init__(texts[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class CompileException(Exception):
    """As CuPy's, which is no RuntimeError."""


class DynamicLibNotFoundError(RuntimeError):
    """As the one of cuda.pathfinder, through which CuPy looks for NVRTC."""


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


def fake_cupy(driver=13000, built_for=13020, devices=1, capability=(9, 0), ones=None, memory=None):
    """A module `cupy` as far as the probe looks; a number or an array may be an exception, which is then raised."""
    def give(value):
        if isinstance(value, Exception):
            raise value
        return value

    class Array:
        ndim = 0

        def __init__(self, host):
            self.host = host

        def get(self):
            return self.host

        def transpose(self, *axes):
            return self

        def __matmul__(self, other):
            return Array(give(ones) if ones is not None else self.host @ other.host)

        def sum(self):
            return self.host.sum()

    cupy = ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.ndarray = Array
    cupy.asarray = Array
    cupy.ones = lambda shape, dtype: Array(np.ones(shape, dtype))
    properties = {"name": b"NVIDIA H200", "major": capability[0], "minor": capability[1]}
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError, driverGetVersion=lambda: driver, runtimeGetVersion=lambda: built_for,
            getDeviceCount=lambda: give(devices), getDevice=lambda: 0, getDeviceProperties=lambda device: properties,
            memGetInfo=lambda: give(memory or (2**36, 2**37))),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError))
    return cupy


@pytest.fixture
def machine(monkeypatch):
    """Put a machine together: the packages installed, what `import cupy` gives, the driver; returns its Status."""
    def build(cupy=None, /, driver=0, **packages):
        monkeypatch.setattr(importlib.metadata, "version", versions(**packages))
        monkeypatch.setattr(backend, "_driver_version", lambda: driver)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        if isinstance(cupy, Exception):
            monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(cupy))
        backend.cuda_status.cache_clear()
        return backend.cuda_status()
    return build


def check(status, reason, cure, *, installed=True):
    assert not status.available
    assert status.installed == installed
    assert reason in status.reason
    assert cure in status.cure
    assert "\n" not in status.reason + status.cure
    with pytest.raises(BackendUnavailable) as error:
        backend.to_device(X, "cuda")
    for part in (reason, cure):
        assert part in str(error.value)


CUDA12, CUDA13 = 'pip install "cupy-cuda12x[ctk]"', 'pip install "cupy-cuda13x[ctk]"'


@pytest.mark.parametrize(("driver", "cure"), [
    (0, f"nothing to do without an NVIDIA GPU; with one, install its driver, then {CUDA13}"), (13000, CUDA13),
    (12040, CUDA12), (11080, "update the driver")])
def test_not_installed(machine, driver, cure):
    check(machine(driver=driver), "CuPy is not installed", cure, installed=False)


def test_two_packages_at_once(machine):
    status = machine(fake_cupy(), driver=12080, cupy_cuda12x="13.6.0", cupy_cuda13x="14.2.0")
    check(status, "2 CuPy packages are installed at once (cupy-cuda12x, cupy-cuda13x)",
          f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {CUDA12}")
    assert status.facts["CuPy"] == "13.6.0 (cupy-cuda12x), 14.2.0 (cupy-cuda13x)"


@pytest.mark.parametrize("error", [
    ImportError("\n====\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libnvrtc: cannot open\n====\n"),
    ModuleNotFoundError("No module named 'cupy._core'", name="cupy._core"),
    ModuleNotFoundError("No module named 'cupy'", name="cupy")])
def test_an_installation_that_cannot_be_imported(machine, error):
    status = machine(error, cupy_cuda13x="14.2.0")
    check(status, "CuPy cannot be imported (", f"pip uninstall -y cupy-cuda13x && {CUDA13}")
    assert "===" not in status.reason
    assert "Failed to import" not in status.reason


def test_a_folder_that_an_uninstalled_cupy_left_behind(machine):
    check(machine(ModuleType("cupy")), "CuPy cannot be imported (AttributeError", CUDA13)


def test_no_driver(machine):
    status = machine(fake_cupy(driver=0, devices=CUDARuntimeError(35)), cupy_cuda13x="14.2.0")
    check(status, "no NVIDIA driver answers", "install the driver")
    assert status.facts == {"CuPy": "14.2.0 (cupy-cuda13x)", "CUDA of CuPy": "13.2"}


def test_driver_too_old(machine):
    check(machine(fake_cupy(driver=12040), cupy_cuda13x="14.2.0"),
          "the NVIDIA driver supports CUDA 12.4, too old for this CuPy, built for 13.2",
          f"pip uninstall -y cupy-cuda13x && {CUDA12} or update the driver")
    status = machine(fake_cupy(driver=11080, built_for=12090), cupy_cuda12x="14.2.0")
    check(status, "supports CUDA 11.8", "update the driver")
    assert "pip" not in status.cure  # there is no older CuPy to offer


def test_driver_too_old_by_its_own_account(machine):
    status = machine(fake_cupy(devices=CUDARuntimeError(35)), cupy_cuda13x="14.2.0")
    check(status, "too old for this CuPy", "update the driver")


def test_a_driver_newer_than_cupy_or_older_within_its_major_version_will_do(machine):
    assert machine(fake_cupy(driver=13000, built_for=12090), cupy_cuda12x="14.2.0").available
    assert machine(fake_cupy(driver=13000, built_for=13020), cupy_cuda13x="14.2.0").available


@pytest.mark.parametrize("devices", [0, CUDARuntimeError(100)])
def test_no_device(machine, monkeypatch, devices):
    check(machine(fake_cupy(devices=devices), cupy_cuda13x="14.2.0"), "driver finds no GPU", "`nvidia-smi -L`")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    status = machine(fake_cupy(devices=devices), cupy_cuda13x="14.2.0")
    check(status, "CUDA_VISIBLE_DEVICES being ''", "`unset CUDA_VISIBLE_DEVICES`")


def test_a_device_that_fails(machine):
    for where in ("devices", "ones", "memory"):
        status = machine(fake_cupy(**{where: CUDARuntimeError(999)}), cupy_cuda13x="14.2.0")
        check(status, "the GPU fails (CUDARuntimeError: cudaErrorUnknown: unknown error)", "reboot")
    error = CUDADriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    check(machine(fake_cupy(ones=error)), "the GPU fails (CUDADriverError", "reboot")
    check(machine(fake_cupy(ones=np.zeros((2, 2)))), "the GPU fails (ArithmeticError", "reboot")


def test_a_device_older_than_cuda_13(machine):
    status = machine(fake_cupy(capability=(7, 0)), cupy_cuda13x="14.2.0")
    check(status, "(compute capability 7.0) is older than CUDA 13", f"pip uninstall -y cupy-cuda13x && {CUDA12}")
    assert machine(fake_cupy(capability=(7, 0), built_for=12090), cupy_cuda12x="14.2.0").available


@pytest.mark.parametrize("error", [
    ImportError('Failure finding "libcublasLt.so.13 or libcublasLt.so.12": No such file: libcublasLt.so.13\n'),
    DynamicLibNotFoundError('Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13\n'),
    RuntimeError("CuPy failed to find the CUDA headers"), CompileException("cannot open source file cuda_fp16.h")])
def test_toolkit_libraries_missing(machine, error):
    status = machine(fake_cupy(ones=error), cupy_cuda13x="14.2.0")
    check(status, "libraries of the CUDA toolkit are missing (", CUDA13)
    assert status.cure == CUDA13  # its own package stays; the extra brings the libraries
    assert str(error).strip()[:60] in status.reason
    assert machine(fake_cupy(ones=error, built_for=12090), cupy_cuda12x="14.2.0").cure == CUDA12
    assert machine(fake_cupy(ones=error), cupy="14.2.0").cure == f"pip uninstall -y cupy && {CUDA13}"


def test_memory_full(machine):
    check(machine(fake_cupy(ones=OutOfMemoryError("Out of memory allocating 512 bytes")), cupy_cuda13x="14.2.0"),
          "the GPU's memory is full", "`nvidia-smi`")


def test_whatever_else_fails_leaves_the_cpu_usable(machine):
    cupy = fake_cupy()
    del cupy.cuda.runtime.memGetInfo
    check(machine(cupy, cupy_cuda13x="14.2.0"), "CuPy fails in an unknown way (AttributeError", "cupy.show_config()")


def test_works(machine):
    status = machine(fake_cupy(), cupy_cuda13x="14.2.0")
    assert status.available
    assert (status.reason, status.cure) == ("", "")
    assert status.facts == {"CuPy": "14.2.0 (cupy-cuda13x)", "CUDA of CuPy": "13.2", "CUDA of the driver": "13.0",
                            "device": "NVIDIA H200, compute capability 9.0, 128.0 GiB"}
    assert backend.resolve_device("auto") == backend.resolve_device("cuda") == "cuda"
    there = backend.to_device(X, "auto")
    assert backend.device_of(there) == "cuda"
    assert backend.to_device(there, "cuda") is there
    np.testing.assert_array_equal(backend.to_device(there, "cpu"), X)


def test_the_probe_runs_once(machine, monkeypatch):
    status = machine(fake_cupy(), cupy_cuda13x="14.2.0")
    monkeypatch.setattr(importlib, "import_module", None)
    assert backend.cuda_status() is status


# ---------------------------------------------------------------- what is said, and how often

def test_auto_says_once_why_an_installed_cupy_is_not_used(machine):
    machine(fake_cupy(driver=0), cupy_cuda13x="14.2.0")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [backend.resolve_device("auto") for _ in range(3)] == ["cpu"] * 3
    assert len(said) == 1
    assert said[0].category is RuntimeWarning
    assert "no NVIDIA driver answers" in str(said[0].message)
    assert "To mend it: install the driver" in str(said[0].message)
    assert said[0].filename == __file__


def test_auto_is_silent_where_no_cupy_is_installed_or_it_works(machine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine()
        assert backend.resolve_device("auto") == "cpu"
        machine(fake_cupy(), cupy_cuda13x="14.2.0")
        assert backend.resolve_device("auto") == "cuda"


def test_description_of_a_machine_without_a_gpu(machine):
    machine()
    lines = backend.describe().splitlines()
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 140
    text = "\n".join(lines)
    assert lines[0] == f"CPU: works, with NumPy {np.__version__}"
    assert "BLAS" in text
    assert "threads on" in text or "cores" in text
    assert "GPU: not used" in text
    assert "reason              CuPy is not installed" in text
    assert "to mend it          nothing to do without an NVIDIA GPU" in text


def test_description_of_a_machine_with_a_gpu(machine):
    machine(fake_cupy(), cupy_cuda13x="14.2.0")
    text = backend.describe()
    assert "GPU: works, with CuPy" in text
    assert "device              NVIDIA H200, compute capability 9.0, 128.0 GiB" in text
    assert "reason" not in text


def pool(user_api, folder, internal_api, threads):
    return {"user_api": user_api, "filepath": f"/{folder}/lib.so", "internal_api": internal_api, "version": "2.0",
            "num_threads": threads}


@pytest.mark.parametrize(("pools", "said"), [
    ([pool("openmp", "numpy.libs", "openmp", 9), pool("blas", "scipy.libs", "openblas", 7),
      pool("blas", "numpy.libs", "mkl", 4)], "mkl 2.0, 4 threads on"),
    ([], "cores")])
def test_the_blas_named_is_numpys(monkeypatch, pools, said):
    monkeypatch.setattr(backend.threadpoolctl, "threadpool_info", lambda: pools)
    assert said in backend.describe()


def test_the_driver_is_asked_without_cupy(monkeypatch):
    monkeypatch.undo()  # the real question, and no answer where there is no driver

    def library(version):
        def ask(pointer):
            pointer._obj.value = version
        return lambda name: SimpleNamespace(cuDriverGetVersion=ask)

    assert backend._driver_version() in {0, *range(9000, 20000)}
    monkeypatch.setattr(backend.ctypes, "CDLL", library(12080))
    assert backend._driver_version() == 12080

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")
    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert backend._driver_version() == 0


# ---------------------------------------------------------------- the real CuPy

@pytest.fixture
def real_cupy(monkeypatch):
    monkeypatch.undo()
    backend.cuda_status.cache_clear()
    backend._warn_once.cache_clear()
    return pytest.importorskip("cupy", reason="needs an installed CuPy, not a GPU")


def test_the_real_cupy_has_what_the_probe_asks_for(real_cupy):
    runtime, driver = real_cupy.cuda.runtime, real_cupy.cuda.driver
    assert issubclass(runtime.CUDARuntimeError, RuntimeError)
    assert issubclass(driver.CUDADriverError, RuntimeError)
    assert runtime.CUDARuntimeError(100).status == 100
    assert str(runtime.CUDARuntimeError(100)) == str(CUDARuntimeError(100))
    assert str(runtime.CUDARuntimeError(35)) == str(CUDARuntimeError(35))
    assert issubclass(real_cupy.cuda.memory.OutOfMemoryError, MemoryError)
    for name in ("getDeviceCount", "getDevice", "getDeviceProperties", "memGetInfo"):
        assert callable(getattr(runtime, name))
    assert runtime.runtimeGetVersion() // 1000 in (12, 13)


def test_the_real_cupy_without_a_driver(real_cupy):
    if real_cupy.cuda.runtime.driverGetVersion() != 0:
        pytest.skip("this machine has an NVIDIA driver")
    status = backend.cuda_status()
    assert not status.available
    assert status.reason == "no NVIDIA driver answers on this machine"
    assert status.facts["CuPy"].startswith(real_cupy.__version__)
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        backend.to_device(X, "cuda")


@pytest.mark.gpu
def test_the_real_cupy_on_a_gpu(real_cupy):
    status = backend.cuda_status()
    if not status.available:
        pytest.skip(status.reason)
    there = backend.to_device(X, "cuda")
    assert backend.array_module(there) is real_cupy
    np.testing.assert_array_equal(backend.to_numpy(there), X)
    with pytest.raises(TypeError, match="must share a device"):
        backend.array_module(X, there)
