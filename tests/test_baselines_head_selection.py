"""Heads that find words are found, by masks and without, and their mean is the mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import xarray as xr

import dit_probe as dp
from dit_probe.datasets.samples import Sample, split
from dit_probe.datasets.segmentation import PictureBook
from dit_probe.errors import MapError
from probes.baselines.head_selection import SelectedHeads, rank_heads, select_heads, separation

BOOK = PictureBook(8, seed=5, objects=2)
GOOD, SWAPPED, LAYERS, HEADS = (7, 1), (3, 2), (3, 7), 4


@cache
def drawn() -> dict[bytes, Sample]:
    return {sample.image.tobytes(): sample for sample in BOOK}


@dataclass(frozen=True)
class Planted(dp.methods.Baseline):
    """Noise on 16 x 16 tokens, but for a head that knows the masks and one that gives each word the other's."""

    joined: bool = False  # layer and head as one dim
    agnostic: bool = False

    kind = "probability"
    architecture = "none"
    forwards = 2

    def __post_init__(self):
        object.__setattr__(self, "class_agnostic", self.agnostic)

    def describe(self):
        return f"Planted({self.joined})"

    def forward(self, image):
        return image.shape

    def scores(self, images, concepts):
        random = np.random.default_rng(len(concepts))
        shape = (len(images), len(concepts), 2, len(LAYERS), HEADS, 16, 16)
        dims = ("image", "concept", "timestep", "layer", "head", "y", "x")
        labels = {"concept": list(concepts), "timestep": [100, 900], "layer": list(LAYERS), "head": range(HEADS)}
        found = xr.DataArray(random.uniform(0.5, 1, shape), labels, dims)
        for at, image in enumerate(images):
            sample = drawn()[image.tobytes()]
            tokens = [(sample.mask == sample.labels[word]).reshape(16, 4, 16, 4).mean((1, 3)) for word in sample.target]
            for (layer, head), maps in ((GOOD, tokens), (SWAPPED, tokens[::-1])):
                for word, token in zip(sample.target, maps, strict=True):
                    found[at].loc[{"concept": word, "layer": layer, "head": head}] *= 0.1 + token
        return found.stack(layer_head=("layer", "head")) if self.joined else found


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("criterion", ["auroc", "ap"])
def test_the_head_that_knows_the_masks_comes_first(joined, criterion):
    ranked = rank_heads(Planted(joined), BOOK, criterion)
    assert ranked.layer_head.values[0] == GOOD and ranked.sizes["layer_head"] == 8
    assert ranked.attrs["pictures"] == 8 and (np.diff(ranked) <= 0).all()
    assert float(ranked.sel(layer_head=SWAPPED)) < 0.5 < float(ranked[0])
    best = select_heads(Planted(joined), BOOK, count=3, criterion=criterion)
    assert best.heads == tuple(ranked.layer_head.values[:3])


def test_a_criterion_is_the_mean_over_words_and_pictures():
    ranked, method, by_picture = rank_heads(Planted(), BOOK, concepts=[]), Planted(), []
    for sample in BOOK:
        maps = method.scores([sample.image], list(sample.target))[0].mean("timestep").sel(layer=7, head=0).values
        each = []
        for word, one in zip(sample.target, maps, strict=True):
            inside = (sample.mask == sample.labels[word]).ravel()
            value = one.repeat(4, 0).repeat(4, 1).ravel()
            pairs = value[inside][:, None] - value[~inside]
            each.append(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
        by_picture.append(np.mean(each))
    assert float(ranked.sel(layer_head=(7, 0))) == pytest.approx(np.mean(by_picture))


def test_separation_finds_heads_that_tell_words_apart_right_or_wrong():
    ranked = rank_heads(Planted(), BOOK, "separation", concepts=[])
    assert {*ranked.layer_head.values[:2]} == {GOOD, SWAPPED}
    assert float(ranked[1]) > 4 * float(ranked[2])


def test_separation_is_the_information_that_a_place_gives_about_the_word():
    maps = np.random.default_rng(0).uniform(size=(3, 2, 4, 5))
    found = separation(xr.DataArray(maps, dims=("concept", "layer_head", "y", "x")))
    for head in range(2):
        p = maps[:, head].reshape(3, -1) / maps[:, head].reshape(3, -1).sum(1, keepdims=True) / 3  # p(word, place)
        information = (p * np.log(p / (p.sum(0) * p.sum(1, keepdims=True)))).sum()
        assert float(found[head]) == pytest.approx(information / np.log(3))
    one = xr.DataArray(np.ones((2, 1, 2)), dims=("concept", "y", "x"))
    for wrong in (one[:1], one - 2):
        with pytest.raises(MapError, match="two words or more"):
            separation(wrong)


@pytest.mark.parametrize("joined", [False, True])
def test_the_map_is_the_mean_over_the_chosen_heads(joined):
    method, images, words = Planted(joined), [BOOK[0].image, BOOK[1].image], ["sun", *BOOK[0].target, *BOOK[1].target]
    words = list(dict.fromkeys(words))
    chosen = SelectedHeads(method, ((7, 1), (3, 0)))
    whole = Planted().scores(images, words)
    expected = (whole.sel(layer=7, head=1) + whole.sel(layer=3, head=0)).mean("timestep") / 2
    np.testing.assert_allclose(chosen(images, words), expected)
    found = chosen.scores(images, words)
    assert found.sizes["layer_head"] == 2 and found.sizes["timestep"] == 2
    assert found["layer"].values.tolist() == [7, 3] and found["head"].values.tolist() == [1, 0]


def test_what_is_not_decided_has_no_say():
    class Voided(list):
        name = "voided"

    plain = rank_heads(Planted(), [*BOOK], concepts=[])
    voided = Voided(replace(sample, mask=np.where(sample.mask == 0, -1, sample.mask).astype("i2")) for sample in BOOK)
    heads = rank_heads(Planted(), voided, concepts=[])
    assert not np.allclose(heads.sel(layer_head=SWAPPED), plain.sel(layer_head=SWAPPED))
    assert float(heads.sel(layer_head=SWAPPED)) < 0.05  # the other object is all there is beside a word
    nothing = replace(BOOK[0], target=())
    ranked = rank_heads(Planted(), [*BOOK, nothing], concepts=[])
    assert ranked.attrs["pictures"] == 8
    np.testing.assert_array_equal(ranked, plain)


def test_maps_whose_tokens_no_pixels_fill_are_ranked_too():
    rough = [replace(sample, mask=sample.mask[:, :60]) for sample in BOOK]
    assert rank_heads(Planted(), rough, concepts=[]).layer_head.values[0] == GOOD


def test_it_says_what_was_chosen_and_on_what():
    choosing, reported = split(BOOK, share=0.5)
    best = select_heads(Planted(), choosing, count=2)
    assert best.chosen == f"by auroc on {len(choosing)} pictures of {choosing.name}"
    assert best.chosen in best.describe() and "[[7, 1]" in best.describe() and "Planted" in best.describe()
    assert best.describe() != select_heads(Planted(), choosing, count=1).describe()
    found = dp.evaluate({"all": Planted(), "best": replace(best, heads=best.heads[:1])}, reported, progress=False)
    assert (found.auroc.sel({"method": "best"}) > found.auroc.sel({"method": "all"})).all()


def test_it_is_what_its_method_is():
    chosen = SelectedHeads(Planted(agnostic=True), (GOOD,))
    assert (chosen.class_agnostic, chosen.kind, chosen.forwards) == (True, "probability", 2)
    assert chosen.forward(np.zeros((2, 3, 3))) == (2, 3, 3)


def test_wrong_use_is_said():
    @dataclass(frozen=True)
    class Flat(Planted):
        def scores(self, images, concepts):
            return super().scores(images, concepts).mean("head")

    with pytest.raises(MapError, match="axes .* have no head, so that no heads can be chosen"):
        rank_heads(Flat(), BOOK)
    with pytest.raises(MapError, match="criterion='entropy'"):
        rank_heads(Planted(), BOOK, "entropy")  # pyright: ignore[reportArgumentType]
    for count in (0, 9):
        with pytest.raises(MapError, match=f"count={count}: 8 heads"):
            select_heads(Planted(), BOOK, count=count)
    with pytest.raises(MapError, match="no picture with words among 0"):
        select_heads(Planted(), [])
    filled = Sample("all", BOOK[0].image, np.ones((64, 64), "i2"), ("sun",), {"sun": 1})
    with pytest.raises(MapError, match="auroc is undefined on all 1 pictures"):
        rank_heads(_Constant(), [filled])
    for heads in ((), (GOOD, GOOD)):
        with pytest.raises(MapError, match="each once"):
            SelectedHeads(Planted(), heads)
    with pytest.raises(MapError, match=r"no head \(5, 0\) .* layers \[3, 7\]"):
        SelectedHeads(Planted(), ((5, 0),)).scores([BOOK[0].image], BOOK[0].target)


@dataclass(frozen=True)
class _Constant(Planted):
    def scores(self, images, concepts):
        dims = ("image", "concept", "layer", "head", "y", "x")
        return xr.DataArray(np.ones((1, len(concepts), 1, 1, 4, 4)), {"concept": list(concepts)}, dims)
