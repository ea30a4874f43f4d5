"""Puts measured numbers into pages when the site is built: ``<!-- attend.json Flux/ratios: median q25 -->`` is a table.

The file is one of benchmarks/results, the path leads to a mapping of rows or a list of them, and the names are columns.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
_MARK = re.compile(r"<!-- (?P<file>[\w-]+\.json) (?P<path>[^:]*): (?P<columns>.*) -->")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace every mark of a page."""
    return _MARK.sub(table, markdown)


def table(mark: re.Match[str]) -> str:
    """The table of one mark; a file, row or column that is not there fails the build."""
    found = json.loads((RESULTS / mark["file"]).read_text(encoding="utf-8"))
    for part in filter(None, mark["path"].split("/")):
        found = found[part]
    columns = [name.strip() for name in mark["columns"].split(";")]
    named = isinstance(found, dict)
    rows = {name: row for name, row in found.items() if isinstance(row, dict)} if named else dict(enumerate(found))
    lines = [["what"] * named + columns, ["---"] * (named + len(columns))]
    lines += [[str(name)] * named + [_number(row[column]) for column in columns] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
