"""A study's numbers as text: what the paper prints beside what was measured, with intervals."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import xarray as xr

from dit_probe.reproduce.facts import COLUMNS, Facts
from dit_probe.reproduce.printed import MEANING, Kind, Numbers
from dit_probe.summary import markdown, summarise

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Curve:
    """Rows that are points along an axis.

    Attributes:
        axis: its name.
        points: row to label, in order.
        levels: rows that are drawn as lines across.
    """

    axis: str
    points: Mapping[str, str]
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One table of a study.

    Attributes:
        title: of the table.
        results: of `dit_probe.evaluate`, methods in the order of the rows.
        kind: which metrics the printed columns are.
        printed: the paper's rows, in percent.
        beside: measured row to the paper's row that it stands beside.
        shown: metrics of `dit_probe.summary.summarise` that follow the printed columns.
        curve: the axis, if the rows are a curve.
        facts: cells under `dit_probe.reproduce.facts.COLUMNS`, of measured rows and of the paper's.
        notes: where this leaves the paper, and what else has to be known.
    """

    title: str
    results: xr.Dataset
    kind: Kind
    printed: Mapping[str, Numbers]
    beside: Mapping[str, str]
    shown: tuple[str, ...]
    curve: Curve | None = None
    facts: Mapping[str, Facts] = field(default_factory=dict, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @cached_property
    def summary(self) -> xr.Dataset:
        """Means and intervals of every metric."""
        return summarise(self.results)

    @property
    def columns(self) -> dict[str, str]:
        """Title to metric: the printed columns, then the others."""
        return {**MEANING.get(self.kind, {}), **{metric: metric for metric in self.shown}}

    @property
    def rows(self) -> list[str]:
        """Names of the measured rows."""
        return self.summary.method.values.tolist()

    def cell(self, row: str, metric: str) -> dict[str, float]:
        """Mean, low, high, n and undefined of a measured row."""
        one = self.summary.sel({"method": row, "metric": metric})
        return {name: float(one[name]) for name in ("mean", "low", "high", "n", "undefined")}

    def paper(self, row: str, column: str) -> float | None:
        """What the paper prints for a row of its own, in percent."""
        names = list(MEANING.get(self.kind, {}))
        return self.printed[row][names.index(column)] if row in self.printed and column in names else None


def text(panel: Panel) -> str:
    """The table in Markdown; published numbers in columns of their own, in percent as all the paper's metrics.

    Rows of the paper that nothing here was measured for come last.
    """
    columns, names = panel.columns, MEANING.get(panel.kind, {}) if panel.printed else {}
    facts = COLUMNS if panel.facts else ()
    head = ["method", *facts]
    for title in columns:
        head += [f"{title}, paper", title] if title in names else [title]
    lines = [head]
    for row in panel.rows:
        line = [row, *panel.facts.get(row, [""] * len(facts))]
        for title, metric in columns.items():
            scale = 100 if title in MEANING.get(panel.kind, {}) else 1
            if title in names:
                line.append(_number(panel.paper(panel.beside.get(row, ""), title)))
            line.append(_interval(panel.cell(row, metric), scale))
        lines.append(line)
    for row in panel.printed:
        if row not in panel.beside.values():
            line = [row, *panel.facts.get(row, [""] * len(facts))]
            for title in columns:
                line += [_number(panel.paper(row, title)), NOT_MEASURED] if title in names else [NOT_MEASURED]
            lines.append(line)
    return "\n".join([f"### {panel.title}", "", markdown(lines), "", *(f"* {note}" for note in panel.notes)])


def table(panels: Sequence[Panel]) -> str:
    """All tables as one CSV: a line for every panel, row and metric; measured numbers as fractions."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["panel", "row", "column", "metric", "paper_percent", "mean", "low", "high", "n", "undefined"])
    for panel in panels:
        for title, metric in panel.columns.items():
            for row in panel.rows:
                cell = panel.cell(row, metric)
                printed = panel.paper(panel.beside.get(row, ""), title)
                numbers = [f"{cell[name]:.6g}" for name in ("mean", "low", "high")]
                counts = [int(cell["n"]), int(cell["undefined"])]
                writer.writerow([panel.title, row, title, metric, _plain(printed), *numbers, *counts])
            for row in panel.printed:
                if row not in panel.beside.values():
                    writer.writerow([panel.title, row, title, metric, _plain(panel.paper(row, title)), *[""] * 5])
    return buffer.getvalue()


def _interval(cell: Mapping[str, float], scale: float) -> str:
    if not cell["n"]:
        return "undefined"
    mean, low, high = (scale * cell[name] for name in ("mean", "low", "high"))
    digits = 1 if scale == 100 else 3
    left_out = f" ({int(cell['undefined'])} undefined)" if cell["undefined"] else ""
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{left_out}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _plain(value: Any) -> str:
    return "" if value is None else str(value)
