"""Intervals and tests against SciPy, and adjusted p-values against the formula written out."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from dit_probe.metrics import COUNTS, MetricError
from dit_probe.statistics import bootstrap, compare, holm, iou_pooled_legacy

MEDIAN: Any = "median"


def measured(images: int = 60, seed: int = 0) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    methods = np.array([[0.0], [0.02], [0.3], [-0.1]])
    values = 0.5 + rng.normal(scale=0.2, size=images) + methods + rng.normal(scale=0.1, size=(4, images))
    names = ["reference", "same", "better", "worse"]
    return xr.DataArray(values, dims=("method", "sample"), coords={"method": names})


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_intervals_are_those_of_scipy(level):
    values = measured()
    found = bootstrap(values, level=level, resamples=500, seed=3)
    for row in range(4):
        expected = scipy.stats.bootstrap(
            (values.values[row],), np.mean, method="percentile", n_resamples=500, confidence_level=level,
            rng=np.random.default_rng(3),
        ).confidence_interval  # fmt: skip
        assert float(found.low[row]) == pytest.approx(expected.low, abs=1e-12)
        assert float(found.high[row]) == pytest.approx(expected.high, abs=1e-12)


def test_blocks_of_draws_change_nothing(monkeypatch):
    values = measured()
    whole = bootstrap(values, resamples=50), compare(values, reference="same", permutations=50, resamples=50)
    monkeypatch.setattr("dit_probe.statistics._NUMBERS", 400)
    for one, other in zip(
        whole, (bootstrap(values, resamples=50), compare(values, reference="same", permutations=50, resamples=50)),
        strict=True,
    ):  # fmt: skip
        xr.testing.assert_allclose(one, other)


def test_rows_stay_paired():
    values = measured()
    values[1] = values[0] + 1
    found = bootstrap(values)
    for name in ("low", "high", "mean"):
        assert float(found[name][1] - found[name][0]) == pytest.approx(1)


def test_undefined_images_are_left_out_and_counted():
    values = xr.DataArray([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]], dims=("metric", "sample"))
    found = bootstrap(values)
    assert (float(found["mean"][0]), found.n.values.tolist(), found.undefined.values.tolist()) == (2, [2, 0], [1, 3])
    assert 1 <= float(found.low[0]) <= float(found.high[0]) <= 3
    assert found.isel(metric=1)[["mean", "low", "high"]].to_array().isnull().all()


def test_plain_numbers_and_other_dims():
    numbers = [0.1, 0.4, 0.3]
    expected = bootstrap(xr.DataArray(numbers, dims="image"), "image")
    xr.testing.assert_identical(bootstrap(numbers, "image"), expected)
    assert bootstrap(measured().transpose("sample", "method"))["mean"].dims == ("method",)


def test_clusters_are_drawn_whole():
    # Ten clusters of six equal images know as little as ten images.
    few = np.random.default_rng(1).normal(size=10)
    labels = np.repeat(list("abcdefghij"), 6)
    found = bootstrap(np.repeat(few, 6), clusters=labels, resamples=300)
    expected = bootstrap(few, resamples=300)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    order = np.random.default_rng(2).permutation(60)
    shuffled = bootstrap(np.repeat(few, 6)[order], clusters=labels[order], resamples=300)
    np.testing.assert_allclose([shuffled.low, shuffled.high], [expected.low, expected.high])
    naive = bootstrap(np.repeat(few, 6), resamples=300)
    assert float(naive.high - naive.low) < 0.6 * float(found.high - found.low)


def test_a_ratio_of_sums_is_drawn_from_the_table_of_counts():
    table = xr.DataArray(
        np.random.default_rng(5).integers(1, 50, (2, 30, 4)), dims=("layer", "sample", "count"),
        coords={"count": list(COUNTS)},
    )  # fmt: skip
    found = bootstrap(table, statistic=iou_pooled_legacy, resamples=200)
    draws = np.random.default_rng(0).integers(0, 30, (200, 30))
    expected = xr.concat([iou_pooled_legacy(table[:, row]) for row in draws], "draw").quantile([0.025, 0.975], "draw")
    np.testing.assert_allclose(found.value, iou_pooled_legacy(table))
    np.testing.assert_allclose([found.low, found.high], expected)
    assert found.n.values.tolist() == [30, 30]


def test_a_function_that_means_gives_the_mean():
    values = measured(20)
    one, other = bootstrap(values, resamples=50), bootstrap(values, resamples=50, statistic=lambda v: v.mean("sample"))
    xr.testing.assert_allclose(one.rename(mean="value"), other)


def test_intervals_cover_what_they_say():
    rng = np.random.default_rng(6)
    found = bootstrap(xr.DataArray(rng.normal(size=(400, 50)), dims=("run", "sample")), resamples=400)
    # Each run draws the same images, but its own numbers: 400 independent trials of 95 %, two points lost to n = 50.
    assert 0.90 < float(((found.low < 0) & (found.high > 0)).mean()) < 0.98


def test_exact_sign_flips_are_those_of_scipy():
    values = measured(11)
    found = compare(values, reference="reference")
    for name in ("same", "better", "worse"):
        d = (values.sel({"method": name}) - values.sel({"method": "reference"})).values
        expected = scipy.stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=2**11)
        assert float(found.p.sel({"method": name})) == pytest.approx(expected.pvalue)


def test_random_sign_flips_come_close_to_all_of_them_and_are_never_zero():
    values = measured(12)
    every = compare(values, reference="reference", permutations=4096)
    some = compare(values, reference="reference", permutations=4095)
    np.testing.assert_allclose(some.p, every.p, atol=0.03)
    assert float(compare(measured(), reference="reference", permutations=99).p.min()) == pytest.approx(0.01)


def test_equal_methods_do_not_differ():
    values = measured(8)
    values[1] = values[0]
    found = compare(values, reference="reference").sel({"method": "same"})
    assert (float(found.p), float(found.difference), float(found.high)) == (1, 0, 0)
    assert np.isnan(found.effect_size)


def test_p_values_of_no_effect_are_uniform():
    d = np.random.default_rng(7).normal(size=(300, 10))
    values = xr.DataArray(np.stack([d, 0 * d]), dims=("method", "run", "sample"), coords={"method": ["a", "b"]})
    p = compare(values, reference="b", resamples=10, permutations=1024).p
    assert 0.02 < float((p <= 0.05).mean()) < 0.09
    assert 0.43 < float((p <= 0.5).mean()) < 0.57


def test_differences_are_paired_and_undefined_images_left_out():
    values = measured(40).expand_dims(metric=["auroc", "ap"]).copy()
    values[0, 0, 3] = values[0, 2, 5] = np.nan
    values[1, 3] = np.nan
    found = compare(values, reference="reference")
    assert found.p.dims == ("metric", "method") and "reference" not in found["method"].values
    assert found.left_out.values.tolist() == [[1, 2, 1], [0, 0, 40]]
    assert found.n.values.tolist() == [[39, 38, 39], [40, 40, 0]]
    d = (values[0, 2] - values[0, 0]).dropna("sample").values
    better = found.sel({"method": "better", "metric": "auroc"})
    assert float(better.difference) == pytest.approx(d.mean())
    assert float(better.effect_size) == pytest.approx(d.mean() / d.std(ddof=1))
    assert float(better.low) < d.mean() < float(better.high)
    gone = found.sel({"method": "worse", "metric": "ap"})
    assert gone[["difference", "low", "high", "p", "p_holm", "effect_size"]].to_array().isnull().all()
    # Two tests are left in that row, and are adjusted for two.
    np.testing.assert_allclose(found.p_holm[1, :2], holm(found.p[1, :2]))


def test_signs_of_a_cluster_flip_together():
    d = np.random.default_rng(8).normal(0.3, size=9)
    few = xr.DataArray(np.stack([d, 0 * d]), dims=("method", "sample"), coords={"method": ["a", "b"]})
    many = few.isel(sample=np.repeat(np.arange(9), 5))
    found = compare(many, reference="b", clusters=np.repeat(np.arange(9), 5))
    assert float(found.p[0]) == float(compare(few, reference="b").p[0])


def test_holm_is_its_formula():
    p = np.random.default_rng(9).random(7) ** 2
    order = np.argsort(p)
    expected, highest = np.empty(7), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (7 - place) * p[index]))
        expected[index] = highest
    np.testing.assert_allclose(holm(p), expected)
    np.testing.assert_allclose(holm([0.03, np.nan, 0.01]), [0.03, np.nan, 0.02])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: bootstrap(v, "image"), "no images: values have the dims .*'image'"),
        (lambda v: bootstrap(v.isel(sample=[])), "no images"),
        (lambda v: bootstrap(v.values), "no named dims"),
        (lambda v: bootstrap(v, level=95), r"between 0 and 1 \(0.95, not 95\)"),
        (lambda v: bootstrap(v, resamples=0), "resamples=0"),
        (lambda v: bootstrap(v, clusters=["a"]), "clusters of shape .* for 60"),
        (lambda v: bootstrap(v, statistic=MEDIAN), "'median' is neither 'mean' nor a function"),
        (lambda v: compare(v, reference="best"), "reference='best' of method .*'better'"),
        (lambda v: compare(v[:1], reference="reference"), "at least two"),
        (lambda v: compare(v.drop_vars("method"), reference=0), "assign_coords"),
    ],
)
def test_what_cannot_be_summed_up_is_refused(call, message):
    with pytest.raises(MetricError, match=message):
        call(measured())
