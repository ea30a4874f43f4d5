"""Methods on vision transformers, each against its equation in loops over a forward written once more."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

import dit_probe as dp
from probes.baselines.dense_clip import DenseCLIP
from probes.baselines.gradients import GenericAttention, GradCAM, LeGrad
from probes.baselines.vit_attention import Rollout, ViTAttention
from tests.baselines_vit_cases import CONCEPTS, NAMES, SCORED, eager, picture, rewritten, vit

grad = torch.autograd.grad
TOKENS = range(10)


def same(found, expected) -> None:
    """Numbers of a method are those expected, tensors in lists of lists along the leading axes."""
    expected = np.asarray(stacked(expected)).reshape(found.shape)
    assert np.ptp(expected) > 0, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def stacked(expected):
    return torch.stack([stacked(one) for one in expected]).detach() if isinstance(expected, list) else expected


def explained(given, plain, score: str, state=None) -> list[torch.Tensor]:
    """One score a concept; the classifier's own is repeated."""
    scores = plain.scores(plain.outputs[-1][0] if state is None else state)
    scores = scores.softmax(-1) if score == "softmax" else scores
    if given.is_clip:
        return list(scores)
    return [scores[plain.scores(plain.outputs[-1][0]).argmax()]] * len(CONCEPTS)


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_what_transformers_gives_out(name: str):
    given = vit(name)
    expected = torch.stack(eager(given, picture())[0])[:, :, 0, given.skip :]
    assert given.skip == (5 if name == "Dinov2WithRegistersModel" else 1)
    found = ViTAttention(given, layers=None).scores([picture()], CONCEPTS)
    assert found.dims == ("image", "concept", "layer", "head", "y", "x")
    same(found[0, 0], expected)
    same(ViTAttention(given)([picture()], CONCEPTS)[0, 0], expected[-1].mean(0))
    assert (found.values == found.values[:, :1]).all()  # of all concepts the same
    picked = ViTAttention(given, layers=[-3, 1]).scores([picture()], CONCEPTS)
    assert picked.layer.values.tolist() == [0, 1]
    same(picked[0, 0], expected[:2])


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_rollout_is_a_product_of_matrices_whose_rows_sum_to_one(name: str, start: int):
    given = vit(name)
    product = None
    for layer in eager(given, picture())[0][start:]:
        mixed = np.zeros((layer.shape[1],) * 2)
        for i in range(len(mixed)):
            row = layer[:, i].mean(0).double().numpy() + np.eye(len(mixed))[i]
            mixed[i] = row / row.sum()
        product = mixed if product is None else mixed @ product
    np.testing.assert_allclose(product.sum(1), 1, rtol=1e-6)
    found = Rollout(given, start).scores([picture()], CONCEPTS)
    assert found.dims == ("image", "concept", "y", "x")
    same(found[0, 2], product[0, given.skip :])
    np.testing.assert_allclose(found[0, 0].sum() + product[0, : given.skip].sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("score", ["logit", "softmax"])
@pytest.mark.parametrize("name", SCORED)
def test_gradcam_of_attention(name: str, score):
    given, plain = vit(name), rewritten(vit(name), picture())
    found = GradCAM(given, score=score, layers=None).scores([picture()], CONCEPTS)
    assert found.dims == ("image", "concept", "layer", "y", "x")
    expected = []
    for one in explained(given, plain, score):
        expected.append([])
        for layer, slope in enumerate(grad(one, plain.attention, retain_graph=True)):
            weights = [sum(slope[head, 0, j] for j in TOKENS[1:]) / 9 for head in range(2)]
            mean = sum(weights[head] * plain.attention[layer][head, 0, 1:] for head in range(2)) / 2
            expected[-1].append(mean.clamp(min=0))
    same(found, expected)
    same(GradCAM(given, score=score)([picture()], CONCEPTS), found[:, :, -1].values)


@pytest.mark.parametrize("score", ["logit", "softmax"])
@pytest.mark.parametrize("name", SCORED)
def test_gradcam_of_tokens(name: str, score):
    given, plain = vit(name), rewritten(vit(name), picture())
    found = GradCAM(given, "token", score=score).scores([picture()], CONCEPTS)
    assert found.layer.values.tolist() == [2]
    expected, read = [], plain.normed[-1]
    for one in explained(given, plain, score):
        (slope,) = grad(one, read, retain_graph=True)
        channels = [slope[1:, channel].mean() for channel in range(16)]
        expected.append(sum(channels[channel] * read[1:, channel] for channel in range(16)).clamp(min=0))
    same(found, expected)


@pytest.mark.parametrize("first", [0, 1, -1])
@pytest.mark.parametrize("name", SCORED)
def test_gradient_times_attention_over_the_layers(name: str, first: int):
    given, plain = vit(name), rewritten(vit(name), picture())
    expected = []
    for one in explained(given, plain, "logit"):
        relevance = torch.eye(10)
        for layer in range(first % 3, 3):
            (slope,) = grad(one, plain.attention[layer], retain_graph=True)
            added = sum((slope[head] * plain.attention[layer][head]).clamp(min=0) for head in range(2)) / 2
            relevance = relevance + added @ relevance
        expected.append(relevance[0, 1:])
    same(GenericAttention(given, first).scores([picture()], CONCEPTS), expected)


@pytest.mark.parametrize("name", SCORED)
def test_legrad(name: str):
    given, plain = vit(name), rewritten(vit(name), picture())
    found = LeGrad(given).scores([picture()], CONCEPTS)
    assert found.dims == ("image", "concept", "layer", "head", "y", "x")
    expected = [[[] for _ in range(3)] for _ in CONCEPTS]
    for layer in range(3):
        scores = explained(given, plain, "logit", sum(plain.outputs[layer][token] for token in TOKENS) / 10)
        for at, one in enumerate(scores):
            (slope,) = grad(one, plain.attention[layer], retain_graph=True)
            for head in range(2):
                expected[at][layer].append(sum(slope[head, i, 1:].clamp(min=0) for i in TOKENS) / 10)
    same(found, expected)
    picked = LeGrad(given, layers=[-2, -1])([picture()], CONCEPTS)
    same(picked, found.sel(layer=[1, 2]).mean(["layer", "head"]).values)


def test_patches_with_the_models_own_attention_are_the_models_own():
    given = vit("CLIPModel")
    outputs = given.model.vision_model(pixel_values=given.pixels(picture())).last_hidden_state[0, 1:]
    patches = given.model.visual_projection(given.model.vision_model.post_layernorm(outputs))
    cosines = torch.nn.functional.cosine_similarity(given.texts(CONCEPTS)[:, None], patches[None], dim=-1)
    same(DenseCLIP(given, "ordinary").scores([picture()], CONCEPTS), cosines.detach())


@pytest.mark.parametrize("attention", ["sclip", "naclip"])
def test_dense_clip_replaces_the_attention_of_the_last_block(attention):
    given, plain = vit("CLIPModel"), rewritten(vit("CLIPModel"), picture())
    q, k, v = plain.q[-1] / 8**0.25, plain.k[-1] / 8**0.25, plain.v[-1]
    context = torch.zeros(10, 16)
    for i in TOKENS:
        for head in range(2):
            to_keys, to_queries = (torch.stack([x[head, i] @ x[head, j] for j in TOKENS]) for x in (k, q))
            for j in TOKENS[1:] if i and attention == "naclip" else ():
                (y, x), (other_y, other_x) = divmod(i - 1, 3), divmod(j - 1, 3)
                to_keys[j] += np.exp(-((y - other_y) ** 2 + (x - other_x) ** 2) / (2 * 1.5**2))
            weights = to_keys.softmax(0) + (to_queries.softmax(0) if attention == "sclip" else 0)
            context[i, 8 * head : 8 * head + 8] = weights @ v[head]
    at = "encoder.layers.2"
    y = plain.dense(context, f"{at}.self_attn.out_proj")
    if attention == "sclip":
        y = plain.inputs[-1] + y
        y = y + plain.mlp(y, at)
    patches = plain.embed(y)[1:]
    expected = [[(patch / patch.norm()) @ text for patch in patches] for text in given.texts(CONCEPTS)]
    same(DenseCLIP(given, attention, sigma=1.5).scores([picture()], CONCEPTS), expected)


METHODS = (ViTAttention, Rollout, GradCAM, GenericAttention, LeGrad, DenseCLIP)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCORED)
def test_what_a_method_says_of_itself(method, name: str):
    if method is DenseCLIP and name != "CLIPModel":
        return
    made = method(vit(name, revision="abc"))
    agnostic = name != "CLIPModel" or method in (ViTAttention, Rollout)
    assert made.class_agnostic == agnostic
    assert made.architecture == ("CLIP ViT" if name == "CLIPModel" else "ViT classifier")
    backward = method in (GradCAM, GenericAttention, LeGrad)
    passes = made.forwards, made.forwards_a_concept, made.backwards, made.backwards_a_concept
    assert passes == (1, 0, int(backward and agnostic), int(backward and not agnostic))
    images = [picture(), picture(1)]
    found = made.scores(images, CONCEPTS)
    assert found.dtype == np.float32
    assert found.concept.values.tolist() == CONCEPTS
    assert found.attrs["revision"] == "abc" and found.attrs["architecture"] == made.architecture
    assert "12 x 12 pixels" in found.attrs["preprocessing"]
    assert bool((found.values == found.values[:, :1]).all()) == agnostic
    whole = made(images, CONCEPTS)
    assert whole.dims == ("image", "concept", "y", "x")
    same(whole, found.mean([dim for dim in found.dims if dim in ("layer", "head")]).values)
    same(made([images[1]], CONCEPTS), whole[1:].values)  # pictures do not know each other
    assert found.attrs["weights"] in made.describe()
    settings = json.loads("{" + made.describe().removesuffix(")").rsplit("{", 1)[1])
    assert set(settings) == {field.name for field in fields(made)} - {"vit"}


def test_concepts_are_explained_one_by_one():
    given = vit("CLIPModel")
    for method in (GradCAM(given, form="token"), GenericAttention(given), LeGrad(given), DenseCLIP(given)):
        found = method([picture()], CONCEPTS)
        same(method([picture()], CONCEPTS[::-1]), found[:, ::-1].values)
        same(method([picture()], CONCEPTS[1:2]), found[:, 1:2].values)


def test_a_map_without_relevance_is_zero_and_counted():
    given = vit("CLIPModel")
    assert GenericAttention(given).scores([picture()], CONCEPTS).attrs["zero_maps"] == 0
    with torch.no_grad():
        given.blocks[-1].out.weight.zero_()
    for form in ("attention", "token"):
        found = GradCAM(given, form).scores([picture()], CONCEPTS)
        assert (found == 0).all() and found.attrs["zero_maps"] == 3


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: GradCAM(vit("Dinov2Model")),
            dp.errors.ModelError,
            "found a Dinov2Model, which has no score",
        ),
        (
            lambda: DenseCLIP(vit("ViTForImageClassification")),
            dp.errors.ModelError,
            "needs a CLIPModel, found a ViT",
        ),
        (lambda: ViTAttention(vit("ViTModel"), layers=[3]), dp.errors.SiteError, r"layers=\[3\] .* layers 0-2"),
        (lambda: LeGrad(vit("CLIPModel"), layers=[]), dp.errors.SiteError, r"layers=\[\]"),
        (lambda: GradCAM(vit("CLIPModel"), layers=[-4]), dp.errors.SiteError, r"layers=\[-4\]"),
        (lambda: Rollout(vit("CLIPModel"), start=3), dp.errors.SiteError, "start=3"),
        (lambda: GenericAttention(vit("CLIPModel"), first=3), dp.errors.SiteError, r"layers=\[3\]"),
        (lambda: GradCAM(vit("CLIPModel"), form="head"), dp.errors.ProbeError, "form='head'"),
        (lambda: LeGrad(vit("CLIPModel"), score="cosine"), dp.errors.ProbeError, "score='cosine'"),
        (lambda: DenseCLIP(vit("CLIPModel"), attention="kk"), dp.errors.ProbeError, "attention='kk'"),
        (lambda: DenseCLIP(vit("CLIPModel"), sigma=0), dp.errors.ProbeError, "sigma=0"),
    ],
)
def test_what_is_refused(make, error, match: str):
    with pytest.raises(error, match=match):
        make()


def test_a_softmax_needs_another_word():
    with pytest.raises(dp.errors.ConceptError, match="a softmax over .'sun'. is 1 whatever the picture"):
        GradCAM(vit("CLIPModel"), score="softmax")([picture()], ["sun"])
    assert GradCAM(vit("ViTForImageClassification"), score="softmax")([picture()], ["sun"]).sizes["concept"] == 1
