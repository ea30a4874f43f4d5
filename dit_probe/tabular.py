"""One table for a terminal, a pipe and a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text, with what stands above and below them.

    Attributes:
        rows: cells of every row; the first row is the heading.
        above: line before the table.
        below: lines after it.

    Example:
        >>> table = Table([("variable", "size"), ("o_x", "3 KiB")], below=("1 sample",))
        >>> print(table.text())
        variable  size
        o_x       3 KiB
        1 sample
    """

    rows: Sequence[Sequence[str]]
    above: str = ""
    below: Sequence[str] = ()

    def text(self) -> str:
        """Columns padded with spaces."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows]
        return "\n".join([*([self.above] if self.above else []), *lines, *self.below])

    def html(self) -> str:
        """A table that notebooks show; names that were given from outside stay text.

        Example:
            >>> "<td>&lt;b&gt;</td>" in Table([("concept",), ("<b>",)]).html()
            True
        """
        head, *body = self.rows
        rows = [_row("th", head), *(_row("td", row) for row in body)]
        lines = [f"<caption>{html.escape(self.above)}</caption>" if self.above else "", *rows]
        below = "".join(f"<div>{html.escape(line)}</div>" for line in self.below)
        return f"<table>{''.join(lines)}</table>{below}"


class Tabular:
    """Something that is a table when it is printed, and a better one when a notebook shows it."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._table().text()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._table().html()


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
