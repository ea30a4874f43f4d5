"""The demo models that ship: stock classes, offline, small, and their pictures look like their captions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from transformers import CLIPTokenizer

import dit_probe.demo as demo
from dit_probe.datasets.scenes import BACKGROUNDS, scene
from dit_probe.demo import progress, sd3
from dit_probe.demo.autoencoder import to_pixels
from dit_probe.demo.cogvideox import CogVideoXDenoiser
from dit_probe.demo.denoiser import save
from dit_probe.demo.examples import by_count, draw_clips, draw_scenes, held_out
from dit_probe.demo.flux import FluxDenoiser, positions
from dit_probe.demo.muon import Muon
from dit_probe.demo.sd3 import SD3Denoiser
from dit_probe.demo.text import TRAINED, VIDEO_WORDS, WORDS, clip_tokenizer, t5_encoder, t5_tokenizer, token_ids
from dit_probe.demo.train import RECIPES, main

FAMILIES = {
    "flux-picturebook": ("FluxPipeline", "FluxTransformer2DModel"),
    "sd35-picturebook": ("StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    "cogvideox-picturebook": ("CogVideoXPipeline", "CogVideoXTransformer3DModel"),
}
SHIPPED = demo.names()
SETTINGS: dict[str, Any] = {"num_inference_steps": 12, "max_sequence_length": 32, "output_type": "np"}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """Every demo model, by plain `from_pretrained` of a stock class."""
    made = {name: DiffusionPipeline.from_pretrained(demo.path(name)) for name in SHIPPED}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompts: list[str], **arguments: Any) -> np.ndarray:
    """(prompt, frame, y, x, 3) from 0 to 1; one frame of image models."""
    given = {**SETTINGS, "generator": torch.Generator().manual_seed(0), **arguments}
    if isinstance(pipe, FluxPipeline):
        given = {"height": 64, "width": 64, **given}
    drawn = pipe(prompts, **given)
    return drawn.frames if hasattr(drawn, "frames") else drawn.images[:, None]


@pytest.mark.parametrize("name", SHIPPED)
def test_plain_from_pretrained_gives_stock_classes_in_float32(name: str, pipes: dict[str, Any]) -> None:
    pipe = pipes[name]
    assert (type(pipe).__name__, type(pipe.transformer).__name__) == FAMILIES[name]
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert len(parts) >= 3
    for part in parts.values():
        assert type(part).__module__.split(".")[0] in ("diffusers", "transformers")
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        assert all(torch.isfinite(weight).all() for weight in part.parameters())


def test_weights_fit_in_eight_megabytes_each() -> None:
    for name in SHIPPED:
        files = list(demo.path(name).rglob("*.safetensors"))
        assert len(files) >= 3
        assert sum(file.stat().st_size for file in files) <= 8_000_000
        assert not list(demo.path(name).rglob("*.bin"))
        assert (demo.path(name) / "README.md").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_word_is_one_token(name: str, pipes: dict[str, Any]) -> None:
    words = VIDEO_WORDS if name.startswith("cogvideox") else WORDS
    tokenizers = [part for key, part in pipes[name].components.items() if key.startswith("tokenizer")]
    for tokenizer in tokenizers:
        for word in words:
            assert len(tokenizer.tokenize(word)) == 1, (tokenizer, word)
        assert tokenizer.unk_token_id not in tokenizer("zebra").input_ids or isinstance(tokenizer, CLIPTokenizer)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tokenizers_are_those_of_the_recipe(name: str, pipes: dict[str, Any]) -> None:
    caption = "a sun left of a boat, water zebra"
    words = VIDEO_WORDS if name.startswith("cogvideox") else WORDS
    for key, tokenizer in pipes[name].components.items():
        if key.startswith("tokenizer"):
            made = clip_tokenizer() if isinstance(tokenizer, CLIPTokenizer) else t5_tokenizer(words)
            assert tokenizer(caption).input_ids == made(caption).input_ids


def test_every_caption_is_made_of_trained_words() -> None:
    for seed in range(200):
        assert set(scene(seed).caption.replace(",", "").split()) <= set(TRAINED)


@pytest.mark.parametrize("name", SHIPPED)
def test_pictures_have_the_background_that_was_asked_for(name: str, pipes: dict[str, Any]) -> None:
    """Of real scenes on every background, the picture's median colour is nearest to the one in the prompt."""
    images = draw(pipes[name], [f"house, {word}" for word in BACKGROUNDS])
    drawn = np.median(images.reshape(len(images), -1, 3), axis=1)
    real = [np.median(scene(7, objects=["boat"], background_word=w).image.reshape(-1, 3), axis=0) for w in BACKGROUNDS]
    nearest = np.linalg.norm(drawn[:, None] - np.array(real)[None] / 255, axis=-1).argmin(axis=1)
    assert nearest.tolist() == list(range(len(BACKGROUNDS)))


@pytest.mark.parametrize("name", SHIPPED)
def test_pictures_show_something_smooth_and_reproducible(name: str, pipes: dict[str, Any]) -> None:
    images = draw(pipes[name], ["a sun on grass"])
    assert images.std() > 0.05
    # noise differs from pixel to pixel as much as from one end of the picture to the other; drawings don't
    assert np.abs(np.diff(images, axis=3)).mean() < 0.35 * images.std()
    assert np.array_equal(images, draw(pipes[name], ["a sun on grass"]))
    yellow = (images[0, 0, ..., 0] > 0.8) & (images[0, 0, ..., 1] > 0.55) & (images[0, 0, ..., 2] < 0.5)
    assert 0.01 < yellow.mean() < 0.3


@pytest.mark.parametrize("name", SHIPPED)
def test_the_many_unmasked_pads_of_a_plain_call_change_little(name: str, pipes: dict[str, Any]) -> None:
    """The stock defaults pad T5 to 226, 256 or 512 tokens and mask none of them."""
    most = {"flux-picturebook": 512, "sd35-picturebook": 256, "cogvideox-picturebook": 226}[name]
    drawn = [draw(pipes[name], ["a car on sand"], num_inference_steps=6, max_sequence_length=n) for n in (32, most)]
    medians = [np.median(images.reshape(-1, 3), axis=0) for images in drawn]
    assert np.abs(medians[0] - medians[1]).max() < 0.1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_plain_call_draws_at_the_size_of_the_training(name: str) -> None:
    loaded = demo.load(name)
    loaded.set_progress_bar_config(disable=True)
    drawn = loaded("a sun on water", num_inference_steps=1)
    if name.startswith("cogvideox"):
        assert (len(drawn.frames[0]), drawn.frames[0][0].size) == (9, (32, 32))
    else:
        assert drawn.images[0].size == (64, 64)


def test_autoencoder_is_faithful(pipes: dict[str, Any]) -> None:
    pipe = pipes["flux-picturebook"]
    pixels = to_pixels(np.stack([scene(9_000_000 + seed).image for seed in range(8)]))
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        error = (pipe.vae.decode(latents).sample - pixels).abs().mean()
    assert float(error) < 0.05
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert 0.8 < float(scaled.std()) < 1.2


def test_unknown_name_lists_those_known() -> None:
    assert set(demo.names()) <= set(FAMILIES)
    with pytest.raises(demo.DemoError, match="no demo model 'flux-comics'.*flux-picturebook"):
        demo.load("flux-comics")


def test_importing_the_demo_package_is_light() -> None:
    code = "import sys, dit_probe.demo; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_coarse_tokens_lie_between_the_fine_ones() -> None:
    fine, coarse = positions(16).reshape(16, 16, 3), positions(8).reshape(8, 8, 3)
    assert torch.equal(coarse, fine.reshape(8, 2, 8, 2, 3).mean(dim=(1, 3)))


def test_muon_updates_have_the_size_of_adams() -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(16, 48)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    Muon(weights, lr=1.0).step()
    for weight in weights:
        assert 0.1 < weight.detach().square().mean().sqrt().item() < 0.3


@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_training_continues_and_gives_the_same_stock_pipeline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "STEPS", 1)  # its page draws at every end of a training
    whole, parts, out = tmp_path / "whole", tmp_path / "parts", tmp_path / "out"
    small = f"{name} --samples 20 --autoencoder-steps 1 --device cpu".split()
    main([*small, "--steps", "1", "--work", str(parts)])
    shutil.copytree(parts, whole, ignore=lambda _, names: [n for n in names if n.startswith(("check", "pipe"))])
    main([*small, "--steps", "2", "--work", str(parts), "--resume", "--out", str(out)])
    main([*small, "--steps", "2", "--work", str(whole)])
    resumed, straight = (torch.load(work / "checkpoint.pt") for work in (parts, whole))
    assert resumed["step"] == straight["step"] == 2
    assert all(torch.equal(resumed["average"][key], straight["average"][key]) for key in straight["average"])
    assert json.loads((out / "training.json").read_text()) == {"step, minutes, loss": []}
    assert "Samples" in (parts / "training.html").read_text()
    stock = {"flux": "FluxPipeline", "sd35": "StableDiffusion3Pipeline", "cogvideox": "CogVideoXPipeline"}
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == stock[name.split("-")[0]]
    assert sum(file.stat().st_size for file in out.rglob("*.safetensors")) <= 8_000_000


def test_no_training_sample_has_words_that_are_held_out() -> None:
    for drawn, (_, captions) in ((60, draw_scenes(60)), (60, draw_clips(60))):
        assert 0 < len(captions) < drawn
        for several in captions:
            assert not any(held_out(caption.replace(",", "").split()) for caption in several)


def test_pads_and_end_marks_hear_next_to_nothing() -> None:
    """What a caption's attention adds to them is a small part of what they are."""
    tokenizer = t5_tokenizer()
    t5 = t5_encoder(len(tokenizer))
    with torch.no_grad():
        states = [t5(token_ids(tokenizer, [text], 12))[0][0] for text in ("a sun on water", "car, house, sand")]
    pad, noun = (float(torch.cosine_similarity(states[0][at], states[1][at], dim=0)) for at in (-1, 1))
    assert pad > 0.99 > noun


def test_words_of_a_prompt_may_be_encoded_alone() -> None:
    model = FluxDenoiser()
    apart = model.prompt(["sun, water", "boat, sun"], 8, apart=True)
    assert apart.shape == (2, 2, 64)
    alone = model.prompt(["sun"], 8)[0, 0]
    torch.testing.assert_close(apart[0, 0], alone)
    torch.testing.assert_close(apart[1, 1], alone)
    assert not torch.allclose(model.prompt(["boat, sun"], 8)[0, 2], alone, atol=1e-3)  # among others it hears them
    counts = by_count([["a sun above a boat", "boat, sun, water"], ["night"], ["a car moving left", "car, sand"]])
    assert counts == {3: [(0, "sun, boat, water")], 1: [(1, "night")], 2: [(2, "car, sand")]}


def test_coarse_tokens_of_sd3_have_the_mean_of_the_fine_ones() -> None:
    transformer = SD3Denoiser().transformer
    embedding = transformer.pos_embed
    fine = embedding.cropped_pos_embed(32, 32).reshape(8, 2, 8, 2, -1)
    with sd3.positions(embedding, 8):
        coarse = embedding.cropped_pos_embed(16, 16)
    assert torch.allclose(coarse.reshape(8, 8, -1), fine.mean(dim=(1, 3)), atol=1e-6)
    assert torch.equal(embedding.cropped_pos_embed(32, 32), fine.reshape(1, 256, -1))


def test_the_video_model_predicts_what_its_scheduler_takes() -> None:
    """One step of the scheduler with the true v gives back the image, whatever the timestep."""
    model, generator = CogVideoXDenoiser(), torch.Generator().manual_seed(0)
    image, noise = (torch.randn(2, 3, 16, 8, 8, generator=generator) for _ in range(2))
    scheduler = model.scheduler()
    scheduler.set_timesteps(1)
    for timestep in (0, 300, 999):
        seen, target = model.noised(image, noise, torch.full((2,), timestep / 1000))
        found = scheduler.step(target, timestep, seen, return_dict=False)[1]
        assert torch.allclose(found, image, atol=1e-4), timestep


def test_saved_pipeline_computes_what_was_trained(tmp_path: Path, pipes: dict[str, Any]) -> None:
    pipe, model = pipes["flux-picturebook"], FluxDenoiser()
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    save(model, pipe.vae, tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path)
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], weight), name
