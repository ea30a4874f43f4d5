"""Runs a percent script as a notebook would, cell by cell, and writes what came of it as JSON.

    python docs/running.py tutorials/first_map.py result.json

A cell whose last line is an expression shows its value, a figure as Plotly JSON and as SVG. ``alt="…"`` beside a
cell's ``# %%`` is what its figure says in words.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CELL = re.compile(r"^# %%(?P<words> \[markdown\])?(?: alt=\"(?P<alt>.*)\")?$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """One cell of a script.

    Attributes:
        kind: "markdown" or "code".
        text: without comment marks where it is Markdown.
        alt: what its figure says in words.
        line: of its first line in the script, from 1.
    """

    kind: str
    text: str
    alt: str
    line: int


def cells(script: str) -> list[Cell]:
    r"""The cells of a percent script.

    Example:
        >>> [cell.kind for cell in cells('# %% [markdown]\n# # Why?\n\n# %% alt="a sun"\n1 + 1\n')]
        ['markdown', 'code']
    """
    marks = [*_CELL.finditer(script)]
    ends = [*(mark.start() for mark in marks[1:]), len(script)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        text, line = script[mark.end() + 1 : end], script[: mark.end()].count("\n") + 2
        kind = "markdown" if mark["words"] else "code"
        if kind == "markdown":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines())
        found.append(Cell(kind, text.strip("\n"), mark["alt"] or "", line))
    return found


def run(path: Path) -> list[dict[str, Any]]:
    """What a script says, prints and draws, a dictionary a cell."""
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    results = []
    for cell in cells(path.read_text(encoding="utf-8")):
        result = asdict(cell) | {"output": "", "figure": None}
        if cell.kind == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                value = execute(cell, str(path), names)
            if hasattr(value, "to_plotly_json"):
                from still import svg

                result["figure"] = {"json": value.to_json(), "svg": svg(value)}
            elif value is not None:
                printed.write(f"{value}\n")
            result["output"] = printed.getvalue()
        results.append(result)
    return results


def execute(cell: Cell, path: str, names: dict[str, Any]) -> Any:
    """The value of a cell's last line, where that is an expression."""
    tree = ast.increment_lineno(ast.parse(cell.text), cell.line - 1)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, path, "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), path, "exec"), names)
    return eval(compile(ast.Expression(last.value), path, "eval"), names)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(Path(sys.argv[1]).resolve())), encoding="utf-8")
