"""A model layer by layer, as a table."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One layer of a summary."""

    path: str
    kind: str
    out_shape: Shape
    parameters: int
    multiply_adds: int
    activation_bytes: int


class Summary:
    """A model layer by layer, for one image. `print` it, or read `.rows` and the totals."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.parameters = sum(row.parameters for row in rows)
        self.multiply_adds = sum(row.multiply_adds for row in rows)
        self.activation_bytes = sum(row.activation_bytes for row in rows)

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "parameters", "multiply-adds", "activation bytes")
        body = [(row.path, row.kind, " x ".join(map(str, row.out_shape)), *(f"{n:,}" for n in row[3:])) for row in self.rows]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}", f"{self.activation_bytes:,}")
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        line = "  ".join("-" * w for w in widths)

        def aligned(cells: Sequence[str]) -> str:
            return "  ".join(c.ljust(w) if i < 3 else c.rjust(w)
                             for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()
        return "\n".join([aligned(head), line, *map(aligned, body), line, aligned(total)])

    __repr__ = __str__
