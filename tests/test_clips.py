"""Clips: what moves, how its masks follow it, and what its captions say."""

import numpy as np
import pytest

from dit_probe.datasets.clips import CLIP_STYLES, CLIP_WORDS, MOTIONS, clip, clips, describe_clip
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, SceneError
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
    assert not np.array_equal(first.frames, other.frames)
    assert next(clips(1, seed=2)).seed == 2_000_000


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


def test_things_never_touch():
    for drawn in (drawn for drawn in MANY if len(drawn.objects) == 2):
        for a, b in zip(*(thing.boxes for thing in drawn.objects), strict=True):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_captions_name_what_there_is_in_words_of_one_token():
    tokenizer = t5_tokenizer(VIDEO_WORDS)
    assert set(CLIP_WORDS) <= set(VIDEO_WORDS)
    for drawn in MANY:
        for style in CLIP_STYLES:
            words = describe_clip(drawn, 1, style).replace(",", "").split()
            assert {word for word in words if word in NOUNS} == set(drawn.masks)
            assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
        assert drawn.background in describe_clip(drawn, 1, "sentence")


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
        ({"objects": "sun"}, "is one string"),
        ({"background_word": "fire"}, "unknown background 'fire'.*grass"),
        ({"objects": ["sun"], "motions": ["moving"]}, "give each object one of moving left"),
        ({"objects": ["sun"], "motions": []}, "give each object one of"),
        ({"style": "poem"}, "unknown caption style 'poem'.*sentence"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, message):
    with pytest.raises(SceneError, match=message):
        clip(0, **arguments)
