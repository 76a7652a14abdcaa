"""What is printed: rows under a heading, as they are measured."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from minicnn.bench.measure import Spread
from minicnn.bench.results import Row


class Column(NamedTuple):
    """A column of fixed width: its head, and how wide; names begin at the left, numbers end at the right."""

    head: str
    width: int
    left: bool = False

    def cell(self, text: str) -> str:
        """The text, filled up."""
        return text.ljust(self.width) if self.left else text.rjust(self.width)


def head(columns: Sequence[Column]) -> str:
    """The heading, with a line below."""
    return line(columns, [column.head for column in columns]) + "\n" + line(columns, ["-" * column.width for column in columns])


def line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """One row."""
    return "  ".join(column.cell(cell) for column, cell in zip(columns, cells, strict=True)).rstrip()


def facts(surroundings: dict[str, Any]) -> str:
    """Names and values, one a line."""
    return "\n".join(f"{name:<20}{value}" for name, value in surroundings.items())


# ---------------------------------------------------------------- numbers
def milliseconds(seconds: float | None) -> str:
    """Three digits, whatever the size."""
    if seconds is None:
        return "-"
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def spread(seconds: list[float]) -> str:
    """From quartile to quartile, as a share of the median."""
    found = Spread.of(seconds)
    return f"{100 * found.width / found.median:.0f} %"


def megabytes(count: float | None) -> str:
    """In 1e6 bytes."""
    return "-" if count is None else f"{count / 1e6:,.1f}" if count < 100e6 else f"{count / 1e6:,.0f}"


def rate(amount: float, seconds: float) -> str:
    """In 1e9 a second; - for nothing."""
    return f"{1e-9 * amount / seconds:.1f}" if amount else "-"


# ---------------------------------------------------------------- kernels
def kernel_columns(shape_width: int, gpu: bool, pytorch: bool) -> list[Column]:
    """The columns of `bench kernels`."""
    columns = [Column("kernel", 18, True), Column("algorithm", 9, True), Column("shape", shape_width, True), Column("batch", 5)]
    columns += [Column("on", 4, True)] if gpu else []
    columns += [Column("error", 7), Column("ms", 8), Column("spread", 6), Column("GFLOP/s", 7), Column("GB/s", 6),
                Column("roof", 6), Column("first ms", 8), Column("temp MB", 8)]
    columns += [Column("copy ms", 8)] if gpu else []
    return columns + ([Column("PyTorch", 8), Column("speed-up", 8)] if pytorch else [])


def kernel_cells(row: Row, gpu: bool, pytorch: bool) -> list[str]:
    """A row of `bench kernels`; the problem instead of times where it was not timed."""
    cells = [row["kernel"], row["algorithm"] or "-", row["shape"], str(row["batch"])]
    cells += [row["backend"]] if gpu else []
    cells += ["-" if row.get("error") is None else f"{row['error']:.1e}"]
    if not row["seconds"]:
        return [*cells, row["problem"], *[""] * (6 + gpu + 2 * pytorch)]
    seconds = Spread.of(row["seconds"]).median
    cells += [milliseconds(seconds), spread(row["seconds"]), rate(row["operations"], seconds), rate(row["least_bytes"], seconds),
              f"{100 * row['roof_seconds'] / seconds:.0f} %", milliseconds(row["first_call"]), megabytes(row["temporary_bytes"])]
    cells += [milliseconds(row["transfer"])] if gpu else []
    rival = row.get("pytorch_seconds")
    if pytorch:
        cells += [milliseconds(Spread.of(rival).median), f"{Spread.of(rival).median / seconds:.2f}"] if rival else ["-", "-"]
    return cells
