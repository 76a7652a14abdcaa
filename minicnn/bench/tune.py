"""`minicnn bench tune`: measure which algorithm is the fastest on this machine, and write the table that "auto" looks it up in.

Measured are the 3x3 convolutions of VGG-16, the ResNets 18 and 50 and ResNet-20, each for a single image and for batches; an
algorithm whose error is too large is never the fastest. (1x1 convolutions are one product by any name; others have too few kin.)
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minicnn.bench import cases, engine, kernels, laboratory, measure, results, tables, witness
from minicnn.bench.cases import Case
from minicnn.bench.measure import Call, Care
from minicnn.bench.progress import Progress
from minicnn.bench.tables import Column
from minicnn.kernels import algorithms
from minicnn.threads import cores, num_threads
from minicnn.weights import atomically

TABLE_NAMES = {"conv2d": "forward", "conv2d_input_grad": "input_grad", "conv2d_weight_grad": "weight_grad"}


def run(*, repeats: int | None = None, threads: int | None = None, quick: bool = False, out: str | None = None) -> None:
    """Measure, print each winner, and write the table: in place of the engine's own unless `out` names a file.

    Raises OSError where it cannot be written, ValueError for a quick table without `out`. An interruption leaves the old one.
    """
    if quick and out is None:
        raise ValueError("--quick measures nothing, so it does not replace the engine's table: name another file with --out")
    path = out or str(algorithms.TABLE)
    results.can_write(path)
    threads = threads or cores()
    care = Care.quick(repeats) if quick else Care(repeats or 5)
    chosen = to_measure(quick)
    names = [name for name in algorithms.ALGORITHMS if name != "auto"]
    columns = [Column("kernel", 18, True), Column("shape", max(len(case.shape) for case in chosen), True), Column("batch", 5),
               *(Column(f"{name} ms", 11) for name in names), Column("fastest", 8, True)]
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLE_NAMES.values()}
    with num_threads(threads), Progress(len(chosen), "convolution") as progress:
        progress.say(tables.head(columns))
        for case in chosen:
            progress.begin(case.name)
            seconds = times(case, care)
            if not seconds:
                progress.step(tables.line(columns, [case.kernel, case.shape, str(case.batch), *["-"] * len(names), "-"]))
                continue
            row = entry(case, seconds)
            table[TABLE_NAMES[case.kernel]].append(row)
            progress.step(tables.line(columns, [case.kernel, case.shape, str(case.batch),
                                                *(tables.milliseconds(seconds.get(name)) for name in names), row["algorithm"]]))
        content = {"measured": results.environment(threads, ["cpu"]), "fastest": table}
    atomically(path, lambda temporary: _write(temporary, content))
    print(f"\nin {path}: {sum(map(len, table.values()))} convolutions")


def to_measure(quick: bool = False) -> list[Case]:
    """The convolutions that several algorithms compute at their best, for one image and for batches."""
    resnets = ("resnet18", "resnet50")                      # whose last layers change hands between small batches
    every = [*cases.of_models((*cases.MODELS, "resnet18"), quick, batch=1), *cases.of_models((*cases.MODELS, "resnet18"), quick),
             *cases.of_models(resnets, quick, batch=8), *cases.of_models(resnets, quick, batch=16)]
    found = (case for case in every if case.kernel in TABLE_NAMES and case.windows is not None
             and case.windows.kernel_size == (3, 3))
    return sorted(dict.fromkeys(replace(case, models=()) for case in found), key=lambda case: cases.KERNELS.index(case.kernel))


def times(case: Case, care: Care) -> dict[str, float]:
    """{algorithm: seconds of its fastest repetition} of those that are right, timed in turn; none where they find no memory."""
    assert case.windows is not None
    try:
        arrays = kernels.arrays(case)
        sample = witness.sample(case, arrays)
        calls = {name: _by(name, kernels.KERNELS[case.kernel].start(replace(case, algorithm=name), arrays))
                 for name in engine.algorithms(case.windows, "cpu")}
        right = {name: call for name, call in calls.items() if witness.relative_error(call(), sample) <= laboratory.LARGEST_ERROR}
        return {name: min(seconds) for name, seconds in measure.in_turn(right, measure.wall, care).items()}
    except MemoryError:
        return {}


def _by(name: str, call: Call) -> Call:
    """The call, made inside the algorithm's context."""
    def made() -> Any:
        with engine.algorithm(name):
            return call()
    return made


def entry(case: Case, seconds: dict[str, float]) -> dict[str, Any]:
    """A row of the table: the sizes that the engine looks for, and the fastest algorithm."""
    (c, _, _), (k, p, q) = case.in_shape, case.out_shape
    assert case.windows is not None
    return {"channels": c, "filters": k, "pixels": case.batch * p * q, "stride": max(case.windows.stride),
            "algorithm": min(seconds, key=seconds.__getitem__)}


def _write(path: str, content: dict[str, Any]) -> None:
    """A line for each row: a table to read."""
    rows = ",\n".join(f'{json.dumps(name)}: [\n' + ",\n".join(map(json.dumps, entries)) + "\n]"
                      for name, entries in content["fastest"].items())
    Path(path).write_text(f'{{"measured": {json.dumps(content["measured"])},\n"fastest": {{\n{rows}\n}}}}\n', encoding="utf-8")
