"""What edits do: to the pictures that are generated, and to the denoising of real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dit_probe.anatomy import find, transformer_of
from dit_probe.anatomy.block import Grid
from dit_probe.edit import Edit
from dit_probe.encoding import Noised, noised, predict
from dit_probe.errors import MetricError, ModelError
from dit_probe.tracing import trace

Effect = Callable[..., xr.DataArray]
"""Takes ``edits=[...]``, which may be empty, and returns an array over ``sample`` and any other dims."""
Labelled = TypeVar("Labelled", xr.DataArray, xr.Dataset)

PLACE = ("frame", "y", "x")


def change(pipe: Any, prompts: str | Sequence[str], *, seeds: int | Sequence[int] = 0, **call: Any) -> Effect:
    """How much edits change the pictures that a pipeline generates; a function of the edits.

        change = mean over a token's pixels and colours of |picture under the edits - picture|

    Args:
        pipe: the pipeline. All samples run as one batch.
        prompts: one, or one a sample.
        seeds: of the initial noise: one, or one a sample.
        **call: for the pipeline (``num_inference_steps=…``).

    Returns:
        A function of ``edits`` that gives (sample, [frame,] y, x), a number from 0 to 1 for every image token.

    Raises:
        MetricError: another number of prompts than of seeds, or pictures that are not whole tokens.

    Example:
        >>> from dit_probe.edits import mean
        >>> from dit_probe.testing import tiny_pipeline
        >>> measure = change(tiny_pipeline("flux"), "a sun", height=16, width=16, num_inference_steps=1)
        >>> measure(edits=[mean("o_x", tokens=[5, 6])]).sizes
        Frozen({'sample': 1, 'y': 4, 'x': 4})
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    count = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, count}:
        raise MetricError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for all samples, or one for each")
    prompts, seeds = prompts * (count // len(prompts)), seeds * (count // len(seeds))
    before = generate(pipe, prompts, seeds, (), call)
    sizes = _sizes(find(pipe).planned_grid(pipe, before.sizes["y"], before.sizes["x"], before.sizes.get("frame", 1)))

    def measure(edits: Sequence[Edit] = ()) -> xr.DataArray:
        after = generate(pipe, prompts, seeds, edits, call) if edits else before
        return _on_grid(abs(after - before).mean("channel"), sizes)

    return measure


def denoising_loss(
    pipe: Any,
    images: Any,
    prompts: str | Sequence[str],
    *,
    edits: Sequence[Edit] = (),
    timestep: float = 500,
    seed: int = 0,
    **text: Any,
) -> xr.DataArray:
    """How well the model denoises real images, token by token.

        loss = mean over a token's latent of (target - prediction)^2

    The target is what the model was trained to predict: ``noise - latent`` in flow matching, else by the scheduler's
    ``prediction_type``, with a = sqrt(alphas_cumprod[t]), s = sqrt(1 - a^2): ``a noise - s latent`` of "v_prediction",
    ``noise`` of "epsilon".

    Args:
        pipe: the pipeline.
        images: as for `dit_probe.encode`, as are `prompts`, `timestep`, `seed` and `text`.
        prompts: one for all, or one per image.
        edits: made during the pass.
        timestep: noise level, 0 to 1000.
        seed: of the noise.
        **text: for the pipeline's ``encode_prompt``.

    Returns:
        (sample, [frame,] y, x), in squared units of the latent, which is about 1 large.

    Raises:
        ModelError: a scheduler of another kind, or a prediction that is not laid out as the latent.

    Example:
        >>> from PIL import Image
        >>> from dit_probe.testing import tiny_pipeline
        >>> denoising_loss(tiny_pipeline("flux"), Image.new("RGB", (16, 16)), "a sun").sizes
        Frozen({'sample': 1, 'y': 4, 'x': 4})
    """
    measure = denoising(pipe, images, prompts, timestep=timestep, seed=seed, **text)
    with torch.no_grad(), _edited(pipe, edits):
        loss = measure().cpu()
    pipe.maybe_free_model_hooks()
    return xr.DataArray(loss.numpy(), dims=("sample", *PLACE[4 - loss.ndim :]))


def denoising(
    pipe: Any, images: Any, prompts: str | Sequence[str], *, timestep: float = 500, seed: int = 0, **text: Any
) -> Callable[[], Tensor]:
    """`denoising_loss` as a function that can be differentiated (`gradients`).

    Autoencoder and text encoders run once, when it is made.

    Args:
        pipe: as for `denoising_loss`, as are all others.
        images: real ones.
        prompts: one for all, or one per image.
        timestep: noise level, 0 to 1000.
        seed: of the noise.
        **text: for the pipeline's ``encode_prompt``.

    Returns:
        A function without arguments that runs the transformer and gives (row, [frame,] y, x), with gradients where
        they are on.

    Raises:
        ModelError: as `denoising_loss`.
    """
    kind = _prediction_type(pipe)
    inputs = noised(pipe, images, prompts, timestep, seed, **text)
    target = _target(kind, inputs)
    arguments = {"hidden_states": inputs.clean, **inputs.call}
    sizes = _sizes(find(pipe).grid(transformer_of(pipe), arguments))

    def measure() -> Tensor:
        prediction = predict(pipe, inputs)
        if prediction.shape != target.shape:
            raise ModelError(
                f"{type(transformer_of(pipe)).__name__} predicts {tuple(prediction.shape)} of a latent "
                f"{tuple(target.shape)}; a denoising loss needs both alike"
            )
        return _by_token(pipe, (target - prediction.float()).square(), sizes)

    return measure


def denoising_gap(
    pipe: Any, images: Any, prompts: str | Sequence[str], without: str | Sequence[str], **options: Any
) -> xr.DataArray:
    """What words are worth: `denoising_loss` with them less that without them; negative where they help.

    As an effect of edits: ``functools.partial(denoising_gap, pipe, images, prompts, without)``.

    Args:
        pipe: the pipeline.
        images: as for `dit_probe.encode`.
        prompts: with the words: "a sun and a boat on water".
        without: the same without them: "a sun on water"; "" asks what the whole prompt is worth.
        **options: of `denoising_loss`, above all `edits`, which are made in both passes.

    Returns:
        (sample, [frame,] y, x), in units of the loss.

    Raises:
        ModelError: as `denoising_loss`.
    """
    return denoising_loss(pipe, images, prompts, **options) - denoising_loss(pipe, images, without, **options)


def by_region(values: Labelled, masks: xr.DataArray) -> Labelled:
    """Means inside and outside of masks, each token weighted with the share of it that is covered.

    Args:
        values: (…, [frame,] y, x), such as the effect of an edit by token.
        masks: (…, [frame,] Y, X) bool, at the values' size or a multiple of it. Of frames there may be more: the first
            has the first token by itself, the others share the rest evenly, as causal video autoencoders compress.

    Returns:
        The same without y, x and frame, and with ``region``: inside, outside. NaN where a region is empty.

    Raises:
        MetricError: masks that are not boolean, or of a size that does not fit.

    Example:
        >>> values = xr.DataArray([[4.0, 1.0], [2.0, 1.0]], dims=("y", "x"))
        >>> by_region(values, values > 1).values.tolist()
        [3.0, 1.0]
    """
    if masks.dtype != bool:
        raise MetricError(f"masks are {masks.dtype}; give bool, such as maps > threshold")
    share = _on_grid(masks, values.sizes)
    values = _bare(values)
    dims = [dim for dim in PLACE if dim in values.dims]
    regions: list[Any] = [values.weighted(weight).mean(dims) for weight in (share, 1 - share)]
    return xr.concat(regions, "region").assign_coords(region=["inside", "outside"])


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], edits: Sequence[Edit], call: Mapping[str, Any]
) -> xr.DataArray:
    """The pictures of a call under edits, (sample, [frame,] y, x, channel), 0 to 1."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _edited(pipe, edits):
        result = pipe(prompt=list(prompts), generator=generators, output_type="np", **call)
    pictures = np.asarray(result.frames if hasattr(result, "frames") else result.images)
    if pictures.ndim == 5 and pictures.shape[1] == 1:
        pictures = pictures[:, 0]
    return xr.DataArray(pictures, dims=("sample", *PLACE[5 - pictures.ndim :], "channel"))


def _edited(pipe: Any, edits: Sequence[Edit]) -> Any:
    return trace(pipe, edits=edits, progress=False) if edits else contextlib.nullcontext()


def _target(kind: str, inputs: Noised) -> Tensor:
    """What the model should predict, in float32."""
    clean, noise, sigma = inputs.clean.float(), inputs.noise.float(), inputs.sigma
    velocity = (1 - sigma**2) ** 0.5 * noise - sigma * clean
    return {"flow": noise - clean, "epsilon": noise, "v_prediction": velocity}[kind]


def _prediction_type(pipe: Any) -> str:
    scheduler = pipe.scheduler
    kind = "flow" if hasattr(scheduler, "scale_noise") else scheduler.config.get("prediction_type")
    if kind not in ("flow", "epsilon", "v_prediction"):
        raise ModelError(
            f"{type(scheduler).__name__} has prediction_type={kind!r}; a denoising loss is known for flow matching "
            "(schedulers with scale_noise), 'v_prediction' and 'epsilon'"
        )
    return kind


def _by_token(pipe: Any, error: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Means of (row, token, channel), (row, channel, y, x) or a video's latent over what is in each token."""
    frames, y, x = (sizes.get(dim, 1) for dim in PLACE)
    if error.ndim == 3:
        values = error.mean(-1).reshape(len(error), frames, y, x)
    else:
        channels = pipe.vae.config.get("latent_channels")
        where = [axis for axis in (1, 2) if error.shape[axis] == channels] if error.ndim == 5 else [1]
        if len(where) != 1:
            raise ModelError(f"a latent {tuple(error.shape)}: which of its dims are the {channels} channels is unclear")
        values = error.mean(where[0])
        values = values.reshape(len(error), frames, -1, y, values.shape[-2] // y, x, values.shape[-1] // x)
        values = values.mean((2, 4, 6))
    return values if "frame" in sizes else values[:, 0]


def _sizes(grid: Grid) -> dict[str, int]:
    """Tokens along each axis; ``frame`` where there are several."""
    sizes = {dim: len(set(axis)) for dim, axis in zip(PLACE, (grid.frame, grid.y, grid.x), strict=True)}
    return {dim: size for dim, size in sizes.items() if dim != "frame" or size > 1}


def _bare(array: Labelled) -> Labelled:
    """Without labels of y, x and frame: what is compared lies on one grid, whatever it counts it by."""
    return array.drop_vars([name for name, coordinate in array.coords.items() if {*coordinate.dims} & {*PLACE}])


def _on_grid(array: xr.DataArray, sizes: Mapping[Any, int]) -> xr.DataArray:
    """Means of pixels over tokens."""
    array = _bare(array)
    for dim in PLACE:
        have, want, first = array.sizes.get(dim, 0), sizes.get(dim, 0), int(dim == "frame")
        if have == want or (dim == "frame" and not have):  # one mask for all frames
            continue
        if not have > want > first or (have - first) % (want - first):
            raise MetricError(f"{have} along {dim!r} do not fill {want} tokens: give a mask of the picture's size")
        share = (have - first) // (want - first)
        owner = (np.arange(have) + first * (share - 1)) // share
        owned = xr.DataArray(owner == np.arange(want)[:, None], dims=("token", dim)).astype(float)
        array = (xr.dot(array.astype(float), owned, dim=dim) / owned.sum(dim)).rename(token=dim)
    return array.transpose(..., *(dim for dim in PLACE if dim in array.dims))
