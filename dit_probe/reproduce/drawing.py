"""A study as a Plotly page: rows with their intervals and the paper's numbers, or curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_probe.panels import INK, Sheet
from dit_probe.report import Section, page
from dit_probe.reproduce.printed import MEANING
from dit_probe.reproduce.tables import Panel, text

COLOURS = ("#21918c", "#7b52ab", "#e07b39", "#8a8a8a")
PAPER = "#d1495b"
_GRID = "rgba(127,127,127,0.3)"


def drawn(title: str, lead: str, panels: Sequence[Panel]) -> str:
    """Compose the page of a study.

    Args:
        title: of the page.
        lead: what the study asks.
        panels: its tables.
    """
    sections = []
    for panel in panels:
        figures = [curves(panel)] if panel.curve else [intervals(panel)]
        body, _, notes = text(panel).partition("\n\n* ")
        sections.append(Section(panel.title, "", figures, code=body.partition("\n\n")[2]))
        sections.append(Section("What to know about it", code=f"* {notes}" if notes else ""))
    return page(title, sections, lead=lead)


def intervals(panel: Panel) -> Any:
    """A dot and its interval for every row and metric, side by side; the paper's numbers are open diamonds."""
    from plotly.subplots import make_subplots

    columns, rows = panel.columns, panel.rows[::-1]
    figure = make_subplots(1, len(columns), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=list(columns))
    for at, (title, metric) in enumerate(columns.items(), 1):
        cells = [panel.cell(row, metric) for row in rows]
        mean, low, high = (np.array([cell[name] for cell in cells]) for name in ("mean", "low", "high"))
        bars = {"type": "data", "array": high - mean, "arrayminus": mean - low, "color": COLOURS[0]}
        figure.add_scatter(
            x=mean, y=rows, error_x=bars, mode="markers", name="measured", marker={"color": COLOURS[0], "size": 8},
            showlegend=at == 1, row=1, col=at,
        )  # fmt: skip
        paper = [(row, panel.paper(panel.beside.get(row, ""), title)) for row in rows]
        paper = [(row, value / 100) for row, value in paper if value is not None]
        if title in MEANING.get(panel.kind, {}) and paper:
            figure.add_scatter(
                x=[value for _, value in paper], y=[row for row, _ in paper], mode="markers", name="the paper",
                marker={"color": PAPER, "symbol": "diamond-open", "size": 10}, showlegend=at == 1, row=1, col=at,
            )  # fmt: skip
    figure.update_layout(Sheet.page(1100, 110 + 26 * len(rows), {"l": 230, "r": 130, "t": 46, "b": 40}))
    figure.update_xaxes(gridcolor=_GRID, zeroline=False, range=[-0.03, 1.03], tickvals=[0, 0.5, 1])
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    figure.update_annotations(font={"size": 12, "color": INK})
    return figure


def curves(panel: Panel) -> Any:
    """Metrics along the panel's axis, with intervals; rows that are no points of it as lines across."""
    from plotly.subplots import make_subplots

    curve = panel.curve
    assert curve is not None
    columns, order = panel.columns, list(curve.points.values())
    figure = make_subplots(1, len(columns), horizontal_spacing=0.04, subplot_titles=list(columns))
    dashes = ("dash", "dot", "dashdot")
    for at, metric in enumerate(columns.values(), 1):
        cells = [panel.cell(row, metric) for row in curve.points]
        mean, low, high = (np.array([cell[name] for cell in cells]) for name in ("mean", "low", "high"))
        bars = {"type": "data", "array": high - mean, "arrayminus": mean - low, "color": COLOURS[0]}
        figure.add_scatter(
            x=order, y=mean, error_y=bars, name=f"by {curve.axis}", line={"color": COLOURS[0]},
            showlegend=at == 1, row=1, col=at,
        )  # fmt: skip
        for level, colour, dash in zip(curve.levels, COLOURS[1:], dashes, strict=False):
            value = panel.cell(level, metric)["mean"]
            figure.add_scatter(
                x=[order[0], order[-1]], y=[value, value], mode="lines", name=level,
                line={"color": colour, "dash": dash}, showlegend=at == 1, row=1, col=at,
            )  # fmt: skip
    figure.update_layout(Sheet.page(1100, 330, {"l": 50, "r": 170, "t": 46, "b": 50}))
    figure.update_xaxes(title=curve.axis, type="category", tickangle=0, showgrid=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    figure.update_annotations(font={"size": 12, "color": INK})
    return figure
