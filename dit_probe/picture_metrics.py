"""The numbers of one picture: each word's map on its own pixels, on those of other words, and all words as classes.

| column | mean over | chance | how to read it |
|---|---|---|---|
| ``auroc`` | words | 0.5 | the word's map ranks the word's pixels first |
| ``ap``, ``max_f1`` | words | the words' share, 2 share / (1 + share) | compare with `constant`, not with 1 |
| ``pointing``, ``energy_pointing`` | words | the words' share | the latter is NaN where a map has negative values |
| ``right_of_two`` | two words | 0.5 | tells two objects apart; NaN unless two words have pixels |
| ``auroc_other`` | pairs | 0.5 | maps of the other words that are there, and of background words |
| ``auroc_absent`` | pairs | 0.5 | maps of words that are not there; NaN where none was given |
| ``ap_legacy``, with thresholds | words | depends on the map's scale | see `dit_probe.metrics` |

The last two pair the map of another word with the pixels of each word of the picture, by AUROC. A method that reads the
word is near 0.5 in them, or below, for what it looks for is elsewhere; one that does not has its ``auroc``, and is no
better for being told the word. A class-agnostic map is the map of every word: both are its ``auroc``, and
``right_of_two`` is 0.5 where it is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dit_probe import metrics, rows
from dit_probe.metrics import COUNTS

if TYPE_CHECKING:
    from dit_probe.protocols import Protocol

BACKGROUND = "background"
"""The class that all background words are merged to."""

_OWN = ("auroc", "ap", "max_f1", "pointing", "ap_legacy")
RANKING = (*_OWN, "energy_pointing", "right_of_two", "auroc_other", "auroc_absent")
"""Metrics that no threshold is chosen for."""
THRESHOLDED = (
    "pixel_accuracy",
    "iou_foreground",
    "iou_macro",
    "boundary_f",
    "iou_pooled_legacy",
    "pixel_accuracy_void_as_error",
)


def ranking(large: xr.DataArray, truth: xr.DataArray, counted: xr.DataArray, absent: Sequence[str]) -> xr.Dataset:
    """`RANKING`.

    Args:
        large: ([concept,] [frame,] y, x) maps at the mask's size, of the words given; without concept class-agnostic.
        truth: (concept, [frame,] y, x) bool, the pixels of the picture's words.
        counted: ([frame,] y, x) bool, False on void.
        absent: words that are not in the picture, with or without a map.
    """
    names = truth.concept.values.tolist()
    if not names:
        return xr.Dataset({name: xr.DataArray(np.nan) for name in RANKING})
    agnostic = "concept" not in large.dims
    own = large.expand_dims(concept=names) if agnostic else large.sel(concept=names)
    found = metrics.score(own, truth, valid=counted, metrics=_OWN).mean("concept")
    energy = metrics.score(own.clip(min=0), truth, valid=counted, metrics="energy_pointing").energy_pointing
    found["energy_pointing"] = energy.where(own.min(counted.dims) >= 0).mean("concept")
    found["right_of_two"] = metrics.right_of_two(own, truth, valid=counted)
    if agnostic:
        found["auroc_other"] = found["auroc_absent"] = found["auroc"]
    else:
        pairs = _auroc_of_pairs(large, truth, counted)
        away, itself = pairs.word.isin(absent), pairs.word == pairs.concept
        found["auroc_other"], found["auroc_absent"] = pairs.where(~away & ~itself).mean(), pairs.where(away).mean()
    return found.drop_attrs()


def _auroc_of_pairs(large: xr.DataArray, truth: xr.DataArray, counted: xr.DataArray) -> xr.DataArray:
    """(word, concept): AUROC of every map on every mask, each map sorted once.

    With r the number of pixels below one, half of its equals included, and n of N pixels in the mask, it is
    ``(sum of r over the mask - n^2 / 2) / (n (N - n))``.
    """
    inside = truth.transpose("concept", *counted.dims).values[:, counted.values].astype(float)
    number = inside.sum(-1)
    above = []
    for values in large.transpose("concept", *counted.dims).values[:, counted.values]:
        _, group, size = np.unique(values, return_inverse=True, return_counts=True)
        above.append(inside @ (np.cumsum(size) - size / 2)[group] - number**2 / 2)
    table = rows.ratio(np.stack(above), number * (inside.shape[-1] - number))
    return xr.DataArray(table, {"word": large.concept.values, "concept": truth.concept.values}, ("word", "concept"))


def thresholded(
    protocol: Protocol, maps: xr.DataArray, large: xr.DataArray, truth: xr.DataArray, counted: xr.DataArray
) -> xr.Dataset:
    """`THRESHOLDED` (threshold) and ``counts`` (threshold, count), pixels summed over the words.

    Args:
        protocol: order, thresholds, void.
        maps: as `large`, on their own grid.
        large: as for `ranking`.
        truth: as for `ranking`.
        counted: as for `ranking`.
    """
    if "concept" in maps.dims:
        maps, large = (array.sel(concept=truth.concept.values) for array in (maps, large))
    found: list[Any] = []
    for threshold in protocol.thresholds:
        if not truth.sizes["concept"]:
            drawn = truth
        elif protocol.order == "threshold, upsample":
            drawn = metrics.resize(metrics.predicted(maps, threshold=threshold), truth.sizes["y"], truth.sizes["x"])
        else:
            seen = counted if protocol.void == "unseen" else None
            drawn = metrics.predicted(large, valid=seen, threshold=threshold)
        found.append(_of_pixels(drawn, truth, counted))
    joined: Any = xr.concat(found, xr.Variable("threshold", protocol.labels))
    return joined


def _of_pixels(drawn: xr.DataArray, truth: xr.DataArray, counted: xr.DataArray) -> xr.Dataset:
    """Means over the words."""
    place = counted.dims
    pairs = ((drawn, truth), (drawn, ~truth), (~drawn, truth), (~drawn, ~truth))
    true, false, missed, rest = ((a & b & counted).sum(place).astype(float) for a, b in pairs)
    pixels = true + false + missed + rest
    foreground = true / (true + false + missed).where(true + missed > 0)
    accuracy = (true + rest) / pixels.where(pixels > 0)
    outlines = (array.transpose("concept", *place).values for array in xr.broadcast(drawn, truth, counted))
    found = {
        "pixel_accuracy": accuracy,
        "iou_foreground": foreground,
        "iou_macro": (foreground + rest / (rest + false + missed).where(rest + false > 0)) / 2,
        "boundary_f": xr.DataArray(rows.boundary_f(*outlines), dims="concept"),
        "iou_pooled_legacy": accuracy / (2 - accuracy),
        # two channels: both of a valid pixel, one of a void one
        "pixel_accuracy_void_as_error": 2 * (true + rest) / (pixels + counted.size).where(pixels > 0),
    }
    means = {name: values.mean("concept") for name, values in found.items()}
    table: Any = xr.concat([true, false, missed, rest], xr.Variable("count", list(COUNTS)))
    return xr.Dataset({**means, "counts": table.sum("concept")})


def by_class(large: xr.DataArray, truth: xr.DataArray, counted: xr.DataArray, vocabulary: Sequence[str]) -> xr.Dataset:
    """``intersection`` and ``union`` (class), and ``miou``, of argmax over the maps.

    Args:
        large: as for `ranking`; NaN without several concepts, of which none is highest.
        truth: (concept, [frame,] y, x) bool, the pixels of each word of the vocabulary.
        counted: as for `ranking`.
        vocabulary: all classes but `BACKGROUND`, which has the words and pixels of no class.
    """
    classes = [BACKGROUND, *vocabulary]
    table = np.full((2, len(classes)), np.nan)
    if large.sizes.get("concept", 1) > 1:
        table[...] = 0
        highest = large == large.max("concept")
        shares = (highest / highest.sum("concept") * counted).transpose("concept", *counted.dims).values
        annotated = {word: (truth.sel(concept=word) & counted).values for word in truth.concept.values.tolist()}
        annotated[BACKGROUND] = (~truth.any("concept") & counted).values
        for label, own in annotated.items():
            table[1, classes.index(label)] += own.sum()
        for word, share in zip(large.concept.values.tolist(), shares, strict=True):
            label = word if word in classes else BACKGROUND
            both = (share * annotated[label]).sum() if label in annotated else 0.0
            table[:, classes.index(label)] += both, share.sum() - both
    found = xr.Dataset({name: ("class", row) for name, row in zip(("intersection", "union"), table, strict=True)})
    found = found.assign_coords({"class": classes})
    return found.assign(miou=(found.intersection / found.union.where(found.union > 0)).mean("class"))
