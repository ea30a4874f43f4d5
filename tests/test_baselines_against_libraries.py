"""Maps against those of libraries that others wrote; a test whose library is not installed is skipped.

Both ask for torchvision, which must fit torch and is no part of this project: attention-map-diffusers does without it,
pytorch-grad-cam wants it and is best put into an environment of its own.

    pip install --no-deps attention-map-diffusers==1.0.0
    pip install grad-cam==1.5.7
    python -m pytest tests/test_baselines_against_libraries.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dit_probe as dp
from dit_probe.demo.text import clip_tokenizer
from dit_probe.testing import cases, leftovers, tiny_model
from probes import PromptAttention
from probes.baselines.gradients import GradCAM
from probes.baselines.joint_attention import JointAttention
from probes.baselines.tiny_unet import tiny_pipeline
from probes.baselines.unet import UNet, attention_weights
from probes.baselines.vit import ViT
from tests.baselines_vit_cases import CONCEPTS, GRID, SCORED, SIDE, model, picture
from tests.test_baselines_joint_attention import CASES, PICTURE, PROMPT, WORDS, given

COVERED = ("cogvideox", "flux", "flux2", "hunyuan-video", "hunyuan-video-1.5", "sd3", "z-image")


def same(found, expected) -> None:
    """Numbers are equal to 1e-5 of the largest."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.ptp(expected) > 0, "nothing to compare"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def collected(pipe, run) -> dict[str, dict[str, torch.Tensor]]:
    """What attention-map-diffusers keeps while `run` runs: by relation and module, (row, head, query, key)."""
    library = pytest.importorskip("attention_map_diffusers")
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    before = processors(denoiser)
    with library.AttentionCapture(pipe, relations="all", heads="all") as capture:
        run()
    # It puts processors into modules of this model, and nothing else; other tests must not meet them.
    assert processors(denoiser) == before and leftovers(denoiser) == []
    found: dict[str, dict[str, torch.Tensor]] = {}
    for record in capture.compute().records:
        relation = record.relation.replace("video", "image")
        found.setdefault(relation, {})[record.layer_id.partition(".")[2]] = record.data
    return found


def processors(denoiser: nn.Module) -> dict[str, Any]:
    return {name: getattr(part, "processor", None) for name, part in denoiser.named_modules()}


def stacked(layers: dict[str, torch.Tensor]) -> np.ndarray:
    """Of all layers, (row, layer, head, query, key)."""
    return torch.stack([*layers.values()], 1).numpy()


@pytest.mark.parametrize(("family", "variant"), [case for case in cases() if case[0] in COVERED])
def test_joint_attention_is_that_of_attention_map_diffusers(family, variant):
    tiny = tiny_model(family, variant)
    run = torch.no_grad()(lambda: tiny.transformer(**tiny.inputs))
    theirs = collected(SimpleNamespace(transformer=tiny.transformer), run)
    with dp.trace(tiny.transformer, PromptAttention(layers="all"), progress=False) as traced:
        run()
    ds = traced.dataset.isel(step=0)
    for name, relation in (("attention_x_to_p", "image->text"), ("attention_p_to_x", "text->image")):
        expected = stacked(theirs[relation]).mean(2)
        # The library leaves out single blocks of Flux.1, and keeps Z-Image's padding of tokens to a multiple of 32.
        found = ds[name].sel(layer=ds.kind == "joint") if family == "flux" else ds[name]
        assert found.sizes["layer"] == expected.shape[1]
        same(found, expected[..., : found.shape[-2], : found.shape[-1]])


@pytest.mark.parametrize(("family", "variant"), [("flux", "dev"), ("sd3", "sd3.5-medium"), ("cogvideox", "2b")])
def test_words_of_a_prompt_are_those_of_attention_map_diffusers(family, variant, pipelines):
    image, options, real, places = CASES[family]
    pipe, size = pipelines(family, variant), image.shape[0] if image.ndim == 3 else None
    theirs = collected(pipe, lambda: dp.encode(pipe, given(image), PROMPT, 400, **options.get("text", {})))
    to_words, from_words = (stacked(theirs[relation])[0] for relation in ("image->text", "text->image"))
    to_words *= to_words.sum(-1, keepdims=True) / to_words[..., real].sum(-1, keepdims=True)  # padding hands on
    readings: Any = {"image_to_text": to_words.swapaxes(-1, -2), "text_to_image": from_words}
    for reading, tokens in readings.items():
        found = JointAttention(pipe, reading, timesteps=(400,), size=size, **options).scores([image], WORDS)
        if family == "cogvideox":  # 9 frames are 3 latent ones, 1 + 4 + 4
            found = found.isel(frame=[0, 1, 5])
        for word, place in places.items():
            maps = found.sel(concept=word)[0, 0].values
            same(maps.reshape(*maps.shape[:2], -1), tokens[:, :, place].mean(2))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_cross_attention_of_unets_is_that_of_attention_map_diffusers(kind):
    unet, ours = UNet(tiny_pipeline(kind)), dict[str, torch.Tensor]()
    prompt = unet.read("a sun on water")

    def see(name: str, q: torch.Tensor) -> None:
        ours[name] = attention_weights(unet.layers[name], q, prompt.states)

    theirs = collected(unet.pipe, lambda: unet.run(unet.encode(PICTURE), prompt, 500, see))["image->text"]
    assert set(theirs) - set(ours) == {name for name in theirs if name.startswith("mid_block")}
    for name, found in ours.items():
        same(found, theirs[name][0])


class Scores(nn.Module):
    """The scores that are explained, as the one output that pytorch-grad-cam takes of a model."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.model = vit.model
        self.words = vit.tokenizer(CONCEPTS, padding=True, return_tensors="pt") if vit.is_clip else None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.words is None:
            return self.model(pixel_values=pixels).logits
        return self.model(pixel_values=pixels, **self.words).logits_per_image


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("score", ["logit", "softmax"])
@pytest.mark.parametrize("name", SCORED)
def test_gradcam_of_tokens_is_that_of_pytorch_grad_cam(name, score, seed):
    library = pytest.importorskip("pytorch_grad_cam")
    clip = name == "CLIPModel"
    # In double precision: gradients that cancel leave 7e-6 between two ways of summing them in single precision.
    vit = ViT(model(name, seed).double(), clip_tokenizer() if clip else None, templates=["{}"])
    ours = GradCAM(vit, "token", score=score, layers=None).scores([picture(seed)], CONCEPTS)[0].values
    pixels, scores = vit.pixels(picture(seed)), Scores(vit)
    tower, norm = ("vision_model", "layer_norm1") if clip else ("vit", "layernorm_before")
    norms = [part for path, part in vit.model.named_modules() if path.startswith(tower) and path.endswith(norm)]

    def as_maps(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 1:].unflatten(1, GRID).permute(0, 3, 1, 2)

    for at, concept in enumerate([0, 1, 2] if clip else [int(scores(pixels).argmax())]):
        targets = [lambda row, at=concept: (row.softmax(-1) if score == "softmax" else row)[at]]
        with library.GradCAM(scores, norms, reshape_transform=as_maps) as cam:
            whole = cam(pixels, targets)
            kept = zip(norms, cam.activations_and_grads.activations, cam.activations_and_grads.gradients, strict=True)
            raw = [cam.get_cam_image(pixels, layer, targets, f.numpy(), slope.numpy()) for layer, f, slope in kept]
        # What is left out of our map: a range of 0..1 in each layer, the picture's size, and 0..1 of the layers' mean.
        same(ours[at], np.maximum(raw, 0)[:, 0])
        scale = library.utils.image.scale_cam_image
        same(scale(scale(ours[at], (SIDE, SIDE)).mean(0)[None]), whole)
