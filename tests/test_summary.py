"""What a run says: sums by hand, intervals against slow resampling, comparisons, choices, tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from dit_probe.datasets.segmentation import VOID, PictureBook, Sample
from dit_probe.evaluation import EvaluationWarning, evaluate
from dit_probe.methods import centre_gaussian, constant, noise
from dit_probe.metrics import COUNTS, MetricError
from dit_probe.protocols import METRICS, EvaluationError
from dit_probe.statistics import bootstrap, compare
from dit_probe.summary import against, choose, markdown, summarise, table

TRIVIAL = {"noise": noise(1), "constant": constant(), "centre": centre_gaussian()}


class Voided(PictureBook):
    """Pictures whose upper rows nobody annotated, more of them in every picture."""

    def _read(self, position: int) -> Sample:
        sample = super()._read(position)
        sample.mask[: 6 * position] = VOID
        return sample


@pytest.fixture(scope="module")
def found() -> xr.Dataset:
    return evaluate(TRIVIAL, Voided(6), progress=False)


def results(counts: Any, intersection: Any = None, union: Any = None, **metrics: Any) -> xr.Dataset:
    """Of one method "a", as `evaluate` gives them, from (image, count) and (image, class)."""
    pixels = np.array(counts, float)
    variables: dict[str, Any] = {name: (("method", "image"), [values]) for name, values in metrics.items()}
    variables |= {"auroc": (("method", "image"), np.full((1, len(pixels)), 0.5))}
    variables["counts"] = ("method", "image", "threshold", "count"), pixels[None, :, None]
    if intersection is not None:
        variables |= {
            name: (("method", "image", "class"), np.array(values, float)[None])
            for name, values in (("intersection", intersection), ("union", union))
        }
    coords = {"method": ["a"], "threshold": ["mean"], "count": list(COUNTS)}
    return xr.Dataset(variables, {**coords, "image": [f"image {at}" for at in range(len(pixels))]})


def of(summary: xr.Dataset, metric: str, method: str = "a") -> xr.Dataset:
    return summary.sel({"method": method, "metric": metric})


def test_pooled_numbers_by_hand():
    #          true, false positive, missed, true negative
    summary = summarise(
        results(
            [[8, 2, 0, 90], [1, 0, 9, 190]],
            intersection=[[80, 10, np.nan], [100, 0, np.nan]],
            union=[[90, 20, np.nan], [100, 60, np.nan]],
        )
    )
    accuracy = (8 + 90 + 1 + 190) / 300
    expected = {
        "pixel_accuracy_pooled, mean": accuracy,
        "iou_macro_pooled, mean": (9 / (9 + 2 + 9) + 280 / (280 + 2 + 9)) / 2,
        "iou_legacy_pooled, mean": accuracy / (2 - accuracy),
        "miou_pooled": (180 / 190 + 10 / 80) / 2,
    }
    for name, value in expected.items():
        row = of(summary, name)
        assert float(row["mean"]) == pytest.approx(value), name
        assert (int(row.n), int(row.undefined)) == (2, 0)
        assert float(row.low) <= value <= float(row.high)
    assert "pixel_accuracy_void_as_error_pooled, mean" not in summary.metric


def test_images_without_numbers_are_counted_and_left_out():
    nothing, few = [np.nan] * 4, [[9, 1, 0, 90], [0, 0, 0, 0]]
    summary = summarise(results([*few, nothing], intersection=np.full((3, 2), np.nan), union=np.full((3, 2), np.nan)))
    row = of(summary, "pixel_accuracy_pooled, mean")
    assert (float(row["mean"]), int(row.n), int(row.undefined)) == (0.99, 1, 2)
    row = of(summary, "miou_pooled")
    assert np.isnan([row["mean"], row.low, row.high]).all() and (int(row.n), int(row.undefined)) == (0, 3)


def test_accuracies_over_classes_and_with_void(found):
    summary = summarise(found)
    words = np.array([len(target.split(", ")) for target in found.target.values])
    right = found.counts.sel(count=["true_positive", "true_negative"]).sum("count")
    for threshold in found.threshold.values:
        ones = right.sel(threshold=threshold)
        for method in TRIVIAL:
            name = f"pixel_accuracy_void_as_error_pooled, {threshold}"
            pixels = found.counts.sel({"threshold": threshold, "method": method}).sum("count").values
            both_channels = pixels + words * 64 * 64
            value = 2 * ones.sel({"method": method}).values.sum() / both_channels.sum()
            assert float(of(summary, name, method)["mean"]) == pytest.approx(value)
            assert value < float(of(summary, f"pixel_accuracy_pooled, {threshold}", method)["mean"])
    annotated = 6 * 64 * 64 - 6 * (0 + 1 + 2 + 3 + 4 + 5) * 64
    value = found.intersection.sel({"method": "noise"}).sum() / annotated
    assert float(of(summary, "class_accuracy_pooled", "noise")["mean"]) == pytest.approx(float(value))
    assert int(of(summary, "class_accuracy_pooled", "centre").n) == 0  # one map for all words


@pytest.mark.parametrize("clusters", [None, list("abcabcabcaba")])
def test_pooled_intervals_are_those_of_slow_resampling(clusters):
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 50, (12, 4))
    union = rng.integers(5, 50, (12, 3)) * (rng.uniform(size=(12, 3)) < 0.3)
    intersection = np.floor(union * rng.uniform(size=(12, 3)))
    summary = summarise(results(counts, intersection, union), clusters=clusters)
    groups = [np.flatnonzero(np.array(clusters or range(12)) == label) for label in sorted(set(clusters or range(12)))]
    drawn: dict[str, list[float]] = {"pixel_accuracy_pooled, mean": [], "iou_macro_pooled, mean": [], "miou_pooled": []}
    for picks in np.random.default_rng(0).integers(0, len(groups), (2000, len(groups))):
        rows = np.concatenate([groups[pick] for pick in picks])
        true, false, missed, rest = counts[rows].sum(0)
        drawn["pixel_accuracy_pooled, mean"].append((true + rest) / counts[rows].sum())
        drawn["iou_macro_pooled, mean"].append((true / (true + false + missed) + rest / (rest + false + missed)) / 2)
        whole = union[rows].sum(0)
        drawn["miou_pooled"].append((intersection[rows].sum(0)[whole > 0] / whole[whole > 0]).mean())
    for name, values in drawn.items():
        row = of(summary, name)
        np.testing.assert_allclose([row.low, row.high], np.quantile(values, [0.025, 0.975]), err_msg=name)


def test_means_and_their_intervals_are_those_of_bootstrap(found):
    summary = summarise(found)
    assert summary["mean"].dims == ("method", "metric")
    assert set(METRICS) == {name.split(",")[0] for name in summary.metric.values if "_pooled" not in name} | {
        "iou_pooled_legacy"
    }
    expected = bootstrap(found.iou_macro.sel(threshold="otsu"), "image")
    for name in ("mean", "low", "high", "n", "undefined"):
        np.testing.assert_array_equal(summary[name].sel(metric="iou_macro, otsu"), expected[name])


def test_clusters_by_a_coordinate_or_by_labels(found):
    by_name, by_label = summarise(found, clusters="target"), summarise(found, clusters=found.target.values.astype(str))
    xr.testing.assert_identical(by_name, by_label)
    halves = summarise(found, clusters=[0, 0, 0, 1, 1, 1])
    mean = found.auroc.sel({"method": "noise"}).values.reshape(2, 3).mean(1)
    assert float(of(halves, "auroc", "noise").low) == pytest.approx(mean.min())
    with pytest.raises(
        EvaluationError, match="clusters='class'; along 'image' there are the coordinates target, image"
    ):
        summarise(found, clusters="class")
    with pytest.raises(MetricError, match="give one label each"):
        summarise(found, clusters=[0, 1])


def test_a_store_is_summed_up_as_its_result(tmp_path):
    result = evaluate(TRIVIAL, PictureBook(3), store=tmp_path / "run.zarr", progress=False)
    stored = xr.open_zarr(tmp_path / "run.zarr")
    summaries = [summarise(one, clusters="target") for one in (stored, result)]
    assert table(summaries[0], "csv") == table(summaries[1], "csv")
    assert table(against(stored, "noise")) == table(against(result, "noise")) and choose(stored) == choose(result)


def test_a_selection_is_summed_up(found):
    one = summarise(found[["iou_macro"]].sel(threshold="otsu"))
    assert one.metric.values.tolist() == ["iou_macro"]
    with pytest.raises(EvaluationError, match="found speed, no metric"):
        summarise(xr.Dataset({"speed": ("image", [1.0])}))


def test_against_is_compare_with_holm(found):
    differences = against(found, "constant", "iou_macro", "otsu", clusters=[0, 0, 1, 1, 2, 2])
    expected = compare(
        found.iou_macro.sel(threshold="otsu", drop=True),
        over="image",
        reference="constant",
        clusters=[0, 0, 1, 1, 2, 2],
    )
    xr.testing.assert_identical(differences.drop_attrs(), expected.drop_attrs())
    assert differences.attrs == {"metric": "iou_macro, otsu", "reference": "constant"}


def test_text_of_a_comparison():
    values = [[0.5, 0.6, 0.7, 0.4], [0.6, 0.8, 0.8, 0.7], [np.nan] * 4, [0.5, 0.6, 0.7, np.nan]]
    data = xr.Dataset(
        {"auroc": (("method", "image"), values)},
        {"method": ["reference", "better", "failed", "same"], "image": list("abcd")},
    )
    compared = against(data, "reference")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(compared).splitlines()]
    assert lines[0] == ["method", "auroc, minus that of reference", "p (Holm)", "effect size"]
    assert lines[2] == ["better", "+0.175 [+0.100, +0.250]", "0.250", "+1.83"]
    assert lines[3] == ["failed", "undefined", "undefined", "undefined"]
    assert lines[4] == ["same", "+0.000 [+0.000, +0.000] (1 undefined)", "1.000", "undefined"]
    rows = table(compared, "csv").splitlines()
    assert rows[0] == "method,difference,low,high,p,p_holm,effect_size,n,left_out" and len(rows) == 4
    assert rows[1].startswith("better,0.17") and rows[1].endswith(",4,0")


def chosen_from(*rows: list[float], names: str = "abc") -> xr.Dataset:
    data = {"auroc": (("method", "image"), list(rows)), "auroc_absent": (("method", "image"), list(rows))}
    thresholds = {"iou_macro": (("method", "image", "threshold"), np.array(rows)[..., None] * [1, -1])}
    coords = {"method": list(names[: len(rows)]), "threshold": ["mean", "0.5"]}
    return xr.Dataset({**data, **thresholds}, coords)


def test_the_best_mean_is_chosen():
    data = chosen_from([0.5, 0.7], [0.6, 0.9], [0.1, 0.2])
    assert choose(data) == "b"
    assert choose(data, "iou_macro", "mean") == "b"
    assert choose(data, "iou_macro", 0.5) == "c"  # type: ignore[arg-type]
    # On the image that both have a number for, the one that failed on the difficult image is worse.
    assert choose(chosen_from([0.8, 0.1], [0.7, np.nan], [np.nan, np.nan])) == "a"


def test_ties_are_stated():
    data = chosen_from([0.2, 0.6], [0.3, 0.5], [0.1, 0.2])
    with pytest.warns(EvaluationWarning, match="auroc: 'a', 'b' tie at 0.4; chosen 'a'"):
        assert choose(data) == "a"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ap",), "no metric 'ap'; there are auroc, auroc_absent, iou_macro"),
        (("auroc", "mean"), "auroc has none; leave it out"),
        (("iou_macro",), "threshold=None of iou_macro: give one of mean, 0.5"),
        (("iou_macro", "otsu"), "threshold='otsu' of iou_macro: give one of mean, 0.5"),
        (("auroc_absent",), "higher is not better"),
    ],
)
def test_what_cannot_be_chosen_by(arguments, said):
    with pytest.raises(EvaluationError, match=said):
        choose(chosen_from([0.2, 0.6]), *arguments)


@pytest.mark.parametrize("rows", [([np.nan, np.nan],), ([0.1, np.nan], [np.nan, 0.1])])
def test_nothing_is_chosen_without_an_image_that_all_have(rows):
    with pytest.raises(EvaluationError, match="auroc: no image has a number of every method"):
        choose(chosen_from(*rows))


def test_tables(found):
    summary = summarise(found)
    lines = table(summary.sel(metric=["auroc", "miou"])).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(TRIVIAL)
    assert "undefined" in lines[3]
    rows = table(summary, "csv").splitlines()
    assert rows[0] == "method,metric,mean,low,high,n,undefined" and len(rows) == 1 + summary["mean"].size
    with pytest.raises(EvaluationError, match="choose markdown or csv"):
        table(summary, "html")  # type: ignore[arg-type]
    assert markdown([["a", "b"], ["|x|", ""]]).splitlines() == [r"| a     | b |", "|-------|---|", r"| \|x\| |   |"]
