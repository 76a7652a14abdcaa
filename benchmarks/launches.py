"""Where a call's time goes on a GPU: every kernel and product that it launches, by the device's own clock.

    python benchmarks/launches.py resnet50 --precision tf32 --batch 64              a training step
    python benchmarks/launches.py vgg16 --vary im2col.COLUMN_BYTES 33554432 268435456   a constant of its files, value by value

An event is recorded before each launch and behind it. The device gets something long to do first, so that the host is ahead of it:
then nothing but the kernel lies between its two events, and no time that the host took to launch it.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cases
from engine_minicnn import Engine

from minicnn import models
from minicnn.backend import BackendUnavailable, library_of
from minicnn.kernels.cuda import gemm as products
from minicnn.kernels.cuda import launch as kernels
from minicnn.kernels.precision import PRECISIONS, precision
from minicnn.threads import cores

Span = tuple[str, Any, Any]         # what was launched, and the events before and behind
PRODUCTS, SIDE = 100, 4096          # something long: a quarter of a second on a large GPU in float32, a tenth of that in TF32


def of(call: Callable[[], object], device: str = "cuda") -> dict[str, Any]:
    """{"seconds": of the device, for the whole call, "launches": {name: [how many, seconds]}}, the longest first.

    What is not among them is CuPy's own kernels, and copies. A call that waits for the device in its middle is not timed well: the
    host is behind from there on.
    """
    xp = library_of(device)
    call()                                              # compiles
    square = xp.ones((SIDE, SIDE), "f")
    for _ in range(PRODUCTS):
        products.gemm(square, square)
    start, end, spans = _event(xp), xp.cuda.Event(), []
    with _recorded(xp, spans):
        call()
    end.record()
    end.synchronize()
    found: dict[str, list[float]] = {}
    for name, before, behind in spans:
        entry = found.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += 1e-3 * xp.cuda.get_elapsed_time(before, behind)
    return {"seconds": 1e-3 * xp.cuda.get_elapsed_time(start, end),
            "launches": dict(sorted(found.items(), key=lambda item: -item[1][1]))}


def in_words(found: dict[str, Any], most: int = 6) -> str:
    """Shares of the time, by kind: products together, each file's kernels by name, and the rest."""
    shares: dict[str, float] = {}
    for name, (_, seconds) in found["launches"].items():
        kind = name.split(" ")[0]
        shares[kind] = shares.get(kind, 0) + seconds / found["seconds"]
    shares["the rest"] = 1 - sum(shares.values())
    longest = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return f"{1e3 * found['seconds']:.2f} ms of the device: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in longest)


# ---------------------------------------------------------------- their parts
@contextlib.contextmanager
def _recorded(xp: Any, spans: list[Span]) -> Iterator[None]:
    """Between two events, whatever `launch` starts in the block and `gemm` asks of cuBLAS."""
    def between_events(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before = _event(xp)
            result = function(*arguments)
            spans.append((name(*arguments), before, _event(xp)))
            return result
        return call

    def started(xp: Any, file: str, kernel: str, stored: Any) -> tuple[Any, Any]:
        function, pointers = start_of(xp, file, kernel, stored)
        return between_events(function, lambda *_: f"{file}.{kernel}"), pointers

    def cublas_of(xp: Any) -> Any:
        cublas = library(xp)
        return SimpleNamespace(gemmEx=between_events(cublas.gemmEx, _product),
                               gemmStridedBatchedEx=between_events(cublas.gemmStridedBatchedEx, _products))

    start_of, library = kernels._started, products.cublas_of
    kernels._started, products.cublas_of = started, cublas_of       # type: ignore[assignment]
    try:
        yield
    finally:
        kernels._started, products.cublas_of = start_of, library


def _event(xp: Any) -> Any:
    event = xp.cuda.Event()
    event.record()
    return event


def _product(*arguments: Any) -> str:
    """cublasGemmEx's arguments; it thinks in columns, so that its n, m, k are our m, n, k."""
    _, _, _, n, m, k = arguments[:6]
    return f"gemm {m}x{k}x{n}"


def _products(*arguments: Any) -> str:
    return f"{_product(*arguments)} times {arguments[-3]}"


# ---------------------------------------------------------------- the command
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    end_without("launches.py", "cuda")
    task = "inference" if args.inference else "training step"
    case = cases.model(args.model, False, args.batch)[not args.inference]
    with precision(args.precision):
        prepare, run = Engine(cores(), device="cuda").tasks(case)[task]
        call = partial(run, prepare())
        for value in args.values or [None]:
            with mock.patch.object(*args.constant, value) if args.values else contextlib.nullcontext():
                found = of(call)
            print("" if value is None else f"{args.vary[0]} = {value:>12,}: ", in_words(found), sep="", flush=True)
    if not args.values:
        for name, (count, seconds) in found["launches"].items():
            print(f"{1e3 * seconds:9.3f} ms {count:5}  {name}")


def end_without(script: str, backend: str) -> None:
    """Where the backend does not work, the script ends with a line that says why."""
    try:
        library_of(backend)
    except BackendUnavailable as error:
        raise SystemExit(f"{script}: {error}") from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time every kernel that a model launches on a GPU.")
    parser.add_argument("model", choices=models.names(), metavar="MODEL", help="such as resnet50")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--inference", action="store_true", help="instead of a training step")
    parser.add_argument("--vary", nargs="+", metavar=("FILE.CONSTANT", "VALUE"), help="a constant of kernels/cuda, value by value")
    args = parser.parse_args(arguments)
    args.values = []
    if args.vary:
        file, _, name = args.vary[0].partition(".")
        try:
            args.constant = importlib.import_module(f"minicnn.kernels.cuda.{file}"), name
            args.values = [int(value) for value in args.vary[1:]]
            getattr(*args.constant)
        except (ImportError, AttributeError, ValueError) as error:
            parser.error(f"--vary takes a constant of a file in kernels/cuda and whole numbers: {error}")
        if not args.values:
            parser.error("--vary takes at least one value")
    return args


if __name__ == "__main__":
    main()
