"""What was measured, as tables to read and as JSON to keep."""
from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

OURS = "minicnn"


@dataclass
class Measurement:
    """One task of one case: the seconds of every repetition, and of a training step the peak bytes, by side.

    A side is a library, or a library and its variant: "PyTorch channels_last". One that ran out of memory, minicnn too, has no
    seconds (or no peak), and its own words for it.
    """

    case: str
    kind: str
    batch: int
    task: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    out_of_memory: dict[str, str] = field(default_factory=dict)

    @property
    def milliseconds(self) -> dict[str, float]:
        return {side: 1e3 * median(times) for side, times in self.seconds.items()}

    def fastest(self, library: str) -> str | None:
        """The side of this library with the lowest median; None where the library was not measured."""
        sides = [side for side in self.seconds if side.partition(" ")[0] == library]
        return min(sides, key=self.milliseconds.__getitem__) if sides else None

    def ratio(self, library: str) -> float | None:
        """Our time over its: below 1, we are faster. None where one of us was not measured."""
        rival = self.fastest(library)
        return None if rival is None or OURS not in self.seconds else self.milliseconds[OURS] / self.milliseconds[rival]


def environment(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """What the numbers depend on."""
    return {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "CPU": cpu_name(), "cores": os.cpu_count(),
            "threads": threads, "load average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "system": platform.platform(), "Python": platform.python_version(), **versions}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------- to read
def text(surroundings: dict[str, Any], measured: Sequence[Measurement], repeats: int) -> str:
    """The whole report: surroundings, a table of operations, a table of models."""
    parts = ["\n".join(f"{name + ':':14} {value}" for name, value in surroundings.items())]
    operations = [m for m in measured if m.kind != "model"]
    models = [m for m in measured if m.kind == "model"]
    if operations:
        parts.append(f"Operations: milliseconds a call, medians of {repeats}\n" + _operation_table(operations))
    if models:
        parts.append(f"Models: milliseconds an image, medians of {repeats}; peak memory of a training step in a fresh process, "
                     "in MB\n" + _model_table(models))
    return "\n\n".join([*parts, *remarks(measured)])


def remarks(measured: Sequence[Measurement]) -> list[str]:
    """What stands below the tables: how to read a ratio, and who ran out of memory where."""
    ratios = f"Ratios: {OURS}'s time over the rival's, in the faster of its variants; below 1, {OURS} is faster."
    lacking = [f"  {m.case}, batch {m.batch}, {m.task}: {words}" for m in measured for words in m.out_of_memory.values()]
    return [ratios] * bool(rivals(measured)) + ["\n".join(["Out of memory:", *lacking])] * bool(lacking)


def _operation_table(measured: Sequence[Measurement]) -> str:
    heads, times = columns(measured, [1] * len(measured))
    return table(["operation", "batch", "task", *heads],
                 [[m.case, str(m.batch), m.task, *cells] for m, cells in zip(measured, times)], left=(0, 2))


def _model_table(measured: Sequence[Measurement]) -> str:
    heads, times = columns(measured, [m.batch for m in measured])
    libraries = [OURS, *rivals(measured)]
    return table(["model", "batch", "task", *heads, *(f"{library} MB" for library in libraries)],
                 [[m.case, str(m.batch), m.task, *cells,
                   *(_megabytes(m.peak_bytes.get(m.fastest(library) or "")) for library in libraries)]
                  for m, cells in zip(measured, times)], left=(0, 2))


def columns(measured: Sequence[Measurement], images: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """The heads and, for each measurement, the cells of what was timed: milliseconds over so many images, ours and then each
    rival's in the faster of its variants, the ratio, and that variant where it has several. "-" is what was not measured.
    """
    heads = [OURS]
    rows = [[_milliseconds(m, OURS, n)] for m, n in zip(measured, images)]
    for rival in rivals(measured):
        variants = any(side.startswith(f"{rival} ") for m in measured for side in m.seconds)
        heads += [rival, "ratio", *["variant"] * variants]
        for row, m, n in zip(rows, measured, images):
            side, ratio = m.fastest(rival), m.ratio(rival)
            row += [_milliseconds(m, rival, n), "-" if ratio is None else f"{ratio:.2f}"]
            row += ["-" if side is None else side.partition(" ")[2]] * variants
    return heads, rows


def _milliseconds(m: Measurement, library: str, images: int) -> str:
    side = m.fastest(library)
    return "-" if side is None else f"{m.milliseconds[side] / images:.2f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}"


def table(head: list[str], rows: list[list[str]], left: Iterable[int]) -> str:
    """Columns wide enough for what they hold; those in `left` begin at the left, numbers end at the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
             for row in [head, ["-" * w for w in widths], *rows]]
    return "\n".join(lines)


def rivals(measured: Iterable[Measurement]) -> list[str]:
    """The other libraries, in the order in which they were measured, or ran out of memory."""
    names = (side.partition(" ")[0] for m in measured for side in (*m.seconds, *m.out_of_memory))
    return [name for name in dict.fromkeys(names) if name != OURS]


# ---------------------------------------------------------------- to keep
def document(surroundings: dict[str, Any], measured: Sequence[Measurement], repeats: int) -> dict[str, Any]:
    """Everything that was measured, every repetition included, as plain dicts."""
    others = rivals(measured)
    return {"environment": surroundings, "repeats": repeats, "measurements": [
        {"case": m.case, "kind": m.kind, "batch": m.batch, "task": m.task, "median_ms": m.milliseconds, "seconds": m.seconds,
         "ratio": {rival: m.ratio(rival) for rival in others}, "fastest": {rival: m.fastest(rival) for rival in others},
         "peak_bytes": m.peak_bytes, "out_of_memory": m.out_of_memory} for m in measured]}
