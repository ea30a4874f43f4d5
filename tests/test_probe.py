"""Declarations, what they cost, and the words they carry."""

import dataclasses
from importlib.metadata import entry_points

import pytest
import torch

import dit_probe as dp
from dit_probe import testing
from dit_probe.errors import ConceptError, ProbeError, SiteError
from probes import ConceptAttention, CrossAttention, PromptAttention, ValueSpace

SIZES = {
    "flux": {"height": 16, "width": 24},
    "sd3": {"height": 16, "width": 16},
    "cogvideox": {"height": 32, "width": 48, "frames": 9},
}


@pytest.mark.parametrize("family", SIZES)
def test_a_plan_is_what_a_run_records(family):
    pipe, size = testing.tiny_pipeline(family), SIZES[family]
    probe = ConceptAttention(["sun", "sky"], scores=("output", "cross")) | PromptAttention(layers=[1], steps=[0])
    plan = probe.plan(pipe, steps=2, **size)
    with dp.trace(pipe, probe, progress=False) as run:
        call = {name.replace("frames", "num_frames"): value for name, value in size.items()}
        pipe("a sun", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    assert run.bytes_written == plan.nbytes
    ds = run.dataset
    for variable in plan.layout.variables:
        assert {dim: ds[variable.name].sizes[dim] for dim in variable.dims} == {
            dim: plan.layout.sizes[dim] for dim in variable.dims
        }
    assert "o_c" in str(plan) and "before compression" in str(plan)


def test_scores_are_a_small_part_of_the_vectors():
    pipe = testing.tiny_pipeline("flux")
    size = {"height": 16, "width": 24, "steps": 4}
    whole = ConceptAttention(["sun", "sky"]).plan(pipe, **size)
    scores = ConceptAttention(["sun", "sky"], record=(), scores=("output", "value", "cross")).plan(pipe, **size)
    assert scores.nbytes < whole.nbytes / 10


def test_plans_need_the_pipeline():
    with pytest.raises(ProbeError, match="needs the pipeline"):
        ConceptAttention(["sun"]).plan(testing.tiny_model("flux").transformer, height=16, width=16, steps=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attends": "all"}, "attends='all'; choose one of both, image, concepts, none"),
        ({"embed": "last"}, "embed='last'"),
        ({"pooled": "mean"}, "pooled='mean'"),
        ({"scores": ["depth"]}, "'depth'; spaces are output, value, cross"),
        ({"scores": "output"}, "scores must be a list"),
        ({"layers": "last"}, "layers='last'"),
        ({"steps": "all"}, "steps='all'"),
    ],
)
def test_fields_that_do_not_exist(fields, message):
    with pytest.raises(ProbeError, match=message):
        dp.Probe(**fields)


def test_activations_that_do_not_exist():
    with pytest.raises(SiteError, match=r"no activation is called 'w_x'; those that exist: q_x"):
        dp.Probe(record=["w_x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sun", "must be a list of words"),
        (["sun", ""], "every concept must be a word, found ''"),
        (["sun", "  "], "found '  '"),
        (["sun", 3], "found 3"),
        (["sun", "sky", "sun"], "concepts must differ, found 'sun' more than once"),
    ],
)
def test_words_that_cannot_be_told_apart(words, message):
    with pytest.raises(ConceptError, match=message):
        ConceptAttention(words)


def test_too_many_or_too_long_concepts():
    pipe = testing.tiny_pipeline("cogvideox")
    with pytest.raises(ConceptError, match="300 concepts, but the model was made for at most 226"):
        dp.trace(pipe, ConceptAttention([f"a{index}" for index in range(300)], embed="mean_tokens"))
    with pytest.raises(ConceptError, match=r"has \d+ tokens; the text encoder takes 226"):
        dp.trace(pipe, ConceptAttention(["sun " * 300, "sky"]))


def test_probes_are_found_by_entry_point_and_frozen():
    found = {point.name: point.load() for point in entry_points(group="dit_probe.probes")}
    mine = {kind.__name__: kind for kind in (ConceptAttention, CrossAttention, PromptAttention, ValueSpace)}
    assert mine.items() <= found.items()
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConceptAttention(["sun"]).layers = (1,)  # type: ignore[misc]


def test_observations_of_a_probe_of_ones_own():
    class HeadNorms(dp.Probe):
        observes = {"norm": ("image_token", "head")}  # noqa: RUF012
        needs = ("o_x",)

        def observe(self, block, activations):
            return {"norm": activations["o_x"].norm(dim=-1)}

    tiny = testing.tiny_model("sd3")
    with torch.no_grad(), dp.trace(tiny.transformer, HeadNorms() | dp.Probe(record=["o_x"]), progress=False) as run:
        tiny.transformer(**tiny.inputs)
    ds = run.dataset.load()
    assert float(abs(ds.norm - (ds.o_x**2).sum("head_dim") ** 0.5).max()) < 1e-5


def test_what_an_observation_needs_is_seen_even_if_nothing_records_it():
    class Unrotated(dp.Probe):
        observes = {"norm": ("image_token", "head")}  # noqa: RUF012
        needs = ("q_x_unrotated",)

        def observe(self, block, activations):
            return {"norm": activations["q_x_unrotated"].norm(dim=-1)}

    tiny = testing.tiny_model("flux")
    found = []
    for probes in (Unrotated(), Unrotated() | dp.Probe(record=["q_x_unrotated"])):
        with torch.no_grad(), dp.trace(tiny.transformer, probes, progress=False) as run:
            tiny.transformer(**tiny.inputs)
        found.append(run.dataset.load())
    alone, beside = found
    assert float(abs(alone.norm - (beside.q_x_unrotated**2).sum("head_dim") ** 0.5).max()) < 1e-5
