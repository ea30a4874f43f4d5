"""The tutorials' form, and what turns them into pages. They are executed when the manual is built (`make docs`)."""

from __future__ import annotations

import ast
import base64
import importlib
import io
import json
import re
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from PIL import Image

import dit_probe as dp

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tutorials").glob("*.py"))
LIMIT = 60

GOOD = """# %% [markdown]
# # Is it two?
#
# Who *knows*?

# %%
import plotly.graph_objects as go
two = 1 + 1
print("sum", two)

# %% alt="A line from one to two."
go.Figure(go.Scatter(x=[0, 1], y=[1, two]))

# %%
assert two == 2
"""


@pytest.fixture
def docs(monkeypatch):
    """Modules of the folder docs, by name."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    names = ("running", "still", "tutorials")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_tutorial_has_one_question_one_figure_few_lines_and_an_assert(script: Path, docs):
    text = script.read_text()
    cells = docs["running"].cells(text)
    words = [cell.text for cell in cells if cell.kind == "markdown"]
    code = [cell for cell in cells if cell.kind == "code"]
    assert cells[0].kind == "markdown"
    headings = re.findall(r"^#.*", "\n".join(words), re.MULTILINE)
    assert len(headings) == 1 and headings[0].startswith("# ") and headings[0].endswith("?")
    lines = [
        line for cell in code for line in cell.text.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= LIMIT, f"{len(lines)} lines of code"
    drawn = [cell for cell in code if cell.alt]
    assert len(drawn) == 1
    assert isinstance(ast.parse(drawn[0].text).body[-1], ast.Expr)
    assert isinstance(ast.parse(code[-1].text).body[-1], ast.Assert)
    assert code[-1] is cells[-1]
    assert text.count("# %%") == len(cells)  # a mark that is not understood would be lost
    if "demo.load" in text or "load_pipeline" in text:
        assert 'os.environ.get("DIT_PROBE_MODEL", ' in text


def test_every_tutorial_is_in_the_navigation():
    listed = re.findall(r"tutorials/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted({*listed} - {"index"}) == [script.stem for script in SCRIPTS]


def test_a_script_becomes_a_page(docs, tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(GOOD)
    parts = docs["running"].run(script)
    assert [part["kind"] for part in parts] == ["markdown", "code", "code", "code"]
    assert parts[1]["output"] == "sum 2\n"
    page = docs["tutorials"].page(script, parts)
    assert "# Is it two?\n" in page and "Who *knows*?" in page and "sum 2" in page
    assert '<img src="two.svg" alt="A line from one to two.">' in page
    shown = json.loads(re.search(r'json">(.*)</script>', page)[1])
    assert shown["data"][0]["type"] == "scatter"


def test_what_is_kept_is_used_until_something_changes(docs, tmp_path: Path, monkeypatch):
    hook, script = docs["tutorials"], tmp_path / "two.py"
    monkeypatch.setattr(hook, "KEPT", tmp_path / "kept")
    script.write_text('# %%\nprint("one")\n')
    assert hook.result(script, "state")[0]["output"] == "one\n"
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text('[{"output": "from what is kept"}]')
    assert hook.result(script, "state")[0]["output"] == "from what is kept"
    assert hook.result(script, "another state")[0]["output"] == "one\n"
    assert len([*(tmp_path / "kept").iterdir()]) == 1


def test_a_tutorial_that_fails_fails_the_build(docs, tmp_path: Path, monkeypatch):
    from mkdocs.exceptions import PluginError

    monkeypatch.setattr(docs["tutorials"], "KEPT", tmp_path / "kept")
    script = tmp_path / "three.py"
    script.write_text("# %% [markdown]\n# # Is it?\n\n# %%\none = 1\n\n# %%\nassert one == 3\n")
    with pytest.raises(PluginError, match=r"three\.py failed:(.|\n)*line 8(.|\n)*assert one == 3(.|\n)*AssertionError"):
        docs["tutorials"].result(script, "state")
    assert not (tmp_path / "kept").exists()


def figures() -> dict[str, go.Figure]:
    rng = np.random.default_rng(0)
    maps = xr.DataArray(rng.random((2, 3, 4, 4)), dims=("concept", "frame", "y", "x"))
    image = np.full((16, 16, 3), 200, "uint8")
    curve = xr.DataArray(rng.random((3, 5, 8)), dims=("order", "share", "sample"), name="change")
    table = xr.DataArray([[0.5, np.nan], [0.7, 0.1]], dims=("layer", "step"), name="AUROC")
    log = go.Figure(go.Scatter(x=[1, 2], y=[1e-6, 1.0], name="a & b"), {"yaxis": {"type": "log"}})
    dots = go.Scatter(x=[0.2, 0.9], y=["one", "two"], error_x={"array": [0.1, 0.05]}, mode="markers")
    return {
        "overlay": dp.figures.overlay(image, maps[:, 0]),
        "own scales": dp.figures.overlay(image, maps[:, 0], shared=False),
        "spaces": dp.figures.spaces(image, {"output": maps[:, 0], "a<b": maps[:, 1]}),
        "small multiples": dp.figures.small_multiples(maps.rename(frame="layer")),
        "video": dp.figures.video(None, maps),
        "ablation": dp.figures.ablation(table),
        "curves": dp.figures.curves(curve.assign_coords(share=np.linspace(0, 1, 5))),
        "log": log,
        "dots": go.Figure(dots),
    }


@pytest.mark.parametrize("name", figures())
def test_a_figure_is_drawn_without_a_browser(name: str, docs):
    figure = figures()[name]
    root = tree.fromstring(docs["still"].svg(figure))
    space = "{http://www.w3.org/2000/svg}"
    texts = " ".join("".join(text.itertext()) for text in root.iter(f"{space}text"))
    for note in figure.layout.annotations:
        assert re.sub("<[^>]+>", "", note.text).replace("&lt;", "<") in texts
    if not figure.frames:
        assert float(root.get("width")) == (figure.layout.width or 700)
    pictures = [*root.iter(f"{space}image")]
    expected = [trace for trace in figure.data if trace.type in ("heatmap", "image")]
    assert len(pictures) >= len(expected)
    for picture in pictures:
        assert float(picture.get("x")) >= 0 and float(picture.get("width")) > 0


def test_dots_and_patches_are_where_their_values_say(docs):
    svg, space = docs["still"].svg, "{http://www.w3.org/2000/svg}"
    layout = {"width": 200, "height": 200, "margin": {"l": 50, "r": 50, "t": 50, "b": 50}}
    axes = {"xaxis": {"range": [0, 10]}, "yaxis": {"range": [0, 1]}}
    dot = tree.fromstring(svg(go.Figure(go.Scatter(x=[2.5], y=[0.25], mode="markers"), layout | axes)))
    (circle,) = dot.iter(f"{space}circle")
    assert (float(circle.get("cx")), float(circle.get("cy"))) == (75, 125)
    maps = xr.DataArray([[[0.0, 1.0]], [[1.0, 0.0]]], dims=("concept", "y", "x"))
    found = dp.figures.overlay(None, maps)
    first = next(tree.fromstring(svg(found)).iter(f"{space}image"))
    with Image.open(io.BytesIO(base64.b64decode(first.get("href").split(",")[1]))) as picture:
        assert [picture.getpixel((x, 0))[:3] for x in (0, 1)] == [(68, 1, 84), (253, 231, 37)]  # ends of viridis
