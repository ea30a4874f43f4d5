"""The capture of vision transformers: what it records, against the models themselves, and what it leaves behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import dit_probe as dp
from dit_probe.demo.text import clip_tokenizer
from probes.baselines.vit import ViT
from probes.baselines.vit_attention import ViTAttention
from tests.baselines_vit_cases import CONCEPTS, NAMES, SCORED, eager, model, picture, vit

close = torch.testing.assert_close


@pytest.mark.parametrize("size", [12, 22])
@pytest.mark.parametrize("name", NAMES)
def test_a_recording_is_what_transformers_gives_out(name: str, size: int):
    watched = vit(name, size=size)
    seen = watched.record(picture())
    expected, outputs = eager(watched, picture())
    assert seen.grid == (size // 4, size // 4)
    close([layer[0] for layer in seen.attention], expected)
    states = [*seen.inputs, seen.output]
    if name != "ViTModel":  # the others have one more, the state before the final norm
        close(states, list(outputs.hidden_states[: len(states)]))
    for at, block in enumerate(watched.blocks):
        close(seen.normed[at], block.norm1(seen.inputs[at]))
        heads = block.v(seen.normed[at])[0].unflatten(-1, (2, 8)).transpose(0, 1)
        close(seen.values[at][0], heads)
        close(seen.context[at][0], torch.stack([expected[at][head] @ heads[head] for head in range(2)]))
        scores = seen.queries[at][0] @ seen.keys[at][0].mT / 8**0.5
        close(scores.softmax(-1), expected[at])


@pytest.mark.parametrize("name", NAMES)
def test_the_class_token_alone_has_the_same_attention(name: str):
    whole, row = (vit(name).record(picture(), class_only=only) for only in (False, True))
    close([layer[:, :, :1] for layer in whole.attention], row.attention)
    close(whole.output, row.output)


def test_logits_are_the_models_own():
    clip = ViT(model("CLIPModel"), clip_tokenizer())
    classifier = vit("ViTForImageClassification")
    tokens = clip_tokenizer()([f"a photo of a {word}." for word in CONCEPTS], padding=True, return_tensors="pt")
    expected = clip.model(pixel_values=clip.pixels(picture()), **tokens).logits_per_image
    close(clip.logits(clip.record(picture()).output[:, 0], clip.texts(CONCEPTS)), expected)
    expected = classifier.model(pixel_values=classifier.pixels(picture())).logits
    close(classifier.logits(classifier.record(picture()).output[:, 0]), expected)


def test_templates_are_averaged_as_directions():
    templates = ["a {}.", "water and {}"]
    each = torch.stack([vit("CLIPModel", templates=[text]).texts(CONCEPTS) for text in templates])
    found = vit("CLIPModel", templates=templates).texts(CONCEPTS)
    close(found, torch.nn.functional.normalize(each.sum(0), dim=-1))
    close(found.norm(dim=-1), torch.ones(3))


def test_a_picture_is_stretched_and_its_colours_are_those_of_training():
    given = vit("ViTModel", size=14, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    small = np.asarray(Image.fromarray(picture()).resize((12, 12), Image.Resampling.BICUBIC)) / 255
    expected = np.stack([(small[..., at] - (at + 1) / 10) / 2**at for at in range(3)])[None]
    np.testing.assert_allclose(given.pixels(picture()).numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_of_the_attention_that_was_used(frozen: bool):
    watched = vit("ViTForImageClassification")
    watched.model.requires_grad_(not frozen)
    with torch.inference_mode():  # whatever the caller has switched off
        seen = watched.record(picture(), gradients=True)
    with torch.enable_grad():
        score = watched.logits(seen.output[:, 0])[0, 1]
    (slope,) = torch.autograd.grad(score, seen.attention[0])
    step = 1e-2 * torch.randn(slope.shape, generator=torch.Generator().manual_seed(1))
    added = [score_with(watched, sign * step) for sign in (1, -1)]
    close((added[0] - added[1]) / 2, (slope * step).sum().detach(), rtol=1e-2, atol=1e-5)
    assert all(parameter.grad is None for parameter in watched.model.parameters())


def score_with(watched: ViT, added: torch.Tensor) -> torch.Tensor:
    """The logit when something is added to the attention of the first layer, whose output is linear in it."""
    seen = watched.record(picture())
    change = (added @ seen.values[0]).transpose(1, 2).flatten(2) @ watched.blocks[0].out.weight.T
    handle = watched.blocks[0].attention.register_forward_hook(lambda _, __, out: (out[0] + change, None))
    try:
        return watched.logits(watched.record(picture()).output[:, 0])[0, 1].detach()
    finally:
        handle.remove()


def state_of(given) -> list:
    hooks = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in given.named_modules()]
    configs = [part.config._attn_implementation for part in given.modules() if hasattr(part, "config")]
    return [hooks, configs, json.loads(given.config.to_json_string()), given.training]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_the_model_leaves_as_it_came(name: str, own: str):
    watched = vit(name)
    watched.model.set_attn_implementation(own)
    before, weights = state_of(watched.model), watched.attrs["weights"]
    watched.record(picture(), gradients=True)
    assert state_of(watched.model) == before
    handle = watched.blocks[1].norm2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watched.record(picture())
    handle.remove()
    assert state_of(watched.model) == before
    assert watched.attrs["weights"] == weights


def test_words_are_read_by_the_text_encoders_own_attention():
    """With its causal mask: the vector does not change when the vision side is being recorded."""
    watched = vit("CLIPModel")
    expected = watched.texts(["sun"])
    inside = []
    hook = watched.blocks[0].norm2.register_forward_hook(lambda *_: inside.append(watched.texts(["boat", "sun"])))
    watched.record(picture())
    hook.remove()
    close(inside[0][1:], expected)
    close(inside[0][:1], vit("CLIPModel").texts(["boat"]))


@pytest.mark.parametrize("name", NAMES)
def test_loading_from_a_folder(name: str, tmp_path):
    made = model(name)
    made.save_pretrained(tmp_path)
    if name == "CLIPModel":
        clip_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    loaded = ViT.load(str(tmp_path), size=16, revision="main")
    assert type(loaded.model) is type(made)
    assert (loaded.mean, loaded.std, loaded.size, loaded.revision) == ((0.1,) * 3, (0.2,) * 3, 16, "main")
    close(loaded.record(picture()).output, vit(name, size=16, mean=(0.1,) * 3, std=(0.2,) * 3).record(picture()).output)
    assert ViT.load(str(tmp_path), mean=(0.3,) * 3).mean == (0.3,) * 3
    assert str(tmp_path) in loaded.describe()


def test_the_description_knows_the_weights():
    one, other = vit("ViTModel"), vit("ViTModel")
    assert one.describe() == other.describe()
    with torch.no_grad():
        other.model.embeddings.cls_token.add_(1)
    assert one.describe() != other.describe()
    assert one.describe() != vit("ViTModel", size=16).describe()


def test_what_is_refused(tmp_path):
    error = dp.errors.ModelError
    with pytest.raises(error, match="Linear is no vision transformer"):
        ViT(torch.nn.Linear(2, 2))
    with pytest.raises(error, match="needs its tokenizer"):
        ViT(model("CLIPModel"))
    with pytest.raises(error, match="size=3 is below the patch of 4"):
        vit("ViTModel", size=3)
    with pytest.raises(error, match="in training mode"):
        ViT(model("ViTModel").train())
    with pytest.raises(error, match="reads no words"):
        vit("ViTModel").texts(["sun"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(error, match="type 'bert'"):
        ViT.load(str(tmp_path))
    broken = model("ViTModel")
    del broken.layers[1].layernorm_after
    with pytest.raises(error, match="ViTLayer has no 'layernorm_after' in transformers"):
        ViT(broken)
    watched = vit("ViTModel")
    watched.model.train()
    with pytest.raises(error, match="in training mode"):
        watched.record(picture())


@pytest.mark.parametrize(
    ("images", "concepts", "error", "match"),
    [
        ([picture()], [], dp.errors.ConceptError, r"concepts=\[\]"),
        ([picture()], "sun", dp.errors.ConceptError, "concepts='sun'"),
        ([], CONCEPTS, dp.errors.MapError, "no images"),
        ([picture(), picture() / 255], CONCEPTS, dp.errors.MapError, r"image 1 is float64, \(18, 25, 3\)"),
        ([picture()[..., 0]], CONCEPTS, dp.errors.MapError, r"image 0 is uint8, \(18, 25\)"),
        ([Image.fromarray(picture())], CONCEPTS, dp.errors.MapError, "image 0 is Image"),
    ],
)
def test_a_method_refuses_what_has_no_map(images, concepts, error, match, monkeypatch):
    method = ViTAttention(vit("ViTModel"))
    monkeypatch.setattr(ViT, "record", lambda *_, **__: pytest.fail("a pass was made first"))
    with pytest.raises(error, match=match):
        method(images, concepts)


@pytest.mark.parametrize("name", SCORED)
def test_half_precision_gives_the_same_maps_nearly(name: str):
    whole, half = vit(name), vit(name)
    half.model.to(torch.bfloat16)
    found = [ViTAttention(given, layers=None)([picture()], CONCEPTS) for given in (whole, half)]
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[1], found[0], atol=0.03)
