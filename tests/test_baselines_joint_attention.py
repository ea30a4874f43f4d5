"""Attention between image and words against numpy on recorded q and k, and what else the method promises."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import dit_probe as dp
from dit_probe.datasets.segmentation import PictureBook, PictureBookClips
from dit_probe.errors import ConceptError, ModelError, ProbeError, SiteError, TraceError
from dit_probe.testing import leftovers
from probes import PromptAttention
from probes.baselines.joint_attention import JointAttention, WordAttention, word_places

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (20, 12, 3), np.uint8)
VIDEO = np.random.default_rng(2).integers(0, 256, (9, 32, 48, 3), np.uint8)
WORDS = ["sun", "zoo", "sky"]
PROMPT = "a sun, a zoo, a sky"
T5 = ["▁a", "▁sun", ",", "▁a", "▁", "z", "o", "o", ",", "▁a", "▁sky", "</s>"]
CLIP = ["<|startoftext|>", "a</w>", "sun</w>", ",</w>", "a</w>", "z", "o", "o</w>", ",</w>", "a</w>", "sky</w>"]
IN_T5 = {"sun": [1], "zoo": [5, 6, 7], "sky": [10]}
IN_BOTH = {"sun": [2, 77 + 1], "zoo": [5, 6, 7, 77 + 5, 77 + 6, 77 + 7], "sky": [10, 77 + 10]}
TEXT = {"max_sequence_length": 16}
# family: a picture, options, tokens of its prompt that are not padding, places of the words
CASES = {
    "flux": (PICTURE, {"text": TEXT}, [*range(12)], IN_T5),
    "sd3": (PICTURE, {"text": TEXT}, [*range(12), *range(77, 77 + 12)], IN_BOTH),
    "cogvideox": (VIDEO, {}, [*range(12)], IN_T5),
}


def given(image):
    return list(image) if image.ndim == 4 else image


def attention(pipe, image, timestep=400.0, **text):
    """Joint attention of a pass in float64, and how many prompt tokens it begins with: (layer, head, query, key)."""
    with dp.trace(pipe, dp.Probe(record=["q_x", "k_x", "q_p", "k_p"]), progress=False) as run:
        dp.encode(pipe, given(image), PROMPT, timestep, **text)
    ds = run.dataset.isel(sample=0, step=0)
    parts = [ds[name].transpose("layer", "head", ..., "head_dim").values.astype(float) for name in ("q_p", "q_x")]
    q = np.concatenate(parts, 2)
    parts = [ds[name].transpose("layer", "head", ..., "head_dim").values.astype(float) for name in ("k_p", "k_x")]
    logits = np.einsum("lhqd,lhkd->lhqk", q, np.concatenate(parts, 2)) / q.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), ds.sizes["prompt_token"], ds["token"].values.tolist()


@pytest.fixture
def tiny(pipelines):
    """The method on the tiny Flux."""
    return lambda **settings: JointAttention(pipelines("flux"), **{"size": 16, "text": TEXT, **settings})


@pytest.fixture
def blocks(pipelines):
    """Calls of the first block of the tiny Flux, a list that grows."""
    made = []
    handle = pipelines("flux").transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


@pytest.mark.parametrize("family", CASES)
def test_maps_are_blocks_of_the_joint_softmax(family, pipelines):
    image, options, real, places = CASES[family]
    pipe = pipelines(family)
    weights, length, tokens = attention(pipe, image, **options.get("text", {}))
    assert tokens[-length:][: len(CLIP)] == CLIP if family == "sd3" else tokens[: len(T5)] == T5
    assert tokens[77 : 77 + len(T5)] == T5 or family != "sd3"
    size = image.shape[0] if image.ndim == 3 else None
    for reading in ("image_to_text", "text_to_image"):
        found = JointAttention(pipe, reading, timesteps=(400,), size=size, **options).scores([image], WORDS)
        assert found.dims[:5] == ("image", "concept", "timestep", "layer", "head") and found.dtype == np.float32
        for word, tokens_of_it in places.items():
            if reading == "text_to_image":
                expected = weights[:, :, tokens_of_it, length:].mean(2)
            else:
                block = weights[:, :, length:, :length]
                share = block.sum(-1) / block[..., real].sum(-1)
                expected = block[..., tokens_of_it].mean(-1) * share
            maps = found.sel(concept=word).isel(image=0, timestep=0)
            if family == "cogvideox":  # 9 frames are 3 latent ones, 1 + 4 + 4
                maps = maps.isel(frame=[0, 1, 5])
            values = maps.values.reshape(*maps.shape[:2], -1)
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-7)


def test_latent_frames_stand_for_the_frames_of_the_video(pipelines):
    found = JointAttention(pipelines("cogvideox")).scores([VIDEO], ["sun"])
    assert found.sizes["frame"] == 9
    same = [bool((found.isel(frame=at) == found.isel(frame=at - 1)).all()) for at in range(1, 9)]
    assert same == [False, True, True, True, False, True, True, True]


def test_the_mean_over_heads_is_the_probe_prompt_attention(tiny, pipelines):
    pipe = pipelines("flux")
    with dp.trace(pipe, PromptAttention(), progress=False) as run:
        dp.encode(pipe, PICTURE, PROMPT, 500, **TEXT)
    directions: Any = {"image_to_text": "image_to_prompt", "text_to_image": "prompt_to_image"}
    for reading, direction in directions.items():
        whole = dp.maps.prompt_attention(run.dataset, direction).isel(sample=0)
        expected = np.stack([whole.isel(prompt_token=at).mean("prompt_token") for at in IN_T5.values()])
        np.testing.assert_allclose(tiny(reading=reading)([PICTURE], WORDS)[0], expected, rtol=1e-4)


def observed(weights: torch.Tensor, pads: list[bool], reading: Any = "image_to_text") -> list[list[float]]:
    """Maps of two words at the places 0 and 1, 2 of a prompt, from attention weights (query, key), prompt first."""
    probe = WordAttention(["sun", "sky"], reading=reading, places={"sun": (0,), "sky": (1, 2)})
    prompt, end = len(pads), len(weights)
    block = dp.Observation(
        *(0, "joint", 0, "cond", 1.0, torch.tensor([pads]), 1),
        image=slice(prompt, end),
        prompt=slice(0, prompt),
        weights=lambda head: weights[None],
    )
    return [found[0, 0].tolist() for found in probe.observe(block, {}).values()]


def test_padding_hands_on_what_it_draws():
    row = torch.tensor([0.2, 0.1, 0.1, 0.6])  # three tokens and an image token
    weights = torch.stack([row] * 4)
    without = observed(weights, [False] * 3)
    padded = torch.tensor([0.1, 0.05, 0.05, 0.12, 0.08, 0.6])  # two pads draw half of what the prompt gets
    assert observed(torch.stack([padded] * 6), [False] * 3 + [True] * 2) == pytest.approx(np.array(without))
    assert without == pytest.approx(np.array([[0.2], [0.1]]))


def test_rows_of_words_are_left_as_they_are():
    weights = torch.arange(36.0).reshape(6, 6)
    assert observed(weights, [False] * 3 + [True] * 2, "text_to_image") == [[5.0], [(11.0 + 17.0) / 2]]


def test_each_timestep_is_a_pass_of_its_own(tiny, blocks):
    method = tiny(timesteps=(200, 700))
    found = method.scores([PICTURE, OTHER], ["sun", "sky"])
    assert len(blocks) == 4 and method.forwards == 2
    assert found.timestep.values.tolist() == [200, 700]
    late = tiny(timesteps=(700,)).scores([OTHER], ["sun", "sky"])
    np.testing.assert_allclose(found.isel(image=[1], timestep=[1]), late, rtol=1e-5)
    assert not np.allclose(found.isel(timestep=0), found.isel(timestep=1), rtol=1e-3)
    np.testing.assert_allclose(method([PICTURE, OTHER], ["sun", "sky"]), found.mean(("timestep", "layer", "head")))
    assert not np.allclose(tiny(seed=1)([PICTURE], ["sun"]), tiny()([PICTURE], ["sun"]), rtol=1e-3)


def test_layers_are_those_of_a_probe(tiny, pipelines):
    whole = tiny().scores([PICTURE], ["sun"])
    for layers, labels in (([-1], [2]), ((0, 2), [0, 2]), ("single", [3]), ((1, 3), [1, 3])):
        found = tiny(layers=layers).scores([PICTURE], ["sun"])
        assert found.layer.values.tolist() == labels
        if max(labels) < 3:
            np.testing.assert_array_equal(found, whole.sel(layer=labels))
    assert leftovers(pipelines("flux")) == []


def test_words_compete_in_one_prompt(tiny):
    assert tiny(form="{}", separator=" and ").prompt(["sun", "sky"]) == "sun and sky"
    one, two = (tiny()([PICTURE], words).sel(concept="sun") for words in (["sun"], ["sun", "sky"]))
    assert not np.allclose(one, two, rtol=1e-3)


def test_words_are_found_whole_and_in_all_places():
    tokens = ["<|startoftext|>", "hot</w>", "dog</w>", ",</w>", "a</w>", "dog", "gy</w>", "<|endoftext|>", "!"]
    tokens += ["▁Hot", "▁", "d", "og", ",", "▁a", "▁pad", "</s>", "<pad>", "<pad>"]
    found = word_places(tokens, ["hot dog", "dog", "doggy", "pad"], "…")
    assert found == {"hot dog": (1, 2, 9, 11, 12), "dog": (2, 11, 12), "doggy": (5, 6), "pad": (15,)}
    assert word_places(["a", "Ġt", "-", "sh", "irt", ",", "Ġa"], ["t-shirt", "a"], "…") == {
        "t-shirt": (1, 2, 3, 4),
        "a": (0, 6),
    }
    with pytest.raises(ConceptError, match=r"'doggy' is not among the 2 tokens of 'a doggy', .* read 'a dog'"):
        word_places(["▁a", "▁dog"], ["doggy"], "a doggy")


def test_a_word_without_tokens_is_refused_before_the_first_block(tiny, blocks, pipelines):
    with pytest.raises(ConceptError, match="'sky' is not among the 8 tokens .* longer max_sequence_length"):
        tiny(text={"max_sequence_length": 8})([PICTURE], ["sun", "boat", "sky"])
    with pytest.raises(ConceptError, match="'sky' is not among"):
        tiny(form="a sun")([PICTURE], ["sun", "sky"])
    assert not blocks and leftovers(pipelines("flux")) == ["transformer_blocks.0._forward_pre_hooks"]  # of this test


def test_wrong_use_is_said_before_anything_runs(tiny, blocks, pipelines):
    for words, match in (([], r"concepts=\[\]"), ("sun", "concepts='sun'"), (["sun", "sun"], "more than once")):
        with pytest.raises(ConceptError, match=match):
            tiny()([PICTURE], words)
    with pytest.raises(TraceError, match="one picture or more"):
        tiny()([], ["sun"])
    with pytest.raises(TraceError, match=r"found float64 \(16, 16, 3\), expected a picture"):
        tiny()([PICTURE / 255], ["sun"])
    assert not blocks
    with pytest.raises(TraceError, match="timesteps=.1001,."):
        tiny(timesteps=(1001,))
    with pytest.raises(ProbeError, match="reading='concept_keys'"):
        tiny(reading="concept_keys")
    with pytest.raises(SiteError, match="no layer 9 in FluxTransformer2DModel"):
        tiny(layers=[9])
    with pytest.raises(ModelError, match="FluxTransformer2DModel is no pipeline"):
        JointAttention(pipelines("flux").transformer)


def test_pictures_of_one_call_have_one_grid(tiny):
    wide = np.zeros((16, 32, 3), np.uint8)
    with pytest.raises(TraceError, match="different grids"):
        JointAttention(FluxOfAnySize(tiny().pipe), text=TEXT).scores([PICTURE, wide], ["sun"])


class FluxOfAnySize:
    """A pipeline that does not say which size its pictures have."""

    def __new__(cls, pipe):
        made = type(pipe)(**pipe.components)
        made.default_sample_size = None
        made.set_progress_bar_config(disable=True)
        return made


def test_methods_say_all_that_decides_their_maps(tiny, pipelines):
    said = [
        method.describe()
        for method in (
            tiny(),
            tiny(reading="text_to_image"),
            tiny(layers=[0]),
            tiny(timesteps=(100,)),
            tiny(seed=1),
            tiny(size=32),
            tiny(form="{}"),
            tiny(separator=" "),
            tiny(text={"max_sequence_length": 32}),
            JointAttention(pipelines("sd3")),
        )
    ]
    assert len(set(said)) == len(said)
    settings = json.loads(said[0].removeprefix("JointAttention(").removesuffix(")"))
    attrs = tiny().scores([PICTURE], ["sun"]).attrs
    assert attrs == {name: settings[name] for name in attrs}
    assert attrs["size"] == 16 and attrs["architecture"] == "Flux DiT" and len(attrs["weights"]) == 12
    names = [
        JointAttention(pipelines(*case)).architecture for case in (("sd3",), ("sd3", "sd3.5-medium"), ("cogvideox",))
    ]
    assert names == ["SD3 DiT", "SD3.5 DiT", "CogVideoX DiT"]
    assert (tiny().kind, tiny().class_agnostic) == ("probability", False)


def test_a_forward_is_a_pass_without_a_trace(tiny, blocks):
    found = tiny().forward(PICTURE)
    assert len(blocks) == 1 and found.shape[0] == 1


def test_it_is_evaluated_like_any_other_method(tiny, pipelines):
    text = {"max_sequence_length": 48}
    methods = {reading: tiny(reading=reading, text=text) for reading in ("image_to_text", "text_to_image")}
    found = dp.evaluate(methods, PictureBook(2), progress=False)
    assert found.failed.values.tolist() == [["", ""], ["", ""]] and found.auroc.notnull().all()
    video = dp.evaluate({"video": JointAttention(pipelines("cogvideox"))}, PictureBookClips(1), progress=False)
    assert video.failed.values.tolist() == [[""]]
