"""Any two folders: what is written in them comes back, and nothing that is wrong comes through."""

from __future__ import annotations

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentation_cases import picture, refused, save

from dit_probe.datasets import samples
from dit_probe.datasets.segmentation import VOID, DatasetError, ImageMaskFolder, Sample, masks


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


def test_a_picture_that_viewers_turn_is_turned_when_no_mask_goes_with_it(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(samples.read_image(tmp_path / "phone.png", turned="upright"), np.rot90(pixels, -1))
    assert np.array_equal(samples.read_image(tmp_path / "phone.png"), pixels)
    with pytest.raises(DatasetError, match="EXIF orientation"):
        samples.read_image(tmp_path / "phone.png", turned="refused")
