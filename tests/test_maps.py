"""Scores and maps against the equations written out in plain numpy, in float64."""

from __future__ import annotations

import json
import subprocess
import sys

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from dit_probe import maps
from dit_probe.errors import MapError

SAMPLES, STEPS, LAYERS, HEADS, HEAD_DIM, CONCEPTS, HEIGHT, WIDTH = 2, 3, 4, 2, 5, 3, 2, 4
LEADING = ("sample", "step", "layer")
STEP_LABELS, LAYER_LABELS = [0, 2, 5], [1, 3, 4, 7]
SPACES = ["output", "value", "cross"]


def make(dtype="float64", *, frames=1, concepts=CONCEPTS, branches=0, order=None, seed=0) -> xr.Dataset:
    """A trace of random activations: everything that `maps` reads."""
    random = np.random.default_rng(seed)
    tokens = frames * HEIGHT * WIDTH
    leading = (SAMPLES, STEPS, LAYERS) if not branches else (SAMPLES, branches, STEPS, LAYERS)
    dims = LEADING if not branches else ("sample", "branch", "step", "layer")
    names = ["o_{}", "v_{}", "q_{}", "k_{}", "q_{}_unrotated", "k_{}_unrotated"]
    variables = {}
    for stream, dim, count in (("x", "image_token", tokens), ("c", "concept", concepts)):
        for name in names:
            values = random.normal(size=(*leading, count, HEADS, HEAD_DIM)).astype(dtype)
            variables[name.format(stream)] = ((*dims, dim, "head", "head_dim"), values)
    frame, y, x = (index.ravel() for index in np.indices((frames, HEIGHT, WIDTH)))
    coords = {
        "step": STEP_LABELS,
        "layer": LAYER_LABELS,
        "timestep": ("step", [900.0, 500.0, 100.0]),
        "concept": [f"concept {i}" for i in range(concepts)],
        "patch_frame": ("image_token", frame),
        "patch_y": ("image_token", y),
        "patch_x": ("image_token", x),
    }
    ds = xr.Dataset(variables, coords)
    return ds if order is None else ds.isel(image_token=order)


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    weights = np.exp(values - values.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def expected_scores(ds: xr.Dataset, space: str, direction: str = "image_to_concept", rotary: bool = True) -> np.ndarray:
    """(sample, step, layer, head, concept, image_token): dot products of every head, by the definition."""
    image, concept = {"output": ("o_x", "o_c"), "value": ("v_x", "v_c")}.get(
        space, ("q_x", "k_c") if direction == "image_to_concept" else ("k_x", "q_c")
    )
    suffix = "" if rotary or space != "cross" else "_unrotated"
    products = np.einsum(
        "stlihd,stlchd->stlhci",
        ds[image + suffix].values.astype("float64"),
        ds[concept + suffix].values.astype("float64"),
    )
    return products / np.sqrt(HEAD_DIM) if space == "cross" else products


def merged(values: np.ndarray, space: str) -> np.ndarray:
    return values.mean(3) if space == "cross" else values.sum(3)


def in_flight(ds: xr.Dataset) -> xr.Dataset:
    """The same trace with its activations reduced to scores while running."""
    dims = (*LEADING, "concept", "image_token")
    arrays = {
        "score_output": merged(expected_scores(ds, "output"), "output"),
        "score_value": merged(expected_scores(ds, "value"), "value"),
        "score_cross": merged(expected_scores(ds, "cross"), "cross"),
        "score_cross_concept_to_image": merged(expected_scores(ds, "cross", "concept_to_image"), "cross"),
    }
    variables = {name: (dims, values.astype("float32")) for name, values in arrays.items()}
    return xr.Dataset(variables, ds.coords)


@pytest.mark.parametrize("direction", maps.DIRECTIONS)
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_scores_are_the_dot_products_of_the_definition(space, rotary, direction):
    ds = make()
    expected = expected_scores(ds, space, direction, rotary)
    whole = maps.scores(ds, space, direction=direction, rotary=rotary)
    assert whole.dims == (*LEADING, "concept", "image_token")
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole, merged(expected, space), rtol=1e-12, atol=1e-12)
    each = maps.scores(ds, space, direction=direction, rotary=rotary, heads="each")
    assert each.dims == (*LEADING, "head", "concept", "image_token")
    np.testing.assert_allclose(each, expected, rtol=1e-12, atol=1e-12)
    one = maps.scores(ds, space, direction=direction, rotary=rotary, heads=[1])
    np.testing.assert_allclose(one, expected[:, :, :, 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_saliency_is_equation_8(space):
    ds = make()
    expected = merged(expected_scores(ds, space), space)
    wanted = {
        "each": softmax(expected, 3).mean((1, 2)),
        "after": softmax(expected.mean((1, 2)), 1),
        None: expected.mean((1, 2)),
    }
    for kind, values in wanted.items():
        got = maps.saliency(ds, space, softmax=kind)
        assert got.dims == ("sample", "concept", "y", "x")
        np.testing.assert_allclose(got.values.reshape(values.shape), values, rtol=1e-11, atol=1e-12)
        if kind is not None:
            np.testing.assert_allclose(got.sum("concept"), 1, rtol=1e-12)
    assert abs(maps.saliency(ds, space) - maps.saliency(ds, space, softmax="after")).max() > 1e-3


def test_layers_and_steps_are_labels_in_any_order():
    ds = make()
    expected = softmax(merged(expected_scores(ds, "output"), "output"), 3)
    got = maps.saliency(ds, layers=[7, 1], steps=2)
    np.testing.assert_allclose(got.values.reshape(SAMPLES, CONCEPTS, -1), expected[:, 1][:, [3, 0]].mean(1), rtol=1e-12)
    assert got.attrs["layers"] == [7, 1]
    assert got.attrs["steps"] == [2]
    assert maps.scores(ds, layers=np.array([4, 3])).layer.values.tolist() == [4, 3]
    assert maps.scores(ds, layers=range(3, 5)).layer.values.tolist() == [3, 4]
    np.testing.assert_allclose(maps.saliency(ds.isel(layer=3), layers=7), maps.saliency(ds, layers=7))


def test_over_keeps_the_dims_that_are_not_averaged():
    ds = make()
    by_layer = maps.saliency(ds, over=("step",))
    assert by_layer.dims == ("sample", "layer", "concept", "y", "x")
    assert maps.saliency(ds, over=()).dims == ("sample", "step", "layer", "concept", "y", "x")
    np.testing.assert_allclose(by_layer.mean("layer"), maps.saliency(ds), rtol=1e-12)
    np.testing.assert_allclose(by_layer.sel(layer=4), maps.saliency(ds, layers=4), rtol=1e-12)
    with pytest.raises(MapError, match="over='sample'"):
        maps.saliency(ds, over=("sample",))


def test_heads():
    ds = make()
    expected = softmax(expected_scores(ds, "output"), 4).mean((1, 2))
    each = maps.saliency(ds, heads="each")
    assert each.dims == ("sample", "head", "concept", "y", "x")
    np.testing.assert_allclose(each.values.reshape(expected.shape), expected, rtol=1e-12)
    # A head of the selected few is the same head, and all of them are the merged map.
    np.testing.assert_allclose(maps.saliency(ds, heads=[1]), each.isel(head=1), rtol=1e-12)
    np.testing.assert_allclose(maps.saliency(ds, "cross", heads=[1, 0]), maps.saliency(ds, "cross"), rtol=1e-12)
    with pytest.raises(MapError, match=r"head 2 does not exist for o_x and o_c; there are: 0, 1"):
        maps.saliency(ds, heads=[0, 2])
    with pytest.raises(MapError, match="heads='all' is none of 'merged', 'each'"):
        maps.saliency(ds, heads="all")


def test_attrs_are_json_and_say_what_was_computed():
    got = maps.saliency(make(), "cross", softmax="after", heads=(0, 1), rotary=False, direction="concept_to_image")
    assert got.name == "saliency"
    assert json.loads(json.dumps(got.attrs)) == {
        "space": "cross",
        "direction": "concept_to_image",
        "rotary": False,
        "softmax": "after",
        "heads": [0, 1],
        "layers": LAYER_LABELS,
        "steps": STEP_LABELS,
    }
    assert maps.scores(make(), "cross", direction="concept_to_image").name == "score_cross_concept_to_image"
    assert maps.saliency(make()).attrs["direction"] is None


@pytest.mark.parametrize("space", SPACES)
def test_permuting_concepts_permutes_maps(space):
    ds = make()
    order = [2, 0, 1]
    permuted = maps.saliency(ds.isel(concept=order), space)
    np.testing.assert_allclose(permuted, maps.saliency(ds, space).isel(concept=order), rtol=1e-12)
    assert permuted.concept.values.tolist() == ["concept 2", "concept 0", "concept 1"]


@pytest.mark.parametrize("direction", maps.DIRECTIONS)
@pytest.mark.parametrize("space", SPACES)
def test_scores_reduced_in_flight_give_the_same_numbers(space, direction):
    ds = make("float32")
    reduced = in_flight(ds)
    for kind in ("each", "after", None):
        offline = maps.saliency(ds, space, direction=direction, softmax=kind, layers=[3, 7])
        got = maps.saliency(reduced, space, direction=direction, softmax=kind, layers=[3, 7])
        assert got.dtype == offline.dtype == np.float32
        xr.testing.assert_allclose(got, offline, rtol=1e-5, atol=1e-5)
        assert got.attrs == offline.attrs
        assert got.dims == offline.dims


def test_the_source_that_holds_more_of_what_is_asked_is_read():
    ds = make()
    both = xr.merge([ds[["o_x", "o_c"]], in_flight(ds)[["score_output"]] * 0], compat="override", join="override")
    assert float(abs(maps.scores(both)).max()) > 0, "raw activations win a tie"
    both["o_x"].attrs["layers"] = both["o_c"].attrs["layers"] = [3]
    assert maps.scores(both).sizes["layer"] == LAYERS
    assert float(abs(maps.scores(both, layers=3)).max()) > 0
    assert float(abs(maps.scores(both, layers=[1, 3])).max()) == 0
    assert maps.scores(both, heads="each").layer.values.tolist() == [3]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_low_precision_is_accumulated_in_float32(dtype):
    ds = make(dtype) if dtype == "float16" else bfloat16(make())
    got = maps.scores(ds)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, merged(expected_scores(ds, "output"), "output"), rtol=1e-5, atol=1e-5)
    big = xr.Dataset(
        {"v_x": (("image_token", "head", "head_dim"), np.full((1, 1, 3000), 8, "float16")),
         "v_c": (("concept", "head", "head_dim"), np.full((2, 1, 3000), 8, "float16"))}
    )  # fmt: skip
    assert maps.scores(big, "value").values.tolist() == [[192000.0], [192000.0]], "overflows float16"


def bfloat16(ds: xr.Dataset) -> xr.Dataset:
    """The values a bfloat16 model would have left, decoded to float32."""
    cut = [(v.astype("float32").values.view("uint32") & 0xFFFF0000).view("float32") for v in ds.data_vars.values()]
    return ds.assign({name: (ds[name].dims, values) for name, values in zip(ds.data_vars, cut, strict=True)})


@pytest.mark.parametrize("chunks", [{"sample": 1, "step": 1, "layer": 1}, {"concept": 1, "image_token": 3, "head": 1}])
@pytest.mark.parametrize("options", [{}, {"softmax": "after"}, {"softmax": None, "heads": "each"}, {"heads": [1]}])
def test_dask_is_lazy_and_equal(chunks, options):
    ds = make("float32")
    lazy = ds.chunk(chunks).assign_coords(ds.coords)

    def refuse(*_, **__):
        raise AssertionError("computed before .load()")

    with dask.config.set(scheduler=refuse):
        got = maps.saliency(lazy, "cross", layers=[1, 7], **options)
        kept = {dim: size for dim, size in chunks.items() if dim != "head"}
        reduced = maps.saliency(in_flight(ds).chunk(kept).assign_coords(ds.coords))
        unreduced = maps.scores(lazy)
    assert got.chunks is not None
    assert reduced.chunks is not None
    assert unreduced.chunks is not None
    with dask.config.set(scheduler="synchronous"):
        eager = maps.saliency(ds, "cross", layers=[1, 7], **options)
        xr.testing.assert_allclose(got.load(), eager, rtol=1e-5, atol=1e-6)
        assert got.attrs == eager.attrs
        assert got.dtype == eager.dtype
        xr.testing.assert_allclose(reduced.load(), maps.saliency(ds), rtol=1e-5, atol=1e-6)


def test_branches_are_kept():
    ds = make(branches=2).assign_coords(branch=["cond", "uncond"])
    got = maps.saliency(ds)
    assert got.dims == ("sample", "branch", "concept", "y", "x")
    np.testing.assert_allclose(got.sel(branch="uncond"), maps.saliency(ds.sel(branch="uncond")), rtol=1e-12)


def test_video_has_frames_and_one_frame_has_none():
    ds = make(frames=3)
    got = maps.saliency(ds)
    assert got.dims == ("sample", "concept", "frame", "y", "x")
    assert got.frame.values.tolist() == [0, 1, 2]
    values = softmax(merged(expected_scores(ds, "output"), "output"), 3).mean((1, 2))
    np.testing.assert_allclose(got, values.reshape(SAMPLES, CONCEPTS, 3, HEIGHT, WIDTH), rtol=1e-12)
    assert "frame" not in maps.saliency(make()).coords
    assert "frame" not in maps.saliency(make().drop_vars("patch_frame")).dims


def test_tokens_in_any_order_land_where_their_coordinates_say():
    order = np.random.default_rng(1).permutation(2 * HEIGHT * WIDTH)
    xr.testing.assert_allclose(maps.saliency(make(frames=2, order=order)), maps.saliency(make(frames=2)))


def test_names_of_concepts_that_differ_by_sample_are_kept():
    names = (("sample", "concept"), [["sun", "sea", "sky"], ["cat", "dog", "mat"]])
    ds = make().drop_vars("concept")
    for named in (ds.assign(concept_name=names), ds.assign_coords(concept_name=names)):
        assert maps.saliency(named).concept_name.sel(sample=1).values.tolist() == ["cat", "dog", "mat"]


def test_a_single_concept_under_softmax_is_refused():
    ds = make(concepts=1)
    with pytest.raises(MapError, match=r"one concept and softmax='each'.*softmax=None"):
        maps.saliency(ds)
    assert maps.saliency(ds, softmax=None).sizes["concept"] == 1


def test_nan_is_never_averaged_away():
    ds = make()
    ds["o_x"].loc[{"sample": 1, "step": 2, "layer": 3}] = np.nan
    for kind in ("each", "after", None):
        got = maps.saliency(ds, softmax=kind)
        assert got.isel(sample=0).notnull().all()
        assert got.isel(sample=1).isnull().all()
    assert maps.saliency(ds, layers=[1, 4, 7]).notnull().all()


def test_all_means_where_every_variable_was_recorded():
    ds = make()
    ds["o_x"].attrs.update(layers=[1, 3, 7], steps=[0, 2])
    ds["o_c"].attrs.update(layers=np.array([3, 4, 7]))
    got = maps.saliency(ds)
    assert got.attrs["layers"] == [3, 7]
    assert got.attrs["steps"] == [0, 2]
    with pytest.raises(MapError, match=r"layer 1, 4 was not recorded for o_x and o_c; there are: 3, 7\. .*layers="):
        maps.saliency(ds, layers=[1, 4])
    with pytest.raises(MapError, match=r"step 9 does not exist for o_x and o_c; there are: 0, 2"):
        maps.saliency(ds, steps=9)
    ds["o_c"].attrs["layers"] = [4]
    with pytest.raises(MapError, match="no layer to read for o_x and o_c: they were recorded at none in common"):
        maps.saliency(ds)


@pytest.mark.parametrize("layers", [[], [3, 3], "all", -1])
def test_selections_that_make_no_sense_are_refused(layers):
    with pytest.raises(MapError, match="layer"):
        maps.saliency(make(), layers=layers)


def test_messages_name_what_to_record():
    ds = make()[["o_x", "q_x"]]
    with pytest.raises(
        MapError,
        match=r"'o_x' and 'o_c', or 'score_output'; the dataset has o_x, q_x.*record=\('o_x', 'o_c'\), or scores=",
    ):
        maps.saliency(ds)
    with pytest.raises(MapError, match=r"'q_x_unrotated' and 'k_c_unrotated'; .*reduced in flight merge"):
        maps.saliency(in_flight(make()), "cross", rotary=False)
    with pytest.raises(MapError, match=r"'k_x' and 'q_c'; .*reduced in flight merge"):
        maps.saliency(in_flight(make()), "cross", direction="concept_to_image", heads="each")
    with pytest.raises(MapError, match="space='outputs' is none of"):
        maps.saliency(ds, "outputs")
    with pytest.raises(MapError, match="softmax='before' is none of"):
        maps.saliency(ds, softmax="before")
    with pytest.raises(MapError, match="direction='up' is none of"):
        maps.saliency(ds, direction="up")
    with pytest.raises(MapError, match=r"expected a trace \(an xarray.Dataset.*got DataArray"):
        maps.scores(ds["o_x"])


def test_grid_refuses_tokens_that_do_not_fill_it():
    tokens = maps.scores(make())
    with pytest.raises(MapError, match="7 image tokens do not fill a grid of 2 x 4"):
        maps.grid(tokens.isel(image_token=slice(7)).drop_vars("patch_frame"))
    with pytest.raises(MapError, match="do not fill"):
        maps.grid(tokens.assign_coords(patch_y=("image_token", [0] * 8)))
    with pytest.raises(MapError, match="no coordinate patch_x over image_token"):
        maps.grid(tokens.drop_vars("patch_x"))
    with pytest.raises(MapError, match="no dim 'image_token'"):
        maps.grid(maps.grid(tokens))


@given(sizes=st.tuples(*[st.integers(1, 4)] * 3), start=st.integers(0, 5), first=st.booleans(), seed=st.integers(0, 99))
def test_grid_round_trip(sizes, start, first, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=(2, *sizes))
    places = [index.ravel() + start for index in np.indices(sizes)]
    order = random.permutation(len(places[0]))
    tokens = xr.DataArray(
        values.reshape(2, -1)[:, order],
        dims=("concept", "image_token"),
        coords={
            f"patch_{name}": ("image_token", place[order])
            for name, place in zip(("frame", "y", "x"), places, strict=True)
        },
    )
    got = maps.grid(tokens.T if first else tokens)
    space = ("frame", "y", "x") if sizes[0] > 1 else ("y", "x")
    assert got.dims == ((*space, "concept") if first else ("concept", *space))
    got = got.transpose("concept", ...)
    np.testing.assert_array_equal(got.values.reshape(2, *sizes), values)
    again = got.stack(image_token=space).reset_index("image_token")
    again = again.rename({name: f"patch_{name}" for name in space})
    np.testing.assert_array_equal(maps.grid(again).values, got.values)


def test_prompt_attention_keeps_tokens():
    ds = make(frames=2)
    tokens, random = 2 * HEIGHT * WIDTH, np.random.default_rng(3)
    to_prompt = random.dirichlet(np.ones(4), (SAMPLES, STEPS, LAYERS, tokens)).astype("float32")
    ds["attention_x_to_p"] = ((*LEADING, "image_token", "prompt_token"), to_prompt)
    ds["attention_p_to_x"] = ((*LEADING, "prompt_token", "image_token"), np.moveaxis(to_prompt, -1, -2) / 2)
    ds = ds.assign_coords(token=(("sample", "prompt_token"), [["a", "red", "fox", ""]] * SAMPLES))
    got = maps.prompt_attention(ds, layers=[1, 3])
    assert got.dims == ("sample", "prompt_token", "frame", "y", "x")
    assert got.token.sel(sample=1).values.tolist() == ["a", "red", "fox", ""]
    np.testing.assert_allclose(got.sum("prompt_token"), 1, rtol=1e-5)
    expected = np.moveaxis(to_prompt[:, :, :2].mean((1, 2)), -1, -2)
    np.testing.assert_allclose(got.values.reshape(expected.shape), expected, rtol=1e-5)
    xr.testing.assert_allclose(maps.prompt_attention(ds, "prompt_to_image", layers=[1, 3]) * 2, got)
    with pytest.raises(MapError, match=r"'attention_x_to_p'; the dataset has .*PromptAttention"):
        maps.prompt_attention(make())


def test_maps_need_neither_torch_nor_plotly():
    code = (
        "import sys, types; package = types.ModuleType('dit_probe'); package.__path__ = ['dit_probe']\n"
        "sys.modules['dit_probe'] = package; import dit_probe.maps\n"
        "assert not {'torch', 'plotly', 'diffusers', 'dask'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
