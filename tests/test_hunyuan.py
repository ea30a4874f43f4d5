"""Pipelines around the Hunyuan models: what their prompt streams hold, guidance without names, sizes foretold."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tracing_cases import SIZES, traced

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.errors import ConceptError, TraceError

FAMILIES = ["hunyuan-image", "hunyuan-video", "hunyuan-video-1.5", "motif-video"]


@pytest.fixture
def pipe(request, pipelines):
    return pipelines(request.param, anatomy.families()[request.param].pipeline_variants[0])


@pytest.mark.parametrize("pipe", FAMILIES, indirect=True)
def test_a_plan_foretells_the_sizes(pipe):
    family = anatomy.find(pipe)
    call, probe = family.tiny_call, dp.Probe(record=["q_p", "q_x"])
    size = {"height": call["height"], "width": call["width"], "frames": call.get("num_frames", 1)}
    plan = probe.plan(pipe, **size, steps=2, max_sequence_length=call.get("max_sequence_length"))
    _, ds = traced(pipe, probe)
    for dim in ("prompt_token", "image_token", "layer", "step"):
        assert plan.layout.sizes[dim] == ds.sizes[dim]


@pytest.mark.parametrize("pipe", ["hunyuan-image", "hunyuan-video-1.5"], indirect=True)
def test_labels_say_what_stands_in_a_stream_of_two_texts(pipe):
    model, made = pipe.transformer, {}

    def keep(name, value):
        made.setdefault(name, value[0])  # of the first call, the prompt's

    modules = {"own": model.context_embedder, "second": model.context_embedder_2}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, module in modules.items()
    ]
    first = model.transformer_blocks[0]
    handles.append(first.register_forward_pre_hook(lambda module, args: keep("p", args[1])))
    _, ds = traced(pipe, dp.Probe(record=["q_p"]), call={"prompt": 'a sun "in" the sky', "steps": 1})
    for handle in handles:
        handle.remove()
    if hasattr(model, "cond_type_embed"):
        made["own"], made["second"] = (
            made[name] + model.cond_type_embed.weight[kind] for kind, name in enumerate(("own", "second"))
        )
    strings = ds.token.values[0].tolist()
    second = strings.index("</s>") + 1
    assert "".join(strings[:second]) == 'Text "in". </s>'
    assert strings[second : second + 2] == ["a", "sun"]
    real = len(strings) - strings[::-1].index("<|im_end|>")
    assert torch.equal(made["p"][:second], made["second"][:second])
    assert torch.equal(made["p"][second:real], made["own"][: real - second])


def test_guidance_of_pipelines_that_do_not_name_their_calls():
    pipe = testing.tiny_pipeline("hunyuan-video")
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    model = testing.randomise(diffusers.HunyuanVideoTransformer3DModel(**{**config, "in_channels": 8}))
    sky = diffusers.HunyuanSkyreelsImageToVideoPipeline(**{**pipe.components, "transformer": model})
    sky.set_progress_bar_config(disable=True)
    call = {
        "image": Image.new("RGB", (48, 32)),
        "output_type": "pt",
        "num_inference_steps": 1,
        **SIZES["hunyuan-video"],
    }

    def run(branch, **options):
        generator = torch.Generator().manual_seed(0)
        with dp.trace(sky, dp.Probe(record=["q_p"]), branch=branch, progress=False) as run:
            sky(generator=generator, **call, **options)
        return run.dataset.q_p

    both = run("both", prompt="a sun", negative_prompt="a boat", true_cfg_scale=2.0, guidance_scale=1.0)
    for branch, prompt in (("cond", "a sun"), ("uncond", "a boat")):
        alone = run("cond", prompt=prompt, guidance_scale=1.0)
        np.testing.assert_array_equal(both.sel(branch=branch), alone)


def test_words_that_are_encoded_with_an_image():
    parts = testing.tiny_pipeline("hunyuan-video").components
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(**parts, image_processor=None)
    family = anatomy.find(pipe)
    with pytest.raises(ConceptError, match="together with its image"):
        family.encode_text(pipe, ["sun"], 16)
    assert set(family.tokens(pipe, "a sun", 9)[0]) == {""}


def test_several_videos_of_one_prompt_are_not_taken_for_guidance(pipelines):
    pipe = pipelines("hunyuan-video", "padded")
    with pytest.raises(TraceError, match="num_videos_per_prompt"):
        traced(pipe, dp.Probe(record=["q_p"]), call={"num_videos_per_prompt": 2})
    assert testing.leftovers(pipe) == []
    _, ds = traced(pipe, dp.Probe(record=["q_p"]), call={"prompt": ["a sun", "a sun"], "steps": 1})
    assert ds.sizes["sample"] == 2


def test_framepack_counts_tokens_exactly():
    mask = torch.ones(1, 301, dtype=torch.bfloat16)
    framepack = anatomy.families()["framepack"]
    assert framepack.prompt_tokens(None, {"encoder_attention_mask": mask}) == 301
