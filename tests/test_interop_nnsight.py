"""Sites in nnsight's traces: the tensors that this package's own traces record, and writing that is an edit."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import dit_probe as dp
from dit_probe import testing
from dit_probe.anatomy import find
from dit_probe.errors import DitProbeError, ModelError, SiteError

nnsight = pytest.importorskip("nnsight")
interop = pytest.importorskip("dit_probe.interop.nnsight")

PROMPT = "a sun in the sky"
GUIDED = {"flux": False, "sd3": True, "cogvideox": True}
FAMILIES = tuple(GUIDED)


@pytest.fixture(scope="module")
def wrapped():
    """Tiny pipelines with their nnsight models: not the shared ones, for nnsight's mark stays on a module."""
    made = {}

    def model(family: str):
        if family not in made:
            pipe = testing.tiny_pipeline(family)
            made[family] = pipe, interop.wrap(pipe)
        return made[family]

    return model


def call(family: str, steps: int = 1) -> dict:
    guided = {"guidance_scale": 3.0} if GUIDED[family] else {}
    size = {"num_inference_steps": steps, "output_type": "latent", **find(testing.tiny_pipeline(family)).tiny_call}
    return {**size, **guided, "generator": torch.Generator().manual_seed(0)}


def recorded(pipe, family: str, steps: int = 1):
    """The pipeline's output, and every site by (step, layer, site), in all rows of the transformer's calls."""
    kinds = {block.kind for block in find(pipe).blocks(pipe.transformer)}
    probe = dp.Probe(record=interop.SITES, layers="all" if "single" in kinds else "joint")
    with dp.trace(pipe, probe, branch="both" if GUIDED[family] else "cond", progress=False) as run:
        output = pipe(PROMPT, **call(family, steps))[0]
    ds, rows = run.dataset, "sample"
    if GUIDED[family]:
        ds, rows = ds.sel(branch=["uncond", "cond"]).drop_vars("branch").squeeze("sample"), "branch"
    found = {
        (step, layer, name): torch.from_numpy(ds[name].sel(step=step, layer=layer).transpose(rows, ...).values.copy())
        for name in interop.SITES
        for step in ds[name].attrs["steps"]
        for layer in ds[name].attrs["layers"]
    }
    return output, found


class ServersOwn(nnsight.intervention.interleaver.Interleaver):
    """An interleaver as a server has it, which takes no notes."""

    def watch(self, *args) -> None:
        pass


def changed(a: torch.Tensor) -> torch.Tensor:
    return 0.5 * a.flip(1) + 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_is_the_tensor_that_a_trace_records(wrapped, family: str):
    pipe, model = wrapped(family)
    output, expected = recorded(pipe, family, steps=2)
    layers = sorted({layer for _, layer, _ in expected})
    with model.generate(PROMPT, **call(family, 2)) as tracer:
        found = nnsight.save({})
        for step in tracer.iter[:2]:
            for layer in layers:
                for name in interop.SITES:
                    if (step, layer, name) in expected:
                        found[step, layer, name] = model.site(name, layer=layer).output.clone()
        result = tracer.result.save()
    assert torch.equal(result[0], output)
    assert found.keys() == expected.keys()
    assert {name for _, _, name in found} == set(interop.SITES)
    for key, activation in found.items():
        assert torch.equal(activation, expected[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_is_an_edit(wrapped, family: str):
    pipe, model = wrapped(family)
    layers = {"flux": (1, 3)}.get(family, (1,))
    edits = [dp.Edit(name, lambda a, point: changed(a), layers=layers, branch="both") for name in interop.SITES]
    with dp.trace(pipe, edits=edits, progress=False):
        expected = pipe(PROMPT, **call(family))[0]
    with model.trace(PROMPT, **call(family)) as tracer:
        for layer in layers:
            for name in interop.SITES:
                site = model.site(name, layer=layer)
                site.output = changed(site.output)
        assigned = tracer.result.save()
    with model.trace(PROMPT, **call(family)) as tracer:
        for layer in layers:
            for name in interop.SITES:
                in_place = model.site(name, layer=layer).output
                in_place[:] = changed(in_place)
        edited = tracer.result.save()
    plain = pipe(PROMPT, **call(family))[0]
    assert not torch.equal(expected, plain)
    assert torch.equal(assigned[0], expected)
    assert torch.equal(edited[0], expected)
    assert testing.leftovers(pipe) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_needs_no_dit_probe(wrapped, family: str, monkeypatch: pytest.MonkeyPatch):
    """The dry run of the remote path: this package hidden from the other side, whose interleaver is its own."""
    monkeypatch.setattr("nnsight.ndif.pull_env", lambda: None)
    monkeypatch.setattr(interop, "_Interleaver", ServersOwn)
    pipe, _ = wrapped(family)
    model = interop.wrap(pipe)
    _, expected = recorded(pipe, family)
    edits = [dp.Edit("o_p", lambda a, point: 2 * a, layers=[1], branch="both")]
    with dp.trace(pipe, edits=edits, progress=False):
        output = pipe(PROMPT, **call(family))[0]
    with model.trace(PROMPT, remote="local", **call(family)) as tracer:
        q_x = model.site("q_x", layer=1).output.clone().save()
        site = model.site("o_p", layer=1)
        site.output = 2 * site.output
        result = tracer.result.save()
    assert torch.equal(q_x, expected[0, 1, "q_x"])
    assert torch.equal(result[0], output)


def test_a_server_knows_the_model_by_nnsights_own_key(wrapped, monkeypatch: pytest.MonkeyPatch):
    _, model = wrapped("flux")
    monkeypatch.setattr(model, "repo_id", "black-forest-labs/FLUX.1-schnell")
    monkeypatch.setattr("nnsight.modeling.huggingface._ID_CACHE", {model.repo_id: model.repo_id})
    assert model.to_model_key().startswith("nnsight.modeling.diffusion.DiffusionModel:")


def test_a_folder_is_wrapped_without_its_weights(tmp_path):
    pipe = testing.tiny_pipeline("sd3")
    pipe.save_pretrained(tmp_path)
    model = interop.wrap(str(tmp_path))
    model.site("o_x", layer=2)
    assert not model.dispatched
    _, expected = recorded(pipe, "sd3")
    with model.trace(PROMPT, **call("sd3")):
        o_x = model.site("o_x", layer=2).output.save()
    assert torch.equal(o_x, expected[0, 2, "o_x"])


def test_invokes_see_their_own_rows(wrapped):
    pipe, model = wrapped("flux")
    prompts = ["a sun in the sky", "a boat on water"]
    with dp.trace(pipe, dp.Probe(record=["q_p", "x"], layers=[1]), progress=False) as run:
        pipe(prompts, **{**call("flux"), "generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)]})
    with model.trace(**{**call("flux"), "generator": None}, seed=0) as tracer:
        found = nnsight.save({})
        for row, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                for name in ("q_p", "x"):
                    found[row, name] = model.site(name, layer=1).output.clone()
    assert len(found) == 4
    for (row, name), activation in found.items():
        assert torch.equal(activation, torch.from_numpy(run.dataset[name].values[[row], 0, 0]))


def test_what_does_not_exist_is_said(wrapped):
    _, model = wrapped("sd3")
    with pytest.raises(SiteError, match=r"no site is called 'z_x'; those that exist: q_x, q_p"):
        model.site("z_x", layer=0)
    with pytest.raises(SiteError, match="no layer 3: joint layers are 0-2"):
        model.site("q_x", layer=3)
    with pytest.raises(SiteError, match="no 'p' after layer 2 .*context_pre_only"):
        model.site("p", layer=-1)
    with pytest.raises(ValueError, match="outside of interleaving"):
        _ = model.site("q_x", layer=0).output
    with pytest.raises(SiteError, match=r"q_x at .* is \(2, 16, 2, 16\), assigned \(1,\)"):  # noqa: SIM117
        with model.trace(PROMPT, **call("sd3")):
            model.site("q_x", layer=0).output = torch.zeros(1)


def test_what_is_no_location_of_nnsights_is_refused(wrapped, monkeypatch: pytest.MonkeyPatch):
    auraflow = interop.wrap(testing.tiny_pipeline("auraflow"))
    with pytest.raises(SiteError, match="put together from several values"):
        auraflow.site("p", layer=0)
    with pytest.raises(ModelError, match="wrap takes the pipeline"):
        interop.wrap(wrapped("flux")[0].transformer)
    monkeypatch.setattr("dit_probe.anatomy.families", dict)
    with pytest.raises(ModelError, match="FluxTransformer2DModel is of no known family"):
        interop.wrap(testing.tiny_pipeline("flux"))


def test_an_attention_that_is_called_out_of_sight_is_named():
    class Indirect:
        def __init__(self, processor) -> None:
            self.processor = processor

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    pipe = testing.tiny_pipeline("sd3")
    attention = pipe.transformer.transformer_blocks[1].attn
    attention.processor = Indirect(attention.processor)
    model = interop.wrap(pipe)
    with pytest.raises(SiteError, match=r"blocks.1.attn: o_x is read at the one call .* has 0: self_processor_0"):  # noqa: SIM117
        with model.trace(PROMPT, **call("sd3")):
            _ = model.site("o_x", layer=1).output


def test_where_nothing_tells_image_from_prompt_it_is_said(wrapped, monkeypatch: pytest.MonkeyPatch):
    _, sd3 = wrapped("sd3")
    x, p, temb = torch.zeros(1, 16, 32), torch.zeros(1, 5, 32), torch.zeros(1, 32)
    with pytest.raises(SiteError, match="ran outside of model.transformer"):  # noqa: SIM117
        with sd3.transformer.transformer_blocks[0].trace(x, p, temb):
            _ = sd3.site("q_x", layer=0).output
    monkeypatch.setattr(interop, "_Interleaver", ServersOwn)
    lumina = interop.wrap(testing.tiny_pipeline("lumina2"))
    with pytest.raises(SiteError, match="nothing that enters model.transformer.layers.0 tells a server"):  # noqa: SIM117
        with lumina.trace(PROMPT, **{**find(lumina.pipeline).tiny_call, "output_type": "latent"}):
            _ = lumina.site("x", layer=0).output


@pytest.mark.parametrize("name", ["nnsight", "transformer_lens"])
def test_a_missing_extra_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"dit_probe.interop.{name}", raising=False)
    with pytest.raises(DitProbeError, match=rf'pip install "dit-probe\[{name.replace("_", "-")}\]"'):
        importlib.import_module(f"dit_probe.interop.{name}")
