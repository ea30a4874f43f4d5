"""The explorer without a browser: it shows what `dit_probe.maps` says, and reads what it shows."""

from __future__ import annotations

import collections
import dataclasses
import io
import json

import explore_cases as cases
import numpy as np
import pandas
import pytest
import xarray as xr
from zarr.storage import LocalStore, WrapperStore

import dit_probe as dp
from dit_probe.errors import MapError
from dit_probe.explore import choices, drawing, source
from dit_probe.explore.source import Source, with_masks

pytest.importorskip("dash", reason="needs Dash: pip install 'dit-probe[explore]'")

from dit_probe.explore import app, parts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return cases.trace(tmp_path_factory.mktemp("store") / "run.zarr")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A trace with both branches of guidance, of a video."""
    return cases.trace(tmp_path_factory.mktemp("both") / "video.zarr", samples=1, frames=3, branch=True)


def answer(application, output: str, triggered: str, values: dict) -> dict:
    """What the server says to the browser when a control changed."""
    key = next(key for key in application.callback_map if output in key)
    needs = application.callback_map[key]
    fields = {
        side: [
            {"id": one["id"], "property": one["property"], "value": values.get(f"{one['id']}.{one['property']}")}
            for one in needs[name]
        ]
        for side, name in (("inputs", "inputs"), ("state", "state"))
    }
    outputs = [dict(zip(("id", "property"), part.rsplit(".", 1), strict=True)) for part in key.strip(".").split("...")]
    body = {"output": key, "changedPropIds": [triggered], **fields}
    body["outputs"] = outputs if key.startswith("..") else outputs[0]
    response = application.server.test_client().post("/_dash-update-component", json=body)
    assert response.status_code in (200, 204), response.text
    return json.loads(response.text)["response"] if response.text else {}


def drawn(application, *, row=None, column=None, **changes) -> dict:
    values = {f"{name}.value": value for name, value in cases.chosen(**changes).items()}
    values |= {"row.value": row, "column.value": column, "width.data": 940}
    return answer(application, "first-maps.figure", "sample.value", values)


VIEWS = {
    "all": {},
    "value": {"space": "value"},
    "cross": {"space": "cross", "softmax": "after"},
    "scores": {"softmax": "none", "concepts": [2, 0]},
    "some": {"layers": [1, 3], "steps": [0, 0], "heads": ["1"]},
    "a cell": {"layer": 4, "step": 1, "sample": 1},
}
ARGUMENTS = {
    "all": {},
    "value": {"space": "value"},
    "cross": {"space": "cross", "softmax": "after"},
    "scores": {"softmax": None},
    "some": {"layers": [1, 3], "steps": [0], "heads": [1]},
    "a cell": {"layers": [4], "steps": [1]},
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_what_the_maps_say(path, name):
    at = Source(path)
    chosen = cases.chosen(**VIEWS[name])
    _, view = choices.runs(chosen, at, None)["first"]
    expected = dp.maps.saliency(at.ds, **ARGUMENTS[name])[chosen["sample"]].isel(concept=sorted(chosen["concepts"]))
    found = at.maps(choices.at(view, chosen))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dims == ("concept", "y", "x")
    cells = at.maps(view, over=())
    options = {key: value for key, value in ARGUMENTS[name].items() if name != "a cell"}
    expected = dp.maps.saliency(at.ds, over=(), **options)[chosen["sample"]].isel(concept=sorted(chosen["concepts"]))
    np.testing.assert_allclose(cells.transpose(*expected.dims), expected, rtol=1e-5)


@pytest.mark.parametrize("name", VIEWS)
def test_the_python_lines_draw_the_same_figure(path, name):
    at, chosen = Source(path), cases.chosen(**VIEWS[name], drawing=[])
    runs = choices.runs(chosen | {"compare": "first", "second-sample": 1}, at, None)
    names: dict = {}
    exec(parts.lines(runs, chosen, 500), names)
    for figure, run in (("figure", "first"), ("beside", "second")):
        view = choices.at(runs[run][1], chosen)
        shown = drawing.overlay(at, view, at.maps(view), shared=False, across=1)
        same_figure(names[figure], shown)


def same_figure(one, other) -> None:
    assert one.layout == other.layout
    assert len(one.data) == len(other.data)
    for left, right in zip(one.data, other.data, strict=True):
        left, right = left.to_plotly_json(), right.to_plotly_json()
        for name in ("z", "zmin", "zmax"):
            np.testing.assert_allclose(left.pop(name, 0), right.pop(name, 0), rtol=1e-5)
        assert left == right


def test_a_video_is_shown_frame_by_frame_on_the_branch_chosen(both):
    chosen = cases.chosen(frame=2, branch="uncond", space="value")
    at = Source(both)
    runs = choices.runs(chosen, at, None)
    view = runs["first"][1]
    assert at.branches == ["cond", "uncond"] and at.grid == (3, cases.ROWS, cases.COLUMNS)
    expected = dp.maps.saliency(at.ds, "value").isel(sample=0).sel(branch="uncond")
    np.testing.assert_allclose(at.maps(view), expected, rtol=1e-6)
    np.testing.assert_array_equal(at.picture(view), at.ds.image[0, 4])
    names: dict = {}
    exec(parts.lines(runs, chosen, 940), names)
    same_figure(names["figure"], drawing.overlay(at, view, at.maps(view), shared=True, across=4))


class Counting(WrapperStore):
    """A store that remembers which keys were read."""

    def __init__(self, wrapped):
        super().__init__(wrapped)
        self.keys: collections.Counter = collections.Counter()

    async def get(self, key, *rest, **named):
        self.keys[key] += 1
        return await super().get(key, *rest, **named)

    def chunks(self) -> set[str]:
        labels = ("concept_name", "prompt", "seed")
        return {key for key in self.keys if not key.endswith(".json") and not key.startswith(labels)}


def test_only_the_chunks_of_the_selection_are_read(path):
    store = Counting(LocalStore(path, read_only=True))
    application = app(dp.open(store))
    vectors = {key for key in store.chunks() if key.startswith(("o_", "v_", "q_", "k_", "image"))}
    assert not vectors, "opening reads none of the records"
    store.keys.clear()
    drawn(application, sample=1, layers=[3, 4], steps=[1, 1])
    # Layers 3 and 4 are the third and the fourth of the store.
    expected = {f"{name}/c.1.1.{layer}.0.0.0" for name in ("o_x", "o_c") for layer in (2, 3)} | {"image/c.1.0.0.0"}
    assert store.chunks() == expected
    store.keys.clear()
    drawn(application, sample=1, layers=[1, 4], steps=[1, 1], row=1, column=1)
    assert {key for key in store.chunks() if key.startswith("o_x")} == {"o_x/c.1.1.1.0.0.0"}, "the others are known"


def test_a_large_sample_opens_on_a_part_of_it(path, monkeypatch):
    whole = Source(path).first()
    assert (whole.layers, whole.steps) == (cases.LAYERS, cases.STEPS)
    cell = Source(path).nbytes(dataclasses.replace(whole, layers=(0,), steps=(0,)))
    assert cell == (cases.ROWS * cases.COLUMNS + 3) * 8 * 4, "o_x and o_c, float32"
    monkeypatch.setattr(source, "AT_FIRST", 5 * cell)
    part = Source(path).first()
    assert (part.layers, part.steps) == (cases.LAYERS, (1,))
    monkeypatch.setattr(source, "AT_FIRST", 0)
    assert (Source(path).first().layers, Source(path).first().steps) == ((1,), (1,))


def test_scores_are_forgotten_when_they_are_too_many(path, monkeypatch):
    at = Source(path)
    at.maps(at.first())
    monkeypatch.setattr(source, "KEPT", 1)
    view = dataclasses.replace(at.first(), space="value", layers=(3,))
    np.testing.assert_allclose(at.maps(view), dp.maps.saliency(at.ds, "value", layers=[3])[0], rtol=1e-6)
    assert len(at._cells) == len(cases.STEPS)


def test_only_what_the_store_can_give_is_offered(tmp_path):
    raw = Source(cases.trace(tmp_path / "raw.zarr", samples=1))
    assert list(raw.spaces) == ["output", "value", "cross"] and raw.heads == 2
    reduced = Source(cases.trace(tmp_path / "reduced.zarr", samples=1, scores=True))
    assert list(reduced.spaces) == ["output"] and reduced.heads == 0 and reduced.branches == []
    with pytest.raises(MapError, match=r"nothing to draw a map from: the dataset has .*ConceptAttention"):
        Source(raw.ds[["image"]])
    with pytest.raises(MapError, match=r"no sample to show.*isel\(sample=\[0\]\)"):
        Source(raw.ds.isel(sample=0))


def test_wrong_choices_are_said_on_the_page(path):
    application = app(path)
    for changes, words in (
        ({"sample": 7}, "no sample 7: run.zarr has 2"),
        ({"sample": None}, "no sample"),
        ({"layers": [2, 2]}, "none of the layers 2 to 2; there are 0, 1, 3, 4"),
        ({"concepts": []}, "Choose at least one"),
        ({"layer": 2}, "layer 2 does not exist"),
        ({"space": "elsewhere"}, "no elsewhere space"),
    ):
        found = drawn(application, **changes)["note"]
        assert found["className"] == "failed" and words in found["children"]


def test_masks_are_measured(path):
    ds = dp.open(path).isel(sample=[0])
    mask = np.zeros((32, 48), bool)
    mask[:16, 16:] = True
    at = Source(ds, {"boat": mask})
    view = at.first()
    maps = at.maps(view)
    found = at.metrics(view, maps)
    expected = dp.metrics.score(maps.sel(concept="boat", drop=True), xr.DataArray(mask, dims=("y", "x")))
    for name in source.METRICS:
        assert found[name][1] == pytest.approx(float(expected[name]))
        assert np.isnan(found[name][0]) and np.isnan(found[name][2]), "no mask, no number"
    table = drawn(app(ds, masks={"boat": mask}))["first-numbers"]["children"]
    assert f"{found['auroc'][1]:.4g}" in json.dumps(table)


def test_masks_that_do_not_fit_are_refused(path):
    ds = dp.open(path)
    with pytest.raises(MapError, match=r"one sample, the dataset has 2.*isel"):
        with_masks(ds, {"sun": np.zeros((4, 4))})
    one = ds.isel(sample=[0])
    with pytest.raises(MapError, match=r"a mask of 'moon', but the concepts are sun, boat"):
        with_masks(one, {"moon": np.zeros((4, 4))})
    with pytest.raises(MapError, match=r"all of one shape; found sun \(4, 4\), boat \(2, 2\)"):
        with_masks(one, {"sun": np.zeros((4, 4)), "boat": np.zeros((2, 2))})


def test_two_runs_share_the_concepts_of_the_same_name(path, tmp_path):
    other = Source(cases.trace(tmp_path / "other.zarr", samples=1, words=("boat", "moon", "sun", "sea")))
    runs = choices.runs(cases.chosen(compare="second", concepts=[0]), Source(path), other)
    assert runs["second"][0] is other and runs["second"][1].concepts == (2,)
    runs = choices.runs(cases.chosen(compare="second", concepts=[2]), Source(path), other)
    assert runs["second"][1].concepts == (0, 1, 2, 3), "none in common: all"
    found = drawn(app(path, other.ds), compare="second", row=0, column=0)
    assert (
        found["second"]["hidden"] is False and found["second-title"]["children"] == "toy, sample 0: picture 0 of boat"
    )
    assert drawn(app(path))["second"]["hidden"] is True


def test_two_runs_of_one_name_are_told_apart(path, tmp_path):
    found = drawn(app(path, cases.trace(tmp_path / "run.zarr", samples=1)), compare="second")
    assert found["first-title"]["children"].startswith(f"{path}, sample 0")
    assert found["second-title"]["children"].startswith(f"{tmp_path / 'run.zarr'}, sample 0")


def test_panels_stand_in_as_many_columns_as_there_is_room_for(path):
    at = Source(path)
    for width, across in ((940, 4), (340, 1)):
        figure = drawing.overlay(at, at.first(), at.maps(at.first()), shared=True, across=drawing.columns(width))
        lefts = {figure.layout[name].domain[0] for name in figure.layout.to_plotly_json() if name.startswith("xaxis")}
        assert len(lefts) == across and figure.layout.width <= width


def test_a_csv_is_the_map_exactly(path):
    at, chosen = Source(path), cases.chosen(concepts=[0, 2])
    runs = choices.runs(chosen, at, None)
    table = pandas.read_csv(io.StringIO(parts.table(runs, chosen)))
    maps = at.maps(runs["first"][1])
    assert table.concept.unique().tolist() == ["sun", cases.EVIL]
    np.testing.assert_array_equal(table.value.to_numpy("float32"), maps.values.ravel())
    assert table[["y", "x"]].iloc[cases.COLUMNS].tolist() == [1, 0]


def test_names_of_concepts_stay_text(path):
    at, chosen = Source(path), cases.chosen()
    runs = choices.runs(chosen, at, None)
    figure = parts.run(*runs["first"], chosen, (0, 0), 940)
    for name in ("maps", "course"):
        assert "<script" not in figure[name].to_json() and "<img" not in figure[name].to_json()
    page = parts.page(runs, chosen, 940)
    assert "<script>window" not in page and "<img src=x" not in page
    names: dict = {}
    exec(parts.lines(runs, cases.chosen(concepts=[2]), 940), names)


def test_a_click_chooses_the_patch_and_a_cell(path):
    application = app(path)
    click = {"points": [{"x": 3.2, "y": 1.9, "curveNumber": 0}]}
    found = answer(application, "row.value", "first-maps.clickData", {"first-maps.clickData": click})
    assert (found["row"]["value"], found["column"]["value"]) == (2, 3)
    ranges = {"layers.value": [0, 4], "steps.value": [0, 2]}
    cell = {"points": [{"x": "3", "y": "1"}]}
    found = answer(application, "layer.value", "first-course.clickData", ranges | {"first-course.clickData": cell})
    assert (found["layer"]["value"], found["step"]["value"]) == (3, 1)
    found = answer(application, "layer.value", "layers.value", ranges | {"first-course.clickData": cell})
    assert found["layer"]["value"] is None, "a range that is moved is shown"
