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

    A side is a library, or a library and its variant: "PyTorch channels_last".
    """

    case: str
    kind: str
    batch: int
    task: str
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    @property
    def milliseconds(self) -> dict[str, float]:
        return {side: 1e3 * median(times) for side, times in self.seconds.items()}

    def fastest(self, library: str) -> str | None:
        """The side of this library with the lowest median; None where the library was not measured."""
        sides = [side for side in self.seconds if side.partition(" ")[0] == library]
        return min(sides, key=self.milliseconds.__getitem__) if sides else None

    def ratio(self, library: str) -> float | None:
        """Our time over its: below 1, we are faster."""
        rival = self.fastest(library)
        return None if rival is None else self.milliseconds[OURS] / self.milliseconds[rival]


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
    rivals = _rivals(measured)
    parts = ["\n".join(f"{name + ':':14} {value}" for name, value in surroundings.items())]
    operations = [m for m in measured if m.kind != "model"]
    models = [m for m in measured if m.kind == "model"]
    if operations:
        parts.append(f"Operations: milliseconds a call, medians of {repeats}\n" + _operation_table(operations, rivals))
    if models:
        parts.append(f"Models: milliseconds an image, medians of {repeats}; peak memory of a training step in a fresh process, "
                     "in MB\n" + _model_table(models, rivals))
    if rivals:
        parts.append(f"Ratios: {OURS}'s time over the rival's, in the faster of its variants; below 1, {OURS} is faster.")
    return "\n\n".join(parts)


def _operation_table(measured: Sequence[Measurement], rivals: list[str]) -> str:
    head = ["operation", "batch", "task", OURS, *(cell for rival in rivals for cell in (rival, "ratio", "variant"))]
    rows = [[m.case, str(m.batch), m.task, f"{m.milliseconds[OURS]:.2f}",
             *(cell for rival in rivals for cell in _against(m, rival, 1))] for m in measured]
    return _table(head, rows, left=(0, 2))


def _model_table(measured: Sequence[Measurement], rivals: list[str]) -> str:
    head = ["model", "batch", "task", OURS, *(cell for rival in rivals for cell in (rival, "ratio", "variant")),
            f"{OURS} MB", *(f"{rival} MB" for rival in rivals)]
    rows = [[m.case, str(m.batch), m.task, f"{m.milliseconds[OURS] / m.batch:.2f}",
             *(cell for rival in rivals for cell in _against(m, rival, m.batch)),
             _megabytes(m.peak_bytes.get(OURS)), *(_megabytes(m.peak_bytes.get(m.fastest(rival) or "")) for rival in rivals)]
            for m in measured]
    return _table(head, rows, left=(0, 2))


def _against(m: Measurement, rival: str, batch: int) -> list[str]:
    side, ratio = m.fastest(rival), m.ratio(rival)
    if side is None or ratio is None:
        return ["-", "-", "-"]
    return [f"{m.milliseconds[side] / batch:.2f}", f"{ratio:.2f}", side.partition(" ")[2]]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}"


def _table(head: list[str], rows: list[list[str]], left: Iterable[int]) -> str:
    """Columns wide enough for what they hold; those in `left` begin at the left, numbers end at the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
             for row in [head, ["-" * w for w in widths], *rows]]
    return "\n".join(lines)


def _rivals(measured: Iterable[Measurement]) -> list[str]:
    """The other libraries, in the order in which they were measured."""
    names = (side.partition(" ")[0] for m in measured for side in m.seconds)
    return [name for name in dict.fromkeys(names) if name != OURS]


# ---------------------------------------------------------------- to keep
def document(surroundings: dict[str, Any], measured: Sequence[Measurement], repeats: int) -> dict[str, Any]:
    """Everything that was measured, every repetition included, as plain dicts."""
    rivals = _rivals(measured)
    return {"environment": surroundings, "repeats": repeats, "measurements": [
        {"case": m.case, "kind": m.kind, "batch": m.batch, "task": m.task, "median_ms": m.milliseconds, "seconds": m.seconds,
         "ratio": {rival: m.ratio(rival) for rival in rivals}, "fastest": {rival: m.fastest(rival) for rival in rivals},
         "peak_bytes": m.peak_bytes} for m in measured]}
