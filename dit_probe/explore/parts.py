"""The parts of the page about one run: its figures, and the same in a table; and what is taken away from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from dash import html

from dit_probe import report
from dit_probe.explore import drawing
from dit_probe.explore.choices import Chosen, Runs, at
from dit_probe.explore.source import METRICS, Source, View

PROPERTIES = {
    "title": "children",
    "maps": "figure",
    "words": "children",
    "numbers": "children",
    "where": "children",
    "course": "figure",
}
"""Names of the parts, and the property of their element that they fill."""


def run(source: Source, view: View, chosen: Chosen, patch: tuple[int, int] | None, width: float) -> dict[str, Any]:
    """The parts about one run, by the names of `PROPERTIES`.

    Args:
        source: the run.
        view: what is shown of it, ranges of layers and steps whole.
        chosen: values of the controls.
        patch: (row, column), if one is chosen.
        width: pixels that there are.

    Raises:
        MapError: nothing to show, or nothing but NaN.
        MetricError: masks that do not fit the maps.
    """
    now = at(view, chosen)
    maps = source.maps(now)
    still = drawing.at_frame(maps, now)
    figure = drawing.overlay(source, now, maps, **_options(chosen, width))
    masks = source.masks(now) if "outline" in chosen["drawing"] else None
    drawing.marked(figure, patch, masks, source.grid[1:])
    parts = {"title": heading(source, now), "maps": figure, "words": drawing.sentence(still)}
    parts["numbers"] = _numbers(still, patch, source.metrics(now, still))
    if patch is None:
        return parts | {"where": "Click on a patch to see its layers and steps", "course": _nothing()}
    cells = drawing.at_frame(source.maps(view, over=()), view).isel(y=patch[0], x=patch[1])
    course = drawing.course(cells, chosen=(chosen["layer"], chosen["step"]), width=width)
    return parts | {"where": f"Row {patch[0]}, column {patch[1]}, by layer and step", "course": course}


def heading(source: Source, view: View) -> str:
    """The run, the sample and what was painted."""
    prompt = source.prompt(view.sample)
    return f"{source.name}, sample {view.sample}" + (f": {prompt}" if prompt else "")


def lines(runs: Runs, chosen: Chosen, width: float | None) -> str:
    """Python lines that draw the figures of all runs again: ``figure``, and ``beside`` for the second."""
    parts = [
        drawing.lines(source, at(view, chosen), figure=name, **_options(chosen, width))
        for name, (source, view) in zip(("figure", "beside"), runs.values(), strict=False)
    ]
    return "\n\n".join(["import dit_probe as dp", *parts]) + "\n"


def table(runs: Runs, chosen: Chosen) -> str:
    """The maps that are shown as CSV."""
    return drawing.table({name: source.maps(at(view, chosen)) for name, (source, view) in runs.items()}) + "\n"


def page(runs: Runs, chosen: Chosen, width: float | None) -> str:
    """The maps that are shown as one self-contained HTML page."""
    sections = []
    for source, view in runs.values():
        now = at(view, chosen)
        figure = drawing.overlay(source, now, source.maps(now), **_options(chosen, width))
        sections.append(report.Section(heading(source, now), drawing.summary(source, now), [figure]))
    sections.append(report.Section("The same in Python", code=lines(runs, chosen, width)))
    return report.page("Concept maps", sections)


def between(chosen: list[int], every: tuple[int, ...]) -> str:
    """A range in words.

    Example:
        >>> between([0, 3], (0, 1, 2, 3)), between([3, 1], (0, 1, 2, 3)), between([2, 2], (0, 1, 2, 3))
        ('all: 0 to 3', '1 to 3', '2')
    """
    low, high = sorted(chosen)
    text = f"{low} to {high}" if low < high else str(low)
    return f"all: {text}" if low <= every[0] and high >= every[-1] else text


def _options(chosen: Chosen, width: float | None) -> dict[str, Any]:
    return {"shared": "shared" in chosen["drawing"], "across": drawing.columns(width)}


def _numbers(maps: xr.DataArray, patch: tuple[int, int] | None, measured: dict[str, list[float]]) -> Any:
    """A table of what the figure shows, a row a concept."""
    heads = ["Concept", *(["At the patch"] if patch else []), "Lowest", "Highest", "in row", "column"]
    rows = []
    for index, (name, values) in enumerate(zip(drawing.names(maps), maps.values, strict=True)):
        row = [_digits(values[patch])] if patch else []
        if np.isfinite(values).any():
            top = map(str, np.unravel_index(np.nanargmax(values), values.shape))
            row += [_digits(np.nanmin(values)), _digits(np.nanmax(values)), *top]
        else:
            row += ["–"] * 4
        row += [_digits(numbers[index]) for numbers in measured.values()]
        rows.append(html.Tr([html.Th(name, scope="row"), *map(html.Td, row)]))
    titles = [html.Th(head, scope="col") for head in [*heads, *(METRICS[name] for name in measured)]]
    return html.Table([html.Thead(html.Tr(titles)), html.Tbody(rows)])


def _digits(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "–"


def _nothing() -> dict[str, Any]:
    hidden, clear = {"visible": False}, "rgba(0,0,0,0)"
    layout = {"xaxis": hidden, "yaxis": hidden, "height": 10, "width": 10, "margin": dict.fromkeys("lrtb", 0)}
    return {"data": [], "layout": layout | {"paper_bgcolor": clear, "plot_bgcolor": clear}}
