"""Every anatomy against every oracle. No family is known here by name: a new family file is picked up as it is.

How the oracles fare under guidance is in `test_conformance_guided`, what they notice in `test_conformance_mutations`.
"""

import numpy as np
import pytest
import torch
from conformance_cases import CASES, IN_FLOAT16, SIZES, VECTORS, WITH_CONCEPTS, close, limit, numpy, subject_of

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.anatomy.block import arguments_of
from dit_probe.attention import attention_weights


def on(cases, sizes=tuple(SIZES)):
    """Runs a test on these tiny models."""
    params = [(case, size) for case in cases for size in sizes if SIZES[size][1] != torch.float16 or case in IN_FLOAT16]
    names = ["-".join([*case, size]) for case, size in params]
    return pytest.mark.parametrize("subject", params, ids=names, indirect=True)


@pytest.fixture(scope="module")
def subject(request):
    return subject_of(*request.param)


@on(CASES)
def test_replaying_the_prompt_gives_the_prompt(subject):
    differences = testing.replay_differences(subject.model, subject.predict)
    assert sorted(differences) == [block.layer for block in subject.blocks]
    for block in subject.blocks:
        assert differences[block.layer].keys() == ({"o_p", "p"} if block.text_output else {"o_p"})
        assert max(differences[block.layer].values()) <= limit(subject.dtype)


@on(WITH_CONCEPTS)
def test_concept_stream_equals_the_model_run_on_concepts(subject):
    assert len(subject.clamped) == subject.ds.sizes["layer"]
    for layer, values in subject.clamped.items():
        for name, value in values.items():
            close(subject.ds[name].sel(layer=layer), numpy(value), subject.dtype)


@on([case for case in WITH_CONCEPTS if anatomy.families()[case[0]].pooled], ["one", "two"])
def test_zero_pooled_equals_the_model_run_on_concepts_with_a_zero_vector(subject):
    """The main path of the authors' code for Flux: concepts alone are modulated with a pooled vector of zeros."""
    inputs = subject.tiny.inputs
    zeros = torch.zeros_like(inputs["pooled_projections"])

    def as_the_prompt_has_it(layer):
        arguments = subject.calls[layer][0].arguments
        before = {"emb": arguments["temb"], **arguments}

        def hook(module, args, kwargs):
            mine = arguments_of(module, args, kwargs)
            return (), {
                name: before.get(name, value) if name.endswith("emb") else value for name, value in mine.items()
            }

        return hook

    # Only concepts get the zero vector: the image goes on being modulated as the prompt has it.
    handles = [
        block.module.norm1.register_forward_pre_hook(as_the_prompt_has_it(block.layer), with_kwargs=True)
        for block in subject.blocks
        if block.kind == "joint"
    ]
    expected = testing.clamped(subject.model, inputs, subject.concepts, pooled_projections=zeros)
    for handle in handles:
        handle.remove()
    # Single-stream blocks modulate text and image with one vector, so joint ones alone can be compared.
    _, ds = subject.trace(dp.Probe(subject.words, record=["o_c", "c"], pooled="zero"))
    for layer in ds.layer.values:
        for name, value in expected[layer].items():
            close(ds[name].sel(layer=layer).isel(step=0), numpy(value))


@on(WITH_CONCEPTS)
def test_equation_4_holds_on_what_was_stored(subject):
    whole = all(nothing_but_image_and_prompt(call) for call, _ in subject.calls.values())
    for layer in subject.ds.layer.values:
        at = subject.ds.sel(layer=layer)
        for queries in ("c", "p", "x") if whole else ("c",):
            # Concepts read the image and each other; prompt and image read the prompt and the image, never concepts.
            text = "c" if queries == "c" else "p"
            k, v = (np.concatenate([at[f"{letter}_x"], at[f"{letter}_{text}"]], axis=1) for letter in "kv")
            close(at[f"o_{queries}"], testing.attention_from_store(at[f"q_{queries}"], k, v), subject.dtype)


def nothing_but_image_and_prompt(call) -> bool:
    """Whether the joint sequence holds nothing else, and no mask hides any of it."""
    tokens = sum(part.stop - part.start for part in (call.places.image, call.places.prompt))
    return tokens == call.places.total and call.attention.mask is None


@on(CASES)
def test_output_is_untouched_and_nothing_stays_hooked(subject):
    run = subject.run
    assert torch.equal(run.before, run.during) and torch.equal(run.before, run.after)
    assert run.leftovers == []
    assert {name for name in VECTORS if name[-1] != "c"} <= run.ds.data_vars.keys()


@on(WITH_CONCEPTS)
def test_concepts_are_a_set(subject):
    turned = subject.trace(subject.probe(record=["o_c", "q_c"]), subject.tiny.concepts.flip(0))[1].isel(step=0)
    for name in ("o_c", "q_c"):
        close(turned[name].isel(concept=slice(None, None, -1)), subject.ds[name], subject.dtype)


@on(CASES, ["two"])
def test_attention_weights_are_those_that_made_the_output(subject):
    for call, _ in subject.calls.values():
        for head in range(call.attention.q.shape[2]):
            o = attention_weights(call.attention, slice(0, 2), head) @ call.attention.v[:, :, head]
            for part in (call.places.image, call.places.prompt):
                close(numpy(o[:, part]), numpy(call.attention.o[:, part, head]))


@on(CASES)
def test_residual_streams_are_the_blocks_outputs(subject):
    assert len(subject.calls) == subject.ds.sizes["layer"]
    for layer, (call, output) in subject.calls.items():
        x, p = subject.family.outputs(call.block, output, call.places)
        assert np.array_equal(subject.ds.x.sel(layer=layer), numpy(x))
        if call.block.text_output:
            assert np.array_equal(subject.ds.p.sel(layer=layer), numpy(p))


@on(CASES)
def test_unrotated_vectors_are_those_before_rotation(subject):
    for layer, (call, _) in subject.calls.items():
        rotated = subject.family.unrotated(call.block, call.arguments)
        for letter in "qk":
            # Some attention processors rotate in place: what a norm returned must have been copied before.
            turned, plain = (subject.ds[f"{letter}_x{suffix}"].sel(layer=layer) for suffix in ("", "_unrotated"))
            assert np.array_equal(turned, plain) == (not rotated)


@on(CASES, ["two"])
def test_tokens_are_labelled_with_their_place(subject):
    for axis in ("frame", "y", "x"):
        assert tuple(subject.ds[f"patch_{axis}"].values) == getattr(subject.tiny.grid, axis)


@on(CASES, ["two"])
def test_latents_enter_the_image_stream_alone(subject):
    """Which of two streams is the image's; of blocks with one set of weights, no replay tells."""
    (x, p), (x_changed, p_changed) = subject.entering(), subject.entering(1.0)
    assert torch.equal(p, p_changed)
    # All of it, but for reference images that are an argument of their own.
    references = subject.tiny.inputs.get("image_cond_hidden_states", x[:, :0]).shape[1]
    assert ((x != x_changed).any(-1).sum(1) == x.shape[1] - references).all()


# --- What self-replay does not see, tiny models must not have.


@on(CASES, ["two"])
def test_text_stands_at_positions_that_can_be_told_from_zero_and_from_each_other(subject):
    call, _ = subject.calls[0]

    def turned(tokens):
        rotary = subject.family.text_rotary(call.block, call.arguments, call.places, slice(0, tokens))
        return None if rotary is None else rotary(torch.ones(1, tokens, *call.attention.q.shape[2:]))

    first, every = turned(1), turned(call.places.prompt_tokens)
    if first is None:
        pytest.skip("text has no rotary embedding")
    assert not torch.allclose(every, every[:, :1])
    # Where there are concepts, they stand at the first.
    assert subject.family.no_concepts or not torch.allclose(first, torch.ones(()))


# Their table of text positions is added to exactly as many tokens, whatever the prompt.
ONE_LENGTH = [("cogvideox", "2b"), ("consisid", "sincos"), ("consisid", "learned")]


@on(WITH_CONCEPTS, ["two"])
def test_the_clamped_oracle_has_fewer_concepts_than_the_prompt_has_tokens(subject):
    fewer = len(subject.tiny.concepts) < subject.calls[0][0].places.prompt_tokens
    assert fewer == (subject.case not in ONE_LENGTH)
    if not fewer:
        with pytest.raises((RuntimeError, ValueError)):
            testing.clamped(subject.model, subject.tiny.inputs, subject.concepts[:, 1:])
