"""How sure a mean over images is. The image is the unit; whatever else was measured on it is resampled with it."""

from __future__ import annotations

import numpy as np
import xarray as xr


def bootstrap(
    values: xr.DataArray, over: str = "sample", *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> xr.Dataset:
    """Mean over images and its percentile bootstrap interval.

    The same images are drawn for every row, so that rows stay paired. NaN (undefined on an image) is left out of the
    means and counted.

    Args:
        values: (..., sample), one number an image.
        over: the dim of the images.
        resamples: how many times the images are drawn, with replacement.
        level: of the interval.
        seed: of the draws.

    Returns:
        ``mean``, ``low``, ``high``, ``n`` (images that count) and ``undefined``, over the other dims.

    Example:
        >>> found = bootstrap(xr.DataArray(np.arange(100.0), dims="sample"))
        >>> float(found["mean"]), bool(found.low < 49.5 < found.high), int(found.n)
        (49.5, True, 100)
    """
    count = values.sizes[over]
    defined = values.notnull()
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    times = xr.DataArray(drawn, dims=("resample", over))
    # one product instead of resamples x images numbers a row
    sums, counts = (xr.dot(times, part, dim=over) for part in (values.fillna(0.0), defined.astype(float)))
    means = sums / counts.where(counts > 0)
    tails = means.quantile([(1 - level) / 2, (1 + level) / 2], dim="resample", skipna=True)
    return xr.Dataset(
        {
            "mean": values.mean(over),
            "low": tails.isel(quantile=0, drop=True),
            "high": tails.isel(quantile=1, drop=True),
            "n": defined.sum(over),
            "undefined": (~defined).sum(over),
        }
    )
