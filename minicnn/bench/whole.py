"""`minicnn bench models`: inference, a training step, images a second, peak memory, and each layer's share."""
from __future__ import annotations

import json as json_format
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from minicnn import models
from minicnn.bench import cases, engine, results, tables
from minicnn.bench.measure import Care, Spread
from minicnn.bench.progress import Progress
from minicnn.bench.results import LAYER_PARTS, Row
from minicnn.bench.tables import Column
from minicnn.bench.worker import TASKS
from minicnn.threads import cores, num_threads

COLUMNS = [Column("task", 13, True), Column("batch", 5), Column("on", 4, True), Column("ms", 8), Column("spread", 6),
           Column("ms an image", 11), Column("images/s", 8), Column("first ms", 8), Column("peak MB", 8)]


def run(names: Sequence[str] = (), *, batch: int | None = None, repeats: int | None = None, threads: int | None = None,
        backend: str = "auto", quick: bool = False, layers: bool = False, json: str | None = None) -> int:
    """Measure the named models, each task in a process of its own; print them, and write them to a file where one is named.

    Returns 1 where one could not be measured, else 0. Raises ValueError for an unknown name, OSError for a file that cannot be
    written.
    """
    names = [_known(name) for name in names] or list(cases.MODELS)
    threads = threads or cores()
    devices = engine.devices(backend)
    care = Care.quick(repeats) if quick else Care(repeats or 7, warm_up=1)
    if json:
        results.can_write(json)
    with num_threads(threads):
        surroundings = results.environment(threads, devices)
    settings = {"names": names, "batch": batch, "repeats": care.repeats, "quick": quick, "backend": backend, "layers": layers}
    print(tables.facts(surroundings) + "\n", flush=True)
    rows: list[Row] = []
    try:
        _fill(rows, [(name, device) for name in names for device in devices], threads, batch, quick, care, layers)
    finally:
        if json and rows:
            results.write(json, results.document("models", surroundings, settings, rows))
    return 1 if any(row.get("problem") for row in rows) else 0


def _known(name: str) -> str:
    if name not in models.names():
        models.build(name)                                  # raises, and says what is near
    return name


def _fill(rows: list[Row], wanted: Sequence[tuple[str, str]], threads: int, batch: int | None, quick: bool, care: Care,
          layers: bool) -> None:
    """Measure, and print each row as soon as it is there."""
    name_column = Column("model", max(len(name) for name, _ in wanted), True)
    columns = [name_column, *COLUMNS]
    with Progress(len(wanted) * (len(TASKS) + layers), "task") as progress:
        progress.say(tables.head(columns))
        for name, device in wanted:
            request = {"model": name, "backend": device, "threads": threads, "quick": quick, "care": care,
                       "batch": batch or cases.default_batch(name, quick)}
            of_model: list[Row] = []
            for task in TASKS:
                progress.begin(f"{name} {task}")
                of_model.append(_row({**request, "task": task}))
                rows.append(of_model[-1])
                progress.step(tables.line(columns, _cells(of_model[-1])))
            if layers:
                progress.begin(f"{name}, layer by layer")
                found = ask({**request, "do": "layers"})
                of_model[0]["layers"] = found.get("layers", [])
                progress.step(found["failed"] if "failed" in found else f"\n{layer_table(of_model)}\n")


def _row(request: dict[str, Any]) -> Row:
    row: Row = {**{name: request[name] for name in ("model", "task", "batch", "backend")}, "seconds": []}
    for what in ("time", "peak"):
        found = ask({**request, "do": what})
        if "failed" in found:
            return {**row, "seconds": [], "problem": found["failed"]}
        row |= found
    return row


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process answers; {"failed": why} where it cannot, or dies."""
    process = subprocess.run([sys.executable, "-m", "minicnn.bench.worker"], input=json_format.dumps(request) + "\n", text=True,
                             stdout=subprocess.PIPE)
    try:
        answer: dict[str, Any] = json_format.loads(process.stdout)
    except json_format.JSONDecodeError:
        return {"failed": f"its process ended with code {process.returncode}; -9 is mostly a lack of memory: try a smaller --batch"}
    return answer


def _cells(row: Row) -> list[str]:
    cells = [row["model"], row["task"], str(row["batch"]), row["backend"]]
    if not row["seconds"]:
        return [*cells, row["problem"], *[""] * 5]
    seconds = Spread.of(row["seconds"]).median
    return [*cells, tables.milliseconds(seconds), tables.spread(row["seconds"]), f"{1e3 * seconds / row['batch']:.2f}",
            f"{row['batch'] / seconds:.1f}", tables.milliseconds(row["first_call"]), tables.megabytes(row["peak_bytes"])]


# ---------------------------------------------------------------- layer by layer
def layer_table(of_model: Sequence[Row]) -> str:
    """Every layer by itself, what the kinds of layer take together, and the whole model beside the sum; milliseconds a batch."""
    layers = of_model[0]["layers"]
    if not layers:
        return "no layers"
    totals = {part: sum(layer[part] for layer in layers) for part in LAYER_PARTS}
    columns = [Column("layer", max(len("layer"), *(len(layer["path"]) for layer in layers)), True), Column("kind", 17, True),
               Column("output", 12, True), *(column for part in ("inference", "train forward", "train backward")
                                             for column in (Column(part, len(part)), Column("share", 6)))]
    lines = [tables.head(columns)]
    lines += [tables.line(columns, [layer["path"], layer["kind"], "x".join(map(str, layer["out_shape"])), *_shares(layer, totals)])
              for layer in layers]
    lines.append("")
    for kind in sorted({layer["kind"] for layer in layers}, key=lambda kind: -_of_kind(layers, kind)["inference"]):
        count = sum(layer["kind"] == kind for layer in layers)
        lines.append(tables.line(columns, [f"all {count}", kind, "", *_shares(_of_kind(layers, kind), totals)]))
    whole = {row["task"]: Spread.of(row["seconds"]).median for row in of_model if row["seconds"]}
    lines.append(f"\nby itself each, {tables.milliseconds(totals['inference'])} ms at inference and "
                 f"{tables.milliseconds(totals['forward'] + totals['backward'])} ms in training (without loss and optimiser); "
                 + "the whole " + ", ".join(f"{tables.milliseconds(seconds)} ms ({task})" for task, seconds in whole.items()))
    return "\n".join(lines)


def _of_kind(layers: Sequence[Row], kind: str) -> dict[str, float]:
    return {part: sum(layer[part] for layer in layers if layer["kind"] == kind) for part in LAYER_PARTS}


def _shares(seconds: Row, totals: dict[str, float]) -> list[str]:
    return [cell for part in LAYER_PARTS for cell in (tables.milliseconds(seconds[part]),
                                                f"{100 * seconds[part] / totals[part]:.1f} %" if totals[part] else "-")]
