"""What rows of the tables are, and what they cost: hosts by entry point, seconds and bytes by measurement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_probe as dp
from dit_probe import methods, reproduce
from dit_probe.methods import Baseline, Host
from dit_probe.protocols import EvaluationError
from dit_probe.reproduce import Setting, facts, printed, source
from dit_probe.testing import tiny_pipeline
from tests.baselines_vit_cases import vit

PICTURE = np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3)
WORDS = ["sun", "boat"]


def linears(depth: int) -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(depth)))


def test_memory_is_that_of_the_tensors_that_live_at_once():
    x, shallow, deep = torch.randn(32, 64), linears(2), linears(8)

    def backward(model: torch.nn.Module) -> None:
        model(x).sum().backward()
        model.zero_grad()

    one = x.nbytes
    with torch.no_grad():
        found = methods.costs({"shallow": lambda: shallow(x), "deep": lambda: deep(x), "view": lambda: x[1:].T})
    assert found["shallow"].memory == found["deep"].memory == 2 * one  # a layer's input and output
    assert found["view"].memory == 0
    grown = [methods.costs({"it": lambda model=model: backward(model)})["it"].memory for model in (shallow, deep)]
    assert grown[1] - grown[0] == 6 * (64 * 64 + 64) * 4  # gradients of six layers more; inputs kept for them are gone


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert all(cost.seconds > 0 for cost in methods.costs(calls, repeats=2).values())
    assert order[-4:] == ["a", "b", "a", "b"]


def test_a_cost_in_units_of_another():
    assert methods.Cost(6.0, 40) / methods.Cost(2.0, 10) == (3.0, 4.0)
    assert np.isnan((methods.Cost(6.0, 40) / methods.Cost(2.0, 0))[1])


def test_every_printed_row_of_another_method_has_a_class_that_says_what_it_is():
    for row in printed.methods("table2", "imagenet"):
        method, _, architecture = row.partition(" | ")
        if architecture.endswith("DiT"):
            continue  # of the model that is studied itself
        said = facts.declared(architecture, method)
        assert said is not None, row
        assert said[0] == architecture
        assert said[1] == ("yes" if method.endswith(" SA") or method in ("Rollout", "ViT Attention") else "no")
    assert facts.declared("CLIP ViT", "GradCAM") == ("CLIP ViT", "no", "1", "1 a word", "", "")


@pytest.mark.parametrize("name", sorted(methods.hosts()))
def test_methods_of_a_host_are_baselines(name: str):
    host = methods.hosts()[name]
    assert host.methods
    assert all(issubclass(kind, Baseline) for kind in host.kinds().values())


def test_a_plain_pass_is_the_models_own():
    model = vit("CLIPModel")
    pixels = model.pixels(PICTURE)
    with torch.no_grad():
        expected = model.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    method = methods.hosts()["clip"].rows(model)["Rollout"]
    assert torch.equal(method.forward(PICTURE).last_hidden_state, expected)  # type: ignore[attr-defined]


def test_a_row_is_measured_once_and_never_on_a_kept_pass(tmp_path: Path):
    pipe, seen = tiny_pipeline("flux"), list[object]()
    passes = methods.Passes(pipe, size=16, max_sequence_length=16)
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(module))
    rows = {"output": passes.method("output")}
    found = facts.measured(rows, PICTURE, WORDS, "Flux DiT", tmp_path / "facts.json")
    assert len(seen) == 2 * 5  # row and plain pass: to warm up, to weigh, three times by the clock
    assert found["output"][:4] == ("Flux DiT", "no", "1", "0")
    assert all(cell.endswith("x") for cell in found["output"][4:])
    again = facts.measured(rows, PICTURE, WORDS, "Flux DiT", tmp_path / "facts.json")
    assert again == found and len(seen) == 2 * 5
    assert [*json.loads((tmp_path / "facts.json").read_text())] == ["output"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    pipe = tiny_pipeline("flux")
    pipe.default_sample_size = 8
    pictures = [[source("picture-book", several=several, count=2)] for several in (False, True)]
    folder = tmp_path_factory.mktemp("study")
    others = {"clip": vit("CLIPModel"), "dino": vit("ViTModel")}
    return Setting(pipe, *pictures, folder, progress=False, baselines=others, text={"max_sequence_length": 40})


def test_rows_on_other_models_stand_beside_what_is_printed(setting: Setting):
    text = reproduce.reproduce("table2", setting).markdown()
    lines = {
        line.split("|")[1].strip(" \\"): line for line in text.replace(" \\| ", " on ").splitlines() if "|" in line
    }
    assert "51.09" in lines["LRP on clip"] and "1 a word" in lines["LRP on clip"]
    assert "81.97" in lines["DINO SA on dino"] and " yes " in lines["DINO SA on dino"]
    assert "not measured" in lines["iBOT SA on iBOT ViT"] and " yes " in lines["iBOT SA on iBOT ViT"]
    assert "Flux DiT" in lines["ConceptAttention"]


def test_one_map_for_all_words_has_no_row_where_words_compete(setting: Setting):
    rows = reproduce.reproduce("table3", setting).panels[0].rows
    assert "TextSpan | clip" in rows and "SCLIP | clip" in rows
    assert not {"Rollout | clip", "ViT Attention | clip", "DINO SA | dino"} & {*rows}
    blind = setting.others()["DINO SA | dino"]
    for protocol, refused in (("paper_multiclass", True), ("native", False)):
        run = lambda protocol=protocol: dp.evaluate(  # noqa: E731
            {"DINO SA": blind}, setting.several[0].reported, protocol, limit=1, progress=False
        )
        if refused:
            with pytest.raises(EvaluationError, match="DINO SA: one map for all words"):
                run()
        else:
            assert np.isfinite(run().auroc).all()


def test_a_host_that_is_not_known_is_refused(setting: Setting):
    other = Setting(setting.pipe, setting.single, (), setting.folder, baselines={"clip": vit("CLIPModel"), "sam": None})
    with pytest.raises(EvaluationError, match="no methods run on 'sam': there are clip"):
        other.others()


def test_a_host_gives_a_row_a_method():
    host = Host("CLIP ViT", None, {"noise": lambda model: model})
    assert host.rows(3) == {"noise": 3}
