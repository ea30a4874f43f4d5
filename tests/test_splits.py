"""Parts of a data set: one to choose on, one to report, and the first so many."""

from __future__ import annotations

import numpy as np
import pytest

from dit_probe.datasets.samples import DatasetError
from dit_probe.datasets.segmentation import Part, PictureBook, split


def names(data) -> set[str]:
    return set(data.names)


def test_a_split_is_disjoint_whole_and_near_its_share():
    data = PictureBook(2000)
    choosing, reported = split(data, 0.25)
    assert not names(choosing) & names(reported)
    assert names(choosing) | names(reported) == set(data.names)
    assert abs(len(choosing) - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)
    assert (choosing.name, reported.name) == ("picture-book-scenes-1-choosing", "picture-book-scenes-1-reported")
    assert choosing.vocabulary == data.vocabulary and choosing.background == data.background


def test_a_sample_stays_where_it_is():
    small, large = split(PictureBook(300)), split(PictureBook(900))
    for kept, whole in zip(small, large, strict=True):
        assert names(kept) == names(whole) & set(PictureBook(300).names)
    backwards = split(Part(PictureBook(300), range(299, -1, -1), "backwards"))
    assert [names(part) for part in backwards] == [names(part) for part in small]
    assert names(small[0]) <= names(split(PictureBook(300), 0.3)[0])  # a larger share has the same ones and more
    assert names(split(PictureBook(300), seed=1)[0]) != names(small[0])
    # Written down: it has to be the same in every version and on every machine.
    assert small[0].names[:5] == ("scene/00001", "scene/00017", "scene/00019", "scene/00027", "scene/00028")


def test_samples_without_names_are_split_by_index():
    class Bare:
        name, vocabulary, background, fingerprint = "bare", (), (), "sha256:0"

        def __len__(self):
            return 50

        def __getitem__(self, index, /):
            raise AssertionError("read")

    choosing, reported = split(Bare())
    assert sorted(choosing.indices + reported.indices) == list(range(50))
    assert not hasattr(choosing, "names")


def test_a_part_reads_what_it_is_asked_for():
    class Noting(PictureBook):
        read: list[int]

        def _read(self, position):
            self.read.append(position)
            return super()._read(position)

    data = Noting(10)
    data.read = []
    part = Part(data, [7, -1, 2], "three")
    assert (len(part), part.names, part.indices, data.read) == (
        3,
        ("scene/00007", "scene/00009", "scene/00002"),
        (7, 9, 2),
        [],
    )
    assert part[1].name == "scene/00009" and part[-1].name == "scene/00002"
    assert [sample.name for sample in part] == list(part.names)
    np.testing.assert_array_equal(part[0].image, PictureBook(10)[7].image)
    with pytest.raises(IndexError):
        part[3]


def test_fingerprints_tell_parts_apart():
    data = PictureBook(10)
    parts = [Part(data, range(5), "a"), Part(data, range(6), "a"), Part(data, [1, 0], "a"), Part(data, [0, 1], "a")]
    parts += [Part(PictureBook(10, seed=2), range(5), "a")]
    assert len({part.fingerprint for part in parts} | {data.fingerprint}) == 6
    assert Part(PictureBook(10), range(5), "b").fingerprint == parts[0].fingerprint


def test_what_is_no_part():
    data = PictureBook(3)
    for indices, said in (([0, 3], "3"), ([-4], "-1"), ([1, 1, -2], "1"), ([0, -3], "0")):
        with pytest.raises(DatasetError, match=f"mine: found the indices {said}, which picture-book-scenes-1 does not"):
            Part(data, indices, "mine")
    for share in (0, 1, -0.1, 10):
        with pytest.raises(
            DatasetError, match=f"share={share} of picture-book-scenes-1: give a number between 0 and 1"
        ):
            split(data, share)
    with pytest.raises(DatasetError, match="leave all 3 samples of picture-book-scenes-1 in one part"):
        split(data, 0.001)
