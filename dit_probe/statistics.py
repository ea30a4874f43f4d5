"""How sure a number over images is, and whether two methods differ. The image is the unit.

Whatever else was measured on an image (layers, methods, metrics) is resampled with it, so that rows stay paired. NaN,
undefined on an image, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe.errors import MetricError

_NUMBERS = 2**22
"""In a table of draws at a time; 10,000 draws of 4,276 images at once would be 340 MB."""


def bootstrap(
    values: Any,
    over: str = "sample",
    *,
    clusters: Any = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    statistic: Literal["mean"] | Callable[[xr.DataArray], xr.DataArray] = "mean",
) -> xr.Dataset:
    """A number over images and its percentile bootstrap interval.

    n images are drawn from the n with replacement, `resamples` times, the same ones for every row; the interval ends
    at the quantiles (1 - level) / 2 and (1 + level) / 2 of what they give (Efron 1979).

    Args:
        values: (..., sample), one number an image; or a sequence of such numbers.
        over: the dim of the images.
        clusters: (sample), a label an image, such as its class. Whole clusters are drawn, for images of one class are
            not independent of each other. None: every image by itself.
        resamples: how many times.
        level: of the interval, between 0 and 1.
        seed: of the draws.
        statistic: ``mean`` of what is defined; or a function of an array like `values`, of any length along `over`,
            that reduces that dim, such as a median. It is called `resamples` times: `pooled` is the fast way to ratios
            of sums.

    Returns:
        ``mean`` (``value`` of another statistic), ``low``, ``high``, in the units of `values`; ``n`` and ``undefined``,
        images that count and that do not; over the other dims. Without anything defined: NaN.

    Raises:
        MetricError: no such dim, no images, labels of another length, a level or number of resamples out of range.

    Example:
        >>> found = bootstrap(xr.DataArray(np.arange(100.0), dims="sample"))
        >>> float(found["mean"]), bool(found.low < 49.5 < found.high), int(found.n)
        (49.5, True, 100)
    """
    values = _numbers(values, over, resamples, level)
    members = _members(values, over, clusters)
    defined = values.notnull()
    draws = _draws(members, resamples, seed)
    if callable(statistic):
        name, value = "value", statistic(values)
        images = np.arange(values.sizes[over])
        drawn = xr.concat(
            [statistic(values.isel({over: np.repeat(images, row)})) for times in draws for row in times], "resample"
        )
        defined = defined.all([dim for dim in values.dims if dim != over and dim not in value.dims])
    elif statistic == "mean":
        name, value = "mean", values.mean(over)
        filled, weights = values.fillna(0.0), defined.astype(float)
        drawn = xr.concat([_ratio(times, filled, weights, over) for times in draws], "resample")
    else:
        raise MetricError(f"statistic={statistic!r} is neither 'mean' nor a function that reduces {over!r}")
    low, high = _tails(drawn, level)
    counts = {"n": defined.sum(over), "undefined": (~defined).sum(over)}
    return xr.Dataset({name: value, "low": low, "high": high, **counts})


def pooled(
    part: xr.DataArray,
    whole: xr.DataArray,
    over: str = "sample",
    *,
    macro: str | None = None,
    clusters: Any = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """A number over the pixels of all images together, and its percentile bootstrap interval over images.

        sum over images of part / sum over images of whole

    Args:
        part: (..., sample), such as the pixels that are right.
        whole: (..., sample), such as all that count; an image where either is NaN is left out.
        over: the dim of the images.
        macro: a dim, such as that of the classes, over which the ratios are averaged where there is a whole, in every
            resample anew; None: every ratio by itself.
        clusters: as for `bootstrap`, as are `resamples`, `level` and `seed`.
        resamples: how many times.
        level: of the interval, between 0 and 1.
        seed: of the draws.

    Returns:
        ``value``, ``low``, ``high``; ``n`` and ``undefined``, images that have a whole and that have none; over the
        other dims. NaN where no image has one.

    Raises:
        MetricError: as `bootstrap`.

    Example:
        >>> right, pixels = (xr.DataArray(values, dims="sample") for values in ([9.0, 0.0], [10.0, 90.0]))
        >>> float(pooled(right, pixels).value), float(bootstrap(right / pixels)["mean"])
        (0.09, 0.45)
    """
    part, whole = (_numbers(values, over, resamples, level) for values in xr.broadcast(part, whole))
    members = _members(part, over, clusters)
    counted = part.notnull() & whole.notnull()
    part, whole = part.where(counted, 0.0), whole.where(counted, 0.0)

    def ratio(times: np.ndarray) -> xr.DataArray:
        ratios = _ratio(times, part, whole, over)
        return ratios if macro is None else ratios.mean(macro)

    value = ratio(np.ones((1, len(members)))).isel(resample=0)
    low, high = _tails(xr.concat([ratio(times) for times in _draws(members, resamples, seed)], "resample"), level)
    defined = whole > 0 if macro is None else (whole > 0).any(macro)
    counts = {"n": defined.sum(over), "undefined": (~defined).sum(over)}
    return xr.Dataset({"value": value, "low": low, "high": high, **counts})


def compare(
    values: xr.DataArray,
    *,
    over: str = "sample",
    method_dim: str = "method",
    reference: Any,
    clusters: Any = None,
    resamples: int = 2000,
    permutations: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Does each method differ from the reference, on the same images?

    With d the difference on an image, method minus reference: the mean of d and its paired bootstrap interval; the
    sign-flip test, ``p = P(|sum of +-d| >= |sum d|)``, over all 2^n signs where those are no more than `permutations`
    and else ``(1 + hits) / (1 + permutations)`` of random ones (Phipson and Smyth 2010); `holm` over the methods of a
    row; and Cohen's ``d_z = mean d / sd d``.

    Args:
        values: (..., method, sample).
        over: the dim of the images.
        method_dim: the dim of the methods, with their names as its coordinate.
        reference: name of the method that the others are compared with.
        clusters: as for `bootstrap`; the signs of a cluster flip together, too.
        resamples: of the interval.
        permutations: of the signs, at most.
        level: of the interval.
        seed: of both.

    Returns:
        Over (..., method), without the reference: ``difference``, ``low``, ``high``, ``p``, ``p_holm``,
        ``effect_size``, ``n`` and ``left_out``, images on which either of the two is undefined. NaN where there are too
        few images; an effect size needs two, and differences that differ.

    Raises:
        MetricError: as `bootstrap`; no such method, or no other.

    Example:
        >>> values = xr.DataArray([[0.5, 0.6, 0.7, 0.4], [0.6, 0.8, 0.8, 0.7]], dims=("method", "sample"),
        ...                       coords={"method": ["cross", "output"]})
        >>> found = compare(values, reference="cross").sel({"method": "output"})
        >>> round(float(found.difference), 3), float(found.p)  # 2 of 16 signs
        (0.175, 0.125)
    """
    values = _numbers(values, over, resamples, level)
    names = values[method_dim].values.tolist() if method_dim in values.coords else []
    if reference not in names or len(names) < 2 or permutations < 1:
        raise MetricError(
            f"reference={reference!r} of {method_dim} {names}, permutations={permutations}: name one of at least two "
            f"labelled methods, as in values.assign_coords({method_dim}=[...]), and 1 or more permutations"
        )
    differences = values.drop_sel({method_dim: reference}) - values.sel({method_dim: reference}, drop=True)
    shared: dict[str, Any] = {"clusters": clusters, "resamples": resamples, "level": level, "seed": seed}
    found = bootstrap(differences, over, **shared).rename({"mean": "difference", "undefined": "left_out"})
    p = _sign_flips(differences, over, _members(values, over, clusters), permutations, seed)
    spread = differences.std(over, ddof=1)
    found["p"] = p.where(found.n > 0)
    found["p_holm"] = xr.apply_ufunc(
        holm, found.p, input_core_dims=[[method_dim]], output_core_dims=[[method_dim]], vectorize=True
    )
    # Equal differences still leave the rounding of their mean.
    found["effect_size"] = found.difference / spread.where(spread > 1e-12 * abs(differences).max(over))
    return found.transpose(..., method_dim)


def holm(p: Any) -> np.ndarray:
    """Holm's (1979) adjusted p-values: compared with alpha, they keep the chance of any false finding below alpha.

    ``p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j))`` for the m p-values that are defined, in rising order.

    Args:
        p: (test), NaN where there was no test.

    Returns:
        (test), in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def macro(iou: xr.DataArray, concept: str = "concept") -> xr.DataArray:
    """Mean over the concepts for which `dit_probe.metrics.argmax_iou` is defined; NaN where it is for none.

    Example:
        >>> float(macro(xr.DataArray([0.5, np.nan, 1.0], dims="concept")))
        0.75
    """
    return iou.mean(concept, skipna=True)


def iou_pooled_legacy(table: xr.DataArray, over: str | Sequence[str] = "sample") -> xr.DataArray:
    """The printed "mIoU" of ImageNet-Segmentation: ``Acc / (2 - Acc)`` of the accuracy over all pixels of all images.

    Wrong, see `dit_probe.metrics`, and there to compare with Tables 1, 2, 4 and 5. A `statistic` of `bootstrap`.

    Args:
        table: (..., sample, count) of `dit_probe.metrics.counts`.
        over: dims whose pixels are pooled. `dit_probe.metrics.score` has each image by itself, as Figure 4 does.

    Returns:
        The other dims; NaN where no pixel is valid.

    Example:
        >>> names = ["true_positive", "false_positive", "false_negative", "true_negative"]
        >>> table = xr.DataArray([[8000, 700, 993, 307]], dims=("sample", "count"), coords={"count": names})
        >>> round(float(iou_pooled_legacy(table)), 4)  # printed beside Acc 0.8307
        0.7104
    """
    pooled = table.sum(over)
    right = pooled.sel(count=["true_positive", "true_negative"]).sum("count")
    pixels = pooled.sum("count")
    return right / (2 * pixels - right).where(pixels > 0)


def _numbers(values: Any, over: str, resamples: int, level: float) -> xr.DataArray:
    if not isinstance(values, xr.DataArray):
        values = np.asarray(values)
        if values.ndim != 1:
            raise MetricError(f"an array of shape {values.shape} has no named dims: give an xarray.DataArray")
        values = xr.DataArray(values, dims=over)
    if not values.sizes.get(over):
        raise MetricError(f"no images: values have the dims {dict(values.sizes)}, resampled is {over!r}")
    if resamples < 1 or not 0 < level < 1:
        raise MetricError(f"resamples={resamples}, level={level}: 1 or more, and between 0 and 1 (0.95, not 95)")
    return values.astype(float).compute()


def _members(values: xr.DataArray, over: str, clusters: Any) -> np.ndarray:
    """The number of the cluster that each image is in."""
    size = values.sizes[over]
    if clusters is None:
        return np.arange(size)
    labels = np.asarray(clusters)
    if labels.shape != (size,):
        raise MetricError(f"clusters of shape {labels.shape} for {size} along {over!r}: give one label each")
    return np.unique(labels, return_inverse=True)[1]


def _draws(members: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of (resample, image): how many times each image was drawn, with the rest of its cluster."""
    random = np.random.default_rng(seed)
    count = int(members.max()) + 1
    step = max(1, _NUMBERS // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        picked = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * count).reshape(rows, count)[:, members]


def _sums(times: np.ndarray, values: xr.DataArray, over: str) -> xr.DataArray:
    """(..., resample): sums over images, each counting as often as it was drawn.

    One matrix product of whole arrays, which `xr.dot` and products of strided ones are slower than by ten times.
    """
    weights = times.T.astype(float)

    def multiply(block: np.ndarray) -> np.ndarray:
        return (block.reshape(-1, len(weights)) @ weights).reshape(*block.shape[:-1], weights.shape[1])

    return xr.apply_ufunc(multiply, values, input_core_dims=[[over]], output_core_dims=[["resample"]])


def _ratio(times: np.ndarray, part: xr.DataArray, whole: xr.DataArray, over: str) -> xr.DataArray:
    """(..., resample): ratios of sums over images; the mean, where the whole counts what is defined."""
    above, below = (_sums(times, values, over) for values in (part, whole))
    return above / below.where(below > 0)


def _tails(drawn: xr.DataArray, level: float) -> list[xr.DataArray]:
    # Rows of nothing but NaN would be warned about, and the quantile that skips NaN is far slower: only where needed.
    some = drawn.notnull().any("resample")
    drawn = drawn.where(some, 0)
    skip = bool(drawn.isnull().any())
    found = drawn.quantile([(1 - level) / 2, (1 + level) / 2], dim="resample", skipna=skip).where(some)
    return [found.isel(quantile=at, drop=True) for at in (0, 1)]


def _sign_flips(
    differences: xr.DataArray, over: str, members: np.ndarray, permutations: int, seed: int
) -> xr.DataArray:
    count = int(members.max()) + 1
    filled = differences.fillna(0.0)
    exact = 2**count <= permutations
    total = 2**count if exact else permutations
    random = np.random.default_rng(seed)
    # Sums of the same numbers in another order differ by rounding, and have to count as equal.
    bar = abs(filled.sum(over)) - 1e-12 * abs(filled).sum(over)
    hits = xr.zeros_like(bar)
    step = max(1, _NUMBERS // count)
    for start in range(0, total, step):
        rows = np.arange(start, min(start + step, total))
        flips = rows[:, None] >> np.arange(count) & 1 if exact else random.integers(0, 2, (len(rows), count))
        signs = (1.0 - 2.0 * flips)[:, members]
        hits = hits + (abs(_sums(signs, filled, over)) >= bar).sum("resample")
    return hits / total if exact else (hits + 1) / (total + 1)
