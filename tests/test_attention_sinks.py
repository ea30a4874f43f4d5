"""The attention that tokens receive from the image, against the joint softmax of recorded queries and keys."""

import numpy as np
import pytest
import torch
from maps_cases import softmax
from tracing_cases import generate, traced

import dit_probe as dp
from dit_probe import diagnostics, testing
from dit_probe.errors import MapError
from probes.attention_sinks import AttentionSinks

RECORDED = dp.Probe(record=["q_x", "k_x", "k_p"])


def weights(ds):
    """(…, head, image query, key), image keys first, in float64."""
    q, k_x, k_p = (ds[name].values.astype(np.float64) for name in ("q_x", "k_x", "k_p"))
    logits = np.einsum("...qhd,...khd->...hqk", q, np.concatenate([k_x, k_p], -3)) / np.sqrt(q.shape[-1])
    return softmax(logits, -1)


@pytest.mark.parametrize("family", ["flux", "sd3", "cogvideox"])
def test_columns_are_those_of_the_models_own_softmax(pipelines, family):
    pipe = pipelines(family)
    plain = generate(pipe)
    output, ds = traced(pipe, AttentionSinks() | RECORDED)
    assert torch.equal(output, plain)
    expected, image = weights(ds).mean(-2), ds.sizes["image_token"]
    np.testing.assert_allclose(ds.received_x, expected[..., :image], atol=1e-6)
    np.testing.assert_allclose(ds.received_p, expected[..., image:], atol=1e-6)

    pads = np.isin(ds.token.values, ["<pad>"])
    if family == "sd3":  # CLIP pads with its end mark; the first one is real
        clip = pipe.tokenizer_max_length
        ends = ds.token.values[:, :clip] == "<|endoftext|>"
        pads[:, :clip] = ends & (ends.cumsum(-1) > 1)
    assert pads.any() and not pads.all()
    assert np.array_equal(ds.padding, np.broadcast_to(pads[:, None, None], ds.padding.shape))

    share = diagnostics.modality_share(ds)
    assert share.dims == ("stream", "sample", "step", "layer", "head")
    np.testing.assert_allclose(share.sum("stream"), 1, atol=1e-5)
    every = np.concatenate([np.zeros((len(pads), image), bool), pads], -1)
    padding = np.where(every[:, None, None, None], expected, 0).sum(-1)
    np.testing.assert_allclose(share.sel(stream="padding"), padding, atol=1e-5)
    np.testing.assert_allclose(share.sel(stream="image"), expected[..., :image].sum(-1), atol=1e-5)


def test_padding_that_is_not_known_is_nan(pipelines):
    _, ds = traced(pipelines("flux"), AttentionSinks(), call={"prompt_2": "a boat"})
    assert (ds.padding == -1).all() and float(ds.received_p.min()) > 0
    assert np.isnan(diagnostics.sinks(ds, times=0).padding).all()
    share = diagnostics.modality_share(ds)
    assert np.isnan(share.sel(stream=["prompt", "padding"])).all()
    np.testing.assert_allclose(share.sel(stream="image") + ds.received_p.sum("prompt_token"), 1, atol=1e-5)


@pytest.mark.parametrize(("family", "registers"), [("flux", False), ("auraflow", True)])
def test_a_bare_transformer_whose_prompt_is_no_text_at_single_blocks_as_well(family, registers):
    tiny = testing.tiny_model(family)
    with torch.no_grad(), dp.trace(tiny.transformer, AttentionSinks(layers="all"), progress=False) as run:
        tiny.transformer(**tiny.inputs)
    ds = run.dataset.load()
    assert {*ds.kind.values} == {"joint", "single"}
    assert (ds.padding == -1).all()
    rest = 1 - ds.received_x.sum("image_token") - ds.received_p.sum("prompt_token")
    assert float(rest.min()) > 1e-3 if registers else float(abs(rest).max()) < 1e-5


def test_sinks_of_a_trace(tmp_path, pipelines):
    pipe, words = pipelines("flux"), ["a sun in the sky", "a boat"]
    probe = AttentionSinks(layers=[0, 2])
    with dp.trace(pipe, probe, store=tmp_path / "sinks.zarr", progress=False):
        generate(pipe, words)
    ds = dp.open(tmp_path / "sinks.zarr")
    assert ds.received_x.chunks is not None
    table = diagnostics.sinks(ds, times=1.2).to_dataframe()
    received = np.concatenate([ds.received_x, ds.received_p], -1).mean((1, 3)) * ds.received_x.sizes["image_token"]
    received *= 1 + ds.sizes["prompt_token"] / ds.sizes["image_token"]
    assert len(table) == (received > 1.2).sum() > 0
    assert table.times.is_monotonic_decreasing
    tokens, pads = ds.token.values, ds.padding.values[:, 0, 0]
    for row in table.itertuples():
        at = row.position + (ds.sizes["image_token"] if row.stream == "prompt" else 0)
        assert row.times == pytest.approx(received[row.sample, [0, 2].index(row.layer), at], rel=1e-5)
        if row.stream == "prompt":
            assert row.token == tokens[row.sample, row.position] and row.padding == pads[row.sample, row.position]
            assert np.isnan(row.patch_y)
        else:
            assert (row.patch_y, row.patch_x) == (ds.patch_y[row.position], ds.patch_x[row.position])
    assert set(table.stream) == {"image", "prompt"}
    assert set(diagnostics.sinks(ds, times=1.2, layers=2).layer.values) == {2}
    assert diagnostics.sinks(ds, times=1e6).sizes == {"sink": 0}


def test_halves_of_guidance_have_their_own_padding(pipelines):
    _, ds = traced(pipelines("sd3"), AttentionSinks(layers=[0]), branch="both")
    pads = ds.padding.isel(sample=0, step=0, layer=0).sum("prompt_token")
    assert float(pads.sel(branch="uncond")) > float(pads.sel(branch="cond")) > 0
    np.testing.assert_allclose(diagnostics.modality_share(ds).sum("stream"), 1, atol=1e-5)
    assert set(diagnostics.sinks(ds, times=0).branch.values) == {"cond", "uncond"}


def test_what_was_not_recorded_is_refused(pipelines):
    _, ds = traced(pipelines("flux"), RECORDED)
    for function in (diagnostics.modality_share, diagnostics.sinks):
        with pytest.raises(MapError, match=r"'received_x' and 'received_p' and 'padding'; .*the probe AttentionSinks"):
            function(ds)
