"""Segmentation data: what is written in the true file formats comes back, and nothing that is wrong comes through."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from dit_probe.datasets import samples
from dit_probe.datasets.image_folders import VOC_BACKGROUND, VOC_CLASSES
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, scene
from dit_probe.datasets.segmentation import (
    VOID,
    Dataset,
    DatasetError,
    DavisVideos,
    ImageMaskFolder,
    ImageNetSegmentation,
    PascalVOC,
    PictureBook,
    PictureBookClips,
    Sample,
    masks,
    valid,
)

CLASSES = {"n02085936": "maltese", "n01440764": "tench"}
NAMES = ("n02085936_123", "n01440764_7", "n02085936_9")


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def save(path: Path, numbers: np.ndarray, *, palette: bool = False) -> Path:
    """PNG: an exact picture, a grey mask, or one with a palette as VOC's and DAVIS's have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers)
    if palette:
        image = Image.frombytes("P", numbers.shape[::-1], numbers.astype(np.uint8).tobytes())
        image.putpalette([(37 * number) % 256 for number in range(768)])
    image.save(path)
    return path


def save_jpeg(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write a JPEG and return what it decodes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def refused(build: Any, *words: object) -> str:
    """The message of a DatasetError that holds every word."""
    with pytest.raises(DatasetError) as caught:
        build()
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    return message


# --- ImageNet-Segmentation ------------------------------------------------------------------------------------------


def write_mat(path: Path, images: list[Any], gts: list[Any], names: tuple[str, ...] = NAMES, **change: Any) -> Path:
    """A MATLAB v7.3 file: 512 bytes of MATLAB's own before the HDF5, references, axes reversed, a cell for each gt."""
    with h5py.File(path, "w", userblock_size=512) as file:
        store, kept = file.create_group("#refs#"), []

        def refer(array: Any) -> Any:
            kept.append(store.create_dataset(f"r{len(kept)}", data=array))
            return kept[-1].ref

        def column(name: str, references: list[Any], shape: tuple[int, ...] | None = None) -> None:
            data = np.array(references, dtype=object).reshape(shape or (-1, 1))
            file.create_dataset(f"value/{name}", data=data, dtype=h5py.ref_dtype)

        def cell(array: Any) -> Any:
            holder = store.create_dataset(f"c{len(kept)}", change.get("cell", (1, 1)), dtype=h5py.ref_dtype)
            holder[0, 0] = refer(array)
            return holder.ref

        column("img", [refer(np.asarray(image).transpose()) for image in images])
        column("gt", [cell(np.asarray(gt).transpose()) for gt in gts])
        codes = [np.frombuffer(name.encode("utf-16-le"), "<u2").reshape(-1, 1) for name in names]
        column("id", [refer(code) for code in codes], change.get("id_shape"))
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
    with path.open("r+b") as raw:
        raw.write(head)
    return path


IMAGES = [picture(5, 7, seed=1), picture(4, 6, seed=2), picture(9, 3, seed=3)]
GTS = [np.random.default_rng(9).integers(0, 2, image.shape[:2], dtype=np.uint8) for image in IMAGES]


@pytest.fixture
def mat(tmp_path: Path) -> Path:
    return write_mat(tmp_path / "gtsegs_ijcv.mat", IMAGES, GTS)


def test_imagenet_comes_back_as_it_was_written(mat: Path):
    data: Dataset = ImageNetSegmentation(mat, CLASSES)
    assert len(data) == 3
    assert data.vocabulary == ("maltese", "tench")
    assert data.background == ("background", "floor", "tree", "person", "grass", "face")
    for index, sample in enumerate(ImageNetSegmentation(mat, CLASSES)):
        word = CLASSES[NAMES[index][:9]]
        assert (sample.name, sample.target, sample.labels) == (NAMES[index], (word,), {word: 1})
        assert np.array_equal(sample.image, IMAGES[index])
        assert np.array_equal(sample.mask, GTS[index])
        assert (sample.image.dtype, sample.mask.dtype) == (np.uint8, np.int16)
        assert np.array_equal(masks(sample, word), GTS[index][None] == 1)
        assert valid(sample).all()
    assert data[-1].name == NAMES[2]
    with pytest.raises(IndexError, match="0 to 2"):
        data[3]


def test_imagenet_reads_no_picture_before_it_is_asked(mat: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    follow = ImageNetSegmentation._follow
    monkeypatch.setattr(
        ImageNetSegmentation, "_follow", lambda self, row, column: read.append(column) or follow(self, row, column)
    )
    data = ImageNetSegmentation(mat, CLASSES)
    assert len(data) and data.fingerprint and data.names == NAMES
    assert set(read) == {"id"}
    data[1]
    assert read[-2:] == ["img", "gt"]


def test_imagenet_goes_to_threads_forks_and_other_processes(mat: Path, monkeypatch: pytest.MonkeyPatch):
    data = ImageNetSegmentation(mat, CLASSES)
    first = data._open()
    assert data._open() is first
    with ThreadPoolExecutor(2) as pool:
        handles = list(pool.map(lambda _: data._open(), range(2)))
        read = list(pool.map(lambda index: data[index].image, [0, 1, 2] * 8))
    assert all(handle is not first for handle in handles)
    assert all(np.array_equal(image, IMAGES[index % 3]) for index, image in enumerate(read))

    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint == data.fingerprint
    assert np.array_equal(copy[2].image, IMAGES[2])

    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)[1].image.sum(), 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(data), capture_output=True, check=True)
    assert shown.stdout.decode().split() == [str(IMAGES[1].sum()), "False"]

    process = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: process)  # as if forked
    assert data._open() is not first
    assert np.array_equal(data[0].mask, GTS[0])


@pytest.mark.parametrize(
    "text",
    [
        "n02085936,maltese\nn01440764,tench\n",
        "synset,word\nn02085936,maltese\n\nn01440764,tench\n",
        "n02085936 maltese, Maltese dog\nn01440764 tench, Tinca tinca\n",
        "n02085936\tmaltese\nn01440764\ttench, Tinca tinca\n",
        json.dumps(CLASSES),
        json.dumps({"0": ["n01440764", "tench"], "153": ["n02085936", "maltese"]}),
    ],
    ids=["csv", "heading", "synset_words", "words", "json", "class_index"],
)
def test_imagenet_class_tables(mat: Path, text: str):
    table = mat.with_name("classes.txt")
    table.write_text(text)
    assert ImageNetSegmentation(mat, table).vocabulary == ("maltese", "tench")


def test_imagenet_names_are_shortened(mat: Path):
    table = {"n02085936": "Maltese_dog, Maltese terrier", "n01440764": "tench"}
    refused(lambda: ImageNetSegmentation(mat, table), "n02085936 'Maltese dog'", "rename=")
    data = ImageNetSegmentation(mat, table, rename={"Maltese dog": "dog"})
    assert data.vocabulary == ("dog", "tench")
    assert data.synset(data[0].name) == "n02085936"
    assert data.fingerprint != ImageNetSegmentation(mat, table, rename={"Maltese dog": "pet"}).fingerprint


def test_imagenet_classes_that_are_refused(mat: Path, tmp_path: Path):
    refused(lambda: ImageNetSegmentation(mat), mat, "classes=", "LOC_synset_mapping.txt", "n02085936,maltese")
    refused(lambda: ImageNetSegmentation(mat, {"n02085936": "dog"}), "1 of 2", "n01440764", "words.txt")
    refused(lambda: ImageNetSegmentation(mat, tmp_path / "none.csv"), "none.csv", "n02085936,maltese")
    (tmp_path / "bad.csv").write_text("n02085936,dog\nfish\n")
    refused(lambda: ImageNetSegmentation(mat, tmp_path / "bad.csv"), "entry 2", "'fish'")
    (tmp_path / "bad.json").write_text('{"n02085936": ')
    refused(lambda: ImageNetSegmentation(mat, tmp_path / "bad.json"), "bad.json")
    (tmp_path / "other.json").write_text(json.dumps({"categories": {"frosted bat": "bat"}}))
    refused(lambda: ImageNetSegmentation(mat, tmp_path / "other.json"), "2 of 2")


def test_imagenet_files_that_are_refused(mat: Path, tmp_path: Path):
    refused(lambda: ImageNetSegmentation(tmp_path / "none.mat", CLASSES), "none.mat", "no such file")
    whole = mat.read_bytes()
    for share in (0.0, 0.05, 0.3, 0.7, 0.99):
        mat.write_bytes(whole[: int(share * len(whole))])
        refused(lambda: list(ImageNetSegmentation(mat, CLASSES)), mat, "expected HDF5")
    mat.write_bytes(b"MATLAB 5.0 MAT-file".ljust(4000))
    refused(lambda: ImageNetSegmentation(mat, CLASSES), mat, "not older")
    mat.write_bytes(whole)
    with h5py.File(mat, "r+") as file:
        del file["value/gt"]
    refused(lambda: ImageNetSegmentation(mat, CLASSES), mat, "/value/gt")
    with h5py.File(mat, "r+") as file:
        file["value/gt"] = np.zeros((3, 1))
    refused(lambda: ImageNetSegmentation(mat, CLASSES), "object references")
    with h5py.File(mat, "r+") as file:
        del file["value/gt"]
        file.create_dataset("value/gt", (2, 1), dtype=h5py.ref_dtype)
    refused(lambda: ImageNetSegmentation(mat, CLASSES), "(2, 1)", "equally long")
    refused(lambda: ImageNetSegmentation(write_mat(mat, IMAGES, GTS, id_shape=(1, 3)), CLASSES), "(1, 3)", "(n, 1)")
    wrong = write_mat(mat, IMAGES, GTS, names=("dog_1", *NAMES[1:]))
    refused(lambda: ImageNetSegmentation(wrong, CLASSES), "row 0", "'dog_1'")


@pytest.mark.parametrize(
    ("images", "gts", "change", "found"),
    [
        (IMAGES, [GTS[0], GTS[1].transpose(), GTS[2]], {}, "4 x 6 pixels"),
        (IMAGES, [GTS[0], GTS[1] * 2, GTS[2]], {}, "found 2 in the mask, expected 0..1"),
        (IMAGES, [GTS[0], GTS[1] * np.uint8(255), GTS[2]], {}, "found 255 in the mask, expected 0..1"),
        (IMAGES, [GTS[0], GTS[1].astype(float), GTS[2]], {}, "float64"),
        ([IMAGES[0], IMAGES[1][..., 0], IMAGES[2]], GTS, {}, "expected (3, x, y) uint8"),
        ([IMAGES[0], np.dstack([IMAGES[1]] * 2), IMAGES[2]], GTS, {}, "(6, 6, 4)"),
        (IMAGES, GTS, {"cell": (2, 1)}, "(2, 1)"),
    ],
    ids=["sizes", "label", "stretched", "type", "grey", "channels", "cell"],
)
def test_imagenet_rows_that_are_refused(tmp_path: Path, images: Any, gts: Any, change: dict[str, Any], found: str):
    data = ImageNetSegmentation(write_mat(tmp_path / "gtsegs.mat", images, gts, **change), CLASSES)
    refused(lambda: data[1], "gtsegs.mat, row 1", found)


def test_imagenet_reference_to_nothing_is_refused(mat: Path):
    with h5py.File(mat, "r+") as file:
        column: Any = file["value/img"]
        column[1, 0] = h5py.Reference()
    data = ImageNetSegmentation(mat, CLASSES)
    refused(lambda: data[1], mat, "row 1", "/value/img")
    assert data[0].name == NAMES[0]


def test_imagenet_a_name_that_comes_twice_stays_unique(tmp_path: Path):
    data = ImageNetSegmentation(write_mat(tmp_path / "g.mat", IMAGES, GTS, names=(NAMES[0], *NAMES[:2])), CLASSES)
    assert data.names == (NAMES[0], f"{NAMES[0]}#1", NAMES[1])
    assert data[1].target == ("maltese",)


def test_imagenet_checksum_is_that_of_sha256sum(mat: Path):
    digest = hashlib.sha256(mat.read_bytes()).hexdigest()
    assert ImageNetSegmentation(mat, CLASSES, checksum=f"sha256:{digest}").checksum() == f"sha256:{digest}"
    other = "sha256:" + "0" * 64
    refused(lambda: ImageNetSegmentation(mat, CLASSES, checksum=other), mat, digest, other)
    for text in ("md5:abc", digest, "sha256:xyz"):
        refused(lambda text=text: ImageNetSegmentation(mat, CLASSES, checksum=text), text, "64 hexadecimal digits")


# --- PascalVOC ------------------------------------------------------------------------------------------------------

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


# --- DAVIS ----------------------------------------------------------------------------------------------------------

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


# --- any two folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    images, annotations = tmp_path / "pictures", tmp_path / "annotations"
    for index, stem in enumerate(("a", "b")):
        save(images / f"{stem}.png", picture(3, 4, seed=index))
    save(annotations / "a.png", np.array([[0, 1, 2, 255]] * 3, dtype=np.uint8))
    save(annotations / "b.png", np.array([[0, 0, 2, 2]] * 3, dtype=np.uint8), palette=True)
    (images / "notes.txt").write_text("no picture")
    (images / "._a.png").write_bytes(b"left by macOS")
    return images, annotations


def test_folder_of_labels(pair: tuple[Path, Path]):
    data = ImageMaskFolder(*pair, words={"boat": 1, "sun": 2}, background=["sky"])
    assert (data.name, data.names, data.vocabulary, data.background) == (
        "pictures",
        ("a", "b"),
        ("boat", "sun"),
        ("sky",),
    )
    first, second = data
    assert np.array_equal(first.mask, [[0, 1, 2, VOID]] * 3)
    assert np.array_equal(second.mask, [[0, 0, 2, 2]] * 3)
    assert np.array_equal(second.image, picture(3, 4, seed=1))
    assert (first.target, second.target) == (("boat", "sun"), ("sun",))
    assert not masks(second, "boat").any()
    copy = pickle.loads(pickle.dumps(ImageMaskFolder(*pair, words={"boat": 1, "sun": 2}, checksum=data.checksum())))
    assert np.array_equal(copy[0].image, first.image)


@pytest.mark.parametrize("kind", ["grey", "one", "bilevel", "palette"])
def test_folder_of_binary_masks(pair: tuple[Path, Path], kind: str):
    annotations = pair[1]
    truth = {"a": np.array([[0, 1, 1, 0]] * 3, dtype=np.uint8), "b": np.zeros((3, 4), dtype=np.uint8)}
    for stem, mask in truth.items():
        numbers = {"grey": mask * 255, "one": mask, "bilevel": mask.astype(bool), "palette": mask * 255}[kind]
        save(annotations / f"{stem}.png", numbers, palette=kind == "palette")
    for words in ("dog", {"a": "dog", "b": "cat"}):
        first, second = ImageMaskFolder(*pair, words=words)
        assert np.array_equal(first.mask, truth["a"])
        assert np.array_equal(second.mask, truth["b"])
        assert (first.target, first.labels, second.target) == (("dog",), {"dog": 1}, ())
    assert ImageMaskFolder(*pair, words={"a": "dog", "b": "cat"}).vocabulary == ("dog", "cat")


def test_folder_words_that_are_refused(pair: tuple[Path, Path]):
    for words in ({}, {"a": "dog"}, ""):
        refused(lambda words=words: ImageMaskFolder(*pair, words=words), "have no word", "words='dog'")
    for words in ({"dog": 0}, {"dog": 255}, {"dog": 1, "cat": 1}, {"dog": -1}, {"dog": 1, "a": "cat"}, {"dog": 40000}):
        refused(lambda words=words: ImageMaskFolder(*pair, words=words), "dog", "its own label")
    refused(lambda: ImageMaskFolder(*pair, words={"boat": 1})[0], pair[1] / "a.png", "found 2", "0..1 or 255 (void)")
    refused(lambda: ImageMaskFolder(*pair, words="dog")[0], pair[1] / "a.png", "found 2, 255", "expected 0..1")


def test_folder_files_that_are_refused(pair: tuple[Path, Path]):
    images, annotations = pair
    words = {"boat": 1, "sun": 2}

    def read() -> list[Sample]:
        return list(ImageMaskFolder(*pair, words=words))

    refused(lambda: ImageMaskFolder(images / "none", annotations, words=words), images / "none", "cannot be listed")
    save(images / "c.png", picture(3, 4))
    refused(read, annotations, "1 of 3", "c")
    (images / "c.png").rename(images / "b.bmp")
    refused(read, images, "b.", "expected one for each name")
    (images / "b.bmp").unlink()
    save(annotations / "c.png", np.zeros((3, 4), dtype=np.uint8))
    refused(read, images, "1 of 3", "c")
    (annotations / "c.png").unlink()

    Image.fromarray(np.zeros((3, 4), dtype=np.uint8)).save(annotations / "b.jpg")
    (annotations / "b.png").unlink()
    refused(read, annotations / "b.jpg", "JPEG", "PNG")
    (annotations / "b.jpg").unlink()
    save(annotations / "b.png", np.zeros((4, 3), dtype=np.uint8))
    refused(read, annotations / "b.png", "3 x 4", "4 x 3", images / "b.png")
    save(annotations / "b.png", np.zeros((3, 4), dtype=np.uint8))

    save(images / "b.png", np.dstack([picture(3, 4), np.full((3, 4), 7, dtype=np.uint8)]))
    refused(read, images / "b.png", "transparent")
    save(images / "b.png", np.dstack([picture(3, 4), np.full((3, 4), 255, dtype=np.uint8)]))
    assert np.array_equal(read()[1].image, picture(3, 4))
    save(images / "b.png", np.full((3, 4), 60000, dtype=np.uint16))
    refused(read, images / "b.png", "more than 8 bits")
    exif = Image.Exif()
    exif[0x112] = 3
    Image.fromarray(picture(3, 4)).save(images / "b.png", exif=exif)
    refused(read, images / "b.png", "EXIF orientation")
    for path in images.glob("*.png"):
        path.unlink()
    refused(read, images, "no pictures")


def test_masks_of_16_bits_keep_their_numbers(pair: tuple[Path, Path]):
    save(pair[1] / "a.png", np.array([[0, 300, 2, 255]] * 3, dtype=np.uint16))
    assert np.array_equal(ImageMaskFolder(*pair, words={"boat": 300, "sun": 2})[0].mask, [[0, 300, 2, VOID]] * 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits_keep_their_numbers(pair: tuple[Path, Path], bits: int):
    rows = {2: bytes([0, 0b00_01_10_00]), 4: bytes([0, 0x01, 0x20])}[bits]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, bits, 0, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(rows * 3)) + chunk(b"IEND", b"")
    (pair[1] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + content)
    assert np.array_equal(ImageMaskFolder(*pair, words={"boat": 1, "sun": 2})[0].mask, [[0, 1, 2, 0]] * 3)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_cut_and_damaged_pictures_are_refused_or_whole(tmp_path: Path, suffix: str):
    pixels = picture(40, 50)
    path = tmp_path / f"p.{suffix}"
    Image.fromarray(pixels).save(path)
    whole, expected = path.read_bytes(), samples.read_image(path)
    rng, refusals = np.random.default_rng(0), []
    for trial in range(60):
        length = int(rng.integers(len(whole) - 12))
        damaged = bytearray(whole[:length] if trial % 2 else whole)
        if trial % 2 == 0:
            damaged[int(rng.integers(100))] ^= 255
        path.write_bytes(damaged)
        try:
            found = samples.read_image(path)
        except DatasetError as error:
            refusals.append(str(error))
        else:
            assert trial % 2 == 0 or np.array_equal(found, expected)
    assert len(refusals) >= 30
    assert all(str(path) in message for message in refusals)


# --- drawn ----------------------------------------------------------------------------------------------------------


def test_picture_book_is_its_scenes():
    data: Dataset = PictureBook(4, seed=2)
    assert (len(data), data.vocabulary, data.background) == (4, NOUNS, BACKGROUNDS)
    for index in range(4):
        sample, drawn = data[index], scene(2_000_000 + index)
        assert sample.name == f"scene/{index:05d}"
        assert np.array_equal(sample.image, drawn.image)
        assert sample.target == tuple(drawn.masks)
        assert np.array_equal(masks(sample, sample.target), list(drawn.masks.values()))
        assert np.array_equal(masks(sample, drawn.background)[0], drawn.background_mask)
        assert set(sample.labels) == {*NOUNS, drawn.background}
        absent = next(noun for noun in NOUNS if noun not in drawn.masks)
        assert not masks(sample, absent).any()


def test_picture_book_clips_are_videos():
    data = PictureBookClips(2, objects=["boat"], frames=3)
    sample = pickle.loads(pickle.dumps(data))[1]
    assert (sample.name, sample.target) == ("clip/00001", ("boat",))
    assert (sample.image.shape, sample.mask.shape) == ((3, 32, 32, 3), (3, 32, 32))
    assert masks(sample, ["boat"]).any(axis=(2, 3)).all()


def test_drawn_fingerprints_tell_what_is_drawn():
    same, *others = (
        data.fingerprint
        for data in (
            PictureBook(3),
            PictureBook(4),
            PictureBook(3, seed=2),
            PictureBook(3, size=32),
            PictureBookClips(3),
        )
    )
    assert same == PictureBook(3).fingerprint
    assert len({same, *others}) == 5


def test_import_is_light():
    code = (
        "import sys, dit_probe.datasets.segmentation\n"
        "print([name for name in ('torch', 'h5py', 'diffusers', 'xarray') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_without_h5py_the_error_says_what_to_install(mat: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(lambda: ImageNetSegmentation(mat, CLASSES), "pip install 'dit-probe[eval]'")
