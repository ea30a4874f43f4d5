"""Metrics that are wrong: what was printed follows from them."""

import numpy as np
import pytest
import xarray as xr
from metrics_cases import drawn, enlarged

from dit_probe.metrics import COUNTS, METRICS, counts, score
from dit_probe.statistics import iou_pooled_legacy


def test_legacy_accuracy_counts_a_void_pixel_as_half_an_error():
    truth = np.zeros((10, 100), dtype=int)
    truth[:5] = 1
    truth[5, :35] = -1
    masks, valid = xr.DataArray(truth == 1, dims=("y", "x")), xr.DataArray(truth >= 0, dims=("y", "x"))
    found = score(masks.astype(float), masks, valid=valid, metrics=("pixel_accuracy", "pixel_accuracy_void_as_error"))
    assert float(found.pixel_accuracy) == 1
    assert round(float(found.pixel_accuracy_void_as_error), 3) == 0.982
    # the runner's arithmetic: channels (1 - t, t) against (1 - p, p), of which negative labels are dropped
    labels, drawn_mask = np.stack([1 - truth, truth]), np.stack([1 - masks.values, masks.values])
    counted = labels >= 0
    assert float(found.pixel_accuracy_void_as_error) == (labels == drawn_mask)[counted].sum() / counted.sum()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_legacy_accuracy_is_a_function_of_accuracy_and_void(share):
    maps, masks = drawn(50)
    valid = xr.DataArray(np.random.default_rng(5).random(masks.shape) >= share, dims=masks.dims)
    found = score(maps, masks, valid=valid, metrics=("pixel_accuracy", "pixel_accuracy_void_as_error"))
    void = 1 - valid.mean(("frame", "y", "x"))
    expected = found.pixel_accuracy * (1 - void) / (1 - void / 2)  # 2 Acc valid / (2 valid + void)
    np.testing.assert_allclose(found.pixel_accuracy_void_as_error, expected)


def test_legacy_iou_pools_object_and_background():
    maps, masks = drawn(50)
    table = counts(maps, masks)
    cut = maps > maps.mean(("frame", "y", "x"))
    prediction, truth = enlarged(cut, 4), masks.values
    intersection = (prediction & truth).sum((0, 2, 3, 4)) + (~prediction & ~truth).sum((0, 2, 3, 4))
    union = (prediction | truth).sum((0, 2, 3, 4)) + (~prediction | ~truth).sum((0, 2, 3, 4))
    np.testing.assert_allclose(iou_pooled_legacy(table), intersection / union)
    accuracy = (prediction == truth).mean((0, 2, 3, 4))
    np.testing.assert_allclose(iou_pooled_legacy(table), accuracy / (2 - accuracy))
    alone = score(maps, masks, metrics=("iou_pooled_legacy", "iou_macro"))
    np.testing.assert_allclose(iou_pooled_legacy(table, over=()), alone.iou_pooled_legacy)
    assert (alone.iou_pooled_legacy >= alone.iou_macro - 1e-12).all()
    assert table["count"].values.tolist() == list(COUNTS)


@pytest.mark.parametrize(("accuracy", "printed"), [(83.07, 71.04), (74.92, 59.90), (76.51, 61.96), (52.63, 35.72)])
def test_legacy_iou_is_what_is_printed_beside_accuracy(accuracy, printed):
    table = xr.DataArray([[accuracy, 100 - accuracy, 0, 0]], dims=("sample", "count"), coords={"count": list(COUNTS)})
    assert 100 * float(iou_pooled_legacy(table)) == pytest.approx(printed, abs=0.02)
    masks = xr.DataArray(np.arange(10_000).reshape(100, 100) < 4000, dims=("y", "x"))
    wrong = np.random.default_rng(0).permutation(10_000).reshape(100, 100) >= round(100 * accuracy)
    alone = score((masks ^ wrong).astype(float), masks, metrics=("pixel_accuracy", "iou_pooled_legacy", "iou_macro"))
    assert 100 * float(alone.pixel_accuracy) == pytest.approx(accuracy)
    assert 100 * float(alone.iou_pooled_legacy) == pytest.approx(printed, abs=0.02)
    assert alone.iou_macro < alone.iou_pooled_legacy


def test_legacy_ap_is_not_of_ranks_alone():
    spike = np.random.default_rng(0).random((1, 1000))
    spike[0, 0] = 100
    masks = xr.DataArray(np.random.default_rng(1).random((1, 1000)) < 0.1, dims=("y", "x"))
    found = [score(xr.DataArray(v, dims=("y", "x")), masks, metrics=METRICS) for v in (spike, np.minimum(spike, 1))]
    assert float(found[0].ap) == pytest.approx(float(found[1].ap))
    assert float(found[0].ap_legacy) > 0.8 > 0.6 > float(found[1].ap_legacy)
