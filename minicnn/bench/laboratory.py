"""`minicnn bench kernels`: check every chosen kernel against its witness, then time it, row by row."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isfinite
from typing import Any

from minicnn import models
from minicnn.backend import to_numpy
from minicnn.bench import cases, engine, kernels, measure, results, roofline, tables, witness
from minicnn.bench.cases import Case
from minicnn.bench.measure import Care
from minicnn.bench.progress import Progress
from minicnn.bench.results import Row
from minicnn.bench.rival import Rival
from minicnn.bench.roofline import Roof
from minicnn.threads import cores, num_threads

# Of the largest number: what float32 loses in sums this long is far below, a wrong kernel far above.
LARGEST_ERROR = 2e-5


def run(words: Sequence[str] = (), *, batch: int | None = None, repeats: int | None = None, threads: int | None = None,
        backend: str = "auto", quick: bool = False, pytorch: bool = False, json: str | None = None) -> int:
    """Measure the kernels that the words choose, print them, and write them to a file where one is named.

    Returns 1 where a kernel was wrong, else 0. Raises ValueError for a word that fits nothing, OSError for a file that cannot
    be written. What was measured before an interruption is written, too.
    """
    threads = threads or cores()
    devices = engine.devices(backend)
    named = [word for word in words if word in models.names()]
    chosen = _choose(words, cases.of_models(named or cases.MODELS, quick, batch), devices)
    care = Care.quick(repeats) if quick else Care(repeats or Care().repeats)
    settings = {"words": list(words), "batch": batch, "repeats": care.repeats, "quick": quick, "backend": backend}
    if json:
        results.can_write(json)
    rows: list[Row] = []
    with num_threads(threads), ExitStack() as running:
        surroundings = results.environment(threads, devices)
        rival = running.enter_context(Rival(threads)) if pytorch else None
        if rival is not None:
            surroundings["PyTorch"] = rival.version
        print(tables.facts(surroundings), flush=True)
        roofs = {device: roofline.measure(device, threads, quick) for device in devices}
        _print_roofs(roofs)
        try:
            _fill(rows, chosen, roofs, care, rival)
        finally:
            if json and rows:
                results.write(json, results.document("kernels", surroundings, settings, rows,
                                                     roofline={device: roof._asdict() for device, roof in roofs.items()}))
    return _verdict(rows)


def _choose(words: Sequence[str], every: Sequence[Case], devices: Sequence[str]) -> list[tuple[str, Case]]:
    """(device, case) that the words mean, each case by every algorithm that can compute it there."""
    variants = [(device, variant) for case in every for device in devices for variant in _variants(case, device)]
    chosen = set(cases.choose(words, [variant for _, variant in variants]))
    return [(device, variant) for device, variant in variants if variant in chosen]


def _fill(rows: list[Row], chosen: Sequence[tuple[str, Case]], roofs: dict[str, Roof], care: Care, rival: Rival | None) -> None:
    """Measure, and print each row as soon as it is there."""
    gpu, pytorch = "cuda" in roofs, rival is not None
    columns = tables.kernel_columns(max(len(case.shape) for _, case in chosen), gpu, pytorch)
    with Progress(len(chosen), "kernel") as progress:
        progress.say(tables.head(columns))
        for device, case in chosen:
            progress.begin(case.name)
            row = measured(case, device, roofs[device], care)
            if rival is not None and device == "cpu" and row["seconds"]:
                row["pytorch_seconds"] = rival.seconds(case, care)
            rows.append(row)
            progress.step(tables.line(columns, tables.kernel_cells(row, gpu, pytorch)))


def _variants(case: Case, device: str) -> Iterator[Case]:
    """The case by each algorithm that can compute it, where there is a choice."""
    if case.kernel not in cases.CONVOLUTIONS or case.windows is None:
        yield case
        return
    for algorithm in engine.algorithms(case.windows, device):
        yield replace(case, algorithm=algorithm)


def measured(case: Case, device: str, roof: Roof, care: Care) -> Row:
    """One kernel, checked and timed. A wrong one is not timed, nor one that the memory does not hold; `problem` says so."""
    operations, least_bytes = kernels.operations(case), kernels.least_bytes(case)
    row: Row = {"kernel": case.kernel, "algorithm": case.algorithm, "shape": case.shape, "batch": case.batch, "backend": device,
                "models": list(case.models), "operations": operations, "least_bytes": least_bytes,
                "roof_seconds": roof.seconds(operations, least_bytes), "seconds": []}
    try:
        with engine.algorithm(case.algorithm):
            row |= _checked_and_timed(case, device, care)
    except MemoryError:
        row["problem"] = "memory"
    return row


def _checked_and_timed(case: Case, device: str, care: Care) -> Row:
    arrays = kernels.arrays(case)
    moved, transfer = measure.upload(arrays, device)
    clock = measure.clock_of(device)
    call = kernels.KERNELS[case.kernel].start(case, moved)
    first_call, result = measure.once(call, clock)
    error = witness.relative_error(to_numpy(result), witness.sample(case, arrays))
    found: Row = {"error": error if isfinite(error) else None, "first_call": first_call, "transfer": transfer}
    del arrays, result
    if not error <= LARGEST_ERROR:
        return {**found, "problem": "WRONG"}
    found["temporary_bytes"] = measure.temporary_bytes(call, device)
    found["seconds"] = measure.repeat(call, clock, care)
    return found


def _print_roofs(roofs: dict[str, Roof]) -> None:
    for device, roof in roofs.items():
        print(f"{'roof of ' + device:<20}{roof.gflops:.1f} GFLOP/s in a matrix product, {roof.gbytes:.1f} GB/s in a copy")
    print("\nerror: the largest deviation from float64 over the largest number, on a sample.   spread: from quartile to quartile.\n"
          "roof: share of what the machine could reach; above 100 % where an algorithm saves operations or arrays fit a cache.\n"
          "temp: memory beside the result, workspaces included.\n", flush=True)


def _verdict(rows: Sequence[Row]) -> int:
    wrong = [results.name("kernels", row) for row in rows if row.get("problem") == "WRONG"]
    if wrong:
        print(f"\n{len(wrong)} of {len(rows)} are wrong (error above {LARGEST_ERROR:g}) and were not timed: {'; '.join(wrong)}")
    skipped: Any = sum(row.get("problem") == "memory" for row in rows)
    if skipped:
        print(f"\n{skipped} of {len(rows)} found too little memory; a smaller --batch takes less")
    return 1 if wrong else 0
