"""The command ``dit-probe``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe import testing
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


# --- Pipelines that somebody saved

SIZE = {
    "sd3": ("--height", "16", "--width", "16"),
    "cogvideox": ("--height", "32", "--width", "48", "--frames", "9"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a family's tiny pipeline."""
    made = {}

    def directory(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            testing.tiny_pipeline(family).save_pretrained(made[family])
        return made[family]

    return directory


def trace(directory: str, family: str, store: Path, *options: str):
    arguments = ("--prompt", "a sun", "--concepts", "sun,sky,boat", "--steps", "1", "--store", str(store))
    return run("trace", directory, *arguments, *SIZE[family], *options)


@pytest.mark.parametrize("family", SIZE)
def test_a_saved_pipeline_is_traced_described_and_drawn(family, saved, tmp_path: Path):
    store, page = tmp_path / "run.zarr", tmp_path / "maps.html"
    result = trace(saved(family), family, store)
    assert result.exit_code == 0, result.output
    result = run("info", str(store))
    assert result.exit_code == 0, result.output
    for needed in (family, "float32", "1 complete", "o_x", "concept 3"):
        assert needed in result.output
    result = run("maps", str(store), "--layers", "1-2", "--out", str(page))
    assert result.exit_code == 0, result.output
    assert all(word in page.read_text() for word in ("sun", "sky", "boat"))


@pytest.mark.parametrize("family", SIZE)
def test_a_saved_pipeline_is_verified(family, saved):
    result = run("verify", saved(family), *SIZE[family])
    assert result.exit_code == 0, result.output
    assert f"as {family}, float32" in result.output and "every check holds" in result.output


def test_a_store_is_appended_to_only_when_told(saved, tmp_path: Path):
    store = tmp_path / "run.zarr"
    assert trace(saved("sd3"), "sd3", store).exit_code == 0
    again = trace(saved("sd3"), "sd3", store)
    assert again.exit_code == 2 and dp.open(store).sizes["sample"] == 1
    result = trace(saved("sd3"), "sd3", store, "--append", "--seed", "1")
    assert result.exit_code == 0, result.output
    assert dp.open(store).seed.values.tolist() == [0, 1]


def test_a_store_is_replaced_by_one_of_another_precision(saved, tmp_path: Path):
    store = tmp_path / "run.zarr"
    assert trace(saved("sd3"), "sd3", store).exit_code == 0
    refused = trace(saved("sd3"), "sd3", store, "--append", "--dtype", "bfloat16")
    assert refused.exit_code == 2 and "bfloat16" in refused.stderr
    result = trace(saved("sd3"), "sd3", store, "--overwrite", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    ds = dp.open(store)
    assert ds.sizes["sample"] == 1 and ds.attrs["identity"]["dtype"] == "bfloat16"


def test_plan_prices_a_run():
    result = run(
        *("plan", "flux-picturebook", "--concepts", "sun,sky", "--height", "64", "--width", "64", "--steps", "4")
    )
    assert result.exit_code == 0, result.output
    assert "o_c" in result.output
    assert "before compression" in result.output
