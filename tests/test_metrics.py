"""Metrics against scikit-learn on pixels, and where they are undefined."""

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score

from dit_probe.metrics import MetricError, argmax_iou, auroc, average_precision, right_of_two
from dit_probe.statistics import bootstrap

DIMS = ("sample", "concept", "frame", "y", "x")
ORACLES = [(auroc, roc_auc_score), (average_precision, average_precision_score)]


def drawn(levels: int, scale: int = 4, seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Maps with few or many distinct values, and masks `scale` times finer."""
    rng = np.random.default_rng(seed)
    maps = xr.DataArray(rng.integers(levels, size=(3, 2, 2, 3, 4)) / 7 - 1, dims=DIMS)
    owner = rng.integers(3, size=(3, 2, 3 * scale, 4 * scale))
    return maps, xr.DataArray(np.stack([owner == 0, owner == 1], axis=1), dims=DIMS)


def enlarged(maps: xr.DataArray, scale: int) -> np.ndarray:
    return maps.values.repeat(scale, axis=-2).repeat(scale, axis=-1)


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("levels", [2, 5, 10_000])
@pytest.mark.parametrize(("metric", "oracle"), ORACLES)
def test_ranks_are_scored_as_scikit_learn_scores_pixels(metric, oracle, levels, scale):
    maps, masks = drawn(levels, scale)
    found = metric(maps, masks)
    pixels = enlarged(maps, scale)
    assert found.dims == ("sample", "concept")
    for s, c in np.ndindex(3, 2):
        expected = oracle(masks.values[s, c].ravel(), pixels[s, c].ravel())
        assert float(found[s, c]) == pytest.approx(expected, abs=1e-12)


def test_dims_that_only_the_maps_have_stay():
    maps, masks = drawn(50)
    layers = xr.concat([maps, -maps], dim="layer").assign_coords(layer=[3, 8])
    found = auroc(layers, masks)
    assert found.layer.values.tolist() == [3, 8]
    np.testing.assert_allclose(found.sum("layer"), 1)


@pytest.mark.parametrize("metric", [auroc, average_precision])
def test_constant_maps_are_chance(metric):
    _, masks = drawn(2)
    found = metric(xr.DataArray(np.full((3, 4), 7.0), dims=("y", "x")), masks)
    expected = 0.5 if metric is auroc else masks.mean(("frame", "y", "x"))
    np.testing.assert_allclose(found, found * 0 + expected)


@pytest.mark.parametrize(
    ("metric", "fill", "nan"),
    [(auroc, True, True), (auroc, False, True), (average_precision, False, True), (average_precision, True, False)],
)
def test_undefined_is_nan(metric, fill, nan):
    maps, masks = drawn(9)
    masks[0, 0] = fill
    found = metric(maps, masks)
    assert bool(np.isnan(found[0, 0])) == nan
    assert not found[1:].isnull().any()


def test_right_of_two_counts_pixels_and_halves_ties():
    maps, masks = drawn(3)
    found = right_of_two(maps, masks)
    pixels = enlarged(maps, 4)
    for s in range(3):
        wins = []
        for own in (0, 1):
            at = masks.values[s, own]
            a, b = pixels[s, own][at], pixels[s, 1 - own][at]
            wins.append(((a > b) + 0.5 * (a == b)).mean())
        assert float(found[s]) == pytest.approx(np.mean(wins))
    same = maps.isel(concept=[0, 0])
    np.testing.assert_allclose(right_of_two(same, masks), 0.5)


def test_right_of_two_picks_the_two_that_have_pixels():
    maps, masks = drawn(100)
    nothing = masks.isel(concept=[0]) & False
    three = xr.concat([masks.isel(concept=[0]), nothing, masks.isel(concept=[1])], "concept")
    more = xr.concat([maps.isel(concept=[0]), maps.isel(concept=[0]), maps.isel(concept=[1])], "concept")
    np.testing.assert_allclose(right_of_two(more, three), right_of_two(maps, masks))
    assert right_of_two(more, three | True).isnull().all()
    assert right_of_two(maps.isel(concept=[0]), masks.isel(concept=[0])).isnull().all()


def test_argmax_iou_is_the_jaccard_score_of_pixels():
    maps, masks = drawn(100_000)
    found = argmax_iou(maps, masks)
    highest = enlarged(maps, 4).argmax(axis=1)
    for s, c in np.ndindex(3, 2):
        expected = jaccard_score(masks.values[s, c].ravel(), (highest[s] == c).ravel())
        assert float(found[s, c]) == pytest.approx(expected)
    masks[0, 0] = False
    maps[0, 0] = -9
    assert np.isnan(argmax_iou(maps, masks)[0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps, masks: (maps, masks.astype(float)), "masks are float64: give booleans"),
        (lambda maps, masks: (maps, masks.isel(y=slice(5))), "masks of 5 x 16 pixels over maps of 3 x 4 tokens"),
        (lambda maps, masks: (maps.rename(y="row"), masks), "maps have the dims .*without y"),
        (lambda maps, masks: (maps.where(maps > maps.min()), masks), "a map holds NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(MetricError, match=message):
        auroc(*change(*drawn(9)))


def test_intervals_are_those_of_scipy_and_rows_stay_paired():
    from scipy.stats import bootstrap as oracle

    values = xr.DataArray(np.random.default_rng(1).normal(size=(2, 80)), dims=("method", "sample"))
    values[1] = values[0] + 1
    found = bootstrap(values, resamples=4000)
    expected = oracle((values.values[0],), np.mean, method="percentile", n_resamples=4000).confidence_interval
    assert float(found.low[0]) == pytest.approx(expected.low, abs=0.02)
    assert float(found.high[0]) == pytest.approx(expected.high, abs=0.02)
    np.testing.assert_allclose((found.high - found.low).diff("method"), 0, atol=1e-12)


def test_undefined_images_are_left_out_and_counted():
    values = xr.DataArray([1.0, np.nan, 3.0], dims="sample")
    found = bootstrap(values)
    assert (float(found["mean"]), int(found.n), int(found.undefined)) == (2.0, 2, 1)
    assert 1 <= float(found.low) <= float(found.high) <= 3
