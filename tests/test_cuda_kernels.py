"""The CUDA kernels without a GPU: compiled by NVIDIA's compiler for every GPU in use, run by g++ against the portable kernels.

And with one (`-m gpu`), run on it against the portable kernels. The engine's whole suite runs on them too, as the device "cushim"
(`-m slow`) and "cuda" (`-m gpu`).
"""
from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import cuda_cases
import cushim
import numpy as np
import nvrtc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicnn as mc
from minicnn import backend, kernels
from minicnn.kernels import cuda, precision
from minicnn.kernels.cuda import gemm as gemm_module
from minicnn.kernels.cuda import source
from minicnn.kernels.cuda.cublas import Direct
from minicnn.kernels.cuda.gemm import gemm
from minicnn.kernels.cuda.launch import launch, run
from minicnn.kernels.windows import Windows

HERE = Path(__file__).parent
FILES = source.files()
needs_compiler = pytest.mark.skipif(cushim.compiler() is None, reason="no g++ to compile the CUDA kernels for the CPU with")
needs_nvrtc = pytest.mark.skipif(nvrtc.compiler() is None, reason='no NVRTC: pip install "minicnn[nvrtc]"')


@pytest.fixture(params=[pytest.param("cushim", marks=needs_compiler), pytest.param("cuda", marks=pytest.mark.gpu)])
def where(request):
    """A device that runs the kernels."""
    return request.param


def put(array, device="cushim"):
    return backend.to_device(np.asarray(array), device)


# ---------------------------------------------------------------- the sources
@needs_nvrtc
@pytest.mark.parametrize("real, stored", [("float", "float"), ("double", "double"), ("float", "fp16"), ("float", "bf16")])
@pytest.mark.parametrize("file", FILES)
def test_nvidias_compiler_takes_every_source_without_a_word(file, real, stored):
    """For Turing, Ampere, Hopper, and Blackwell where this compiler knows it."""
    wanted = [75, 80, 90, *(a for a in (100,) if a in nvrtc.architectures())]
    for architecture in wanted:
        size, log = nvrtc.compiled(source.text(file), architecture, f"-DREAL={real}", f"-DSTORED={stored}")
        assert size > 0 and not log, f"sm_{architecture}: {log}"


@needs_nvrtc
def test_nvidias_compiler_refuses_what_is_wrong():
    assert nvrtc.compiled('extern "C" __global__ void k(float* x) { x[0] = nothing; }', 90)[0] == 0


def test_the_kernels_are_plain():
    """What g++ could not run here, or would not be the same every time: none of it, but for the exceptions, which a GPU alone runs
    (here the header of the shim has them in C++)."""
    words = r"__shfl|__half|bfloat|extern __shared__|\basm\b|atomic|__ldg|wmma|<<<|#include <"
    exceptions = ['asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));', 'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));']
    for file in FILES:
        text = re.sub("//.*", "", source.text(file))
        for exception in exceptions:
            assert text.count(exception) == 1
            text = text.replace(exception, "")
        assert not re.findall(words, text), file


def test_what_a_kernel_takes_is_read_off_its_declaration():
    found = source.signatures("normalization")["moments"]
    assert [(p.kind, p.name) for p in found][:3] == [("real*", "partial"), ("stored*", "x"), ("real*", "weight")]
    assert [(p.kind, p.name) for p in found][-2:] == [("int", "chunks"), ("real", "eps")]
    kinds = {p.kind for file in FILES for parameters in source.signatures(file).values() for p in parameters}
    assert kinds == {"stored*", "StoredFour*", "real*", "Four*", "real**", "int*", "long long*", "real", "int", "long long"}
    for file in FILES:      # none is missed
        assert len(source.signatures(file)) == source.text(file).count("__global__") > 0


def test_every_fast_kernel_has_a_portable_one_of_the_same_parameters_and_the_other_way_round():
    pairs = 0
    for info in pkgutil.iter_modules(cuda.__path__):
        fast = importlib.import_module(f"{cuda.__name__}.{info.name}")
        if importlib.util.find_spec(f"{kernels.__name__}.{info.name}") is None:
            continue                                                    # source, launch, gemm
        portable = importlib.import_module(f"{kernels.__name__}.{info.name}")
        marked = {name for name, f in vars(portable).items() if hasattr(f, "__wrapped__") and f.__module__ == portable.__name__
                  and getattr(f, "__code__", None) and f.__code__.co_name == "chosen"}
        for name in marked:
            assert inspect.signature(getattr(fast, name)) == inspect.signature(getattr(portable, name)), (info.name, name)
            assert getattr(fast, name).__module__ == fast.__name__, (info.name, name)
            pairs += 1
    assert pairs >= 15


def test_the_hash_knows_every_file(tmp_path, monkeypatch):
    before = source.digest()
    for path in source.FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(source, "FOLDER", tmp_path)
    assert source.digest() == before
    for name in ("loss.cu", "common.cuh", "gemm.py"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + " ")
        assert source.digest() != before
        (tmp_path / name).write_text(text)


def test_winograds_constants_are_those_of_the_portable_kernel():
    from minicnn.kernels.winograd import POINTS
    numbers = {name: eval(value.replace("real", "float")) for name, value in
               re.findall(r"#define (A|B) \((real\(\d\) / \d)\)", source.text("winograd"))}
    assert (0.0, numbers["A"], -numbers["A"], numbers["B"], -numbers["B"]) == POINTS


# ---------------------------------------------------------------- the kernels
@pytest.mark.parametrize("limits", ["as it is", "small"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", cuda_cases.CASES)
def test_against_the_portable_kernel(where, name, dtype, limits):
    if limits == "small":
        with cuda_cases.small():
            cuda_cases.CASES[name](where, dtype)
    else:
        cuda_cases.CASES[name](where, dtype)


@pytest.mark.parametrize("limits", ["as it is", "small"])
@pytest.mark.parametrize("dtype", cuda_cases.halves(), ids=str)
@pytest.mark.parametrize("name", cuda_cases.OF_HALF)
def test_half_precision_against_the_portable_kernel_in_float32(where, name, dtype, limits):
    with cuda_cases.small() if limits == "small" else contextlib.nullcontext():
        cuda_cases.CASES[name](where, dtype)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), *cuda_cases.halves()], ids=str)
def test_arrays_that_begin_anywhere_are_read_by_fours_only_where_a_gpu_can(where, dtype):
    """A device stops where numbers that are read at once do not begin at a multiple of their size; so does the stand-in."""
    numbers, channel = np.arange(-40, 60).astype(dtype), np.ones(8, backend.real_of(dtype))
    for start in range(9):
        x = put(numbers, where)[start:start + 64].reshape(1, 2, 4, 8).transpose(0, 3, 1, 2)
        positive = numbers[start:start + 64].astype(float).clip(0)
        for y in (kernels.elementwise.relu(x), kernels.elementwise.relu_grad(x, x), kernels.elementwise.add_relu(x, x) * 0.5):
            assert backend.to_numpy(y).transpose(0, 2, 3, 1).ravel().tolist() == positive.tolist()
        shift = put(np.concatenate([np.zeros(start % 4, channel.dtype), channel]), where)[start % 4:]
        y = backend.to_numpy(kernels.normalization.channel_affine(x, put(channel, where), shift))
        assert y.transpose(0, 2, 3, 1).ravel().tolist() == (numbers[start:start + 64].astype(float) + 1).tolist()
        patches = kernels.im2col.convolve(x.transpose(0, 2, 3, 1), put(np.eye(8, dtype=dtype).reshape(1, 1, 8, 8), where), None,
                                          Windows.of(1, 2))
        assert backend.to_numpy(patches).ravel().tolist() == numbers[start:start + 64].reshape(2, 4, 8)[::2, ::2].ravel().tolist()


def test_the_same_bits_every_time(where):
    rng = np.random.default_rng(0)
    x, dy = (put(rng.standard_normal((3, 20, 9, 8)).astype(np.float32), where) for _ in range(2))
    weight = put(np.ones(20, np.float32), where)
    filters = put(rng.standard_normal((8, 20, 3, 3)).astype(np.float32), where)
    for algorithm in ("im2col", "winograd"):
        runs = []
        for _ in range(3):
            y, mean, var = kernels.normalization.normalize(x, weight, weight, 1e-5)
            z = kernels.conv.conv2d(y, filters, None, Windows.of(3, 1, 1), 1, algorithm)
            runs.append([backend.to_numpy(a).tobytes() for a in (
                y, z, kernels.conv.conv2d_weight_grad(x, z, Windows.of(3, 1, 1), 1, algorithm),
                kernels.conv.conv2d_input_grad(z, filters, (9, 8), Windows.of(3, 1, 1), 1, algorithm),
                *kernels.normalization.normalize_grad(dy, x, weight, mean, var, 1e-5, True))])
        assert runs[0] == runs[1] == runs[2]


@needs_compiler
def test_columns_do_not_grow_with_the_batch(monkeypatch):
    """However many images, no array is larger than the limit, but for the input and the result."""
    from minicnn.kernels.cuda import im2col, winograd
    monkeypatch.setattr(im2col, "COLUMN_BYTES", 4 * 9 * 4 * 64 * 4)             # of four images
    monkeypatch.setattr(winograd, "SPECTRUM_BYTES", 4 * 36 * 4 * 12 * 4)        # of four images
    library = sys.modules["standin_with_cuda"]
    made, empty = [], library.empty
    monkeypatch.setattr(library, "empty", lambda shape, dtype: made.append(4 * int(np.prod(shape))) or empty(shape, dtype),
                        raising=False)
    for n in (8, 40):
        x, filters = put(np.ones((n, 4, 8, 8), np.float32)), put(np.ones((8, 4, 3, 3), np.float32))
        made.clear()
        for algorithm in ("im2col", "winograd"):
            y = kernels.conv.conv2d(x, filters, None, Windows.of(3, 1, 1), 1, algorithm)
            kernels.conv.conv2d_weight_grad(x, y, Windows.of(3, 1, 1), 1, algorithm)
            kernels.conv.conv2d_input_grad(y, filters, (8, 8), Windows.of(3, 1, 1), 1, algorithm)
        within = [size for size in made if size not in (y.nbytes, x.nbytes)]
        assert within and max(within) <= 2 * im2col.COLUMN_BYTES


# ---------------------------------------------------------------- launches
@needs_compiler
def test_an_argument_that_does_not_fit_is_refused():
    x, out = put(np.ones((2, 8), np.float32)), put(np.ones((2, 8), np.float32))

    def start(*, x=x, out=out, count=16, rectified=1, more=()):
        launch("elementwise", "affine", 1, (32, 8), x, None, None, None, out, count, 8, 8, rectified, *more)

    start()
    for wrong, error, words in [
            ({"more": (3,)}, TypeError, "affine takes 9 arguments, not 10: x, scale, shift"),
            ({"out": put(np.ones((2, 8)))}, TypeError, "out takes an array of float32, not of float64"),
            ({"out": 7}, TypeError, r"out is a pointer \(stored\*\) and takes an array, not int"),
            ({"out": np.ones((2, 8), np.float32)}, TypeError, "out takes an array of standin_with_cuda, not of numpy"),
            ({"out": np.ones((2, 8), np.float32).T}, ValueError, "does not lie in one piece"),
            ({"x": put(np.ones((8, 2), np.float32)).T}, ValueError, r"x \(2, 8\) does not lie in one piece"),
            ({"rectified": 1 << 31}, ValueError, "rectified=2147483648 is too large for a 32-bit integer"),
            ({"rectified": 1.0}, TypeError, "rectified takes an integer, not 1.0"),
            ({"count": None}, TypeError, "count takes an integer, not None"),
            ({"rectified": [1]}, TypeError, "affine: numbers expected behind its pointers: unhashable")]:
        with pytest.raises(error, match=words):
            start(**wrong)
    with pytest.raises(TypeError, match="labels takes an array of int64, not of int32"):
        launch("loss", "losses", 1, 128, x, put(np.zeros(2, np.int32)), out, 2, 8, 0.0)
    with pytest.raises(TypeError, match="smoothing takes a number, not None"):
        launch("loss", "losses", 1, 128, x, put(np.zeros(2, np.int64)), out, 2, 8, None)
    with pytest.raises(TypeError, match="overflows takes [0-9]+ arguments, not 1"):      # all of them pointers
        run(backend.array_module(x), np.dtype(np.float32), "update", "overflows", 1, 256, out)


def test_every_kernel_takes_its_pointers_first():
    """Launches rely on it: they hand over arrays up to the last pointer, and numbers from there on."""
    for file in source.files():
        for kernel, parameters in source.signatures(file).items():
            assert [p.pointer for p in parameters] == sorted((p.pointer for p in parameters), reverse=True), kernel


@needs_compiler
def test_numbers_reach_the_kernel_in_its_own_sizes():
    """A Python float would be passed as a double, and the kernel read half of it: a GPU compares no sizes, the stand-in does."""
    kernel = cushim.RawModule(code=source.text("normalization"), options=("-DREAL=float", "-DSTORED=float")).get_function("follow")
    arrays = [put(np.ones(4, np.float32)) for _ in range(4)]
    kernel((1,), (32,), (*arrays, np.int32(4), np.float32(0.1), np.float32(1)))
    for wrong in ((4, np.float32(0.1), np.float32(1)), (np.int32(4), 0.1, np.float32(1))):
        with pytest.raises(TypeError, match="a GPU would not say so"):
            kernel((1,), (32,), (*arrays, *wrong))
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel((1,), (32,), (np.ones(4, np.float32), *arrays[1:], np.int32(4), np.float32(0.1), np.float32(1)))


@needs_compiler
def test_types_that_no_kernel_is_compiled_for_take_the_portable_way():
    x = put(np.array([[-1, 2]], np.int16))
    y = mc.ops.relu(x)
    assert y.dtype == np.int16 and backend.to_numpy(y).tolist() == [[0, 2]]


# ---------------------------------------------------------------- the product
def laid_out(draw, rng, dtype, rows, columns, stack):
    """A matrix, or a stack of them, by rows or by columns, a part of a larger one or not, or one matrix for the whole stack."""
    how, margin = draw(st.sampled_from(["rows", "columns", "shared", "gaps"])), draw(st.integers(0, 2))
    if how == "columns":
        whole = rng.standard_normal((*stack, columns + margin, rows + margin)).astype(dtype)
        return lambda move: move(whole)[..., margin:, margin:].swapaxes(-1, -2)
    whole = rng.standard_normal((*stack, rows + margin, 2 * columns + margin if how == "gaps" else columns + margin)).astype(dtype)
    if how == "gaps":
        return lambda move: move(whole)[..., margin:, margin::2]
    if how == "shared" and stack:
        return lambda move: (lambda a: np.broadcast_to(a, whole.shape) if move is np.asarray else
                             backend.array_module(a).broadcast_to(a, whole.shape))(move(whole[0]))[..., margin:, margin:]
    return lambda move: move(whole)[..., margin:, margin:]


@needs_compiler
@given(st.data())
def test_gemm_is_the_product_however_the_matrices_lie(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    m, k, n = (data.draw(st.integers(0, 5)) for _ in range(3))
    stack = data.draw(st.sampled_from([(), (1,), (3,)]))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    a, b = laid_out(data.draw, rng, dtype, m, k, stack), laid_out(data.draw, rng, dtype, k, n, stack)
    c = rng.standard_normal((*stack, m, n)).astype(dtype)
    accumulate = data.draw(st.booleans())
    expected = a(np.asarray) @ b(np.asarray) + (c if accumulate else 0)
    out = put(c) if accumulate or data.draw(st.booleans()) else None
    if out is not None and not accumulate and out.size:
        out[...] = np.nan                                               # what is not added to is not read
    result = gemm(a(put), b(put), out, accumulate=accumulate)
    assert out is None or result is out
    np.testing.assert_allclose(backend.to_numpy(result), expected, rtol=0, atol=1e-12 if dtype is np.float64 else 1e-5)


@needs_compiler
def test_gemm_reads_transposes_as_they_lie_and_makes_one_call_of_a_stack(monkeypatch):
    copies = []
    library = sys.modules["standin_with_cuda"]
    monkeypatch.setattr(library, "ascontiguousarray", lambda a: copies.append(a.shape) or a.copy())
    a, b = put(np.ones((7, 3, 5), np.float32)), put(np.ones((7, 3, 4), np.float32))
    cushim.RECORD.clear()
    gemm(a.transpose(0, 2, 1), b)
    gemm(a[0].T, b[0])
    gemm(b[1], put(np.ones((2, 4), np.float32)).T)
    assert copies == [] and [call[1:] for call in cushim.RECORD] == [(4, 5, 3, 7), (4, 5, 3, 1), (2, 3, 4, 1)]


@needs_compiler
def test_gemm_says_what_does_not_fit():
    a, b = put(np.ones((2, 3), np.float32)), put(np.ones((4, 2), np.float32))
    with pytest.raises(ValueError, match=r"gemm: a \(2, 3\) of float32 times b \(4, 2\) of float32"):
        gemm(a, b)
    with pytest.raises(ValueError, match=r"into \(2, 2\) of float64"):
        gemm(a, put(np.ones((3, 2), np.float32)), put(np.ones((2, 2))))
    with pytest.raises(ValueError, match="rows that lie in one piece"):
        gemm(a, put(np.ones((3, 4), np.float32)), put(np.ones((4, 2), np.float32)).T)


@needs_compiler
def test_precision_is_chosen_and_reaches_every_product():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((20, 20)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b
    try:
        errors = {}
        for name, compute in (("fp32", 68), ("tf32", 77)):
            mc.set_precision(name)
            assert mc.get_precision() == name
            cushim.RECORD.clear()
            errors[name] = np.abs(backend.to_numpy(mc.ops.matmul(put(a), put(b))) - exact).max()
            x, weight = put(np.ones((1, 4, 6, 6), np.float32)), put(np.ones((4, 4, 3, 3), np.float32))
            mc.ops.conv2d(x, weight, padding=1, algorithm="winograd")
            mc.ops.conv2d(x, weight, padding=1)
            assert {call[0] for call in cushim.RECORD} == {compute} and len(cushim.RECORD) == 3
            cushim.RECORD.clear()
            mc.ops.matmul(put(exact), put(exact))                       # float64 is float64
            assert [call[0] for call in cushim.RECORD] == [70]
        assert errors["fp32"] < 1e-5 < 1e-4 < errors["tf32"] < 1e-1 / 4
        with pytest.raises(ValueError, match="precision 'fp8': choose one of 'fp32', 'tf32', 'bf16', 'fp16'"):
            mc.set_precision("fp8")
    finally:
        mc.set_precision("fp32")


@needs_compiler
def test_a_1x1_convolution_copies_nothing(monkeypatch):
    from minicnn.kernels.cuda import im2col
    monkeypatch.setattr(im2col, "_gather", None)            # it would be called
    x, weight = put(np.ones((2, 3, 4, 4), np.float32)), put(np.ones((5, 3, 1, 1), np.float32))
    y = kernels.conv.conv2d(x, weight, None, Windows.of(1))
    kernels.conv.conv2d_input_grad(y, weight, (4, 4), Windows.of(1))
    kernels.conv.conv2d_weight_grad(x, y, Windows.of(1))


def test_cublas_numbers_are_cupys():
    cupy = pytest.importorskip("cupy", reason="needs an installed CuPy with cuBLAS, not a GPU")
    try:
        cublas = cupy.cuda.cublas
    except ImportError as error:
        pytest.skip(f"CuPy finds no cuBLAS: {error}")
    assert gemm_module.COMPUTE == {"f": cublas.CUBLAS_COMPUTE_32F, "d": cublas.CUBLAS_COMPUTE_64F, "e": cublas.CUBLAS_COMPUTE_32F,
                                   "E": cublas.CUBLAS_COMPUTE_32F}
    assert gemm_module.COMPUTE_TF32 == cublas.CUBLAS_COMPUTE_32F_FAST_TF32
    runtime = cupy.cuda.runtime
    assert gemm_module.DATA == {"f": runtime.CUDA_R_32F, "d": runtime.CUDA_R_64F, "e": runtime.CUDA_R_16F, "E": runtime.CUDA_R_16BF}
    for ours, theirs in ((cushim.gemm_ex, cublas.gemmEx), (cushim.gemm_strided_batched_ex, cublas.gemmStridedBatchedEx)):
        assert theirs.__doc__.count(",") == len(inspect.signature(ours).parameters) - 1


class Library:
    """cuBLAS's C functions, which the stand-in computes; what they are given comes as ctypes' numbers."""

    def __init__(self):
        self.streams = []

    def cublasSetStream_v2(self, handle, stream):       # noqa: N802 (cuBLAS's names)
        self.streams.append((handle.value, stream.value))
        return 0

    def cublasGemmEx(self, *arguments):                 # noqa: N802
        cushim.gemm_ex(*(a.value for a in arguments))
        return 0

    def cublasGemmStridedBatchedEx(self, *arguments):   # noqa: N802
        cushim.gemm_strided_batched_ex(*(a.value for a in arguments))
        return 0


@needs_compiler
def test_cublas_asked_for_past_cupy_is_given_the_same(monkeypatch):
    """As while a step is captured, for which CuPy calls no cuBLAS."""
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    direct = Direct(Library())
    monkeypatch.setattr(gemm_module, "cublas_of", lambda xp: direct.on(99))
    many, one = gemm(put(a), put(b).transpose(0, 2, 1)), gemm(put(a[0]).T, put(b[0]))
    np.testing.assert_allclose(backend.to_numpy(many), a @ b.transpose(0, 2, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(backend.to_numpy(one), a[0].T @ b[0], rtol=1e-5, atol=1e-6)
    assert direct.functions.streams == [(cushim.HANDLE, 99)] * 2
    direct.functions.cublasGemmEx = lambda *arguments: 13
    with pytest.raises(RuntimeError, match="cublasGemmEx answers with status 13"):
        gemm(put(a[0]), put(b[0]))


def test_the_cublas_of_cupy_is_found_and_has_the_functions():
    pytest.importorskip("cupy", reason="needs an installed CuPy with cuBLAS, not a GPU")
    from minicnn.kernels.cuda import cublas
    try:
        direct = cublas._direct()
    except Exception as error:                          # as the finder likes
        pytest.skip(f"no cuBLAS is found: {error}")
    with pytest.raises(RuntimeError, match="cublasSetStream_v2 answers with status 1"):     # there is no handle
        direct.on(0).gemmEx(*([0] * len(cublas.PRODUCT)))
    for name, kinds in (("cublasGemmEx", cublas.PRODUCT), ("cublasGemmStridedBatchedEx", cublas.PRODUCTS)):
        assert getattr(direct.functions, name)(*(kind(0) for kind in kinds)) == 1
    for theirs, ours in ((cushim.gemm_ex, cublas.PRODUCT), (cushim.gemm_strided_batched_ex, cublas.PRODUCTS)):
        assert len(inspect.signature(theirs).parameters) == len(ours)


def test_streams_and_graphs_are_cupys():
    cupy = pytest.importorskip("cupy", reason="needs an installed CuPy, not a GPU")
    for ours, theirs in ((cushim.Stream, cupy.cuda.Stream), (cushim.Graph, cupy.cuda.Graph), (cushim.Pool, cupy.cuda.MemoryPool)):
        names = {name for name in vars(ours) if not name.startswith("_") and callable(getattr(ours, name))}
        assert names - {"copy", "change"} <= {*dir(theirs)} and names, ours
    assert cupy.cuda.Graph.launch.__doc__.startswith("Graph.launch(self, stream=None)")
    assert "begin_capture(self, mode=None)" in cupy.cuda.Stream.begin_capture.__doc__


# ---------------------------------------------------------------- planted faults
# What is changed in a source, and into what: each is something that one may well write, and must not go unseen.
FAULTS = {
    "im2col: height for width": ("im2col", "window * sw - pw + place / c * dw", "window * sh - pw + place / c * dw"),
    "im2col: the last column is left out": ("im2col", "0 <= x && x < w) seen", "0 <= x && x < w - 1) seen"),
    "im2col: only the first row of a block": ("im2col",
        "for (int row = blockIdx.x; row < images * p; row += gridDim.x) {",
        "for (int row = blockIdx.x; row < images * p; row += images * p) {"),
    "col2im: gaps are not gaps": ("im2col", "output < outputs && output * step == place ?", "output < outputs ?"),
    "col2im: dilation forgotten": ("im2col", "seen_by(x - j * dw, sw, q)", "seen_by(x - j, sw, q)"),
    "col2im: one output too many": ("im2col", "output < outputs &&", "output <= outputs &&"),
    "col2im: three of four channels": ("im2col",
        "k < how_many<Some>; ++k) sum[k] += part(said, k);",
        "k < how_many<Some> - 1 || k < 1; ++k) sum[k] += part(said, k);"),
    "pooling: the last of equals wins": ("pooling",
        "if (part(seen, k) == part(most, k) || part(seen, k) != part(seen, k)) wins[k] = false;",
        "if (part(seen, k) > part(most, k)) wins[k] = false;"),
    "pooling: NaN does not win": ("pooling", " || part(seen, k) != part(seen, k)) most[k]", ") most[k]"),
    "pooling: padding counts as zero": ("pooling", "most[k] = -1 / real(0);", "most[k] = 0;"),
    "pooling: a window too few": ("pooling", "(place - kernel) / step + 1;", "(place - kernel) / step + 2;"),
    "pooling: one channel's gradient for all": ("pooling", "sum[k] += part(given, k);", "sum[k] += part(given, 0);"),
    "sums: the last rows are left out": ("normalization",
        "row < min(first + rows, m); row += TY) {\n            real off",
        "row < first + rows - TY; row += TY) {\n            real off"),
    "sums: no first number is taken off": ("normalization", "real x0 = x[channel];", "real x0 = 0;"),
    "moments: the unbiased variance": ("normalization", "squares / m - off * off", "(squares - off * sum) / (m - 1.0)"),
    "grad_sums: not where y is positive": ("normalization", "dz = !y || y[e] > 0 ? given : 0;", "dz = given;"),
    "coefficients: a term forgotten": ("normalization", "-factor * sum / m - tilt * mean[channel]", "-factor * sum / m"),
    "follow: no unbiased variance": ("normalization", "var[channel] * unbiased", "var[channel]"),
    "affine: NaN is rectified": ("elementwise", "rectified && y < 0 ? 0 : y", "rectified && !(y > 0) ? 0 : y"),
    "affine: the residual after the ReLU": ("elementwise",
        "+ part(more, i);\n            part(seen, i) = rectified && y < 0 ? 0 : y;",
        ";\n            part(seen, i) = (rectified && y < 0 ? 0 : y) + part(more, i);"),
    "affine: the first channel's shift for all": ("elementwise", "offset = shift[channel];", "offset = shift[0];"),
    "relu_grad: at 0 too": ("elementwise", "if (!(part(result, i) > 0))", "if (!(part(result, i) >= 0))"),
    "relu_grad: three of four": ("elementwise",
        "i < how_many<Some>; ++i)\n            if (!(part(result",
        "i < how_many<Some> - 1 || i < 1; ++i)\n            if (!(part(result"),
    "loss: no maximum is taken off": ("loss", "sum += exp(z[j] - most)", "sum += exp(z[j])"),
    "loss: no mean over the batch": ("loss", "(exp(z[j] - most) / sum - target) / images", "(exp(z[j] - most) / sum - target)"),
    "loss: smoothing over one class too few": ("loss", "smoothing / classes * spread", "smoothing / (classes - 1) * spread"),
    "sgd: nesterov forgotten": ("update", "g = nesterov ? g + momentum * v : v;", "g = v;"),
    "sgd: chunks overlap": ("update",
        "long long first = (long long)part[blockIdx.x] * CHUNK",
        "long long first = 0 * part[blockIdx.x]"),
    "adamw: eps inside the root": ("update", "(sqrt(square) * root + eps)", "sqrt(square * root * root + eps)"),
    "winograd: a sign": ("winograd", "v[2 * step] = even_a - odd_a;", "v[2 * step] = even_a + odd_a;"),
    "winograd: padding forgotten": ("winograd", "across * 4 - pw,", "across * 4,"),
    "each: the last element": ("winograd", "i < (count);", "i < (count) - 1;"),
    "overflow: NaN passes": ("update", "!(grad[i] - grad[i] == 0)", "grad[i] - grad[i] > 0 || grad[i] == 1 / real(0)"),
    "overflow: the last block is not asked": ("update", "any || overflowed[i]", "any || (i + 1 < count && overflowed[i])"),
    "scaling: no step is left out": ("update", "scaling && scaling[FINITE] == 0", "false"),
    "scaling: grows too late": ("update", "++scaling[STAYED] >= interval", "++scaling[STAYED] > interval"),
    "scaling: never asked again": ("update", "    scaling[ALL_FINITE] = 1;\n}", "}"),
}
# Of half precision.
ROUNDING = "(whole + 0x7fff + (whole >> 16 & 1)) >> 16"
FAULTS_OF_BF16 = {
    "bf16: cut off": ("elementwise", ROUNDING, "whole >> 16"),
    "bf16: the half goes up": ("elementwise", ROUNDING, "(whole + 0x8000) >> 16"),
    "bf16: NaN becomes infinity": ("elementwise", "x != x ? whole >> 16 | 64 :", ""),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_BF16])
def test_a_planted_fault_is_found(fault, monkeypatch):
    from minicnn.kernels.cuda import launch as launching
    file, old, new = {**FAULTS, **FAULTS_OF_BF16}[fault]
    dtype = np.float64
    if fault in FAULTS_OF_BF16:
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
        dtype = precision.half_type("bf16")
    text = source.text(file)
    assert text.count(old) >= 1, "the source has changed: plant the fault anew"
    monkeypatch.setenv("CUSHIM_FLAGS", "-Wno-error")        # such as a parameter that is not used any more
    monkeypatch.setattr(source, "text", {**{f: source.text(f) for f in FILES}, file: text.replace(old, new)}.__getitem__)
    launching._module.cache_clear()
    launching._started.cache_clear()
    try:
        with cuda_cases.small(), pytest.raises(AssertionError):
            for name in cuda_cases.OF_FILE[file]:
                if dtype is np.float64 or name in cuda_cases.OF_HALF:
                    cuda_cases.CASES[name]("cushim", dtype)
    finally:
        launching._module.cache_clear()
        launching._started.cache_clear()


# ---------------------------------------------------------------- sanitizers
def sanitized(which, *fault):
    """Run the cases in a process whose kernels are watched, and that loads the sanitizer before all else."""
    asked = subprocess.run(["g++", f"-print-file-name=lib{which[0]}san.so"], capture_output=True, text=True, check=True)
    library = asked.stdout.strip()
    if "/" not in library:
        pytest.skip(f"g++ has no {which} sanitizer here")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0",
                   "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
                   "CUSHIM_FLAGS": f"-fsanitize={which} -g -O1" + (" -DSHIM_THREADS" if which == "thread" else "")}
    fixed = ["setarch", "-R"] if which == "thread" else []              # where the system lays memory out in odd places
    done = subprocess.run([*fixed, sys.executable, str(HERE / "cuda_cases.py"), which, *fault], env=environment, cwd=HERE,
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_compiler
@pytest.mark.slow
def test_no_kernel_reads_or_writes_outside_its_arrays():
    code, said = sanitized("address")
    assert code == 0, said[-3000:]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("old, new", [("0 <= x && x < w)", "0 <= x && x <= w)"),
                                      ("left + j < q; ++j) {", "left + j < q + 1; ++j) {")])
def test_a_read_outside_is_found(old, new):
    code, said = sanitized("address", old, new)
    assert code != 0 and "heap-buffer-overflow" in said, said[-3000:]


@needs_compiler
@pytest.mark.slow
def test_threads_of_a_block_do_not_race():
    code, said = sanitized("thread")
    assert code == 0, said[-3000:]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("old, new", [
    ("    sums[threadIdx.y][threadIdx.x] = mine;\n    __syncthreads();", "    sums[threadIdx.y][threadIdx.x] = mine;"),
    ("    __syncthreads();                                    // before anybody writes there again\n", "")])
def test_a_missing_barrier_is_found(old, new):
    code, said = sanitized("thread", old, new)
    assert code != 0 and "data race" in said, said[-3000:]
