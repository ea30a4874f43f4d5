"""One self-contained HTML page from figures: no network, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dit_probe import figures
from dit_probe import maps as concept_maps
from dit_probe.errors import MapError

SHOWN = {"layer": 10, "step": 4}
"""Columns and rows of small maps that a page shows; more are thinned out evenly."""

_CONFIG = {"displaylogo": False}
_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --quiet: #5c6370; --paper: #ffffff; --card: #f5f6f8; --line: #dcdfe4;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --quiet: #9aa0aa; --paper: #15171a; --card: #1b1e22; --line: #33383f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .3rem 0 .9rem; max-width: 75ch; }
.quiet { color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; font-size: .92rem; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
img { width: min(100%, 320px); height: auto; border: 1px solid var(--line); border-radius: 6px; }
img.small { image-rendering: pixelated; }
figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
figure { margin: 0 0 1rem; padding: .6rem; }
pre { padding: .8rem 1rem; font-size: .88rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what it is about.

    Attributes:
        title: heading.
        text: one paragraph, plain text.
        figures: plotly figures, one under the other.
        code: shown as it stands.
    """

    title: str
    text: str = ""
    figures: Sequence[Any] = ()
    code: str = ""


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    facts: Mapping[str, Any] | None = None,
    image: Any = None,
) -> str:
    """Compose a page that needs nothing but a browser.

    Args:
        title: heading of the page.
        sections: in order.
        lead: paragraph under the heading.
        facts: name to value, a list under the lead.
        image: (y, x, 3) uint8, or anything that numpy reads as that; shown as it is.

    Returns:
        The HTML text, with plotly.js in it once if there is a figure.

    Example:
        >>> text = page("Maps <1>", [Section("How", "By a dot product.")], facts={"prompt": "a sun"})
        >>> "Maps &lt;1&gt;" in text, "http" in text
        (True, False)
    """
    drawn = any(section.figures for section in sections)
    rows = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in (facts or {}).items())
    parts = [
        f"<h1>{_safe(title)}</h1>",
        f'<p class="quiet">{_safe(lead)}</p>' if lead else "",
        _picture(image) if image is not None else "",
        f"<dl>{rows}</dl>" if rows else "",
        *(_section(section) for section in sections),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>{_STYLE}</style>{_plotly() if drawn else ''}</head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def demo(ds: xr.Dataset, image: Any, *, prompt: str, model: str, store: str) -> str:
    """The page of ``dit-probe demo``: the image, every concept in three spaces, and layer by step.

    Args:
        ds: the reopened store.
        image: what the pipeline painted, (y, x, 3) or frames of it.
        prompt: what it was asked for.
        model: what it is called.
        store: where the trace is.

    Raises:
        MapError: nothing was recorded that a map can be made of.
    """
    spaces = {space: _one(concept_maps.saliency(ds, space=space)) for space in ("output", "value", "cross")}
    still = _still(image)
    sections = [
        Section(
            "What each concept covers",
            "Output space, eq. (8): the dot product of what attention gave an image patch and what it gave a concept, "
            "softmax over the concepts, mean over layers and steps.",
            [_drawn(image, spaces["output"])],
        ),
        Section(
            "Three spaces",
            "The same concepts compared in output space (o_x . o_c), in value space (v_x . v_c) and by cross-attention "
            "(q_x . k_c), all from the one store.",
            [figures.spaces(still, {space: _middle(array) for space, array in spaces.items()})],
        ),
        Section(
            "Layer by step",
            "Output space again, before the mean: one small map for every layer (columns) and denoising step (rows).",
            _grids(ds),
        ),
        Section(
            "Go on from here", "The store is a labelled dataset; the model is not needed any more.", code=_again(store)
        ),
    ]
    facts = {"prompt": prompt, "concepts": ", ".join(_names(spaces["output"])), "model": model, **_sizes(ds)}
    return page(
        "Concept maps",
        sections,
        lead="What the image tokens and the concepts have in common.",
        facts=facts,
        image=still,
    )


def maps(
    ds: xr.Dataset,
    space: str = "output",
    *,
    softmax: str | None = "each",
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    sample: int = 0,
) -> str:
    """The page of ``dit-probe maps``: one space of a saved trace.

    Args:
        ds: an opened store.
        space: output, value or cross.
        softmax: as in `maps.saliency`.
        layers: layers to average; None: all.
        steps: steps to average; None: all.
        sample: which run.

    Raises:
        MapError: no such sample, or nothing recorded for this space.
    """
    if not 0 <= sample < ds.sizes["sample"]:
        raise MapError(f"no sample {sample}: the store has {ds.sizes['sample']}, counted from 0")
    chosen = ds.isel(sample=slice(sample, sample + 1))  # of a list, dask makes a graph over every chunk
    options: dict[str, Any] = {"softmax": softmax, "layers": layers, "steps": steps}
    averaged = _one(concept_maps.saliency(chosen, space, **options))  # pyright: ignore[reportArgumentType]
    by_layer = _one(concept_maps.saliency(chosen, space, over=("step",), **options))  # pyright: ignore[reportArgumentType]
    image = chosen["image"].isel(sample=0).values if "image" in chosen else None
    sections = [
        Section("Mean over layers and steps", "", [_drawn(image, averaged)]),
        Section("By layer", "", [figures.small_multiples(_thin(_middle(by_layer), "layer"), column="layer")]),
    ]
    facts = {"space": space, "softmax": softmax or "none", **_sizes(chosen)}
    return page("Concept maps", sections, facts=facts, image=None if image is None else _still(image))


def _section(section: Section) -> str:
    drawn = (figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG) for figure in section.figures)
    body = "".join(f"<figure>{figure}</figure>" for figure in drawn)
    text = f"<p>{_safe(section.text)}</p>" if section.text else ""
    code = f"<pre>{_safe(section.code)}</pre>" if section.code else ""
    return f"<section><h2>{_safe(section.title)}</h2>{text}{body}{code}</section>"


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def _safe(value: Any) -> str:
    return html.escape(str(value))


def _picture(image: Any) -> str:
    from PIL import Image

    pixels = Image.fromarray(np.asarray(image, dtype=np.uint8))
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG")
    small = ' class="small"' if pixels.width < 256 else ""
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{small} alt="the image" src="data:image/png;base64,{data}">'


def _still(image: Any) -> np.ndarray:
    """The image, or the middle frame of a video, as (y, x, 3) uint8."""
    frames = np.asarray([np.asarray(frame) for frame in image] if isinstance(image, list) else image)
    frame = frames[len(frames) // 2] if frames.ndim == 4 else frames
    return frame if frame.dtype == np.uint8 else np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)


def _one(array: xr.DataArray) -> xr.DataArray:
    """The first sample, in memory, with its own concept names."""
    first = array.isel(sample=0) if "sample" in array.dims else array
    if "branch" in first.dims:
        first = first.sel(branch="cond")
    return first.compute()


def _middle(array: xr.DataArray) -> xr.DataArray:
    """The middle frame of a video's maps, which goes with the still."""
    return array.isel(frame=array.sizes["frame"] // 2) if "frame" in array.dims else array


def _thin(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """At most as many labels of every dim as `SHOWN` says, evenly spread, first and last included."""
    for dim in dims:
        count = array.sizes[dim]
        kept = np.unique(np.linspace(0, count - 1, min(count, SHOWN[dim])).round().astype(int))
        array = array.isel({dim: kept})
    return array


def _grids(ds: xr.Dataset) -> list[Any]:
    """One figure a concept: steps down, layers across."""
    cells = _thin(_one(concept_maps.saliency(ds, space="output", over=())), "layer", "step")
    steps = [str(step) for step in cells["step"].values]
    grids = []
    for index, name in enumerate(_names(cells)):
        rows = _middle(cells).isel(concept=index, drop=True).reset_coords(drop=True)
        rows = rows.rename(step="concept").assign_coords(concept=[f"{name}, step {step}" for step in steps])
        grids.append(figures.small_multiples(rows, column="layer"))
    return grids


def _names(array: xr.DataArray) -> list[str]:
    coord = "concept_name" if "concept_name" in array.coords else "concept"
    return [str(name) for name in array[coord].values]


def _drawn(image: Any, averaged: xr.DataArray) -> Any:
    return figures.video(image, averaged) if "frame" in averaged.dims else figures.overlay(image, averaged)


def _sizes(ds: xr.Dataset) -> dict[str, Any]:
    kept = {dim: size for dim, size in ds.sizes.items() if dim in ("step", "layer", "image_token", "frame")}
    return {"recorded": ", ".join(f"{size} {str(dim).replace('_', ' ')}s" for dim, size in kept.items())}


def _again(store: str) -> str:
    return (
        "import dit_probe as dp\n\n"
        f"ds = dp.open({store!r})\n"
        'maps = dp.maps.saliency(ds, space="output", layers=[2, 3])    # (sample, concept, y, x)\n'
    )
