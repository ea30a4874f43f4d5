"""The numbers of scores and maps, against the equations, from any source and in any precision."""

import subprocess
import sys

import dask
import numpy as np
import pytest
import xarray as xr
from maps_cases import LAYERS, LEADING, SPACES, expected_scores, in_flight, make, merged, softmax

from dit_probe import maps
from dit_probe.errors import MapError


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


def test_maps_need_neither_torch_nor_plotly():
    code = (
        "import sys, types; package = types.ModuleType('dit_probe'); package.__path__ = ['dit_probe']\n"
        "sys.modules['dit_probe'] = package; import dit_probe.maps\n"
        "assert not {'torch', 'plotly', 'diffusers', 'dask'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
