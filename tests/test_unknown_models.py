"""Models that dit-probe does not know: described by their user in one file, guessed, or run on the concepts."""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import test_conformance as conformance
import test_conformance_mutations as mutations
import torch
from conformance_cases import Subject
from robustness_cases import PROBE, call
from torch import nn

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.anatomy.structural import Structural
from dit_probe.errors import ModelError, ModelWarning, ProbeError

TOY = Path(__file__).with_name("toy_model.py").read_text()
# All that a family of diffusers is held to, but for the pooled vector, which the toy has not.
ORACLES = {
    name: function
    for name, function in [*vars(conformance).items(), *vars(mutations).items()]
    if name.startswith("test_") and "subject" in inspect.signature(function).parameters and "pooled" not in name
}
NAMES = ["a", "b", "c"]
EVERYTHING = dp.Probe(NAMES, record=["o_x", "q_c", "k_c", "v_c", "o_c", "c", "x", "p"], scores=dp.schema.SPACES)


@pytest.fixture
def toy(tmp_path):
    """The file of a user, imported from where it lies; forgotten afterwards."""

    def load(text=TOY):
        (tmp_path / "mine.py").write_text(text)
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        sys.modules["mine"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("mine", None)


@pytest.fixture
def undescribed(monkeypatch):
    """Forget the toy's description: a class lives as long as anything refers to it."""
    every = anatomy.families
    monkeypatch.setattr(anatomy, "families", lambda: {name: kind for name, kind in every().items() if name != "toy"})


@pytest.fixture
def stranger(monkeypatch):
    """A Flux whose family is not known, and what the real anatomy gives."""
    tiny = testing.tiny_model("flux")
    _, expected = run(tiny)
    monkeypatch.setattr(anatomy, "families", dict)
    return tiny, expected


def run(tiny, probe=EVERYTHING, steps=1, **options):
    with torch.no_grad(), dp.trace(tiny.transformer, probe, concepts=tiny.concepts, progress=False, **options) as trace:
        for _ in range(steps):
            output = tiny.transformer(**tiny.inputs)[0]
    return output, trace.dataset.load()


def same(found, expected) -> None:
    for name in expected.data_vars:
        if name != "done" and expected[name].dtype.kind == "f":
            largest = float(abs(expected[name]).max())
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * largest, err_msg=name)


def test_a_new_family_is_one_file(toy):
    module = toy()
    assert isinstance(anatomy.families()["toy"], module.Toy)
    tiny = testing.tiny_model("toy")
    found = dp.verify(tiny.transformer, inputs=tiny.inputs)
    assert found.ok and found.family == "toy" and len(found.layers) == 3
    _, ds = run(tiny)
    maps = dp.maps.saliency(ds, space="output")
    assert maps.sizes == {"sample": 2, "concept": 3, "y": 3, "x": 5}


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_a_new_family_is_held_to_every_oracle(toy, oracle, monkeypatch):
    toy()
    takes = inspect.signature(oracle).parameters
    for change in mutations.applicable(Subject(("toy", "toy"))) if "change" in takes else [None]:
        with monkeypatch.context() as patch:
            given = {"subject": Subject(("toy", "toy")), "change": change, "monkeypatch": patch}
            oracle(**{name: given[name] for name in takes})


def test_what_has_no_two_streams_is_refused_with_the_families_that_are_known():
    with pytest.raises(ModelError, match=r"none to guess.*flux \(FluxTransformer2DModel\)"):
        dp.trace(nn.Sequential(nn.Linear(2, 2)), EVERYTHING)


def test_a_guess_that_replays_is_used(stranger):
    tiny, expected = stranger
    with pytest.warns(ModelWarning, match="guessed from the names of its parts"):
        output, found = run(tiny)
    assert found.attrs["identity"]["family"] == "unknown (guessed)"
    same(found, expected.sel(layer=found.layer))
    assert testing.leftovers(tiny.transformer) == []
    settled = anatomy.find(tiny.transformer)
    assert isinstance(settled, Structural) and settled.entry_name == "context_embedder" and settled.rotates
    # Guessed once, verified and used from then on without a word.
    assert dp.verify(tiny.transformer, inputs=tiny.inputs).ok
    assert torch.equal(run(tiny)[0], output)


@pytest.mark.parametrize("branches", [1, 2])
def test_where_no_guess_replays_the_model_itself_is_run(stranger, monkeypatch, branches):
    tiny, expected = stranger
    every = Structural.candidates
    monkeypatch.setattr(Structural, "candidates", lambda self: (c for c in every(self) if not c.fast))
    probe = dp.Probe(NAMES, record=EVERYTHING.record, scores=dp.schema.SPACES, steps=range(branches))
    with pytest.warns(ModelWarning, match="two more forwards"):
        output, found = run(tiny, probe, steps=branches)
    assert found.attrs["identity"]["family"] == "unknown (clamped)"
    for step in range(branches):
        same(found.isel(step=[step]), expected.sel(layer=found.layer))
    with torch.no_grad():
        assert torch.equal(output, tiny.transformer(**tiny.inputs)[0])
    assert testing.leftovers(tiny.transformer) == []
    with pytest.raises(ModelError, match="no concept code of ours to verify"):
        dp.verify(tiny.transformer, inputs=tiny.inputs)
    with pytest.raises(ProbeError, match="attends='image'"):
        run(tiny, dp.Probe(NAMES, record=["o_c"], attends="image"))


@pytest.mark.parametrize("guessed", [True, False], ids=["guessed", "clamped"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_stranger_in_a_guided_pipeline(family, guessed, monkeypatch):
    """Both halves of guidance, in two calls and in one of twice the rows, are those of the known anatomy."""
    pipe = testing.tiny_pipeline(family)
    guidance = anatomy.find(pipe).guided_call

    def traced():
        with dp.trace(pipe, PROBE, branch="both", progress=False) as trace:
            output = call(family, pipe, **guidance)
        return output, trace.dataset.load()

    before, expected = traced()
    every = Structural.candidates
    monkeypatch.setattr(anatomy, "families", dict)
    monkeypatch.setattr(Structural, "candidates", lambda self: (c for c in every(self) if c.fast == guessed))
    with pytest.warns(ModelWarning, match="guessed from the names" if guessed else "two more forwards"):
        output, found = traced()
    assert found.attrs["identity"]["family"] == f"unknown ({'guessed' if guessed else 'clamped'})"
    assert torch.equal(output, before)
    assert found.branch.values.tolist() == ["cond", "uncond"] and found.sizes["layer"] == 3
    same(found, expected.sel(layer=found.layer))
    assert testing.leftovers(pipe) == []


def test_the_real_candidates_fall_back_by_themselves(toy, request):
    toy()
    tiny = testing.tiny_model("toy")
    _, expected = run(tiny)
    request.getfixturevalue("undescribed")
    stranger = toy(TOY.split("class ToyText")[0]).ToyTransformer()
    stranger.load_state_dict(tiny.transformer.state_dict())
    with torch.no_grad(), pytest.warns(ModelWarning, match="no guess of its text side replays"):  # noqa: SIM117
        with dp.trace(stranger, EVERYTHING, concepts=tiny.concepts, progress=False) as trace:
            stranger(**tiny.inputs)
    same(trace.dataset.load(), expected)


def test_a_model_that_does_not_hold_its_image_is_refused(toy, undescribed):
    # The image stream enters the joint attention scaled by the text's first token: no run on other text can hold it.
    changed = TOY.split("class ToyText")[0].replace("self.image(x), ", "self.image(x * p[:, :1]), ")
    model = toy(changed).ToyTransformer()
    inputs = {"hidden_states": torch.randn(1, 4, 3, 5), "encoder_hidden_states": torch.randn(1, 6, 8)}
    with torch.no_grad(), pytest.raises(ModelError, match="replay under no order of text and image"):  # noqa: SIM117
        with dp.trace(model, EVERYTHING, concepts=torch.randn(3, 8), progress=False):
            model(**inputs, timestep=torch.ones(1))
    assert testing.leftovers(model) == []


def test_a_guess_has_no_price_before_it_has_run(stranger, monkeypatch):
    tiny, _ = stranger
    with pytest.raises(ModelError, match="trace it once"):
        anatomy.find(tiny.transformer).heads(tiny.transformer)
