"""The explorer in headless Chromium: every control, clicks both ways, narrow and wide, and what axe says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import explore_cases as cases
import numpy as np
import pytest

import dit_probe as dp

pytest.importorskip("dash", reason="needs Dash: pip install 'dit-probe[explore]'")

Z = """(graph) => document.querySelector(`#${graph} .js-plotly-plot`)._fullData
    .filter((trace) => trace.type === "heatmap").map((trace) => Array.from(trace.z, (row) => Array.from(row)))"""


@pytest.fixture(scope="module")
def chromium():
    with cases.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    words = ("boat", "moon", "sun")
    return {
        "run": cases.trace(folder / "run.zarr"),
        "other": cases.trace(folder / "other.zarr", words=words, seed=1),
        "video": cases.trace(folder / "video.zarr", samples=1, frames=3, branch=True),
    }


@pytest.fixture(scope="module")
def two(stores):
    """The address of an explorer on two runs."""
    with cases.served(dp.explore.app(stores["run"], stores["other"])) as address:
        yield address


@pytest.fixture(scope="module")
def context(chromium):
    """One context, in which pages share what was loaded."""
    return chromium.new_context(permissions=["clipboard-read", "clipboard-write"])


@pytest.fixture
def opened(context):
    """Opens an address and waits for its maps; ends with no complaint, and nobody else asked."""
    pages = []

    def open_page(address: str, width: int = 1280, scheme: Any = "light") -> Any:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.set_default_timeout(15_000)
        pages.append((page, cases.listen(page)))
        page.goto(address)
        page.wait_for_selector("#first-maps .heatmaplayer image", state="attached")
        return page

    yield open_page
    for page, heard in pages:
        assert heard.complaints == [] and heard.foreign == []
        page.close()


def values(page: Any, graph: str) -> np.ndarray:
    return np.array(page.evaluate(Z, graph), dtype=float)


def shows(page: Any, graph: str, expected: Any) -> None:
    """Wait until a figure has these values."""
    expected = np.asarray(expected)

    def right() -> bool:
        found = values(page, graph)
        return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-6)

    until(right, lambda: f"{graph} shows {values(page, graph)}, expected {expected}; {page.inner_text('#note')}")


def until(true: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.03)


def tick(page: Any, control: str, text: str) -> None:
    page.locator(f"#{control} label").filter(has_text=text).first.locator("input").click()


def fill(page: Any, control: str, value: object) -> None:
    page.fill(f"#{control}", str(value))
    page.press(f"#{control}", "Tab")


def slide(page: Any, control: str, handle: int, key: str) -> None:
    page.locator(f"#{control}").locator("xpath=ancestor::fieldset").locator("[role=slider]").nth(handle).press(key)


def test_every_control_changes_what_it_says(opened, two, stores):
    page, ds, other = opened(two), dp.open(stores["run"]), dp.open(stores["other"])
    maps = dp.maps.saliency
    every = ["first-maps", "second-maps"]
    shows(page, every[0], maps(ds)[0])
    shows(page, every[1], maps(other)[0].isel(concept=[0, 2])), "those of the same name"
    fill(page, "sample", 1)
    shows(page, every[0], maps(ds)[1])
    assert page.inner_text("#prompt") == "picture 1 of sun"
    fill(page, "second-sample", 1)
    shows(page, every[1], maps(other)[1].isel(concept=[0, 2]))
    tick(page, "space", "value")
    shows(page, every[0], maps(ds, "value")[1])
    shows(page, every[1], maps(other, "value")[1].isel(concept=[0, 2]))
    tick(page, "second-space", "cross")
    shows(page, every[1], maps(other, "cross")[1].isel(concept=[0, 2]))
    tick(page, "softmax", "of the mean")
    shows(page, every[0], maps(ds, "value", softmax="after")[1])
    tick(page, "concepts", "boat")
    shows(page, every[0], maps(ds, "value", softmax="after")[1].isel(concept=[0, 2]))
    shows(page, every[1], maps(other, "cross", softmax="after")[1].isel(concept=[2]))
    tick(page, "compare", "this run")
    shows(page, every[1], maps(ds, "cross", softmax="after")[1].isel(concept=[0, 2]))
    tick(page, "compare", "nothing")
    page.wait_for_selector("#second", state="hidden")
    chosen = {"space": "value", "softmax": "after"}
    slide(page, "layers", 0, "ArrowRight")
    shows(page, every[0], maps(ds, **chosen, layers=[1, 3, 4])[1].isel(concept=[0, 2]))
    assert page.inner_text("#layers-words") == "1 to 4"
    slide(page, "steps", 1, "ArrowLeft")
    chosen |= {"layers": [1, 3, 4], "steps": [0, 1]}
    shows(page, every[0], maps(ds, **chosen)[1].isel(concept=[0, 2]))
    tick(page, "heads", "1")
    shows(page, every[0], maps(ds, **chosen, heads=[1])[1].isel(concept=[0, 2]))
    fill(page, "layer", 3)
    shows(page, every[0], maps(ds, **(chosen | {"layers": 3}), heads=[1])[1].isel(concept=[0, 2]))
    fill(page, "step", 0)
    shows(page, every[0], maps(ds, **(chosen | {"layers": 3, "steps": 0}), heads=[1])[1].isel(concept=[0, 2]))
    assert "layers 3 · steps 0 · heads 1" in page.inner_text("#note")
    assert page.locator("#first-maps .colorbar").count() == 1
    tick(page, "drawing", "one colour scale")
    page.wait_for_selector("#first-maps .colorbar", state="detached")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before
    fill(page, "layer", 2)
    page.wait_for_selector("#note.failed")
    assert "layer 2 does not exist" in page.inner_text("#note")


def test_a_video_plays_and_has_branches(opened, stores):
    ds = dp.open(stores["video"])
    with cases.served(dp.explore.app(stores["video"])) as address:
        page = opened(address)
        maps = dp.maps.saliency(ds).isel(sample=0)
        shows(page, "first-maps", maps.sel(branch="cond").isel(frame=0))
        tick(page, "branch", "uncond")
        shows(page, "first-maps", maps.sel(branch="uncond").isel(frame=0))
        slide(page, "frame", 0, "ArrowRight")
        shows(page, "first-maps", maps.sel(branch="uncond").isel(frame=1))
        page.click("#play")
        shows(page, "first-maps", maps.sel(branch="uncond").isel(frame=2))
        page.click("#play")
        page.wait_for_selector("#play:text('Play')")


def click(page: Any, graph: str, panel: int, x: float, y: float) -> None:
    """Click on a panel, at shares of its width and height."""
    area = page.locator(f"#{graph} .draglayer rect.nsewdrag").nth(panel)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] * x - 2, box["y"] + box["height"] * y)
    page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)


def test_a_click_on_a_patch_gives_its_numbers_and_a_click_on_those_the_map(opened, two, stores):
    page, ds = opened(two), dp.open(stores["run"])
    for panel, row, column in ((2, 1, 4), (0, 3, 2)):  # a map, the image
        click(page, "first-maps", panel, (column + 0.5) / cases.COLUMNS, (row + 0.5) / cases.ROWS)
        cells = dp.maps.saliency(ds, over=())[0].isel(y=row, x=column).transpose("concept", "step", "layer")
        shows(page, "first-course", cells)
        assert [page.input_value(f"#{name}") for name in ("row", "column")] == [str(row), str(column)]
        said = page.locator("#first-numbers tbody td:nth-child(2)").all_inner_texts()
        assert said == [f"{value:.4g}" for value in dp.maps.saliency(ds)[0, :, row, column].values]
    # The third layer of four (label 3), the second step of three.
    click(page, "first-course", 1, 2.5 / 4, 1.5 / 3)
    shows(page, "first-maps", dp.maps.saliency(ds, layers=3, steps=1)[0])
    assert [page.input_value(f"#{name}") for name in ("layer", "step")] == ["3", "1"]
    click(page, "second-maps", 1, 0.5 / cases.COLUMNS, 0.5 / cases.ROWS)
    shows(page, "first-course", dp.maps.saliency(ds, over=())[0].isel(y=0, x=0).transpose("concept", "step", "layer"))


def test_names_stay_text(opened, two):
    page = opened(two)
    fill(page, "row", 0)
    fill(page, "column", 0)
    page.wait_for_selector("#first-course .heatmaplayer image", state="attached")
    click(page, "first-maps", 3, 0.5, 0.5)
    page.wait_for_selector("#first-maps .hoverlayer text")
    assert cases.EVIL in page.locator("#concepts label").all_inner_texts()
    assert cases.EVIL in page.locator("#first-numbers tbody th").all_inner_texts()
    assert page.evaluate("window.stolen") is None
    assert page.locator("img[src='x']").count() == 0


def test_what_is_saved(opened, two, stores, tmp_path):
    page = opened(two)
    for button, suffix in (("save-table", "csv"), ("save-page", "html")):
        with page.expect_download() as found:
            page.click(f"#{button}")
        found.value.save_as(tmp_path / f"maps.{suffix}")
    assert (tmp_path / "maps.csv").read_text().startswith("run,concept,frame,y,x,value\nfirst,sun,0,0,0,0.")
    assert "Plotly.newPlot(" in (tmp_path / "maps.html").read_text()
    names: dict = {}
    exec(page.inner_text("#code"), names)
    drawn = [trace.z for trace in names["figure"].data if trace.type == "heatmap"]
    np.testing.assert_allclose(values(page, "first-maps"), drawn, rtol=1e-5)
    page.click("#copy")
    page.wait_for_selector("#copy:text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code").text_content()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_everybody_can_use_it(opened, two, width, scheme):
    page = opened(two, width, scheme)
    if width == 390:
        assert not page.locator("#sample").is_visible(), "choices are folded away"
        page.locator("summary").press("Enter")
    fill(page, "row", 0)
    fill(page, "column", 0)
    page.wait_for_selector("#second-course .heatmaplayer image", state="attached")
    assert cases.barriers(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("#space input:checked").press("ArrowDown")
    until(lambda: page.inner_text("#note").startswith("value space"), lambda: page.inner_text("#note"))
