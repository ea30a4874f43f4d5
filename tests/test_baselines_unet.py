"""The capture of UNets: the pass is the pipeline's own, and queries and keys give what the model computes."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dit_probe.errors import ConceptError, ModelError, SiteError, TraceError
from dit_probe.testing import leftovers
from probes.baselines.tiny_unet import tiny_pipeline
from probes.baselines.unet import UNet, attention_weights

KINDS = ("sd", "sdxl")
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
DOWN = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
]


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipeline(kind) for kind in KINDS}


def calls(module, run):
    """Arguments and outputs of a module's calls while `run` runs."""
    seen = []
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return seen


def captured(unet: UNet, text: str = "a sun", timestep: float = 500) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    unet.run(unet.encode(PICTURE), unet.read(text), timestep, found.__setitem__)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_unet_is_told_what_the_pipeline_tells_it(kind, pipes):
    pipe, unet = pipes[kind], UNet(pipes[kind])
    own = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "height": 16, "width": 16}
    theirs = calls(pipe.unet, lambda: pipe("a sun on water", **own))[0][1]
    (args, kwargs, _), *more = calls(pipe.unet, lambda: captured(unet, "a sun on water"))
    assert not more and len(args[0]) == 1  # one call, and one row in it
    torch.testing.assert_close(args[2], theirs["encoder_hidden_states"], rtol=0, atol=0)
    if kind == "sdxl":
        for name in ("text_embeds", "time_ids"):
            torch.testing.assert_close(kwargs["added_cond_kwargs"][name], theirs["added_cond_kwargs"][name])


@pytest.mark.parametrize("scheduler", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LMSDiscrete"])
@pytest.mark.parametrize("timestep", [5, 321, 1000])
def test_noise_is_that_of_every_scheduler(scheduler, timestep, pipes):
    pipe = diffusers.StableDiffusionPipeline(**pipes["sd"].components, requires_safety_checker=False)
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    unet = UNet(pipe, seed=3)
    latents = unet.encode(PICTURE)
    noised, at = calls(pipe.unet, lambda: captured(unet, timestep=timestep))[0][0][:2]
    # A schedule of all timesteps: DPM-Solver's own, before it is set, pairs timesteps with other noise levels.
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(1000)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    expected = scheduler.scale_model_input(scheduler.add_noise(latents, noise, at[None]), at)
    torch.testing.assert_close(noised, expected, rtol=1e-4, atol=1e-5)
    assert int(at) == min(timestep, 999)


def test_latents_are_the_autoencoders(pipes):
    pipe = pipes["sd"]
    big = np.random.default_rng(1).integers(0, 256, (40, 20, 3), np.uint8)
    small = np.asarray(Image.fromarray(big).resize((32, 32), Image.Resampling.LANCZOS))
    pixels = torch.from_numpy(small.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.quant_conv(pipe.vae.encoder(pixels)) if pipe.vae.quant_conv else pipe.vae.encoder(pixels)
    found = UNet(pipe, size=32).encode(big)
    torch.testing.assert_close(found, mean[:, :4] * pipe.vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_a_half_precision_autoencoder_is_upcast_and_comes_back(pipes):
    pipe = copy.deepcopy(pipes["sdxl"])
    pipe.vae.to(torch.float16)
    before = copy.deepcopy(pipe.vae.state_dict())
    found = UNet(pipe).encode(PICTURE)
    torch.testing.assert_close(found, UNet(pipes["sdxl"]).encode(PICTURE), rtol=0.02, atol=0.02)
    assert all(torch.equal(value, before[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_the_layers_output(kind, pipes):
    pipe = pipes[kind]
    unet = UNet(pipe)
    text = unet.read("a sun on water")
    outputs = {name: calls(module, lambda: captured(unet, "a sun on water")) for name, module in unet.layers.items()}
    queries = captured(unet, "a sun on water")
    with torch.no_grad():
        for name, attention in unet.layers.items():
            weights = attention_weights(attention, queries[name], text.states)
            assert weights.shape[0] == attention.heads and weights.dtype == torch.float32
            values = attention.to_v(text.states)[0].unflatten(-1, (attention.heads, -1)).transpose(0, 1)
            attended = (weights @ values).transpose(0, 1).flatten(1)[None]
            found = attention.to_out[0](attended)
            torch.testing.assert_close(found, outputs[name][0][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_is(kind, pipes):
    pipe, unet = pipes[kind], UNet(pipes[kind])
    processors, scheduler = pipe.unet.attn_processors, copy.deepcopy(vars(pipe.scheduler))
    latents, text = unet.encode(PICTURE), unet.read("a sun")
    args, kwargs, _ = calls(pipe.unet, lambda: unet.run(latents, text, 500, lambda name, q: None))[0]
    prediction = unet.run(latents, text, 500, lambda name, q: None)
    with torch.no_grad():
        assert torch.equal(prediction, pipe.unet(*args, **kwargs)[0])
    assert leftovers(pipe.unet) == []
    assert all(now is processors[name] for name, now in pipe.unet.attn_processors.items())
    assert str(vars(pipe.scheduler)) == str(scheduler)


def test_hooks_go_when_something_breaks(pipes):
    pipe, unet = pipes["sd"], UNet(pipes["sd"])
    processors = pipe.unet.attn_processors

    def broken(name, q):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        unet.run(unet.encode(PICTURE), unet.read("a sun"), 500, broken)
    assert leftovers(pipe.unet) == []
    assert all(now is processors[name] for name, now in pipe.unet.attn_processors.items())


@pytest.mark.parametrize("change", ["eager", "fused", "offloaded"])
def test_other_processors_and_places_give_the_same(change, pipes):
    pipe = copy.deepcopy(pipes["sdxl"])
    if change == "eager":
        pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    elif change == "fused":
        pipe.unet.fuse_qkv_projections()
    else:
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
        assert next(pipe.unet.parameters()).is_meta
    states = UNet(pipe).read("a sun").states
    found, expected = captured(UNet(pipe)), captured(UNet(pipes["sdxl"]))
    for name, attention in UNet(pipes["sdxl"]).layers.items():
        with torch.no_grad():
            other = attention_weights(UNet(pipe).layers[name], found[name], states)
            torch.testing.assert_close(
                other, attention_weights(attention, expected[name], states), rtol=1e-4, atol=1e-6
            )


def test_a_processor_that_calls_no_projection_is_named(pipes):
    class Deaf:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    pipe = copy.deepcopy(pipes["sd"])
    unet = UNet(pipe)
    unet.layers[DOWN[1]].set_processor(Deaf())
    with pytest.raises(TraceError, match=r"1 of 6 cross-attentions did not call to_q, first down_blocks.1"):
        captured(unet)
    assert leftovers(pipe.unet) == []


def test_layers_are_chosen_by_factor_and_the_middle_is_none(pipes):
    cross = [name for name, _ in pipes["sdxl"].unet.named_modules() if name.endswith("attn2")]
    assert any("mid_block" in name for name in cross)
    every, fine, coarse = (list(UNet(pipes["sdxl"], factors=f).layers) for f in ((1, 2), (1,), (2,)))
    assert every == [name for name in cross if "mid_block" not in name]
    assert fine == [name for name in every if name.startswith(("down_blocks.0", "up_blocks.1"))]
    assert sorted(fine + coarse) == sorted(every)
    assert {q.shape[1] for q in captured(UNet(pipes["sdxl"], factors=(2,))).values()} == {16}
    with pytest.raises(SiteError, match=r"factors=\(8,\): cross-attention of UNet2DConditionModel has \[1, 2\]"):
        UNet(pipes["sd"], factors=(8,))


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_found_where_they_are(kind, pipes):
    unet = UNet(pipes[kind])
    tokens = pipes[kind].tokenizer.convert_ids_to_tokens(pipes[kind].tokenizer("a zoo, a sun, a zoo").input_ids)
    assert tokens[:6] == ["<|startoftext|>", "a</w>", "z", "o", "o</w>", ",</w>"]
    text = unet.read("a zoo, a sun, a zoo", ["zoo", "sun", "a zoo"])
    assert text.places == ((2, 3, 4, 10, 11, 12), (7,), (1, 2, 3, 4, 9, 10, 11, 12))
    with pytest.raises(ConceptError, match=r"'boat', tokens \['boat</w>'\], is not in 'a sun', tokens .*'sun</w>'"):
        unet.read("a sun", ["boat"])
    with pytest.raises(ConceptError, match="is not in"):
        unet.read("a sun", [""])
    with pytest.raises(ConceptError, match="'boat'.*cut at 77"):
        unet.read("sun " * 80 + "boat", ["boat"])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_state(kind, pipes):
    unet, pipe = UNet(pipes[kind]), pipes[kind]
    bare = unet.read("a sun", padding=False)
    ids = pipe.tokenizer("a sun", return_tensors="pt").input_ids
    with torch.no_grad():
        if kind == "sd":
            expected = pipe.text_encoder(ids)[0]
        else:
            encoders = (pipe.text_encoder, pipe.text_encoder_2)
            expected = torch.cat([one(ids, output_hidden_states=True).hidden_states[-2] for one in encoders], -1)
    torch.testing.assert_close(bare.states, expected, rtol=1e-4, atol=1e-5)
    assert unet.read("a sun").states.shape[1] == 77


def test_what_is_no_stable_diffusion_is_refused(pipes):
    parts = pipes["sd"].components
    with pytest.raises(ModelError, match="UNet2DConditionModel is no text-to-image pipeline"):
        UNet(pipes["sd"].unet)
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ModelError, match="StableDiffusionImg2ImgPipeline is no .*from_pipe"):
        UNet(image_to_image)
    with pytest.raises(ModelError, match="size=15: give a multiple of 2"):
        UNet(pipes["sd"], size=15)
    flow = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        UNet(flow)


def test_loading_gives_the_same_model(pipes, tmp_path):
    pipes["sdxl"].save_pretrained(tmp_path)
    unet = UNet.load(str(tmp_path), revision="main", size=16, factors=(1,))
    assert unet.attrs["weights"] == UNet(pipes["sdxl"]).attrs["weights"]
    assert (unet.attrs["model"], unet.attrs["revision"]) == (str(tmp_path), "main")
    assert unet.architecture == "SDXL UNet" and UNet(pipes["sd"]).architecture == "SD1 UNet"
    changed = copy.deepcopy(pipes["sd"])
    changed.unet.conv_out.bias.data += 1
    assert UNet(changed).attrs["weights"] != UNet(pipes["sd"]).attrs["weights"]
