"""What every test may ask for: the devices, and how many examples hypothesis tries."""
import os
import signal

# Some tests press Ctrl-C, and what a script starts in the background is deaf to it, as are the processes it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread for each test process, and for what it starts: small products gain nothing from a second one, and where several
# processes share the cores, threads that wait for each other cost more than they compute. Before NumPy is loaded.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import hostcuda

if hostcuda.wanted():           # before anything imports CuPy
    hostcuda.install()

import cushim
import hypothesis
import pytest
import standin
from witnesses import Device

import minicnn as mc
from minicnn import backend

backend.adopt(standin, "standin")
if cushim.compiler():
    backend.adopt(cushim.with_cuda(), "cushim")

# HYPOTHESIS_PROFILE=thorough pytest      many more examples, and others in every run
hypothesis.settings.register_profile("default", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

NO_COMPILER = pytest.mark.skipif(cushim.compiler() is None, reason="no g++ to compile the CUDA kernels for the CPU with")
DEVICES = ["cpu", "standin", pytest.param("cushim", marks=[pytest.mark.slow, NO_COMPILER]),
           pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    """Where a test's arrays live: NumPy, the stand-in for CuPy, with the CUDA kernels compiled by g++ too (`-m slow`), and CuPy
    itself (`-m gpu`)."""
    return Device(request.param)


@pytest.fixture(params=[1, 2, 3], scope="module")
def threads(request):
    """On how many threads the kernels run during a test; afterwards on as many as before."""
    before = mc.get_num_threads()
    mc.set_num_threads(request.param)
    yield request.param
    mc.set_num_threads(before)


def pytest_runtest_setup(item):
    """Tests marked gpu need a GPU that works; the skip says why there is none."""
    if item.get_closest_marker("gpu"):
        status = backend.cuda_status()
        if not status.available:
            pytest.skip(f"{status.reason}. To mend it: {status.cure}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """MINICNN_REQUIRE_GPU=1: a GPU test that was skipped, for whatever reason, has failed."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and os.environ.get("MINICNN_REQUIRE_GPU") == "1":
        report.outcome = "failed"
        why = call.excinfo.value if call.excinfo else "skipped"
        report.longrepr = f"MINICNN_REQUIRE_GPU=1, and this GPU test did not run: {why}"
    return report
