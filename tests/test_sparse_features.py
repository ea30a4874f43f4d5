"""Features of sparse autoencoders: against dense computation by hand, and what putting their reconstruction in does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from tracing_cases import generate, traced

import dit_probe as dp
from dit_probe import anatomy
from dit_probe.errors import MapError, ProbeError
from probes import SparseFeatures


class Autoencoder(nn.Module):
    """Random, with more features than dims, of which about one in five is active."""

    def __init__(self, width: int, features: int = 48, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(width, features, generator=draw) / width**0.5)
        self.up = nn.Parameter(torch.randn(features, width, generator=draw) / features)
        self.bias = nn.Parameter(torch.full((features,), -0.8))

    def encode(self, a: Tensor) -> Tensor:
        return (a @ self.down + self.bias).relu()

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.up


def width_of(pipe) -> int:
    return math.prod(anatomy.find(pipe).heads(pipe.transformer))


def by_hand(ds: xr.Dataset, site: str, dictionary: Autoencoder) -> tuple[np.ndarray, np.ndarray]:
    """Dense features (sample, step, layer, token, feature) of the recorded activation, and their error."""
    a = ds[site].values
    a = a.reshape(*a.shape[:4], -1).astype(np.float64)
    down, up, bias = (p.detach().double().numpy() for p in (dictionary.down, dictionary.up, dictionary.bias))
    dense = np.maximum(a @ down + bias, 0)
    return dense, np.square(a - dense @ up).sum(-1).mean(-1)


@pytest.mark.parametrize(("family", "site"), [("flux", "x"), ("sd3", "p"), ("cogvideox", "o_x"), ("sd3", "v_p")])
def test_features_are_the_largest_of_the_dense_ones(pipelines, family: str, site: str):
    pipe = pipelines(family)
    dictionary = Autoencoder(width_of(pipe))
    probe = SparseFeatures(dictionary=dictionary, site=site, k=24, layers=[0, 1])
    output, ds = traced(pipe, probe | dp.Probe(record=[site], layers=[0, 1]))
    assert torch.equal(output, generate(pipe))
    dense, error = by_hand(ds, site, dictionary)
    value, index = ds[f"feature_{site}_value"], ds[f"feature_{site}_index"]
    token = "image_token" if site.endswith("x") else "prompt_token"
    assert value.dims == index.dims == ("sample", "step", "layer", token, "rank")
    np.testing.assert_allclose(value, -np.sort(-dense, axis=-1)[..., :24], rtol=1e-4, atol=1e-5)
    active = index.values >= 0
    assert active.any() and not active.all() and (active == (value.values > 0)).all()
    picked = np.take_along_axis(dense, np.where(active, index.values, 0).astype(int), axis=-1)
    np.testing.assert_allclose(value.values[active], picked[active], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ds[f"feature_{site}_error"], error, rtol=1e-4)
    variance = ds[site].var(token).sum(ds[site].dims[4:])
    np.testing.assert_allclose(ds[f"feature_{site}_variance"], variance, rtol=1e-4)


def rotation(width: int) -> tuple:
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    return (lambda a: a @ turn, lambda features: features @ turn.T)


@pytest.mark.parametrize(("family", "site"), [("flux", "x"), ("sd3", "o_x")])
def test_an_exact_dictionary_puts_in_what_was_there(pipelines, family: str, site: str):
    pipe = pipelines(family)
    probe = SparseFeatures(dictionary=rotation(width_of(pipe)), site=site, k=4)
    with dp.trace(pipe, probe, edits=[probe.substitution()], progress=False) as run:
        output = generate(pipe)
    torch.testing.assert_close(output, generate(pipe), rtol=1e-3, atol=1e-4)
    assert (run.dataset[f"feature_{site}_error"] < 1e-9 * run.dataset[f"feature_{site}_variance"]).all()
    assert (run.dataset[f"feature_{site}_value"] < 0).any()  # the largest in magnitude, with their signs


@pytest.mark.parametrize(("family", "site"), [("flux", "x"), ("sd3", "o_p")])
def test_what_is_recorded_is_of_what_the_reconstruction_replaced(pipelines, family: str, site: str):
    pipe = pipelines(family)
    dictionary = Autoencoder(width_of(pipe))
    probe = SparseFeatures(dictionary=dictionary, site=site, k=8, layers=[0, 1])
    before, plain = traced(pipe, probe)
    recorded = dp.Probe(record=[site], layers=[0, 1])
    with dp.trace(pipe, probe, recorded, edits=[probe.substitution()], progress=False) as run:
        output = generate(pipe)
    assert not torch.equal(output, before)
    first = run.dataset.isel(step=0, layer=0)  # before anything has changed
    for part in ("value", "index", "error", "variance"):
        assert first[f"feature_{site}_{part}"].equals(plain[f"feature_{site}_{part}"].isel(step=0, layer=0))
    put = first[site].values.reshape(*first[site].shape[:2], -1)
    dense, _ = by_hand(plain.assign({site: traced(pipe, recorded)[1][site]}), site, dictionary)
    np.testing.assert_allclose(put, dense[:, 0, 0] @ dictionary.up.detach().double().numpy(), rtol=1e-3, atol=1e-4)
    # An edit that comes after, and what the model went on with is neither: that is encoded
    after = dp.edits.zero(site, layers=[0, 1])
    with dp.trace(pipe, probe, edits=[probe.substitution(), after], progress=False) as run:
        generate(pipe)
    assert not run.dataset[f"feature_{site}_value"].any() and not run.dataset[f"feature_{site}_variance"].any()


def test_a_dictionary_a_layer(pipelines):
    pipe = pipelines("flux")
    each = {layer: Autoencoder(width_of(pipe), seed=layer) for layer in (2, 1)}
    _, ds = traced(pipe, SparseFeatures(dictionary=each, k=5))
    assert ds.layer.values.tolist() == [1, 2]
    for layer, one in each.items():
        _, alone = traced(pipe, SparseFeatures(dictionary=one, k=5, layers=[layer]))
        assert ds.feature_x_index.sel(layer=[layer]).equals(alone.feature_x_index)


def test_precision_is_that_of_the_dictionary(pipelines):
    pipe = pipelines("flux")
    dictionary = Autoencoder(width_of(pipe))
    _, single = traced(pipe, SparseFeatures(dictionary=dictionary, k=5))
    _, double = traced(pipe, SparseFeatures(dictionary=dictionary.double(), k=5))
    np.testing.assert_allclose(double.feature_x_value, single.feature_x_value, rtol=1e-4, atol=1e-5)


def test_the_map_of_a_feature_from_a_store(pipelines, tmp_path):
    pipe, path = pipelines("cogvideox"), str(tmp_path / "run.zarr")
    dictionary = Autoencoder(width_of(pipe))
    probe = SparseFeatures(dictionary=dictionary, k=48)
    with dp.trace(pipe, probe, dp.Probe(record=["x"]), store=path, progress=False):
        generate(pipe)
    ds = dp.open(path)
    (kept,) = [probe for probe in ds.attrs["identity"]["probes"] if probe["probe"] == "SparseFeatures"]
    assert (kept["site"], kept["k"], kept["dictionary"]) == ("x", 48, "Autoencoder")
    maps = dp.maps.features(ds, [3, 40], layers=[0, 1], steps=1)
    assert maps.dims == ("sample", "concept", "frame", "y", "x")
    assert maps.concept.values.tolist() == ["feature 3", "feature 40"]
    dense, _ = by_hand(ds, "x", dictionary)
    expected = dense[:, 1, :2][..., [3, 40]].mean(1).swapaxes(-1, -2).reshape(maps.shape)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-5)
    figure = dp.figures.overlay(None, maps.isel(sample=0, frame=0))
    assert [trace.type for trace in figure.data].count("heatmap") == 2
    lost = ds.load().copy(deep=True)
    lost.feature_x_index[:], lost.feature_x_value[:] = np.nan, np.nan
    assert dp.maps.features(lost, 3).isnull().all()


def test_maps_of_what_was_not_recorded_are_refused(pipelines):
    _, ds = traced(pipelines("flux"), SparseFeatures(dictionary=rotation(32), site="p", k=2, layers=[0]))
    with pytest.raises(MapError, match=r"site='x' needs 'feature_x_value'.*the probe SparseFeatures"):
        dp.maps.features(ds, 3)
    with pytest.raises(MapError, match="no dim 'image_token'"):
        dp.maps.features(ds, 3, "p")
    with pytest.raises(MapError, match="layer 1"):
        dp.maps.features(ds, 3, "p", layers=1)


def encoder(a: Tensor) -> Tensor:
    return a.relu()


def test_a_dictionary_without_decode_is_read_alone(pipelines):
    probe = SparseFeatures(dictionary=(encoder, None), k=3, layers=[1])
    _, ds = traced(pipelines("sd3"), probe)
    assert "feature_x_value" in ds and "feature_x_error" not in ds
    with pytest.raises(ProbeError, match="no reconstruction to put in"):
        probe.substitution()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SparseFeatures(), "dictionary=NoneType cannot encode"),
        (lambda: SparseFeatures(dictionary={1: 3}), "dictionary=int cannot encode"),
        (lambda: SparseFeatures(dictionary={1: (encoder, None)}, layers=[1]), "a layer says the layers: give"),
        (lambda: SparseFeatures(dictionary={-1: (encoder, None)}), "a dictionary a layer says the layers"),
        (lambda: SparseFeatures(dictionary=(encoder, None), site="o_c"), "activation of image or prompt"),
        (lambda: SparseFeatures(dictionary=(encoder, None), k=33), r"expected \(row, token, feature\) with at least k"),
        (lambda: SparseFeatures(dictionary=(lambda a: a[0], None), k=1), r"encode made \(24, 32\) of x \(1, 24, 32\)"),
        (
            lambda: (
                SparseFeatures(dictionary=(encoder, None), k=1)
                | SparseFeatures(dictionary=(encoder, None), k=2, site="p")
            ),
            "one length of 'rank', but the probes say 1 and 2",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused(pipelines, make, says: str):
    with pytest.raises(ProbeError, match=says):
        traced(pipelines("flux"), make())
