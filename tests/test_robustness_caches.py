"""Caches of diffusers: what they skip is named, whatever was asked for; one that skips nothing passes."""

import contextlib

import diffusers
import pytest
import torch
from robustness_cases import PROBE, call, caller, need, replayed, same, unharmed
from tracing_cases import WORDS

import dit_probe as dp
from dit_probe import anatomy, testing
from dit_probe.errors import ModelError, TraceError

# FasterCache makes a grid without saying in which order.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

STEPS = 4
EVER = (-1, 1001)


def clock(pipe):
    """The timestep, for the caches that ask for it; the transformer may be called without a pipeline."""
    return lambda: 500 if pipe.current_timestep is None else pipe.current_timestep


def first_block(pipe, skips):
    return "FirstBlockCacheConfig", {"threshold": 1e9 if skips else 0.0}


def pyramid(pipe, skips):
    options = {"spatial_attention_block_skip_range": 2 if skips else 1, "spatial_attention_timestep_skip_range": EVER}
    return "PyramidAttentionBroadcastConfig", {**options, "current_timestep_callback": clock(pipe)}


def faster(pipe, skips):
    distilled = anatomy.find(pipe).family == "flux"  # else it leaves out half of the rows, too
    return "FasterCacheConfig", {
        "spatial_attention_block_skip_range": 2 if skips else 1,
        "spatial_attention_timestep_skip_range": (-1, 990) if distilled else EVER,
        "unconditional_batch_skip_range": 2 if skips else 1,
        "unconditional_batch_timestep_skip_range": EVER,
        "current_timestep_callback": clock(pipe),
        "attention_weight_callback": lambda module: 0.3,
        "is_guidance_distilled": distilled,
        "tensor_format": "BFCHW",
    }


def taylor(pipe, skips):
    return "TaylorSeerCacheConfig", {"cache_interval": 2, "disable_cache_before_step": 1 if skips else 10}


def taylor_lite(pipe, skips):
    name, options = taylor(pipe, skips)
    return name, {**options, "use_lite_mode": True}


def magnitude(pipe, skips):
    ratios = {"mag_ratios": [0.5] * STEPS, "threshold": 10.0 if skips else 0.0, "retention_ratio": 0.1}
    return "MagCacheConfig", {"num_inference_steps": STEPS, **ratios}


def calibration(pipe, skips):
    return "MagCacheConfig", {"num_inference_steps": STEPS, "calibrate": True}


def enable(pipe, cache, skips=True, **options):
    name, given = cache(pipe, skips)
    need(name)
    pipe.transformer.enable_cache(getattr(diffusers, name)(**given, **options))
    return pipe


ALL = "transformer_blocks.0, transformer_blocks.1, transformer_blocks.2"
LATER = "transformer_blocks.1, transformer_blocks.2"
CACHES = [
    ("flux", first_block, rf"3 block\(s\) did not run their attention \({LATER}, single_transformer_blocks.0\)"),
    ("flux", pyramid, rf"4 block\(s\) did not run their attention \({ALL}, single_transformer_blocks.0\)"),
    ("flux", faster, rf"4 block\(s\) did not run their attention \({ALL}"),
    ("flux", taylor, rf"4 block\(s\) did not run their attention \({ALL}"),
    ("flux", taylor_lite, rf"4 block\(s\) did not run their attention \({ALL}"),
    ("flux", magnitude, rf"4 block\(s\) did not run their attention \({ALL}"),
    ("cogvideox", first_block, rf"2 block\(s\) did not run their attention \({LATER}\)"),
    ("cogvideox", pyramid, rf"3 block\(s\) did not run their attention \({ALL}\)"),
    ("cogvideox", faster, "transformer_blocks.0: ran on 1 rows of the 2 that the transformer was called on"),
    ("cogvideox", magnitude, rf"3 block\(s\) did not run their attention \({ALL}\)"),
]
IDS = [f"{family}-{cache.__name__}" for family, cache, _ in CACHES]


@pytest.mark.parametrize(("family", "cache", "message"), CACHES, ids=IDS)
def test_what_a_cache_skips_is_named(family, cache, message):
    pipe = enable(testing.tiny_pipeline(family), cache)
    with pytest.raises(TraceError, match=message), dp.trace(pipe, PROBE, progress=False):
        call(family, pipe, num_inference_steps=STEPS)
    assert testing.leftovers(pipe) == []


@pytest.mark.parametrize(("family", "cache"), [case[:2] for case in CACHES] + [("flux", calibration)])
def test_a_cache_that_skips_nothing(family, cache, pipelines):
    pipe = enable(testing.tiny_pipeline(family), cache, skips=False)
    ds = replayed(pipe, caller(family, num_inference_steps=STEPS))
    assert same(ds, unharmed(pipelines(family), caller(family, num_inference_steps=STEPS)))


@pytest.mark.parametrize("cache", [first_block, magnitude, pyramid])
def test_steps_before_a_cache_skips_are_recorded(cache, pipelines):
    """The steps that are not recorded are none of the trace's business, and go on with the cache."""
    pipe = enable(testing.tiny_pipeline("flux"), cache)
    probe = dp.Probe(WORDS, record=PROBE.record, layers="all", through="all", steps=[0])
    run = caller("flux", num_inference_steps=STEPS)
    ds = unharmed(pipe, run, probe)
    assert same(ds, unharmed(pipelines("flux"), run, probe))
    assert not torch.equal(run(pipe), run(pipelines("flux")))


def test_a_block_that_ran_is_not_trusted_when_later_ones_are_skipped():
    """FirstBlockCache makes up for the blocks that it skips in what the first one returns."""
    pipe = enable(testing.tiny_pipeline("flux"), first_block)
    with pytest.raises(TraceError, match=LATER):
        unharmed(pipe, caller("flux"), dp.Probe(record=["x"], layers=[0]))


@pytest.mark.parametrize("path", ["context_embedder", "transformer_blocks.1.ff_context"])
def test_a_cache_on_what_the_concept_stream_calls_is_refused(path):
    pipe = testing.tiny_pipeline("flux")
    enable(pipe, taylor, cache_identifiers=[path])
    with pytest.raises(ModelError, match=rf"TaylorSeerCacheHook on {path} keeps.*disable_cache\(\)"):
        dp.trace(pipe, PROBE)
    pipe.transformer.disable_cache()
    with pytest.raises(ModelError, match=rf"TaylorSeerCacheHook on {path} keeps"), dp.trace(pipe, PROBE):
        enable(pipe, taylor, cache_identifiers=[path])
        call("flux", pipe)
    assert testing.leftovers(pipe) == []


def test_a_layer_that_is_left_out_is_named():
    need("LayerSkipConfig")
    from diffusers.hooks import apply_layer_skip

    pipe = testing.tiny_pipeline("cogvideox")
    apply_layer_skip(pipe.transformer, diffusers.LayerSkipConfig(indices=[1]))
    with pytest.raises(TraceError, match=r"1 block\(s\) did not run their attention \(transformer_blocks.1\)"):
        unharmed(pipe, caller("cogvideox"))


def with_sea_cache(threshold, tracing):
    """Outputs of three forwards under SeaCache, which asks to be told the step; no pipeline of these families does."""
    tiny = testing.tiny_model("cogvideox")
    model, outputs = tiny.transformer, []
    model.enable_cache(
        diffusers.SeaCacheConfig(
            threshold=threshold,
            cache_end_steps=0,
            raw_vision_callback=lambda module, args, kwargs: [*kwargs["hidden_states"]],
        )
    )
    with torch.no_grad(), tracing(model):
        for step, sigma in enumerate((0.9, 0.6, 0.3)):
            with model.cache_context("cond", step_index=step, sigma=sigma, num_inference_steps=3):
                outputs.append(model(**{**tiny.inputs, "timestep": torch.full((2,), round(1000 * sigma))}).sample)
    return torch.stack(outputs)


def test_sea_cache():
    need("SeaCacheConfig")
    probe = dp.Probe(record=["o_x", "x"], layers="all", steps=range(3))

    def traced(model):
        return dp.trace(model, probe, progress=False)

    with pytest.raises(TraceError, match=rf"step 1: 3 block\(s\) did not run their attention \({ALL}\)"):
        with_sea_cache(1e9, traced)
    plain = with_sea_cache(0.0, contextlib.nullcontext)
    assert not torch.equal(plain, with_sea_cache(1e9, contextlib.nullcontext))
    assert torch.equal(plain, with_sea_cache(0.0, traced))
