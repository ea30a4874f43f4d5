"""Figures of maps: plotly figures, readable on light and dark pages; ``figure.write_html(path)`` is self-contained.

Every figure is laid out in pixels, has square patches, a colour-blind safe scale (viridis) and, on hover, the concept,
the patch and the value. Zooming into one panel zooms into all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from dit_probe.errors import MapError
from dit_probe.panels import SCALE, Sheet, data_uri, label, pixels
from dit_probe.statistics import bootstrap

_PANEL = 190
"""Longer side of a panel of an overlay, in screen pixels."""
_LINES = (("33,145,140", "solid"), ("200,100,27", "solid"), ("118,118,118", "dot"))
"""Colour and dash of the lines of a plot, readable on light and dark."""


def overlay(
    image: Any, maps: xr.DataArray, *, opacity: float = 0.6, shared: bool = True, columns: int | None = None
) -> go.Figure:
    """The image, then the image under the map of each concept.

    Args:
        image: PIL image, (y, x, 3) array of uint8 or of floats in 0..1, or DataArray; None draws the maps alone.
        maps: (concept, y, x) of one sample, as `dit_probe.maps.saliency` gives; patches are stretched to the image.
        opacity: of the maps, 0..1.
        shared: one colour scale for all concepts; False gives each its own, to see a faint map (no colour bar).
        columns: panels a row; None: at most five, in rows as even as they can be.

    Returns:
        A figure of as many rows as it takes.

    Raises:
        MapError: several samples, branches, heads or frames; an image of another shape; nothing but NaN.

    Example:
        >>> maps = xr.DataArray(np.eye(4).reshape(2, 2, 4), dims=("concept", "y", "x"), coords={"concept": ["a", "b"]})
        >>> len(overlay(np.zeros((16, 32, 3), "uint8"), maps).data)  # three pictures, two maps
        5
    """
    maps = _one(maps, ("concept", "y", "x"))
    names = _names(maps, "concept")
    picture = None if image is None else pixels(image)
    first = 0 if picture is None else 1
    columns = min(columns or _columns(first + len(names)), first + len(names))
    height, width = maps.shape[-2:]
    sheet = Sheet(-(-(first + len(names)) // columns), columns, (height, width), side=_PANEL, shape=_shape(picture))
    source = None if picture is None else data_uri(picture)
    if source:
        sheet.picture(source, 0)
        sheet.title("image", 0)
    for index, name in enumerate(names):
        if source:
            sheet.picture(source, first + index)
        sheet.heat(maps.values[index], first + index, hover={"concept": name}, opacity=opacity if source else 1)
        sheet.title(name, first + index)
    _scale(sheet, maps, shared)
    return sheet.figure()


def small_multiples(maps: xr.DataArray, column: str = "layer", *, shared: bool = True) -> go.Figure:
    """A grid of maps: concepts down, layers (or steps, heads …) across.

    Args:
        maps: (concept, `column`, y, x) of one sample, for example ``saliency(ds, over=("step",))`` for layers.
        column: the dim across: ``layer``, ``step``, ``head``, ``branch`` …
        shared: one colour scale for all; False gives each panel its own.

    Raises:
        MapError: as `overlay`; no such dim.

    Example:
        >>> maps = xr.DataArray(np.random.rand(2, 3, 4, 4), dims=("concept", "layer", "y", "x"))
        >>> len(small_multiples(maps, "layer").data)
        6
    """
    maps = _one(maps, ("concept", column, "y", "x"))
    names, across = _names(maps, "concept"), _names(maps, column)
    height, width = maps.shape[-2:]
    side = int(np.clip(960 / len(across), 56, 150))
    sheet = Sheet(len(names), len(across), (height, width), side=side, gap=(4, 4), left=True, top=_lines(across))
    for row, name in enumerate(names):
        sheet.row_title(name, row)
        for index, text in enumerate(across):
            values = maps.values[row, index]
            sheet.heat(values, row * len(across) + index, hover={"concept": name, column: _flat(text)})
    for index, text in enumerate(across):
        sheet.title(text, index, wrap=False)
    sheet.corner(column)
    _scale(sheet, maps, shared)
    return sheet.figure()


def spaces(image: Any, maps: Mapping[str, xr.DataArray], *, opacity: float = 0.6) -> go.Figure:
    """The same concepts in several spaces side by side: concepts down, spaces across, a colour scale per space.

    Args:
        image: as `overlay`; None draws the maps alone.
        maps: title of a column to its maps, e.g. ``{space: saliency(ds, space) for space in ("output", "value",
            "cross")}``; each (concept, y, x) of one sample, of the same concepts.
        opacity: of the maps, 0..1.

    Raises:
        MapError: as `overlay`; no maps; different concepts or grids.

    Example:
        >>> maps = xr.DataArray(np.random.rand(2, 4, 4), dims=("concept", "y", "x"))
        >>> len(spaces(None, {"output": maps, "cross": maps}).data)
        4
    """
    if not maps:
        raise MapError("no maps to compare; pass for instance {'output': saliency(ds, 'output'), …}")
    chosen = {name: _one(array, ("concept", "y", "x"), f"maps[{name!r}]") for name, array in maps.items()}
    first = next(iter(chosen.values()))
    names = _names(first, "concept")
    for name, array in chosen.items():
        if _names(array, "concept") != names or array.shape != first.shape:
            raise MapError(
                f"maps[{name!r}] has concepts {_names(array, 'concept')} on a grid of {array.shape[1:]}, the first has "
                f"{names} on {first.shape[1:]}. Compare the same concepts of the same trace"
            )
    picture = None if image is None else pixels(image)
    source = None if picture is None else data_uri(picture)
    before = 1 if source else 0
    columns = before + len(chosen)
    sheet = Sheet(
        len(names), columns, first.shape[1:], side=150, gap=(10, 10), left=True, bars=True, shape=_shape(picture)
    )
    for row, name in enumerate(names):
        sheet.row_title(name, row)
        if source:
            for index in range(columns):
                sheet.picture(source, row * columns + index)
        for index, (title, array) in enumerate(chosen.items()):
            hover = {"space": title, "concept": name}
            opaque = opacity if source else 1
            sheet.heat(array.values[row], row * columns + before + index, hover=hover, opacity=opaque, scale=index + 1)
    if source:
        sheet.title("image", 0)
    for index, (title, array) in enumerate(chosen.items()):
        sheet.title(title, before + index)
        sheet.color_axis(array.values, index + 1, _quantity(array, short=True), column=before + index)
    return sheet.figure()


def video(frames: Any, maps: xr.DataArray, *, opacity: float = 0.6, shared: bool = True) -> go.Figure:
    """A video and the maps of its concepts, with a frame slider.

    Args:
        frames: list of PIL images or (frame, y, x, 3) array; None draws the maps alone. There may be more of them than
            maps (a video VAE compresses time): each shows the map nearest in time, the ends meeting the ends.
        maps: (concept, frame, y, x) of one sample.
        opacity: of the maps, 0..1.
        shared: one colour scale for all concepts; False gives each its own over the whole video.

    Raises:
        MapError: as `overlay`; fewer frames than maps.

    Example:
        >>> maps = xr.DataArray(np.random.rand(2, 3, 4, 4), dims=("concept", "frame", "y", "x"))
        >>> len(video(np.zeros((9, 16, 16, 3), "uint8"), maps).frames)
        9
    """
    maps = _one(maps, ("concept", "frame", "y", "x"))
    names, there = _names(maps, "concept"), maps.sizes["frame"]
    pictures = None if frames is None else [pixels(frame) for frame in frames]
    count = there if pictures is None else len(pictures)
    if count < there:
        raise MapError(f"{count} frames for {there} frames of maps: pass every frame of the video, or frames=None")
    first = 0 if pictures is None else 1
    nearest = np.rint(np.linspace(0, there - 1, count)).astype(int)
    sources = [data_uri(picture, side=256) for picture in pictures or ()]
    columns = _columns(first + len(names))
    sheet = Sheet(
        -(-(first + len(names)) // columns),
        columns,
        maps.shape[-2:],
        side=_PANEL + 30,
        shape=_shape(pictures[0] if pictures else None),
        slider=True,
    )

    def draw(frame: int) -> None:
        for index in range(first + len(names) if sources else 0):
            sheet.picture(sources[frame], index)
        for index, name in enumerate(names):
            hover = {"concept": name, "frame": str(frame)}
            opaque = opacity if sources else 1
            sheet.heat(maps.values[index, nearest[frame]], first + index, hover=hover, opacity=opaque)
        _scale(sheet, maps, shared, per_panel=maps.values)

    for frame in range(count):
        sheet.frame(str(frame), draw, frame)
    if sources:
        sheet.title("video", 0)
    for index, name in enumerate(names):
        sheet.title(name, first + index)
    return sheet.figure()


def ablation(table: xr.DataArray) -> go.Figure:
    """Any quantity by layer and step: a heat map, with its mean over steps above and over layers beside it.

    Args:
        table: (layer, step) in any order; NaN cells stay empty and are left out of the means. Its name and its
            attribute ``units`` are printed; ``timestep(step)`` labels the steps where it is there.

    Raises:
        MapError: other dims; nothing but NaN.

    Example:
        >>> table = xr.DataArray(np.random.rand(3, 2), dims=("layer", "step"), name="accuracy")
        >>> [trace.type for trace in ablation(table).data]
        ['heatmap', 'scatter', 'scatter']
    """
    table = _one(table, ("step", "layer"), "table")
    layers, steps = _names(table, "layer"), [_flat(text) for text in _names(table, "step")]
    quantity = _with_units(table)
    cell = int(np.clip(640 / len(layers), 14, 44)), int(np.clip(400 / len(steps), 12, 44))
    wide, high = max(cell[0] * len(layers), 220), max(cell[1] * len(steps), 110)
    margin, side, gap = {"l": 110, "r": 100, "t": 44, "b": 56}, 90, 12
    across, down = wide + gap + side, high + gap + side
    by_layer, by_step = table.mean("step").values, table.mean("layer").values
    hover = f"layer %{{x}}<br>step %{{y}}<br>{quantity} <b>%{{z:.4g}}</b><extra></extra>"
    line = {"type": "scatter", "mode": "lines+markers", "line": {"color": "#21918c"}, "showlegend": False}
    bar = {"thickness": 12, "outlinewidth": 0, "len": high, "lenmode": "pixels", "x": 1, "xpad": 16, "y": 0, "ypad": 0}
    bar |= {"yanchor": "bottom", "title": {"text": quantity, "side": "right", "font": {"size": 13}}}
    cells = {"type": "heatmap", "colorscale": SCALE, "colorbar": bar, "xgap": 1, "ygap": 1, "hoverongaps": False}
    over_steps = f"layer %{{x}}<br>mean over steps {quantity} %{{y:.4g}}<extra></extra>"
    over_layers = f"step %{{y}}<br>mean over layers {quantity} %{{x:.4g}}<extra></extra>"
    data = [
        {**cells, "z": table.values, "x": layers, "y": steps, "hovertemplate": hover},
        {**line, "x": layers, "y": by_layer, "yaxis": "y2", "hovertemplate": over_steps},
        {**line, "x": by_step, "y": steps, "xaxis": "x2", "hovertemplate": over_layers},
    ]
    plain = {"showgrid": False, "zeroline": False, "type": "category", "tickangle": 0}
    plain |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    value = {"gridcolor": "rgba(127,127,127,0.3)", "zeroline": False, "nticks": 4, "tickfont": {"size": 10}}
    timed = "step (timestep)" if "timestep" in table.coords else "step"
    layout = Sheet.page(across + margin["l"] + margin["r"], down + margin["t"] + margin["b"], margin) | {
        "xaxis": {**plain, "domain": [0, wide / across], "range": [-0.5, len(layers) - 0.5], **_titled("layer")},
        "yaxis": {**plain, "domain": [0, high / down], "range": [len(steps) - 0.5, -0.5], **_titled(timed)},
        "yaxis2": {**value, "domain": [(high + gap) / down, 1], "anchor": "x", **_titled("mean")},
        "xaxis2": {**value, "nticks": 3, "domain": [(wide + gap) / across, 1], "anchor": "y", **_titled("mean")},
    }
    return go.Figure({"data": data, "layout": layout})


def curves(score: xr.DataArray) -> go.Figure:
    """An effect by the share of tokens that is ablated: one line an order, with a band, its 95 % interval over samples.

    Args:
        score: (order, share[, sample]), as `dit_probe.causal.curves` gives, of one region, concept or the like. Lines
            are means of the samples that are defined; intervals are those of `dit_probe.statistics.bootstrap`. Its name
            and its attribute ``units`` are printed.

    Raises:
        MapError: other dims; nothing but NaN.

    Example:
        >>> score = xr.DataArray(np.random.rand(3, 5, 8), dims=("order", "share", "sample"), name="change")
        >>> len(curves(score.assign_coords(share=np.linspace(0, 1, 5))).data)  # a line and a band each
        6
    """
    score = score if "sample" in score.dims else score.expand_dims("sample")
    score = _one(score, ("order", "share", "sample"), "score")
    found = bootstrap(score)
    share, quantity = score["share"].values, _with_units(score)
    data: list[dict[str, Any]] = []
    for index, name in enumerate(_names(score, "order")):
        mean, low, high = (found[part].values[index] for part in ("mean", "low", "high"))
        colour, dash = _LINES[index % len(_LINES)]
        inside = {"type": "scatter", "x": [*share, *share[::-1]], "y": [*low, *high[::-1]], "hoverinfo": "skip"}
        data.append(
            {**inside, "fill": "toself", "fillcolor": f"rgba({colour},0.2)", "mode": "none", "showlegend": False}
        )
        line = {"type": "scatter", "x": share, "y": mean, "name": name, "mode": "lines+markers"}
        hover = f"{label(name)}, %{{x:.0%}} ablated<br>{quantity} <b>%{{y:.4g}}</b><extra></extra>"
        data.append({**line, "line": {"color": f"rgb({colour})", "dash": dash}, "hovertemplate": hover})
    axis = {"gridcolor": "rgba(127,127,127,0.3)", "zeroline": False}
    layout = Sheet.page(560, 400, {"l": 84, "r": 24, "t": 52, "b": 60}) | {
        "xaxis": {**axis, "tickformat": ".0%", **_titled("tokens ablated")},
        "yaxis": {**axis, **_titled(quantity)},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"},
    }
    return go.Figure({"data": data, "layout": layout})


def _with_units(table: xr.DataArray) -> str:
    """Name and units of what an axis or a colour bar shows."""
    return label(str(table.name or "value") + (f" [{table.attrs['units']}]" if "units" in table.attrs else ""))


def _titled(text: str) -> dict[str, Any]:
    return {"title": {"text": text, "font": {"size": 13}, "standoff": 8}}


def _one(maps: Any, dims: Sequence[str], what: str = "maps") -> xr.DataArray:
    """The array with exactly these dims, in this order and in memory; other dims of length one are dropped."""
    if not isinstance(maps, xr.DataArray):
        raise MapError(f"{what} must be an xarray.DataArray ({', '.join(dims)}), got {type(maps).__name__}")
    missing = [dim for dim in dims if dim not in maps.dims]
    if missing:
        raise MapError(f"{what} has dims {maps.dims}, without {', '.join(missing)}; it needs ({', '.join(dims)})")
    maps = maps.squeeze([dim for dim in maps.dims if dim not in dims and maps.sizes[dim] == 1])
    extra = [dim for dim in maps.dims if dim not in dims]
    if extra:
        found = ", ".join(f"{dim} ({maps.sizes[dim]})" for dim in extra)
        choice = ", ".join(f"{dim}=0" for dim in extra)
        films = ", or draw all frames with dit_probe.figures.video" if "frame" in extra else ""
        raise MapError(f"{what} has several along {found}; a figure shows one. Select it: .isel({choice}){films}")
    maps = maps.transpose(*dims).load()
    if not np.isfinite(maps.values).any():
        raise MapError(
            f"{what} holds nothing but NaN: the recording of this sample is incomplete (dit_probe.open says)"
        )
    return maps.astype("float32") if maps.dtype != np.float64 else maps


def _names(maps: xr.DataArray, dim: str) -> list[str]:
    """What to call each position along a dim: its label, and for steps the timestep below it."""
    coord = "concept_name" if dim == "concept" and "concept_name" in maps.coords else dim
    if coord not in maps.coords:
        return [f"concept {i}" if dim == "concept" else str(i) for i in range(maps.sizes[dim])]
    names = [str(value) for value in maps[coord].values]
    if dim == "step" and "timestep" in maps.coords and maps["timestep"].dims == ("step",):
        return [f"{name}\nt {value:.4g}" for name, value in zip(names, maps["timestep"].values, strict=True)]
    return names


def _flat(text: str) -> str:
    return text.replace("\n", " (") + ")" if "\n" in text else text


def _lines(texts: Sequence[str]) -> int:
    return max(text.count("\n") for text in texts) + 1


def _columns(panels: int) -> int:
    """Panels a row, at most five, so that the rows are as even as they can be."""
    return -(-panels // -(-panels // 5))


def _shape(picture: np.ndarray | None) -> tuple[int, int] | None:
    return None if picture is None else (picture.shape[0], picture.shape[1])


def _quantity(maps: xr.DataArray, *, short: bool = False) -> str:
    """Title of a colour bar."""
    unit = "softmax over concepts" if maps.attrs.get("softmax") else "score"
    unit = str(maps.name or "value") if "space" not in maps.attrs else unit
    return unit if short or "space" not in maps.attrs else f"{maps.attrs['space']} space\n{unit}"


def _scale(sheet: Sheet, maps: xr.DataArray, shared: bool, per_panel: np.ndarray | None = None) -> None:
    if shared:
        sheet.color_axis(maps.values, 1, _quantity(maps))
    else:
        sheet.own_scales(per_panel)
