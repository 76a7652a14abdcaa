"""A model layer by layer, as a table."""
from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Cells = tuple[str, ...]


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

    def _cells(self) -> tuple[Cells, list[Cells], Cells]:
        """The head, a line a layer, the totals, as strings."""
        return (("layer", "kind", "output", "parameters", "multiply-adds", "activation bytes"),
                [(row.path, row.kind, " x ".join(map(str, row.out_shape)), *(f"{n:,}" for n in row[3:])) for row in self.rows],
                ("total", "", "", f"{self.parameters:,}", f"{self.multiply_adds:,}", f"{self.activation_bytes:,}"))

    def __str__(self) -> str:
        head, body, total = self._cells()
        widths = [max(map(len, column)) for column in zip(head, *body, total, strict=True)]
        line = "  ".join("-" * w for w in widths)

        def aligned(cells: Sequence[str]) -> str:
            return "  ".join(c.ljust(w) if i < 3 else c.rjust(w)
                             for i, (c, w) in enumerate(zip(cells, widths, strict=True))).rstrip()
        return "\n".join([aligned(head), line, *map(aligned, body), line, aligned(total)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as a table, for a notebook."""
        head, body, total = self._cells()

        def line(cells: Cells, tag: str) -> str:
            left = ' style="text-align:left"'                       # numbers stand to the right, as notebooks have it
            return "<tr>" + "".join(f"<{tag}{left * (i < 3)}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"
        return (f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(cells, 'td') for cells in body)}</tbody>"
                f"<tfoot>{line(total, 'th')}</tfoot></table>")
