"""Clips: what moves, how its masks follow it, and what its captions say."""

import numpy as np
import pytest

from dit_probe.datasets import clips as clips_module
from dit_probe.datasets.clips import CAPTION_WORDS, CLIP_STYLES, CLIP_WORDS, MOTIONS, clip, clips, describe_clip
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, SceneError
from dit_probe.datasets.sprites import sprite
from dit_probe.demo.text import VIDEO_WORDS, t5_tokenizer

MANY = list(clips(200, seed=5))


def centre(mask: np.ndarray) -> np.ndarray:
    """(frame, 2): middle of a mask in every frame, y and x."""
    return np.array([np.argwhere(frame).mean(axis=0) for frame in mask])


def test_the_same_seed_draws_the_same_clip_whatever_else_is_random():
    first = clip(11)
    np.random.seed(3)
    again, other = clip(11), clip(12)
    assert np.array_equal(first.frames, again.frames)
    assert first.caption == again.caption
    assert first.objects == again.objects
    assert all(np.array_equal(first.masks[noun], again.masks[noun]) for noun in first.masks)
    assert not np.array_equal(first.frames, other.frames)


def test_families_of_seeds_share_nothing():
    assert [drawn.seed for drawn in clips(2, seed=2)] == [2_000_000, 2_000_001]
    training, held_out = ({drawn.frames.tobytes() for drawn in clips(20, seed=seed)} for seed in (0, 1))
    assert len(training | held_out) == 40


def test_masks_are_disjoint_and_fill_their_boxes():
    for drawn in MANY:
        total = sum(mask.astype(int) for mask in drawn.masks.values()) + drawn.background_mask
        assert (total == 1).all()
        for thing in drawn.objects:
            for mask, (y0, x0, y1, x1) in zip(drawn.masks[thing.noun], thing.boxes, strict=True):
                ys, xs = np.nonzero(mask)
                assert len(ys) > 12
                assert y0 - 1 < ys.min() and ys.max() < y1 + 1 and x0 - 1 < xs.min() and xs.max() < x1 + 1
                assert min(y0, x0) >= 0 and max(y1, x1) <= 32


@pytest.mark.parametrize("nouns", [["boat"], ["boat", "mushroom"]])
@pytest.mark.parametrize("size", [32, 33])
def test_masks_are_the_coverage_of_the_object_and_nothing_else_is_drawn(nouns, size):
    """Coverage is worked out anew, from the boxes and the two sprites that look the same for every seed."""
    for seed in range(10):
        motions = ["moving right", "still"][: len(nouns)]
        drawn = clip(seed, size=size, objects=nouns, background_word="brick", motions=motions)
        bare = clip(seed, size=size, objects=[], background_word="brick").frames
        untouched = np.ones(bare.shape[:3], dtype=bool)
        for thing in drawn.objects:
            fine = (2 * np.array(thing.boxes)).astype(int)
            alpha = sprite(thing.noun, fine[0, 2] - fine[0, 0], np.random.default_rng(0))[..., 3]
            sheet = np.zeros((len(bare), 2 * size, 2 * size))
            for frame, (y0, x0, y1, x1) in enumerate(fine):
                sheet[frame, y0:y1, x0:x1] = alpha
            coverage = sheet.reshape(-1, size, 2, size, 2).mean(axis=(2, 4))
            assert np.array_equal(drawn.masks[thing.noun], coverage >= 0.5)
            untouched &= coverage == 0
        changed = (drawn.frames != bare).any(axis=-1)
        assert not changed[untouched].any()
        # a pixel of an object may have the background's colour by accident, hardly ever a whole region
        assert changed[~drawn.background_mask].mean() > 0.95


def test_only_what_a_mask_covers_changes_between_frames():
    drawn = clip(4, objects=["house"], background_word="grass", motions=["moving right"])
    first, last = drawn.frames[0].astype(int), drawn.frames[-1].astype(int)
    box = np.zeros((32, 32), dtype=bool)
    for y0, x0, y1, x1 in (drawn.objects[0].boxes[0], drawn.objects[0].boxes[-1]):
        box[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    assert np.array_equal(first[~box], last[~box])
    assert np.abs(first - last)[drawn.masks["house"][0] ^ drawn.masks["house"][-1]].mean() > 20


@pytest.mark.parametrize("motion", MOTIONS)
def test_things_move_as_the_caption_says(motion):
    for seed in range(10):
        drawn = clip(seed, objects=["car"], motions=[motion], style="sentence")
        path = centre(drawn.masks["car"])
        moved = path[-1] - path[0]
        along = moved @ MOTIONS[motion]
        assert (along > 7) == (motion != "still")
        assert np.abs(moved - along * np.array(MOTIONS[motion])).max() < 1
        assert drawn.caption.startswith("a still car" if motion == "still" else f"a car {motion}")


@pytest.mark.parametrize("size", [32, 33, 64])
def test_things_travel_a_quarter_of_the_picture(size):
    for seed in range(20):
        (thing,) = clip(seed, size=size, frames=3, objects=1, motions=["moving up"]).objects
        assert thing.boxes[0][0] - thing.boxes[-1][0] >= size / 4


def test_captions_of_many_clips_say_how_each_thing_moves():
    seen = set()
    for drawn in MANY:
        said = describe_clip(drawn, 2, "list").split(", ")
        assert said[-1] == drawn.background
        assert len(said) == len(drawn.objects) + 1
        sentence = describe_clip(drawn, 3, "sentence")
        for noun, motion in (part.split(" ", 1) for part in said[:-1]):
            path = centre(drawn.masks[noun])
            y, x = path[-1] - path[0]
            across, way = abs(x) > abs(y), int(x > 0) if abs(x) > abs(y) else 2 + int(y > 0)
            name = ("moving left", "moving right", "moving up", "moving down")[way]
            assert motion == (name if abs(x if across else y) > 7 else "still")
            assert (f"a still {noun}" if motion == "still" else f"a {noun} {motion}") in sentence
            seen.add(motion)
    assert seen == set(MOTIONS)


def test_things_never_touch():
    for drawn in (drawn for drawn in MANY if len(drawn.objects) == 2):
        for a, b in zip(*(thing.boxes for thing in drawn.objects), strict=True):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_captions_name_what_there_is_in_words_of_one_token():
    tokenizer = t5_tokenizer(VIDEO_WORDS)
    assert set(CLIP_WORDS) <= set(CAPTION_WORDS) <= set(VIDEO_WORDS)
    seen = set()
    for drawn in MANY:
        for style in CLIP_STYLES:
            words = describe_clip(drawn, 1, style).replace(",", "").split()
            assert {word for word in words if word in NOUNS} == set(drawn.masks)
            assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
            seen.update(words)
        assert drawn.background in describe_clip(drawn, 1, "sentence")
    assert seen == set(CAPTION_WORDS)


def test_an_empty_clip_shows_its_background():
    drawn = clip(0, objects=0)
    assert drawn.caption in BACKGROUNDS
    assert drawn.words == (drawn.background,)
    assert (drawn.frames == drawn.frames[0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 16}, "9 frames of 16 x 16 pixels: use 2 frames or more of 32 x 32"),
        ({"frames": 1}, "1 frames"),
        ({"objects": ["dog"]}, "unknown noun 'dog'.*sun"),
        ({"objects": 3}, "objects=3: a scene shows 0 to 2 objects"),
        ({"objects": ["sun", "sun"]}, "each noun once"),
        ({"objects": "sun"}, "is one string"),
        ({"background_word": "fire"}, "unknown background 'fire'.*grass"),
        ({"objects": ["sun"], "motions": ["moving"]}, "give each object one of moving left"),
        ({"objects": ["sun"], "motions": []}, "give each object one of"),
        ({"objects": ["sun"], "motions": "still"}, r"motions='still' is one string: give a list .*\['still'\]"),
        ({"style": "poem"}, "unknown caption style 'poem'.*sentence"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, message):
    with pytest.raises(SceneError, match=message):
        clip(0, **arguments)


def test_objects_that_cannot_pass_each_other_end_in_an_error(monkeypatch):
    monkeypatch.setitem(clips_module._SIDES, 2, (0.6, 0.6))
    with pytest.raises(SceneError, match="moving left and still found no way .* 9 frames of 32 x 32 .*another seed"):
        clip(0, objects=["sun", "boat"], motions=["moving left", "still"])
