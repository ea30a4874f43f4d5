"""Massive channels, what they contribute to a map, and the map without them."""

import dask
import numpy as np
import pytest
import xarray as xr
from maps_cases import HEAD_DIM, HEADS, LAYER_LABELS, LAYERS, LEADING, SAMPLES, STEPS, in_flight, make

from dit_probe import diagnostics, maps
from dit_probe.errors import MapError, SiteError

WIDTH = 12


def planted(dtype="float32") -> xr.Dataset:
    """A trace whose channel (1, 3) of o_x, and channel 7 of x, is massive at one layer, with either sign."""
    ds = make(dtype)
    ds.o_x[:, :, 2, :, 1, 3] *= 400
    x = np.random.default_rng(1).normal(size=(SAMPLES, STEPS, LAYERS, ds.sizes["image_token"], WIDTH))
    x[:, :, 1, :, 7] -= 500
    ds["x"] = ((*LEADING, "image_token", "width"), x.astype(dtype))
    return ds


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("variable", "layer", "channel"), [("x", 1, (7,)), ("o_x", 2, (1, 3))])
def test_planted_channels_are_found(variable, layer, channel, dtype):
    ds = planted(dtype)
    found = diagnostics.massive_channels(ds, variable)
    assert found.relative.dtype == np.float32
    rest = tuple(range(3, 3 + len(channel)))
    magnitude = np.abs(ds[variable].values.astype("float64")).mean(3)
    np.testing.assert_allclose(found.magnitude, magnitude, rtol=1e-4)
    np.testing.assert_allclose(found.relative, magnitude / np.median(magnitude, rest, keepdims=True), rtol=1e-4)
    assert [tuple(at[2:].tolist()) for at in np.argwhere(found.massive.values)] == [(layer, *channel)] * 6
    assert found.layer.values.tolist() == LAYER_LABELS and found.timestep.dims == ("step",)
    assert all(found[dim].values.tolist() == list(range(found.sizes[dim])) for dim in found.massive.dims[3:])
    assert not diagnostics.massive_channels(ds, variable, ratio=1e5).massive.any()


def test_layers_that_were_not_recorded_are_left_out():
    ds = planted()
    ds["x"] = ds.x.where(ds.layer != 4).assign_attrs(layers=[1, 3, 7])
    found = diagnostics.massive_channels(ds)
    assert found.layer.values.tolist() == found.attrs["layers"] == [1, 3, 7]
    assert np.isfinite(found.relative).all()
    with pytest.raises(MapError, match="layer 4 was not recorded for x"):
        diagnostics.massive_channels(ds, layers=4)
    with pytest.raises(SiteError, match="no activation is called 'y'"):
        diagnostics.massive_channels(ds, "y")
    with pytest.raises(MapError, match=r"variable='p' needs 'p'.*record=\['p'\]"):
        diagnostics.massive_channels(ds, "p")


def test_a_median_of_zero_has_no_multiples():
    ds = xr.Dataset({"x": (("image_token", "width"), [[0.0, 0.0, 3.0]])})
    found = diagnostics.massive_channels(ds)
    assert np.isnan(found.relative).all() and not found.massive.any()


def test_everything_is_lazy_and_the_same_with_dask():
    ds = planted()
    lazy = ds.chunk(image_token=3, head=1, width=5, layer=1).assign_coords(ds.coords)
    with dask.config.set(scheduler=lambda *args, **kwargs: pytest.fail("computed")):
        found = diagnostics.massive_channels(lazy, "o_x")
        share = diagnostics.channel_share(lazy)
        cut = maps.saliency(diagnostics.without_channels(lazy, found.massive))
        diagnostics.massive_channels(lazy)
    assert found.massive.chunks is not None
    eager = diagnostics.massive_channels(ds, "o_x")
    xr.testing.assert_allclose(found.compute(), eager)
    xr.testing.assert_allclose(share.compute(), diagnostics.channel_share(ds), rtol=1e-4, atol=1e-6)
    xr.testing.assert_allclose(cut.compute(), maps.saliency(diagnostics.without_channels(ds, eager.massive)), atol=1e-6)


# --- leaving channels out


def test_leaving_out_none_changes_nothing_and_all_but_one_leaves_its_product():
    ds = make()
    none = xr.zeros_like(ds.o_x[0, 0, 0, 0], dtype=bool).drop_vars(["step", "layer", "timestep"])
    xr.testing.assert_identical(diagnostics.without_channels(ds, none), ds)
    others = ~none
    others[1, 2] = False
    got = maps.scores(diagnostics.without_channels(ds, others))
    x, c = ds.o_x.values[..., 1, 2], ds.o_c.values[..., 1, 2]
    np.testing.assert_allclose(got, c[..., :, None] * x[..., None, :])
    got = maps.scores(diagnostics.without_channels(ds, others, ("q_x", "k_c")), "cross")
    x, c = ds.q_x.values[..., 1, 2], ds.k_c.values[..., 1, 2]
    np.testing.assert_allclose(got, c[..., :, None] * x[..., None, :] / (HEADS * np.sqrt(HEAD_DIM)))


def test_a_map_without_its_massive_channel_is_that_of_the_others():
    ds = planted("float64")
    massive = diagnostics.massive_channels(ds, "o_x").massive
    cut = diagnostics.without_channels(ds, massive)
    small = ds.copy(deep=True)
    small.o_x[:, :, 2, :, 1, 3] = 0
    np.testing.assert_allclose(maps.saliency(cut), maps.saliency(small))
    assert float(abs(maps.saliency(cut) - maps.saliency(ds)).max()) > 0.1
    # Labels that the mask lacks stay; those that it has are found by label, not by place.
    for layers in ([4], [7, 4]):
        part = diagnostics.massive_channels(ds, "o_x", layers=layers).massive
        xr.testing.assert_identical(diagnostics.without_channels(ds, part), cut)
    xr.testing.assert_identical(diagnostics.without_channels(ds, massive.sel(layer=[1, 3])).o_x, ds.o_x)


def test_scores_that_still_have_the_channels_are_dropped():
    ds = make("float32").assign(in_flight(make()))
    none = xr.zeros_like(ds.o_x, dtype=bool).isel(image_token=0, drop=True)
    cut = diagnostics.without_channels(ds, none)
    assert {*ds} - {*cut} == {"score_output"}
    assert {*ds} - {*diagnostics.without_channels(ds, none, ("v_x", "v_c", "q_x"))} == {"score_value", "score_cross"}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (xr.DataArray(np.zeros((HEADS, HEAD_DIM)), dims=("head", "head_dim")), "found float64"),
        (xr.DataArray(np.zeros((HEADS, 9), bool), dims=("head", "head_dim")), "'head_dim': 9"),
        (xr.DataArray(np.zeros(HEADS, bool), dims="head"), r"over head, head_dim of 'o_x'"),
        (xr.DataArray(np.zeros((2, HEADS, HEAD_DIM), bool), dims=("width", "head", "head_dim")), "'width': 2"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(MapError, match=message):
        diagnostics.without_channels(make(), mask)


def test_variables_that_are_not_there():
    mask = xr.DataArray(np.zeros((HEADS, HEAD_DIM), bool), dims=("head", "head_dim"))
    with pytest.raises(MapError, match=r"no 'o_c' to leave channels out of; the dataset has o_x, v_x"):
        diagnostics.without_channels(make().drop_vars("o_c"), mask)
    with pytest.raises(MapError, match=r"channels is a Dataset; give the DataArray massive_channels\(…\).massive"):
        diagnostics.without_channels(make(), diagnostics.massive_channels(make(), "o_x"))  # type: ignore[arg-type]


def test_heads_may_have_labels():
    ds = planted("float64").assign_coords(head=[5, 9])
    found = diagnostics.massive_channels(ds, "o_x")
    assert found["head"].values.tolist() == [5, 9]
    cut = diagnostics.without_channels(ds, found.massive.sel(head=[9]))
    xr.testing.assert_identical(cut, diagnostics.without_channels(ds, found.massive))
    assert (cut.o_x[:, :, 2, :, 1, 3] == 0).all() and (cut.o_x[:, :, 2, :, 0, 3] != 0).all()


# --- shares of the channels


@pytest.mark.parametrize("space", ["output", "value", "cross"])
def test_shares_are_covariances_with_the_score(space):
    ds = make()
    share = diagnostics.channel_share(ds, space)
    assert share.dims == (*LEADING, "head", "head_dim")
    np.testing.assert_allclose(share.sum(["head", "head_dim"]), 1)
    image, concept = {"output": ("o_x", "o_c"), "value": ("v_x", "v_c"), "cross": ("q_x", "k_c")}[space]
    x, c = (ds[name].values[1, 0, 2].reshape(ds[name].shape[3], -1) for name in (image, concept))
    differences = c - c.mean(0)
    explained, variance = np.zeros(x.shape[1]), 0.0
    for difference in differences:
        score = x @ difference
        variance += np.var(score)
        explained += [
            np.cov(column * weight, score, bias=True)[0, 1] for column, weight in zip(x.T, difference, strict=True)
        ]
    np.testing.assert_allclose(share[1, 0, 2].values.ravel(), explained / variance)


def test_what_all_concepts_or_all_tokens_share_counts_for_nothing():
    ds = planted("float64")
    assert float(diagnostics.channel_share(ds)[:, :, 2, 1, 3].min()) > 0.9
    ds.o_c[:, :, 2, :, 1, 3] = 5  # massive in the image, and the same for every concept
    np.testing.assert_allclose(diagnostics.channel_share(ds)[:, :, 2, 1, 3], 0, atol=1e-9)
    ds = make()
    ds.o_x[..., 0, 0] = 1000  # massive, and the same at every token
    np.testing.assert_allclose(diagnostics.channel_share(ds)[..., 0, 0], 0, atol=1e-9)


def test_a_single_concept_has_no_differences():
    assert np.isnan(diagnostics.channel_share(make(concepts=1))).all()
    with pytest.raises(MapError, match="space='depth' is none of 'output', 'value', 'cross'"):
        diagnostics.channel_share(make(), "depth")  # type: ignore[arg-type]
    with pytest.raises(MapError, match="needs 'v_x' and 'v_c'"):
        diagnostics.channel_share(make().drop_vars("v_c"), "value")
