"""Every way to use `trace` wrongly, and what it says."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from tracing_cases import WORDS, generate, traced

import dit_probe as dp
from dit_probe import testing
from dit_probe.errors import (
    ConceptError,
    ConceptWarning,
    ModelError,
    ProbeError,
    SiteError,
    StoreError,
    TraceError,
)
from probes import ConceptAttention, CrossAttention, PromptAttention

EVERYTHING = ConceptAttention(WORDS, scores=("output", "value", "cross")) | CrossAttention(WORDS) | PromptAttention()
PIPELINES = [(family, variant) for family, variant in testing.cases() if variant not in ("dev", "sd3.5-large", "1.5")]


def test_not_a_pipeline():
    with pytest.raises(ModelError, match="dict is neither a diffusers pipeline"):
        dp.trace({}, ConceptAttention(WORDS))


def test_an_unknown_family_names_those_known():
    with pytest.raises(
        ModelError, match=r"no anatomy for Linear.*cogvideox \(CogVideoXTransformer3DModel\).*flux.*sd3"
    ):
        dp.trace(nn.Linear(2, 2), ConceptAttention(WORDS))


def test_layers_out_of_range(pipelines):
    with pytest.raises(SiteError, match="no layer 9 in FluxTransformer2DModel: joint layers are 0-2, single ones 3-3"):
        dp.trace(pipelines("flux"), ConceptAttention(WORDS, layers=[9]))


def test_activations_that_a_layer_lacks(pipelines):
    with pytest.raises(SiteError, match=r"no 'c' after layer 2 \(transformer_blocks.2\).*context_pre_only.*layers 0-1"):
        dp.trace(pipelines("sd3"), dp.Probe(WORDS, record=["c"], layers=[2]))
    with pytest.raises(SiteError, match="joint blocks only"):
        dp.trace(pipelines("flux"), ConceptAttention(WORDS, layers=[3]))
    _, ds = traced(pipelines("sd3"), dp.Probe(WORDS, record=["c", "o_c"]))
    assert ds.c.attrs["layers"] == [0, 1] and ds.o_c.attrs["layers"] == [0, 1, 2]


def test_a_step_that_is_never_reached(pipelines):
    with pytest.raises(SiteError, match=r"step 7 is never reached: this run has 2 steps \(0-1\)"):
        traced(pipelines("flux"), ConceptAttention(WORDS, steps=[7]))
    assert testing.leftovers(pipelines("flux")) == []


def test_concepts_missing(pipelines):
    with pytest.raises(ConceptError, match="needs concepts"):
        dp.trace(pipelines("flux"), ConceptAttention())


@pytest.mark.parametrize("branch", ["uncond", "both"])
def test_guidance_that_does_not_run_is_not_waited_for(pipelines, branch):
    ran = []

    def count(pipe, step, *rest):
        ran.append(step)
        return {}

    for family, options in [("sd3", {"guidance_scale": 1.0}), ("flux", {}), ("cogvideox", {"guidance_scale": 1.0})]:
        call = {**options, "steps": 4, "callback_on_step_end": count}
        ran.clear()
        with pytest.raises(TraceError, match=f"branch='{branch}', but this call runs without"):
            traced(pipelines(family), ConceptAttention(WORDS), branch=branch, call=call)
        assert len(ran) <= 1
        assert testing.leftovers(pipelines(family)) == []


def test_nothing_to_record(pipelines):
    with pytest.raises(ProbeError, match="nothing to record"):
        dp.trace(pipelines("flux"), dp.Probe(WORDS))


def test_no_pooled_vector(pipelines):
    with pytest.raises(ProbeError, match="cogvideox has no pooled text vector"):
        dp.trace(pipelines("cogvideox"), ConceptAttention(WORDS, pooled="zero"))


def test_no_t5(pipelines):
    pipe = testing.tiny_pipeline("sd3")
    pipe.text_encoder_3 = None
    with pytest.raises(ConceptError, match="loaded without its text encoder"):
        dp.trace(pipe, ConceptAttention(WORDS))


def test_a_word_of_several_tokens(pipelines):
    with pytest.warns(ConceptWarning, match=r"'sunboat' splits into \d+ tokens.*embed='mean_tokens'"):
        dp.trace(pipelines("flux"), ConceptAttention(["sunboat", "sky"]))
    _, mean = traced(pipelines("flux"), ConceptAttention(["sunboat", "sky"], embed="mean_tokens"))
    assert np.isfinite(mean.o_c).all()


def test_in_prompt(pipelines):
    pipe = pipelines("flux")
    _, ds = traced(pipe, dp.Probe(["sun", "sky"], record=["c", "p", "q_c", "q_p"], embed="in_prompt"))
    tokens = ds.token.values[0].tolist()
    # In front of block 0 the concept is the prompt's own token, so it is projected alike.
    for word in ("sun", "sky"):
        at = tokens.index(f"▁{word}")
        first = ds.isel(sample=0, step=0, layer=0)
        np.testing.assert_allclose(first.q_c.sel(concept=word), first.q_p.isel(prompt_token=at), atol=1e-5)
    with pytest.raises(ConceptError, match="'boat' .* does not stand in the prompt"):
        traced(pipe, ConceptAttention(["boat", "sky"], embed="in_prompt"))


def test_the_store_exists(pipelines, tmp_path):
    pipe, store = pipelines("flux"), tmp_path / "run.zarr"
    traced(pipe, ConceptAttention(WORDS), store=store)
    with pytest.raises(StoreError, match="exists"):
        traced(pipe, ConceptAttention(WORDS), store=store)
    _, ds = traced(pipe, ConceptAttention(WORDS), store=store, mode="a", call={"prompt": "a boat", "seed": 5})
    assert ds.sizes["sample"] == 2 and ds.seed.values.tolist() == [0, 5]
    with pytest.raises(StoreError, match="image_token|patch_y"):
        traced(pipe, ConceptAttention(WORDS), store=store, mode="a", call={"height": 24})
    with pytest.raises(StoreError, match="sd3"):
        traced(pipelines("sd3"), ConceptAttention(WORDS), store=store, mode="a")
    _, ds = traced(pipe, ConceptAttention(WORDS), store=store, mode="w")
    assert ds.sizes["sample"] == 1


def test_samples_with_other_concepts(pipelines, tmp_path):
    pipe, store = pipelines("flux"), tmp_path / "run.zarr"
    traced(pipe, ConceptAttention(WORDS), store=store)
    _, ds = traced(pipe, ConceptAttention(["fish", "water", "boat"]), store=store, mode="a")
    assert ds.concept_name.values.tolist() == [WORDS, ["fish", "water", "boat"]]


def test_compiled_models_are_refused(pipelines):
    pipe = testing.tiny_pipeline("flux")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ModelError, match="compiled with torch.compile"):
        dp.trace(pipe, ConceptAttention(WORDS))
    pipe = testing.tiny_pipeline("flux")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(ModelError, match="blocks were compiled"):
        dp.trace(pipe, ConceptAttention(WORDS))


def test_fused_sd35_is_refused():
    pipe = testing.tiny_pipeline("sd3", "sd3.5-large")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ModelError, match="leaves out norm_q"):
        dp.trace(pipe, ConceptAttention(WORDS))
    plain = testing.tiny_pipeline("sd3", "sd3")
    _, apart = traced(plain, ConceptAttention(WORDS))
    plain.transformer.fuse_qkv_projections()
    _, fused = traced(plain, ConceptAttention(WORDS))
    np.testing.assert_allclose(fused.o_c, apart.o_c, atol=1e-4)


def test_training_mode_with_dropout_is_refused():
    model = testing.tiny_model("cogvideox").transformer
    model.embedding_dropout.p = 0.1
    model.train()
    with pytest.raises(ModelError, match="training mode with dropout"):
        dp.trace(model, dp.Probe(record=["x"]))


def test_layers_that_a_cache_skips_are_named():
    from diffusers import FirstBlockCacheConfig

    pipe = testing.tiny_pipeline("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    with pytest.raises(TraceError, match=r"did not run their attention \(transformer_blocks.1, transformer_blocks.2"):
        traced(pipe, dp.Probe(record=["o_x"]))


def test_a_kernel_that_nobody_sees_is_refused(monkeypatch):
    tiny = testing.tiny_model("sd3")

    class Hidden(nn.Module):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            return hidden_states, encoder_hidden_states

    tiny.transformer.set_attn_processor(Hidden())
    with (
        torch.no_grad(),
        pytest.raises(TraceError, match="saw none"),
        dp.trace(tiny.transformer, dp.Probe(record=["o_x"]), progress=False),
    ):
        tiny.transformer(**tiny.inputs)
    assert testing.leftovers(tiny.transformer) == []


def test_overflow_is_refused():
    tiny = testing.tiny_model("sd3")
    with torch.no_grad():
        tiny.transformer.transformer_blocks[1].attn.to_v.weight[0] = torch.inf
    with (
        torch.no_grad(),
        pytest.raises(StoreError, match="non-finite value in 'v_x'.*layer 1"),
        dp.trace(tiny.transformer, dp.Probe(record=["v_x"]), verify=None, progress=False),
    ):
        tiny.transformer(**tiny.inputs)


def test_offloading(pipelines):
    pipe = testing.tiny_pipeline("flux")
    _, usual = traced(pipe, ConceptAttention(WORDS))
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, torch.device("cpu"))
    _, offloaded = traced(pipe, ConceptAttention(WORDS))
    np.testing.assert_allclose(offloaded.o_c, usual.o_c, atol=1e-6)


def test_progress_counts_steps_and_bytes(pipelines, capsys, monkeypatch):
    import tqdm.auto

    made = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": False})
            made.append(self)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    with dp.trace(pipelines("flux"), ConceptAttention(WORDS)):
        generate(pipelines("flux"), steps=3)
    (bar,) = made
    assert (bar.n, bar.total) == (3, 3)
    assert "MiB" in capsys.readouterr().err


def test_slow_writers_hold_the_model_back_and_lose_nothing(pipelines, monkeypatch):
    from dit_probe.store import chunks

    original = chunks.write

    def slow(*record, **how):
        time.sleep(0.002)
        original(*record, **how)

    monkeypatch.setattr(chunks, "write", slow)
    _, ds = traced(pipelines("flux"), EVERYTHING)
    assert bool(ds.done.all())
