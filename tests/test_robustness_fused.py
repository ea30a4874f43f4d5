"""Fused projections: one Linear in place of three, as `fuse_qkv_projections` makes them."""

import numpy as np
import pytest
import torch
from robustness_cases import FAMILIES, PROBE, caller, need, replayed, unharmed

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.errors import ModelError

# The other families whose processors know how to.
OTHERS = ["auraflow", "chroma", "flux2", "flux3", "ideogram4", "krea2", "longcat", "motif-video", "qwenimage21"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_pipeline_is_recorded_as_an_unfused_one(family, pipelines):
    pipe = testing.tiny_pipeline(family)
    pipe.transformer.fuse_qkv_projections()
    ds, plain = replayed(pipe, caller(family)), unharmed(pipelines(family), caller(family))
    for name in PROBE.record:
        np.testing.assert_allclose(ds[name], plain[name], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
def test_every_check_holds_on_fused_projections(family):
    need(*anatomy.families()[family].classes)
    tiny = testing.tiny_model(family)
    model, before = tiny.transformer, tiny.transformer(**tiny.inputs)[0]
    model.fuse_qkv_projections()
    assert any(block.attention.fused_projections for block in anatomy.find(model).blocks(model))
    found = dp.verify(model, inputs=tiny.inputs, concepts=tiny.concepts)
    assert found.ok, str(found)
    for after, expected in zip(model(**tiny.inputs)[0], before, strict=True):
        np.testing.assert_allclose(after, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("variant", ["sd3.5-large", "sd3.5-medium"])
def test_fused_projections_that_lose_their_norms_are_refused(variant):
    tiny = testing.tiny_model("sd3", variant)
    tiny.transformer.fuse_qkv_projections()
    with pytest.raises(ModelError, match=r"leaves out norm_q.*unfuse_qkv_projections\(\) first"):
        dp.trace(tiny.transformer, PROBE, concepts=tiny.concepts)
    assert testing.leftovers(tiny.transformer) == []
    tiny.transformer.unfuse_qkv_projections()
    assert dp.verify(tiny.transformer, inputs=tiny.inputs).ok


def test_a_model_that_diffusers_fails_to_fuse_is_traced_as_it_is_left():
    tiny = testing.tiny_model("motif-video", "masked")
    with pytest.raises(AttributeError, match="'MotifVideoCrossAttention' object has no attribute 'use_bias'"):
        tiny.transformer.fuse_qkv_projections()
    assert dp.verify(tiny.transformer, inputs=tiny.inputs).ok
