"""Evaluation: protocols by hand, runs that stop and go on, methods that fail, maps that look at nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import dit_probe as dp
from dit_probe import metrics, protocols
from dit_probe.datasets.segmentation import VOID, PictureBook, PictureBookClips, Sample
from dit_probe.evaluation import EvaluationWarning, evaluate, summarise, table
from dit_probe.methods import centre_gaussian, concept_attention, constant, image_saliency, noise, random_twin
from dit_probe.protocols import PROTOCOLS, EvaluationError, Protocol
from dit_probe.testing import tiny_pipeline


def a_sample(*, void: bool = True, size: tuple[int, int] = (20, 30)) -> Sample:
    random = np.random.default_rng(5)
    mask = np.zeros(size, np.int16)
    mask[3:12, 8:25] = 1
    if void:
        mask[12:14, 8:25] = VOID
    image = random.integers(0, 256, (*size, 3)).astype(np.uint8)
    return Sample("a", image, mask, ("boat",), {"boat": 1, "sun": 2})


def some_maps(words=("boat", "water"), grid=(5, 7)) -> xr.DataArray:
    values = np.random.default_rng(1).normal(size=(len(words), *grid))
    return xr.DataArray(values, {"concept": list(words)}, ("concept", "y", "x"))


def by_hand(predicted: np.ndarray, truth: np.ndarray, counted: np.ndarray) -> list[int]:
    pairs = ((predicted, truth), (predicted, ~truth), (~predicted, truth), (~predicted, ~truth))
    return [int((a & b & counted).sum()) for a, b in pairs]


def nearest(array: np.ndarray, height: int, width: int) -> np.ndarray:
    at = [((2 * np.arange(n) + 1) * old) // (2 * n) for n, old in zip((height, width), array.shape, strict=True)]
    return array[np.ix_(*at)]


def bilinear(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Through torch, which the paper's and Chefer's code use."""
    import torch

    tensor = torch.from_numpy(array)[None, None]
    return torch.nn.functional.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize(
    ("protocol", "picture", "mask"),
    [("chefer", (224, 224, 3), (224, 224)), ("paper", (512, 512, 3), (224, 224)), ("native", (20, 30, 3), (20, 30))],
)
def test_what_a_method_sees_and_what_is_scored(protocol, picture, mask):
    from PIL import Image

    sample = a_sample()
    image, labels, valid = protocols.prepare(protocol, sample)
    assert (image.shape, labels.shape, image.dtype, labels.dtype) == (picture, mask, np.uint8, np.int16)
    np.testing.assert_array_equal(labels, nearest(sample.mask, *mask))
    np.testing.assert_array_equal(valid, labels != VOID)
    way = {"chefer": Image.Resampling.BILINEAR, "paper": Image.Resampling.BICUBIC, "native": Image.Resampling.NEAREST}
    expected = Image.fromarray(sample.image).resize(picture[1::-1], way[protocol])
    np.testing.assert_array_equal(image, np.asarray(expected))


def test_chefer_enlarges_before_it_thresholds():
    sample, maps = a_sample(), some_maps()
    large = scaled(bilinear(maps.values[0], 224, 224))
    labels = nearest(sample.mask, 224, 224)
    expected = by_hand(large > large.mean(), labels == 1, labels != VOID)
    assert protocols.score("chefer", maps, sample).counts.values.tolist() == [expected]


def test_paper_thresholds_before_it_enlarges():
    sample, maps = a_sample(), some_maps()
    small = scaled(maps.values[0])
    labels = nearest(sample.mask, 224, 224)
    expected = by_hand(nearest(small > small.mean(), 224, 224), labels == 1, labels != VOID)
    found = protocols.score("paper", maps, sample)
    assert found.counts.values.tolist() == [expected]
    assert expected != protocols.score("chefer", maps, sample).counts.values[0].tolist()
    assert float(found.auroc) == pytest.approx(
        metrics.auroc(
            xr.DataArray(nearest(maps.values[0], 224, 224)[labels != VOID][None], dims=("y", "x")),
            xr.DataArray((labels == 1)[labels != VOID][None], dims=("y", "x")),
        ).item()
    )


def test_native_scores_on_the_mask_and_does_not_see_void():
    sample, maps = a_sample(), some_maps()
    large, counted = bilinear(maps.values[0], 20, 30), sample.mask != VOID
    seen = large[counted]
    unit = (large - seen.min()) / (seen.max() - seen.min())
    found = protocols.score("native", maps, sample)
    assert found.threshold.values.tolist() == ["mean", "otsu", "0.5"]
    for threshold, bar in (("mean", unit[counted].mean()), ("0.5", 0.5)):
        expected = by_hand(unit > bar, sample.mask == 1, counted)
        assert found.counts.sel(threshold=threshold).values.tolist() == expected


def test_thresholded_metrics_are_those_of_metrics():
    sample, maps = a_sample(), some_maps()
    enlarged = metrics.resize(maps.sel(concept="boat"), 20, 30, "bilinear")
    truth, counted = (xr.DataArray(a, dims=("y", "x")) for a in (sample.mask == 1, sample.mask != VOID))
    found = protocols.score("native", maps, sample)
    for threshold in ("mean", "otsu", 0.5):
        names = (*protocols.RANKING, *protocols.THRESHOLDED)
        expected = metrics.score(enlarged, truth, valid=counted, metrics=names, threshold=threshold)
        for name in names:
            value = found[name].sel(threshold=str(threshold)) if name in protocols.THRESHOLDED else found[name]
            assert float(value) == pytest.approx(float(expected[name])), (name, threshold)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_constant_map_predicts_nothing(protocol):
    found = protocols.score(protocol, some_maps() * 0 + 0.3, a_sample())
    assert found.counts.sel(count=["true_positive", "false_positive"]).values.sum() == 0
    assert float(found.auroc) == 0.5


def test_numbers_by_class_are_those_of_argmax():
    sample = PictureBook(1, objects=["sun", "boat"])[0]
    maps = some_maps(("sun", "boat", "sky", "grass"), (64, 64))
    found = protocols.score("native", maps, sample)
    labels = np.array([sample.labels["sun"], sample.labels["boat"], 0, 0])[maps.values.argmax(0)]
    for word in ("sun", "boat", "background"):
        a, b = labels == sample.labels.get(word, 0), sample.mask == sample.labels.get(word, 0)
        row = found.sel({"class": word})
        assert (float(row.intersection), float(row.union)) == ((a & b).sum(), (a | b).sum())
    assert float(found.union.sel({"class": "house"} if "house" in found["class"] else {"class": "tree"})) == 0
    assert float(found.miou) == pytest.approx(float((found.intersection / found.union.where(found.union > 0)).mean()))


def test_void_pixels_are_in_no_class():
    found = protocols.score("native", some_maps(), a_sample())
    assert found["class"].values.tolist() == ["background", "boat", "sun"]
    assert float(found.union.sum()) <= 2 * (a_sample().mask != VOID).sum()
    flipped = replace_void(a_sample())
    assert float(protocols.score("native", some_maps(), flipped).union.sum()) != float(found.union.sum())


def replace_void(sample: Sample) -> Sample:
    return Sample(
        sample.name, sample.image, np.where(sample.mask == VOID, 0, sample.mask), sample.target, sample.labels
    )


def test_a_picture_of_nothing_but_background_is_undefined():
    sample = a_sample(void=False)
    bare = Sample("bare", sample.image, sample.mask * 0, (), sample.labels)
    found = protocols.score("native", some_maps(("sky", "water")), bare)
    assert np.isnan(found.auroc) and bool(found.iou_macro.isnull().all())
    assert float(found.miou) == 1.0


def test_words_are_classes_then_background():
    sample = PictureBook(1, objects=["sun", "boat"])[0]
    assert protocols.words("native", sample, background=("sky", "sun")) == ["sun", "boat", "sky"]
    every = replace(PROTOCOLS["native"], classes="all20", background=("floor",))
    assert protocols.words(every, sample, ["boat", "tree", "sun"], ["sky"]) == ["boat", "tree", "sun", "floor"]


def test_frames_of_a_video_are_scored_together():
    clip = PictureBookClips(1)[0]
    maps = noise(0, grid=8)([clip.image], clip.target).isel(image=0)
    assert maps.sizes["frame"] == 9
    assert 0.3 < float(protocols.score("chefer", maps, clip).auroc) < 0.7
    with pytest.raises(EvaluationError, match="3 frames, its mask 9"):
        protocols.score("native", maps.isel(frame=slice(3)), clip)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"order": "later"}, "order='later'; choose one of 'upsample, threshold'"),
        ({"thresholds": ()}, "give one or more"),
        ({"thresholds": (50,)}, "numbers in 0..1"),
        ({"order": "threshold, upsample"}, "enlarged by 'nearest'"),
        ({"background": "sky"}, "a tuple of words"),
        ({"mask_size": 0}, "1 pixel or more"),
    ],
)
def test_protocols_that_do_not_exist(fields, said):
    with pytest.raises(EvaluationError, match=said):
        Protocol("mine", **fields)


def test_maps_that_are_not_of_the_picture():
    with pytest.raises(EvaluationError, match="no map of 'boat', which the picture shows; there are sun, sky"):
        protocols.score("native", some_maps(("sun", "sky")), a_sample())
    with pytest.raises(EvaluationError, match="'layer': 2"):
        protocols.score("native", some_maps().expand_dims(layer=2), a_sample())
    with pytest.raises(EvaluationError, match="use chefer, paper, native"):
        protocols.score("nativ", some_maps(), a_sample())


# --- runs


TRIVIAL = {"noise": noise(1), "constant": constant(), "centre": centre_gaussian(), "saliency": image_saliency()}


class Interrupting:
    """Noise until the third image, at which somebody presses Ctrl-C, once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images, concepts):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return noise(2)(images, concepts)

    def describe(self) -> str:
        return "noise, sometimes"


def same(a: xr.Dataset, b: xr.Dataset) -> None:
    xr.testing.assert_identical(a.drop_attrs(deep=False), b.drop_attrs(deep=False))
    assert a.attrs == b.attrs


def test_interrupted_and_rerun_is_the_same_as_straight(tmp_path):
    data, method = PictureBook(5), Interrupting()
    methods = {"constant": constant(), "noise": method}
    with pytest.raises(KeyboardInterrupt):
        evaluate(methods, data, store=tmp_path / "run.zarr", progress=False)
    half = xr.open_zarr(tmp_path / "run.zarr")
    assert half.scored.values.sum(1).tolist() == [2, 2]
    resumed = evaluate(methods, data, store=tmp_path / "run.zarr", progress=False)
    assert method.calls == 3 + 3
    same(resumed, evaluate(methods, data, progress=False))
    again = evaluate(methods, data, store=tmp_path / "run.zarr", progress=False)
    assert method.calls == 3 + 3 + 5
    same(resumed, again)
    stored = xr.open_zarr(tmp_path / "run.zarr").load()
    assert stored.image.values.tolist() == resumed.image.values.tolist()
    np.testing.assert_array_equal(stored.iou_macro, resumed.iou_macro)
    assert stored.iou_macro.dims == ("method", "image", "threshold")


def test_a_limit_may_be_raised_later(tmp_path):
    data, store = PictureBook(4), tmp_path / "run.zarr"
    assert evaluate(TRIVIAL, data, store=store, progress=False, limit=2).sizes["image"] == 2
    same(evaluate(TRIVIAL, data, store=store, progress=False), evaluate(TRIVIAL, data, progress=False))


def test_a_store_of_something_else_is_refused(tmp_path):
    store, data = tmp_path / "run.zarr", PictureBook(2)
    methods = {"noise": noise(1), "constant": constant()}
    first = evaluate(methods, data, store=store, progress=False)
    for change, said in (
        ({"dataset": PictureBook(2, seed=3)}, "dataset fingerprint: sha256"),
        ({"protocol": "paper"}, "protocol name: native in the store, paper now"),
        ({"concepts": ["sky"]}, "protocol background"),
        (
            {"methods": {"noise": noise(2), "constant": constant()}},
            "methods noise: noise.seed=1, grid=64. in the store",
        ),
        ({"methods": {"noise": noise(1)}}, "methods constant: .* in the store, none now"),
        ({"methods": dict(reversed(methods.items()))}, "in another order now"),
    ):
        with pytest.raises(EvaluationError, match=said):
            evaluate(**{"methods": methods, "dataset": data, "store": store, "progress": False} | change)
    same(evaluate(methods, data, store=store, progress=False), first)
    over = evaluate(methods, PictureBook(3, seed=3), store=store, resume=False, progress=False)
    assert over.sizes["image"] == 3


def test_what_is_no_evaluation_is_not_overwritten(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(EvaluationError, match=r"a directory that holds a\.txt"):
            evaluate(TRIVIAL, PictureBook(1), store=tmp_path / "notes", resume=resume, progress=False)
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        evaluate({}, PictureBook(1))


def test_failures_have_a_reason_and_no_number(tmp_path):
    data = PictureBook(3)
    second, healed = data[1].image.tobytes(), []

    def raises(images, concepts):
        if images[0].tobytes() == second and not healed:
            raise RuntimeError("out of memory")
        return noise(0)(images, concepts)

    def with_nan(images, concepts):
        return noise(0)(images, concepts).where(lambda values: values < 0.9)

    def bare(images, concepts):
        return noise(0)(images, concepts).values

    def fewer(images, concepts):
        return noise(0)(images, concepts).isel(concept=slice(1, None))

    methods = {"raises": raises, "NaN": with_nan, "bare": bare, "fewer": fewer, "fine": noise(0)}
    with pytest.warns(EvaluationWarning, match=r"raises: 1 of 3, first scene/00001: RuntimeError: out of memory"):
        found = evaluate(methods, data, store=tmp_path / "run.zarr", progress=False)
    assert found.failed.sel({"method": "raises"}).values.tolist() == ["", "RuntimeError: out of memory", ""]
    assert "NaN or infinity" in str(found.failed.sel({"method": "NaN"}).values[0])
    assert "found ndarray, expected a DataArray (image" in str(found.failed.sel({"method": "bare"}).values[0])
    assert "give one for every word" in str(found.failed.sel({"method": "fewer"}).values[0])
    for name in protocols.METRICS:
        assert bool(found[name].sel({"method": ["NaN", "bare", "fewer"]}).isnull().all()), name
        assert bool(found[name].sel({"method": "raises"}).isel(image=1).isnull().all()), name
    assert found.auroc.sel({"method": "fine"}).notnull().all()
    assert summarise(found)["undefined"].sel({"method": "raises", "metric": "auroc"}) == 1

    healed.append(True)  # a failure is tried again
    with pytest.warns(EvaluationWarning, match="NaN: 3 of 3"):
        again = evaluate(methods, data, store=tmp_path / "run.zarr", progress=False)
    np.testing.assert_array_equal(again.auroc.sel({"method": "raises"}), again.auroc.sel({"method": "fine"}))


def test_what_was_run_stands_in_the_result():
    data = PictureBook(1)
    found = evaluate(TRIVIAL, data, "paper", progress=False)
    assert json.loads(found.attrs["dataset"]) == {
        "name": "picture-book-scenes-1",
        "fingerprint": data.fingerprint,
        "images": 1,
    }
    assert json.loads(found.attrs["protocol"])["order"] == "threshold, upsample"
    assert json.loads(found.attrs["methods"])["noise"] == "noise(seed=1, grid=64)"
    assert json.loads(found.attrs["versions"])["dit-probe"] == dp.__version__
    assert found.target.values.tolist() == [", ".join(data[0].target)]


def test_maps_that_look_at_nothing_are_at_chance():
    found = evaluate(TRIVIAL, PictureBook(30), progress=False)
    assert (found.auroc.sel({"method": "constant"}) == 0.5).all()
    shares = [np.mean([(s.mask == s.labels[w]).mean() for w in s.target]) for s in PictureBook(30)]
    np.testing.assert_allclose(found.ap.sel({"method": "constant"}), shares)
    means = summarise(found)
    row = means.sel({"metric": "auroc", "method": "noise"})
    assert float(row.low) < 0.5 < float(row.high) and float(row.high - row.low) < 0.03
    assert float(means["mean"].sel({"metric": "auroc", "method": "saliency"})) > 0.55
    # one map for all words says nothing about which class a pixel is of
    assert found.miou.sel({"method": ["constant", "centre", "saliency"]}).isnull().all()
    assert found.miou.sel({"method": "noise"}).notnull().all()


def test_noise_depends_on_the_picture_and_not_on_the_order():
    images = [PictureBook(2)[at].image for at in (0, 1)]
    both, other = noise(0)(images, ["a", "b"]), noise(0)(images[::-1], ["a", "b"])
    np.testing.assert_array_equal(both, other[::-1])
    assert not np.array_equal(both[0], both[1]) and not np.array_equal(both[:, 0], both[:, 1])


# --- models


def test_concept_attention_gives_what_tracing_gives():
    pipe = tiny_pipeline("flux")
    images, words = [np.full((16, 16, 3), 90, np.uint8), np.full((16, 16, 3), 10, np.uint8)], ["sun", "sky"]
    method = concept_attention(pipe, size=16, layers=[0, -1], timestep=300, seed=4)
    maps = method(images, words)
    with dp.trace(pipe, dp.Probe(words, record=["o_x", "o_c"]), progress=False) as run:
        dp.encode(pipe, images[1], "a sun", timestep=300, seed=4)
    layers = run.dataset.layer.values[[0, -1]].tolist()
    expected = dp.maps.saliency(run.dataset, layers=layers)
    assert maps.dims == ("image", "concept", "y", "x")
    np.testing.assert_allclose(maps[1], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"space": "value"}, {"space": "cross", "direction": "concept_to_image"}, {"softmax": None}, {"softmax": "after"}],
)
def test_every_ablation_is_a_method(options, pipelines):
    method = concept_attention(pipelines("flux"), size=16, **options)
    found = evaluate({"it": method}, PictureBook(2), progress=False)
    assert found.auroc.notnull().all()


def test_pictures_of_different_sizes(pipelines):
    images = [np.zeros((16, 16, 3), np.uint8), np.zeros((24, 16, 3), np.uint8), np.full((16, 16, 3), 9, np.uint8)]
    assert concept_attention(pipelines("flux"), size=16)(images, ["sun", "sky"]).sizes["image"] == 3
    method = replace(concept_attention(pipelines("flux")), size=None)
    assert method(images[::2], ["sun", "sky"]).sizes["y"] == 4
    with pytest.raises(EvaluationError, match="different grids: give size="):
        method(images, ["sun", "sky"])


def test_a_video_has_a_map_for_every_frame():
    clip = PictureBookClips(1)[0]
    method = concept_attention(tiny_pipeline("cogvideox"))
    assert method([clip.image], ["boat", "water"]).sizes["frame"] == 9


def test_the_twin_has_other_weights_and_is_told_apart():
    pipe = dp.demo.load("flux-picturebook")
    twins = [random_twin(pipe, seed) for seed in (0, 0, 1)]
    methods = [concept_attention(model, max_sequence_length=32) for model in (pipe, *twins)]
    assert len({method.describe() for method in methods}) == 3
    assert methods[1].describe() == methods[2].describe() and methods[1].size == 64
    found = evaluate({"trained": methods[0], "twin": methods[1]}, PictureBook(2, seed=7), progress=False)
    assert found.auroc.notnull().all() and (found.auroc[0] != found.auroc[1]).all()
    trained, twin = (part.transformer.state_dict() for part in (pipe, twins[0]))
    assert {name: value.shape for name, value in trained.items()} == {name: v.shape for name, v in twin.items()}


# --- tables


def test_tables():
    found = summarise(evaluate(TRIVIAL, PictureBook(4), progress=False))
    assert found["mean"].dims == ("method", "metric")
    assert {"auroc", "iou_macro, otsu", "miou"} <= set(found.metric.values.tolist())
    text = table(found.sel(metric=["auroc", "miou"]))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 2 + len(TRIVIAL)
    assert "undefined" in lines[3]
    rows = table(found, "csv").splitlines()
    assert rows[0] == "method,metric,mean,low,high,n,undefined" and len(rows) == 1 + found["mean"].size
    with pytest.raises(EvaluationError, match="choose markdown or csv"):
        table(found, "html")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="no metric"):
        summarise(xr.Dataset({"speed": ("image", [1.0])}))
