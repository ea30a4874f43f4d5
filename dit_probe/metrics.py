"""How well maps fall on masks: per image, over labelled arrays; what is undefined is NaN, never a number.

A map has one value a token, a mask one a pixel; every pixel has the value of its token (nearest, see `resize`). Tokens
are weighted with their covered and uncovered pixels: the numbers of enlarged maps. All frames of a video count as one.

| metric | what it is | NaN where |
|---|---|---|
| ``auroc`` | P(s+ > s-) + P(s+ = s-) / 2 over object and other pixels; chance is 0.5 | no object, or nothing else |
| ``ap`` | foreground average precision, sum_n (R_n - R_{n-1}) P_n; chance is the object's share | no object |
| ``max_f1`` | highest 2 TP / (2 TP + FP + FN) of any threshold: the mask chooses it | no object |
| ``pixel_accuracy`` | (TP + TN) / pixels | all void |
| ``iou_foreground`` | TP / (TP + FP + FN) | no object |
| ``iou_macro`` | mean of TP / (TP + FP + FN) and TN / (TN + FP + FN) | no object, or nothing else |
| ``boundary_f`` | 2 P R / (P + R) of inner rims, within 0.75 % of the diagonal and at least 1 px | no outline |
| ``pointing`` | is the highest pixel on the object? Ties: the share of them that is | no object |
| ``energy_pointing`` | sum of s over the object / sum of s, s >= 0 | no object, or nothing but zeros |

With a threshold, ``(s - min s) / (max s - min s) > threshold`` is predicted; of a constant map, nothing. Three metrics
are wrong, and there to compare with printed tables:

* ``ap_legacy``, mAP of Tables 1, 2, 4, 5: AP of (1-S, S) on labels (1-T, T), S min-maxed; depends on S's calibration.
* ``iou_pooled_legacy``, ImageNet-Segmentation's mIoU in Tables 4 and 5 and most rows of 1 and 2: object and background
  share an intersection and a union, Acc / (2 - Acc), never below macro IoU. Over images: `statistics`.
* ``pixel_accuracy_void_as_error``, PascalVOC's Acc in Tables 1 and 2: 2 (TP + TN) / (2 valid + void). One of a void
  pixel's two channels is kept and never matches: a perfect prediction with 3.5 % void gets 98.2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import xarray as xr

from dit_probe.errors import MetricError as MetricError
from dit_probe.rows import Rows, Threshold, ratio

Names = tuple[str, ...]
Given = tuple[xr.DataArray, xr.DataArray, xr.DataArray | None]
Measure = Callable[[Rows], np.ndarray]

DEFAULT = ("auroc", "ap", "max_f1", "pixel_accuracy", "iou_foreground", "iou_macro", "pointing")
METRICS = (*DEFAULT, "boundary_f", "energy_pointing", "ap_legacy", "iou_pooled_legacy", "pixel_accuracy_void_as_error")
COUNTS = ("true_positive", "false_positive", "false_negative", "true_negative")

_PLACE = ("frame", "y", "x")
_NUMBERS = 2**20  # in an array at a time: the ranks of a whole run would be gigabytes


def score(
    maps: xr.DataArray,
    masks: xr.DataArray,
    *,
    valid: xr.DataArray | None = None,
    metrics: str | Sequence[str] = DEFAULT,
    threshold: Threshold = "mean",
) -> xr.Dataset:
    """Metrics of every map against its mask; their equations stand in the table of this module.

    Args:
        maps: (..., concept, [frame,] y, x) in any units.
        masks: (..., concept, [frame,] y, x) bool, at the maps' size or an integer multiple of it in y and x. Dims that
            only one of the two has are broadcast: layers and steps are one call.
        valid: (..., [frame,] y, x) bool at the masks' size; False is void and counts nowhere. None: all are valid.
        metrics: names of that table, of `METRICS`.
        threshold: ``mean`` of the min-maxed map over pixels, plus 1e-12 (more than rounding); ``otsu``, between the two
            groups of highest ``w0 w1 (m0 - m1)^2`` (Otsu 1979, over values, not a histogram); or a number in 0..1.

    Returns:
        One variable a metric over the leading dims (..., concept), float64. Undefined is NaN.

    Raises:
        MetricError: an unknown argument; NaN or infinity in a map; masks that are not boolean; dims, sizes or labels
            that do not fit; negative values under ``energy_pointing``.

    Example:
        >>> maps = xr.DataArray([[[0.9, 0.1], [0.2, 0.1]]], dims=("concept", "y", "x"), coords={"concept": ["boat"]})
        >>> found = score(maps, maps > 0.5, metrics=("auroc", "iou_macro"))
        >>> float(found.auroc.sel(concept="boat")), float(found.iou_macro[0])
        (1.0, 1.0)
    """
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise MetricError(f"no metric {', '.join(map(repr, unknown))}; there are {', '.join(METRICS)}")

    def measure(block: Rows) -> np.ndarray:
        return np.stack([getattr(block, name)() for name in names], axis=-1)

    found = _measured(measure, ", ".join(names), (maps, masks, valid), threshold, adds=("metric",))
    return found.assign_coords(metric=list(names)).to_dataset("metric").assign_attrs(threshold=threshold)


def auroc(maps: xr.DataArray, masks: xr.DataArray) -> xr.DataArray:
    """Area under the ROC curve: that metric of `score`."""
    return score(maps, masks, metrics="auroc")["auroc"]


def average_precision(maps: xr.DataArray, masks: xr.DataArray) -> xr.DataArray:
    """Foreground average precision: ``ap`` of `score`."""
    return score(maps, masks, metrics="ap")["ap"]


def counts(
    maps: xr.DataArray, masks: xr.DataArray, *, valid: xr.DataArray | None = None, threshold: Threshold = "mean"
) -> xr.DataArray:
    """Pixels right and wrong, (..., concept, count) with the labels `COUNTS`; arguments and errors as `score`.

    Example:
        >>> maps = xr.DataArray([[0.9, 0.1], [0.2, 0.1]], dims=("y", "x"))
        >>> counts(maps, maps > 0.15).values.tolist()
        [1.0, 0.0, 1.0, 2.0]
    """
    table = _measured(
        lambda block: np.stack(block.counts, -1), "counts", (maps, masks, valid), threshold, adds=("count",)
    )
    return table.assign_coords(count=list(COUNTS))


def predicted(maps: xr.DataArray, *, valid: xr.DataArray | None = None, threshold: Threshold = "mean") -> xr.DataArray:
    """What is above the threshold, (..., [frame,] y, x) bool at the maps' size; arguments and errors as `score`.

    Example:
        >>> predicted(xr.DataArray([[0.9, 0.1], [0.2, 0.1]], dims=("y", "x"))).values.tolist()
        [[True, False], [False, False]]
    """
    _check(maps, "maps", "predicted", kinds="biuf")
    seen = xr.ones_like(maps, dtype=bool) if valid is None else valid
    grid = maps.sizes["y"], maps.sizes["x"]

    def measure(block: Rows) -> np.ndarray:
        return block.predicted.reshape(len(block.values), -1, *grid)

    found = _measured(measure, "predicted", (maps, seen, seen), threshold, adds=_PLACE)
    return found if "frame" in maps.dims else found.isel(frame=0)


def right_of_two(
    maps: xr.DataArray, masks: xr.DataArray, concept: str = "concept", *, valid: xr.DataArray | None = None
) -> xr.DataArray:
    """At the pixels of one object, is its own map higher than the other object's? Mean over the two.

    A tie counts half. Chance is 0.5, also for any one map given to both; NaN unless exactly two concepts have pixels.
    The dim `concept` goes. Arguments and errors are those of `score`.

    Example:
        >>> maps = xr.DataArray([[[0.9, 0.1]], [[0.2, 0.5]]], dims=("concept", "y", "x"))
        >>> float(right_of_two(maps, maps > 0.4))
        1.0
    """
    return _measured(Rows.right_of_two, "right_of_two", (maps, masks, valid), together=(concept,))


def argmax_iou(
    maps: xr.DataArray, masks: xr.DataArray, concept: str = "concept", *, valid: xr.DataArray | None = None
) -> xr.DataArray:
    """Intersection over union of every concept when each pixel goes to the concept with the highest map.

    A pixel of several highest maps is shared among them. Give a concept, such as the background word, its mask too:
    pixels of no mask count against whoever gets them. NaN where neither mask nor map has a pixel; `statistics.macro`
    is the mean of the others. Arguments and errors are those of `score`.

    Example:
        >>> maps = xr.DataArray([[[0.9, 0.1]], [[0.2, 0.5]]], dims=("concept", "y", "x"))
        >>> argmax_iou(maps, maps > 0.4).values.tolist()
        [1.0, 1.0]
    """

    def measure(block: Rows) -> np.ndarray:
        highest = block.values == block.values.max(axis=1, keepdims=True)
        share = highest / highest.sum(axis=1, keepdims=True)
        return ratio((share * block.inside).sum(-1), (block.inside + share * block.outside).sum(-1))

    return _measured(measure, "argmax_iou", (maps, masks, valid), together=(concept,), adds=(concept,))


def resize(array: xr.DataArray, y: int, x: int, method: Literal["nearest", "bilinear"] = "nearest") -> xr.DataArray:
    """Bring maps (..., y, x) to another size, each value standing at the centre of its token.

    ``nearest``: a pixel has the value of the token it lies in. ``bilinear``: linear between the centres of tokens and
    constant beyond the outermost, as torch's ``interpolate(align_corners=False)``; made smaller, it is not averaged.
    Coordinates of y and x are dropped, for they count tokens. MetricError: no y or x, another method, a size below 1.

    Example:
        >>> small = xr.DataArray([[0.0, 1.0]], dims=("y", "x"))
        >>> resize(small, 1, 4).values.tolist(), resize(small, 1, 4, "bilinear").values.tolist()
        ([[0.0, 0.0, 1.0, 1.0]], [[0.0, 0.25, 0.75, 1.0]])
    """
    if method not in ("nearest", "bilinear") or min(y, x) < 1:
        raise MetricError(f"resize to {y} x {x}, method={method!r}: 1 x 1 or more, and 'nearest' or 'bilinear'")
    _check(array, "maps", "resize", kinds="biuf")
    array = array.drop_vars([name for name, coordinate in array.coords.items() if {*coordinate.dims} & {"y", "x"}])
    for dim, size in (("y", y), ("x", x)):
        last = array.sizes[dim] - 1
        place = (np.arange(size) + 0.5) * (last + 1) / size - 0.5
        if method == "nearest":
            array = array.isel({dim: np.floor(place + 0.5).astype(int)})
        else:
            low = np.clip(np.floor(place).astype(int), 0, last)
            share = xr.DataArray(np.clip(place - low, 0, 1).astype(np.result_type(array.dtype, np.float32)), dims=dim)
            array = array.isel({dim: low}) * (1 - share) + array.isel({dim: np.minimum(low + 1, last)}) * share
    return array


def _measured(
    of: Measure, purpose: str, given: Given, threshold: Threshold = "mean", together: Names = (), adds: Names = ()
) -> xr.DataArray:
    """Measure block by block; dims are the leading ones without those `together`, then those that the measure adds."""
    if threshold not in ("mean", "otsu") and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
        raise MetricError(f"threshold={threshold!r} is neither 'mean', 'otsu' nor a number in 0..1")
    maps, masks, valid = _fitting(purpose, given, together)
    tall, wide = (masks.sizes[dim] // maps.sizes[dim] for dim in ("y", "x"))
    covered = [(part & valid).coarsen(y=tall, x=wide).sum() for part in (masks, ~masks)]
    pixels = [array.rename(y="pixel_y", x="pixel_x") for array in xr.broadcast(masks, valid)]
    grid, fine = ([array.sizes[dim] for dim in _PLACE] for array in (maps, masks))
    at = np.arange(math.prod(grid)).reshape(grid).repeat(tall, 1).repeat(wide, 2)
    row = [*(maps.sizes[dim] for dim in together), math.prod(grid)]
    cores = [[*together, *_PLACE]] * 3 + [[*together, "frame", "pixel_y", "pixel_x"]] * 2
    step = max(1, _NUMBERS // math.prod(fine if "boundary_f" in purpose else row))

    def blocks(*arrays: np.ndarray) -> np.ndarray:
        leads = [a.shape[: a.ndim - len(core)] for a, core in zip(arrays, cores, strict=True)]
        shape = np.broadcast_shapes(*leads)
        # Views: nothing is copied along dims that only maps or only masks have.
        wholes = [np.broadcast_to(a, shape + a.shape[len(own) :]) for a, own in zip(arrays, leads, strict=True)]

        def block(start: int) -> Rows:
            index = np.unravel_index(np.arange(start, min(start + step, math.prod(shape))), shape) if shape else (None,)
            values, inside, outside = (whole[index].reshape(-1, *row).astype(float) for whole in wholes[:3])
            pixels = [whole[index] for whole in wholes[3:] if "boundary_f" in purpose]
            return Rows(values, inside, outside, threshold, at, pixels)

        found = np.concatenate([of(block(start)) for start in range(0, math.prod(shape), step)])
        return found.reshape([*shape, *found.shape[1:]])

    return xr.apply_ufunc(blocks, maps, *covered, *pixels, input_core_dims=cores, output_core_dims=[adds])


def _check(array: xr.DataArray, name: str, purpose: str, needed: Sequence[str] = ("y", "x"), kinds: str = "b") -> None:
    if not isinstance(array, xr.DataArray):
        raise MetricError(f"{purpose}: {name} are {type(array).__name__}, not an xarray.DataArray with named dims")
    if missing := [dim for dim in needed if not array.sizes.get(dim)]:
        raise MetricError(f"{purpose}: {name} have the dims {dict(array.sizes)}, without {' and '.join(missing)}")
    if array.dtype.kind not in kinds:
        fix = "booleans, for example masks > 0.5" if kinds == "b" else "numbers"
        raise MetricError(f"{purpose}: {name} are {array.dtype}: give {fix}")


def _fitting(purpose: str, given: Given, together: Names) -> list[xr.DataArray]:
    """Refuse what does not belong together; the rest is in memory, has frames, and no coordinates of pixels."""
    maps, masks, valid = given
    _check(maps, "maps", purpose, (*together, "y", "x"), "biuf")
    _check(masks, "masks", purpose, (*together, "y", "x"))
    valid = xr.ones_like(masks) if valid is None else valid
    _check(valid, "valid", purpose)
    tokens, pixels, also = ((array.sizes["y"], array.sizes["x"]) for array in (maps, masks, valid))
    if pixels[0] % tokens[0] or pixels[1] % tokens[1] or pixels != also:
        found = (
            f"masks of {pixels[0]} x {pixels[1]} pixels over maps of {tokens[0]} x {tokens[1]} tokens, valid of {also}"
        )
        raise MetricError(f"{purpose}: {found}: pixels have to fill tokens. Resize the maps with metrics.resize")
    arrays = [a.drop_vars([k for k, c in a.coords.items() if {*c.dims} & {*_PLACE}]) for a in (maps, masks, valid)]
    frames = max(array.sizes.get("frame", 1) for array in arrays)
    arrays = [a.compute() if "frame" in a.dims else a.compute().expand_dims(frame=frames) for a in arrays]
    names = [array.coords["concept_name"] for array in arrays[:2] if "concept_name" in array.coords]
    try:
        xr.align(*arrays, join="exact", exclude=("y", "x"))
        if len(names) == 2 and not np.array_equal(*names):
            raise ValueError("concept_name of maps and masks differs")
    except ValueError as error:
        fix = "select the same labels in the same order, as in masks.sel(concept=maps.concept)"
        raise MetricError(f"{purpose}: {str(error).splitlines()[0]}: {fix}") from None
    if len(at := np.argwhere(~np.isfinite(arrays[0].values))):
        place = ", ".join(f"{dim}={arrays[0][dim].values[i]}" for dim, i in zip(arrays[0].dims, at[0], strict=True))
        raise MetricError(f"{purpose}: a map holds NaN or infinity ({len(at)} places, first {place}): see its layer")
    return arrays
