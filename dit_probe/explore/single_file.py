"""One HTML file with the maps of a trace, to send to somebody: no network, no server, readable without JavaScript."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.colors
import xarray as xr
from PIL import Image

from dit_probe.errors import MapError
from dit_probe.explore import drawing
from dit_probe.explore.source import LABELS, METRICS, Source, View
from dit_probe.panels import SCALE, data_uri

SHOWN = {"layer": 10, "step": 6}
"""Layers and steps that can be chosen one by one; of more, so many are kept, evenly spread. Means are over all."""

SAMPLES = 4
"""Samples of a page that was not told which."""

SIDE = 384
"""Pixels of the longer side of a picture."""

_LEVELS = 2**16 - 2
_ASSETS = Path(__file__).parent / "assets"
_SOFTMAX = {"each": "softmax in every layer and step, eq. (8)", "none": "no softmax: scores"}


def page(
    trace: Any, *, size: int = 32, samples: Sequence[int] | None = None, masks: Mapping[str, Any] | None = None
) -> str:
    """Compose the page: every space, layer and step of a trace, heads merged.

    Maps are averaged over blocks of patches until they have at most `size` a side, layers and steps are thinned to
    `SHOWN`, and values are rounded to 16 bits of their range; the page says the first two. What is shown as a mean is
    the mean over all layers and steps.

    Args:
        trace: what `dit_probe.open` returns, or where the store is.
        size: patches of the longer side of a map, at most.
        samples: positions of the samples; None: the first `SAMPLES`.
        masks: as in `dit_probe.explore.app`; they are outlined, and measured against the means at the trace's own size.

    Returns:
        The HTML text.

    Raises:
        MapError: as `dit_probe.explore.app`; no such sample; a size below 1.
        StoreError: as `dit_probe.open`.

    Example:
        >>> dims = ("sample", "step", "layer", "concept", "image_token")
        >>> ds = xr.Dataset({"score_output": (dims, np.random.rand(1, 2, 3, 2, 4))},
        ...     coords={"patch_y": ("image_token", [0, 0, 1, 1]), "patch_x": ("image_token", [0, 1, 0, 1])})
        >>> text = page(ds)
        >>> "://" in text, text.count("<img")  # two concepts, and no picture was kept
        (False, 2)
    """
    source = Source(trace, masks)
    count = source.ds.sizes["sample"]
    chosen = list(range(min(count, SAMPLES))) if samples is None else list(samples)
    if wrong := [sample for sample in chosen if not 0 <= sample < count]:
        raise MapError(f"no sample {', '.join(map(str, wrong))}: {source.name} has {count}, counted from 0")
    if size < 1 or not chosen:
        raise MapError(f"size={size}, samples={chosen}: at least one patch a side, and one sample")
    runs, stills = zip(*(_sample(source, sample, size) for sample in chosen), strict=True)
    block = _block(source, size)
    facts = {
        "runs": runs,
        "layers": _thin(source.layers, "layer"),
        "steps": _thin(source.steps, "step"),
        "grid": [source.grid[0], *(-(-length // block) for length in source.grid[1:])],
        "colours": "".join(f"{red:02x}{green:02x}{blue:02x}" for red, green, blue in _colours()),
        "recorded": source.grid[1:],
        "spaces": LABELS,
        "softmax": _SOFTMAX,
        "metrics": METRICS,
    }
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    style = (_ASSETS / "explorer.css").read_text(encoding="utf-8") + (_ASSETS / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"Concept maps of {source.name}"
    # A concept's name may hold </script>: inside of JSON no < has to be written as such.
    data = json.dumps(facts, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{style}</style></head>\n<body>"
        f'<header><h1>{_safe(title)}</h1><p class="quiet">{_safe(_model(source))}</p>'
        '<button id="theme" class="plain" hidden>Dark or light</button></header>'
        '<div id="columns"><aside id="choose" aria-label="What is shown" hidden></aside>'
        f'<main><p id="note" role="status">{_safe(_about(source, chosen, size))}</p>'
        '<div id="live" hidden></div><div id="still">'
        f"{''.join(stills)}</div></main></div>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


def _sample(source: Source, sample: int, size: int) -> tuple[dict[str, Any], str]:
    """What the page holds of one sample (names, pictures, maps by branch, space and softmax), and what stands still."""
    first = dataclasses.replace(source.first(), sample=sample)
    frames = [dataclasses.replace(first, frame=frame) for frame in range(source.grid[0])]
    pictures = [data_uri(picture, SIDE) for view in frames if (picture := source.picture(view)) is not None]
    title = f"sample {sample}" + (f": {source.prompt(sample)}" if source.prompt(sample) else "")
    still = [f"<h2>{_safe(title)}</h2>"]
    if pictures:
        middle = pictures[len(pictures) // 2]
        still.append(f'<img class="picture" alt="{_safe(f"The image: {title}")}" src="{middle}">')
    maps: dict[str, dict[str, dict[str, Any]]] = {}
    for branch in source.branches or [None]:
        for space in source.spaces:
            layers, steps = (tuple(labels) for labels in source.offered(space))
            view = dataclasses.replace(first, branch=branch, space=space, layers=layers, steps=steps)
            kinds = list(_SOFTMAX) if len(first.concepts) > 1 else ["none"]
            found = {kind: _values(source, view, kind, size) for kind in kinds}
            maps.setdefault(branch or "", {})[space] = {
                kind: _packed(values) | {"metrics": _metrics(source, view, kind)} for kind, values in found.items()
            }
            words = f"{space} space" + (f", {branch} branch" if branch else "") + f", {_SOFTMAX[kinds[0]]}"
            still.append(f'<h3>{_safe(words)}</h3><div class="maps">{_still(found[kinds[0]], space)}</div>')
    outlines = [_outlines(source, view) for view in frames] if "mask" in source.ds else []
    run = {"name": f"sample {sample}", "title": title, "concepts": source.names(sample)}
    run |= {"pictures": pictures, "outlines": outlines, "maps": maps}
    return run, f"<section>{''.join(still)}</section>"


def _values(source: Source, view: View, kind: str, size: int) -> xr.DataArray:
    """Maps (layer, step, concept, frame, y, x) of the page's size; the first layer and step are the mean over all."""
    view = dataclasses.replace(view, softmax=None if kind == "none" else kind)
    cells = source.maps(view, over=())
    cells = cells if "frame" in cells.dims else cells.expand_dims("frame")
    cells = cells.transpose("layer", "step", "concept", "frame", "y", "x")
    values = _averaged(cells.values.astype("float32"), _block(source, size))
    for axis, dim in enumerate(("layer", "step")):
        every = cells[dim].values.tolist()
        at = [every.index(label) for label in _thin(every, dim)]
        values = np.concatenate([values.mean(axis, keepdims=True), values.take(at, axis)], axis)
    kept = {f"{dim}s": _thin(cells[dim].values.tolist(), dim) for dim in ("layer", "step")}
    return xr.DataArray(values, dims=cells.dims, coords={"concept": drawing.names(cells)}, attrs=kept)


def _metrics(source: Source, view: View, kind: str) -> list[dict[str, list[float | None]]]:
    """Of the mean maps of every frame; None where undefined. Empty where there are no masks."""
    view = dataclasses.replace(view, softmax=None if kind == "none" else kind)
    maps = source.maps(view)
    frames = [dataclasses.replace(view, frame=frame) for frame in range(source.grid[0])]
    found = [source.metrics(one, drawing.at_frame(maps, one)) for one in frames]
    return [
        {name: [value if np.isfinite(value) else None for value in values] for name, values in one.items()}
        for one in found
    ]


def _outlines(source: Source, view: View) -> list[str]:
    masks = source.masks(view)
    return [] if masks is None else [drawing.outline(mask, source.grid[1:]) for mask in masks.values]


def _packed(values: xr.DataArray) -> dict[str, Any]:
    """Values as 16 bits of their range, NaN as the highest number."""
    low, high = _range(values)
    scaled = (values.values - low) / ((high - low) or 1) * _LEVELS
    levels = np.where(np.isfinite(scaled), np.rint(np.nan_to_num(scaled)), _LEVELS + 1).astype("<u2")
    packed = base64.b64encode(levels.tobytes()).decode()
    return {"low": low, "high": high, **values.attrs, "values": packed}


def _range(values: xr.DataArray) -> tuple[float, float]:
    finite = values.values[np.isfinite(values.values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _still(values: xr.DataArray, space: str) -> str:
    """The mean map of every concept, of the middle frame, as pictures."""
    mean = values.isel(layer=0, step=0, frame=values.sizes["frame"] // 2)
    low, high = _range(mean)
    colours = np.array(_colours(), dtype=np.uint8)
    figures = []
    for index, name in enumerate(drawing.names(mean)):
        shown = mean[index : index + 1]
        share = np.nan_to_num((shown.values[0] - low) / ((high - low) or 1))
        buffer = io.BytesIO()
        Image.fromarray(colours[np.rint(share * 255).astype(int)]).save(buffer, "png")
        picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        alt = _safe(f"{space} space. {drawing.sentence(shown)}")
        figures.append(
            f'<figure><img class="map" alt="{alt}" src="{picture}"><figcaption>{_safe(name)}</figcaption></figure>'
        )
    return "".join(figures)


def _colours() -> list[tuple[int, int, int]]:
    """256 steps of the colour scale of the figures."""
    found = plotly.colors.get_colorscale(SCALE)
    stops = [position for position, _ in found]
    colours = np.array([plotly.colors.hex_to_rgb(colour) for _, colour in found])
    at = np.linspace(0, 1, 256)
    table = np.stack([np.interp(at, stops, channel) for channel in colours.T], -1)
    return [(int(red), int(green), int(blue)) for red, green, blue in np.rint(table)]


def _averaged(values: np.ndarray, block: int) -> np.ndarray:
    """Means over blocks of patches; those at the far edges may be smaller.

    Example:
        >>> _averaged(np.arange(6.0).reshape(2, 3), 2).tolist()
        [[2.0, 3.5]]
    """
    for axis in (-2, -1):
        starts = np.arange(0, values.shape[axis], block)
        sums = np.add.reduceat(values, starts, axis)
        lengths = np.diff([*starts, values.shape[axis]])
        values = sums / lengths.reshape((-1, 1) if axis == -2 else (-1,)).astype(values.dtype)
    return values


def _block(source: Source, size: int) -> int:
    return -(-max(source.grid[1:]) // size)


def _thin(labels: Sequence[int], dim: str) -> list[int]:
    at = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), SHOWN[dim])).round().astype(int))
    return [labels[index] for index in at]


def _about(source: Source, chosen: Sequence[int], size: int) -> str:
    """What the page holds, and what it does not."""
    block, (_, rows, columns) = _block(source, size), source.grid
    grid = f"{-(-rows // block)} × {-(-columns // block)} patches"
    means = f", means over {block} × {block} of the {rows} × {columns} recorded" if block > 1 else ""
    parts = [f"Maps of {grid}{means}"]
    for name, labels in (("layer", source.layers), ("step", source.steps)):
        kept = len(_thin(labels, name))
        parts.append(f"{kept} of {len(labels)} {name}s to choose from" if kept < len(labels) else f"all {kept} {name}s")
    count = source.ds.sizes["sample"]
    parts.append(f"{len(chosen)} of {count} samples" if len(chosen) < count else f"{count} sample{'s' * (count > 1)}")
    return "; ".join(parts) + ". A mean is over all layers and steps."


def _model(source: Source) -> str:
    identity = source.ds.attrs.get("identity", {})
    facts = [str(identity.get("model", "")), source.ds.attrs.get("time", ""), "written by dit-probe report"]
    return " · ".join(fact for fact in facts if fact)


def _safe(text: str) -> str:
    return html.escape(text)
