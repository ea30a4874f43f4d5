"""What `trace` does around a pipeline: untouched output, branches, steps, samples."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import attention_backend
from tracing_cases import SIZES, WORDS, generate, sites, traced

import dit_probe as dp
from dit_probe import anatomy, stream, testing
from dit_probe.errors import ConceptError, ProbeError, SiteError
from dit_probe.pipelines import context_names
from probes import ConceptAttention, CrossAttention, PromptAttention, ValueSpace

EVERYTHING = ConceptAttention(WORDS, scores=("output", "value", "cross")) | CrossAttention(WORDS) | PromptAttention()
PIPELINES = testing.pipeline_cases()


@pytest.fixture(scope="module", params=PIPELINES, ids="-".join)
def guided_once(request, pipelines):
    """A pipeline of every family under guidance, batched or in two calls, and the output of one call."""
    pipe = pipelines(*request.param)
    return pipe, generate(pipe, **anatomy.find(pipe).guided_call)


@pytest.mark.parametrize(
    "probe", [ConceptAttention(WORDS), CrossAttention(WORDS), ValueSpace(WORDS), PromptAttention()]
)
def test_output_is_untouched(guided_once, probe):
    pipe, before = guided_once
    probe, call = dataclasses.replace(probe, **sites(pipe)), anatomy.find(pipe).guided_call
    during, ds = traced(pipe, probe, branch="both", call=call)
    assert torch.equal(before, during)
    assert torch.equal(before, generate(pipe, **call))
    assert testing.leftovers(pipe) == []
    assert all(np.isfinite(ds[name]).all() for name in probe.variables)


@pytest.mark.parametrize("case", [case for case in PIPELINES if anatomy.families()[case[0]].guided_call], ids="-".join)
def test_output_is_untouched_without_guidance_where_that_is_the_default(pipelines, case):
    pipe = pipelines(*case)
    before = generate(pipe)
    during, _ = traced(pipe, ConceptAttention(WORDS, **sites(pipe)))
    assert torch.equal(before, during)


@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_in_flight_scores_equal_offline_ones(pipelines, family):
    _, ds = traced(pipelines(family), EVERYTHING)
    kept = ds[[name for name in ds.data_vars if name.startswith("score_")]]
    for space, options in [
        ("output", {}),
        ("value", {}),
        ("cross", {}),
        ("cross", {"direction": "concept_to_image"}),
    ]:
        raw = ds.drop_vars(kept.data_vars)
        offline, in_flight = (dp.maps.scores(source, space, **options).load() for source in (raw, kept))
        np.testing.assert_allclose(in_flight, offline, rtol=1e-5, atol=1e-5 * float(abs(offline).max()))


def test_batched_guidance_is_told_apart(pipelines):
    pipe = pipelines("sd3")
    _, both = traced(pipe, ConceptAttention(WORDS), branch="both")
    assert both.sizes["branch"] == 2
    for branch in ("cond", "uncond"):
        _, one = traced(pipe, ConceptAttention(WORDS), branch=branch)
        for name in ("o_x", "o_c"):
            assert np.array_equal(one[name], both[name].sel(branch=branch))
    assert not np.array_equal(both.o_x.sel(branch="cond"), both.o_x.sel(branch="uncond"))


def test_the_cond_branch_is_the_prompts(pipelines):
    # Without guidance the one call is the prompt's; its first step sees the same latents as with guidance.
    pipe = pipelines("sd3")
    _, alone = traced(pipe, ConceptAttention(WORDS, steps=[0]), call={"guidance_scale": 1.0})
    _, guided = traced(pipe, ConceptAttention(WORDS, steps=[0]))
    np.testing.assert_allclose(guided.o_x, alone.o_x, atol=1e-4)


def test_two_call_guidance_is_told_apart(pipelines):
    pipe = pipelines("flux")
    call = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}
    before = generate(pipe, **call)
    during, both = traced(pipe, ConceptAttention(WORDS), branch="both", call=call)
    assert torch.equal(before, during)
    _, negative = traced(pipe, ConceptAttention(WORDS, steps=[0]), call={"prompt": "a boat"})
    _, positive = traced(pipe, ConceptAttention(WORDS, steps=[0]))
    np.testing.assert_allclose(both.o_x.sel(branch="uncond").isel(step=0), negative.o_x.isel(step=0), atol=1e-5)
    np.testing.assert_allclose(both.o_x.sel(branch="cond").isel(step=0), positive.o_x.isel(step=0), atol=1e-5)


def test_names_that_guiders_give_are_branches_too():
    class Model:
        @contextlib.contextmanager
        def cache_context(self, name):
            yield name

    model, names = Model(), []
    with context_names(model, names), model.cache_context("pred_uncond") as given:
        assert names == ["uncond"] and given == "pred_uncond"
    assert names == [] and "cache_context" not in vars(model)


def test_a_run_of_the_other_branch_is_verified_too(pipelines, monkeypatch):
    replayed = []
    monkeypatch.setattr(stream, "replay", lambda *args, replay=stream.replay: replayed.append(1) or replay(*args))
    call = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}
    traced(pipelines("flux"), ConceptAttention(WORDS, steps=[1]), branch="uncond", call=call)
    assert len(replayed) == 1


def test_the_checks_for_leftovers_see_a_trace(pipelines):
    pipe = pipelines("flux")
    with dp.trace(pipe, ConceptAttention(WORDS), progress=False):
        found = " ".join(testing.leftovers(pipe))
    for name in ("attn._forward_hooks", "transformer.cache_context", "scheduler.step", "pipeline class"):
        assert name in found


def test_skip_layer_guidance_is_not_taken_for_a_branch(pipelines):
    pipe = pipelines("sd3")
    options = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    _, ds = traced(pipe, ConceptAttention(WORDS), call=options)
    assert bool(ds.done.all())


def test_batches_are_samples_in_order(pipelines):
    pipe = pipelines("flux")
    prompts = ["a sun in the sky", "a boat on water"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    with dp.trace(pipe, ConceptAttention(WORDS), progress=False) as run:
        pipe(
            prompts,
            num_inference_steps=1,
            num_images_per_prompt=2,
            generator=generators,
            **SIZES["flux"],
        )
    ds = run.dataset
    assert ds.prompt.values.tolist() == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert ds.seed.values.tolist() == [0, 1, 2, 3]
    assert ds.image.dims == ("sample", "pixel_y", "pixel_x", "channel")
    _, one = traced(pipe, ConceptAttention(WORDS), call={"prompt": prompts[1], "seed": 3, "steps": 1})
    np.testing.assert_allclose(ds.o_c.isel(sample=3), one.o_c.isel(sample=0), atol=1e-5)


def test_steps_and_layers_are_labels(pipelines):
    _, every = traced(pipelines("flux"), ConceptAttention(WORDS, layers="all"), call={"steps": 3})
    _, some = traced(pipelines("flux"), ConceptAttention(WORDS, layers=[-1, 0], steps=[2]), call={"steps": 3})
    assert some.layer.values.tolist() == [0, 2]
    assert some.step.values.tolist() == [2]
    assert every.kind.values.tolist() == ["joint"] * 3 + ["single"]
    assert np.array_equal(some.o_c, every.o_c.sel(step=[2], layer=[0, 2]))
    assert np.isnan(every.o_c.sel(layer=3)).all()
    assert np.isfinite(every.o_x.sel(layer=3)).all()
    assert float(some.timestep[0]) == float(every.timestep[2]) < float(every.timestep[0]) == 1000.0
    assert float(every.sigma[0]) == pytest.approx(1.0)


def test_prompt_tokens_are_named(pipelines):
    for family, expected in [("flux", "▁a"), ("sd3", "<|startoftext|>"), ("cogvideox", "▁a")]:
        _, ds = traced(pipelines(family), PromptAttention())
        assert ds.token.values[0, 0] == expected
        assert "▁sun" in ds.token.values[0]


def test_concepts_end_with_the_joint_blocks_unless_asked_on(pipelines):
    pipe = pipelines("flux")
    with pytest.raises(SiteError, match=r"joint blocks only, as in the paper \(through='all' extends it\)"):
        dp.trace(pipe, ConceptAttention(WORDS, layers=[3]))
    _, paper = traced(pipe, ConceptAttention(WORDS, layers="all"))
    _, on = traced(pipe, ConceptAttention(WORDS, layers="all", through="all", scores=["output"]))
    assert "extension" not in paper.attrs["identity"]
    assert "which the paper does not do" in on.attrs["identity"]["extension"]
    assert np.array_equal(on.o_c.isel(layer=[0, 1, 2]), paper.o_c.isel(layer=[0, 1, 2]))
    single = on.sel(layer=3)
    assert str(single.kind.values) == "single"
    assert np.isnan(paper.o_c.sel(layer=3)).all() and np.isfinite(single.o_c).all()
    assert float(abs(single.o_c).max()) > 0
    np.testing.assert_allclose(
        single.score_output, np.einsum("...nhd,...chd->...cn", single.o_x, single.o_c), atol=1e-4
    )


def test_several_probes_share_one_pass(pipelines):
    class Other(dp.Probe):
        pass

    pipe = pipelines("flux")
    _, ds = traced(pipe, ConceptAttention(WORDS, layers=[0]), dp.Probe(record=["x"], layers=[3], steps=[1]))
    assert ds.layer.values.tolist() == [0, 3]
    assert np.isnan(ds.x.sel(layer=0)).all() and np.isnan(ds.x.sel(step=0)).all()
    assert np.isfinite(ds.x.sel(layer=3, step=1)).all()
    with pytest.raises(ProbeError, match="one concept stream"):
        dp.trace(pipe, ConceptAttention(WORDS), ConceptAttention(["sun", "moon"]))


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_pooled_vectors_modulate_concepts(pipelines, family):
    found = {}
    for pooled in ("prompt", "zero", "concepts"):
        _, ds = traced(pipelines(family), ConceptAttention(WORDS, pooled=pooled))
        found[pooled] = ds.load()
    assert not np.allclose(found["prompt"].o_c, found["zero"].o_c)
    assert not np.allclose(found["concepts"].o_c, found["zero"].o_c)
    assert np.array_equal(found["prompt"].o_x, found["zero"].o_x)
    # One pooled vector a concept: reordering concepts reorders the result.
    _, turned = traced(pipelines(family), ConceptAttention(WORDS[::-1], pooled="concepts"))
    np.testing.assert_allclose(turned.o_c.sel(concept=WORDS), found["concepts"].o_c, atol=1e-5)


def test_attends_is_table_5(pipelines):
    o = {}
    for attends in ("both", "image", "concepts", "none"):
        _, ds = traced(pipelines("flux"), ConceptAttention(WORDS, attends=attends, layers=[0]))
        ds = o[attends] = ds.load()
        keys = {
            "both": [ds.k_x, ds.k_c],
            "image": [ds.k_x],
            "concepts": [ds.k_c],
        }.get(attends)
        if keys is None:
            assert np.array_equal(ds.o_c, ds.v_c)
            continue
        values = {"both": [ds.v_x, ds.v_c], "image": [ds.v_x], "concepts": [ds.v_c]}[attends]
        k, v = (np.concatenate([part.values for part in parts], axis=3) for parts in (keys, values))
        np.testing.assert_allclose(ds.o_c, testing.attention_from_store(ds.q_c.values, k, v), atol=2e-5)


def test_prompt_attention_is_the_models_own(pipelines):
    names = ["q_x", "k_x", "v_x", "q_p", "k_p", "v_p", "o_x"]
    _, ds = traced(pipelines("flux"), PromptAttention() | dp.Probe(record=names))
    ds = ds.isel(sample=0, step=0, layer=1).load()
    q, k = (np.concatenate([ds[f"{letter}_p"], ds[f"{letter}_x"]], 0).astype(np.float64) for letter in "qk")
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    prompt = ds.sizes["prompt_token"]
    np.testing.assert_allclose(ds.attention_p_to_x, weights[:, :prompt, prompt:].mean(0), atol=1e-6)
    x_to_p = weights[:, prompt:, :prompt]
    pads = ds.token.values == "<pad>"
    assert pads.any() and not pads.all()
    assert np.all(ds.attention_x_to_p.values[:, pads] == 0)
    kept = np.where(pads, 0, x_to_p)
    kept *= x_to_p.sum(-1, keepdims=True) / kept.sum(-1, keepdims=True)
    np.testing.assert_allclose(ds.attention_x_to_p, kept.mean(0), atol=1e-6)


def test_prompts_that_are_not_known_as_text_are_not_guessed(pipelines):
    pipe = pipelines("flux")
    probe = PromptAttention() | dp.Probe(record=["q_x"])
    _, other = traced(pipe, probe, call={"prompt_2": "a boat"})
    assert other.prompt.values.tolist() == ["a sun in the sky"]
    assert set(other.token.values.ravel()) == {""}
    # Nothing is known of padding, so nothing is taken out.
    assert float(other.attention_x_to_p.min()) > 0
    with pytest.raises(ConceptError, match="for another encoder"):
        traced(pipe, ConceptAttention(["sun", "sky"], embed="in_prompt"), call={"prompt_2": "a boat"})


def test_fused_projections(pipelines):
    for family in ("flux", "cogvideox"):
        pipe = testing.tiny_pipeline(family)
        _, apart = traced(pipe, ConceptAttention(WORDS))
        pipe.transformer.fuse_qkv_projections()
        _, fused = traced(pipe, ConceptAttention(WORDS))
        np.testing.assert_allclose(fused.o_c, apart.o_c, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "flux-picturebook"])
def test_other_attention_backends(family):
    """Weights that were trained have larger logits, and kernels differ more on them."""
    pipe = dp.demo.load(family) if family in dp.demo.names() else testing.tiny_pipeline(family)
    _, usual = traced(pipe, ConceptAttention(WORDS))
    with attention_backend("native"):  # setting a model's sets that of the process, too
        pipe.transformer.set_attention_backend("_native_math")
        _, other = traced(pipe, ConceptAttention(WORDS))
    np.testing.assert_allclose(other.o_c, usual.o_c, atol=1e-4)


def test_bfloat16_is_kept_bit_for_bit(tmp_path):
    tiny = testing.tiny_model("flux", dtype=torch.bfloat16)
    seen = []
    with torch.no_grad(), testing.watched(tiny.transformer, lambda call, out: seen.append(call.attention.v)):
        tiny.transformer(**tiny.inputs)
    probe = dp.Probe(record=["v_x"])
    with torch.no_grad(), dp.trace(tiny.transformer, probe, store=tmp_path / "b.zarr", progress=False):
        tiny.transformer(**tiny.inputs)
    stored = dp.open(tmp_path / "b.zarr").v_x.isel(step=0, layer=0).values
    assert np.array_equal(stored, seen[0][:, 5:].float().numpy())


# --- bare transformers


def test_a_bare_transformer_counts_steps_by_forwards():
    tiny = testing.tiny_model("flux")
    probe = ConceptAttention(["a", "b", "c"], steps=range(3))
    with torch.no_grad(), dp.trace(tiny.transformer, probe, concepts=tiny.concepts, progress=False) as run:
        for time in (1.0, 0.5, 0.25, 1.0, 0.5, 0.25):
            tiny.transformer(**{**tiny.inputs, "timestep": torch.full((2,), time)})
    ds = run.dataset
    assert ds.sizes["sample"] == 4 and ds.sizes["step"] == 3
    assert ds.timestep.values.tolist() == [1000.0, 500.0, 250.0]
    assert np.array_equal(ds.o_c.isel(sample=[0, 1]), ds.o_c.isel(sample=[2, 3]))


def test_concept_embeddings_by_sample():
    tiny = testing.tiny_model("sd3")
    embeddings = torch.stack([tiny.concepts, tiny.concepts.flip(0)])
    probe = ConceptAttention(["a", "b", "c"])
    with torch.no_grad(), dp.trace(tiny.transformer, probe, concepts=embeddings, progress=False) as run:
        tiny.transformer(**tiny.inputs)
    with torch.no_grad(), dp.trace(tiny.transformer, probe, concepts=tiny.concepts, progress=False) as same:
        tiny.transformer(**tiny.inputs)
    assert np.array_equal(run.dataset.o_c.isel(sample=0), same.dataset.o_c.isel(sample=0))
    np.testing.assert_allclose(
        run.dataset.q_c.isel(sample=1).values[:, 0, ::-1], same.dataset.q_c.isel(sample=1).values[:, 0], atol=1e-5
    )


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (None, "cannot encode words"),
        (torch.randn(2, 32), "2 concept embeddings for 3 names"),
        (torch.randn(32), "must be"),
        (torch.randn(5, 3, 32), "for 5 samples, but the call has 2"),
        (torch.full((3, 32), torch.nan), "not finite"),
    ],
)
def test_wrong_embeddings(concepts, message):
    tiny = testing.tiny_model("flux")
    with (
        torch.no_grad(),
        pytest.raises(ConceptError, match=message),
        dp.trace(tiny.transformer, ConceptAttention(["a", "b", "c"]), concepts=concepts, progress=False),
    ):
        tiny.transformer(**tiny.inputs)
