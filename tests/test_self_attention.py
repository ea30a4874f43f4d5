"""The image's attention to itself, against the model's own attention, numpy's eigenvectors and the definitions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import dask
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from maps_cases import HEAD_DIM, HEIGHT, LAYER_LABELS, SAMPLES, STEP_LABELS, WIDTH, make, softmax
from tracing_cases import traced

import dit_probe as dp
from dit_probe import maps, self_attention
from dit_probe.errors import MapError
from dit_probe.self_attention import bounce, refine, second_eigenvalue, token_rank, transitions

CONCEPTS = ("concept", "y", "x")


def per_head(ds: xr.Dataset) -> np.ndarray:
    """(sample, step, layer, head, query, key): every softmax by the definition."""
    logits = np.einsum("stlihd,stljhd->stlhij", ds.q_x.values.astype(float), ds.k_x.values.astype(float))
    return softmax(logits / np.sqrt(HEAD_DIM), -1)


def drawn(ds: xr.Dataset, seed=5, lead=("sample", "concept")) -> xr.DataArray:
    """Random maps on the grid of a trace."""
    index = maps.grid(self_attention._places(transitions(ds)))
    sizes = [ds.sizes[dim] for dim in lead]
    values = np.random.default_rng(seed).normal(size=(*sizes, *index.shape))
    return xr.DataArray(values, dims=(*lead, *index.dims), name="drawn", attrs={"space": "output"})


def times(A: np.ndarray, S: xr.DataArray) -> np.ndarray:
    """A S, (sample, concept, token), where tokens are in the order of the grid."""
    return np.einsum("sij,scj->sci", A, S.values.reshape(*S.shape[:2], -1))


@dataclass(frozen=True)
class JointAttention(dp.Probe):
    """The model's own weights between image tokens, (row, head, query, key), kept call by call."""

    observes: ClassVar[Mapping[str, tuple[str, ...]]] = {"share": ("image_token",)}
    seen: list[torch.Tensor] = field(default_factory=list)

    def observe(self, block, activations):
        weights = [block.weights(head)[:, block.image, block.image] for head in range(block.heads)]
        self.seen.append(torch.stack(weights, 1))
        return {"share": self.seen[-1].sum(-1).mean(1)}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_it_is_the_attention_of_the_model_among_image_tokens(pipelines, family):
    own = JointAttention()
    _, ds = traced(pipelines(family), own | dp.Probe(record=("q_x", "k_x")), call={"steps": 2})
    assert ds.share.max() < 0.99, "the prompt has its share"
    assert len(own.seen) == ds.sizes["step"] * ds.sizes["layer"]
    joint = torch.stack(own.seen, 1).double()
    expected = (joint / joint.sum(-1, keepdim=True)).mean((1, 2))
    found = transitions(ds)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    # and torch's own operation, with image tokens alone, gives the same means of any map
    S = drawn(ds, lead=("sample",)).expand_dims(concept=1, axis=1)
    q, k = (torch.from_numpy(ds[name].values).movedim(-2, -3) for name in ("q_x", "k_x"))
    v = torch.from_numpy(S.values.reshape(len(S), 1, 1, 1, -1, 1)).float().expand(*q.shape[:-1], 1)
    attended = F.scaled_dot_product_attention(q, k, v).mean((1, 2, 3))[..., 0]
    np.testing.assert_allclose(refine(S, ds).values.reshape(len(S), -1), attended, rtol=1e-4, atol=1e-6)


def test_rows_are_distributions_and_the_mean_is_that_of_the_definition():
    ds = make()
    A = transitions(ds)
    assert A.dims == ("sample", "image_token", "attended_token")
    np.testing.assert_allclose(A.sum("attended_token"), 1, rtol=1e-12)
    np.testing.assert_allclose(A, per_head(ds).mean((1, 2, 3)), rtol=1e-12)
    assert A.dtype == np.float64 and transitions(make("float16")).dtype == np.float32
    assert A.patch_x.dims == ("image_token",)
    chosen = transitions(ds, layers=[7, 1], steps=2, heads=[1])
    np.testing.assert_allclose(chosen, per_head(ds)[:, 1][:, [3, 0], 1].mean(1), rtol=1e-12)
    assert chosen.attrs == {"layers": [7, 1], "steps": [2], "heads": [1], "weights": None}
    np.testing.assert_allclose(transitions(ds.isel(layer=3, step=0)), transitions(ds, layers=7, steps=0), rtol=1e-12)
    assert transitions(make(branches=2)).dims == ("sample", "branch", "image_token", "attended_token")


@pytest.mark.parametrize("power", [0, 1, 2, 3])
@pytest.mark.parametrize("frames", [1, 3])
def test_refine_is_the_power_of_the_matrix(power, frames, monkeypatch):
    monkeypatch.setattr(self_attention, "_NUMBERS", 3 * frames * HEIGHT * WIDTH)  # three queries at a time
    ds = make(frames=frames)
    S = drawn(ds)
    got = refine(S, ds, power)
    assert got.dims == S.dims and got.name == "drawn"
    expected = times(np.linalg.matrix_power(per_head(ds).mean((1, 2, 3)), power), S)
    np.testing.assert_allclose(got.values.reshape(expected.shape), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got, refine(S, transitions(ds), power), rtol=1e-10, atol=1e-12)


def test_refine_once_holds_no_matrix(monkeypatch):
    ds = make()
    S = drawn(ds)
    expected = refine(S, transitions(ds))
    monkeypatch.setattr(self_attention, "_mixed", None)
    xr.testing.assert_allclose(refine(S, ds), expected)
    with pytest.raises(TypeError, match="NoneType"):
        refine(S, ds, 2)


def test_powers_add_up_constants_stay_and_the_range_is_kept():
    ds = make("float32")
    S = drawn(ds)
    twice = refine(S, ds, 2)
    np.testing.assert_allclose(twice, refine(refine(S, ds), ds), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(refine(S, ds, 0), S, rtol=1e-6)
    np.testing.assert_allclose(refine(xr.full_like(S, -2.5), ds, 3), -2.5, rtol=1e-6)
    for got in (refine(S, ds), twice):
        assert (got.max(CONCEPTS[1:]) < S.max(CONCEPTS[1:])).all() and (
            got.min(CONCEPTS[1:]) > S.min(CONCEPTS[1:])
        ).all()
    assert (twice.std(CONCEPTS[1:]) < refine(S, ds).std(CONCEPTS[1:])).all()


def test_tokens_in_any_order():
    ds = make(frames=2)
    order = np.random.default_rng(1).permutation(ds.sizes["image_token"])
    shuffled = ds.isel(image_token=order)
    S = drawn(ds)
    for power in (1, 2):
        xr.testing.assert_allclose(refine(S, shuffled, power), refine(S, ds, power))
    A, B = transitions(ds), transitions(shuffled)
    np.testing.assert_allclose(B, A.values[:, order][:, :, order], rtol=1e-12)
    xr.testing.assert_allclose(token_rank(B, tolerance=1e-12), token_rank(A, tolerance=1e-12))
    token = {"frame": 1, "y": 0, "x": 2}
    xr.testing.assert_allclose(bounce(token, B, 2), bounce(token, A, 2))
    one = np.flatnonzero((ds.patch_frame == 1) & (ds.patch_y == 0) & (ds.patch_x == 2)).item()
    np.testing.assert_allclose(bounce(token, B).values.reshape(SAMPLES, -1), A.values[:, one], rtol=1e-12)


def test_other_dims_of_maps_are_refined_by_the_same_matrix():
    ds = make(branches=2).assign_coords(branch=["cond", "uncond"])
    S = maps.saliency(ds, over=(), heads="each")
    assert {"step", "layer", "head"} <= {*S.dims}
    got = refine(S, ds, layers=[3], steps=[0])
    assert got.dims == S.dims and got.layer.values.tolist() == LAYER_LABELS
    assert got.concept.values.tolist() == S.concept.values.tolist()
    one = {"sample": 1, "branch": 1, "step": 2, "layer": 1, "head": 0}
    A = transitions(ds, layers=[3], steps=[0]).values[1, 1]
    expected = S.isel(one).values.reshape(3, -1) @ A.T
    np.testing.assert_allclose(got.isel(one).values.reshape(expected.shape), expected, rtol=1e-12)
    assert json.loads(json.dumps(got.attrs)) == {
        **S.attrs, "refined_power": 1, "refined_layers": [3], "refined_steps": [0], "refined_heads": "merged",
        "refined_weights": None,
    }  # fmt: skip
    turned = refine(S.transpose("y", "head", "x", ...), ds, layers=[3], steps=[0])
    assert turned.dims[:3] == ("y", "head", "x")
    np.testing.assert_allclose(turned.transpose(*got.dims), got, rtol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
def test_samples_and_branches_go_with_those_of_the_trace(power):
    ds = make(branches=2).assign_coords(branch=["cond", "uncond"], sample=[10, 20])
    S = maps.saliency(ds)
    whole = refine(S, ds, power)
    for chosen in ({"branch": "uncond"}, {"sample": 20}, {"sample": [20, 10], "branch": "cond"}, {"sample": [10]}):
        got = refine(S.sel(chosen), ds, power)
        xr.testing.assert_allclose(got, whole.sel(chosen))
    # without labels there is nothing to match by: a map alone meets every picture
    bare = S.isel(sample=0, branch=0, drop=True)
    alone = refine(bare, ds, power)
    assert alone.dims == ("sample", "branch", *CONCEPTS)
    np.testing.assert_allclose(alone[0, 0], whole[0, 0], rtol=1e-12)
    np.testing.assert_allclose(alone.sel(sample=20), refine(bare.expand_dims(sample=[20]), ds, power)[:, 0], rtol=1e-12)
    with pytest.raises(MapError, match=r"maps of sample \[30\]; the trace has \[10, 20\]"):
        refine(S.isel(sample=[0]).assign_coords(sample=[30]), ds)
    with pytest.raises(MapError, match="sample: 1 in the maps, 2 in the trace"):
        refine(S.isel(sample=[0]).drop_vars("sample"), ds)


@pytest.mark.parametrize(("power", "weights"), [(1, None), (2, None), (1, "lambda2")])
def test_dask_is_lazy_and_equal(power, weights):
    ds = make("float32", frames=2).isel(step=slice(2), layer=slice(2))
    lazy = ds.chunk({"sample": 1, "step": 1, "layer": 1, "image_token": 5}).assign_coords(ds.coords)
    S = maps.saliency(ds)

    def refuse(*_, **__):
        raise AssertionError("computed before .load()")

    with dask.config.set(scheduler=refuse):
        lazies = [
            transitions(lazy, weights=weights),
            refine(maps.saliency(lazy), lazy, power, weights=weights),
            refine(S.chunk(x=1, concept=2), ds, power, weights=weights),
            bounce(maps.saliency(lazy), transitions(lazy, weights=weights), power),
        ]
    refined = refine(S, ds, power, weights=weights)
    eager = [transitions(ds, weights=weights), refined, refined, bounce(S, transitions(ds, weights=weights), power)]
    with dask.config.set(scheduler="synchronous"):
        for got, expected in zip(lazies, eager, strict=True):
            assert got.chunks is not None
            assert got.dtype == expected.dtype == np.float32
            xr.testing.assert_allclose(got.load(), expected, rtol=1e-4, atol=1e-6)
            assert got.attrs == expected.attrs
        xr.testing.assert_allclose(token_rank(transitions(lazy)), token_rank(transitions(ds)), rtol=1e-4)


def test_nan_and_low_precision():
    ds = make()
    S, half = drawn(ds), make("float16")
    got = refine(S.astype("float16"), half, 2)
    assert got.dtype == refine(S.astype("float16"), half).dtype == np.float32
    expected = times(np.linalg.matrix_power(per_head(half).mean((1, 2, 3)), 2), S.astype("float16").astype(float))
    np.testing.assert_allclose(got.values.reshape(expected.shape), expected, rtol=1e-4, atol=2e-6)
    mask = S > 0
    np.testing.assert_allclose(refine(mask, ds), refine(mask.astype(float), ds), rtol=1e-12)
    ds["q_x"].loc[{"sample": 1, "step": 2, "layer": 3}] = np.nan
    for weights in (None, "lambda2"):
        A = transitions(ds, weights=weights)
        assert A[0].notnull().all() and A[1].isnull().all()
    assert refine(S, ds)[1].isnull().all() and refine(S, ds)[0].notnull().all()
    ranks = token_rank(A)
    assert ranks[0].notnull().all() and ranks[1].isnull().all()
    S[0, 0, 0, 0] = np.nan
    assert refine(S, make())[0, 0].isnull().all() and refine(S, make())[0, 1].notnull().all()


@pytest.mark.parametrize("damping", [1.0, 0.8])
def test_token_rank_is_the_left_eigenvector(damping):
    A = transitions(make(branches=2))
    got = token_rank(A, damping=damping, tolerance=1e-13)
    assert got.dims == ("sample", "branch", "y", "x")
    np.testing.assert_allclose(got.sum(("y", "x")), 1, rtol=1e-12)
    count = A.sizes["image_token"]
    matrix = damping * A.values[1, 0] + (1 - damping) / count
    values, vectors = np.linalg.eig(matrix.T)
    pi = vectors[:, abs(values - 1).argmin()].real
    np.testing.assert_allclose(got.values[1, 0].ravel(), pi / pi.sum(), rtol=1e-9)
    np.testing.assert_allclose(got.values[1, 0].ravel() @ matrix, got.values[1, 0].ravel(), rtol=1e-9)
    assert got.attrs["residual"] < 1e-13 and got.attrs["damping"] == damping
    assert 2 < got.attrs["iterations"] < 100 and got.attrs["layers"] == LAYER_LABELS
    # as many steps from anywhere lead there
    np.testing.assert_allclose(bounce({"y": 1, "x": 3}, A, 60), token_rank(A, tolerance=1e-13), rtol=1e-6)


def star(centre: float) -> xr.DataArray:
    """Two leaves and a centre that stays with a probability; without it the chain swings for ever."""
    A = np.array([[centre, (1 - centre) / 2, (1 - centre) / 2], [1, 0, 0], [1, 0, 0]])
    coords = {"patch_y": ("image_token", [0, 0, 0]), "patch_x": ("image_token", [0, 1, 2])}
    return xr.DataArray(A, coords, ("image_token", "attended_token"))


def test_a_chain_that_does_not_settle_is_refused():
    with pytest.raises(MapError, match=r"after 1000 iterations: the residual is 6\.7e-01.*damping=0.99"):
        token_rank(star(0.0))
    np.testing.assert_allclose(token_rank(star(0.0), damping=0.5).sum(), 1)
    np.testing.assert_allclose(token_rank(star(0.5)).values, [[2 / 3, 1 / 6, 1 / 6]], rtol=1e-5)
    with pytest.raises(MapError, match="damping=1.5"):
        token_rank(star(0.5), damping=1.5)


def test_bounces_are_rows_of_powers_and_the_transpose_of_refine():
    ds = make()
    A = transitions(ds)
    for n in (0, 1, 4):
        got = bounce({"y": 1, "x": 2}, A, n)
        assert got.dims == ("sample", "y", "x") if n else ("y", "x")
        row = np.linalg.matrix_power(A.values, n)[..., 6, :]
        np.testing.assert_allclose(got.values.reshape(-1, 8), row if n else row[:1], rtol=1e-12)
        assert got.attrs["bounces"] == n and got.name == "bounce"
    v, s = abs(drawn(ds)), drawn(ds, seed=6)
    spread = bounce(v, A, 3)
    np.testing.assert_allclose(spread.sum(("y", "x")), 1, rtol=1e-12)
    start = v / v.sum(("y", "x"))
    np.testing.assert_allclose((spread * s).sum(("y", "x")), (start * refine(s, A, 3)).sum(("y", "x")), rtol=1e-10)
    mask = xr.DataArray([[True, False, False, True], [False] * 4], dims=("y", "x"))
    np.testing.assert_allclose(bounce(mask, A).values.reshape(SAMPLES, 8), A.values[:, [0, 3]].mean(1), rtol=1e-12)
    np.testing.assert_allclose(bounce({"y": 0}, A).values.reshape(SAMPLES, 8), A.values[:, :4].mean(1), rtol=1e-12)
    assert bounce(mask & False, A).isnull().all()
    with pytest.raises(MapError, match="negative values"):
        bounce(drawn(ds), A)
    for token in ({"y": 2, "x": 0}, {"row": 1}):
        with pytest.raises(MapError, match=r"no token at \{.*the trace's grid is \{'y': 2, 'x': 4\}"):
            bounce(token, A)


@pytest.mark.parametrize("count", [1, 2, 3, 20, 150])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
def test_second_eigenvalue(count, sharpness):
    A = softmax(sharpness * np.random.default_rng(count).normal(size=(count, count)), 1)
    values = np.sort(abs(np.linalg.eigvals(A)))
    expected = values[-2] if count > 1 else 0
    assert second_eigenvalue(A) == pytest.approx(expected, abs=1e-5)
    assert second_eigenvalue(A.astype("float32")) == pytest.approx(expected, abs=1e-4)


def test_second_eigenvalue_of_chains_that_are_known():
    turn = np.roll(np.eye(30), 1, axis=1)
    assert second_eigenvalue(0.7 * turn + 0.3 / 30) == pytest.approx(0.7), "a pair of complex ones"
    apart = np.kron(np.eye(2), np.full((10, 10), 0.1))
    assert second_eigenvalue(apart) == pytest.approx(1), "two rooms without a door"
    assert second_eigenvalue(0.9 * apart + 0.1 / 20) == pytest.approx(0.9), "and with one"


def test_heads_weighted_by_how_slowly_they_mix():
    ds = make()
    ds["q_x"] *= xr.DataArray([3.0, 0.3], dims="head")
    each = per_head(ds)
    weights = np.sort(abs(np.linalg.eigvals(each)), -1)[..., -2][..., None, None]
    assert weights[:, :, :, 0].mean() > 2 * weights[:, :, :, 1].mean()
    expected = (weights * each).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    got = transitions(ds, weights="lambda2")
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert abs(got - transitions(ds)).max() > 0.01
    S = drawn(ds)
    np.testing.assert_allclose(refine(S, ds, weights="lambda2").values.reshape(SAMPLES, 3, 8), times(expected, S),
                               rtol=1e-4, atol=1e-6)  # fmt: skip
    one = transitions(ds, layers=4, steps=5, heads=[0], weights="lambda2")
    np.testing.assert_allclose(one, each[:, 2, 2, 0], rtol=1e-10)


def test_maps_on_another_grid_are_refused():
    ds = make(frames=2)
    S = drawn(ds)
    with pytest.raises(
        MapError, match=r"differ in x from the trace's grid, \{'frame': 2, 'y': 2, 'x': 4\}.*resize\(maps, y=2"
    ):
        refine(S.isel(x=slice(3)), ds)
    with pytest.raises(MapError, match="differ in frame"):
        refine(S.isel(frame=0), ds)
    with pytest.raises(MapError, match=r"differ in y .*maps.drop_vars\('y'\)"):
        refine(S.assign_coords(y=[5, 6]), ds, 2)
    resized = dp.metrics.resize(dp.metrics.resize(S, 6, 12), 2, 4)
    xr.testing.assert_allclose(refine(resized, ds), refine(S, ds))
    with pytest.raises(
        MapError, match=r"expected maps \(an xarray.DataArray with the dims \('frame', 'y', 'x'\)\), got ndarray"
    ):
        refine(S.values, ds)
    with pytest.raises(MapError, match="patch_x"):
        refine(S, ds.drop_vars("patch_x"))


def test_wrong_use_is_refused():
    ds = make()
    S, A = drawn(ds), transitions(ds)
    with pytest.raises(MapError, match=r"self-attention needs 'q_x' and 'k_x'; .*record=\('q_x', 'k_x'\)"):
        refine(S, ds[["q_x", "o_x"]])
    with pytest.raises(MapError, match="layer 2 does not exist for q_x and k_x"):
        transitions(ds, layers=2)
    with pytest.raises(MapError, match="heads='each' is neither"):
        transitions(ds, heads="each")
    with pytest.raises(MapError, match="head 5 does not exist"):
        transitions(ds, heads=[5])
    with pytest.raises(MapError, match="weights='lambda' is none of"):
        transitions(ds, weights="lambda")
    with pytest.raises(MapError, match=r"expected a trace .*got ndarray"):
        refine(S, A.values)
    for power in (-1, 1.5, True):
        with pytest.raises(MapError, match="is no number of steps"):
            refine(S, ds, power)
    with pytest.raises(MapError, match="bounces=-1"):
        bounce(S, A, -1)
    for choice in ({"layers": [3]}, {"steps": 0}, {"heads": [0]}, {"weights": "lambda2"}):
        with pytest.raises(MapError, match=r"give them to transitions\(ds, …\)"):
            refine(S, A, **choice)
    for function in (token_rank, lambda chain: bounce(S, chain), lambda chain: refine(S, chain.q_x)):
        with pytest.raises(MapError, match=r"that transitions\(ds\) returns, found a Data(set|Array) of dims"):
            function(ds)
    assert transitions(ds).attrs["steps"] == STEP_LABELS
