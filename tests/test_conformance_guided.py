"""The oracles under classifier-free guidance: on what a guided pipeline call gives its transformer."""

import functools

import numpy as np
import pytest
import torch
from conformance_cases import VECTORS, close, numpy
from tracing_cases import fewest_steps, generate, sites

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.anatomy.block import arguments_of

# diffusers' Krea 2 normalises what came out of a float32 softmax with weights in bfloat16.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")

# Of one length, as Lumina 2 wants the prompts of one call.
PROMPTS = ["a sun in the sky", "a boat on the water"]
SIZES = {"one": torch.float32, "two in bfloat16": torch.bfloat16}


class Guided:
    """One guided call of a pipeline, and what was recorded of it with random concepts."""

    def __init__(self, pipe, prompt, dtype):
        self.pipe, self.prompt, self.dtype = pipe, prompt, dtype
        self.rows = 1 if isinstance(prompt, str) else len(prompt)
        self.family = anatomy.find(pipe)
        calls = []
        handle = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(arguments_of(module, args, kwargs)), with_kwargs=True
        )
        self.before = self.generate()
        handle.remove()
        # Those of the first step: one for both branches, or one for each.
        self.calls = calls[: len(calls) // fewest_steps(pipe)]
        shape = self.family.clamped_concepts(pipe.transformer), self.family.prompt_embeddings(calls[0]).shape[-1]
        self.concepts = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def generate(self):
        # HunyuanVideo 1.5's autoencoder cannot decode two videos.
        return generate(self.pipe, self.prompt, steps=1, output_type="latent", **self.family.guided_call)

    def trace(self, concepts, record):
        probe = dp.Probe([f"concept {index}" for index in range(len(concepts))], record=record, **sites(self.pipe))
        with dp.trace(self.pipe, probe, concepts=concepts, branch="both", progress=False) as run:
            output = self.generate()
        return output, run.dataset.load(scheduler="synchronous")

    @functools.cached_property
    def traced(self):
        return self.trace(self.concepts, (*VECTORS, "c"))


@pytest.fixture(
    scope="module",
    params=[(case, size) for case in testing.pipeline_cases() for size in SIZES],
    ids=lambda param: "-".join([*param[0], param[1]]),
)
def guided(request, pipelines):
    case, size = request.param
    if size == "one":
        return Guided(pipelines(*case), PROMPTS[0], SIZES[size])
    return Guided(testing.tiny_pipeline(*case).to(SIZES[size]), PROMPTS, SIZES[size])


def test_replaying_the_prompt_gives_the_prompt(guided):
    rows = []
    with testing.watched(guided.pipe, lambda call, output: rows.append(len(call.x))):
        differences = testing.replay_differences(guided.pipe, guided.generate)
    blocks = guided.family.blocks(guided.pipe.transformer)
    assert sorted(differences) == [block.layer for block in blocks]
    # Both halves, one after the other or side by side.
    assert sum(rows) == 2 * guided.rows * len(blocks) * fewest_steps(guided.pipe)


def test_concept_stream_equals_the_model_run_on_concepts(guided):
    _, ds = guided.traced
    orders = [list(guided.family.halves)] if len(guided.calls) == 1 else [["cond"], ["uncond"]]
    for arguments, branches in zip(guided.calls, orders, strict=True):
        concepts = guided.concepts.expand(len(branches) * guided.rows, -1, -1)
        expected = testing.clamped(guided.pipe.transformer, arguments, concepts)
        for layer in ds.layer.values:
            for name, value in expected[layer].items():
                found = ds[name].sel(layer=layer, branch=branches).isel(step=0).transpose("branch", "sample", ...)
                close(np.concatenate(found), numpy(value), guided.dtype)


def test_equation_4_holds_in_both_branches(guided):
    _, ds = guided.traced
    k, v = (np.concatenate([ds[f"{letter}_x"], ds[f"{letter}_c"]], axis=4) for letter in "kv")
    close(ds.o_c, testing.attention_from_store(ds.q_c, k, v), guided.dtype)
    assert not np.array_equal(ds.o_x.sel(branch="cond"), ds.o_x.sel(branch="uncond"))


def test_output_is_untouched_and_nothing_stays_hooked(guided):
    during, _ = guided.traced
    assert torch.equal(guided.before, during)
    assert testing.leftovers(guided.pipe) == []
    assert torch.equal(guided.before, guided.generate())


def test_concepts_are_a_set(guided):
    _, ds = guided.traced
    _, turned = guided.trace(guided.concepts.flip(0), ["o_c", "q_c"])
    for name in ("o_c", "q_c"):
        close(turned[name].isel(concept=slice(None, None, -1)), ds[name], guided.dtype)
