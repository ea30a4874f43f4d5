"""The command ``dit-probe``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "trace", "maps", "info", "plan", "probes"):
        assert command in result.output


def test_probes_are_listed_with_what_they_do():
    result = run("probes")
    assert result.exit_code == 0
    for name in ("ConceptAttention", "CrossAttention", "ValueSpace", "PromptAttention"):
        assert name in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere.zarr"), "nowhere.zarr"),
        (("maps", "nowhere.zarr"), "nowhere.zarr"),
        (("demo", "--prompt", "a fox"), "--concepts"),
        (("demo", "--concepts", "sun,,boat"), "empty concept"),
        (
            ("trace", "no/such/folder", "--prompt", "a", "--concepts", "sun,sky", "--store", "run.zarr"),
            "no/such/folder",
        ),
    ],
)
def test_a_wrong_call_is_one_message_and_no_traceback(arguments, message, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", "")
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_layers_that_are_no_numbers_are_refused(tmp_path: Path, traced: Path):
    result = run("maps", str(traced), "--layers", "last", "--out", str(tmp_path / "maps.html"))
    assert result.exit_code == 2
    assert "10-18" in result.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    """A store made by ``dit-probe demo``, with its page beside it."""
    page = tmp_path_factory.mktemp("demo") / "demo.html"
    result = run("demo", "--steps", "2", "--out", str(page))
    assert result.exit_code == 0, result.output
    assert str(page) in result.output
    return page.with_suffix(".zarr")


def test_demo_writes_one_page_that_needs_no_network(traced: Path):
    text = traced.with_suffix(".html").read_text()
    assert text.count("Plotly.newPlot(") >= 5
    for needed in (
        "sun",
        "boat",
        "water",
        "Three spaces",
        "Layer by step",
        "prefers-color-scheme: dark",
        "data:image/png",
    ):
        assert needed in text
    assert "<script src" not in text
    assert "<link" not in text


def test_demo_leaves_a_store_that_opens(traced: Path):
    ds = dp.open(traced)
    assert ds.sizes["step"] == 2
    assert [str(name) for name in ds["concept"].values] == ["sun", "boat", "water"]


def test_demo_again_replaces_its_own_store(traced: Path):
    page = traced.with_suffix(".html")
    assert run("demo", "--steps", "2", "--out", str(page)).exit_code == 0
    assert dp.open(traced).sizes["sample"] == 1


def test_info_says_what_a_store_holds(traced: Path):
    result = run("info", str(traced))
    assert result.exit_code == 0
    for needed in ("o_x", "image_token", "flux"):
        assert needed in result.output


@pytest.mark.parametrize("space", ["output", "value", "cross"])
def test_maps_draws_each_space_from_the_store(traced: Path, tmp_path: Path, space: str):
    out = tmp_path / "maps.html"
    result = run("maps", str(traced), "--space", space, "--layers", "0-1", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "Plotly.newPlot(" in out.read_text()


def test_trace_keeps_scores_only_when_told(tmp_path: Path):
    store = tmp_path / "run.zarr"
    arguments = ("--prompt", "a sun", "--concepts", "sun,sky", "--steps", "1", "--keep", "scores")
    result = run("trace", "flux-picturebook", *arguments, "--store", str(store), "--image", str(tmp_path / "image.png"))
    assert result.exit_code == 0, result.output
    ds = dp.open(store)
    assert "score_output" in ds
    assert "o_x" not in ds
    assert (tmp_path / "image.png").exists()


def test_plan_prices_a_run():
    result = run(
        *("plan", "flux-picturebook", "--concepts", "sun,sky", "--height", "64", "--width", "64", "--steps", "4")
    )
    assert result.exit_code == 0, result.output
    assert "o_c" in result.output
    assert "before compression" in result.output
