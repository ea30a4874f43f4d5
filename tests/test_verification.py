"""`verify` on models that are right and wrong; the table of models. Changed ones are in test_robustness_models.py."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe import anatomy, cli, testing, verification
from dit_probe.anatomy import coverage, refused
from dit_probe.errors import ModelError

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted({family for family, _ in testing.cases()})


EVERY_FAMILY = [(family, torch.float32) for family in FAMILIES]
# Two streams, shared weights, masks, no concepts; every family's oracles run in bfloat16 among the conformance tests.
IN_BFLOAT16 = [(family, torch.bfloat16) for family in ("flux", "cogvideox", "hunyuan-video", "omnigen")]


@pytest.mark.parametrize(("family", "dtype"), EVERY_FAMILY + IN_BFLOAT16)
def test_every_check_holds_in_every_layer(family, dtype):
    tiny = testing.tiny_model(family, dtype=dtype)
    found = dp.verify(tiny.transformer, inputs=tiny.inputs, concepts=tiny.concepts)
    assert found.ok, str(found)
    blocks = anatomy.find(tiny.transformer).blocks(tiny.transformer)
    assert [layer.path for layer in found.layers] == [block.path for block in blocks]
    replayed, concepts = {"replay_o", "replay_p"}, {"clamped_o", "clamped_c", "equation"}
    checks = replayed if anatomy.find(tiny.transformer).no_concepts else replayed | concepts
    for layer, block in zip(found.layers, blocks, strict=True):
        assert layer.differences.keys() == checks - (set() if block.text_output else {"replay_p", "clamped_c"})
    assert testing.leftovers(tiny.transformer) == []


def test_a_pipeline_is_checked_on_its_own_prompt(pipelines):
    pipe = pipelines("sd3")
    found = dp.verify(pipe, height=16, width=16, prompt="a sun")
    assert found.ok
    table = str(found)
    assert "every check holds" in table and table.count(" ok") == len(found.layers)
    assert testing.leftovers(pipe) == []


def test_a_wrong_anatomy_is_shown_layer_by_layer(monkeypatch):
    tiny = testing.tiny_model("flux")
    family = type(anatomy.find(tiny.transformer))
    blocks = family.blocks

    class NoOutput(type(blocks(family(), tiny.transformer)[0].text)):
        def update(self, c, o, projection, context):
            return super().update(c, torch.zeros_like(o), projection, context)

    def one_wrong(self, model):
        right = blocks(self, model)
        return (*right[:1], dataclasses.replace(right[1], text=NoOutput(clips_half=True)), *right[2:])

    monkeypatch.setattr(family, "blocks", one_wrong)
    found = dp.verify(tiny.transformer, inputs=tiny.inputs)
    assert not found.ok
    assert {failure.split(":")[0] for failure in found.failures} == {"transformer_blocks.1"}
    assert str(found).count("WRONG") == 1


def test_nan_is_a_failure():
    layer = verification.Layer(0, "joint", "blocks.0", {"replay_o": float("nan")})
    found = verification.Verification("flux", "Model", "float32", 1e-5, True, (layer,))
    assert not found.ok and "WRONG" in str(found)


def test_output_that_changes_is_a_failure():
    layer = verification.Layer(0, "joint", "blocks.0", {"replay_o": 0.0})
    found = verification.Verification("flux", "Model", "float32", 1e-5, False, (layer,))
    assert found.failures == ["the output differs when it is traced"]


def test_a_bare_transformer_needs_inputs():
    with pytest.raises(ModelError, match="inputs of one forward"):
        dp.verify(testing.tiny_model("flux").transformer)


# --- from a shell


def test_verify_from_a_shell():
    result = CliRunner().invoke(cli.app, ["verify", "flux-picturebook", "--height", "64", "--width", "64"])
    assert result.exit_code == 0, result.output
    assert "every check holds" in result.output and "transformer_blocks.5" in result.output
    strict = ["verify", "flux-picturebook", "--height", "64", "--width", "64", "--tolerance", "1e-12"]
    result = CliRunner().invoke(cli.app, strict)
    assert result.exit_code == 1
    assert "differs by" in result.output


def test_a_saved_pipeline_is_verified_at_a_size_that_it_has(tmp_path):
    """The table of positions ends at the model's own 64 pixels."""
    dp.demo.load("sd35-picturebook").save_pretrained(tmp_path)
    result = CliRunner().invoke(cli.app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "every check holds" in result.output


def test_models_from_a_shell():
    result = CliRunner().invoke(cli.app, ["models"])
    assert result.exit_code == 0
    for family, found in anatomy.families().items():
        assert family in result.output
        assert all(name in result.output for name in found.classes)
    (flux,) = (row for row in result.output.splitlines() if "FluxTransformer2DModel" in row)
    figures = [f"{coverage.of('flux').maxima[name]:.1g}" for name in verification.CHECKS]
    assert [cell.strip() for cell in flux.split("│")[5:-2]] == [*figures, "equal"]
    assert all(f"{name}: {meaning}" in result.output for name, meaning in verification.CHECKS.items())
    for group in refused.GROUPS:
        assert group.short in result.output
        assert all(name in result.output for name in group.classes)


def test_a_family_that_was_just_added_is_not_measured_yet(monkeypatch):
    known = anatomy.families()
    monkeypatch.setattr(anatomy, "families", lambda: {"new": known["flux"]})
    result = CliRunner().invoke(cli.app, ["models"])
    assert "new " in result.output and "not measured yet" in result.output
    script = conformance()
    monkeypatch.setattr(script, "families", lambda: {"new": known["flux"]})
    assert script.markdown({}).splitlines()[2].startswith("| **new**<br>`FluxTransformer2DModel` | not measured yet |")


# --- the table of models


def conformance():
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "benchmarks" / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", sorted({*FAMILIES} & {*coverage._read()}))
def test_what_was_measured_covers_every_variant(family):
    found = coverage.of(family)
    assert list(found.variants) == [variant for name, variant in testing.cases() if name == family]
    assert found.maxima.keys() >= {"replay_o", "replay_p"}
    assert all(value <= 1e-5 for value in found.maxima.values()) and found.output_equal


def test_the_page_shows_what_was_measured():
    """A new family takes one file: until it is measured, it stands neither in the figures nor, perhaps, on the page."""
    script, page = conformance(), (ROOT / "docs" / "models.md").read_text().split(conformance().MARK)[1]
    shown, expected = (
        [row for row in text.strip().splitlines() if script.NOT_MEASURED not in row]
        for text in (page, script.markdown(coverage._read()))
    )
    assert shown == expected
    assert len(expected) == 2 + len(coverage._read()) > 30
