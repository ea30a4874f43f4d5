"""Manners of every command: an example that parses, JSON for scripts, exit status, silence in a pipe, completion."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe.cli import app
from dit_probe.cli.shared import EXAMPLES, STATUS, complete_model, print_json

GROUP = typer.main.get_command(app)
SIZE = ("--height", "64", "--width", "64")


def run(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_there_is_one_verb_a_job():
    jobs = "demo trace encode maps info verify models evaluate reproduce explore report plan"
    assert {*jobs.split()} <= {*GROUP.commands}


@pytest.mark.parametrize("name", GROUP.commands)
def test_help_ends_with_an_example_that_parses(name: str):
    shown = " ".join(run(name, "--help").output.split())
    assert f"Example: {EXAMPLES[name]}" in shown
    program, verb, *arguments = shlex.split(EXAMPLES[name])
    assert (program, verb) == ("dit-probe", name)
    context = GROUP.commands[name].make_context(name, list(arguments))  # refuses unknown options and missing ones
    assert context.params


def test_help_says_what_the_exit_status_means():
    assert STATUS in " ".join(run("--help").output.split())


def test_a_wrong_option_is_wrong_use():
    assert run("info", "--nothing").exit_code == 2


def test_an_interrupted_command_says_so_by_its_status(monkeypatch, tmp_path: Path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dp.store, "info", interrupt)
    assert run("info", tmp_path).exit_code == 130


def test_models_are_completed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "model_index.json").touch()
    assert complete_model("sd35") == ["sd35-picturebook"]
    assert complete_model("sma") == ["small"]
    assert complete_model("") == dp.demo.names()


def test_json_has_no_numpy_and_no_nan(capsys):
    print_json({"a": np.float32(0.5), "b": (float("nan"), np.int64(2))})
    assert json.loads(capsys.readouterr().out) == {"a": 0.5, "b": [None, 2]}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two pictures, encoded."""
    folder = tmp_path_factory.mktemp("encoded")
    for name, seed in (("one", 3), ("two", 4)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 80, 3), "uint8")).save(folder / f"{name}.png")
    pictures = (folder / "one.png", folder / "two.png")
    options = ("--concepts", "sun,boat", "--store", folder / "run.zarr", "--size", 64, "--keep", "scores")
    result = run("encode", "flux-picturebook", *pictures, *options, "--timestep", 250)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"store  {folder / 'run.zarr'}\n"
    assert "%|" not in result.stderr  # no bar in a pipe
    return folder / "run.zarr"


def test_encode_makes_a_sample_a_picture(store: Path):
    ds = dp.open(store)
    assert ds.sizes["sample"] == 2 and ds.done.all()
    assert ds.timestep.values.tolist() == [250] and ds.prompt.values.tolist() == ["", ""]
    assert not ds.score_output[0].equals(ds.score_output[1])
    with Image.open(store.parent / "one.png") as picture:
        assert np.abs(np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)) - ds.image[0].values).max() <= 1


def test_encode_names_a_picture_that_is_not_there(tmp_path: Path):
    result = run("encode", "flux-picturebook", tmp_path / "no.png", "--concepts", "a,b", "--store", tmp_path / "x.zarr")
    assert result.exit_code == 2 and "no.png" in result.stderr.replace("\n", "")
    assert not list(tmp_path.iterdir())


def test_info_as_json(store: Path):
    found = json.loads(run("info", store, "--json", "--check").stdout)
    assert found["done"] == [0, 1] and found["damaged"] == []
    assert found["variables"]["score_output"]["dims"][-1] == "image_token"


def test_info_ends_with_1_where_a_record_is_damaged(store: Path, tmp_path: Path):
    chunk = min((store / "score_output").glob("c.*"))
    whole = chunk.read_bytes()
    try:
        chunk.write_bytes(whole[:10])
        result = run("info", store, "--check", "--json")
    finally:
        chunk.write_bytes(whole)
    assert result.exit_code == 1 and "score_output" in result.stderr
    assert json.loads(result.stdout)["damaged"]


def test_plan_as_json():
    result = run("plan", "flux-picturebook", "--concepts", "sun,sky", *SIZE, "--steps", "4", "--json")
    found = json.loads(result.stdout)
    assert found["bytes"] == sum(variable["bytes"] for variable in found["variables"].values())
    assert found["variables"]["o_c"]["steps"] == [0, 1, 2, 3] and found["sizes"]["concept"] == 2


def test_verify_as_json():
    found = json.loads(run("verify", "flux-picturebook", *SIZE, "--json").stdout)
    assert found["ok"] and found["failures"] == [] and len(found["layers"]) > 1


def test_verify_ends_with_1_where_a_check_fails():
    result = run("verify", "flux-picturebook", *SIZE, "--json", "--tolerance", "0")
    assert result.exit_code == 1 and "differs by" in result.stderr
    assert not json.loads(result.stdout)["ok"]


def test_models_and_probes_as_json():
    found = json.loads(run("models", "--json").stdout)
    assert "FluxTransformer2DModel" in found["families"]["flux"]["models"]
    assert any(name.startswith("Wan") for name in found["refused"])
    assert "ConceptAttention" in [row["probe"] for row in json.loads(run("probes", "--json").stdout)]
