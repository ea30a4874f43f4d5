"""Models in which text never reads the image: refused, or recorded without a concept stream, and the reason said."""

import dataclasses
import inspect
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import dit_probe as dp
from dit_probe import anatomy, stream, testing
from dit_probe.anatomy import Anatomy, refused
from dit_probe.attention import AttentionTap
from dit_probe.errors import ModelError, ProbeError, TraceError

WITHOUT_CONCEPTS = sorted(set(testing.cases()) - set(testing.cases(concepts=True)))


def stub(name: str, *bases: type) -> nn.Module:
    """A module of a class of this name, without weights."""
    return type(name, bases or (nn.Module,), {})()


def need(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


@pytest.mark.parametrize("name", refused.REFUSED)
def test_the_error_names_class_reason_and_way_out(name):
    with pytest.raises(ModelError) as caught:
        anatomy.find(stub(name))
    message, group = str(caught.value), refused.REFUSED[name]
    assert message.startswith(
        f"{name} cannot be traced: it {group.reason}. {group.instead}, or trace one of the models"
    )


@pytest.mark.parametrize("name", refused.REFUSED)
def test_every_refused_class_exists(name):
    need(name)
    assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)


def test_no_refused_class_is_claimed_by_a_family():
    claimed = {name for family in anatomy.families().values() for name in family.classes}
    assert not claimed & refused.REFUSED.keys()
    assert set(refused.GROUPS) == {group for group in vars(refused).values() if isinstance(group, refused.Group)}
    assert len(refused.REFUSED) == sum(len(group.classes) for group in refused.GROUPS)


NO_DENOISERS_OF_TEXT_AND_IMAGE = {
    "HunyuanDiT2DControlNetModel": "a ControlNet: what it makes goes into another transformer",
    "HunyuanDiT2DMultiControlNetModel": "several ControlNets",
    "LongCatAudioDiTVae": "an autoencoder of sound",
    "PriorTransformer": "denoises an image embedding, which has no places",
    "RFD4ProteinaTransformer": "denoises proteins and takes no text",
    "Transformer2DModel": "the attention layers inside a UNet",
    "TransformerTemporalModel": "the attention layers over frames inside a UNet",
}


def test_every_transformer_of_diffusers_is_a_family_or_refused_with_a_reason():
    named = {name: getattr(diffusers, name) for name in dir(diffusers) if re.search("Transformer|DiT", name)}
    modules = {name for name, kind in named.items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    claimed = {name for family in anatomy.families().values() for name in family.classes}
    known = claimed | refused.REFUSED.keys() | NO_DENOISERS_OF_TEXT_AND_IMAGE.keys()
    assert len(modules) > 60
    assert modules - known == set(), "write a family file for it, or a reason into dit_probe/anatomy/refused.py"
    assert not (claimed | refused.REFUSED.keys()) & NO_DENOISERS_OF_TEXT_AND_IMAGE.keys()


def test_a_subclass_is_refused_and_a_family_of_ones_own_is_asked_first(monkeypatch):
    base = type("WanTransformer3DModel", (nn.Module,), {})
    with pytest.raises(ModelError, match="Finetuned cannot be traced: it takes text in by cross-attention only"):
        anatomy.find(stub("Finetuned", base))

    class Mine(Anatomy):
        classes = ("WanTransformer3DModel",)

    monkeypatch.setattr(anatomy, "families", lambda: {"mine": Mine()})
    assert isinstance(anatomy.find(stub("Finetuned", base)), Mine)


def test_a_pipeline_is_refused_before_its_blocks_are_guessed_at():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4, norm_num_groups=4
    )
    pipe = diffusers.DiTPipeline(model, testing._Parts().vae(), diffusers.DDIMScheduler())
    assert anatomy.structural.guess(model) is not None
    with pytest.raises(ModelError, match="DiTTransformer2DModel cannot be traced: it takes no text tokens in"):
        dp.trace(pipe, dp.Probe(record=["x"]))


# --- What the reasons say, seen in the models themselves: 12 image tokens, 5 of text.


def prx():
    need("PRXTransformer2DModel")
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    inputs = {"hidden_states": torch.randn(1, 4, 6, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    return model, {**inputs, "timestep": torch.tensor([0.5])}


def nucleus():
    need("NucleusMoEImageTransformer2DModel")
    model = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        mlp_ratio=8.0,
        moe_enabled=False,
        capacity_factors=[1.0, 1.0],
    )
    inputs = {"hidden_states": torch.randn(1, 12, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    return model, {**inputs, "timestep": torch.tensor([0.5]), "img_shapes": [(1, 3, 4)]}


def wan():
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    inputs = {"hidden_states": torch.randn(1, 4, 1, 6, 8), "encoder_hidden_states": torch.randn(1, 5, 16)}
    return model, {**inputs, "timestep": torch.tensor([500])}


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "seen"),
    [(prx, {(12, 17)}), (nucleus, {(12, 17)}), (wan, {(12, 12), (12, 5)})],
    ids=["prx", "nucleus", "wan"],
)
def test_no_text_token_has_a_query(build, seen):
    model, inputs = build()
    tap = AttentionTap()
    tap.open()
    model(**inputs)
    tap.close()
    assert {(call.q.shape[1], call.k.shape[1]) for call in tap.calls} == seen


@torch.no_grad()
def test_words_of_bria_fibo2_are_only_read_by_cross_attention():
    need("BriaFibo2Transformer2DModel")
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=16,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=3,
        max_num_gist_tokens=6,
        gist_step=3,
        axes_dims=(4, 6, 6),
        axes_lens=(16, 8, 8),
    )
    tap = AttentionTap()
    tap.open()
    model(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), torch.randn(1, 2, 5, 16))
    tap.close()
    # The refiner; 3 gist tokens that read the 5 words, then each other; two layers of both, where one reads the words.
    sizes = [(call.q.shape[1], call.k.shape[1]) for call in tap.calls]
    assert sizes == [(12, 12), (3, 5), (3, 3), (15, 15), (15, 15), (15, 5)]


@torch.no_grad()
def test_the_text_of_cosmos3_never_reads_what_it_makes():
    layer = cosmos3_layer()
    text, image = torch.randn(5, 32), torch.randn(12, 32)
    rotary = tuple(torch.rand(count, 16) for count in (5, 5, 12, 12))
    before, other = layer(text, image, rotary), layer(text, image + 1, rotary)
    assert torch.equal(before[0], other[0]) and not torch.equal(before[1], other[1])
    later = layer(torch.cat([text[:4], text[4:] + 1]), image, rotary)[0]
    assert torch.equal(later[:4], before[0][:4])


def cosmos3_layer() -> nn.Module:
    module = pytest.importorskip("diffusers.models.transformers.transformer_cosmos3")
    return module.Cosmos3VLTextMoTDecoderLayer(
        hidden_size=32,
        head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        attention_bias=False,
        rms_norm_eps=1e-6,
    )


# --- Recorded with a concept stream that the paper does not have, and said so.


@torch.no_grad()
@pytest.mark.parametrize("family", ["ernie-image", "krea2", "lumina2", "z-image"])
def test_concepts_of_a_single_sequence_are_named_an_extension(family):
    tiny = testing.tiny_model(family)
    words = [f"concept {index}" for index in range(len(tiny.concepts))]

    def identity(**options):
        with dp.trace(tiny.transformer, dp.Probe(layers="all", **options), concepts=tiny.concepts) as run:
            tiny.transformer(**tiny.inputs)
        return run.dataset.attrs["identity"]

    assert "which the paper does not do" in identity(concepts=words, record=["o_c"], through="all")["extension"]
    assert "extension" not in identity(record=["o_x"])


# --- Recorded, but without a concept stream.


@pytest.mark.parametrize("case", WITHOUT_CONCEPTS, ids="-".join)
def test_a_concept_stream_is_refused_with_the_reason(case):
    tiny = testing.tiny_model(*case)
    reason = anatomy.find(tiny.transformer).no_concepts
    probe = dp.Probe(["a", "b", "c"], record=["o_c"], layers="all", through="all")
    with pytest.raises(ProbeError) as caught:
        dp.trace(tiny.transformer, probe, concepts=tiny.concepts)
    assert f"no concept stream in {type(tiny.transformer).__name__}: {reason}." in str(caught.value)
    assert testing.leftovers(tiny.transformer) == []


@torch.no_grad()
@pytest.mark.parametrize("case", WITHOUT_CONCEPTS, ids="-".join)
def test_text_does_not_see_the_image_there(case):
    tiny = testing.tiny_model(*case)
    hidden = []

    def see(call, output):
        image, last = call.places.image, call.places.prompt.stop - 1
        mask = call.attention.mask
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        hidden.append(not mask[..., last, image].any() and bool(mask[..., image, last].any()))
        with pytest.raises(TraceError, match="model's text does not read the image"):
            stream.concept_mask(call, slice(0, len(call.x)), 3, "both")

    with testing.watched(tiny.transformer, see):
        tiny.transformer(**tiny.inputs)
    assert hidden and all(hidden)


def qwen(variant: str, **options) -> testing.TinyModel:
    need("QwenImage21Transformer2DModel")
    return testing.tiny_model("qwenimage21", variant, **options)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["text", "padded", "one-timestep"])
def test_the_calls_of_qwenimage21_are_one_block_causal_attention(variant):
    tiny = qwen(variant)
    record = [f"{letter}_{token}" for letter in "qkvo" for token in "xp"]
    with dp.trace(tiny.transformer, dp.Probe(record=record, layers="all"), progress=False) as run:
        tiny.transformer(**tiny.inputs)
    ds = run.dataset.load()
    q, k, v, o = (np.concatenate([ds[f"{letter}_p"], ds[f"{letter}_x"]], axis=3) for letter in "qkvo")
    seen = np.tril(np.ones((17, 17), bool))
    seen[5:] = True
    seen = np.repeat(seen[None], 2, axis=0)
    if variant == "padded":
        seen[0, :, 3:5] = False
    bias = np.where(seen, 0, -np.inf)[:, None, None, None]
    np.testing.assert_allclose(o, testing.attention_from_store(q, k, v, bias), atol=1e-5)


@torch.no_grad()
def test_condition_images_of_qwenimage21_are_neither_image_nor_prompt():
    tiny = qwen("edit")
    with dp.trace(tiny.transformer, dp.Probe(record=["p", "x"], layers="all"), progress=False) as run:
        tiny.transformer(**tiny.inputs)
    assert run.dataset.sizes["prompt_token"] == 5 and run.dataset.sizes["image_token"] == 12
    # 3 tokens of text, 4 and 8 of condition images, 5 of the prompt, 12 of the image.
    assert anatomy.find(tiny.transformer).places(tiny.transformer, tiny.inputs).image == slice(20, 32)


@torch.no_grad()
def test_steps_of_qwenimage21_that_read_text_from_the_cache_are_refused():
    tiny = qwen("text")
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    probe, cache = dp.Probe(record=["o_p"], layers="all"), QwenImage21KVCache(3)
    before = tiny.transformer(**tiny.inputs)[0]
    with dp.trace(tiny.transformer, dataclasses.replace(probe, steps=[0]), progress=False) as run:
        first = tiny.transformer(**tiny.inputs, kv_cache=cache, kv_cache_mode="extract")[0]
    assert torch.equal(first, before) and bool(run.dataset.done.all())
    with (
        pytest.raises(TraceError, match="use_kv_cache=False"),
        dp.trace(tiny.transformer, probe, progress=False),
    ):
        tiny.transformer(**tiny.inputs, kv_cache=cache, kv_cache_mode="cached")
    assert testing.leftovers(tiny.transformer) == []


def test_the_flex_processor_of_qwenimage21_is_refused():
    model: Any = qwen("text").transformer
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(ModelError, match=r"set_attn_processor\(QwenImage21AttnProcessor\(\)\)"):
        anatomy.find(model)
