"""A data set from its place: told apart by what is there, refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_probe.datasets.opening import open_dataset
from dit_probe.datasets.samples import DatasetError
from dit_probe.datasets.segmentation import DavisVideos, ImageMaskFolder, PascalVOC, PictureBook, PictureBookClips


def draw(path: Path, numbers: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers.astype(np.uint8)).save(path)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((6, 8))
    mask[2:4, 2:5] = 1
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3)), mask


def test_drawn_scenes_have_the_number_the_seed_and_the_objects_asked_for():
    scenes = open_dataset("picture-book", count=3, seed=9, objects=2)
    assert isinstance(scenes, PictureBook)
    assert len(scenes) == 3
    assert all(len(sample.target) == 2 for sample in scenes)
    np.testing.assert_array_equal(scenes[1].image, PictureBook(3, 9, objects=2)[1].image)
    assert isinstance(open_dataset("picture-book-clips", count=1), PictureBookClips)


def test_a_voc_devkit_is_known_by_its_folders(tmp_path: Path, pair):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    draw(root / "JPEGImages" / "a.jpg", pair[0])
    draw(root / "SegmentationClass" / "a.png", pair[1])
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    found = open_dataset(tmp_path, subset="single_class")
    assert isinstance(found, PascalVOC)
    assert found.name.endswith("single-class")
    assert found[0].target == ("plane",)


def test_davis_and_folders_of_masks_take_words_or_a_file_of_them(tmp_path: Path, pair):
    davis, folder = tmp_path / "davis", tmp_path / "folder"
    draw(davis / "JPEGImages" / "480p" / "camel" / "00000.jpg", pair[0])
    draw(davis / "Annotations" / "480p" / "camel" / "00000.png", 255 * pair[1])
    (tmp_path / "words.json").write_text(json.dumps({"camel": "camel"}))
    found = open_dataset(davis, words=str(tmp_path / "words.json"))
    assert isinstance(found, DavisVideos)
    assert found[0].target == ("camel",)
    draw(folder / "images" / "a.png", pair[0])
    draw(folder / "masks" / "a.png", pair[1])
    found = open_dataset(folder, words="dog")
    assert isinstance(found, ImageMaskFolder)
    assert found[0].target == ("dog",)


def test_what_is_not_there_or_not_known_is_refused_by_name(tmp_path: Path, pair):
    with pytest.raises(DatasetError, match="nowhere: found no such file"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="a folder of something else, expected picture-book"):
        open_dataset(tmp_path)
    draw(tmp_path / "images" / "a.png", pair[0])
    draw(tmp_path / "masks" / "a.png", pair[1])
    with pytest.raises(DatasetError, match="no words for them"):
        open_dataset(tmp_path)
    (tmp_path / "words.json").write_text("[1, 2]")
    with pytest.raises(DatasetError, match="found a JSON list"):
        open_dataset(tmp_path, words=str(tmp_path / "words.json"))
    (tmp_path / "broken.mat").write_text("not HDF5")
    (tmp_path / "table.json").write_text('{"categories": {"maltese": "dog"}}')
    with pytest.raises(DatasetError, match=r"broken\.mat"):
        open_dataset(tmp_path / "broken.mat", classes=tmp_path / "words.json", rename=tmp_path / "table.json")
