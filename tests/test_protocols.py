"""Protocols by hand: what a method sees and is asked for, and in which order its maps become numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import xarray as xr

from dit_probe import metrics, protocols
from dit_probe.datasets.segmentation import VOID, PictureBook, PictureBookClips, Sample
from dit_probe.methods import noise
from dit_probe.protocols import PROTOCOLS, EvaluationError, Protocol


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
    [
        ("chefer", (224, 224, 3), (224, 224)),
        ("paper", (512, 512, 3), (224, 224)),
        ("paper_multiclass", (512, 512, 3), (64, 64)),
        ("native", (20, 30, 3), (20, 30)),
    ],
)
def test_what_a_method_sees_and_what_is_scored(protocol, picture, mask):
    from PIL import Image

    sample = a_sample()
    image, labels, valid = protocols.prepare(protocol, sample)
    assert (image.shape, labels.shape, image.dtype, labels.dtype) == (picture, mask, np.uint8, np.int16)
    np.testing.assert_array_equal(labels, nearest(sample.mask, *mask))
    np.testing.assert_array_equal(valid, labels != VOID)
    way = {"chefer": Image.Resampling.BILINEAR, "paper": Image.Resampling.BICUBIC}
    expected = Image.fromarray(sample.image).resize(picture[1::-1], way.get(protocol, Image.Resampling.NEAREST))
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


@pytest.mark.parametrize("threshold", ["otsu", 0.5])
def test_every_threshold_is_taken_on_the_maps_own_grid(threshold):
    sample, maps = a_sample(), some_maps()
    own = metrics.predicted(maps.sel(concept="boat"), threshold=threshold)
    labels = nearest(sample.mask, 224, 224)
    expected = by_hand(nearest(own.values, 224, 224), labels == 1, labels != VOID)
    found = protocols.score(replace(PROTOCOLS["paper"], thresholds=(threshold,)), maps, sample)
    assert found.counts.values.tolist() == [expected]


def test_multiclass_is_argmax_on_the_maps_own_grid():
    """Of four quadrants: a boat taken for a boat, a sun for sky, sky for sky, and void for a boat."""
    labels = {"boat": 1, "sun": 2, "car": 3}
    sample = Sample(
        "a", np.zeros((2, 2, 3), np.uint8), np.array([[1, 2], [0, VOID]], np.int16), ("boat", "sun"), labels
    )
    boat, sun, sky = [[0.9, 0.1], [0.1, 0.9]], [[0.2, 0.2], [0.3, 0.3]], [[0.1, 0.8], [0.9, 0.1]]
    maps = xr.DataArray([boat, sun, sky], {"concept": ["boat", "sun", "sky"]}, ("concept", "y", "x"))
    found = protocols.score("paper_multiclass", maps, sample)
    assert found["class"].values.tolist() == ["background", "boat", "sun", "car"]
    assert (found.intersection / 32**2).values.tolist() == [1, 1, 0, 0]
    assert (found.union / 32**2).values.tolist() == [2, 1, 1, 0]
    assert float(found.miou) == 0.5
    right, all_three = float(found.intersection.sum()), float(found.intersection.sum() + found.union.sum())
    assert 2 * right / all_three == pytest.approx(2 / 3)


def test_protocols_are_data():
    assert list(PROTOCOLS) == ["chefer", "paper", "native", "paper_multiclass"]
    for name, protocol in PROTOCOLS.items():
        recorded = json.loads(json.dumps(asdict(protocol)))
        assert recorded["name"] == name and protocols.find(name) is protocol
        assert Protocol(**recorded | {"thresholds": tuple(recorded["thresholds"])}) == protocol


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
        names = [name for name in protocols.METRICS if name in metrics.METRICS and name != "energy_pointing"]
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
    assert float(found.miou) == 1.0
    assert all(bool(found[name].isnull().all()) for name in protocols.METRICS if name != "miou")
    assert not found.counts.any()


def test_words_are_classes_then_background():
    sample = PictureBook(1, objects=["sun", "boat"])[0]
    assert protocols.words("native", sample, background=("sky", "sun")) == ["sun", "boat", "sky"]
    every = replace(PROTOCOLS["native"], classes="all20", background=("floor",))
    assert protocols.words(every, sample, ["boat", "tree", "sun"], ["sky"]) == ["boat", "tree", "sun", "floor"]


VOCABULARY = ["boat", "tree", "sun", "house", "moon", "car"]


def test_absent_words_come_between_classes_and_background():
    sample = PictureBook(1, objects=["sun", "boat"])[0]

    def given(absent, vocabulary=VOCABULARY, name=sample.name, **fields):
        protocol = replace(PROTOCOLS["native"], absent=absent, **fields)
        return protocols.words(protocol, replace(sample, name=name), vocabulary, ["sky", "tree"])

    assert given(0) == ["sun", "boat", "sky", "tree"]
    for count in (1, 2, 3):
        words = given(count)
        assert (words[:2], words[-2:]) == (["sun", "boat"], ["sky", "tree"])
        assert set(words[2:-2]) <= {"house", "moon", "car"} and len(words) == len(set(words)) == 4 + count
        assert given(count + 1)[: 2 + count] == words[: 2 + count]
    assert given(9) == given(3)
    assert given(2, VOCABULARY[::-1]) == given(2)
    assert len({given(1, name=str(name))[2] for name in range(40)}) == 3
    assert given(2, classes="all20") == [*VOCABULARY, "sky"]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_absent_words_are_the_same_in_every_process(seed):
    code = (
        "from dit_probe.protocols import Protocol, words; from dit_probe.datasets.segmentation import PictureBook; "
        f"print(*words(Protocol('mine', absent=2), PictureBook(1, objects=['sun', 'boat'])[0], {VOCABULARY}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=environment)
    assert shown.stdout.split() == ["sun", "boat", "house", "car"]


def test_frames_of_a_video_are_scored_together():
    clip = PictureBookClips(1)[0]
    maps = noise(0, grid=8)([clip.image], clip.target).isel(image=0)
    assert maps.sizes["frame"] == 9
    assert 0.3 < float(protocols.score("chefer", maps, clip).auroc) < 0.7
    still = maps.isel(frame=0, drop=True)
    moving = still.expand_dims(frame=9)
    xr.testing.assert_allclose(protocols.score("paper", still, clip), protocols.score("paper", moving, clip))
    with pytest.raises(EvaluationError, match="3 frames, its mask 9"):
        protocols.score("native", maps.isel(frame=slice(3)), clip)


CLIP = PictureBookClips(1)[0]
KINDS = {
    "void and an absent word": (a_sample(), ("boat", "sun", "water"), (5, 7)),
    "one word": (a_sample(), ("boat",), (5, 7)),
    "class-agnostic": (a_sample(), (), (5, 7)),
    "no target": (Sample("bare", a_sample().image, a_sample().mask * 0, (), {"boat": 1}), ("boat", "sky"), (5, 7)),
    "a grid finer than the mask": (a_sample(), ("boat", "water"), (41, 300)),
    "one map of a video": (CLIP, (*CLIP.target, "sky"), (8, 8)),
    "a map of each frame": (CLIP, (*CLIP.target, "sky"), (len(CLIP.mask), 8, 8)),
    "class-agnostic frames": (CLIP, (), (len(CLIP.mask), 8, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_methods_at_once_have_the_numbers_of_each_alone(protocol, kind):
    sample, words, grid = KINDS[kind]
    names, random = ["levels", "constant", "negative", "fine"], np.random.default_rng(2)
    maps = [random.integers(3, size=(max(1, len(words)), *grid)) / 3, random.normal(size=(max(1, len(words)), *grid))]
    together = xr.DataArray(
        np.stack([maps[0], maps[0] * 0 + 0.3, maps[1], maps[1] ** 2]),
        {"method": names, "concept": list(words) or [""]},
        ("method", "concept", "frame", "y", "x") if len(grid) == 3 else ("method", "concept", "y", "x"),
    )
    together = together if words else together.isel(concept=0, drop=True)
    found = protocols.score(protocol, together, sample)
    assert found["method"].values.tolist() == names
    for i in range(4):
        alone = protocols.score(protocol, together.isel(method=i, drop=True), sample)
        assert alone.sizes == {dim: size for dim, size in found.sizes.items() if dim != "method"}
        xr.testing.assert_allclose(found.isel(method=i, drop=True), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"order": "later"}, "order='later'; choose one of 'upsample, threshold'"),
        ({"thresholds": ()}, "give one or more"),
        ({"thresholds": (50,)}, "numbers in 0..1"),
        ({"order": "threshold, upsample"}, "enlarged by 'nearest'"),
        ({"background": "sky"}, "a tuple of words"),
        ({"mask_size": 0}, "1 pixel or more"),
        ({"absent": -1}, "absent=-1; give a number of words"),
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
    with pytest.raises(metrics.MetricError, match="a: a map is complex128: give numbers"):
        protocols.score("paper", some_maps().astype(complex), a_sample())
    with pytest.raises(EvaluationError, match="use chefer, paper, native"):
        protocols.score("nativ", some_maps(), a_sample())
    with pytest.raises(metrics.MetricError, match="a: a map holds NaN"):
        protocols.score("native", some_maps().where(lambda maps: maps.concept == "boat"), a_sample())
