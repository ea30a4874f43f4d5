"""Metrics against scikit-learn on pixels, and where they are undefined."""

import numpy as np
import pytest
import xarray as xr
from metrics_cases import DIMS, drawn, enlarged, scaled
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    jaccard_score,
    precision_recall_curve,
    roc_auc_score,
)

from dit_probe.metrics import METRICS, MetricError, argmax_iou, auroc, average_precision, right_of_two, score

ORACLES = [(auroc, roc_auc_score), (average_precision, average_precision_score)]


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


def named(of_maps, of_masks):
    return lambda maps, masks: (maps.assign_coords(concept=of_maps), masks.assign_coords(concept=of_masks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps, masks: (maps, masks.astype(float)), "masks are float64: give booleans"),
        (lambda maps, masks: (maps, masks.isel(y=slice(5))), "masks of 5 x 16 pixels over maps of 3 x 4 tokens"),
        (lambda maps, masks: (maps.rename(y="row"), masks), "maps have the dims .*without y"),
        (lambda maps, masks: (maps.where(maps > maps.min()), masks), r"auroc: a map holds NaN .* first sample=\d, "),
        (lambda maps, masks: (maps / 0.0 + np.inf, masks), "a map holds NaN or infinity"),
        (lambda maps, masks: (maps.values, masks), "maps are ndarray, not an xarray.DataArray"),
        (lambda maps, masks: (maps.astype(str), masks), "maps are <U.*give numbers"),
        (lambda maps, masks: (maps.isel(sample=slice(2)), masks), "conflicting dimension sizes.*same labels"),
        (lambda maps, masks: (maps.isel(frame=[0, 0, 1]), masks), "frame.*conflicting"),
        (lambda maps, masks: (maps.isel(sample=[]), masks), "without|conflicting"),
        (named(["sun", "sea"], ["sea", "sun"]), "'concept'.*masks.sel"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    with pytest.raises(MetricError, match=message):
        auroc(*change(*drawn(9)))


def max_f1(truth, values):
    precision, recall, _ = precision_recall_curve(truth, values)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()


def legacy_ap(truth, values):
    both = scaled(values)
    return average_precision_score(np.concatenate([~truth, truth]), np.concatenate([1 - both, both]))


def pointing(truth, values):
    return truth[values == values.max()].mean()


def predicted(values):
    return scaled(values) > scaled(values).mean() + 1e-12  # a value that is the mean is not above it


PIXEL_ORACLES = {
    "auroc": roc_auc_score,
    "ap": average_precision_score,
    "max_f1": max_f1,
    "pointing": pointing,
    "energy_pointing": lambda truth, values: values[truth].sum() / values.sum(),
    "pixel_accuracy": lambda truth, values: accuracy_score(truth, predicted(values)),
    "iou_foreground": lambda truth, values: jaccard_score(truth, predicted(values)),
    "iou_macro": lambda truth, values: jaccard_score(truth, predicted(values), average="macro"),
    "ap_legacy": legacy_ap,
    "iou_pooled_legacy": lambda truth, values: jaccard_score(
        np.concatenate([~truth, truth]), np.concatenate([~predicted(values), predicted(values)])
    ),
}


@pytest.mark.parametrize("voids", [False, True])
@pytest.mark.parametrize("levels", [2, 5, 10_000])
@pytest.mark.parametrize("metric", PIXEL_ORACLES)
def test_metrics_of_tokens_are_those_of_pixels(metric, levels, voids):
    maps, masks = drawn(levels)
    maps = maps + 1
    valid = xr.DataArray(np.random.default_rng(2).random((3, 2, 12, 16)) > 0.3, dims=("sample", *DIMS[2:]))
    valid = valid if voids else xr.ones_like(valid)
    found = score(maps, masks, valid=valid, metrics=metric)[metric]
    pixels = enlarged(maps, 4)
    for s, c in np.ndindex(3, 2):
        kept = valid.values[s]
        expected = PIXEL_ORACLES[metric](masks.values[s, c][kept], pixels[s, c][kept])
        assert float(found[s, c]) == pytest.approx(expected, abs=1e-12)


def test_maps_without_leading_dims_and_maps_in_blocks_give_the_same(monkeypatch):
    maps, masks = drawn(9)
    every = [name for name in METRICS if name != "energy_pointing"]
    whole = score(maps, masks, metrics=every)
    monkeypatch.setattr("dit_probe.metrics._NUMBERS", 100)
    xr.testing.assert_identical(score(maps, masks, metrics=every), whole)
    xr.testing.assert_identical(score(maps.chunk(sample=1), masks, metrics=every), whole)
    one = score(maps[1, 0], masks[1, 0], metrics=every)
    xr.testing.assert_allclose(one, whole.isel(sample=1, concept=0))
    assert one.auroc.shape == ()


def test_coordinates_of_the_leading_dims_are_kept():
    maps, masks = drawn(9)
    names = ("sample", "concept"), [["sun", "sea"], ["cat", "dog"], ["a", "b"]]
    maps = maps.assign_coords(sample=[4, 5, 6], concept_name=names, y=[0, 1, 2]).expand_dims(layer=[3, 8])
    found = score(maps, masks.assign_coords(sample=[4, 5, 6], y=np.arange(12) * 2), metrics="ap")
    assert found.ap.sel(layer=8, sample=5).concept_name.values.tolist() == ["cat", "dog"]
    assert set(found.dims) == {"layer", "sample", "concept"}
    other = masks.assign_coords(sample=[4, 5, 6], concept_name=(names[0], np.array(names[1])[:, ::-1]))
    with pytest.raises(MetricError, match="concept_name of maps and masks differs"):
        score(maps, other)


UNDEFINED = {
    "no object": {*METRICS} - {"pixel_accuracy", "ap_legacy", "iou_pooled_legacy", "pixel_accuracy_void_as_error"},
    "nothing but object": {"auroc", "iou_macro", "boundary_f"},
    "all void": {*METRICS},
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_every_metric_is_nan_exactly_where_it_is_undefined(case):
    maps, masks = drawn(9)
    maps = maps + 1
    valid = xr.ones_like(masks)
    valid[0] = case != "all void"
    if case != "all void":
        masks[0] = case == "nothing but object"
    for name in METRICS:
        found = score(maps, masks, valid=valid, metrics=name)[name]
        assert found[0].isnull().all() == (name in UNDEFINED[case]), name
        assert not found[1:].isnull().any()
    assert argmax_iou(maps, masks, valid=valid)[0].isnull().all() == (case == "all void")
    assert bool(right_of_two(maps, masks, valid=valid)[0].isnull()) == (case != "nothing but object")


def test_negative_energy_is_refused():
    maps, masks = drawn(9)
    with pytest.raises(MetricError, match=r"energy_pointing of maps down to -1: use maps >= 0"):
        score(maps, masks, metrics=("auroc", "energy_pointing"))


def test_wrong_names_and_sizes_of_void_are_refused():
    maps, masks = drawn(9)
    with pytest.raises(MetricError, match="no metric 'iou'; there are auroc, ap"):
        score(maps, masks, metrics=("auroc", "iou"))
    with pytest.raises(MetricError, match=r"valid of \(3, 4\)"):
        score(maps, masks, valid=maps[0, 0] > 0)
    with pytest.raises(MetricError, match="without concept"):
        right_of_two(maps[:, 0], masks)
