"""Maps of another size."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from dit_probe.metrics import MetricError, resize


@pytest.mark.parametrize(("method", "mode"), [("nearest", "nearest-exact"), ("bilinear", "bilinear")])
def test_resize_is_that_of_torch(method, mode):
    small = np.random.default_rng(4).random((2, 3, 5, 7))
    for size in itertools.product((10, 13, 4), (21, 7, 1)):
        expected = torch.nn.functional.interpolate(torch.tensor(small), size=size, mode=mode)
        found = resize(xr.DataArray(small, dims=("sample", "concept", "y", "x")), *size, method)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_resize_keeps_dims_and_type_and_refuses_the_rest():
    small = xr.DataArray(np.ones((2, 3, 2), "float32"), dims=("y", "x", "concept"), coords={"y": [0, 1]})
    found = resize(small, 4, 6, "bilinear")
    assert (found.dims, found.dtype, list(found.coords)) == (small.dims, np.float32, [])
    assert resize(small > 0, 4, 6).dtype == bool
    refused: list[dict[str, Any]] = [{"y": 0, "x": 1}, {"y": 1, "x": 1, "method": "cubic"}]
    for wrong in refused:
        with pytest.raises(MetricError, match="resize"):
            resize(small, **wrong)
