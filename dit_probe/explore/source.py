"""What a trace can show, and the numbers of one choice of it; reads only the cells that are chosen, each once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dit_probe import maps, metrics, store
from dit_probe.errors import MapError
from dit_probe.schema import SCORE_SOURCES, SCORES

SPACES: dict[str, dict[str, Any]] = {
    "output": {"space": "output"},
    "value": {"space": "value"},
    "cross": {"space": "cross"},
    "cross, concept queries": {"space": "cross", "direction": "concept_to_image"},
    "cross, before rotary": {"space": "cross", "rotary": False},
    "cross, concept queries, before rotary": {"space": "cross", "direction": "concept_to_image", "rotary": False},
}
"""Arguments of `dit_probe.maps.saliency` by what the space is called on the page."""

LABELS = {
    "output": "output: o_x · o_c",
    "value": "value: v_x · v_c",
    "cross": "cross-attention: q_x · k_c",
    "cross, concept queries": "cross-attention: k_x · q_c",
    "cross, before rotary": "cross-attention: q_x · k_c, before rotary",
    "cross, concept queries, before rotary": "cross-attention: k_x · q_c, before rotary",
}
"""What is compared in each of `SPACES`."""

METRICS = {"auroc": "AUROC", "ap": "AP", "iou_foreground": "IoU"}
"""Shown where there is a mask, and what they are called; each is NaN for a concept that has no pixel in it."""

KEPT = 256 * 2**20
"""Bytes of scores that stay in memory."""

GRAPHS = 16
"""Samples, spaces and choices of heads whose dask graphs stay in memory: making one takes longer than a cell does."""

AT_FIRST = 256 * 2**20
"""Bytes that the first view may read; larger samples start with fewer steps, then fewer layers."""


@dataclass(frozen=True)
class View:
    """One choice of what is shown.

    Attributes:
        sample: position of the sample.
        space: one of `SPACES`.
        softmax: as in `dit_probe.maps.saliency`.
        layers: layer labels.
        steps: step labels.
        heads: head numbers to merge; none: all.
        branch: label, where the trace has both.
        concepts: positions of the concepts shown; the softmax is over all that were traced.
        frame: position of the frame of a video's maps.
    """

    sample: int
    space: str
    softmax: str | None
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    heads: tuple[int, ...] = ()
    branch: str | None = None
    concepts: tuple[int, ...] = ()
    frame: int = 0


class Source:
    """A trace that is looked at.

    Args:
        trace: an opened trace, or where its store is.
        masks: as in `with_masks`.

    Attributes:
        name: what to call it: the folder, or the model.

    Raises:
        MapError: no sample, nothing recorded that a map can be made of, or masks that do not fit.
        StoreError: as `dit_probe.open`.

    Example:
        >>> dims = ("sample", "step", "layer", "concept", "image_token")
        >>> ds = xr.Dataset({"score_output": (dims, np.random.rand(1, 2, 3, 2, 4))},
        ...     coords={"patch_y": ("image_token", [0, 0, 1, 1]), "patch_x": ("image_token", [0, 1, 0, 1])})
        >>> source = Source(ds)
        >>> list(source.spaces), source.layers, source.maps(source.first()).dims
        (['output'], (0, 1, 2), ('concept', 'y', 'x'))
    """

    def __init__(self, trace: Any, masks: Mapping[str, Any] | None = None) -> None:
        self.path = None if isinstance(trace, xr.Dataset) else str(trace)
        ds: xr.Dataset = trace if isinstance(trace, xr.Dataset) else store.open(trace)
        self.ds = with_masks(ds, masks) if masks else ds
        if not self.ds.sizes.get("sample"):
            raise MapError(
                f"no sample to show: the dataset has dims {', '.join(map(str, self.ds.sizes)) or 'of no kind'}. Pass "
                "what dit_probe.open returns, or keep the dim with .isel(sample=[0])"
            )
        if not self.spaces:
            found = ", ".join(map(str, self.ds.data_vars)) or "no variables"
            raise MapError(
                f"nothing to draw a map from: the dataset has {found}. Trace with the probe ConceptAttention, or with "
                "scores=('output',)"
            )
        model = str(self.ds.attrs.get("identity", {}).get("model", "dataset"))
        self.name = Path(self.path).name if self.path else model
        self._cells: OrderedDict[tuple[Any, ...], np.ndarray] = OrderedDict()
        self._graphs: dict[tuple[Any, ...], xr.DataArray] = {}
        self._lock = threading.Lock()

    @cached_property
    def spaces(self) -> dict[str, dict[str, Any]]:
        """Those of `SPACES` that were recorded."""
        return {name: SPACES[name] for name in self._offered}

    @cached_property
    def _offered(self) -> dict[str, dict[str, Any]]:
        found = {name: self._attrs(name) for name in SPACES}
        return {name: attrs for name, attrs in found.items() if attrs is not None}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layer labels that some space has."""
        return tuple(sorted({label for name in self.spaces for label in self.offered(name)[0]}))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Step labels that some space has."""
        return tuple(sorted({label for name in self.spaces for label in self.offered(name)[1]}))

    @cached_property
    def heads(self) -> int:
        """How many heads can be told apart; 0 where scores of merged heads are all there is."""
        found = [attrs for name in self.spaces if (attrs := self._attrs(name, heads="each")) is not None]
        return self.ds.sizes["head"] if found else 0

    @property
    def branches(self) -> list[str]:
        """Labels of the branches; none where only one was recorded."""
        return self.ds["branch"].values.tolist() if "branch" in self.ds.dims else []

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the image tokens."""
        places = (self.ds[name].values if name in self.ds.coords else [0] for name in _PLACES)
        frames, rows, columns = (len(np.unique(place)) for place in places)
        return frames, rows, columns

    def offered(self, space: str) -> tuple[list[int], list[int]]:
        """Layer and step labels at which a space was recorded."""
        attrs = self._offered.get(space, {"layers": [], "steps": []})
        return attrs["layers"], attrs["steps"]

    def names(self, sample: int) -> list[str]:
        """What the concepts of a sample are called."""
        if "concept_name" in self.ds:
            return [str(name) for name in self.ds["concept_name"].isel(sample=sample).values]
        if "concept" in self.ds.coords:
            return [str(name) for name in self.ds["concept"].values]
        return [f"concept {index}" for index in range(self.ds.sizes["concept"])]

    def prompt(self, sample: int) -> str:
        """What was painted, "" where nobody knows."""
        return str(self.ds["prompt"].values[sample]) if "prompt" in self.ds else ""

    def first(self) -> View:
        """What is shown before anything was chosen: all layers and steps, or as many as are read in a moment."""
        space = next(iter(self.spaces))
        layers, steps = (tuple(labels) for labels in self.offered(space))
        concepts = tuple(range(self.ds.sizes["concept"]))
        softmax = "each" if len(concepts) > 1 else None
        branch = self.branches[0] if self.branches else None
        per_cell = self.nbytes(View(0, space, softmax, layers[:1], steps[:1]))
        steps = _middle(steps, AT_FIRST // max(per_cell * len(layers), 1))
        layers = _middle(layers, AT_FIRST // max(per_cell * len(steps), 1))
        return View(0, space, softmax, layers, steps, branch=branch, concepts=concepts)

    def nbytes(self, view: View) -> int:
        """Bytes that a view reads of the store, uncompressed, when none of it was read before."""
        options = self.spaces[view.space]
        score = SCORES[options["space"]][options.get("direction") == "concept_to_image"]
        raw = [name + ("_unrotated" if options.get("rotary") is False else "") for name in SCORE_SOURCES[score]]
        names = raw if all(name in self.ds for name in raw) else [score]
        leading = ("sample", "branch", "step", "layer")
        cell = sum(_cell_bytes(self.ds[name], leading) for name in names)
        return cell * len(view.layers) * len(view.steps)

    def scores(self, view: View) -> xr.DataArray:
        """The scores of a view, in memory: (sample of one, step, layer, concept, image_token), float32.

        Raises:
            MapError: as `dit_probe.maps.scores`.
        """
        key = (view.sample, view.branch, view.space, view.heads)
        with self._lock:
            lazy = self._lazy(view)
            cells = [[(*key, step, layer) for layer in lazy.attrs["layers"]] for step in lazy.attrs["steps"]]
            self._read(lazy, cells)
            values = np.stack([np.stack([self._cells[cell] for cell in row]) for row in cells])
        return lazy.copy(data=values[None])

    def maps(self, view: View, *, over: Sequence[str] = ("step", "layer")) -> xr.DataArray:
        """The saliency maps of a view: ([step, layer,] concept, [frame,] y, x).

        Args:
            view: the choice; its `frame` is not applied.
            over: as in `dit_probe.maps.saliency`.

        Raises:
            MapError: as `dit_probe.maps.saliency`; no concept chosen.
        """
        if not view.concepts:
            raise MapError("no concept is chosen. Choose at least one")
        scores = self.scores(view)
        # Heads are merged and rotation is settled in the scores, which look like those reduced in flight.
        options: dict[str, Any] = {name: self.spaces[view.space].get(name) for name in ("space", "direction")}
        options = {name: value for name, value in options.items() if value} | {"softmax": view.softmax, "over": over}
        found = maps.saliency(scores.to_dataset(), **options).isel(sample=0, concept=list(view.concepts))
        found.attrs |= {name: scores.attrs[name] for name in ("rotary", "heads")}
        return found

    def picture(self, view: View) -> np.ndarray | None:
        """The image, or the frame of the video nearest to the maps' frame: (y, x, channel) uint8; None: not kept."""
        return self.ds["image"].isel(self.pixels("image", view)).values if "image" in self.ds else None

    def pixels(self, name: str, view: View) -> dict[str, int]:
        """Positions that select a view's picture or mask."""
        count = self.ds[name].sizes.get("pixel_frame")
        if count is None:
            return {"sample": view.sample}
        return {"sample": view.sample, "pixel_frame": int(np.rint(np.linspace(0, count - 1, self.grid[0]))[view.frame])}

    def masks(self, view: View) -> xr.DataArray | None:
        """Masks of the concepts shown, (concept, y, x) bool; None where the trace has none."""
        if "mask" not in self.ds:
            return None
        found = self.ds["mask"].isel({**self.pixels("mask", view), "concept": list(view.concepts)}).astype(bool)
        return found.rename(pixel_y="y", pixel_x="x").load()

    def metrics(self, view: View, shown: xr.DataArray) -> dict[str, list[float]]:
        """`METRICS` of maps (concept, y, x) against the masks, a number a concept; empty where there are no masks.

        Raises:
            MetricError: as `dit_probe.metrics.score`.
        """
        masks = self.masks(view)
        if masks is None:
            return {}
        if not np.isfinite(shown).all():  # a record is missing
            return {name: [float("nan")] * shown.sizes["concept"] for name in METRICS}
        bare = [array.drop_vars(list(array.coords)) for array in (shown, masks)]
        found = metrics.score(*bare, metrics=tuple(METRICS))
        return {name: found[name].values.tolist() for name in METRICS}

    def _attrs(self, space: str, **options: Any) -> dict[str, Any] | None:
        """What the scores of a space say of themselves; None where they were not recorded."""
        try:
            return maps.scores(self._records.isel(sample=slice(1)), **SPACES[space], **options).attrs
        except MapError:
            return None

    @cached_property
    def _records(self) -> xr.Dataset:
        """The trace without what maps are not made of: selecting costs time for every variable."""
        raw = {name for pair in SCORE_SOURCES.values() for name in pair}
        wanted = {*SCORE_SOURCES, *raw, *(f"{name}_unrotated" for name in raw), "concept_name"}
        return self.ds.drop_vars([name for name in self.ds.data_vars if name not in wanted])

    def _lazy(self, view: View) -> xr.DataArray:
        """The scores of a view, not read yet."""
        key = (view.sample, view.branch, view.space, view.heads)
        if key not in self._graphs:
            if len(self._graphs) == GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._graph(view)
        every = self._graphs[key]
        chosen = {"layers": list(view.layers), "steps": list(view.steps)}
        if any(label not in every.attrs[name] for name in chosen for label in chosen[name]):
            return self._graph(view, **chosen)  # or the error that says what there is
        at = {name[:-1]: [every.attrs[name].index(label) for label in labels] for name, labels in chosen.items()}
        return every.isel(at).assign_attrs(chosen)

    def _graph(self, view: View, **chosen: Any) -> xr.DataArray:
        one = self._records.isel(sample=slice(view.sample, view.sample + 1))
        one = one if view.branch is None else one.sel(branch=view.branch)
        return maps.scores(one, **self.spaces[view.space], heads=list(view.heads) or "merged", **chosen)

    def _read(self, lazy: xr.DataArray, cells: list[list[tuple[Any, ...]]]) -> None:
        """Read the cells that are not in memory, in as few blocks as steps that lack the same layers."""
        blocks: dict[tuple[int, ...], list[int]] = {}
        for row, keys in enumerate(cells):
            if missing := tuple(column for column, key in enumerate(keys) if key not in self._cells):
                blocks.setdefault(missing, []).append(row)
        for columns, rows in blocks.items():
            values = lazy.isel(step=rows, layer=list(columns)).values[0]
            for row, of_step in zip(rows, values, strict=True):
                for column, of_layer in zip(columns, of_step, strict=True):
                    self._cells[cells[row][column]] = of_layer.copy()
        needed = [key for keys in cells for key in keys]
        for key in needed:
            self._cells.move_to_end(key)
        spare = sum(cell.nbytes for cell in self._cells.values()) - KEPT
        while spare > 0 and len(self._cells) > len(needed):
            spare -= self._cells.popitem(last=False)[1].nbytes


def with_masks(ds: xr.Dataset, masks: Mapping[str, Any]) -> xr.Dataset:
    """The trace of one sample, with masks of its concepts as the variable ``mask``.

    Args:
        ds: a trace of one sample.
        masks: concept to ([frame,] y, x) bool in pixels. A concept that has none gets an empty one, and no metric.

    Returns:
        The dataset with ``mask`` (sample, concept, [pixel_frame,] pixel_y, pixel_x) bool. A trace of several samples
        gets the variable by hand.

    Raises:
        MapError: several samples, a concept that was not traced, or masks of different shapes.

    Example:
        >>> ds = xr.Dataset({"score_output": (("sample", "concept"), np.ones((1, 2)))}, {"concept": ["sun", "sky"]})
        >>> with_masks(ds, {"sun": np.eye(4, dtype=bool)}).mask.sum(("pixel_y", "pixel_x")).values.tolist()
        [[4, 0]]
    """
    if ds.sizes.get("sample") != 1:
        raise MapError(
            f"masks by name go with one sample, the dataset has {ds.sizes.get('sample', 0)}. Select one with "
            ".isel(sample=[0]), or assign the variable 'mask' (sample, concept, [pixel_frame,] pixel_y, pixel_x)"
        )
    names = [str(name) for name in (ds["concept_name"][0] if "concept_name" in ds else ds["concept"]).values]
    if unknown := [name for name in masks if name not in names]:
        raise MapError(f"a mask of {', '.join(map(repr, unknown))}, but the concepts are {', '.join(names)}")
    arrays = {name: np.asarray(mask) for name, mask in masks.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) not in (2, 3):
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
        raise MapError(f"masks must be ([frame,] y, x), all of one shape; found {found}")
    stack = np.stack([arrays.get(name, np.zeros(shape)).astype(bool) for name in names])
    dims = ("sample", "concept", "pixel_frame", "pixel_y", "pixel_x")
    return ds.assign(mask=(dims if len(shape) == 3 else (*dims[:2], *dims[3:]), stack[None]))


_PLACES = ("patch_frame", "patch_y", "patch_x")


def _middle(labels: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The middle labels, at most so many and at least one."""
    start = max(len(labels) - max(count, 1), 0) // 2
    return labels[start : start + max(count, 1)]


def _cell_bytes(array: xr.DataArray, leading: Sequence[str]) -> int:
    size = array.dtype.itemsize
    for dim, length in array.sizes.items():
        size *= 1 if dim in leading else length
    return size
