"""ImageNet-Segmentation: what is written in MATLAB's format comes back, and nothing that is wrong comes through."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from segmentation_cases import picture, refused

from dit_probe.datasets.segmentation import Dataset, ImageNetSegmentation, masks, valid

CLASSES = {"n02085936": "maltese", "n01440764": "tench"}
NAMES = ("n02085936_123", "n01440764_7", "n02085936_9")


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


def test_without_h5py_the_error_says_what_to_install(mat: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(lambda: ImageNetSegmentation(mat, CLASSES), "pip install 'dit-probe[eval]'")
