"""Relevance propagation: rules against loops over units, conservation, and whole models against a second writing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dit_probe as dp
from probes.baselines import relevance_rules as rules
from probes.baselines.relevance import LRP, PartialLRP, TransInterp, propagate
from probes.baselines.vit import ViT
from probes.baselines.vit_layout import Block
from tests.baselines_vit_cases import CONCEPTS, GRID, PATCH, SCORED, SIDE, model, picture, vit

grad, close = torch.autograd.grad, torch.testing.assert_close


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear_by_loops(x: np.ndarray, weight: np.ndarray, relevance: np.ndarray, *, common: bool) -> np.ndarray:
    found = np.zeros_like(x)
    for row in range(len(x)):
        for i in range(len(weight)):
            # what x_j says through W_ij counts where both have the same sign, that is where the product is positive
            shares = {+1: {}, -1: {}}
            for j in range(x.shape[1]):
                if x[row, j] * weight[i, j] > 0:
                    shares[+1 if x[row, j] > 0 else -1][j] = x[row, j] * weight[i, j]
            whole = sum(sum(group.values()) for group in shares.values())
            for group in shares.values():
                for j, share in group.items():
                    found[row, j] += share / (whole if common else sum(group.values())) * relevance[row, i]
    return found


@pytest.mark.parametrize("name", ["orig", "ours"])
def test_linear_is_the_sum_over_pairs_of_units(name: rules.Rules):
    x, weight, bias, relevance = leaf(3, 5), leaf(4, 5), leaf(4), torch.randn(3, 4, dtype=torch.float64)
    y = rules.linear(x, weight, bias, name)
    close(y, x @ weight.T + bias)
    (found,) = grad(y, x, relevance)
    expected = linear_by_loops(x.detach().numpy(), weight.detach().numpy(), relevance.numpy(), common=name == "ours")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_orig_doubles_what_ours_conserves():
    x = torch.cat([leaf(2, 8).abs(), -leaf(2, 8).abs()], dim=1)  # every input has both signs
    weight, relevance = leaf(6, 16), torch.rand(2, 6, dtype=torch.float64)
    sums = {name: grad(rules.linear(x, weight, None, name), x, relevance)[0].sum() for name in ("orig", "ours")}
    close(sums["ours"], relevance.sum(), rtol=1e-6, atol=0)
    close(sums["orig"], 2 * relevance.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["orig", "ours"])
def test_a_positive_linear_net_gives_x_times_w(name: rules.Rules):
    x, first, second = leaf(1, 5).abs(), leaf(4, 5).abs(), leaf(1, 4).abs()
    y = rules.linear(rules.linear(x, first, None, name), second, None, name)
    (found,) = grad(y, x, y)
    close(found, x * (second @ first), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["orig", "ours"])
def test_a_sum_is_split_by_ratio_in_each_image(name: rules.Rules):
    a, b, relevance = leaf(2, 3, 4), leaf(2, 3, 4), torch.rand(2, 3, 4, dtype=torch.float64)
    parts = grad(rules.add(a, b, name), (a, b), relevance)
    for image in range(2):
        share = [(part * relevance / (a + b))[image] for part in (a, b)]
        if name == "ours":
            sizes = [part.sum().abs() for part in share]
            share = [
                part / part.sum() * size / sum(sizes) * relevance[image].sum()
                for part, size in zip(share, sizes, strict=True)
            ]
        for found, expected in zip(parts, share, strict=True):
            close(found[image], expected, rtol=1e-5, atol=1e-8)


def test_a_product_gives_each_factor_half_of_its_terms():
    a, b, relevance = leaf(1, 2, 3), leaf(1, 3, 4), torch.rand(1, 2, 4, dtype=torch.float64)
    found_a, found_b = grad(rules.matmul(a, b), (a, b), relevance)
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(2):
        for j in range(4):
            for k in range(3):
                term = a[0, i, k] * b[0, k, j] / (a @ b)[0, i, j] * relevance[0, i, j] / 2
                expected_a[0, i, k] += term.detach()
                expected_b[0, k, j] += term.detach()
    close(found_a, expected_a, rtol=1e-6, atol=1e-8)
    close(found_b, expected_b, rtol=1e-6, atol=1e-8)


def test_clone_pooling_and_functions_of_one_unit_hand_on_what_comes():
    x = leaf(1, 3, 4)
    normed = rules.unchanged(nn.LayerNorm(4, dtype=torch.float64), x)
    close(grad(normed, x, torch.ones_like(x))[0], torch.ones_like(x))
    first, second, pooled = torch.randn(3, 1, 3, 4, dtype=torch.float64)
    (found,) = grad(
        (rules.unchanged(torch.tanh, x), rules.unchanged(torch.exp, x), x[:, 0]), x, (first, second, pooled[:, 0])
    )
    close(found[:, 0], (first + second + pooled)[:, 0])
    close(found[:, 1:], (first + second)[:, 1:])


def test_patches_follow_the_rule_for_bounded_inputs():
    image, weight, bias = leaf(2, 3, 4, 4), leaf(5, 3, 2, 2), leaf(5)
    relevance = torch.rand(2, 5, 2, 2, dtype=torch.float64)
    y = rules.patches(image, weight, bias)
    close(y, torch.nn.functional.conv2d(image, weight, bias, stride=2))
    (found,) = grad(y, image, relevance)
    x, w = image.detach().numpy(), weight.detach().numpy()
    expected = np.zeros_like(x)
    for n, i, row, column in np.ndindex(relevance.shape):
        low, high = x[n].min(), x[n].max()
        window = np.s_[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        z = w[i] * x[window] - w[i].clip(min=0) * low - w[i].clip(max=0) * high
        expected[window] += z / z.sum() * float(relevance[n, i, row, column])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_division_by_zero_is_zero_and_the_sign_is_kept():
    found = rules.divide(
        torch.ones(4, dtype=torch.float64), torch.tensor([0.0, 1e-9, -1e-9, -2.0], dtype=torch.float64)
    )
    close(found, torch.tensor([0.0, 5e8, -5e8, -0.5], dtype=torch.float64))


def double(name: str) -> ViT:
    """In half of float64's digits rounding is no matter even of a relevance of 10^8."""
    made = vit(name)
    made.model.double()
    return made


def weights_of(watched: ViT) -> torch.Tensor:
    """Row vectors whose product with the normed class token is explained."""
    pooled = watched.final(watched.record(picture()).output[0, 0])
    if watched.is_clip:
        return torch.stack([text @ watched.model.visual_projection.weight for text in watched.texts(CONCEPTS)])
    return watched.model.classifier.weight[watched.model.classifier(pooled).argmax()][None]


def linear_down(x: torch.Tensor, weight: torch.Tensor, relevance: torch.Tensor, name: str) -> torch.Tensor:
    """From all pairs of units: (token, out) to (token, in)."""
    terms = (x[:, None] * weight).clamp(min=0)  # (token, out, in)
    groups = [terms] if name == "ours" else [terms * (x > 0)[:, None], terms * (x < 0)[:, None]]
    shares = [(group * (relevance / group.sum(-1))[..., None]).nan_to_num().sum(1) for group in groups]
    return torch.stack(shares).sum(0)


def add_down(a: torch.Tensor, b: torch.Tensor, relevance: torch.Tensor, name: str) -> list[torch.Tensor]:
    parts = [part / (a + b) * relevance for part in (a, b)]
    if name == "orig":
        return parts
    sizes = [part.sum().abs() for part in parts]
    return [part * size / sum(sizes) * relevance.sum() / part.sum() for part, size in zip(parts, sizes, strict=True)]


def block_down(block: Block, x: torch.Tensor, relevance: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One block by the list of its layers, (token, width): relevance of its input, and of its attention."""
    mlp: Any = block.mlp
    normed = block.norm1(x)
    q, k, v = (part(normed).unflatten(-1, (2, -1)).transpose(0, 1) for part in (block.q, block.k, block.v))
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    context = weights @ v
    merged = context.transpose(0, 1).flatten(1)
    middle = x + block.out(merged)
    hidden = mlp.fc1(block.norm2(middle))
    active = mlp.activation_fn(hidden)

    left, right = add_down(middle, mlp.fc2(active), relevance, name)
    right = linear_down(active, mlp.fc2.weight, right, name)
    left = left + linear_down(block.norm2(middle), mlp.fc1.weight, right, name)
    left, right = add_down(x, block.out(merged), left, name)
    right = linear_down(merged, block.out.weight, right, name).unflatten(-1, (2, -1)).transpose(0, 1)
    shares = torch.einsum("hij,hjd,hid->hijd", weights, v, right / context) / 2
    attention, of_v = shares.sum(3), shares.sum(1)
    shares = torch.einsum("hid,hjd,hij->hijd", q, k, attention / (q @ k.mT)) / 2
    for part, found in ((block.q, shares.sum(2)), (block.k, shares.sum(1)), (block.v, of_v)):
        left = left + linear_down(normed, part.weight, found.transpose(0, 1).flatten(1), name)
    return left, attention


@torch.no_grad()
def down(watched: ViT, weight: torch.Tensor, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Relevance of the inputs of blocks and of their attention, from the first block to the last."""
    seen = watched.record(picture())
    relevance = torch.zeros_like(seen.output[0])
    relevance[0] = linear_down(watched.final(seen.output[0, :1]), weight[None], torch.ones(1, 1), name)[0]
    inputs, attention = [], []
    for block, x in zip(watched.blocks[::-1], seen.inputs[::-1], strict=True):
        relevance, of_attention = block_down(block, x[0], relevance, name)
        inputs.insert(0, relevance)
        attention.insert(0, of_attention)
    return inputs, attention


def gradients(watched: ViT) -> list[list[torch.Tensor]]:
    """By score and layer: gradients with respect to the attention that transformers gives out."""
    twin = model(type(watched.model).__name__).double()
    twin.set_attn_implementation("eager")
    asked = {"pixel_values": watched.pixels(picture()), "output_attentions": True}
    if watched.is_clip:
        words = [watched.templates[0].format(word) for word in CONCEPTS]
        out = twin(**asked, **watched.tokenizer(words, padding=True, return_tensors="pt"))
        scores, layers = out.logits_per_image[0], out.vision_model_output.attentions
    else:
        out = twin(**asked)
        scores, layers = out.logits.max(-1).values, out.attentions
    return [[found[0] for found in grad(score, layers, retain_graph=True)] for score in scores]


def expected_of(name: str, found) -> list:
    """Maps by score, repeated for every concept where the model explains its own class."""
    return list(found) if name == "CLIPModel" else [found[0]] * len(CONCEPTS)


@pytest.mark.parametrize("size", [SIDE, 21])
@pytest.mark.parametrize("name", SCORED)
def test_the_model_in_rules_is_the_model(name: str, size: int):
    watched = vit(name, size=size)
    real = watched.record(picture())
    seen = propagate(watched, real.pixels, "orig")
    close([*seen.inputs, *seen.attention], [*real.inputs, *real.attention])
    close(seen.pooled, watched.final(real.output[:, 0]))


@pytest.mark.parametrize("name", SCORED)
def test_ours_keeps_the_sum_through_all_blocks_where_orig_does_not(name: str):
    watched = double(name)
    for weight in weights_of(watched):
        sums = {}
        for which in ("orig", "ours"):
            seen = propagate(watched, watched.pixels(picture()), which)
            sums[which] = torch.stack([found.sum() for found in seen.relevance(weight, seen.inputs)])
        close(sums["ours"], torch.ones_like(sums["ours"]), rtol=1e-5, atol=0)
        assert ((sums["orig"] - 1).abs() > 0.1).all()


@pytest.mark.parametrize("name", SCORED)
def test_lrp_is_the_list_of_layers_down_to_the_pixels(name: str):
    watched = double(name)
    embeddings, pixels = watched.tower.embeddings, watched.pixels(picture())[0]
    embedded = embeddings(pixels[None])[0, 1:]
    patches = watched.convolution(pixels[None])[0].flatten(1).T
    maps = []
    for weight in weights_of(watched):
        share = down(watched, weight, "orig")[0][0][1:] * patches / embedded
        found = torch.zeros(SIDE, SIDE, dtype=torch.float64)
        for token, relevance in enumerate(share):
            window = np.s_[PATCH * (token // GRID[1]) :, PATCH * (token % GRID[1]) :]
            x = pixels[:, *window][:, :PATCH, :PATCH]
            w = watched.convolution.weight
            z = w * x - w.clamp(min=0) * pixels.min() - w.clamp(max=0) * pixels.max()
            found[window][:PATCH, :PATCH] = (z / z.sum((1, 2, 3), True) * relevance[:, None, None, None]).sum((0, 1))
        maps.append(found.detach().numpy())
    scores = LRP(watched).scores([picture()], CONCEPTS)
    assert scores.dims == ("image", "concept", "y", "x")
    np.testing.assert_allclose(scores.values[0], expected_of(name, maps), rtol=1e-4, atol=1e-6 * np.abs(maps).max())


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("which", ["orig", "ours"])
@pytest.mark.parametrize("name", SCORED)
def test_partial_lrp_is_the_last_attention(name: str, which: rules.Rules, gradient: bool):
    watched = double(name)
    maps = []
    for weight, slopes in zip(weights_of(watched), gradients(watched), strict=True):
        relevance = down(watched, weight, which)[1][-1] * (slopes[-1] if gradient else 1)
        maps.append(relevance.clamp(min=0)[:, 0, 1:].unflatten(1, GRID).numpy())
    method = PartialLRP(watched, rules=which, gradient=gradient)
    scores = method.scores([picture()], CONCEPTS)
    assert scores.dims == ("image", "concept", "head", "y", "x") and np.any(maps)
    np.testing.assert_allclose(scores.values[0], expected_of(name, maps), rtol=1e-4, atol=1e-7 * np.max(maps))
    np.testing.assert_allclose(method([picture()], CONCEPTS).values[0], scores.values[0].mean(1), rtol=1e-6)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", SCORED)
def test_transinterp_is_the_product_of_weighted_relevance(name: str, first: int):
    watched = double(name)
    maps = []
    for weight, slopes in zip(weights_of(watched), gradients(watched), strict=True):
        product = torch.eye(10, dtype=torch.float64)
        for slope, relevance in list(zip(slopes, down(watched, weight, "ours")[1], strict=True))[first:]:
            product = (torch.eye(10) + (slope * relevance).clamp(min=0).mean(0)) @ product
        maps.append(product[0, 1:].unflatten(0, GRID).numpy())
    scores = TransInterp(watched, first=first).scores([picture()], CONCEPTS)
    assert scores.dims == ("image", "concept", "y", "x") and np.any(maps)
    np.testing.assert_allclose(scores.values[0], expected_of(name, maps), rtol=1e-4, atol=1e-7 * np.max(maps))


@pytest.mark.parametrize("method", [LRP, PartialLRP, TransInterp])
def test_a_classifier_knows_no_concept_and_clip_does(method):
    classifier, clip = method(vit("ViTForImageClassification")), method(vit("CLIPModel"))
    assert (classifier.class_agnostic, clip.class_agnostic) == (True, False)
    assert classifier.architecture != clip.architecture and classifier.describe() != clip.describe()
    passes = 2 if method is TransInterp else 1
    assert clip.forwards == classifier.forwards == passes
    assert (clip.backwards, clip.backwards_a_concept) == (0, passes)
    assert (classifier.backwards, classifier.backwards_a_concept) == (passes, 0)


def test_what_cannot_be_explained_is_refused():
    with pytest.raises(dp.errors.ModelError, match="no score to explain"):
        LRP(vit("ViTModel"))
    half = vit("CLIPModel")
    half.model.half()
    with pytest.raises(dp.errors.ModelError, match=r"float16.*torch.float32"):
        TransInterp(half)
    with pytest.raises(dp.errors.ProbeError, match="rules='alpha'"):
        PartialLRP(vit("CLIPModel"), rules="alpha")  # pyright: ignore[reportArgumentType]
    with pytest.raises(dp.errors.SiteError, match="first=3 of a model with layers 0-2"):
        TransInterp(vit("CLIPModel"), first=3)
