"""The page of ``dit-probe report``: what is in it, in headless Chromium with and without JavaScript."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import explore_cases as cases
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe.cli import app
from dit_probe.errors import MapError
from dit_probe.explore import page as written
from dit_probe.explore import single_file

ROWS, COLUMNS = -(-cases.ROWS // 3), -(-cases.COLUMNS // 3)
"""Of maps reduced to size=2: means over 3 x 3 patches."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return cases.trace(tmp_path_factory.mktemp("store") / "run.zarr")


@pytest.fixture(scope="module")
def chromium():
    with cases.browser() as opened:
        yield opened


def data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found
    return json.loads(found.group(1))


def unpacked(packed: dict[str, Any], *rest: int) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(packed["values"]), "<u2").astype(float)
    values = np.where(levels == 65535, np.nan, packed["low"] + levels / 65534 * (packed["high"] - packed["low"]))
    return values.reshape(len(packed["layers"]) + 1, len(packed["steps"]) + 1, *rest)


def reduced(maps: Any) -> np.ndarray:
    """Means over 3 x 3 patches, fewer at the far edges."""
    rows = [np.mean(maps[..., y : y + 3, :], axis=-2, keepdims=True) for y in range(0, cases.ROWS, 3)]
    rows = np.concatenate(rows, -2)
    return np.concatenate([rows[..., x : x + 3].mean(-1, keepdims=True) for x in range(0, cases.COLUMNS, 3)], -1)


def test_the_page_holds_the_maps_of_the_size_that_it_says(path):
    text, ds = written(path, size=2), dp.open(path)
    found = data(text)
    assert "Maps of 2 × 2 patches, means over 3 × 3 of the 4 × 6 recorded; all 4 layers; all 3 steps; 2 samples" in text
    for sample, space, softmax in ((0, "output", "each"), (1, "value", "each"), (1, "cross", "none")):
        option = None if softmax == "none" else softmax
        values = unpacked(found["runs"][sample]["maps"][""][space][softmax], 3, 1, ROWS, COLUMNS)[:, :, :, 0]
        step = (values.max() - values.min()) / 65534
        mean = reduced(dp.maps.saliency(ds, space, softmax=option)[sample].values)
        np.testing.assert_allclose(values[0, 0], mean, atol=step)
        cell = reduced(dp.maps.saliency(ds, space, softmax=option, layers=3, steps=[2])[sample].values)
        np.testing.assert_allclose(values[3, 3], cell, atol=step)
        layer = reduced(dp.maps.saliency(ds, space, softmax=option, layers=[4])[sample].values)
        np.testing.assert_allclose(values[4, 0], layer, atol=step)


def test_many_layers_and_samples_are_thinned_and_the_page_says_so(path, monkeypatch):
    monkeypatch.setitem(single_file.SHOWN, "layer", 2)
    text = written(path, samples=[1])
    assert data(text)["layers"] == [0, 4] and "2 of 4 layers to choose from" in text and "1 of 2 samples" in text
    ds = dp.open(path)
    values = unpacked(data(text)["runs"][0]["maps"][""]["output"]["each"], 3, 1, cases.ROWS, cases.COLUMNS)
    np.testing.assert_allclose(values[0, 0, :, 0], dp.maps.saliency(ds)[1], atol=1e-4), "the mean is over all layers"


def test_what_was_not_recorded_is_not_a_number(path):
    ds = dp.open(path).isel(sample=[0]).load()
    ds["o_x"][0, 1, 2] = np.nan
    values = unpacked(data(written(ds))["runs"][0]["maps"][""]["output"]["each"], 3, cases.ROWS * cases.COLUMNS)
    assert np.isnan(values[0, 0]).all() and np.isnan(values[3, 2]).all() and np.isfinite(values[3, 1]).all()


def test_nothing_that_is_named_leaves_its_place(path):
    text = written(path)
    assert "<script>window" not in text and "<img src=x" not in text
    assert text.count("<script") == 2 and html.escape(cases.EVIL) in text
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text


def test_wrong_calls_are_refused(path):
    with pytest.raises(MapError, match="no sample 5: run.zarr has 2"):
        written(path, samples=[5])
    with pytest.raises(MapError, match="at least one patch a side"):
        written(path, size=0)


def test_the_command_writes_it(path, tmp_path: Path):
    mask = np.zeros((32, 48), np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    one = cases.trace(tmp_path / "one.zarr", samples=1)
    arguments = ["report", str(one), "-o", str(tmp_path / "page.html"), "--size", "3"]
    result = CliRunner().invoke(app, [*arguments, "--mask", f"boat={tmp_path / 'mask.png'}"])
    assert result.exit_code == 0, result.output
    assert "page.html" in result.output and "KiB" in result.output
    found = data((tmp_path / "page.html").read_text())["runs"][0]["maps"][""]["output"]["each"]["metrics"]
    expected = dp.explore.with_masks(dp.open(one), {"boat": mask > 0})
    maps = dp.maps.saliency(expected)[0].sel(concept="boat", drop=True)
    masks = expected.mask[0, 1].drop_vars("concept").rename(pixel_y="y", pixel_x="x")
    assert found[0]["auroc"] == [None, pytest.approx(float(dp.metrics.auroc(maps.drop_vars(["y", "x"]), masks))), None]
    for option, value, words in (("--mask", "boat", "CONCEPT=FILE"), ("--samples", "all", "10-18")):
        result = CliRunner().invoke(app, [*arguments, option, value])
        assert result.exit_code == 2 and words in result.stderr


def opened(chromium, text: str, folder: Path, **options: Any) -> tuple[Any, cases.Heard]:
    (folder / "page.html").write_text(text, encoding="utf-8")
    page = chromium.new_page(**options)
    heard = cases.listen(page)
    page.goto(f"file://{folder / 'page.html'}")
    return page, heard


def cells(page: Any, column: int) -> list[str]:
    return page.locator(f"#live section:first-child tbody td:nth-child({column})").all_inner_texts()


def same(texts: list[str], expected: Any, step: float = 1e-4) -> None:
    np.testing.assert_allclose([float(text) for text in texts], expected, atol=step, rtol=1e-3)


def test_every_control_of_the_page_changes_what_it_says(path, chromium, tmp_path):
    page, heard = opened(chromium, written(path), tmp_path)
    ds = dp.open(path)
    maps = dp.maps.saliency
    highest = 3
    same(cells(page, highest), maps(ds)[0].max(("y", "x")))
    page.locator("#live canvas").nth(2).click(position={"x": 196 * 2.5 / cases.COLUMNS, "y": 131 * 1.5 / cases.ROWS})
    assert (page.input_value("#row"), page.input_value("#column")) == ("1", "2")
    same(cells(page, 2), maps(ds)[0, :, 1, 2])
    # The third layer (label 3) and the second step of the first concept's course.
    page.locator("#live .courses canvas").first.click(position={"x": 2.5 * 24, "y": 1.5 * 18})
    assert (page.input_value("#layer"), page.input_value("#step")) == ("3", "1")
    same(cells(page, 2), maps(ds, layers=3, steps=1)[0, :, 1, 2])
    page.select_option("#step", "mean")
    same(cells(page, 2), maps(ds, layers=3)[0, :, 1, 2])
    page.select_option("#layer", "mean")
    page.select_option("#space", "value")
    same(cells(page, 2), maps(ds, "value")[0, :, 1, 2])
    page.select_option("#softmax", "none")
    same(cells(page, 2), maps(ds, "value", softmax=None)[0, :, 1, 2], 1e-3)
    page.select_option("#run", "1")
    same(cells(page, 2), maps(ds, "value", softmax=None)[1, :, 1, 2], 1e-3)
    page.fill("#column", "5")
    same(cells(page, 2), maps(ds, "value", softmax=None)[1, :, 1, 5], 1e-3)
    page.locator("#concepts input").nth(1).uncheck()
    same(cells(page, 2), maps(ds, "value", softmax=None)[1, [0, 2], 1, 5], 1e-3)
    page.select_option("#beside", "0 cross")
    second = page.locator("#live section:nth-child(2) tbody td:nth-child(2)").all_inner_texts()
    same(second, maps(ds, "cross", softmax=None)[0, [0, 2], 1, 5], 1e-3)
    assert cases.EVIL in page.locator("#live section:first-child tbody th").all_inner_texts()
    assert page.evaluate("window.stolen") is None and page.locator("img[src='x']").count() == 0
    assert heard.complaints == [] and heard.foreign == []
    page.close()


def test_a_video_has_frames_and_branches(chromium, tmp_path):
    ds = dp.open(cases.trace(tmp_path / "video.zarr", samples=1, frames=3, branch=True))
    page, heard = opened(chromium, written(ds), tmp_path)
    maps = dp.maps.saliency(ds)[0].max(("y", "x"))
    same(cells(page, 3), maps.sel(branch="cond").isel(frame=0))
    page.select_option("#branch", "uncond")
    page.press("#frame", "ArrowRight")
    same(cells(page, 3), maps.sel(branch="uncond").isel(frame=1))
    assert heard.complaints == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_everybody_can_read_it(path, chromium, tmp_path, width, scheme):
    size = {"width": width, "height": 900}
    page, _ = opened(chromium, written(path), tmp_path, viewport=size, color_scheme=scheme)
    if width == 390:
        page.locator("summary").press("Enter")
    page.fill("#row", "0")
    page.fill("#column", "0")
    assert page.locator("#live .courses canvas").count() == 3
    assert cases.barriers(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_it_reads_without_javascript(path, chromium, tmp_path):
    page, heard = opened(chromium, written(path), tmp_path, java_script_enabled=False)
    assert not page.locator("#choose").is_visible() and not page.locator("#theme").is_visible()
    shown = page.locator("#still img.map")
    assert shown.count() == 2 * 3 * 3, "samples, spaces, concepts"
    top = dp.maps.saliency(dp.open(path))[0, 0]
    row, column = np.unravel_index(top.values.argmax(), top.shape)
    assert f"highest in row {row}, column {column}" in (shown.first.get_attribute("alt") or "")
    assert all(shown.nth(index).is_visible() for index in range(3)) and heard.complaints == []
    page.close()
