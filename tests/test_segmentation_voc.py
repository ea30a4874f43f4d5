"""PascalVOC: what is written in a development kit comes back, and nothing that is wrong comes through."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_cases import picture, refused, save, save_jpeg

from dit_probe.datasets.image_folders import VOC_BACKGROUND, VOC_CLASSES
from dit_probe.datasets.segmentation import VOID, Dataset, PascalVOC, masks, valid

VOC = {
    "2007_000033": [0, 1, 255],  # one class and void
    "2007_000042": [0, 19, 15],
    "2007_000061": [4, 4, 4],  # one class and no background
    "2007_000123": [19, 15, 19],  # two classes and no background: single-class by the published rule
    "2007_000129": [0, 0, 255],
}


def voc_mask(numbers: list[int]) -> np.ndarray:
    return np.repeat(np.array(numbers, dtype=np.uint8), 4)[None].repeat(6, axis=0)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for index, (name, numbers) in enumerate(VOC.items()):
        save_jpeg(folder / "JPEGImages" / f"{name}.jpg", picture(6, 12, seed=index))
        save(folder / "SegmentationClass" / f"{name}.png", voc_mask(numbers), palette=True)
    save_jpeg(folder / "JPEGImages" / "2008_000001.jpg", picture(3, 3))  # a picture without segmentation
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name} \n" for name in VOC))
    return folder


def test_voc_comes_back_as_it_was_written(devkit: Path):
    data: Dataset = PascalVOC(devkit.parent.parent)
    assert [PascalVOC(root).names for root in (devkit, devkit.parent)] == [tuple(VOC)] * 2
    assert data.background == VOC_BACKGROUND == ("background", "floor", "grass", "tree", "sky")
    assert data.vocabulary == VOC_CLASSES
    assert (len(VOC_CLASSES), VOC_CLASSES[0], VOC_CLASSES[14], VOC_CLASSES[19]) == (20, "plane", "person", "monitor")
    for index, (name, numbers) in enumerate(VOC.items()):
        sample = data[index]
        expected = voc_mask(numbers).astype(int)
        assert sample.name == name
        assert np.array_equal(sample.mask, np.where(expected == 255, VOID, expected))
        assert np.array_equal(valid(sample), expected != 255)
        with Image.open(devkit / "JPEGImages" / f"{name}.jpg") as image:
            assert np.array_equal(sample.image, np.asarray(image))
    assert [data[index].target for index in range(5)] == [
        ("plane",),
        ("person", "train"),
        ("boat",),
        ("person", "train"),
        (),
    ]
    found = masks(data[1], ["train", "cat"])
    assert np.array_equal(found[0], voc_mask(VOC["2007_000042"]) == 19)
    assert not found[1].any()
    refused(lambda: masks(data[1], ["train", "sky"]), "2007_000042", "'sky'")
    assert masks(data[1], []).shape == (0, 6, 12)


def test_voc_single_class_is_of_full_size_masks_and_can_be_published(devkit: Path):
    data = PascalVOC(devkit, subset="single_class")
    assert data.single_class_ids() == data.names == ("2007_000033", "2007_000061")
    assert PascalVOC(devkit).single_class_ids() == data.names
    assert [sample.target for sample in data] == [("plane",), ("boat",)]
    published = devkit.parent / "ids.txt"
    published.write_text("\n".join(data.single_class_ids()))
    assert PascalVOC(devkit, subset=published).names == PascalVOC(devkit, subset=list(data.names)).names == data.names
    assert PascalVOC(devkit).fingerprint != data.fingerprint
    refused(lambda: PascalVOC(devkit, subset=["2007_000033", "2008_000001"]), "2008_000001", "ids of val")
    refused(lambda: PascalVOC(devkit, subset=["2007_000033"] * 2), "2007_000033", "each once")


def test_voc_opens_without_reading_pictures(devkit: Path, monkeypatch: pytest.MonkeyPatch):
    for path in devkit.glob("*/*.??g"):
        path.write_bytes(b"")
    data = PascalVOC(devkit, subset="single_class")
    assert pickle.loads(pickle.dumps(data)).name == "pascal-voc-2012-val-single-class"
    refused(lambda: len(data), "2007_000033.png", "0 bytes")
    refused(lambda: PascalVOC(devkit)[2], "2007_000061.jpg", "0 bytes")


def test_voc_that_is_refused(devkit: Path, tmp_path: Path):
    refused(lambda: PascalVOC(tmp_path / "none"), tmp_path / "none", "VOCdevkit")
    refused(lambda: PascalVOC(devkit, split="test"), "test.txt")
    listed = devkit / "ImageSets" / "Segmentation"
    (listed / "twice.txt").write_text("2007_000033\n2007_000033\n")
    refused(lambda: PascalVOC(devkit, split="twice"), "twice.txt", "2007_000033", "each once")
    (listed / "class.txt").write_text("2007_000033 -1\n")
    refused(lambda: PascalVOC(devkit, split="class"), "class.txt", "2007_000033 -1")
    (listed / "empty.txt").write_text("\n")
    refused(lambda: PascalVOC(devkit, split="empty"), "empty.txt", "no names")
    (listed / "bare.txt").write_text("2008_000001\n")
    refused(lambda: PascalVOC(devkit, split="bare"), "SegmentationClass", "2008_000001", "1 of 1")
    mask = devkit / "SegmentationClass" / "2007_000033.png"
    save(mask, voc_mask([0, 21, 1]), palette=True)
    refused(lambda: PascalVOC(devkit)[0], mask, "found 21", "0..20 or 255 (void)")
    save(mask, voc_mask([0, 1, 1])[:, 1:], palette=True)
    refused(lambda: PascalVOC(devkit)[0], mask, "11 x 6", "12 x 6", "2007_000033.jpg")
    save(mask, picture(6, 12))
    refused(lambda: PascalVOC(devkit)[0], mask, "mode RGB", "palette")
    mask.unlink()
    refused(lambda: PascalVOC(devkit), "SegmentationClass", "2007_000033")
    shutil.rmtree(devkit / "JPEGImages")
    refused(lambda: PascalVOC(devkit), "JPEGImages", "cannot be listed")


def test_voc_checksum_and_fingerprint(devkit: Path, tmp_path: Path):
    data = PascalVOC(devkit)
    # what `sha256sum` prints about the files, in the order of their paths
    listing = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(devkit).as_posix()}\n"
        for path in sorted(data.files, key=lambda path: path.relative_to(devkit).as_posix())
    )
    assert data.checksum() == "sha256:" + hashlib.sha256(listing.encode()).hexdigest()
    moved = shutil.copytree(devkit, tmp_path / "elsewhere" / "VOC2012")
    copy = PascalVOC(moved, checksum=data.checksum())
    assert copy.fingerprint == data.fingerprint
    path = moved / "JPEGImages" / "2007_000033.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    assert PascalVOC(moved).fingerprint != data.fingerprint
    refused(lambda: PascalVOC(moved, checksum=data.checksum()), moved, data.checksum())
