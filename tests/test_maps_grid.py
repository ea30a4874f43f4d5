"""From image tokens to a grid: tokens land where their coordinates say, and other dims stay."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from maps_cases import CONCEPTS, HEIGHT, LAYERS, LEADING, SAMPLES, STEPS, WIDTH, expected_scores, make, merged, softmax

from dit_probe import maps
from dit_probe.errors import MapError


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
