"""What `trace` does around a pipeline: untouched output, branches, steps, stores, errors."""

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from torch import nn

import dit_probe as dp
from dit_probe import stream, testing
from dit_probe.anatomy import families
from dit_probe.errors import (
    ConceptError,
    ConceptWarning,
    IncompleteWarning,
    ModelError,
    ProbeError,
    SiteError,
    StoreError,
    TraceError,
)
from probes import ConceptAttention, CrossAttention, PromptAttention, ValueSpace

SIZES = {
    "flux": {"height": 16, "width": 24},
    "sd3": {"height": 16, "width": 16},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9},
}
WORDS = ["sun", "sky", "boat"]
EVERYTHING = ConceptAttention(WORDS, scores=("output", "value", "cross")) | CrossAttention(WORDS) | PromptAttention()
PIPELINES = [(family, variant) for family, variant in testing.cases() if variant not in ("dev", "sd3.5-large", "1.5")]


@pytest.fixture(scope="module")
def pipelines():
    made = {}

    def pipeline(family, variant=None):
        key = family, variant or families()[family].variants[0]
        if key not in made:
            made[key] = testing.tiny_pipeline(*key)
        return made[key]

    return pipeline


def generate(pipe, prompt="a sun in the sky", *, steps=2, seed=0, **options):
    family = dp.testing.find(pipe).family
    result = pipe(
        prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **{**SIZES[family], "max_sequence_length": 226 if family == "cogvideox" else 16, **options},
    )
    return result.frames if family == "cogvideox" else result.images


def traced(pipe, *probes, call=None, **options):
    with dp.trace(pipe, *probes, progress=False, **options) as run:
        output = generate(pipe, **(call or {}))
    return output, run.dataset


@pytest.mark.parametrize(
    "probe", [ConceptAttention(WORDS), CrossAttention(WORDS), ValueSpace(WORDS), PromptAttention()]
)
@pytest.mark.parametrize("case", PIPELINES, ids="-".join)
def test_output_is_untouched(pipelines, case, probe):
    pipe = pipelines(*case)
    before = generate(pipe)
    during, ds = traced(pipe, probe, branch="both" if case[0] != "flux" else "cond")
    assert torch.equal(before, during)
    assert torch.equal(before, generate(pipe))
    assert testing.leftovers(pipe) == []
    assert all(np.isfinite(ds[name]).all() for name in probe.variables)


@pytest.mark.parametrize("family", SIZES)
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
            max_sequence_length=16,
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


def test_other_attention_backends(pipelines):
    pipe = testing.tiny_pipeline("flux")
    _, usual = traced(pipe, ConceptAttention(WORDS))
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


# --- ways out


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "attention", "block"])
def test_nothing_stays_hooked_after_an_error(error, where, tmp_path):
    pipe = testing.tiny_pipeline("flux")
    store = tmp_path / "cut.zarr"

    def fail(*args, **kwargs):
        raise error("stop")

    calls = {"callback_on_step_end": fail} if where == "callback" else {}
    block = pipe.transformer.transformer_blocks[1]
    broken = {"attention": block.attn.to_out[0], "block": block.ff}.get(where)
    handle = broken.register_forward_pre_hook(fail) if broken is not None else None
    with pytest.raises(error, match="stop"), dp.trace(pipe, ConceptAttention(WORDS), store=store, progress=False):
        generate(pipe, **calls)
    if handle is not None:
        handle.remove()
    assert testing.leftovers(pipe) == []
    with pytest.warns(IncompleteWarning, match="sample 0"):
        assert not dp.open(store).done.any()
    before = generate(pipe)
    after, ds = traced(pipe, ConceptAttention(WORDS), store=store)
    assert torch.equal(before, after) and bool(ds.done.all())


def test_one_trace_at_a_time(pipelines):
    pipe = pipelines("flux")
    with (
        dp.trace(pipe, ConceptAttention(WORDS), progress=False),
        pytest.raises(ModelError, match="being traced already"),
        dp.trace(pipe, ConceptAttention(WORDS), progress=False),
    ):
        pass
    assert testing.leftovers(pipe) == []


KILLED = """
    import os, sys, torch
    os.environ["HF_HUB_OFFLINE"] = "1"
    import dit_probe as dp
    from dit_probe import stream, testing
    from probes import ConceptAttention

    pipe = testing.tiny_pipeline("flux")
    def wait(pipe, step, time, values):
        print(step, flush=True)
        if step == 1 and sys.argv[2] == "wait":
            import time
            time.sleep(60)
        return values
    with dp.trace(pipe, ConceptAttention(["sun", "sky"]), store=sys.argv[1], progress=False):
        for seed, prompt in enumerate(["a sun", "a boat"]):
            pipe(prompt, height=16, width=16, num_inference_steps=3, max_sequence_length=16,
                 generator=torch.Generator().manual_seed(seed), callback_on_step_end=wait if seed else None)
"""


def test_a_killed_run_is_readable_and_completed_by_running_it_again(tmp_path):
    script, store = tmp_path / "run.py", tmp_path / "killed.zarr"
    script.write_text(textwrap.dedent(KILLED))
    process = subprocess.Popen([sys.executable, script, store, "wait"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "1":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.warns(IncompleteWarning, match=r"1 of 2 samples .* sample 1 lacks \d+ of \d+"):
        ds = dp.open(store)
    assert ds.done.values.tolist() == [True, False]
    subprocess.run([sys.executable, script, store, "go"], check=True, capture_output=True)
    completed = dp.open(store).load()
    assert completed.done.all() and completed.prompt.values.tolist() == ["a sun", "a boat"]
    fresh = tmp_path / "fresh.zarr"
    subprocess.run([sys.executable, script, fresh, "go"], check=True, capture_output=True)
    for name, variable in dp.open(fresh).load().data_vars.items():
        assert np.array_equal(variable, completed[name]), name


# --- wrong use


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


def test_nothing_to_record(pipelines):
    with pytest.raises(ProbeError, match="nothing to record"):
        dp.trace(pipelines("flux"), dp.Probe(WORDS))


def test_no_pooled_vector(pipelines):
    with pytest.raises(ProbeError, match="cogvideox has no pooled text vector"):
        dp.trace(pipelines("cogvideox"), ConceptAttention(WORDS, pooled="zero"))


def test_no_t5(pipelines):
    pipe = testing.tiny_pipeline("sd3")
    pipe.text_encoder_3 = None
    with pytest.raises(ConceptError, match="loaded without its T5"):
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
    import zarr

    original = zarr.Array.__setitem__

    def slow(self, index, value):
        time.sleep(0.002)
        original(self, index, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", slow)
    _, ds = traced(pipelines("flux"), EVERYTHING)
    assert bool(ds.done.all())
