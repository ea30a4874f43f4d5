"""Where an activation decides between two prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from torch import Tensor

from dit_probe import figures
from dit_probe.causal.effects import generate
from dit_probe.edit import Edit, Point
from dit_probe.edits import Tokens, by_row, patch
from dit_probe.errors import MetricError
from dit_probe.probe import Probe
from dit_probe.tracing import trace


def patching(
    pipe: Any,
    clean: str,
    corrupt: str,
    site: str,
    *,
    layers: Sequence[int] | str | None = None,
    steps: Sequence[int] | Literal["all"] | None = None,
    tokens: Tokens = None,
    metric: Callable[[np.ndarray], float] | None = None,
    batch: int = 8,
    seed: int = 0,
    **call: Any,
) -> tuple[xr.DataArray, go.Figure]:
    """Where does the difference between two prompts lie: patch one layer and step of the corrupt run at a time.

        table[layer, step] = (m(patched) - m(corrupt)) / (m(clean) - m(corrupt))

    0: the picture stays that of the corrupt prompt; 1: the activation alone makes it that of the clean one. By default
    ``m(picture) = <picture, clean - corrupt>``, with which the number is how far the picture went on the straight line
    from one to the other.

    Args:
        pipe: the pipeline.
        clean: the prompt whose activations are put in; of one length with the other, as padded prompts are.
        corrupt: the prompt of the runs that are patched.
        site: of `dit_probe.Edit`, not "attends".
        layers: as a probe's: None or "joint", "single", "all", or indices.
        steps: step indices, one cell each; None: every step; "all": one cell a layer, patched at every step.
        tokens: of the site's stream, as in `dit_probe.edits`; None: all.
        metric: of a picture ([frame,] y, x, channel) from 0 to 1.
        batch: how many cells run side by side.
        seed: of the initial noise of all runs.
        **call: for the pipeline (``num_inference_steps=…``).

    Returns:
        (layer, step), and its heat map.

    Raises:
        MetricError: the metric is the same of both pictures.
        SiteError, EditError: a site, layer or step that does not exist.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> size = {"height": 16, "width": 16, "num_inference_steps": 1}
        >>> table, figure = patching(tiny_pipeline("flux"), "a sun", "a boat", "p", layers=[0, 1], **size)
        >>> table.dims, table.shape
        (('layer', 'step'), (2, 1))
    """
    together = steps == "all"
    probe = Probe(record=[site], layers=layers, steps=None if isinstance(steps, str) else steps)
    with trace(pipe, probe, progress=False) as run:
        whole = generate(pipe, [clean], [seed], (), call)[0]
    source = run.dataset.load()
    start = generate(pipe, [corrupt], [seed], (), call)[0]
    measure = metric or (lambda picture: float(np.vdot(picture, (whole - start).values)))
    zero, one = (measure(picture.values) for picture in (start, whole))
    if zero == one:
        raise MetricError(
            f"{clean!r} and {corrupt!r} are the same to the metric ({zero:.4g}): nothing lies between them"
        )
    rows, columns = (list(source[site].attrs[name]) for name in ("layers", "steps"))
    every = patch(source, site, sample=0, tokens=tokens, layers=rows, steps=columns)
    cells = [(layer, step) for layer in rows for step in ([None] if together else columns)]

    def only(layer: int, step: int | None) -> Edit:
        def function(a: Tensor, point: Point) -> Tensor:
            here = point.layer == layer and step in (None, point.step)
            return every.function(a, point) if here else a

        return replace(every, function=function)

    found: list[float] = []
    for first in range(0, len(cells), batch):
        edits = [only(*cell) for cell in cells[first : first + batch]]
        pictures = generate(pipe, [corrupt] * len(edits), [seed] * len(edits), [by_row(edits)], call)
        found += [(measure(picture.values) - zero) / (one - zero) for picture in pictures]
    table = xr.DataArray(
        np.reshape(found, (len(rows), -1)),
        dims=("layer", "step"),
        coords={"layer": rows, "step": ["all"] if together else columns},
        name=f"patched {site}",
        attrs={"units": "0 corrupt, 1 clean", "clean": clean, "corrupt": corrupt},
    )
    if not together:
        table = table.assign_coords(timestep=source.timestep.sel(step=columns))
    return table, figures.ablation(table)
