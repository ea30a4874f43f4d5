"""Pipelines that call their transformer otherwise: guidance, ControlNets, IP-adapters, images to begin with."""

import threading

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from robustness_cases import PROBE, call, caller, need, nothing_alike, replayed, same, unharmed
from tracing_cases import SIZES

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.errors import TraceError

# diffusers' own: the ControlNet of Flux asks for a class that has moved.
pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.*:FutureWarning")


# --- Guidance


@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_every_row_of_a_guided_batch_is_its_own_sample(family, pipelines):
    """In one call of all rows or in two calls: each sample's halves are those of its own call."""
    pipe = pipelines(family)
    guided = anatomy.find(pipe).guided_call
    prompts = ["a sun in the sky", "a boat on water"]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with dp.trace(pipe, PROBE, branch="both", progress=False) as run:
        options = {name: [value] * 2 if name == "negative_prompt" else value for name, value in guided.items()}
        pipe(prompts, num_inference_steps=1, generator=generators, **SIZES[family], **options)
    for row, prompt in enumerate(prompts):
        with dp.trace(pipe, PROBE, branch="both", progress=False) as one:
            generator = torch.Generator().manual_seed(1 + row)
            pipe(prompt, num_inference_steps=1, generator=generator, **SIZES[family], **guided)
        for name in ("o_x", "o_c"):
            found, expected = run.dataset[name].isel(sample=row), one.dataset[name].isel(sample=0)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert not np.allclose(expected.sel(branch="cond"), expected.sel(branch="uncond"))


def test_skip_layer_guidance_changes_nothing_in_the_step_before_it_acts(pipelines):
    pipe = pipelines("sd3")
    skips = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    guided, usual = (unharmed(pipe, caller("sd3", **options), branch="both") for options in (skips, {}))
    assert same(guided.isel(step=[0]), usual.isel(step=[0]))
    assert not np.array_equal(guided.x.isel(step=1), usual.x.isel(step=1))


@pytest.mark.parametrize(("scale", "rows"), [(7.0, 3), (1.0, 2)])
def test_perturbed_attention_guidance_is_refused(scale, rows):
    """Without classifier-free guidance it doubles the rows, too: prompt first, perturbed second."""
    need("StableDiffusion3PAGPipeline")
    pipe = built("StableDiffusion3PAGPipeline", testing.tiny_pipeline("sd3"), pag_applied_layers="transformer_blocks.1")
    probe = dp.Probe(record=["o_x"], layers=[0])
    with pytest.raises(TraceError, match=f"{rows} rows for 1 samples.*not perturbed-attention guidance"):
        unharmed(pipe, caller("sd3", pag_scale=2.0, guidance_scale=scale), probe)


# --- Pipelines built of the tiny pipeline's parts


def built(name, pipe, **more):
    """Another pipeline around the same components."""
    need(name)
    takes = getattr(diffusers, name).__init__.__annotations__
    parts = {key: part for key, part in pipe.components.items() if key in takes}
    made = getattr(diffusers, name)(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


# Inpainting insists on 16 channels of latents; a video that begins with an image reads that beside the noise, and has a
# learned table of positions as 5B-I2V has.
CONFIGS = {
    "StableDiffusion3InpaintPipeline": {"in_channels": 16, "out_channels": 16},
    "CogVideoXImageToVideoPipeline": {
        "in_channels": 8,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
}


def configured(name, family):
    """Parts for a pipeline that wants a transformer, and perhaps a VAE, of another configuration."""
    pipe, config = testing.tiny_pipeline(family), CONFIGS[name]
    pipe.transformer = testing.randomise(type(pipe.transformer).from_config({**pipe.transformer.config, **config}))
    latents = config.get("out_channels", pipe.vae.config.latent_channels)
    pipe.vae = type(pipe.vae).from_config({**pipe.vae.config, "latent_channels": latents}).eval()
    return pipe


def picture(width, height):
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def right_half(width, height):
    return Image.fromarray(np.tile(np.where(np.arange(width) < width // 2, 0, 255).astype(np.uint8), (height, 1)))


LANDSCAPE, SQUARE = (24, 16), (16, 16)
GUIDED = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}
FROM_IMAGES = {
    "FluxImg2ImgPipeline": ("flux", {"image": picture(*LANDSCAPE), "strength": 0.5}, [500, 250]),
    "FluxInpaintPipeline": (
        "flux",
        {"image": picture(*LANDSCAPE), "mask_image": right_half(*LANDSCAPE), "strength": 0.75},
        [750, 500, 250],
    ),
    "FluxKontextPipeline": (
        "flux",
        {"image": picture(*LANDSCAPE), "max_area": 16 * 24, "_auto_resize": False},
        [1000, 750, 500, 250],
    ),
    "StableDiffusion3Img2ImgPipeline": ("sd3", {"image": picture(*SQUARE), "strength": 0.5}, [602, 9]),
    "StableDiffusion3InpaintPipeline": (
        "sd3",
        {"image": picture(*SQUARE), "mask_image": right_half(*SQUARE), "strength": 0.75},
        [858, 602, 9],
    ),
    "CogVideoXImageToVideoPipeline": ("cogvideox", {"image": picture(48, 32), "num_frames": 9}, [750, 500, 250, 0]),
    "CogVideoXVideoToVideoPipeline": ("cogvideox", {"video": [picture(48, 32)] * 9, "strength": 0.5}, [250, 0]),
}


def times(pipe, run):
    """Timesteps that the transformer is called with."""
    found = []
    time = anatomy.find(pipe).time
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(time(kwargs)), with_kwargs=True
    )
    run(pipe)
    handle.remove()
    return found


@pytest.mark.parametrize("name", FROM_IMAGES)
def test_pipelines_that_begin_with_an_image(name, pipelines):
    """Steps and timesteps are those that really run: part of the schedule."""
    family, options, expected = FROM_IMAGES[name]
    pipe = built(name, configured(name, family) if name in CONFIGS else pipelines(family))

    def run(pipe):
        if family != "cogvideox":
            return call(family, pipe, num_inference_steps=4, **options)
        # It counts its frames itself.
        given = {"height": 32, "width": 48, "num_inference_steps": 4, "output_type": "pt", **options}
        return pipe(prompt="a sun", generator=torch.Generator().manual_seed(0), **given).frames

    ds = replayed(pipe, run)
    assert ds.timestep.round().values.tolist() == expected
    np.testing.assert_allclose(ds.timestep, times(pipe, run))
    assert ds.step.values.tolist() == list(range(len(expected)))
    assert np.isfinite(ds.sigma).all() and bool((np.diff(ds.sigma) < 0).all())


def test_the_image_that_an_edit_starts_from_has_places_of_its_own(pipelines):
    _, options, _ = FROM_IMAGES["FluxKontextPipeline"]
    ds = unharmed(built("FluxKontextPipeline", pipelines("flux")), caller("flux", **options))
    assert ds.patch_frame.values.tolist() == [0] * 24 + [1] * 24


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxKontextPipeline"])
def test_two_call_guidance_that_no_name_tells_apart(name, pipelines):
    """These call for the prompt first, for the negative one second, and do not say which."""
    _, options, _ = FROM_IMAGES[name]
    pipe = built(name, pipelines("flux"))
    both = replayed(pipe, caller("flux", **options, **GUIDED), branch="both")
    for branch, prompt in [("cond", "a sun in the sky"), ("uncond", "a boat")]:
        alone = unharmed(pipe, caller("flux", **{**options, "prompt": prompt}))
        np.testing.assert_allclose(both.o_x.sel(branch=branch).isel(step=0), alone.o_x.isel(step=0), atol=1e-5)
    # In the second step it is clear that the first had no negative half.
    whole = {**options, "strength": 1.0} if "strength" in options else options
    with pytest.raises(TraceError, match="runs without classifier-free guidance"):
        unharmed(pipe, caller("flux", **whole), branch="both")


def test_a_scheduler_that_steps_twice(pipelines):
    pipe = built("StableDiffusion3Pipeline", pipelines("sd3"))
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    ds = unharmed(pipe, caller("sd3", num_inference_steps=3))
    np.testing.assert_allclose(ds.timestep, times(pipe, caller("sd3", num_inference_steps=3)))
    assert ds.sizes["step"] == 5


# --- ControlNet and IP-adapter


def control(family, pipe):
    config = pipe.transformer.config
    shared = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    shared |= {key: config[key] for key in ("in_channels", "joint_attention_dim", "pooled_projection_dim")}
    torch.manual_seed(0)
    if family == "flux":
        net = diffusers.FluxControlNetModel(**shared, num_single_layers=1, axes_dims_rope=(4, 6, 6))
    else:
        shared |= {key: config[key] for key in ("sample_size", "caption_projection_dim", "out_channels")}
        net = diffusers.SD3ControlNetModel(**shared, pos_embed_max_size=16)
    return testing.randomise(net, seed=1)


CONTROLLED = [("flux", "FluxControlNetPipeline", LANDSCAPE), ("sd3", "StableDiffusion3ControlNetPipeline", SQUARE)]


@pytest.mark.parametrize(("family", "name", "size"), CONTROLLED)
def test_controlnets(family, name, size, pipelines):
    pipe = built(name, pipelines(family), controlnet=control(family, pipelines(family)))
    options = {"control_image": picture(*size), **(GUIDED if family == "flux" else {})}
    ds = replayed(pipe, caller(family, **options), branch="both")
    off = unharmed(pipe, caller(family, **options, controlnet_conditioning_scale=0.0), branch="both")
    first, first_off = ds.isel(step=0), off.isel(step=0)
    # What it adds comes after a block: its x is what the block itself returned.
    assert same(first.sel(layer=0), first_off.sel(layer=0))
    assert nothing_alike(first.sel(layer=[1, 2]), first_off.sel(layer=[1, 2]))


def ip_adapter(pipe):
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(3)
    inner, width = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim

    def weight(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    projection = {"proj.weight": weight(4 * width, 20), "proj.bias": weight(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = {
        f"{layer}.{name}.{kind}": weight(*shape)
        for layer in range(config.num_layers)
        for name in ("to_k_ip", "to_v_ip")
        for kind, shape in (("weight", (inner, width)), ("bias", (inner,)))
    }
    weights = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(weights, weight_name=None, image_encoder_pretrained_model_name_or_path=None)


def test_an_ip_adapter(pipelines):
    """Attention modules return three things then, and attend twice."""
    pipe = testing.tiny_pipeline("flux")
    image = {f"{sign}ip_adapter_image_embeds": [torch.ones(1, 1, 20)] for sign in ("", "negative_")}
    with dp.trace(pipe, PROBE, progress=False) as run:
        ip_adapter(pipe)
        during = call("flux", pipe, **image)
    ds = replayed(pipe, caller("flux", **image))
    assert torch.equal(during, call("flux", pipe, **image))
    assert same(run.dataset, ds)
    first, plain = ds.isel(step=0), unharmed(pipelines("flux"), caller("flux")).isel(step=0)
    assert np.array_equal(first.o_x.sel(layer=0), plain.o_x.sel(layer=0))
    assert nothing_alike(first.sel(layer=[1, 2, 3]), plain.sel(layer=[1, 2, 3]))
    both = replayed(pipe, caller("flux", **image, **GUIDED), branch="both")
    np.testing.assert_allclose(both.o_x.sel(branch="cond").isel(step=0), ds.o_x.isel(step=0), atol=1e-5)


def test_an_ip_adapter_of_sd3(pipelines):
    """Its processors are modules with weights, and attend to the image a second time."""
    pipe = testing.tiny_pipeline("sd3")
    model, heads = pipe.transformer, pipe.transformer.config.num_attention_heads
    size, width = model.config.attention_head_dim, model.config.attention_head_dim * heads
    image = {"ip_adapter_image_embeds": torch.ones(2, 1, 20)}
    with dp.trace(pipe, PROBE, progress=False) as run:
        adapters = {
            name: testing.randomise(SD3IPAdapterJointAttnProcessor2_0(width, width, size, 16), seed=seed)
            for seed, name in enumerate(model.attn_processors)
        }
        model.set_attn_processor(adapters)
        model.image_proj = testing.randomise(
            IPAdapterTimeImageProjection(20, width, 16, 1, 8, 2, num_queries=3, timestep_in_dim=8)
        )
        during = call("sd3", pipe, **image)
    ds = replayed(pipe, caller("sd3", **image))
    assert torch.equal(during, call("sd3", pipe, **image))
    assert same(run.dataset, ds)
    first, plain = ds.isel(step=0), unharmed(pipelines("sd3"), caller("sd3")).isel(step=0)
    assert np.array_equal(first.o_x.sel(layer=0), plain.o_x.sel(layer=0))
    assert nothing_alike(first.sel(layer=[1, 2]), plain.sel(layer=[1, 2]))


# --- Threads


@pytest.mark.parametrize("families", [("flux", "flux"), ("sd3", "cogvideox")])
def test_two_traces_at_once_in_two_threads(families):
    pipes = [testing.tiny_pipeline(family, seed=seed) for seed, family in enumerate(families)]
    runs = [caller(family) for family in families]
    untraced = [run(pipe) for run, pipe in zip(runs, pipes, strict=True)]
    alone = [unharmed(pipe, run) for run, pipe in zip(runs, pipes, strict=True)]
    for _ in range(2):
        outputs, found = [None, None], [None, None]
        together = threading.Barrier(2)

        def work(index, outputs=outputs, found=found, together=together):
            together.wait()
            with dp.trace(pipes[index], PROBE, progress=False) as trace:
                outputs[index] = runs[index](pipes[index])
            found[index] = trace.dataset.load()

        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, pipe in enumerate(pipes):
            assert torch.equal(outputs[index], untraced[index])
            assert same(found[index], alone[index])
            assert testing.leftovers(pipe) == []
