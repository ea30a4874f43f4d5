"""Metrics against scikit-learn on pixels, and where they are undefined."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    jaccard_score,
    precision_recall_curve,
    roc_auc_score,
)

from dit_probe.metrics import (
    COUNTS,
    METRICS,
    MetricError,
    argmax_iou,
    auroc,
    average_precision,
    counts,
    resize,
    right_of_two,
    score,
)
from dit_probe.statistics import iou_pooled_legacy, macro

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


def scaled(values):
    return (values - values.min()) / np.ptp(values)


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


def test_legacy_ap_is_not_of_ranks_alone():
    spike = np.random.default_rng(0).random((1, 1000))
    spike[0, 0] = 100
    masks = xr.DataArray(np.random.default_rng(1).random((1, 1000)) < 0.1, dims=("y", "x"))
    found = [score(xr.DataArray(v, dims=("y", "x")), masks, metrics=METRICS) for v in (spike, np.minimum(spike, 1))]
    assert float(found[0].ap) == pytest.approx(float(found[1].ap))
    assert float(found[0].ap_legacy) > 0.8 > 0.6 > float(found[1].ap_legacy)


def naive_boundary_f(truth, guess, reach):
    def rim(area):
        inner = np.pad(area, 1, mode="edge")
        height, width = area.shape
        around = [inner[1 + a : 1 + a + height, 1 + b : 1 + b + width] for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return np.argwhere(area & ~np.all(around, axis=0))

    def near(these, those):
        if not len(those):
            return 0.0
        return np.mean([np.hypot(*(those - place).T).min() <= reach for place in these])

    true, drawn_rim = rim(truth), rim(guess)
    precision, recall = near(drawn_rim, true) if len(drawn_rim) else 1, near(true, drawn_rim)
    return 2 * precision * recall / (precision + recall) if recall else 0.0


@pytest.mark.parametrize("scale", [4, 80])
def test_boundary_f_against_distances_between_rims(scale):
    rng = np.random.default_rng(3)
    maps = xr.DataArray(rng.random((2, 3, 4)), dims=("concept", "y", "x"))
    y, x = np.mgrid[: 3 * scale, : 4 * scale]
    masks = xr.DataArray(
        np.stack([np.hypot(y - scale, x - 2 * scale) < r * scale for r in (0.8, 1.4)]), dims=("concept", "y", "x")
    )
    found = score(maps, masks, metrics="boundary_f").boundary_f
    reach = max(1, 0.0075 * 5 * scale)
    for c in range(2):
        guess = enlarged(maps > maps.mean(("y", "x")), scale)[c]
        assert float(found[c]) == pytest.approx(naive_boundary_f(masks.values[c], guess, reach))
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


def test_ties_are_shared_by_argmax_and_macro_leaves_out_what_is_undefined():
    masks = xr.DataArray([[[True, False]], [[False, True]], [[False, False]]], dims=("concept", "y", "x"))
    found = argmax_iou(xr.DataArray([[[1.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]], dims=("concept", "y", "x")), masks)
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, np.nan])
    assert float(macro(found)) == pytest.approx(1 / 3)
    assert np.isnan(float(macro(found * np.nan)))


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
