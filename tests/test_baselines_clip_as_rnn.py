"""CLIP as RNN: its recurrence on planted answers, its classifier on a tiny CLIP, its marks and its CRF by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import dit_probe as dp
from probes.baselines.clip_as_rnn import ClipAsRNN
from probes.baselines.clip_es import ClipES
from probes.baselines.dense_crf import DenseCRF
from probes.baselines.visual_prompts import SIGMA, prompted
from tests.baselines_vit_cases import model, picture, vit

WORDS = ["sun", "boat", "water", "tree"]


def proposer(**settings) -> ClipES:
    return ClipES(vit("CLIPModel"), **{"background": ["sky", "road"], **settings})


def made(**settings) -> ClipAsRNN:
    return ClipAsRNN(vit("CLIPModel"), proposer(), **settings)


@dataclass(frozen=True)
class Planted(ClipAsRNN):
    """A classifier whose answers to a list of words are known."""

    answers: dict[tuple[str, ...], list[float]] = field(default_factory=dict)
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def alignment(self, image, masks, concepts):
        assert masks.shape == (len(concepts), 3, 3) and (masks.amax((1, 2)) == 1).all()
        self.asked.append(tuple(concepts))
        return torch.tensor(self.answers[tuple(concepts)])


def planted(answers: dict[tuple[str, ...], list[float]], **settings) -> Planted:
    return Planted(vit("CLIPModel"), proposer(), answers=answers, **settings)


def proposed(words: list[str]) -> np.ndarray:
    """CLIP-ES of some words alone, brought to 0..1."""
    maps = proposer()([picture()], words).values[0]
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return (maps - low) / (high - low)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_words_that_their_masks_do_not_bear_out_are_dropped_until_none_is():
    three, two = ["sun", "boat", "tree"], ["sun", "tree"]
    method = planted({(*WORDS,): [0.9, 0.7, 0.2, 0.61], (*three,): [0.9, 0.5, 0.8], (*two,): [0.6, 0.7]}, theta=0.6)
    found = method.scores([picture()], WORDS)
    assert method.asked == [(*WORDS,), (*three,), (*two,)]  # and no more, since the last dropped none
    assert found.dims == ("image", "concept", "iteration", "y", "x") and found.iteration.values.tolist() == [
        1,
        2,
        3,
        4,
        5,
    ]
    for iteration, (words, stay) in enumerate([(WORDS, three), (three, two), (two, two), (two, two), (two, two)], 1):
        masks = dict(zip(words, proposed(words), strict=True))
        for word in WORDS:
            close(found.sel(concept=word, iteration=iteration)[0], masks[word] if word in stay else np.zeros((3, 3)))
    whole = method([picture()], WORDS)
    assert whole.dims == ("image", "concept", "y", "x") and found.attrs["rejected"] == 2
    np.testing.assert_array_equal(whole, found[:, :, -1])
    assert np.abs(proposed(WORDS)[0] - proposed(two)[0]).max() > 1e-3  # masks are proposed anew for the words left


def test_the_most_probable_word_stays_where_none_is_probable():
    method = planted({(*WORDS,): [0.1, 0.3, 0.2, 0.0], ("boat",): [0.3]})
    found = method([picture()], WORDS).values[0]
    assert method.asked == [(*WORDS,), ("boat",)]
    close(found[1], proposed(["boat"])[0])
    assert not found[[0, 2, 3]].any()


def test_iterations_are_bounded():
    method = planted({(*WORDS,): [0.9, 0.9, 0.9, 0.1]}, iterations=1)
    found = method.scores([picture()], WORDS)
    assert method.asked == [(*WORDS,)] and found.sizes["iteration"] == 1
    close(found[0, :3, 0], proposed(WORDS)[:3])
    assert not found[0, 3].any()


def test_one_word_is_clip_es():
    found = made().scores([picture()], ["sun"])
    for iteration in range(5):
        close(found[0, 0, iteration], proposed(["sun"])[0])
    close(made()([picture(1), picture()], ["sun"])[1, 0], proposed(["sun"])[0])


def test_alignment_is_the_probability_of_a_word_where_its_mask_is_marked():
    method, image = made(eta=0.5, prompts=["grey", "circle"]), picture()
    masks = torch.rand(3, 6, 5)
    found = method.alignment(image, masks, WORDS[:3])
    twin = model("CLIPModel")
    large = torch.nn.functional.interpolate(masks[None], image.shape[:2], mode="bilinear")[0].numpy()
    for at in range(3):
        marked = method.vit.pixels(prompted(image, large[at] > 0.5, ["grey", "circle"]))
        with torch.no_grad():
            embedded = twin.get_image_features(pixel_values=marked, interpolate_pos_encoding=True).pooler_output
        cosines = torch.nn.functional.cosine_similarity(embedded, method.vit.texts(WORDS[:3]), dim=-1)
        close(found[at], (cosines * torch.tensor(1.0).exp()).softmax(0)[at])
    assert len({round(chance, 4) for chance in found.tolist()}) == 3


def test_the_recurrence_runs_on_the_classifiers_own_answers():
    masks = torch.from_numpy(proposed(WORDS))
    chances = made().alignment(picture(), masks, WORDS)
    theta = float(chances.sort().values[1:3].mean())  # between the second and the third of four
    found = made(theta=theta, iterations=1)([picture()], WORDS).values[0]
    np.testing.assert_array_equal(found.any((1, 2)), chances.numpy() >= theta)


def test_marks_change_what_they_say():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[10:20, 20:33] = True
    grey, black, blurred = (prompted(image, mask, [name]) for name in ("grey", "black", "blur"))
    for marked in (grey, black, blurred):
        assert marked.dtype == np.uint8
        np.testing.assert_array_equal(marked[mask], image[mask])
    assert not black[~mask].any()
    luma = image @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(grey[~mask], np.repeat(luma[~mask][:, None], 3, 1), atol=1)
    smooth = ndimage.gaussian_filter(image.astype(float), (SIGMA, SIGMA, 0), mode="nearest")
    assert np.abs(blurred[~mask] - smooth[~mask]).mean() < 3 < 30 < np.abs(image[~mask] - smooth[~mask]).mean()


def test_a_circle_goes_around_its_region():
    image, mask = np.full((40, 50, 3), 90, np.uint8), np.zeros((40, 50), bool)
    mask[10:21, 20:35] = True  # 11 high and 15 wide, around (15, 27)
    marked = prompted(image, mask, ["circle"])
    rows, columns = np.nonzero((marked != image).any(-1))
    assert (marked[rows, columns] == [255, 0, 0]).all()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15 - 5, 15 + 5, 27 - 7, 27 + 7)
    radius = np.hypot((rows - 15) / 5, (columns - 27) / 7)
    assert radius.min() > 0.75 and radius.max() < 1.25
    both = prompted(image, mask, ["black", "circle"])
    assert (both[rows, columns] == [255, 0, 0]).all() and not both[0].any()


def test_where_nothing_is_marked_the_picture_stays():
    np.testing.assert_array_equal(prompted(picture(), np.zeros((18, 25), bool), ["black", "circle"]), picture())


@pytest.mark.parametrize("updates", [1, 4])
def test_the_crf_is_its_equation(updates: int):
    draw = np.random.default_rng(0)
    image, chances = draw.integers(0, 60, (5, 6, 3), np.uint8), draw.dirichlet([1, 1, 1], (5, 6)).transpose(2, 0, 1)
    chances[0, 2, 3] = 0
    crf = DenseCRF(appearance=4, alpha=6, beta=20, smoothness=3, gamma=1.5, updates=updates)
    found = crf(image, chances, (2.0, 1.5))
    pixels = [(y, x) for y in range(5) for x in range(6)]
    near, alike = np.zeros((30, 30)), np.zeros((30, 30))
    for i, (y, x) in enumerate(pixels):
        for j, (v, u) in enumerate(pixels):
            far = (2.0 * (y - v)) ** 2 + (1.5 * (x - u)) ** 2
            colour = ((image[y, x].astype(float) - image[v, u]) ** 2).sum()
            near[i, j] = np.exp(-far / (2 * 1.5**2))
            alike[i, j] = np.exp(-far / (2 * 6**2) - colour / (2 * 20**2))
    start = np.maximum(chances.reshape(3, 30), 1e-5)
    now = start / start.sum(0)
    for _ in range(updates):
        after = np.zeros((3, 30))
        for i in range(30):
            for label in range(3):
                total = 0.0
                for j in range(30):
                    total += 4 * alike[i, j] / np.sqrt(alike[i].sum() * alike[j].sum()) * now[label, j]
                    total += 3 * near[i, j] / np.sqrt(near[i].sum() * near[j].sum()) * now[label, j]
                after[label, i] = start[label, i] * np.exp(total)
        now = after / after.sum(0)
    assert found.shape == (3, 5, 6) and found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(3, 30), now, rtol=1e-3, atol=1e-6)
    assert np.abs(now - start).max() > 0.1


def test_a_crf_without_weights_leaves_what_it_is_given():
    chances = np.random.default_rng(0).dirichlet([1, 1], (5, 6)).transpose(2, 0, 1)
    found = DenseCRF(appearance=0, smoothness=0)(np.zeros((5, 6, 3), np.uint8), chances)
    np.testing.assert_allclose(found, chances, rtol=1e-5, atol=1e-6)


def test_masks_are_labels_after_the_crf():
    method = planted({(*WORDS,): [0.9, 0.1, 0.9, 0.9], ("sun", "water", "tree"): [0.9, 0.9, 0.9]})
    images, crf = [picture()], DenseCRF(updates=2)
    found = method.masks(images, WORDS, crf=crf, side=6)
    assert found.dims == ("image", "concept", "y", "x") and found.dtype == bool
    assert found.concept.values.tolist() == WORDS and "updates=2" in found.attrs["crf"]
    soft = torch.from_numpy(method(images, WORDS).values)
    soft = torch.nn.functional.interpolate(soft, (6, 6), mode="bilinear")[0].numpy()
    small = np.asarray(Image.fromarray(images[0]).resize((6, 6), Image.Resampling.BOX))
    chances = crf(small, np.stack([1 - soft.max(0), soft[0], soft[2], soft[3]]), (18 / 6, 25 / 6))
    labels = chances.argmax(0)
    for label, word in enumerate(["sun", "water", "tree"], 1):
        np.testing.assert_array_equal(found.sel(concept=word)[0], labels == label)
    assert not found.sel(concept="boat").any() and len(np.unique(labels)) > 1
    assert made().masks(images, ["sun"]).shape == (1, 1, 64, 64)


def test_a_picture_without_any_relevance_is_all_background():
    method = made()
    with torch.no_grad():
        method.proposer.vit.blocks[-1].out.weight.zero_()
    assert method.scores([picture()], WORDS).attrs["rejected"] == 4
    assert not method.masks([picture()], WORDS, side=4).any()


def test_what_it_says_of_itself():
    method = made(iterations=3)
    assert (method.kind, method.architecture, method.class_agnostic) == ("relevance", "CLIP ViT", False)
    assert (method.forwards, method.forwards_a_concept, method.backwards, method.backwards_a_concept) == (1, 3, 0, 3)
    settings = json.loads("{" + method.describe().removesuffix(")").rsplit("{", 1)[1])
    assert settings == {"eta": 0.4, "theta": 0.6, "prompts": ["blur", "circle"], "iterations": 3}
    attrs = method.scores([picture()], ["sun"]).attrs
    assert attrs["weights"] in method.describe() and attrs["proposer"] == method.proposer.describe()


CRF = DenseCRF()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: ClipAsRNN(vit("ViTModel"), proposer()),
            dp.errors.ModelError,
            "ClipAsRNN needs a CLIPModel, found a ViT",
        ),
        (
            lambda: ClipAsRNN(vit("CLIPModel"), cast(Any, vit("CLIPModel"))),
            dp.errors.ProbeError,
            "proposer is a ViT; give a ClipES",
        ),
        (
            lambda: made(prompts=["arrow"]),
            dp.errors.ProbeError,
            r"prompts=\['arrow'\].*'circle', 'blur', 'grey', 'black'",
        ),
        (lambda: made(prompts="blur"), dp.errors.ProbeError, "prompts='blur'"),
        (lambda: made(eta=1), dp.errors.ProbeError, "eta=1"),
        (lambda: made(theta=-1), dp.errors.ProbeError, "theta=-1"),
        (lambda: made(iterations=0), dp.errors.ProbeError, "iterations=0"),
        (lambda: made()([picture()], []), dp.errors.ConceptError, r"ClipAsRNN: concepts=\[\]"),
        (
            lambda: ClipAsRNN(vit("CLIPModel"), proposer(background=()))([picture()], WORDS),
            dp.errors.ConceptError,
            "give words for the background",
        ),
        (lambda: DenseCRF(gamma=0), dp.errors.ProbeError, "gamma=0"),
        (lambda: DenseCRF(appearance=-1), dp.errors.ProbeError, "appearance=-1"),
        (lambda: DenseCRF(updates=0), dp.errors.ProbeError, "updates=0"),
        (lambda: CRF(np.zeros((5, 6, 3)), np.ones((2, 6, 5))), dp.errors.MapError, r"\(5, 6, 3\), .* \(2, 6, 5\)"),
        (lambda: prompted(picture(), np.zeros((3, 3), bool), ["blur"]), dp.errors.MapError, r"\(3, 3\), for a picture"),
        (lambda: prompted(picture(), np.zeros((18, 25)), ["blur"]), dp.errors.MapError, "a mask of float64"),
    ],
)
def test_what_is_refused(make, error, match: str):
    with pytest.raises(error, match=match):
        make()
