"""How well maps fall on masks: per image, over labelled arrays; what is undefined is NaN, never a number.

A map has one value a token, a mask one a pixel, and every pixel has the value of its token: tokens are weighted with
their covered and uncovered pixels, which gives the same numbers as maps enlarged to the mask's size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from dit_probe.errors import DitProbeError

_PLACE = ("frame", "y", "x")


class MetricError(DitProbeError):
    """Maps and masks that cannot be compared."""


def auroc(maps: xr.DataArray, masks: xr.DataArray) -> xr.DataArray:
    """Area under the ROC curve: the chance that a pixel of the object has a higher value than any other pixel.

    ``P(s+ > s-) + P(s+ = s-) / 2``. Chance is 0.5; so is a constant map.

    Args:
        maps: (..., [frame,] y, x) in any units.
        masks: (..., [frame,] y, x) bool, at the maps' size or an integer multiple in y and x. Dims that only one of
            the two has are broadcast.

    Returns:
        The leading dims; NaN where a mask has no pixels or nothing but pixels.

    Raises:
        MetricError: NaN in a map; masks that are not boolean; sizes that do not divide.

    Example:
        >>> maps = xr.DataArray([[0.9, 0.1], [0.2, 0.1]], dims=("y", "x"))
        >>> float(auroc(maps, maps > 0.5))
        1.0
    """
    return _ranked(maps, masks, _auroc)


def average_precision(maps: xr.DataArray, masks: xr.DataArray) -> xr.DataArray:
    """Precision at every threshold, weighted with the recall that it adds; chance is the object's share of pixels.

    ``sum_n (R_n - R_{n-1}) P_n`` over distinct values, as scikit-learn defines it. Foreground only.

    Args:
        maps: as for `auroc`.
        masks: as for `auroc`.

    Returns:
        The leading dims; NaN where a mask has no pixels.

    Raises:
        MetricError: as `auroc`.

    Example:
        >>> maps = xr.DataArray([[0.9, 0.1], [0.2, 0.1]], dims=("y", "x"))
        >>> float(average_precision(maps, maps < 0.15))
        0.5
    """
    return _ranked(maps, masks, _average_precision)


def right_of_two(maps: xr.DataArray, masks: xr.DataArray, concept: str = "concept") -> xr.DataArray:
    """At the pixels of one object, is its own map higher than the other object's? Mean over the two.

    A tie counts half. Chance is 0.5, also for any one map given to both.

    Args:
        maps: (..., concept, [frame,] y, x) in any units.
        masks: (..., concept, [frame,] y, x) bool. Compared are the two concepts that have pixels.
        concept: the dim of the concepts.

    Returns:
        The leading dims; NaN unless exactly two concepts have pixels.

    Raises:
        MetricError: as `auroc`.

    Example:
        >>> maps = xr.DataArray([[[0.9, 0.1]], [[0.2, 0.5]]], dims=("concept", "y", "x"))
        >>> float(right_of_two(maps, maps > 0.4))
        1.0
    """
    values, inside, _, lead = _aligned(maps, masks, concept)
    covered = inside.sum(axis=-1)
    present = covered > 0
    if values.shape[-2] < 2:
        return xr.full_like(lead.isel({concept: 0}, drop=True), np.nan)
    pair = np.argsort(~present, axis=-1, kind="stable")[..., :2, None]
    a, b = np.moveaxis(np.take_along_axis(values, pair, axis=-2), -2, 0)
    first, second = np.moveaxis(np.take_along_axis(inside, pair, axis=-2), -2, 0)
    win = (a > b) + 0.5 * (a == b)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = ((win * first).sum(-1) / first.sum(-1) + ((1 - win) * second).sum(-1) / second.sum(-1)) / 2
    return lead.isel({concept: 0}, drop=True).copy(data=np.where(present.sum(axis=-1) == 2, mean, np.nan))


def argmax_iou(maps: xr.DataArray, masks: xr.DataArray, concept: str = "concept") -> xr.DataArray:
    """Intersection over union of every concept when each pixel goes to the concept with the highest map.

    A pixel of several highest maps is shared among them. Give a concept, such as the background word, its mask too:
    pixels of no mask count against whoever gets them.

    Args:
        maps: (..., concept, [frame,] y, x) in any units.
        masks: (..., concept, [frame,] y, x) bool.
        concept: the dim of the concepts.

    Returns:
        (..., concept); NaN where neither mask nor map has a pixel. Its mean over concepts is the macro mIoU.

    Raises:
        MetricError: as `auroc`.

    Example:
        >>> maps = xr.DataArray([[[0.9, 0.1]], [[0.2, 0.5]]], dims=("concept", "y", "x"))
        >>> argmax_iou(maps, maps > 0.4).values.tolist()
        [1.0, 1.0]
    """
    values, inside, outside, lead = _aligned(maps, masks, concept)
    highest = values == values.max(axis=-2, keepdims=True)
    share = highest / highest.sum(axis=-2, keepdims=True)
    both = (share * inside).sum(axis=-1)
    union = inside.sum(axis=-1) + (share * outside).sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return lead.copy(data=np.where(union > 0, both / union, np.nan))


def _auroc(inside: np.ndarray, outside: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Of tokens in the order of falling values; `first` and `last` bound each one's ties."""
    below = outside.sum(axis=-1, keepdims=True) - _upto(outside, last)
    ties = _upto(outside, last) - _upto(outside, first) + np.take_along_axis(outside, first, axis=-1)
    return (inside * (below + ties / 2)).sum(axis=-1) / (inside.sum(axis=-1) * outside.sum(axis=-1))


def _average_precision(inside: np.ndarray, outside: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    found = _upto(inside, last)
    seen = found + _upto(outside, last)
    return (inside * found / np.where(seen > 0, seen, 1)).sum(axis=-1) / inside.sum(axis=-1)


def _upto(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(np.cumsum(weights, axis=-1), index, axis=-1)


def _ranked(maps: xr.DataArray, masks: xr.DataArray, measure: Any) -> xr.DataArray:
    values, inside, outside, lead = _aligned(maps, masks)
    order = np.argsort(-values, axis=-1, kind="stable")
    values, inside, outside = (np.take_along_axis(part, order, axis=-1) for part in (values, inside, outside))
    number = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    starts = np.ones(values.shape, dtype=bool)
    starts[..., 1:] = values[..., 1:] != values[..., :-1]
    ends = np.roll(starts, -1, axis=-1)
    ends[..., -1] = True
    first = np.maximum.accumulate(np.where(starts, number, 0), axis=-1)
    last = np.where(ends, number, values.shape[-1] - 1)
    last = np.minimum.accumulate(last[..., ::-1], axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return lead.copy(data=measure(inside, outside, first, last))


def _aligned(
    maps: xr.DataArray, masks: xr.DataArray, concept: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, xr.DataArray]:
    """Values, covered and uncovered pixels as (..., token), and an array of the leading dims to fill."""
    if masks.dtype != bool:
        raise MetricError(f"masks are {masks.dtype}: give booleans, for example masks > 0.5")
    for array, name in ((maps, "maps"), (masks, "masks")):
        if missing := {"y", "x", *([concept] if concept else [])} - set(array.dims):
            raise MetricError(f"{name} have the dims {array.dims}, without {' and '.join(sorted(missing))}")
    tall, wide = (masks.sizes[dim] / maps.sizes[dim] for dim in ("y", "x"))
    if tall != int(tall) or wide != int(wide):
        raise MetricError(
            f"masks of {masks.sizes['y']} x {masks.sizes['x']} pixels over maps of {maps.sizes['y']} x "
            f"{maps.sizes['x']} tokens: pixels have to fill tokens. Resize the maps or the masks first"
        )
    if bool(maps.isnull().any()):
        raise MetricError("a map holds NaN: no metric of it means anything. Look for the step or layer it comes from")
    covered = masks.coarsen(y=int(tall), x=int(wide)).sum().drop_vars(["y", "x"], errors="ignore")
    maps, covered = xr.broadcast(maps.drop_vars(["y", "x"], errors="ignore"), covered)
    place = [dim for dim in _PLACE if dim in maps.dims]
    rest = [dim for dim in maps.dims if dim not in place and dim != concept]
    lead = [*rest, *([concept] if concept else [])]
    flat = [
        array.transpose(*lead, *place).values.reshape(*(maps.sizes[dim] for dim in lead), -1)
        for array in (maps, covered)
    ]
    inside = flat[1].astype(float)
    kept = {name: coordinate for name, coordinate in maps.coords.items() if set(coordinate.dims) <= set(lead)}
    empty = xr.DataArray(np.zeros([maps.sizes[dim] for dim in lead]), coords=kept, dims=lead)
    return flat[0], inside, tall * wide - inside, empty
