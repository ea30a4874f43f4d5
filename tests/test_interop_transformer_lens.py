"""TransformerLens' caches, hook points and T5 bridge: the same tensors as a trace's and an encoder's."""

from __future__ import annotations

import pytest
import torch

import dit_probe as dp
from dit_probe import testing
from dit_probe.anatomy import find
from dit_probe.edit import ATTENTION_SITES, RESIDUAL_SITES
from dit_probe.errors import ModelError, SiteError

transformer_lens = pytest.importorskip("transformer_lens")
interop = pytest.importorskip("dit_probe.interop.transformer_lens")

PROMPT = "a sun in the sky"
SITES = (*ATTENTION_SITES, *RESIDUAL_SITES)
GUIDED = {"flux": {}, "sd3": {"guidance_scale": 3.0}, "cogvideox": {"guidance_scale": 3.0}}
FAMILIES = tuple(GUIDED)


def call(pipe, steps: int = 2) -> dict:
    anatomy = find(pipe)
    size = {"num_inference_steps": steps, "output_type": "latent", **anatomy.tiny_call, **GUIDED[anatomy.family]}
    return {**size, "generator": torch.Generator().manual_seed(0)}


def recorded(pipe, *probes: dp.Probe, steps: int = 2, **trace):
    with dp.trace(pipe, *probes, progress=False, **trace) as run:
        output = pipe(PROMPT, **call(pipe, steps))[0]
    return output, run


def every_site(pipe) -> dp.Probe:
    kinds = {block.kind for block in find(pipe).blocks(pipe.transformer)}
    return dp.Probe(record=SITES, layers="all" if "single" in kinds else "joint")


def test_a_cache_holds_what_was_recorded(pipelines):
    pipe = pipelines("flux")
    probe = dp.Probe(["sun", "sky"], record=["q_x", "k_p", "v_c", "o_x", "x", "c", "q_x_unrotated"], layers=[0, 1, 2])
    _, run = recorded(pipe, probe)
    cache, ds = interop.cache(run, step=1), run.dataset.sel(step=1)
    assert type(cache) is transformer_lens.ActivationCache
    names = {
        "q_x": "blocks.1.attn.hook_q",
        "q_x_unrotated": "blocks.1.attn.hook_q_unrotated",
        "k_p": "prompt_blocks.1.attn.hook_k",
        "v_c": "concept_blocks.1.attn.hook_v",
        "o_x": "blocks.1.attn.hook_z",
        "x": "blocks.1.hook_resid_post",
        "c": "concept_blocks.1.hook_resid_post",
    }
    assert len(cache) == 3 * len(names)
    for site, name in names.items():
        assert torch.equal(cache[name], torch.from_numpy(ds[site].sel(layer=1).values)), site
    assert torch.equal(cache["z", 1], cache["blocks.1.attn.hook_z"])
    assert torch.equal(cache["resid_post", -1], cache["blocks.2.hook_resid_post"])
    assert torch.equal(cache.stack_activation("z"), torch.from_numpy(ds.o_x.transpose("layer", ...).values))


def test_a_cache_is_of_one_step_and_branch_and_its_batch_is_the_samples(pipelines, tmp_path):
    pipe = pipelines("sd3")
    store = str(tmp_path / "run.zarr")
    with dp.trace(pipe, dp.Probe(record=["o_p"], steps=[1]), branch="both", store=store, progress=False) as run:
        pipe([PROMPT, "a boat"], **call(pipe))
    cache = interop.cache(store, branch="uncond")
    expected = torch.from_numpy(run.dataset.o_p.sel(step=1, layer=2, branch="uncond").values)
    name = "prompt_blocks.2.attn.hook_z"
    assert torch.equal(cache[name], expected) and len(expected) == 2
    assert torch.equal(cache.apply_slice_to_batch_dim(1)[name], expected[1])
    assert torch.equal(cache.apply_slice_to_batch_dim((0, 1)).remove_batch_dim()[name], expected[0])
    assert cache.to("cpu")[name].device.type == "cpu"
    with pytest.raises(SiteError, match="step=0: a cache is of one step, and the trace has 1"):
        interop.cache(run, step=0)
    with pytest.raises(SiteError, match="branch='neither'; the trace has cond, uncond"):
        interop.cache(run, branch="neither")


@pytest.mark.parametrize("family", FAMILIES)
def test_run_with_cache_agrees_with_a_trace(pipelines, family: str):
    pipe = pipelines(family)
    output, run = recorded(pipe, every_site(pipe), branch="both" if GUIDED[family] else "cond")
    model = interop.HookedMMDiT(pipe)
    for branch in ("cond", "uncond") if GUIDED[family] else ("cond",):
        for step in (0, 1):
            again, cache = model.run_with_cache(PROMPT, **call(pipe), branch=branch, steps=[step])
            expected = interop.cache(run, step=step, branch=branch)
            assert torch.equal(again[0], output)
            assert cache.keys() == expected.keys()
            for name in expected:
                assert torch.equal(cache[name], expected[name]), name
    assert testing.leftovers(pipe) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_that_returns_a_tensor_is_an_edit(pipelines, family: str):
    pipe = pipelines(family)
    edits = [dp.Edit(site, lambda a, point: 0.5 * a.flip(1) + 0.1, layers=[1]) for site in SITES]
    expected, _ = recorded(pipe, edits=edits, steps=1)
    hooks = [(interop.hook_name(site, 1), lambda a, hook: 0.5 * a.flip(1) + 0.1) for site in SITES]
    found = interop.HookedMMDiT(pipe).run_with_hooks(PROMPT, **call(pipe, 1), fwd_hooks=hooks)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, pipe(PROMPT, **call(pipe, 1))[0])


def test_hooks_know_where_they_are_and_what_they_keep_stays(pipelines):
    pipe = pipelines("sd3")
    model, seen = interop.HookedMMDiT(pipe), []

    def keep(x, hook):
        seen.append((hook.name, hook.ctx["point"].step, hook.ctx["point"].branch, x))

    hooks = [("blocks.0.hook_resid_post", keep), ("blocks.0.hook_resid_post", lambda x, hook: x + 1)]
    model.run_with_hooks(PROMPT, **call(pipe), branch="both", steps=[1], fwd_hooks=hooks)
    assert [where for *where, _ in seen] == [["blocks.0.hook_resid_post", 1, branch] for branch in ("uncond", "cond")]
    _, run = recorded(pipe, dp.Probe(record=["x"], layers=[0], steps=[1]))
    assert torch.equal(seen[1][-1], torch.from_numpy(run.dataset.x.values[:, 0, 0]))
    assert not any(point.has_hooks() for point in model.hook_points())


def test_hook_points_that_do_not_exist_are_named(pipelines):
    model = interop.HookedMMDiT(pipelines("sd3"))
    assert "prompt_blocks.1.hook_resid_post" in model.hook_dict
    with pytest.raises(SiteError, match=r"no hook point is called 'prompt_blocks.2.hook_resid_post'; those that exist"):
        model.run_with_hooks(PROMPT, fwd_hooks=[("prompt_blocks.2.hook_resid_post", lambda p, hook: p)])
    assert list(model.parameters()) == []


def test_gradients_reach_the_hooks_of_a_bare_transformer():
    tiny = testing.tiny_model("flux")
    model, name, found = interop.HookedMMDiT(tiny.transformer), "blocks.1.attn.hook_z", []
    assert list(model.parameters()) == []
    direction = torch.randn(2, 12, 2, 16)
    with model.hooks(bwd_hooks=[(name, lambda gradient, hook: found.append(gradient))], reset_hooks_end=False):
        output = model(**tiny.inputs).sample.square().sum()
    output.backward()
    model.reset_hooks()

    def shifted(size: float) -> torch.Tensor:
        hooks = [(name, lambda z, hook: z + size * direction)]
        with torch.no_grad():
            return model.run_with_hooks(**tiny.inputs, fwd_hooks=hooks).sample.double().square().sum()

    slope = (shifted(1e-3) - shifted(-1e-3)) / 2e-3
    assert torch.isclose((found[0] * direction).sum().double(), slope, rtol=1e-2)


def with_deep_encoder(family: str):
    """A pipeline whose T5 has three gated layers, as T5 v1.1 has 24."""
    from transformers import T5EncoderModel

    pipe = testing.tiny_pipeline(family)
    name = find(pipe).encoder[1]
    config = type(getattr(pipe, name).config)(**getattr(pipe, name).config.to_dict())
    config.num_layers, config.feed_forward_proj = 3, "gated-gelu"
    config.is_gated_act, config.dense_act_fn = True, "gelu_new"
    setattr(pipe, name, T5EncoderModel(config).eval())
    return pipe, getattr(pipe, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_encoder_lies_beside_the_prompt_stream(family: str, tmp_path):
    pipe, encoder = with_deep_encoder(family)
    read, given, store = [], [], str(tmp_path / "run.zarr")
    encoder.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    transformer_hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    recorded(pipe, dp.Probe(record=["p"], layers=[0]), steps=1, store=store)
    transformer_hook.remove()
    with torch.no_grad():
        hidden = torch.stack(encoder(read[0], output_hidden_states=True).hidden_states, dim=1)
    ds = interop.record_text_encoder(pipe, store)
    found = torch.from_numpy(ds.text_encoder.values)
    assert ds.text_encoder.dims == ("sample", "encoder_layer", "prompt_token", "encoder_width")
    start = ds.sizes["prompt_token"] - hidden.shape[2]
    assert start == (77 if family == "sd3" else 0)
    assert hidden.shape[1] == 4
    assert torch.equal(found[:, :, start:], hidden)
    assert found[:, :, :start].isnan().all()
    # Token by token what the transformer was given in the conditional half.
    assert torch.equal(found[:, -1, start:], given[0][-1:, start:])
    assert dp.open(store).text_encoder.equals(ds.text_encoder)


def test_a_store_with_the_text_encoder_still_grows(tmp_path):
    pipe, store = testing.tiny_pipeline("flux").to(torch.bfloat16), str(tmp_path / "run.zarr")
    probe = dp.Probe(record=["p"], layers=[0])
    recorded(pipe, probe, steps=1, store=store)
    first = interop.record_text_encoder(pipe, store).text_encoder.load()
    recorded(pipe, probe, steps=1, store=store, mode="a")
    assert dp.open(store).text_encoder.isel(sample=1).isnull().all()
    both = interop.record_text_encoder(pipe, store)
    assert both.text_encoder.isel(sample=[0]).equals(first) and both.text_encoder.isel(sample=[1]).equals(first)
    assert both.text_encoder.attrs["dtype"] == "bfloat16"
    in_memory = interop.record_text_encoder(pipe, both.drop_vars("text_encoder"))
    assert (in_memory.text_encoder == both.text_encoder).all()


def test_a_text_encoder_that_the_prompt_does_not_tell_is_refused(pipelines):
    pipe = pipelines("flux")
    embeds, pooled, _ = pipe.encode_prompt(PROMPT, None, max_sequence_length=16)
    size = {**call(pipe, 1), "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    with dp.trace(pipe, dp.Probe(record=["p"], layers=[0]), progress=False) as run:
        pipe(**size)
    with pytest.raises(SiteError, match="sample 0: the tokens of the prompt stream are not those of ''"):
        interop.record_text_encoder(pipe, run)
    bare = testing.tiny_pipeline("flux")
    bare.text_encoder_2 = None
    with pytest.raises(ModelError, match="text_encoder_2 of FluxPipeline is NoneType; only a T5EncoderModel"):
        interop.text_encoder(bare)


def test_the_bridge_leaves_the_pipeline_as_it_is(pipelines):
    pipe = pipelines("flux")
    before = [name for name, _ in pipe.text_encoder_2.named_modules()]
    bridge = interop.text_encoder(pipe)
    assert [name for name, _ in pipe.text_encoder_2.named_modules()] == before
    shared = {tensor.data_ptr() for tensor in pipe.text_encoder_2.parameters()}
    assert {tensor.data_ptr() for tensor in bridge.original_model.parameters()} == shared
