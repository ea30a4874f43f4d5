"""Every anatomy against every oracle. No family is known here by name: a new family file is picked up as it is."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from tracing_cases import fewest_steps, generate, sites

import dit_probe as dp
from dit_probe import anatomy, stream, testing
from dit_probe.anatomy import TextSide
from dit_probe.anatomy.block import arguments_of
from dit_probe.attention import attention_weights
from dit_probe.errors import ReplayError

CASES = testing.cases()
WITH_CONCEPTS = testing.cases(concepts=True)
EVERY_SIZE = pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)],
    ids=["one", "two", "two in bfloat16"],
)
VECTORS = [f"{letter}_{token}" for letter in "qkvo" for token in "xpc"]
RESIDUALS = ["x", "p", "c"]


def limit(dtype: torch.dtype) -> float:
    return stream.tolerance(dtype)


def close(found, expected, dtype=torch.float32) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= limit(dtype) * np.abs(expected).max()


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def names(tiny: testing.TinyModel) -> list[str]:
    return [f"concept {index}" for index in range(len(tiny.concepts))]


def everywhere(tiny: testing.TinyModel, **options) -> dp.Probe:
    """A probe of every layer, with concepts in single-stream blocks too."""
    return dp.Probe(names(tiny), layers="all", through="all", **options)


@torch.no_grad()
def predict(tiny: testing.TinyModel) -> torch.Tensor:
    output = tiny.transformer(**tiny.inputs)[0]
    return torch.stack(output) if isinstance(output, list) else output


def traced(tiny: testing.TinyModel, probe: dp.Probe, **options):
    with torch.no_grad(), dp.trace(tiny.transformer, probe, concepts=tiny.concepts, progress=False, **options) as run:
        output = predict(tiny)
    return output, run.dataset.load()


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request):
    return request.param


@pytest.fixture(params=WITH_CONCEPTS, ids=lambda case: "-".join(case))
def concept_case(request):
    return request.param


@EVERY_SIZE
def test_replaying_the_prompt_gives_the_prompt(case, batch, dtype):
    tiny = testing.tiny_model(*case, batch=batch, dtype=dtype)
    differences = testing.replay_differences(tiny.transformer, lambda: tiny.transformer(**tiny.inputs))
    blocks = anatomy.find(tiny.transformer).blocks(tiny.transformer)
    assert sorted(differences) == [block.layer for block in blocks]
    for block in blocks:
        assert differences[block.layer].keys() == ({"o_p", "p"} if block.text_output else {"o_p"})


@EVERY_SIZE
def test_concept_stream_equals_the_model_run_on_concepts(concept_case, batch, dtype):
    tiny = testing.tiny_model(*concept_case, batch=batch, dtype=dtype)
    expected = testing.clamped(tiny.transformer, tiny.inputs, tiny.concepts.expand(batch, -1, -1))
    _, ds = traced(tiny, everywhere(tiny, record=["o_c", "c"]))
    assert len(expected) == ds.sizes["layer"]
    for layer, values in expected.items():
        for name, value in values.items():
            close(ds[name].sel(layer=layer).isel(step=0), numpy(value), dtype)


@pytest.mark.parametrize("batch", [1, 2])
def test_zero_pooled_equals_the_model_run_on_concepts_with_a_zero_vector(concept_case, batch):
    """The main path of the authors' code for Flux: concepts alone are modulated with a pooled vector of zeros."""
    tiny = testing.tiny_model(*concept_case, batch=batch)
    if not anatomy.find(tiny.transformer).pooled:
        return
    model, zeros = tiny.transformer, torch.zeros_like(tiny.inputs["pooled_projections"])
    conditions = {}
    with torch.no_grad(), testing.watched(model, lambda call, _: conditions.update({call.block.layer: call.arguments})):
        model(**tiny.inputs)

    def as_the_prompt_has_it(layer):
        before = {"emb": conditions[layer]["temb"], **conditions[layer]}

        def hook(module, args, kwargs):
            mine = arguments_of(module, args, kwargs)
            return (), {
                name: before.get(name, value) if name.endswith("emb") else value for name, value in mine.items()
            }

        return hook

    # Only concepts get the zero vector: the image goes on being modulated as the prompt has it.
    for block in anatomy.find(model).blocks(model):
        if block.kind == "joint":
            block.module.norm1.register_forward_pre_hook(as_the_prompt_has_it(block.layer), with_kwargs=True)
    expected = testing.clamped(model, tiny.inputs, tiny.concepts.expand(batch, -1, -1), pooled_projections=zeros)
    _, ds = traced(tiny, dp.Probe(names(tiny), record=["o_c", "c"], pooled="zero"))
    # Single-stream blocks modulate text and image with one vector, so joint ones alone can be compared.
    for layer in ds.layer.values:
        for name, value in expected[layer].items():
            close(ds[name].sel(layer=layer).isel(step=0), numpy(value))


@EVERY_SIZE
def test_equation_4_holds_on_what_was_stored(concept_case, batch, dtype, tmp_path):
    tiny = testing.tiny_model(*concept_case, batch=batch, dtype=dtype)
    traced(tiny, everywhere(tiny, record=VECTORS), store=tmp_path / "run.zarr")
    ds = dp.open(tmp_path / "run.zarr").load()
    whole = nothing_but_image_and_prompt(tiny)
    for layer in ds.layer.values:
        at = ds.sel(layer=layer)
        for queries in ("c", "p", "x") if whole else ("c",):
            # Concepts read the image and each other; prompt and image read the prompt and the image, never concepts.
            text = "c" if queries == "c" else "p"
            k, v = (np.concatenate([at[f"{letter}_x"], at[f"{letter}_{text}"]], axis=2) for letter in "kv")
            close(at[f"o_{queries}"], testing.attention_from_store(at[f"q_{queries}"], k, v), dtype)


@torch.no_grad()
def nothing_but_image_and_prompt(tiny) -> bool:
    """Whether the joint sequence holds nothing else, and no mask hides any of it."""
    found = []

    def see(call, output):
        tokens = sum(part.stop - part.start for part in (call.places.image, call.places.prompt))
        found.append(tokens == call.places.total and call.attention.mask is None)

    with testing.watched(tiny.transformer, see):
        tiny.transformer(**tiny.inputs)
    return all(found)


@EVERY_SIZE
def test_output_is_untouched_and_nothing_stays_hooked(case, batch, dtype):
    tiny = testing.tiny_model(*case, batch=batch, dtype=dtype)
    before = predict(tiny)
    probe = everywhere(tiny, record=[*VECTORS, *RESIDUALS], scores=dp.schema.SPACES)
    if case not in WITH_CONCEPTS:
        probe = dp.Probe(record=[name for name in probe.record if not name.endswith("c")], layers="all")
    during, _ = traced(tiny, probe)
    after = predict(tiny)
    assert torch.equal(before, during) and torch.equal(before, after)
    assert testing.leftovers(tiny.transformer) == []


@EVERY_SIZE
def test_concepts_are_a_set(concept_case, batch, dtype):
    tiny = testing.tiny_model(*concept_case, batch=batch, dtype=dtype)
    order = torch.arange(len(tiny.concepts)).flip(0)
    probe = everywhere(tiny, record=["o_c", "c", "q_c"])
    _, ds = traced(tiny, probe)
    _, turned = traced(dataclasses.replace(tiny, concepts=tiny.concepts[order]), probe)
    for name in ("o_c", "q_c"):
        close(turned[name].isel(concept=order.numpy()), ds[name], dtype)


def test_attention_weights_are_those_that_made_the_output(case):
    tiny = testing.tiny_model(*case)
    seen = []

    def see(call, output):
        seen.append(call.block.layer)
        for head in range(call.attention.q.shape[2]):
            o = attention_weights(call.attention, slice(0, 2), head) @ call.attention.v[:, :, head]
            for part in (call.places.image, call.places.prompt):
                close(numpy(o[:, part]), numpy(call.attention.o[:, part, head]))

    with torch.no_grad(), testing.watched(tiny.transformer, see):
        tiny.transformer(**tiny.inputs)
    assert seen


def test_residual_streams_are_the_blocks_outputs(case):
    tiny = testing.tiny_model(*case)
    _, ds = traced(tiny, dp.Probe(record=["x", "p"], layers="all"))
    family = anatomy.find(tiny.transformer)
    seen = {}
    with (
        torch.no_grad(),
        testing.watched(
            tiny.transformer, lambda call, out: seen.update({call.block.layer: (call.block, out, call.places)})
        ),
    ):
        tiny.transformer(**tiny.inputs)
    assert len(seen) == ds.sizes["layer"]
    for layer, output in seen.items():
        x, p = family.outputs(*output)
        assert np.array_equal(ds.x.sel(layer=layer).isel(step=0), numpy(x))
        if output[0].text_output:
            assert np.array_equal(ds.p.sel(layer=layer).isel(step=0), numpy(p))


def test_unrotated_vectors_are_those_before_rotation(case):
    tiny = testing.tiny_model(*case)
    _, ds = traced(tiny, dp.Probe(record=["q_x", "k_x", "q_x_unrotated", "k_x_unrotated"], layers="all"))
    family, norms = anatomy.find(tiny.transformer), {}

    def see(call, output):
        norms[call.block.layer] = family.unrotated(call.block, call.arguments)

    with torch.no_grad(), testing.watched(tiny.transformer, see):
        tiny.transformer(**tiny.inputs)
    for layer, rotated in norms.items():
        for letter in "qk":
            # Some attention processors rotate in place: what a norm returned must have been copied before.
            turned, plain = (ds[f"{letter}_x{suffix}"].sel(layer=layer) for suffix in ("", "_unrotated"))
            assert np.array_equal(turned, plain) == (not rotated)


def test_tokens_are_labelled_with_their_place(case):
    tiny = testing.tiny_model(*case)
    _, ds = traced(tiny, dp.Probe(record=["x"], layers="all"))
    for axis in ("frame", "y", "x"):
        assert tuple(ds[f"patch_{axis}"].values) == getattr(tiny.grid, axis)


# --- Guidance: the same oracles on what a guided pipeline call gives its transformer.


@pytest.fixture(params=testing.pipeline_cases(), ids=lambda case: "-".join(case))
def pipe(request, pipelines):
    return pipelines(*request.param)


def guided(pipe, branch="both", **probe):
    """A guided call traced with as many random concepts as the prompt has tokens, and the transformer's inputs."""
    calls = []
    model = pipe.transformer

    def remember(module, args, kwargs):
        calls.append(arguments_of(module, args, kwargs))

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    generate(pipe, steps=1, **anatomy.find(pipe).guided_call)
    handle.remove()
    calls = calls[: len(calls) // fewest_steps(pipe)]
    prompt = anatomy.find(pipe).prompt_embeddings(calls[0])
    concepts = torch.randn(prompt.shape[1:], generator=torch.Generator().manual_seed(1))
    words = [f"concept {index}" for index in range(concepts.shape[0])]
    probed = dp.Probe(words, **probe, **sites(pipe))
    with dp.trace(pipe, probed, concepts=concepts, branch=branch, progress=False) as run:
        generate(pipe, steps=1, **anatomy.find(pipe).guided_call)
    return calls, concepts, run.dataset.load()


def test_replaying_the_prompt_gives_the_prompt_under_guidance(pipe):
    rows = []
    with testing.watched(pipe, lambda call, output: rows.append(len(call.x))):
        differences = testing.replay_differences(
            pipe.transformer, lambda: generate(pipe, steps=1, **anatomy.find(pipe).guided_call)
        )
    blocks = anatomy.find(pipe).blocks(pipe.transformer)
    assert sorted(differences) == [block.layer for block in blocks]
    assert sum(rows) == 2 * len(blocks) * fewest_steps(pipe)  # both halves, one after the other or side by side


def test_concept_stream_equals_the_model_run_on_concepts_under_guidance(pipe):
    calls, concepts, ds = guided(pipe, record=["o_c", "c"])
    orders = [list(anatomy.find(pipe).halves)] if len(calls) == 1 else [["cond"], ["uncond"]]
    for arguments, branches in zip(calls, orders, strict=True):
        expected = testing.clamped(pipe.transformer, arguments, concepts.expand(len(branches), -1, -1))
        for layer in ds.layer.values:
            for name, value in expected[layer].items():
                close(ds[name].sel(layer=layer, branch=branches).isel(step=0, sample=0), numpy(value))


def test_equation_4_holds_in_both_branches(pipe):
    _, _, ds = guided(pipe, record=[*VECTORS])
    k, v = (np.concatenate([ds[f"{letter}_x"], ds[f"{letter}_c"]], axis=4) for letter in "kv")
    close(ds.o_c, testing.attention_from_store(ds.q_c, k, v))
    assert not np.array_equal(ds.o_x.sel(branch="cond"), ds.o_x.sel(branch="uncond"))


# --- Mutation checks: an oracle that cannot fail proves nothing.


class Mutant(TextSide):
    """A text side with something wrong in it."""

    def __init__(self, text):
        self.text = text

    def project(self, c, context):
        return self.text.project(c, context)

    def update(self, c, o, projection, context):
        return self.text.update(c, o, projection, context)


class SwappedGates(Mutant):
    def project(self, c, context):
        projection = super().project(c, context)
        return dataclasses.replace(projection, modulation=projection.modulation[::-1])

    def update(self, c, o, projection, context):
        if len(projection.modulation) > 1:
            return super().update(c, o, projection, context)
        # This text side carries one gate and makes the others anew: it gets another row's of features.
        wrong = tuple(part.roll(1, dims=-1) for part in projection.modulation)
        return super().update(c, o, dataclasses.replace(projection, modulation=wrong), context)


class NoTextRotary(Mutant):
    def project(self, c, context):
        return super().project(c, dataclasses.replace(context, rotary=None))


class NoKeyNorm(Mutant):
    def project(self, c, context):
        attention, name = context.block.attention, key_norm(context.block)
        norm = getattr(attention, name)
        setattr(attention, name, nn.Identity())
        try:
            return super().project(c, context)
        finally:
            setattr(attention, name, norm)


class NoOutputProjection(Mutant):
    def update(self, c, o, projection, context):
        return super().update(c, torch.zeros_like(o), projection, context)


KEY_NORMS = ("norm_added_k", "norm_k", "txt_attn_k_norm", "k_rms_norm_t", "k_rms_norm", "k_norm")


def key_norm(block):
    return next((name for name in KEY_NORMS if getattr(block.attention, name, None) is not None), None)


def mutate(monkeypatch, tiny, change) -> None:
    family = type(anatomy.find(tiny.transformer))
    if change == "stream order":
        right = family.places

        def places(self, *call):
            found = right(self, *call)
            image, prompt = (part.stop - part.start for part in (found.image, found.prompt))
            first = min(found.image.start, found.prompt.start)
            wrong = anatomy.Places.of(image, prompt, text_first=found.image.start < found.prompt.start, before=first)
            return dataclasses.replace(wrong, total=found.total)

        monkeypatch.setattr(family, "places", places)
        return
    blocks = family.blocks

    def mutants(self, model):
        return tuple(dataclasses.replace(block, text=change(block.text)) for block in blocks(self, model))

    monkeypatch.setattr(family, "blocks", mutants)


def applies(tiny, change) -> bool:
    family = anatomy.find(tiny.transformer)
    block = family.blocks(tiny.transformer)[0]
    if change in (NoTextRotary, SwappedGates):
        has = []

        def see(call, output):
            rotates = family.text_rotary(call.block, call.arguments, call.places, slice(0, 1)) is not None
            has.append(rotates if change is NoTextRotary else bool(stream.replay(family, call).projection.modulation))

        with torch.no_grad(), testing.watched(tiny.transformer, see):
            tiny.transformer(**tiny.inputs)
        return has[0]
    return change is not NoKeyNorm or key_norm(block) is not None


MUTATIONS = [SwappedGates, NoTextRotary, NoKeyNorm, NoOutputProjection, "stream order"]


@pytest.mark.parametrize("change", MUTATIONS, ids=lambda change: getattr(change, "__name__", change))
def test_a_wrong_anatomy_is_refused(case, change, monkeypatch):
    tiny = testing.tiny_model(*case)
    if not applies(tiny, change):
        return
    if change == "stream order" and anatomy.find(tiny.transformer).blocks(tiny.transformer)[0].kind == "single":
        return  # One set of weights: an image token replays like any other. The clamped model tells them apart.
    mutate(monkeypatch, tiny, change)
    with pytest.raises(ReplayError, match="does not describe this model"):
        testing.replay_differences(tiny.transformer, lambda: tiny.transformer(**tiny.inputs))


@pytest.mark.parametrize("change", MUTATIONS, ids=lambda change: getattr(change, "__name__", change))
def test_a_wrong_anatomy_differs_from_the_clamped_model(concept_case, change, monkeypatch):
    tiny = testing.tiny_model(*concept_case)
    if not applies(tiny, change):
        return
    expected = testing.clamped(tiny.transformer, tiny.inputs, tiny.concepts.expand(2, -1, -1))
    mutate(monkeypatch, tiny, change)
    _, ds = traced(tiny, everywhere(tiny, record=["o_c", "c"]), verify=None)
    value = numpy(expected[1]["c"])
    off = np.abs(ds.c.sel(layer=1).isel(step=0).values - value).max() / np.abs(value).max()
    assert off > 100 * limit(torch.float32)


def test_trace_refuses_a_model_that_its_anatomy_does_not_describe(concept_case, monkeypatch):
    tiny = testing.tiny_model(*concept_case)
    mutate(monkeypatch, tiny, NoOutputProjection)
    with pytest.raises(ReplayError, match="does not describe this model"):
        traced(tiny, everywhere(tiny, record=["o_c"]))
    assert testing.leftovers(tiny.transformer) == []
