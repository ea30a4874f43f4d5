"""Causal tests of maps: exact on tiny pipelines, and the designs on effects that are known beforehand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from tracing_cases import SIZES, generate

import dit_probe as dp
from dit_probe import causal, testing
from dit_probe.edit import Point
from dit_probe.errors import EditError, MetricError, ModelError, TraceError

FAMILIES = ("flux", "sd3", "cogvideox")
PROMPTS = ["a sun in the sky", "a boat on water"]
TEXT = {"flux": {"max_sequence_length": 16}, "sd3": {"max_sequence_length": 16}, "cogvideox": {}}
same = dp.Edit("x", lambda activation, point: activation)

pipeline = cache(testing.tiny_pipeline)


def call(family: str) -> dict:
    guided = {"guidance_scale": 3.0} if family == "sd3" else {}
    return {"num_inference_steps": 2, **SIZES[family], **guided}


def pictures(family: str) -> list:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (32, 48, 3), dtype=np.uint8)) for _ in range(9)]
    return [images, images[::-1]] if family == "cogvideox" else images[:2]


def maps(*shape: int, seed: int = 0) -> xr.DataArray:
    return xr.DataArray(
        np.random.default_rng(seed).random(shape), dims=("sample", *("frame", "y", "x")[4 - len(shape) :])
    )


# --- effects


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_changes_the_pictures_of_its_own_row(family: str):
    pipe = pipeline(family)
    measure = causal.change(pipe, PROMPTS, seeds=[3, 4], **call(family))
    assert (measure(edits=[]) == 0).all()
    assert (measure(edits=[dp.edits.by_row([same, same])]) == 0).all()
    silent = dp.edits.zero("x")
    found = measure(edits=[dp.edits.by_row([same, silent])])
    assert (found[0] == 0).all() and (found[1] > 0).all()
    # The same by hand, of the second sample alone
    options = {"prompt": PROMPTS[1], "seed": 4, **call(family)}
    before = generate(pipe, **options)
    with dp.trace(pipe, edits=[silent], progress=False):
        after = generate(pipe, **options)
    by_hand = (after - before).abs()[0].mean(-3).numpy()
    if family == "cogvideox":  # the first latent frame is one frame, the others are four
        by_hand = np.stack([by_hand[:1].mean(0), by_hand[1:5].mean(0), by_hand[5:].mean(0)])
    *_, y, x = found.shape
    by_hand = by_hand.reshape(*by_hand.shape[:-2], y, by_hand.shape[-2] // y, x, -1).mean((-3, -1))
    np.testing.assert_allclose(found[1], by_hand, atol=1e-5)
    assert testing.leftovers(pipe) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_denoising_loss_is_that_of_training(family: str):
    """Latents by the autoencoder's own call, the target by the schedulers' equations."""
    pipe, shown, time, video = pipeline(family), pictures(family), 400, family == "cogvideox"
    if video:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
        pipe = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    found = causal.denoising_loss(pipe, shown, PROMPTS, timestep=time, seed=5, **TEXT[family])
    prediction = dp.encode(pipe, shown, PROMPTS, time, 5, **TEXT[family])
    pixels = np.array([[np.asarray(frame) for frame in item] if video else np.asarray(item) for item in shown])
    pixels = torch.from_numpy(pixels / 127.5 - 1).float().movedim(-1, 1)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode()
    latents = (latents - (getattr(pipe.vae.config, "shift_factor", 0) or 0)) * pipe.vae.config.scaling_factor
    if video:
        latents = latents.transpose(1, 2)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(5))
    if family == "flux":
        rows, channels, y, x = latents.shape
        prediction = prediction.reshape(rows, y // 2, x // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        prediction = prediction.reshape(latents.shape)
    target = noise - latents
    if video:
        kept = pipe.scheduler.alphas_cumprod[time]
        target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    error = (target - prediction).square().mean(2 if video else 1)
    expected = error.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-3, -1))
    assert found.dims == ("sample", *(["frame"] if video else []), "y", "x")
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_epsilon_models_predict_the_noise():
    pipe, shown = pipeline("cogvideox"), pictures("cogvideox")[:1]
    found = causal.denoising_loss(pipe, shown, "a sun", seed=2)
    prediction = dp.encode(pipe, shown, "a sun", seed=2)
    noise = torch.randn(prediction.shape[1:], generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(found.mean(), (noise - prediction[0]).square().mean(), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_words_are_worth_nothing(family: str):
    pipe, shown = pipeline(family), pictures(family)
    gap = partial(causal.denoising_gap, pipe, shown, PROMPTS, **TEXT[family])
    silent = dp.edits.by_row([same, dp.edits.zero("x")])
    assert (gap(without=PROMPTS, edits=[silent]) == 0).all()
    worth, edited = gap(without=""), gap(without="", edits=[silent])
    assert (worth != 0).any(["y", "x"]).all()
    assert (edited[0] == worth[0]).all() and (edited[1] != worth[1]).any()


def test_regions_weight_tokens_by_what_is_covered():
    values = xr.DataArray([[[1.0, 2.0], [3.0, 4.0]]], dims=("sample", "y", "x"), coords={"y": [5, 6], "x": [7, 8]})
    masks = np.zeros((3, 1, 4, 4), dtype=bool)
    masks[0, 0, :2, :2], masks[0, 0, 0, 2] = True, True  # the first token, and a quarter of the second
    masks[2] = True
    found = causal.by_region(values, xr.DataArray(masks, dims=("concept", "sample", "y", "x")))
    inside, outside = found.sel(region="inside", sample=0), found.sel(region="outside", sample=0)
    np.testing.assert_allclose(inside, [(1 + 0.5) / 1.25, np.nan, 2.5])
    np.testing.assert_allclose(outside, [(1.5 + 3 + 4) / 2.75, 2.5, np.nan])
    third = xr.DataArray(np.ones((1, 3, 3), dtype=bool), dims=("sample", "y", "x"))  # a third three times is one
    assert causal.by_region(values[:, :1, :1], third).sel(region="outside").isnull().all()


def test_regions_follow_the_frames_of_a_video():
    values = xr.DataArray([[[1.0]], [[10.0]], [[100.0]]], dims=("frame", "y", "x"))
    masks = xr.DataArray(np.arange(9) < 3, dims="frame").expand_dims(y=2, x=2).transpose("frame", "y", "x")
    found = causal.by_region(values, masks)  # frame 0, and two of the next four
    np.testing.assert_allclose(found, [(1 + 5) / 1.5, (5 + 100) / 1.5])
    everywhere = causal.by_region(values, masks.isel(frame=0, drop=True))
    np.testing.assert_allclose(everywhere, [37, np.nan])


# --- designs


def counted(weights: np.ndarray, calls: list[np.ndarray]):
    """An effect that is known: the weights of the ablated tokens, summed; and what it was called with."""

    def effect(edits):
        ablated = torch.zeros(*weights.shape, 1)
        for edit in edits:
            point = Point("x", 0, "joint", 0, "cond", slice(0, 1), slice(1, 2))
            ablated = edit.function(ablated, point)
        calls.append(ablated[..., 0].numpy() > 0)
        return xr.DataArray((weights * calls[-1]).sum(1), dims="sample")

    return effect


def marked(tokens: np.ndarray) -> dp.Edit:
    return dp.Edit("x", lambda a, point: torch.from_numpy(tokens).float().expand(a.mT.shape).mT)


def test_controls_have_as_many_tokens_as_the_top():
    chosen, calls = maps(2, 4, 5), []
    found = causal.ablation(counted(np.ones((2, 20)), calls), chosen, k=[3, 7], draws=4, ablate=marked)
    none, top, *controls = calls
    assert not none.any() and (found.none == 0).all()
    assert (top == found.tokens.values.reshape(2, 20)).all()
    for row, k in zip((0, 1), (3, 7), strict=True):
        values = chosen.values[row].ravel()
        assert top[row].sum() == k and values[top[row]].min() > values[~top[row]].max()
    assert len(controls) == 8
    assert all((control.sum(1) == [3, 7]).all() and (control != top).any(1).all() for control in controls)
    for place in controls[4:]:  # the same shape, around the border
        for row in (0, 1):
            rolls = [np.roll(top[row].reshape(4, 5), (y, x), (0, 1)).ravel() for y in range(4) for x in range(5)]
            assert any((place[row] == roll).all() for roll in rolls)
    assert len({control.tobytes() for control in controls}) == 8
    assert found.random.dims == ("draw", "sample") and (found.random == [3, 7]).all() and (found.moved == [3, 7]).all()


@pytest.mark.parametrize("family", ["flux", "cogvideox"])
def test_ablation_of_a_pipeline(family: str):
    measure = causal.change(pipeline(family), PROMPTS, **call(family))
    shape = measure(edits=[]).shape
    ranked = xr.DataArray(np.random.default_rng(1).random(shape), dims=measure(edits=[]).dims)
    idle = causal.ablation(measure, ranked, k=2, draws=1, ablate=lambda tokens: same)
    assert all((idle[name] == 0).all() for name in ("none", "top", "random", "moved"))
    found = causal.ablation(measure, ranked, k=2, draws=2)
    assert found.tokens.sum("sample").sum() == 4 and found.random.sizes["draw"] == 2
    alone = dp.edits.by_row(
        [dp.edits.block("image", "prompt", query_tokens=row, layers="all") for row in found.tokens.values]
    )
    assert (found.top == measure(edits=[alone])).all() and (found.top > 0).any()
    assert {*causal.by_region(found, found.tokens).dims} == {"region", "sample", "draw"}


def test_curves_end_where_nothing_and_everything_is_ablated():
    chosen, calls = maps(2, 4, 5, seed=3), []
    weights = chosen.values.reshape(2, 20)
    found = causal.curves(counted(weights, calls), chosen, shares=[0, 0.25, 0.5, 1], draws=3, ablate=marked)
    assert len(calls) == 2 + 5 * 2  # the ends are shared by all orders
    total = weights.sum(1)
    assert (found.score.sel(share=0) == 0).all()
    np.testing.assert_allclose(found.score.sel(share=1), np.tile(total, (3, 1)), rtol=1e-6)
    falling = -np.sort(-weights, axis=1)
    five, ten = falling[:, :5].sum(1), falling[:, :10].sum(1)
    np.testing.assert_allclose(found.score.sel(order="deletion", share=0.25), five)
    np.testing.assert_allclose(found.score.sel(order="insertion", share=0.5), total - ten)
    by_hand = 0.25 * five / 2 + 0.25 * (five + ten) / 2 + 0.5 * (ten + total) / 2
    np.testing.assert_allclose(found.area.sel(order="deletion"), by_hand)
    assert (found.area.sel(order="deletion") > found.area.sel(order="random")).all()
    assert (found.area.sel(order="random") > found.area.sel(order="insertion")).all()


# --- patching


def test_patching_the_last_stream_gives_the_clean_picture():
    """Nothing reads the prompt after the last block of CogVideoX, which has no pooled text."""
    pipe = pipeline("cogvideox")
    table, figure = causal.patching(pipe, *PROMPTS, "x", layers=[-1], steps="all", batch=1, **call("cogvideox"))
    assert table.values.tolist() == [[1.0]] and table.step.values.tolist() == ["all"]
    assert figure.data[0].type == "heatmap" and np.asarray(figure.data[0].z).tolist() == [[1.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_no_token_leaves_the_corrupt_picture(family: str):
    table, _ = causal.patching(pipeline(family), *PROMPTS, "p", layers=[0], tokens=[], batch=1, **call(family))
    assert table.values.tolist() == [[0.0, 0.0]]
    assert table.timestep.values[0] > table.timestep.values[1]


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_cell_is_one_layer_at_one_step(family: str):
    pipe, size = pipeline(family), call(family)
    table, _ = causal.patching(pipe, *PROMPTS, "v_p", layers=[0, 2], seed=1, batch=3, **size)
    assert table.dims == ("layer", "step") and table.shape == (2, 2)
    with dp.trace(pipe, dp.Probe(record=["v_p"], layers=[0, 2]), progress=False) as run:
        clean = generate(pipe, PROMPTS[0], seed=1, **size)
    corrupt = generate(pipe, PROMPTS[1], seed=1, **size)
    for layer, step in ((0, 1), (2, 0)):
        with dp.trace(pipe, edits=[dp.edits.patch(run.dataset, "v_p", layers=[layer], steps=[step])], progress=False):
            patched = generate(pipe, PROMPTS[1], seed=1, **size)
        far = clean - corrupt
        expected = float(((patched - corrupt) * far).sum() / far.square().sum())
        assert float(table.sel(layer=layer, step=step)) == pytest.approx(expected, abs=1e-4) != 0
    brightness, _ = causal.patching(
        pipe, *PROMPTS, "v_p", layers=[2], steps=[0], seed=1, metric=lambda picture: float(picture.mean()), **size
    )
    by_hand = (patched.mean() - corrupt.mean()) / (clean.mean() - corrupt.mean())
    assert float(brightness[0, 0]) == pytest.approx(float(by_hand), rel=1e-2)


# --- what cannot be done


def odd_scheduler() -> object:
    pipe = pipeline("cogvideox")
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="sample")
    return type(pipe)(**{**pipe.components, "scheduler": scheduler})


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        (lambda: dp.edits.by_row([]), EditError, "one edit a row"),
        (lambda: dp.edits.by_row([same, replace(same, site="p")]), EditError, "all of the same site"),
        (lambda: causal.change(pipeline("flux"), ["a", "b"], seeds=[1, 2, 3]), MetricError, "2 prompts and 3 seeds"),
        (
            lambda: causal.change(pipeline("flux"), "a sun", **call("flux"))(edits=[dp.edits.by_row([same] * 2)]),
            EditError,
            "2 edits by row, but x has 1 rows",
        ),
        (lambda: causal.denoising_loss(odd_scheduler(), [], "a"), ModelError, "prediction_type='sample'"),
        (lambda: causal.denoising_loss(pipeline("flux"), [], "a"), TraceError, "the list is empty"),
        (lambda: causal.by_region(maps(1, 2, 2), maps(1, 4, 4)), MetricError, "masks are float64"),
        (lambda: causal.by_region(maps(1, 2, 2), maps(1, 3, 4) > 0), MetricError, "3 along 'y' do not fill 2"),
        (lambda: causal.by_region(maps(1, 2, 2), maps(1, 5, 2, 2) > 0), MetricError, "5 along 'frame'"),
        (lambda: causal.ablation(print, maps(1, 2, 2), k=5), MetricError, "of 4 image tokens"),
        (lambda: causal.ablation(print, maps(1, 2, 2).rename(y="layer"), k=1), MetricError, "of one concept"),
        (lambda: causal.ablation(print, maps(1, 2, 2) * np.nan, k=1), MetricError, "not finite"),
        (lambda: causal.curves(print, maps(1, 2, 2), shares=[0.5, 0.2]), MetricError, "two or more that rise"),
        (
            lambda: causal.patching(pipeline("flux"), "a sun", "a sun", "p", layers=[0], **call("flux")),
            MetricError,
            "nothing lies between them",
        ),
    ],
)
def test_what_cannot_be_tested_is_refused(do, error, says: str):
    with pytest.raises(error, match=says):
        do()
