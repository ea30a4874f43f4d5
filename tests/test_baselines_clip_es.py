"""CLIP-ES on a tiny random CLIP: every step against transformers' own forward, autograd by hand, numpy and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import ndimage

import dit_probe as dp
from probes.baselines.clip_es import BACKGROUND, ClipES, boxes, unit_range
from tests.baselines_vit_cases import CONCEPTS, eager, model, picture, vit

OTHERS = ["sky", "grass", "road"]


def made(**settings) -> ClipES:
    return ClipES(vit("CLIPModel"), **{"background": OTHERS, "blocks": 2, **settings})


def cams(words: list[str], others: list[str]) -> np.ndarray:
    """M of words against others, from transformers' modules and one hook on what the last attention reads."""
    given, twin, read = vit("CLIPModel"), model("CLIPModel"), []
    tower = twin.vision_model
    tower.encoder.layers[-1].layer_norm1.register_forward_hook(lambda _, __, out: read.append(out))
    states = tower(pixel_values=given.pixels(picture()), interpolate_pos_encoding=True).last_hidden_state[0]
    embedded = torch.stack([twin.visual_projection(tower.post_layernorm(state)) for state in states[1:]]).sum(0) / 9
    cosines = torch.nn.functional.cosine_similarity(embedded[None], given.texts([*words, *others]), dim=-1)
    chances = (torch.tensor(1.0).exp() * cosines).softmax(0)
    found = []
    for chance in chances[: len(words)]:
        (slope,) = torch.autograd.grad(chance, read[0], retain_graph=True)
        cam = np.zeros(9)
        for channel in range(16):
            cam += (slope[0, 1:, channel].mean() * read[0][0, 1:, channel]).detach().numpy()
        cam = np.maximum(cam, 0)
        found.append(((cam - cam.min()) / np.ptp(cam)).reshape(3, 3))
    return np.stack(found)


def affinity(blocks: int, sinkhorn: int, power: int) -> np.ndarray:
    layers = eager(vit("CLIPModel"), picture())[0][-blocks:]
    found = np.zeros((9, 9))
    for layer in layers:
        for head in layer.double().numpy():
            found += head[1:, 1:] / (2 * len(layers))
    for _ in range(sinkhorn):
        for j in range(9):
            found[:, j] /= found[:, j].sum()
        for i in range(9):
            found[i] /= found[i].sum()
    product = np.eye(9)
    for _ in range(power):
        product = product @ (found + found.T) / 2
    return product


def boxed(cam: np.ndarray, threshold: float) -> np.ndarray:
    """Boxes by scipy's labels."""
    labels = np.zeros(cam.shape, int)
    ndimage.label(cam > threshold * cam.max(), np.ones((3, 3)), labels)
    found = np.zeros(cam.shape, bool)
    for region in ndimage.find_objects(labels):
        found[region] = True
    return found


@pytest.mark.parametrize("words", [CONCEPTS, ["boat"]])
def test_cam_is_the_gradient_of_a_softmax_of_averaged_patches(words: list[str]):
    method = made()
    found = method.cams(method.record(picture()), words).numpy()
    np.testing.assert_allclose(found, cams(words, OTHERS), rtol=1e-3, atol=1e-4)
    assert (found.max((1, 2)) == 1).all() and (found.min((1, 2)) == 0).all()


@pytest.mark.parametrize(("blocks", "sinkhorn", "power"), [(2, 3, 2), (8, 1, 1), (1, 4, 3), (2, 3, 0)])
def test_affinity_is_averaged_attention_normalised_both_ways(blocks: int, sinkhorn: int, power: int):
    method = made(blocks=blocks, sinkhorn=sinkhorn, power=power)
    found = method.affinity(method.record(picture())).numpy()
    np.testing.assert_allclose(found, affinity(min(blocks, 3), sinkhorn, power), rtol=1e-4, atol=1e-6)


def test_affinity_becomes_doubly_stochastic():
    method = made(sinkhorn=200)
    found = method.affinity(method.record(picture()))
    assert found.min() > 0 and np.ptp(found.numpy()) > 0.01
    for axis in (0, 1):
        np.testing.assert_allclose(found.sum(axis), 1, rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.8])
def test_boxes_are_those_around_regions(threshold: float):
    draw = np.random.default_rng(0)
    areas = []
    for height, width in [(1, 1), (7, 9), (12, 5), (14, 14)]:
        cam = np.maximum(draw.normal(size=(height, width)), 0.1) ** 3
        found = boxes(torch.from_numpy(cam), threshold).numpy()
        np.testing.assert_array_equal(found, boxed(cam, threshold))
        areas.append(found.mean())
    assert threshold < 0.8 or min(areas) < 0.5
    spiral = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]], float)
    assert boxes(torch.from_numpy(spiral), 0.4).all()  # one region, long and crooked
    assert not boxes(torch.zeros(3, 3), 0.4).any()


def test_map_is_the_cam_in_its_boxes_spread_by_affinity():
    found = made().scores([picture()], CONCEPTS)
    assert found.dims == ("image", "concept", "y", "x") and found.dtype == np.float32
    spread = affinity(2, 3, 2)
    for one, cam in zip(found.values[0], cams(CONCEPTS, OTHERS), strict=True):
        kept = np.where(boxed(cam, 0.4), cam, 0).reshape(9)
        expected = [sum(spread[i, j] * kept[j] for j in range(9)) for i in range(9)]
        np.testing.assert_allclose(one.reshape(9), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(made()([picture(1), picture()], CONCEPTS)[1], found[0])


def test_only_what_is_in_the_boxes_counts():
    inside = [boxed(cam, 0.8) for cam in cams(CONCEPTS, OTHERS)]
    found = made(power=0, threshold=0.8).scores([picture()], CONCEPTS).values[0]
    assert not all(one.all() for one in inside)
    np.testing.assert_allclose(found, cams(CONCEPTS, OTHERS) * inside, rtol=1e-3, atol=1e-4)


def test_a_background_word_that_is_a_concept_competes_once():
    expected = made()([picture()], CONCEPTS)
    np.testing.assert_array_equal(made(background=[*OTHERS, "boat"])([picture()], CONCEPTS), expected)
    assert np.abs(made(background=OTHERS[:1])([picture()], CONCEPTS) - expected).max() > 1e-3
    assert len(BACKGROUND) == len({*BACKGROUND}) == 25


def test_maps_are_brought_to_0_and_1():
    maps = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert unit_range(maps).tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]


def test_a_map_without_relevance_is_zero_and_counted():
    method = made()
    assert method.scores([picture()], CONCEPTS).attrs["zero_maps"] == 0
    with torch.no_grad():
        method.vit.blocks[-1].out.weight.zero_()
    found = method.scores([picture()], CONCEPTS)
    assert (found == 0).all() and found.attrs["zero_maps"] == 3


def test_what_it_says_of_itself():
    method = made()
    assert (method.kind, method.architecture, method.class_agnostic) == ("relevance", "CLIP ViT", False)
    assert (method.forwards, method.forwards_a_concept, method.backwards, method.backwards_a_concept) == (1, 0, 0, 1)
    settings = json.loads("{" + method.describe().removesuffix(")").rsplit("{", 1)[1])
    assert settings == {"background": OTHERS, "threshold": 0.4, "power": 2, "sinkhorn": 3, "blocks": 2}
    assert method.scores([picture()], CONCEPTS).attrs["weights"] in method.describe()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: ClipES(vit("ViTForImageClassification")),
            dp.errors.ModelError,
            "ClipES needs a CLIPModel, found a ViT",
        ),
        (lambda: made(background="sky"), dp.errors.ConceptError, "background='sky': give a list"),
        (lambda: made(threshold=1), dp.errors.ProbeError, "threshold=1"),
        (lambda: made(power=-1), dp.errors.ProbeError, "power=-1"),
        (lambda: made(sinkhorn=0), dp.errors.ProbeError, "sinkhorn=0"),
        (lambda: made(blocks=0), dp.errors.ProbeError, "blocks=0"),
        (lambda: made()([picture()], []), dp.errors.ConceptError, r"ClipES: concepts=\[\]"),
        (lambda: made()([], CONCEPTS), dp.errors.MapError, "ClipES: no images"),
        (lambda: made(background=["sun"])([picture()], ["sun"]), dp.errors.ConceptError, "softmax over .'sun'. is 1"),
    ],
)
def test_what_is_refused(make, error, match: str):
    with pytest.raises(error, match=match):
        make()
