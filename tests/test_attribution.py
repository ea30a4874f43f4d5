"""Gradients by activations: against finite differences through edits, and against plain torch."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks

import dit_probe as dp
from dit_probe import anatomy, causal, testing
from dit_probe.errors import EditError, MetricError, ProbeError, SiteError

FAMILIES = ("flux", "sd3", "cogvideox", "hunyuan-video", "lumina2")  # joint, masked, and single blocks
SITES = ("q_x", "k_p", "v_x", "o_x", "x", "p")
IMAGE_OUTPUT = {"flux": 1, "sd3": 1, "cogvideox": 0}

tiny_model = cache(testing.tiny_model)


def predict(tiny: testing.TinyModel) -> torch.Tensor:
    return tiny.transformer(**tiny.inputs)[0]


def weighted(tiny: testing.TinyModel) -> torch.Tensor:
    """A number that depends on each row in its own way."""
    found = predict(tiny)
    return (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(7))).sum()


def layers_of(tiny: testing.TinyModel) -> tuple[int, ...]:
    return tuple(block.layer for block in anatomy.find(tiny.transformer).blocks(tiny.transformer))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_differences_through_an_edit(family: str):
    tiny = tiny_model(family, dtype=torch.float64)
    layer = layers_of(tiny)[1]
    found = causal.gradients(tiny.transformer, lambda: weighted(tiny), SITES, layers=[layer])
    for site in SITES:
        gradient = found[f"gradient_{site}"].isel(step=0, layer=0).values
        way = torch.from_numpy(np.random.default_rng(1).standard_normal(gradient.shape))

        def moved(by: float, site=site, way=way) -> float:
            edit = dp.Edit(site, lambda a, point: a + by * way, layers=[layer])
            with torch.no_grad(), dp.trace(tiny.transformer, edits=[edit], progress=False):
                return weighted(tiny).item()

        slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
        assert float((gradient * way.numpy()).sum()) == pytest.approx(
            slope, rel=1e-3, abs=1e-4 * np.abs(gradient).sum()
        )
    assert float(found.metric) == pytest.approx(weighted(tiny).item(), rel=1e-12)
    assert testing.leftovers(tiny.transformer) == []


@pytest.mark.parametrize("family", IMAGE_OUTPUT)
def test_gradients_of_a_stream_are_those_of_plain_torch(family: str):
    tiny = tiny_model(family)
    blocks = anatomy.find(tiny.transformer).blocks(tiny.transformer)[:2]
    kept: list[torch.Tensor] = []
    handles = [
        block.module.register_forward_hook(lambda module, args, output: kept.append(output[IMAGE_OUTPUT[family]]))
        for block in blocks
    ]
    expected = torch.autograd.grad(weighted(tiny), kept)
    for handle in handles:
        handle.remove()
    found = causal.gradients(tiny.transformer, lambda: weighted(tiny), ["x"], layers=[0, 1])
    for layer, (x, slope) in enumerate(zip(kept, expected, strict=True)):
        np.testing.assert_allclose(found.gradient_x.sel(layer=layer)[:, 0], slope, rtol=1e-4, atol=1e-6)
        by_hand = (x * slope).sum(-1).detach()
        np.testing.assert_allclose(found.attribution_x.sel(layer=layer)[:, 0], by_hand, rtol=1e-4, atol=1e-5)
    assert found.attribution_x.dims == ("sample", "step", "layer", "image_token")
    assert dp.maps.grid(found.attribution_x).sizes["y"] * dp.maps.grid(found.attribution_x).sizes["x"] > 1


def test_attributions_of_a_linear_number_add_up_to_it():
    tiny, kept = tiny_model("sd3"), []
    last = anatomy.find(tiny.transformer).blocks(tiny.transformer)[-1]
    handle = last.module.register_forward_hook(lambda module, args, output: kept.append(output[1]))

    def linear() -> torch.Tensor:
        predict(tiny)
        return (kept[-1] * torch.linspace(-1, 1, kept[-1].numel()).view(kept[-1].shape)).sum()

    found = causal.gradients(tiny.transformer, linear, ["x", "o_p"], layers=[last.layer])
    handle.remove()
    assert float(found.attribution_x.sum()) == pytest.approx(float(found.metric), rel=1e-4)
    assert float(found.gradient_x.min()), float(found.gradient_x.max()) == (-1, 1)
    assert not found.gradient_o_p.any()  # nothing reads the prompt after the last block


@pytest.mark.parametrize("family", ["flux", "lumina2"])
def test_checkpoints_give_the_same_numbers_and_keep_less(family: str):
    tiny, bytes_kept = tiny_model(family), []

    def metric() -> torch.Tensor:
        bytes_kept.append(0)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            bytes_kept[-1] += tensor.numel() * tensor.element_size()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return weighted(tiny)

    whole, less = (
        causal.gradients(tiny.transformer, metric, ["o_x", "x"], layers="all", checkpoint=checkpoint)
        for checkpoint in (False, True)
    )
    assert whole.equals(less)
    assert bytes_kept[1] < bytes_kept[0] / 5
    assert testing.leftovers(tiny.transformer) == []
    assert not any("forward" in vars(module) for module in tiny.transformer.modules())


def test_a_layer_without_the_site_is_not_a_number():
    """SD3's last block hands on no prompt; the image it hands on counts."""
    tiny = tiny_model("sd3")
    found = causal.gradients(tiny.transformer, lambda: weighted(tiny), ["x", "p"])
    last = found.layer.values[-1]
    assert found.gradient_p.sel(layer=last).isnull().all() and found.gradient_p.sel(layer=0).any()
    assert found.gradient_x.sel(layer=last).notnull().all()
    with pytest.raises(SiteError, match="no 'p' after layer"):
        causal.gradients(tiny.transformer, lambda: weighted(tiny), ["p"], layers=[int(last)])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_parameters_are_left_as_they_were(checkpoint: bool):
    tiny = testing.tiny_model("flux")
    parameters = list(tiny.transformer.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters]
    found = causal.gradients(tiny.transformer, lambda: weighted(tiny), checkpoint=checkpoint)
    assert found.gradient_o_x.any(["sample", "image_token", "head", "head_dim"]).all()

    def broken() -> torch.Tensor:
        weighted(tiny)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        causal.gradients(tiny.transformer, broken, checkpoint=checkpoint)
    assert [parameter.requires_grad for parameter in parameters] == before
    assert all(parameter.grad is None for parameter in parameters)
    assert not any("forward" in vars(module) for module in tiny.transformer.modules())
    assert testing.leftovers(tiny.transformer) == []


@pytest.mark.parametrize("family", ["flux", "cogvideox"])
def test_the_denoising_loss_of_real_pictures_is_differentiated(family: str):
    pipe = testing.tiny_pipeline(family)
    draw = np.random.default_rng(0)
    frames = [Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(9)]
    shown = frames if family == "cogvideox" else frames[:2]
    error = causal.denoising(pipe, shown, "a sun", timestep=400)
    found = causal.gradients(pipe, lambda: error().mean(), ["v_p"], layers=[1])
    assert found.timestep.values.tolist() == [400] and "image" in found and found.prompt.values[0] == "a sun"
    with torch.no_grad():
        np.testing.assert_array_equal(error(), causal.denoising_loss(pipe, shown, "a sun", timestep=400))

    def loss(by: float) -> float:
        edit = dp.Edit("v_p", lambda v, point: v * (1 + by), layers=[1])
        return float(causal.denoising_loss(pipe, shown, "a sun", timestep=400, edits=[edit]).mean())

    # The direction of the activation itself: what it is to scale it
    assert float(found.attribution_v_p.sum()) == pytest.approx((loss(0.03) - loss(-0.03)) / 0.06, rel=2e-2)


def without_gradients(tiny: testing.TinyModel) -> torch.Tensor:
    with torch.no_grad():
        return weighted(tiny)


@pytest.mark.parametrize(
    ("family", "metric", "sites", "error", "says"),
    [
        ("flux", without_gradients, ["o_x"], MetricError, "without gradients, as pipelines do"),
        ("flux", predict, ["o_x"], MetricError, r"returned \(2, 12, 16\); give one number"),
        ("flux", lambda tiny: weighted(tiny).item(), ["o_x"], MetricError, "returned float; give one number"),
        ("flux", lambda tiny: weighted(tiny).detach(), ["o_x"], MetricError, "nothing to differentiate"),
        ("flux", weighted, "o_x", ProbeError, "must be a list of names"),
        ("flux", weighted, ["attends"], SiteError, "no activation is called 'attends'"),
        ("flux", weighted, ["o_c"], EditError, "edits are made at q_x"),
        ("mochi", weighted, ["o_x"], EditError, "attends row by row or in stretches"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(family: str, metric, sites, error, says: str):
    tiny = tiny_model(family)
    with pytest.raises(error, match=says):
        causal.gradients(tiny.transformer, lambda: metric(tiny), sites)
    assert testing.leftovers(tiny.transformer) == []
