"""What is predicted at a threshold, and its outline."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from metrics_cases import drawn, enlarged
from scipy import ndimage
from sklearn.metrics import confusion_matrix

from dit_probe import rows
from dit_probe.metrics import MetricError, counts, predicted, resize, score


@pytest.mark.parametrize("threshold", ["mean", "otsu", 0.5, 0])
def test_a_constant_map_predicts_nothing(threshold):
    _, masks = drawn(2)
    constant = xr.DataArray(np.full((3, 4), 7.0), dims=("y", "x"))
    table = counts(constant, masks, threshold=threshold)
    assert not table.sel(count=["true_positive", "false_positive"]).any()
    found = score(constant, masks, metrics=("pointing", "energy_pointing", "max_f1"))
    share = masks.mean(("frame", "y", "x"))
    np.testing.assert_allclose(found.pointing, share)
    np.testing.assert_allclose(found.energy_pointing, share)
    np.testing.assert_allclose(found.max_f1, 2 * share / (1 + share))


def test_otsu_splits_where_no_other_split_separates_more():
    maps, masks = drawn(12)
    table = counts(maps, masks, threshold="otsu")
    for s, c in np.ndindex(3, 2):
        values, truth = enlarged(maps, 4)[s, c].ravel(), masks.values[s, c].ravel()

        def spread(cut, values=values):
            high = values > cut
            return high.mean() * (1 - high.mean()) * (values[high].mean() - values[~high].mean()) ** 2

        above = values > max(np.unique(values)[:-1], key=spread)
        expected = [(above & truth).sum(), (above & ~truth).sum(), (~above & truth).sum(), (~above & ~truth).sum()]
        assert table[s, c].values.tolist() == expected


def test_numbers_are_thresholds_of_the_scaled_map():
    maps = xr.DataArray([[10.0, 20.0, 26.0, 30.0]], dims=("y", "x"))
    assert counts(maps, maps > 15, threshold=0.5).values.tolist() == [2, 0, 1, 1]
    refused: list[Any] = [1.5, "median"]
    for wrong in refused:
        with pytest.raises(MetricError, match="neither .mean., .otsu. nor"):
            counts(maps, maps > 15, threshold=wrong)


@pytest.mark.parametrize("threshold", ["mean", "otsu", 0.3])
def test_what_is_predicted_is_what_is_counted(threshold):
    maps, masks = drawn(12)
    valid = xr.DataArray(np.random.default_rng(2).random((3, 2, 12, 16)) > 0.3, dims=("sample", *maps.dims[2:]))
    found = predicted(maps, valid=valid, threshold=threshold)
    assert (found.dims, found.dtype, found.shape) == (maps.dims, bool, maps.shape)
    table = counts(maps, masks, valid=valid, threshold=threshold)
    drawn_mask = enlarged(found, 4)
    for s, c in np.ndindex(3, 2):
        at = valid.values[s]
        truth, guess = masks.values[s, c][at], drawn_mask[s, c][at]
        (rest, false), (missed, true) = confusion_matrix(truth, guess, labels=[False, True])
        assert table[s, c].values.tolist() == [true, false, missed, rest]
    still = predicted(maps.isel(frame=0), threshold=threshold)
    xr.testing.assert_identical(still, predicted(maps.isel(frame=[0]), threshold=threshold).isel(frame=0))
    with pytest.raises(MetricError, match="predicted: maps are ndarray"):
        predicted(maps.values)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(40, 60), (2, 90), (90, 2), (1, 1)])
@pytest.mark.parametrize("reach", [1, 2.5, 4.69, 7])
def test_rims_and_disks_are_those_of_scipy(size, reach):
    area = np.random.default_rng(0).random((2, 3, *size)) > 0.98
    ruler = np.arange(-int(reach), int(reach) + 1)
    disk = (ruler[:, None] ** 2 + ruler**2 <= reach**2)[None, None]
    dilation: Any = ndimage.binary_dilation  # its types say that it gives floats
    grown = dilation(area, disk)
    np.testing.assert_array_equal(rows.dilated(area, reach), grown)
    cross = ndimage.generate_binary_structure(2, 1)[None, None]
    np.testing.assert_array_equal(rows.rim(grown), grown & dilation(~grown, cross))


def naive_boundary_f(truth, guess, valid, reach):
    def rim(area):
        inner = np.pad(area, 1, mode="edge")
        height, width = area.shape
        around = [inner[1 + a : 1 + a + height, 1 + b : 1 + b + width] for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return np.argwhere(area & ~np.all(around, axis=0))

    def near(these, those):
        if not len(those):
            return 0.0
        return np.mean([np.hypot(*(those - place).T).min() <= reach for place in these])

    true, drawn_rim = rim(truth & valid), [place for place in rim(guess) if valid[tuple(place)]]
    precision, recall = near(drawn_rim, true) if len(drawn_rim) else 1, near(true, rim(guess))
    return 2 * precision * recall / (precision + recall) if recall else 0.0


@pytest.mark.parametrize("void", [0, 0.2])
@pytest.mark.parametrize("scale", [4, 80])
def test_boundary_f_against_distances_between_rims(scale, void):
    rng = np.random.default_rng(3)
    maps = xr.DataArray(rng.random((2, 3, 4)), dims=("concept", "y", "x"))
    y, x = np.mgrid[: 3 * scale, : 4 * scale]
    masks = xr.DataArray(
        np.stack([np.hypot(y - scale, x - 2 * scale) < r * scale for r in (0.8, 1.4)]), dims=("concept", "y", "x")
    )
    valid = xr.DataArray(rng.random((3, 4)) >= void, dims=("y", "x"))
    threshold = maps.where(valid).mean(("y", "x"))
    valid = resize(valid, *y.shape)
    found = score(maps, masks, valid=valid, metrics="boundary_f").boundary_f
    reach = max(1, 0.0075 * 5 * scale)
    for c in range(2):
        guess = enlarged(maps > threshold, scale)[c]
        assert float(found[c]) == pytest.approx(naive_boundary_f(masks.values[c], guess, valid.values, reach))
    assert (score(masks.astype(float), masks, metrics="boundary_f").boundary_f == 1).all()


def test_what_is_drawn_on_void_neither_helps_nor_harms_an_outline():
    square = np.zeros((20, 20), dtype=bool)
    square[6:12, 6:12] = True
    masks, valid = xr.DataArray(square, dims=("y", "x")), xr.ones_like(xr.DataArray(square, dims=("y", "x")))
    valid[15:] = False
    guess = masks.astype(float)
    guess[17:19, 3:9] = 1
    assert float(score(guess, masks, valid=valid, metrics="boundary_f").boundary_f) == 1
    assert float(score(guess, masks, metrics="boundary_f").boundary_f) < 0.9
    valid[5:13, 5:13] = masks[5:13, 5:13]  # void around the object, as PascalVOC has it
    assert float(score(guess, masks, valid=valid, metrics="boundary_f").boundary_f) == 1
