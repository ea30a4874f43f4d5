"""Maps and masks of tokens, and what they are as pixels."""

import numpy as np
import xarray as xr

DIMS = ("sample", "concept", "frame", "y", "x")


def drawn(levels: int, scale: int = 4, seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Maps with few or many distinct values, and masks `scale` times finer."""
    rng = np.random.default_rng(seed)
    maps = xr.DataArray(rng.integers(levels, size=(3, 2, 2, 3, 4)) / 7 - 1, dims=DIMS)
    owner = rng.integers(3, size=(3, 2, 3 * scale, 4 * scale))
    return maps, xr.DataArray(np.stack([owner == 0, owner == 1], axis=1), dims=DIMS)


def enlarged(maps: xr.DataArray, scale: int) -> np.ndarray:
    return maps.values.repeat(scale, axis=-2).repeat(scale, axis=-1)


def scaled(values):
    return (values - values.min()) / np.ptp(values)
