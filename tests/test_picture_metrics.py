"""Numbers of one picture against scikit-learn on pixels, and what other words' maps say about a word's pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import roc_auc_score

from dit_probe import metrics, protocols, rows
from dit_probe.datasets.segmentation import VOID, Sample
from dit_probe.protocols import PROTOCOLS

LABELS = {"boat": 1, "sun": 2, "car": 3, "tree": 4}
WORDS = ("boat", "sun", "car", "tree", "sky", "grass")


def a_sample(target=("boat", "sun")) -> Sample:
    mask = np.zeros((20, 30), np.int16)
    mask[3:12, 8:25], mask[14:19, 2:9], mask[12:14, 8:25] = 1, 2 if "sun" in target else 0, VOID
    image = np.zeros((20, 30, 3), np.uint8)
    return Sample("a", image, mask, target, LABELS)


def some_maps(words=WORDS, levels=1000, seed=1) -> xr.DataArray:
    values = np.random.default_rng(seed).integers(levels, size=(len(words), 5, 7)) / levels
    return xr.DataArray(values, {"concept": list(words)}, ("concept", "y", "x"))


def enlarged(protocol, sample: Sample, maps: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    _, labels, counted = protocols.prepare(protocol, sample)
    way = protocols.find(protocol).map_interpolation
    return labels, counted, metrics.resize(maps, labels.sizes["y"], labels.sizes["x"], way)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_maps_of_other_words_are_scored_as_scikit_learn_scores_pixels(protocol, levels):
    sample, maps = a_sample(), some_maps(levels=levels)
    labels, counted, large = enlarged(protocol, sample, maps)

    def mean(pairs):
        at = counted.values
        scored = [roc_auc_score(labels.values[at] == LABELS[a], large.sel(concept=b).values[at]) for a, b in pairs]
        return pytest.approx(np.mean(scored))

    found = protocols.score(protocol, maps, sample)
    assert float(found.auroc) == mean([(word, word) for word in sample.target])
    assert float(found.auroc_absent) == mean([(word, other) for word in sample.target for other in ("car", "tree")])
    others = [("boat", "sun"), ("sun", "boat"), *((word, b) for word in sample.target for b in ("sky", "grass"))]
    assert float(found.auroc_other) == mean(others)
    assert float(found.right_of_two) == pytest.approx(
        float(metrics.right_of_two(large.isel(concept=[0, 1]), truth(labels), valid=counted))
    )


def truth(labels: xr.DataArray) -> xr.DataArray:
    return xr.concat([labels == 1, labels == 2], xr.Variable("concept", ["boat", "sun"]))


def test_what_does_not_read_the_word_has_the_auroc_of_any_word():
    one = some_maps(["boat"]).isel(concept=0, drop=True)
    for maps in (one, one.expand_dims(concept=list(WORDS))):  # class-agnostic, or the same for every word
        found = protocols.score("native", maps, a_sample())
        assert float(found.auroc_absent) == pytest.approx(float(found.auroc))
        assert float(found.auroc_other) == pytest.approx(float(found.auroc))
        assert float(found.right_of_two) == 0.5


def test_what_reads_the_word_shows_nothing_of_another():
    sample = a_sample()
    labels = xr.DataArray(sample.mask, dims=("y", "x"))
    maps = xr.concat([labels == LABELS.get(word, 0) for word in WORDS], xr.Variable("concept", list(WORDS)))
    found = protocols.score("native", maps.astype(float), sample)
    assert (float(found.auroc), float(found.right_of_two), float(found.auroc_absent)) == (1, 1, 0.5)
    assert float(found.auroc_other) < 0.5  # sky is where no word is


def test_columns_that_need_other_words_are_undefined_without_them():
    found = protocols.score("native", some_maps(["boat", "sun", "sky"]), a_sample())
    assert found.auroc_absent.isnull() and found.auroc_other.notnull()
    alone = protocols.score("native", some_maps(["boat", "car"]), a_sample(["boat"]))
    assert alone.auroc_absent.notnull() and alone.auroc_other.isnull() and alone.right_of_two.isnull()
    agnostic = protocols.score("native", some_maps(["boat"]).isel(concept=0, drop=True), a_sample(["boat"]))
    assert agnostic.right_of_two.isnull() and agnostic.auroc_absent == agnostic.auroc


def test_a_word_of_the_vocabulary_is_absent_and_another_is_background():
    maps = some_maps(["boat", "sun", "car", "sky"])
    known = protocols.score("native", maps, a_sample())
    unknown = protocols.score("native", maps, a_sample(), vocabulary=["boat", "sun"])
    assert known.auroc_absent.notnull() and unknown.auroc_absent.isnull()
    assert known.auroc_other != unknown.auroc_other


def test_energy_is_undefined_for_maps_with_negative_values():
    maps, sample = some_maps(), a_sample()
    large, at = metrics.resize(maps, 20, 30, "bilinear"), sample.mask != VOID
    shares = [large[c].values[sample.mask == c + 1].sum() / large[c].values[at].sum() for c in (0, 1)]
    assert float(protocols.score("native", maps, sample).energy_pointing) == pytest.approx(np.mean(shares))
    found = protocols.score("native", maps - xr.zeros_like(maps).where(maps.concept != "boat", 2), sample)
    assert float(found.energy_pointing) == pytest.approx(shares[1])
    assert protocols.score("native", maps - 2, sample).energy_pointing.isnull()


@pytest.mark.parametrize("void", ["unseen", "uncounted"])
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (41, 40)])
def test_tokens_have_the_numbers_of_their_pixels(grid, void):
    sample = a_sample()
    rule = protocols.Protocol("mine", thresholds=("mean", "otsu", 0.3), map_interpolation="nearest", void=void)
    for levels in (3, 1000):
        values = np.random.default_rng(levels).integers(levels, size=(4, *grid)) / levels - 0.2
        maps = xr.DataArray(values, {"concept": list(WORDS[:4])}, ("concept", "y", "x"))
        pixels = enlarged(rule, sample, maps)[2]
        for given, shown in ((maps, pixels), (maps - maps.min(), pixels - maps.min())):
            found, expected = (protocols.score(rule, each, sample) for each in (given, shown))
            xr.testing.assert_allclose(found, expected, rtol=1e-12)
    assert expected.energy_pointing.notnull()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_outlines_are_of_what_the_protocol_predicts(protocol):
    sample, maps, rule = a_sample(), some_maps(), replace(protocols.find(protocol), thresholds=("mean",))
    labels, counted, large = enlarged(rule, sample, maps)
    own = (maps if rule.order == "threshold, upsample" else large).sel(concept=["boat", "sun"])
    bar = (own.where(counted) if rule.void == "unseen" else own).mean(("y", "x"))
    drawn = metrics.resize(own > bar, labels.sizes["y"], labels.sizes["x"]).values
    expected = rows.boundary_f(drawn, truth(labels).values, np.stack([counted.values] * 2))
    found = protocols.score(rule, maps, sample).boundary_f.sel(threshold="mean")
    assert 0 < float(found) == pytest.approx(expected.mean())
