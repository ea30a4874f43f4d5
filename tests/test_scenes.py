"""Scenes: the same seed gives the same picture, masks say exactly what was drawn, captions say what is there."""

import numpy as np
import pytest

from dit_probe.datasets.backgrounds import background
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, RELATIONS, SceneError, describe, scene, scenes


def test_same_seed_same_scene() -> None:
    for seed in (0, 17):
        one, two = scene(seed), scene(seed)
        assert one.caption == two.caption
        assert one.objects == two.objects
        assert np.array_equal(one.image, two.image)
        assert all(np.array_equal(one.masks[noun], two.masks[noun]) for noun in one.masks)
    assert not np.array_equal(scene(0).image, scene(1).image)


def test_families_of_seeds_share_nothing() -> None:
    seeds = {picture.seed for picture in scenes(5, seed=0)} | {picture.seed for picture in scenes(5, seed=1)}
    assert len(seeds) == 10


def test_one_to_four_objects_each_noun_once() -> None:
    counts = set()
    for picture in scenes(80, seed=2):
        nouns = [placed.noun for placed in picture.objects]
        counts.add(len(nouns))
        assert len(set(nouns)) == len(nouns)
        assert list(picture.masks) == nouns
        assert picture.words == (*nouns, picture.background)
    assert counts == {1, 2, 3, 4}


def test_masks_are_disjoint_and_fill_their_boxes() -> None:
    for picture in scenes(60, seed=3):
        assert picture.image.shape == (64, 64, 3)
        assert picture.image.dtype == np.uint8
        owners = np.sum(list(picture.masks.values()), axis=0)
        assert owners.max() == 1
        assert np.array_equal(picture.background_mask, owners == 0)
        for placed in picture.objects:
            y0, x0, y1, x1 = placed.box
            mask = picture.masks[placed.noun]
            assert 18 <= y1 - y0 == x1 - x0 <= 28
            assert mask.sum() == mask[y0:y1, x0:x1].sum() > 0.2 * (y1 - y0) * (x1 - x0)


def test_masks_are_exact() -> None:
    """Outside the masks and their one-pixel soft edge, the picture is the bare background."""
    for seed in range(20):
        picture = scene(seed, objects=2, background_word="brick")
        rng = np.random.default_rng(seed)
        rng.permutation(NOUNS)
        bare = np.round(background("brick", 64, rng)).astype(np.uint8)
        changed = (picture.image != bare).any(axis=-1)
        covered = ~picture.background_mask
        assert not (changed & ~_grown(covered)).any()
        # a pixel of an object may have the background's colour by accident, hardly ever a whole region
        assert (changed & covered).sum() > 0.95 * covered.sum()


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).any(axis=(-2, -1))


def test_every_noun_and_background_can_be_asked_for() -> None:
    for noun in NOUNS:
        for word in BACKGROUNDS:
            picture = scene(5, objects=[noun], background_word=word, style="list")
            assert picture.caption == f"{noun}, {word}"


def test_colour_alone_does_not_name_a_random_noun() -> None:
    colours = {tuple(scene(seed, objects=["balloon"]).image[_middle(seed)]) for seed in range(30)}
    assert len(colours) >= 5


def _middle(seed: int) -> tuple[int, int]:
    y0, x0, y1, x1 = scene(seed, objects=["balloon"]).objects[0].box
    return int(y0 + 0.35 * (y1 - y0)), (x0 + x1) // 2


def test_styles() -> None:
    two = scene(1, objects=["sun", "boat"], background_word="water")
    assert describe(two, 0, "list") in ("sun, boat, water", "boat, sun, water")
    assert describe(two, 0, "sentence") in ("a sun and a boat on water", "a boat and a sun on water")
    one = scene(1, objects=["sun"], background_word="night")
    assert {describe(one, seed, "word") for seed in range(20)} == {"sun", "a sun"}
    assert describe(one, 0, "sentence") == "a sun at night"
    assert scene(1, objects=0, background_word="grass").caption == "grass"


def test_relations_are_true() -> None:
    seen = set()
    for seed in range(200):
        picture = scene(seed, objects=2, style="relation")
        relation = next((r for r in RELATIONS if f" {r} " in picture.caption), None)
        if relation is None:  # two relations would be equally true: a sentence instead
            continue
        seen.add(relation)
        for caption in (picture.caption, describe(picture, 1, "relation")):
            said = next(r for r in RELATIONS if f" {r} " in caption)
            first, second = (part.split()[1] for part in caption.split(f" {said} "))
            centres = {placed.noun: placed.centre for placed in picture.objects}
            (y0, x0), (y1, x1) = centres[first], centres[second]
            truth = {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
            assert truth[said], caption
    assert seen == set(RELATIONS)


def test_other_sizes_keep_the_layout() -> None:
    for size in (32, 128):
        picture = scene(4, size=size, objects=3)
        assert picture.image.shape == (size, size, 3)
        assert all(mask.shape == (size, size) for mask in picture.masks.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objects": ["zebra"]}, "unknown noun 'zebra'.*sun, tree"),
        ({"objects": ["sun", "sun"]}, "each noun once"),
        ({"objects": 5}, "0 to 4 objects"),
        ({"objects": "sun"}, "is one string"),
        ({"background_word": "lava"}, "unknown background 'lava'.*grass"),
        ({"style": "poem"}, "unknown caption style 'poem'.*sentence"),
        ({"size": 8}, "too small"),
    ],
)
def test_wrong_use_says_how_to_fix_it(arguments: dict, message: str) -> None:
    with pytest.raises(SceneError, match=message):
        scene(0, **arguments)
