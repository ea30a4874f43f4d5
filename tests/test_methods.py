"""Methods without a model, and ConceptAttention as a method."""

from __future__ import annotations

import numpy as np
import pytest

import dit_probe as dp
from dit_probe.datasets.segmentation import PictureBook, PictureBookClips
from dit_probe.evaluation import evaluate
from dit_probe.methods import centre_gaussian, concept_attention, constant, image_saliency, noise, random_twin
from dit_probe.protocols import EvaluationError
from dit_probe.statistics import bootstrap
from dit_probe.testing import tiny_pipeline

TRIVIAL = {"noise": noise(1), "constant": constant(), "centre": centre_gaussian(), "saliency": image_saliency()}


def test_maps_that_look_at_nothing_are_at_chance():
    found = evaluate(TRIVIAL, PictureBook(30), progress=False)
    assert (found.auroc.sel({"method": "constant"}) == 0.5).all()
    shares = [np.mean([(s.mask == s.labels[w]).mean() for w in s.target]) for s in PictureBook(30)]
    np.testing.assert_allclose(found.ap.sel({"method": "constant"}), shares)
    row = bootstrap(found.auroc.sel({"method": "noise"}), "image")
    assert float(row.low) < 0.5 < float(row.high) and float(row.high - row.low) < 0.03
    assert float(found.auroc.sel({"method": "saliency"}).mean()) > 0.55
    # one map for all words says nothing about which class a pixel is of
    assert found.miou.sel({"method": ["constant", "centre", "saliency"]}).isnull().all()
    assert found.miou.sel({"method": "noise"}).notnull().all()


def test_noise_depends_on_the_picture_and_not_on_the_order():
    images = [PictureBook(2)[at].image for at in (0, 1)]
    both, other = noise(0)(images, ["a", "b"]), noise(0)(images[::-1], ["a", "b"])
    np.testing.assert_array_equal(both, other[::-1])
    assert not np.array_equal(both[0], both[1]) and not np.array_equal(both[:, 0], both[:, 1])


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
    [
        {"space": "value"},
        {"space": "cross", "direction": "concept_to_image"},
        {"softmax": None},
        {"softmax": "after"},
        {"attends": "concepts"},
    ],
)
def test_every_ablation_is_a_method(options, pipelines):
    method = concept_attention(pipelines("flux"), size=16, **options)
    found = evaluate({"it": method}, PictureBook(2), progress=False)
    assert found.auroc.notnull().all()


def test_pictures_of_different_sizes(pipelines):
    images = [np.zeros((16, 16, 3), np.uint8), np.zeros((24, 16, 3), np.uint8), np.full((16, 16, 3), 9, np.uint8)]
    assert concept_attention(pipelines("flux"), size=16)(images, ["sun", "sky"]).sizes["image"] == 3
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = None  # pictures as they are
    method = concept_attention(pipe)
    assert method(images[::2], ["sun", "sky"]).sizes["y"] == 4
    with pytest.raises(EvaluationError, match="different grids.*give size="):
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
    assert methods[1].describe() == methods[2].describe() and '"size": 64' in methods[1].describe()
    found = evaluate({"trained": methods[0], "twin": methods[1]}, PictureBook(2, seed=7), progress=False)
    assert found.auroc.notnull().all() and (found.auroc[0] != found.auroc[1]).all()
    trained, twin = (part.transformer.state_dict() for part in (pipe, twins[0]))
    assert {name: value.shape for name, value in trained.items()} == {name: v.shape for name, v in twin.items()}
