"""Real images and videos through the model once."""

import numpy as np
import pytest
import torch
from PIL import Image

import dit_probe as dp
from dit_probe import testing
from dit_probe.anatomy import Anatomy, families
from dit_probe.errors import ModelError, TraceError
from probes import ConceptAttention

PROBE = ConceptAttention(["sun", "sky"], layers=[0, 1], through="all")
# Families that say how real images enter, and one pipeline of each.
CASES = dict(
    reversed([case for case in testing.pipeline_cases() if type(families()[case[0]]).prepare is not Anatomy.prepare])
)


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def is_video(pipe) -> bool:
    return hasattr(pipe, "video_processor")


def samples(pipe, count: int) -> list:
    call = testing.find(pipe).tiny_call
    frames = call.get("num_frames", 1)
    pictures = [picture(index, call["height"], call["width"]) for index in range(count * frames)]
    return [pictures[frames * index :][:frames] for index in range(count)] if is_video(pipe) else pictures


def diffuses(pipe) -> bool:
    return not hasattr(pipe.scheduler, "scale_noise")


@pytest.fixture(params=sorted(CASES.items()), ids="-".join)
def pipe(request, pipelines):
    return pipelines(*request.param)


def encoded(pipe, images, prompts="a sun", **options):
    with dp.trace(pipe, PROBE, progress=False) as run:
        prediction = dp.encode(pipe, images, prompts, **options)
    return prediction, run.dataset.load()


def test_encode_records_one_step_at_that_timestep(pipe):
    images = samples(pipe, 2)
    before = dp.encode(pipe, images, ["a sun", "a boat"], timestep=300)
    prediction, ds = encoded(pipe, images, ["a sun", "a boat"], timestep=300)
    assert torch.equal(prediction, before)
    assert testing.leftovers(pipe) == []
    assert ds.sizes["step"] == 1 and ds.timestep.values.tolist() == [300]
    assert ds.prompt.values.tolist() == ["a sun", "a boat"]
    assert ds.done.all() and np.isfinite(ds.o_x).all()
    kept = np.stack([np.asarray(frame) for frame in images[0]]) if is_video(pipe) else np.asarray(images[0])
    assert np.array_equal(ds.image[0], kept)
    maps = dp.maps.saliency(ds)
    assert ("frame" in maps.dims) == is_video(pipe)
    assert maps.sizes["y"] / maps.sizes["x"] == kept.shape[-3] / kept.shape[-2]


def test_no_result_depends_on_batching(pipe):
    images = samples(pipe, 2)
    _, together = encoded(pipe, images)
    _, alone = encoded(pipe, images[1:])
    np.testing.assert_allclose(together.o_c.isel(sample=1), alone.o_c.isel(sample=0), atol=1e-5)


def test_noise_grows_with_the_timestep_and_hides_the_image(pipe):
    images = samples(pipe, 2)
    apart = []
    for timestep in (0, 500, 1000):
        _, ds = encoded(pipe, images, timestep=timestep)
        apart.append(float(abs(ds.v_x.isel(sample=0, layer=0) - ds.v_x.isel(sample=1, layer=0)).mean()))
    assert apart[0] > apart[1] > apart[2]
    if not diffuses(pipe):  # diffusion models keep a trace of the image at their last timestep
        assert apart[2] < 1e-6


def test_noise_is_mixed_as_the_scheduler_does(pipe):
    family = testing.find(pipe)
    images = samples(pipe, 1)
    inputs = family.prepare(pipe, [images[0] if is_video(pipe) else images], ["a sun"], 7)
    seen = {}
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    dp.encode(pipe, images, "a sun", timestep=250, seed=7)
    handle.remove()
    if diffuses(pipe):
        kept = pipe.scheduler.alphas_cumprod[250]
        expected = kept.sqrt() * inputs.latents + (1 - kept).sqrt() * inputs.noise
    else:
        expected = 0.75 * inputs.latents + 0.25 * inputs.noise
    torch.testing.assert_close(seen["hidden_states"], expected)
    assert float(seen["timestep"][0]) * family.timestep_scale == pytest.approx(250)


def test_wrong_use(pipe):
    images = samples(pipe, 2)
    with pytest.raises(TraceError, match="timestep=1500"):
        dp.encode(pipe, images, "a sun", timestep=1500)
    with pytest.raises(TraceError, match="3 prompts for 2 images"):
        dp.encode(pipe, images, ["a sun"] * 3)
    with pytest.raises(TraceError, match="list is empty"):
        dp.encode(pipe, [], "a sun")
    with pytest.raises(TraceError, match="this pipeline encodes"):
        dp.encode(pipe, picture(0, 16, 16) if is_video(pipe) else [[picture(0, 16, 16)]], "a sun")
    with pytest.raises(ModelError, match="needs the pipeline"):
        dp.encode(pipe.transformer, images, "a sun")


def test_families_that_cannot_are_refused(pipelines):
    cases = dict(testing.pipeline_cases())
    unable = [family for family in cases if type(families()[family]).prepare is Anatomy.prepare]
    assert "mochi" in unable
    with pytest.raises(ModelError, match="real images cannot be encoded for mochi models yet"):
        dp.encode(pipelines("mochi"), [picture(0, 16, 16)], "a sun")
