"""Randomised pipelines, shuffled words, and how alike two maps are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

from dit_probe.anatomy import find
from dit_probe.datasets.segmentation import PictureBook, PictureBookClips
from dit_probe.evaluation import evaluate
from dit_probe.methods import (
    centre_gaussian,
    concept_attention,
    noise,
    random_twin,
    randomised,
    shuffled,
    similarity,
)
from dit_probe.protocols import EvaluationError
from dit_probe.testing import leftovers, tiny_pipeline

WORDS = ["sun", "sky", "grass"]


def fresh(pipe, other) -> list[bool]:
    """For every block, whether the other pipeline has a weight of its own there."""
    pairs = zip(find(pipe).blocks(pipe.transformer), find(other).blocks(other.transformer), strict=True)
    own = [
        [new is not old for old, new in zip(a.module.parameters(), b.module.parameters(), strict=True)]
        for a, b in pairs
    ]
    assert all(all(block) or not any(block) for block in own)
    return [all(block) for block in own]


@pytest.mark.parametrize(("family", "count"), [("flux", 4), ("sd3", 3), ("cogvideox", 3)])
def test_a_cascade_comes_from_the_output(family, count):
    pipe = tiny_pipeline(family)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    cascade = [randomised(pipe, blocks, seed=3) for blocks in range(count + 1)]
    for blocks, step in enumerate(cascade):
        assert fresh(pipe, step) == [False] * (count - blocks) + [True] * blocks
        inside = {id(p) for block in find(step).blocks(step.transformer) for p in block.module.parameters()}
        shared = {id(parameter) for parameter in pipe.transformer.parameters()}
        assert {id(p) for p in step.transformer.parameters()} - inside <= shared
        assert step.vae is pipe.vae
    last = [find(step).blocks(step.transformer)[-1].module.state_dict() for step in cascade]
    for name, value in last[1].items():
        assert torch.equal(value, last[-1][name])  # a block's weights are the same in every step
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    other = randomised(pipe, 1, seed=4)
    assert any(
        not torch.equal(v, last[1][n]) for n, v in find(other).blocks(other.transformer)[-1].module.state_dict().items()
    )


def test_weights_are_drawn_as_the_class_draws_them():
    pipe = tiny_pipeline("flux")
    made, twin = randomised(pipe, 4, seed=5).transformer, None
    with torch.random.fork_rng():
        torch.manual_seed(5)
        twin = type(pipe.transformer).from_config(pipe.transformer.config)
    for name, value in made.state_dict().items():
        whose = twin if "transformer_blocks" in name else pipe.transformer
        assert torch.equal(value, whose.state_dict()[name]), name


def test_steps_of_a_cascade_are_methods_told_apart():
    pipe = tiny_pipeline("flux")
    models = [pipe, *(randomised(pipe, blocks) for blocks in (0, 1, 4)), random_twin(pipe)]
    methods = [concept_attention(model, size=16) for model in models]
    said = [method.describe() for method in methods]
    assert said[0] == said[1] and len(set(said)) == 4
    image = [PictureBook(1)[0].image]
    maps = [method(image, WORDS) for method in methods]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert not np.allclose(maps[0], maps[3])
    # the single block comes after all joint layers: no map of theirs depends on it
    np.testing.assert_array_equal(maps[0], maps[2])
    assert [leftovers(model) for model in models] == [[]] * len(models)


@pytest.mark.parametrize("blocks", [-1, 5])
def test_no_more_blocks_than_there_are(blocks, pipelines):
    with pytest.raises(EvaluationError, match=f"blocks={blocks}; FluxTransformer2DModel has 4"):
        randomised(pipelines("flux"), blocks)


def test_shuffled_words():
    image = [PictureBook(1)[0].image]
    right, wrong = noise(2)(image, WORDS), shuffled(noise(2))(image, WORDS)
    assert wrong.concept.values.tolist() == WORDS
    np.testing.assert_array_equal(wrong, right[:, [1, 2, 0]])
    agnostic = shuffled(centre_gaussian())
    np.testing.assert_array_equal(agnostic(image, WORDS), centre_gaussian()(image, WORDS))
    assert agnostic.class_agnostic and not shuffled(noise()).class_agnostic
    assert shuffled(noise(2)).describe() == "shuffled(noise(seed=2, grid=64))"
    assert shuffled(plain).describe() == f"shuffled({__name__}.plain)"
    found = evaluate({"right": plain, "wrong": shuffled(plain)}, PictureBook(2), progress=False)
    assert (found.auroc[0] != found.auroc[1]).all()
    video = [PictureBookClips(1)[0].image]
    assert shuffled(noise())(video, WORDS).dims == ("image", "concept", "frame", "y", "x")


def plain(images, concepts) -> xr.DataArray:
    return noise(7)(images, concepts)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_rank_correlation_is_scipys(shape):
    random = np.random.default_rng(0)
    dims = ("image", "concept", *("frame", "y", "x")[-len(shape) :])
    first, other = (
        xr.DataArray(random.integers(0, 9, (2, 3, *shape)).astype(float), {"concept": WORDS}, dims) for _ in range(2)
    )
    found = similarity(first, other).spearman
    assert found.dims == ("image", "concept") and found.concept.values.tolist() == WORDS
    for image in range(2):
        for concept in range(3):
            expected = stats.spearmanr(first[image, concept].values.ravel(), other[image, concept].values.ravel())
            assert float(found[image, concept]) == pytest.approx(expected.statistic)


def test_similarity_that_is_undefined_or_refused():
    maps = noise(grid=4)([np.zeros((8, 8, 3), np.uint8)], WORDS)
    assert np.isnan(similarity(maps, maps * 0 + 1).spearman).all()
    holed = maps.copy()
    holed[0, 1, 0, 0] = np.nan
    np.testing.assert_array_equal(similarity(maps, holed).spearman.isnull(), [[False, True, False]])
    with pytest.raises(EvaluationError, match="same pictures, words and grid"):
        similarity(maps, maps.isel(x=slice(2)))
    with pytest.raises(EvaluationError, match="same pictures, words and grid"):
        similarity(maps, maps.assign_coords(concept=WORDS[::-1]))
