"""The decomposition of CLIP's class token: each term against a loop over layers, heads and tokens, and their sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dit_probe as dp
from probes.baselines.textspan import TextSpan
from probes.baselines.vit import ViT
from tests.baselines_vit_cases import CONCEPTS, GRID, eager, picture, vit

LAYERS, HEADS, TOKENS, D = 3, 2, 10, 8
TEMPLATES = ["a {}.", "the {} and water"]


def clip() -> ViT:
    return vit("CLIPModel", templates=TEMPLATES)


def embedding(watched: ViT) -> torch.Tensor:
    """The picture's embedding as transformers gives it, before it is made a unit vector."""
    with torch.no_grad():
        return watched.model.get_image_features(pixel_values=watched.pixels(picture())).pooler_output[0]


@torch.no_grad()
def terms(watched: ViT) -> tuple[dict[tuple[int, int, int], torch.Tensor], list[torch.Tensor]]:
    """Terms of attention by (layer, head, token), and those of the embedding and the MLPs, as embeddings."""
    attention, outputs = eager(watched, picture())
    tower, projection = watched.model.vision_model, watched.model.visual_projection
    states = outputs.hidden_states
    last = states[-1][0, 0]
    count, parts = 2 * LAYERS + 1, TOKENS * HEADS

    def folded(term: torch.Tensor, share: float) -> torch.Tensor:
        norm = tower.post_layernorm
        deviation = (last.var(correction=0) + norm.eps).sqrt()
        scaled = norm.weight * (term - last.mean() / share) / deviation + norm.bias / share
        return projection(scaled) / embedding(watched).norm()

    of_attention, others = {}, [folded(states[0][0, 0], count)]
    for layer, block in enumerate(tower.encoder.layers):
        values = block.self_attn.v_proj(block.layer_norm1(states[layer][0]))
        out = block.self_attn.out_proj
        after = states[layer][0, 0].clone()
        for head in range(HEADS):
            mine = slice(head * D, (head + 1) * D)
            for token in range(TOKENS):
                value = out.weight[:, mine] @ values[token, mine]
                term = attention[layer][head, 0, token] * value + out.bias / parts
                of_attention[layer, head, token] = folded(term, count * parts)
                after += term
        others.append(folded(block.mlp(block.layer_norm2(after)), count))
    return of_attention, others


def test_all_terms_add_up_to_the_similarity():
    watched = clip()
    of_attention, others = terms(watched)
    texts = watched.texts(CONCEPTS)
    found = torch.from_numpy(TextSpan(watched).scores([picture()], CONCEPTS).values[0]).sum((1, 2, 3, 4))
    for (_, _, token), term in of_attention.items():
        found += texts @ term * (token == 0)  # the class token has no place in a map
    found += texts @ sum(others)
    torch.testing.assert_close(
        found, texts @ torch.nn.functional.normalize(embedding(watched), dim=0), rtol=0, atol=1e-5
    )


def test_each_term_is_that_of_its_layer_head_and_token():
    watched = clip()
    scores = TextSpan(watched).scores([picture(1), picture()], CONCEPTS)
    assert dict(scores.sizes) == {"image": 2, "concept": 3, "layer": LAYERS, "head": HEADS, "y": GRID[0], "x": GRID[1]}
    for (layer, head, token), term in terms(watched)[0].items():
        if token:
            y, x = divmod(token - 1, GRID[1])
            found = scores.isel(image=1, layer=layer, head=head, y=y, x=x).values
            np.testing.assert_allclose(found, watched.texts(CONCEPTS) @ term, rtol=0, atol=1e-6)


def test_contrast_subtracts_the_mean_over_texts():
    words = ["house", "tree", "moon", "sky"]
    plain = TextSpan(clip())
    found = TextSpan(clip(), contrast=words).scores([picture()], CONCEPTS)
    expected = plain.scores([picture()], CONCEPTS) - plain.scores([picture()], words).mean("concept")
    assert float(abs(expected).max()) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_clip_raises_maps_and_leaves_scores():
    signed, raised = TextSpan(clip()), TextSpan(clip(), clip=True)
    maps = signed([picture()], CONCEPTS)
    assert (maps < 0).any()
    np.testing.assert_array_equal(raised([picture()], CONCEPTS), np.maximum(maps, 0))
    np.testing.assert_array_equal(raised.scores([picture()], CONCEPTS), signed.scores([picture()], CONCEPTS))


def test_what_has_no_texts_is_refused():
    with pytest.raises(dp.errors.ModelError, match="needs a CLIPModel, found a ViTForImageClassification"):
        TextSpan(vit("ViTForImageClassification"))
    with pytest.raises(dp.errors.ConceptError, match="contrast='tree'"):
        TextSpan(clip(), contrast="tree")


def test_it_says_what_it_is():
    found = TextSpan(clip(), contrast=("tree",))
    assert not found.class_agnostic and found.architecture == "CLIP ViT"
    assert (found.forwards, found.backwards, found.backwards_a_concept) == (1, 0, 0)
    assert '"contrast": ["tree"]' in found.describe() and TEMPLATES[1] in found.describe()
