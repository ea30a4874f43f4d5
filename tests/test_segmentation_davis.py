"""DAVIS: what is written in its folders comes back, and nothing that is wrong comes through."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_cases import picture, refused, save, save_jpeg

from dit_probe.datasets.segmentation import DavisVideos, masks

WORDS = {"camel": "camel", "judo": ["man", "man"], "ride": ["horse", "rider"]}
CLIPS = {"camel": [[0, 1], [1, 255]], "judo": [[1, 2], [0, 2], [2, 2]], "ride": [[0, 1], [1, 2]]}


def davis_mask(numbers: list[int]) -> np.ndarray:
    return np.repeat(np.array(numbers, dtype=np.uint8), 3)[None].repeat(4, axis=0)


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    root = tmp_path / "DAVIS"
    for sequence, frames in CLIPS.items():
        for index, numbers in enumerate(frames):
            save_jpeg(root / "JPEGImages" / "480p" / sequence / f"{index:05d}.jpg", picture(4, 6, seed=index))
            save(root / "Annotations" / "480p" / sequence / f"{index:05d}.png", davis_mask(numbers), palette=True)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("camel\njudo\n")
    (root / "ImageSets" / "480p").mkdir()
    lines = [f"/JPEGImages/480p/ride/{i:05d}.jpg /Annotations/480p/ride/{i:05d}.png\n" for i in range(2)]
    (root / "ImageSets" / "480p" / "val.txt").write_text("".join(lines))
    return root


def test_davis_comes_back_as_it_was_written(davis: Path):
    data = DavisVideos(davis, "2017/val", WORDS)
    assert (data.names, data.vocabulary, data.background) == (("camel", "judo"), ("camel", "man"), ())
    camel, judo = data
    assert camel.image.shape == (2, 4, 6, 3)
    assert camel.mask.dtype == np.int16
    assert np.array_equal(camel.mask, [davis_mask([0, 1]), davis_mask([1, 255]).astype(np.int8)])
    assert (camel.target, camel.labels) == (("camel",), {"camel": 1})
    assert masks(camel, "camel").shape == (1, 2, 4, 6)
    assert np.array_equal(judo.mask, [davis_mask(numbers) for numbers in ([1, 1], [0, 1], [1, 1])])
    assert judo.labels == {"man": 1}
    ride = DavisVideos(davis, "480p/val", WORDS)[0]
    assert (ride.name, ride.target, ride.labels) == ("ride", ("horse", "rider"), {"horse": 1, "rider": 2})
    assert np.array_equal(ride.mask, [davis_mask(numbers) for numbers in CLIPS["ride"]])
    with Image.open(davis / "JPEGImages" / "480p" / "ride" / "00001.jpg") as image:
        assert np.array_equal(ride.image[1], np.asarray(image))


def test_davis_takes_sequences_lists_and_frames(davis: Path, tmp_path: Path):
    assert DavisVideos(davis, words=WORDS).names == tuple(WORDS)
    assert DavisVideos(davis, ["ride"], WORDS, background=["sand"]).background == ("sand",)
    mine = tmp_path / "mine.txt"
    mine.write_text("judo\n")
    data = DavisVideos(davis, mine, WORDS, frames=slice(1, None))
    assert np.array_equal(data[0].mask, [davis_mask(numbers) for numbers in ([0, 1], [1, 1])])
    assert (
        pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint != DavisVideos(davis, mine, WORDS).fingerprint
    )
    several = DavisVideos(davis, ["ride"], {"ride": "horseman"})
    assert several[0].labels == {"horseman": 1}
    assert np.array_equal(several[0].mask, [davis_mask([0, 1]), davis_mask([1, 1])])
    assert DavisVideos(davis, "2017/val", WORDS, checksum=DavisVideos(davis, "2017/val", WORDS).checksum())


def test_davis_frames_come_in_the_order_of_their_numbers(davis: Path):
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for old, new in ((0, "9"), (1, "10"), (2, "11")):
            folder = davis / kind / "480p" / "judo"
            (folder / f"{old:05d}.{suffix}").rename(folder / f"{new}.{suffix}")
    assert [int(frame[0, 0]) for frame in DavisVideos(davis, ["judo"], {"judo": ["a", "b"]})[0].mask] == [1, 0, 2]


def test_davis_2016_masks_are_grey(davis: Path):
    folder = davis / "Annotations" / "480p" / "camel"
    for index, numbers in enumerate(([0, 255], [0, 0])):
        save(folder / f"{index:05d}.png", davis_mask(numbers))
    assert np.array_equal(DavisVideos(davis, ["camel"], WORDS)[0].mask, [davis_mask([0, 1]), davis_mask([0, 0])])
    refused(lambda: DavisVideos(davis, ["camel"], {"camel": ["camel", "man"]})[0], folder, "0 and 255", "one word")
    save(folder / "00000.png", davis_mask([0, 255]), palette=True)
    refused(lambda: DavisVideos(davis, ["camel"], WORDS)[0], folder, "0 and 255", "palette")


def test_davis_that_is_refused(davis: Path):
    refused(lambda: DavisVideos(davis, "2017/val"), davis, "words=", "camel, judo")
    refused(lambda: DavisVideos(davis), davis, "words=")
    refused(lambda: DavisVideos(davis, "2017/val", {"camel": "camel"}), davis, "judo")
    refused(lambda: DavisVideos(davis, "2017/train", WORDS), "2017/train")
    refused(lambda: DavisVideos(davis, ["cat"], {"cat": "cat"}), "480p/cat", "cannot be listed")
    refused(lambda: DavisVideos(davis, ["ride"], WORDS, frames=slice(5, 9)), "ride", "slice(5, 9")
    annotations, pictures = davis / "Annotations" / "480p", davis / "JPEGImages" / "480p"
    refused(lambda: DavisVideos(davis, ["ride"], {"ride": ["horse"]})[0], annotations / "ride" / "00001.png", "found 2")
    save_jpeg(pictures / "ride" / "00001.jpg", picture(4, 5))
    refused(lambda: DavisVideos(davis, ["ride"], WORDS)[0], "00001.png", "6 x 4", "5 x 4")
    save(annotations / "ride" / "00001.png", davis_mask([0, 1])[:, :5], palette=True)
    refused(lambda: DavisVideos(davis, ["ride"], WORDS)[0], "00001.jpg", "00000.jpg", "6 x 4", "5 x 4")
    (annotations / "camel" / "00001.png").unlink()
    refused(lambda: DavisVideos(davis, ["camel"], WORDS), annotations / "camel", "00001")
    (pictures / "judo" / "00002.jpg").unlink()
    refused(lambda: DavisVideos(davis, ["judo"], WORDS), pictures / "judo", "00002")


def test_davis_opens_without_reading_pictures(davis: Path):
    for path in davis.glob("*/480p/*/*"):
        path.write_bytes(b"nothing")
    data = DavisVideos(davis, "2017/val", WORDS)
    assert len(data) == 2 and data.fingerprint
    refused(lambda: data[0], "00000.jpg", "7 bytes")
