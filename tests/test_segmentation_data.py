"""Segmentation data that is drawn, and what it costs to import the readers."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np

from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, scene
from dit_probe.datasets.segmentation import Dataset, PictureBook, PictureBookClips, masks


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
