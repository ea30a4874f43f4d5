"""What a run of `dit_probe.evaluate` says: means with intervals, differences from one method, the best one; and tables.

A metric's own name stands for its mean over the images, each counting the same. A name that ends in ``_pooled`` is a
number over the pixels of all images together, as published tables have it:

| | |
|---|---|
| ``pixel_accuracy_pooled`` | right pixels / pixels |
| ``iou_macro_pooled`` | intersection / union of the objects and of the rest, each over all images; their mean |
| ``iou_legacy_pooled`` | Acc / (2 - Acc) of that accuracy, the printed mIoU of ImageNet-Segmentation, which is none |
| ``pixel_accuracy_void_as_error_pooled`` | the printed Acc of PascalVOC: void pixels are wrong, and count half |
| ``miou_pooled`` | intersection / union of every class over all images; mean over classes with a union (Table 3) |
| ``class_accuracy_pooled`` | pixels whose highest map is that of their class / pixels (Table 3) |

The first four have a row for every threshold, "iou_macro_pooled, otsu", and count a picture once
for each of its words.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe import protocols
from dit_probe.evaluation import EvaluationWarning
from dit_probe.metrics import COUNTS
from dit_probe.protocols import EvaluationError
from dit_probe.statistics import bootstrap, compare, pooled

_SPECIFICITY = ("auroc_other", "auroc_absent")
"""Of which neither the highest nor the lowest is the best."""


def summarise(results: xr.Dataset, over: str = "image", *, clusters: Any = None) -> xr.Dataset:
    """Means over images and numbers over all pixels, with 95 % bootstrap intervals over images.

    Args:
        results: of `evaluate`, or a selection of it.
        over: the dim of the images.
        clusters: a coordinate of the images, such as ``target``, or a label an image: whole clusters are drawn
            (`dit_probe.statistics.bootstrap`), as images of one class are not independent. None: every image by itself.

    Returns:
        ``mean``, ``low``, ``high`` in the units of each metric, ``n`` and ``undefined``, images that count and that do
        not, (method, metric): `dit_probe.protocols.METRICS`, then those of this module's table, as far as the results
        have what they need. What depends on a threshold has a row for each: "iou_macro, otsu".

    Raises:
        EvaluationError: no metric in it, or no such coordinate.
        MetricError: labels of another number than there are images.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.evaluation import evaluate
        >>> from dit_probe.methods import constant
        >>> found = summarise(evaluate({"constant": constant()}, PictureBook(3), "chefer", progress=False))
        >>> float(found["mean"].sel({"method": "constant", "metric": "auroc"}))
        0.5
    """
    names = [name for name in protocols.METRICS if name in results]
    if not names:
        raise EvaluationError(f"nothing to sum up: found {', '.join(map(str, results)) or 'nothing'}, no metric")
    labels = _labels(results, over, clusters)
    found = [bootstrap(_rows({name: results[name] for name in names}), over, clusters=labels)]
    for name, (part, whole, macro) in _pools(results).items():
        one = pooled(part, whole, over, macro=macro, clusters=labels).rename(value="mean")
        found.append(xr.Dataset({key: _rows({name: values}) for key, values in one.data_vars.items()}))
    joined = xr.concat(found, "metric", coords="minimal", compat="override")
    return joined.transpose("method", "metric", ...).assign_attrs(results.attrs)


def against(
    results: xr.Dataset,
    reference: str,
    metric: str = "auroc",
    threshold: str | None = None,
    over: str = "image",
    *,
    clusters: Any = None,
) -> xr.Dataset:
    """Every method minus one of them, on the same images (`dit_probe.statistics.compare`); `table` prints it.

    Args:
        results: of `evaluate`, or a selection of it.
        reference: name of the method that the others are compared with.
        metric: one of `dit_probe.protocols.METRICS`.
        threshold: which one, of a metric that depends on it; None, if there is only one.
        over: the dim of the images.
        clusters: as for `summarise`.

    Returns:
        (method), without the reference: ``difference``, ``low``, ``high``, ``p``, ``p_holm``, ``effect_size``, ``n``,
        ``left_out``. Attributes: ``metric``, ``reference``.

    Raises:
        EvaluationError: no such metric, threshold or coordinate.
        MetricError: no such method, or no other.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.evaluation import evaluate
        >>> from dit_probe.methods import centre_gaussian, constant
        >>> methods = {"constant": constant(), "centre": centre_gaussian()}
        >>> found = against(evaluate(methods, PictureBook(8), progress=False), "constant")
        >>> found["method"].values.tolist(), int(found.n.sel({"method": "centre"}))
        (['centre'], 8)
    """
    name, values = _one(results, metric, threshold)
    found = compare(values, over=over, reference=reference, clusters=_labels(results, over, clusters))
    return found.assign_attrs(metric=name, reference=reference)


def choose(results: xr.Dataset, metric: str = "auroc", threshold: str | None = None, over: str = "image") -> str:
    """The method with the highest mean, over the images on which every method that has any number has one.

    The number of what was chosen is too good: choose on other pictures (`dit_probe.datasets.segmentation.split`) than
    are reported.

    Args:
        results: of `evaluate` on pictures to choose on.
        metric: one of `dit_probe.protocols.METRICS`; not those of other words, whose best is neither end.
        threshold: as for `against`.
        over: the dim of the images.

    Raises:
        EvaluationError: no such metric or threshold, or no image with a number of every method.

    Warns:
        EvaluationWarning: several methods have the highest mean; the first of them is given.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook, split
        >>> from dit_probe.evaluation import evaluate
        >>> from dit_probe.methods import centre_gaussian
        >>> widths = {f"grid {size}": centre_gaussian(size) for size in (2, 64)}
        >>> choosing, reported = split(PictureBook(100))
        >>> choose(evaluate(widths, choosing, progress=False))
        'grid 64'
    """
    if metric in _SPECIFICITY:
        raise EvaluationError(f"{metric} tells whether a map follows its word: higher is not better. Choose by another")
    name, values = _one(results, metric, threshold)
    values = values.compute().dropna("method", how="all").dropna(over)
    if not values.size:
        raise EvaluationError(f"{name}: no image has a number of every method, see the results' 'failed' for reasons")
    means = values.mean(over)
    best = means["method"].values[means.values >= means.values.max() - 1e-12].tolist()
    if len(best) > 1:
        tied = ", ".join(map(repr, best))
        warnings.warn(f"{name}: {tied} tie at {float(means.max()):.4g}; chosen {best[0]!r}", EvaluationWarning, 2)
    return best[0]


def table(found: xr.Dataset, kind: Literal["markdown", "csv"] = "markdown") -> str:
    """What `summarise` or `against` found as text.

    Args:
        found: of either.
        kind: Markdown, a row a method, of `summarise` with a column a metric; or CSV with all digits, a row for each
            method and metric.

    Raises:
        EvaluationError: another `kind`.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.evaluation import evaluate
        >>> from dit_probe.methods import constant
        >>> results = evaluate({"constant": constant()}, PictureBook(3), progress=False)
        >>> print(table(summarise(results).sel(metric=["auroc"])))
        | method   | auroc                |
        |----------|----------------------|
        | constant | 0.500 [0.500, 0.500] |
    """
    if kind not in ("markdown", "csv"):
        raise EvaluationError(f"kind={kind!r}; choose markdown or csv")
    paired = "difference" in found
    columns = ["mean", "low", "high", "n", "undefined"]
    if paired:
        columns = ["difference", "low", "high", "p", "p_holm", "effect_size", "n", "left_out"]
    if kind == "csv":
        return found[columns].to_dataframe(dim_order=list(found[columns[0]].dims))[columns].to_csv()
    if paired:
        rows = [["method", "{metric}, minus that of {reference}".format(**found.attrs), "p (Holm)", "effect size"]]
    else:
        rows = [["method", *found.metric.values.tolist()]]
    for at, method in enumerate(found["method"].values.tolist()):
        numbers = [found[name].values[at] for name in columns]
        rows.append([method, *(_difference(*numbers) if paired else map(_interval, *numbers))])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    r"""A Markdown table whose columns stand under each other.

    Args:
        rows: of cells, equally many in each; the first row is the head.

    Example:
        >>> print(markdown([["method", "|x|"], ["noise", "0.5"]]))
        | method | \|x\| |
        |--------|-------|
        | noise  | 0.5   |
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _interval(mean: float, low: float, high: float, n: float, undefined: float, sign: str = "") -> str:
    left_out = f" ({int(undefined)} undefined)" if undefined else ""
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{left_out}" if n else "undefined"


def _difference(
    difference: float, low: float, high: float, _: float, p: float, effect: float, n: float, left_out: float
) -> list[str]:
    interval = _interval(difference, low, high, n, left_out, "+")
    texts = "< 0.001" if p < 0.001 else f"{p:.3f}", f"{effect:+.2f}"
    return [interval, *(t if np.isfinite(x) else "undefined" for t, x in zip(texts, (p, effect), strict=True))]


def _rows(metrics: Mapping[str, xr.DataArray]) -> xr.DataArray:
    """(metric, …), a row for every threshold: "iou_macro, otsu"."""
    rows: dict[str, xr.DataArray] = {}
    for name, values in metrics.items():
        if "threshold" in values.dims:
            rows |= {f"{name}, {t}": values.sel(threshold=t, drop=True) for t in values.threshold.values}
        else:
            rows[name] = values.drop_vars("threshold", errors="ignore")
    joined: Any = xr.concat(list(rows.values()), xr.Variable("metric", list(rows)), coords="minimal", compat="override")
    return joined


def _pools(results: xr.Dataset) -> dict[str, tuple[xr.DataArray, xr.DataArray, str | None]]:
    """Name to what is summed over images: part and whole, and the dim that their ratio is averaged over."""
    found: dict[str, tuple[xr.DataArray, xr.DataArray, str | None]] = {}
    if "counts" in results:
        true, false, missed, rest = (results["counts"].sel(count=name, drop=True) for name in COUNTS)
        right, wrong = true + rest, false + missed
        sides: list[Any] = [xr.concat(pair, "side") for pair in ([true, rest], [true + wrong, rest + wrong])]
        found["pixel_accuracy_pooled"] = right, right + wrong, None
        found["iou_macro_pooled"] = sides[0], sides[1], "side"
        found["iou_legacy_pooled"] = right, right + 2 * wrong, None
        if "pixel_accuracy_void_as_error" in results:
            # Void pixels are not stored: they follow from an image's ratio, where that is not 0.
            ratio = results["pixel_accuracy_void_as_error"]
            found["pixel_accuracy_void_as_error_pooled"] = 2 * right, 2 * right / ratio.where(ratio > 0), None
    if "intersection" in results and "union" in results:
        both, either = results["intersection"], results["union"]
        found["miou_pooled"] = both, either, "class"
        # A pixel is of one class and given to one: the unions have it twice, or once where it is in an intersection.
        both, either = (part.sum("class", skipna=False) for part in (both, either))
        found["class_accuracy_pooled"] = 2 * both, both + either, None
    return found


def _labels(results: xr.Dataset, over: str, clusters: Any) -> Any:
    if not isinstance(clusters, str):
        return clusters
    along = [str(name) for name, coord in results.coords.items() if coord.dims == (over,)]
    if clusters not in along:
        raise EvaluationError(
            f"clusters={clusters!r}; along {over!r} there are the coordinates {', '.join(along) or 'none'}. Name one, "
            "or give a label an image"
        )
    return [str(label) for label in results[clusters].values]


def _one(results: xr.Dataset, metric: str, threshold: Any) -> tuple[str, xr.DataArray]:
    """One metric at one threshold, and its name in a summary."""
    if metric not in (there := [name for name in protocols.METRICS if name in results]):
        raise EvaluationError(f"no metric {metric!r}; there are {', '.join(there) or 'none'}")
    values = results[metric]
    if "threshold" not in values.dims:
        if threshold is not None:
            raise EvaluationError(f"threshold={threshold!r}: {metric} has none; leave it out")
        return metric, values
    labels = values.threshold.values.tolist()
    label = labels[0] if threshold is None and len(labels) == 1 else str(threshold)
    if label not in labels:
        raise EvaluationError(f"threshold={threshold!r} of {metric}: give one of {', '.join(labels)}")
    return f"{metric}, {label}", values.sel(threshold=label, drop=True)
