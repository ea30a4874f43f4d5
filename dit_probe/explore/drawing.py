"""Figures of one view, what they say in words, as numbers, and the Python lines that draw them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from dit_probe import figures
from dit_probe.explore.source import Source, View
from dit_probe.panels import INK, SCALE, Sheet, label
from dit_probe.schema import ranges

_PANEL, _BESIDE = 204, 106
"""Pixels that a panel of an overlay takes with its gap, and all of them leave for margins and colour bar."""

_HALO = ({"color": "#000000", "width": 3.5}, {"color": "#ffffff", "width": 1.5})
"""Lines that are seen on every colour of the scale and of a picture."""


def columns(width: float | None) -> int:
    """Panels that stand beside each other in so many pixels.

    Example:
        >>> columns(940), columns(340)
        (4, 1)
    """
    return max(1, min(5, int(((width or 940) - _BESIDE) // _PANEL)))


def overlay(source: Source, view: View, maps: xr.DataArray, *, shared: bool, across: int) -> go.Figure:
    """The image, and under the map of every concept, as `dit_probe.figures.overlay`; what `lines` draws again."""
    return figures.overlay(source.picture(view), at_frame(maps, view), shared=shared, columns=across)


def at_frame(maps: xr.DataArray, view: View) -> xr.DataArray:
    """The maps of the view's frame, where there are frames."""
    return maps.isel(frame=view.frame) if "frame" in maps.dims else maps


def marked(
    figure: go.Figure, patch: tuple[int, int] | None, masks: xr.DataArray | None, grid: Sequence[int]
) -> go.Figure:
    """Mark the chosen patch in every panel, and outline each concept's mask in its own.

    Args:
        figure: of `overlay`; it is changed.
        patch: (row, column).
        masks: (concept, y, x) bool, in the order of the panels.
        grid: rows and columns of the maps.
    """
    traces: Any = figure.data
    heats = [trace for trace in traces if trace.type == "heatmap"]
    pictures = [trace for trace in traces if trace.type == "image"]
    panels = list(dict.fromkeys((trace.xaxis or "x", trace.yaxis or "y") for trace in [*pictures, *heats]))
    for trace in pictures:
        trace.hoverinfo = "none"  # clicks on the picture count too
    shapes: list[dict[str, Any]] = []
    for index, (x, y) in enumerate(panels if masks is None else panels[-masks.sizes["concept"] :]):
        if masks is not None:
            path = outline(masks.values[index], grid)
            shapes += [_shape("path", x, y, line, path=path) for line in _HALO if path]
    for x, y in panels if patch else ():
        row, column = patch or (0, 0)
        box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
        shapes += [_shape("rect", x, y, line, **box) for line in _HALO]
    figure.update_layout(shapes=shapes)
    return figure


def course(cells: xr.DataArray, *, chosen: tuple[int | None, int | None], width: float | None) -> go.Figure:
    """Values at one patch by layer and step, a panel a concept.

    Args:
        cells: (concept, step, layer).
        chosen: (layer, step) to mark; None: every one.
        width: pixels that there are.
    """
    cells = cells.transpose("concept", "step", "layer")
    titles = names(cells)
    layers, steps = cells["layer"].values.tolist(), cells["step"].values.tolist()
    wide = int(np.clip(26 * len(layers), 180, 300))
    high = int(np.clip(16 * len(steps), 60, 190))
    gap, margin = (16, 62), {"l": 58, "r": 92, "t": 34, "b": 48}
    across = max(1, min(len(titles), int(((width or 940) - margin["l"] - margin["r"] + gap[0]) // (wide + gap[0]))))
    rows = -(-len(titles) // across)
    total = across * wide + (across - 1) * gap[0], rows * high + (rows - 1) * gap[1]
    layout = Sheet.page(total[0] + margin["l"] + margin["r"], total[1] + margin["t"] + margin["b"], margin)
    low, high_value = float(np.nanmin(cells.values)), float(np.nanmax(cells.values))
    bar = {"thickness": 12, "outlinewidth": 0, "tickfont": {"size": 11}, "nticks": 4, "xpad": 14, "ypad": 0}
    layout["coloraxis"] = {"colorscale": SCALE, "cmin": low, "cmax": high_value, "colorbar": bar}
    data, notes, shapes = [], [], []
    for index, name in enumerate(titles):
        row, column = divmod(index, across)
        x, y = column * (wide + gap[0]), row * (high + gap[1])
        number = "" if index == 0 else str(index + 1)
        plain = {"type": "category", "showgrid": False, "zeroline": False, "tickfont": {"size": 11}, "tickangle": 0}
        layout[f"xaxis{number}"] = plain | {
            "domain": [x / total[0], (x + wide) / total[0]],
            "anchor": f"y{number}",
            "nticks": 8,
            "range": [-0.5, len(layers) - 0.5],
            "title": {"text": "layer" if index + across >= len(titles) else "", "font": {"size": 12}, "standoff": 6},
        }
        layout[f"yaxis{number}"] = plain | {
            "domain": [1 - (y + high) / total[1], 1 - y / total[1]],
            "anchor": f"x{number}",
            "nticks": 6,
            "range": [len(steps) - 0.5, -0.5],
            "showticklabels": column == 0,
            "ticks": "outside" if column == 0 else "",
            "title": {"text": "step" if column == 0 else "", "font": {"size": 12}, "standoff": 6},
        }
        heat = {"type": "heatmap", "z": cells.values[index], "x": list(map(str, layers)), "y": list(map(str, steps))}
        hover = f"{label(name)}<br>layer %{{x}}, step %{{y}}<br><b>%{{z:.4g}}</b><extra></extra>"
        place = {"coloraxis": "coloraxis", "xaxis": f"x{number}", "yaxis": f"y{number}", "xgap": 1, "ygap": 1}
        data.append(heat | place | {"hovertemplate": hover, "hoverongaps": False})
        title = {"text": label(name, max(wide // 8, 6)), "showarrow": False, "xref": "paper", "yref": "paper"}
        at = {"x": (x + wide / 2) / total[0], "y": 1 - y / total[1], "xanchor": "center", "yanchor": "bottom"}
        notes.append(title | at | {"yshift": 2, "font": {"color": INK, "size": 13}})
        if any(label is not None for label in chosen):
            (x0, x1), (y0, y1) = _edges(layers, chosen[0]), _edges(steps, chosen[1])
            box = {"x0": x0, "x1": x1, "y0": y0, "y1": y1}
            shapes += [_shape("rect", f"x{number}", f"y{number}", line, **box) for line in _HALO]
    return go.Figure({"data": data, "layout": layout | {"annotations": notes, "shapes": shapes}})


def sentence(maps: xr.DataArray) -> str:
    """A figure of maps (concept, y, x) in words, for those who do not see it.

    Example:
        >>> maps = xr.DataArray(np.eye(2)[None] * [[0.5], [1]], dims=("concept", "y", "x"), coords={"concept": ["sun"]})
        >>> sentence(maps)
        'Maps of 1 concept on 2 × 2 patches. sun: 0 to 1, highest in row 1, column 1.'
    """
    count, rows, wide = maps.shape
    parts = [f"Maps of {count} concept{'s' if count > 1 else ''} on {rows} × {wide} patches."]
    for name, values in zip(names(maps), maps.values, strict=True):
        if np.isfinite(values).any():
            row, column = np.unravel_index(np.nanargmax(values), values.shape)
            low, high = np.nanmin(values), np.nanmax(values)
            parts.append(f"{name}: {low:.3g} to {high:.3g}, highest in row {row}, column {column}.")
    return " ".join(parts)


def table(maps: Mapping[str, xr.DataArray]) -> str:
    """Maps (concept, [frame,] y, x) as CSV: run, concept, frame, y, x, value; exact to float32.

    Example:
        >>> print(table({"run": xr.DataArray([[[0.5]]], dims=("concept", "y", "x"), coords={"concept": ["sun"]})}))
        run,concept,frame,y,x,value
        run,sun,0,0,0,0.5
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "concept", "frame", "y", "x", "value"])
    for run, array in maps.items():
        array = array if "frame" in array.dims else array.expand_dims("frame", 1)
        words = names(array)
        for index, value in np.ndenumerate(array.transpose("concept", "frame", "y", "x").values):
            writer.writerow([run, words[index[0]], *index[1:], f"{value:.9g}"])
    return text.getvalue().rstrip("\n")


def lines(source: Source, view: View, *, shared: bool, across: int, figure: str = "figure") -> str:
    """Python lines that draw `overlay` again, bound to the name `figure`; names are quoted, whatever is in them."""
    options = {name: repr(value) for name, value in source.spaces[view.space].items() if name != "space"}
    options["softmax"] = repr(view.softmax)
    every = source.offered(view.space)
    for name, chosen, offered in zip(("layers", "steps"), (view.layers, view.steps), every, strict=True):
        if list(chosen) != offered:
            options[name] = _listed(chosen)
    if view.heads:
        options["heads"] = repr(list(view.heads))
    arguments = ", ".join(f"{name}={value}" for name, value in options.items())
    picked = [f"frame={view.frame}"] if source.grid[0] > 1 else []
    if len(view.concepts) < source.ds.sizes["concept"]:
        picked.append(f"concept={list(view.concepts)}")
    isel = f".isel({', '.join(picked)})" if picked else ""
    picture = "None"
    if "image" in source.ds:
        frame = source.pixels("image", view).get("pixel_frame")
        picture = "one.image" if frame is None else f"one.image.isel(pixel_frame={frame})"
    opened = f"dp.open({source.path!r})" if source.path else "...  # the dataset that the explorer was given"
    branch = f".sel(branch={view.branch!r})" if view.branch else ""
    return "\n".join(
        [
            f"ds = {opened}",
            f"one = ds.isel(sample={view.sample}){branch}",
            f"maps = dp.maps.saliency(one, {source.spaces[view.space]['space']!r}, {arguments}){isel}",
            f"{figure} = dp.figures.overlay({picture}, maps, shared={shared}, columns={across})",
        ]
    )


def outline(mask: np.ndarray, grid: Sequence[int]) -> str:
    """The edges of a mask's pixels as an SVG path.

    Args:
        mask: (y, x) bool in pixels; thinned to 128 of them a side, which browsers draw at once.
        grid: rows and columns of the patches that the path counts in, the middle of the first one at 0.

    Example:
        >>> outline(np.ones((1, 1), bool), (4, 4))
        'M-0.5,-0.5H3.5M-0.5,3.5H3.5M-0.5,-0.5V3.5M3.5,-0.5V3.5'
    """
    thin = -(-max(mask.shape) // 128)
    mask = mask[::thin, ::thin]
    high, wide = mask.shape
    dy, dx = grid[0] / high, grid[1] / wide
    padded = np.pad(mask, 1)
    path = []
    for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):
        path.append(f"M{column * dx - 0.5:.4g},{row * dy - 0.5:.4g}H{(column + 1) * dx - 0.5:.4g}")
    for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        path.append(f"M{column * dx - 0.5:.4g},{row * dy - 0.5:.4g}V{(row + 1) * dy - 0.5:.4g}")
    return "".join(path)


def summary(source: Source, view: View) -> str:
    """What a view averages, in a line."""
    softmax = {"each": "softmax in every layer and step", "after": "softmax of the mean", None: "no softmax"}
    parts = [f"{view.space} space" if view.space in ("output", "value") else view.space, softmax[view.softmax]]
    parts += [f"layers {ranges(view.layers)}", f"steps {ranges(view.steps)}"]
    if view.heads:
        parts.append(f"heads {ranges(sorted(view.heads))}")
    if view.branch:
        parts.append(f"branch {view.branch}")
    return " · ".join(parts)


def _listed(labels: Sequence[int]) -> str:
    together = list(labels) == list(range(labels[0], labels[-1] + 1))
    return f"range({labels[0]}, {labels[-1] + 1})" if together and len(labels) > 3 else str(list(labels))


def _edges(labels: Sequence[int], label: int | None) -> tuple[float, float]:
    """Where a label's cell begins and ends on an axis of categories; none: all of them."""
    first = labels.index(label) if label in labels else 0
    return first - 0.5, (first + 1 if label in labels else len(labels)) - 0.5


def names(maps: xr.DataArray) -> list[str]:
    """What the concepts of maps are called."""
    return [str(name) for name in maps["concept_name" if "concept_name" in maps.coords else "concept"].values]


def _shape(kind: str, x: str, y: str, line: dict[str, Any], **place: Any) -> dict[str, Any]:
    return {"type": kind, "xref": x, "yref": y, "line": line, "fillcolor": "rgba(0,0,0,0)", **place}
