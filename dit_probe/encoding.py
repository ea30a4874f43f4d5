"""Real images and videos: VAE, noise, one forward pass; the paper's segmentation setting."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit_probe import tracing
from dit_probe.anatomy import find, transformer_of
from dit_probe.errors import ModelError, TraceError
from dit_probe.pipelines import Generation


@dataclass(frozen=True)
class Noised:
    """Real images or videos at one noise level, as `predict` takes them through the transformer.

    Attributes:
        pictures: a list of frames each; an image is a video of one frame.
        prompts: one per picture.
        seed: of the noise.
        clean: latents without noise, as the transformer takes them.
        noise: standard normal, of the same shape.
        mixed: the two, mixed by the pipeline's own scheduler.
        timestep: noise level, 0 to 1000.
        sigma: share of noise in the mixture.
        call: the transformer's arguments other than the latents and the timestep.
        text: what was given to the pipeline's ``encode_prompt`` beside the prompts.
    """

    pictures: Sequence[Sequence[Image.Image]]
    prompts: Sequence[str]
    seed: int
    clean: Tensor
    noise: Tensor
    mixed: Tensor
    timestep: float
    sigma: float
    call: Mapping[str, Any]
    text: Mapping[str, Any]


def encode(
    pipe: Any,
    images: Any,
    prompts: str | Sequence[str],
    timestep: float = 500,
    seed: int = 0,
    **text: Any,
) -> Tensor:
    """Take real images or videos through the model once, at one noise level; inside a `trace` this is recorded.

    The clean latent is mixed with noise by the pipeline's own scheduler; for flow-matching models
    ``(1 - t / 1000) latent + (t / 1000) noise``.

    Args:
        pipe: the pipeline.
        images: an image or a list of them (PIL, or uint8 arrays (y, x, 3)); for video models a video (a list of
            frames) or a list of videos. Sizes are rounded down to whole tokens by the pipeline's processor.
        prompts: one for all, or one per image.
        timestep: noise level, 0 (clean) to 1000 (noise only).
        seed: of the noise. Every row gets the same noise, so that no result depends on batching.
        **text: for the pipeline's ``encode_prompt`` (``max_sequence_length=…``).

    Returns:
        The transformer's prediction.

    Raises:
        ModelError: not a pipeline of a known family.
        TraceError: the timestep is out of range, or prompts and images do not match.

    Example:
        >>> import dit_probe as dp
        >>> from PIL import Image
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> with dp.trace(pipe, dp.Probe(["sun"], record=["o_c"]), progress=False) as run:
        ...     prediction = dp.encode(pipe, Image.new("RGB", (16, 16)), "a sun", timestep=500)
        >>> run.dataset.timestep.values.tolist()
        [500.0]
    """
    with torch.no_grad():
        prediction = predict(pipe, noised(pipe, images, prompts, timestep, seed, **text))
    pipe.maybe_free_model_hooks()
    return prediction


@torch.no_grad()
def noised(
    pipe: Any, images: Any, prompts: str | Sequence[str], timestep: float = 500, seed: int = 0, **text: Any
) -> Noised:
    """The first half of `encode`: autoencoder, text encoders and noise.

    Args:
        pipe: as for `encode`, as are all others.
        images: real ones.
        prompts: one for all, or one per image.
        timestep: noise level, 0 to 1000.
        seed: of the noise.
        **text: for the pipeline's ``encode_prompt``.

    Raises:
        ModelError, TraceError: as `encode`.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> found = noised(pipe, Image.new("RGB", (16, 16)), "a sun", timestep=250)
        >>> found.sigma, bool((found.mixed == 0.75 * found.clean + 0.25 * found.noise).all())
        (0.25, True)
    """
    anatomy = find(pipe)
    if transformer_of(pipe) is pipe:
        raise ModelError("encode needs the pipeline, whose VAE and text encoders it uses; found its transformer")
    if not 0 <= timestep <= 1000:
        raise TraceError(f"timestep={timestep}; give a noise level from 0 (clean) to 1000 (noise only)")
    pictures = _pictures(images, hasattr(pipe, "video_processor"))
    prompts = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(pictures):
        raise TraceError(f"{len(prompts)} prompts for {len(pictures)} images; give one for all, or one for each")
    inputs = anatomy.prepare(pipe, pictures, prompts, seed, **text)
    mixed, timestep, sigma = _mix(pipe.scheduler, inputs.latents, inputs.noise, timestep)
    return Noised(pictures, prompts, seed, inputs.latents, inputs.noise, mixed, timestep, sigma, inputs.call, text)


def predict(pipe: Any, inputs: Noised) -> Tensor:
    """The second half of `encode`: the transformer, once, with gradients where they are on.

    Args:
        pipe: the pipeline.
        inputs: what `noised` made of real images; the same may be used again.

    Returns:
        The transformer's prediction.
    """
    model, prompts, rows = transformer_of(pipe), inputs.prompts, len(inputs.pictures)
    run = tracing.active(model)
    recorded: Any = contextlib.nullcontext()
    if run is not None:
        at = [float(inputs.timestep)], [inputs.sigma]
        generation = Generation(rows, {"cond": prompts}, prompts, [inputs.seed] * rows, *at)
        arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in inputs.pictures]
        arrays = arrays if hasattr(pipe, "video_processor") else [array[0] for array in arrays]
        recorded = run.recorded(generation, arrays, inputs.text.get("max_sequence_length"))
    mixed = inputs.mixed
    time = torch.full((rows,), inputs.timestep / find(pipe).timestep_scale, device=mixed.device, dtype=mixed.dtype)
    with recorded:
        return model(hidden_states=mixed, timestep=time, return_dict=False, **inputs.call)[0]


def _pictures(images: Any, video: bool) -> list[list[Image.Image]]:
    """Videos as lists of frames; an image is a video of one frame."""
    depth, probe = 0, images
    while isinstance(probe, (list, tuple)):
        if not probe:
            raise TraceError("no images to encode: the list is empty")
        depth, probe = depth + 1, probe[0]
    deepest = 2 if video else 1
    if depth > deepest or (video and depth == 0):
        expected = "a video (list of frames) or a list of videos" if video else "an image or a list of images"
        raise TraceError(f"this pipeline encodes {expected}; found {type(images).__name__} nested {depth} deep")
    nested = images
    for _ in range(depth, deepest):
        nested = [nested]
    return [[_image(frame) for frame in (item if video else [item])] for item in nested]


def _image(frame: Any) -> Image.Image:
    return (frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))).convert("RGB")


def _mix(scheduler: Any, latents: Tensor, noise: Tensor, timestep: float) -> tuple[Tensor, float, float]:
    """Noised latents, the timestep that they are at, and their noise level."""
    steps = scheduler.config.num_train_timesteps
    if hasattr(scheduler, "scale_noise"):
        # Any noise level, on the schedule of a run or off it: a copy is given a schedule of that one level.
        scheduler = copy.deepcopy(scheduler)
        sigma = timestep / 1000
        scheduler.timesteps, scheduler.sigmas = torch.tensor([float(timestep)]), torch.tensor([sigma, 0.0])
        scheduler._begin_index = scheduler._step_index = None
        when = torch.full((len(latents),), float(timestep), device=latents.device)
        return scheduler.scale_noise(latents, when, noise), timestep, sigma
    # Diffusion models are trained at whole timesteps, the last of which is one short of 1000.
    index = min(round(timestep / 1000 * steps), steps - 1)
    when = torch.full((len(latents),), index, device=latents.device)
    return scheduler.add_noise(latents, noise, when), index, float((1 - scheduler.alphas_cumprod[index]).sqrt())
