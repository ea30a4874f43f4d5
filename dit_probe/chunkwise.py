"""Kernels on one chunk at a time, for arrays of numpy and of dask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr


def chunkwise(
    kernel: Callable[..., np.ndarray], core: Sequence[Sequence[str]], made: Sequence[str], dtype: Any
) -> Callable[..., Any]:
    """A function for ``xarray.apply_ufunc(..., dask="allowed")`` that takes each chunk right after it was read.

    With ``dask="parallelized"`` every chunk is copied once more, and chunks are read ahead of those that are worked on.
    Reading is made one task with the kernel only if no dim ends in it; dims of `core` that are not among those made are
    therefore kept at length 1, in the order in which they are named first, after those.

    Args:
        kernel: of numpy arrays, (…, core dims) to (…, dims made).
        core: dims that the kernel takes of each array, whole (`whole`).
        made: dims that it makes.
        dtype: of what it makes.

    Example:
        >>> import dask.array as da
        >>> rows = xr.DataArray(da.ones((4, 3), chunks=(1, 3)), dims=("row", "column"))
        >>> total = chunkwise(lambda row: row.sum(-1), [["column"]], [], rows.dtype)
        >>> options = {"input_core_dims": [["column"]], "output_core_dims": [["summed"]], "dask": "allowed"}
        >>> xr.apply_ufunc(total, rows, **options).values.tolist()
        [[3.0], [3.0], [3.0], [3.0]]
    """
    gone = dict.fromkeys((dim for dims in core for dim in dims if dim not in made), 1)

    def one(*chunks: np.ndarray) -> np.ndarray:
        return kernel(*chunks)[(..., *(None for _ in gone))]

    def apply(*arrays: Any) -> Any:
        if all(isinstance(array, np.ndarray) for array in arrays):
            return one(*arrays)
        from dask.array import blockwise

        # The dims that are not the kernel's have no names here; xarray lines them up from the right.
        own = [array.ndim - len(dims) for array, dims in zip(arrays, core, strict=True)]
        loops = [f"loop {number}" for number in range(max(own))]
        pairs: list[Any] = []
        for array, dims, count in zip(arrays, core, own, strict=True):
            pairs += [array, (*loops[len(loops) - count :], *dims)]
        index = (*loops, *made, *gone)
        return blockwise(one, index, *pairs, dtype=dtype, meta=np.empty(0, dtype), adjust_chunks=gone)

    return apply


def whole(array: xr.DataArray, dims: Sequence[str]) -> xr.DataArray:
    """One chunk along these dims; DataArray.chunk would turn coordinates, which the grid needs now, into dask too.

    Example:
        >>> import dask.array as da
        >>> whole(xr.DataArray(da.ones((4, 3), chunks=1), dims=("row", "column")), ["column"]).chunks
        ((1, 1, 1, 1), (3,))
    """
    if array.chunks is None:
        return array
    return array.copy(data=array.variable.chunk(dict.fromkeys(dims, -1)).data)


def softmax_over_concepts(values: xr.DataArray) -> xr.DataArray:
    """Softmax over ``concept``, wherever that dim is.

    Example:
        >>> softmax_over_concepts(xr.DataArray(np.zeros((2, 1)), dims=("concept", "image_token"))).values.tolist()
        [[0.5], [0.5]]
    """
    axis = values.get_axis_num("concept")

    def kernel(s: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # inf - inf: a score that overflowed becomes NaN and shows as such
            weights = np.exp(s - s.max(axis, keepdims=True))
        return weights / weights.sum(axis, keepdims=True)

    return xr.apply_ufunc(chunkwise(kernel, [()], (), values.dtype), whole(values, ["concept"]), dask="allowed")
