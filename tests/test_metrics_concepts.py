"""Metrics of several concepts: which of two, and argmax."""

import numpy as np
import pytest
import xarray as xr
from metrics_cases import DIMS, drawn, enlarged
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from dit_probe.metrics import argmax_iou, right_of_two
from dit_probe.statistics import macro


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


def test_ties_are_shared_by_argmax_and_macro_leaves_out_what_is_undefined():
    masks = xr.DataArray([[[True, False]], [[False, True]], [[False, False]]], dims=("concept", "y", "x"))
    found = argmax_iou(xr.DataArray([[[1.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]], dims=("concept", "y", "x")), masks)
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, np.nan])
    assert float(macro(found)) == pytest.approx(1 / 3)
    assert np.isnan(float(macro(found * np.nan)))


def test_right_of_two_is_balanced_accuracy():
    maps, masks = drawn(100_000)
    valid = xr.DataArray(np.random.default_rng(2).random((3, 2, 12, 16)) > 0.3, dims=("sample", *DIMS[2:]))
    found = right_of_two(maps, masks, valid=valid)
    pixels = enlarged(maps, 4)
    for s in range(3):
        at = masks.values[s].any(0) & valid.values[s]
        expected = balanced_accuracy_score(masks.values[s, 0][at], (pixels[s, 0] > pixels[s, 1])[at])
        assert float(found[s]) == pytest.approx(expected)


def test_argmax_iou_is_that_of_the_confusion_matrix():
    maps, masks = drawn(100_000)
    background = ~masks.any("concept").expand_dims("concept", 1)
    maps = xr.concat([maps, maps.isel(concept=[0], sample=[1, 2, 0]) + 1e-6], "concept")
    masks = xr.concat([masks, background], "concept")
    valid = xr.DataArray(np.random.default_rng(2).random((3, 2, 12, 16)) > 0.3, dims=("sample", *DIMS[2:]))
    found = argmax_iou(maps, masks, valid=valid)
    for s in range(3):
        at = valid.values[s]
        table = confusion_matrix(masks.values[s].argmax(0)[at], enlarged(maps, 4)[s].argmax(0)[at], labels=[0, 1, 2])
        right = table.diagonal()
        np.testing.assert_allclose(found[s], right / (table.sum(0) + table.sum(1) - right))
