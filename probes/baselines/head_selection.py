"""Some heads in place of all: a mean over the heads whose maps find words, chosen on pictures that are not reported.

Not every head of a diffusion model looks where a word is. Head relevance vectors (2412.02237) and later work keep those
that do. Whether this helps is to be measured: a head that gives a word little attention has little weight in the mean
over all anyway. Here a head is one (layer, head) of any `Baseline` that has both axes, its map the mean over timesteps,
and it is ranked by one of

| criterion | of a head | |
|---|---|---|
| "auroc", "ap" | of its maps on the masks; mean over words, then pictures | supervised: needs masks |
| "separation" | (H(mean_c p_c) - mean_c H(p_c)) / log C, p_c = M_c / sum_x M_c; mean over pictures | needs no masks |

The last is the information that a place gives about the word, Jensen-Shannon divergence of the words' maps: 0 where all
words have one map, 1 where no two share a place. It does not know which place is right: a head that puts words into the
wrong places, or spreads noise, separates them as well. It is a criterion to beat, not a replacement for masks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xarray as xr

import dit_probe as dp

Criterion = Literal["auroc", "ap", "separation"]
CRITERIA = ("auroc", "ap", "separation")


@dataclass(frozen=True)
class SelectedHeads(dp.methods.Baseline):
    """The mean over chosen heads of a method in place of all of them; `select_heads` makes it.

    Attributes:
        method: any method whose scores have the axes layer and head, or both as ``layer_head``.
        heads: (layer, head) that count, by their labels.
        chosen: how they were chosen, and on which pictures.

    Raises:
        MapError: no heads, or one twice.
    """

    method: dp.methods.Baseline = field(repr=False)
    heads: tuple[tuple[Any, int], ...]
    chosen: str = "by hand"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple((layer, int(head)) for layer, head in self.heads))
        if not self.heads or len({*self.heads}) < len(self.heads):
            raise dp.errors.MapError(f"heads={self.heads}: give pairs (layer, head), one or more, each once")
        # What `Baseline` says for a class is here that of the method.
        names = ("architecture", "kind", "class_agnostic")
        for name in (*names, "forwards", "forwards_a_concept", "backwards", "backwards_a_concept"):
            object.__setattr__(self, name, getattr(self.method, name))

    def describe(self) -> str:
        """The heads, how they were chosen, and all that decides the method's maps."""
        return f"SelectedHeads({self.method.describe()}, {json.dumps([self.heads, self.chosen], default=str)})"

    def forward(self, image: np.ndarray) -> object:
        """That of the method."""
        return self.method.forward(image)

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Scores of the chosen heads, (image, concept, *other axes, layer_head, [frame,] y, x).

        Raises:
            MapError: the method's scores do not have such a head.
            DitProbeError: whatever the method refuses.
        """
        found = _by_head(self.method.scores(images, concepts))
        if missing := [head for head in self.heads if head not in found.indexes["layer_head"]]:
            layers = found.indexes["layer_head"].unique("layer").tolist()
            raise dp.errors.MapError(f"no head {missing[0]} (layer, head) in scores of the layers {layers}")
        return found.sel(layer_head=list(self.heads))


def select_heads(
    method: dp.methods.Baseline,
    dataset: Any,
    count: int = 8,
    criterion: Criterion = "auroc",
    *,
    concepts: Sequence[str] | None = None,
) -> SelectedHeads:
    """The mean over the heads of a method that rank highest on pictures with masks.

    Args:
        method: whose scores have the axes layer and head, or ``layer_head``.
        dataset: as for `rank_heads`. Numbers of these pictures are too good: report those of others, such as the
            second part of ``datasets.samples.split``.
        count: how many heads.
        criterion: as for `rank_heads`; so are `concepts`.
        concepts: words beside those of the pictures.

    Raises:
        MapError: as `rank_heads`, or fewer heads than `count`.

    Example:
        >>> from dit_probe.datasets.samples import split
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.testing import tiny_pipeline
        >>> from probes.baselines.joint_attention import JointAttention
        >>> choosing, reported = split(PictureBook(6, objects=["sun", "boat"]), share=0.4)
        >>> method = JointAttention(tiny_pipeline("flux"), size=16, text={"max_sequence_length": 32})
        >>> best = select_heads(method, choosing, count=2)
        >>> len(best.heads), best.chosen
        (2, 'by auroc on 2 pictures of picture-book-scenes-1-choosing')
    """
    ranked = rank_heads(method, dataset, criterion, concepts=concepts)
    if not 1 <= count <= ranked.size:
        raise dp.errors.MapError(f"count={count}: {ranked.size} heads could be ranked")
    how = f"by {criterion} on {ranked.attrs['pictures']} pictures of {getattr(dataset, 'name', 'a list')}"
    return SelectedHeads(method, tuple(ranked["layer_head"].values[:count]), how)


def rank_heads(
    method: dp.methods.Baseline, dataset: Any, criterion: Criterion = "auroc", *, concepts: Sequence[str] | None = None
) -> xr.DataArray:
    """What a criterion says of every head of a method, highest first.

    Args:
        method: as for `select_heads`.
        dataset: anything that `dit_probe.evaluate` takes; pictures without words count nothing.
        criterion: "auroc", "ap" or "separation".
        concepts: words that the method is given beside those in a picture, as `dit_probe.evaluate` does; None: the
            background words of the data set.

    Returns:
        (layer_head), without the heads of which it says nothing; its attribute ``pictures`` is their number.

    Raises:
        MapError: scores without heads; no pictures with words, or none of which the criterion says anything.
    """
    if criterion not in CRITERIA:
        raise dp.errors.MapError(f"criterion={criterion!r}; choose one of {', '.join(CRITERIA)}")
    background = getattr(dataset, "background", ()) if concepts is None else concepts
    found = []
    for sample in (dataset[at] for at in range(len(dataset))):
        if sample.target:
            words = list(dict.fromkeys([*sample.target, *background]))
            maps = _by_head(method.scores([sample.image], words)).isel(image=0, drop=True)
            others = {*maps.dims} - {"concept", "layer_head", "frame", "y", "x"}
            maps = maps.mean(others, skipna=False)
            found.append(separation(maps) if criterion == "separation" else _on_masks(maps, sample, criterion))
    if not found:
        raise dp.errors.MapError(f"no picture with words among {len(dataset)} to choose heads on")
    mean: Any = xr.concat(found, "image").mean("image")  # without pictures where it is undefined
    if not mean.notnull().any():
        raise dp.errors.MapError(
            f"{criterion} is undefined on all {len(found)} pictures, such as of objects that fill them"
        )
    order = np.argsort(-mean.values, kind="stable")[: int(mean.notnull().sum())]
    return mean.isel(layer_head=order).rename(criterion).assign_attrs(pictures=len(found))


def separation(maps: xr.DataArray) -> xr.DataArray:
    """How far apart the maps of words are: their Jensen-Shannon divergence over log C, 0 to 1.

    Args:
        maps: (concept, *axes, [frame,] y, x), none negative.

    Raises:
        MapError: fewer than two words, or negative maps.

    Example:
        >>> apart = xr.DataArray([[[1.0, 0.0]], [[0.0, 1.0]]], dims=("concept", "y", "x"))
        >>> float(separation(apart)), float(separation(apart * 0 + 1))
        (1.0, 0.0)
    """
    if maps.sizes["concept"] < 2 or maps.min() < 0:
        raise dp.errors.MapError(
            f"separation of {maps.sizes['concept']} maps, lowest {float(maps.min()):.2g}: it needs two words or more "
            "and maps of probabilities. Use a criterion on masks"
        )
    place = [dim for dim in ("frame", "y", "x") if dim in maps.dims]
    share = maps.astype(float) / maps.sum(place, dtype=float)

    def entropy(p: xr.DataArray) -> xr.DataArray:
        return -(p * np.log(p.where(p > 0, 1))).sum(place, skipna=False)

    apart = entropy(share.mean("concept", skipna=False)) - entropy(share).mean("concept", skipna=False)
    return apart / np.log(maps.sizes["concept"])


def _on_masks(maps: xr.DataArray, sample: Any, metric: str) -> xr.DataArray:
    """A metric of every head, mean over the words of the picture."""
    dims = ("frame", "y", "x")[3 - sample.mask.ndim :]
    masks = np.stack([sample.mask == sample.labels[word] for word in sample.target])
    truth = xr.DataArray(masks, {"concept": list(sample.target)}, ("concept", *dims))
    valid = xr.DataArray(sample.mask >= 0, dims=dims)  # void is negative
    # Every token with whole pixels: the maps of all heads at the picture's size would be gigabytes.
    y, x = (maps.sizes[dim] * max(1, round(truth.sizes[dim] / maps.sizes[dim])) for dim in ("y", "x"))
    truth, valid = (dp.metrics.resize(array, y, x) for array in (truth, valid))
    score = dp.metrics.score(maps.sel(concept=list(sample.target)), truth, valid=valid, metrics=metric)
    return score[metric].mean("concept")


def _by_head(found: xr.DataArray) -> xr.DataArray:
    """Scores with layer and head as one dim."""
    if "layer_head" in found.dims:
        return found
    if missing := {"layer", "head"} - {*found.dims}:
        raise dp.errors.MapError(
            f"scores with the axes {', '.join(map(str, found.dims))} have no {' and '.join(sorted(missing))}, so that "
            "no heads can be chosen: give a method that keeps both, such as JointAttention or DAAM"
        )
    return found.stack(layer_head=("layer", "head"))
