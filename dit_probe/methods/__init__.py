"""Ready-made methods for `dit_probe.evaluate`: maps that look at nothing, and ConceptAttention on a pipeline.

Each is a callable ``(images, concepts) -> maps``: ([frame,] y, x, 3) uint8 arrays and words in, (image, concept,
[frame,] y, x) out. `noise`, `constant`, `centre_gaussian` and `image_saliency` are the rows that every table needs;
`random_twin` is the pipeline for one more.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from dit_probe import maps as concept_maps
from dit_probe.protocols import EvaluationError, resize_image

if TYPE_CHECKING:
    from dit_probe.maps import Direction

GRID = 64
"""Tokens a side of the maps that look at nothing: those of a 1024-pixel picture in Flux and SD3.5."""


@dataclass(frozen=True)
class Trivial:
    """A method without a model; `noise`, `constant`, `centre_gaussian` and `image_saliency` make them.

    Attributes:
        name: of the method.
        settings: all that decides its maps.
        draw: (frame, y, x, 3) uint8 and the number of concepts in, (concept or 1, frame, y, x) out.
        class_agnostic: is the map the same for every concept?
    """

    name: str
    settings: dict[str, float]
    draw: Callable[[np.ndarray, int], np.ndarray] = field(repr=False)
    class_agnostic: bool = True

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Draw maps, (image, concept, [frame,] y, x); the images have to have the same number of frames."""
        still = all(image.ndim == 3 for image in images)
        drawn = [self.draw(image.reshape(-1, *image.shape[-3:]), len(concepts)) for image in images]
        values = np.stack([np.broadcast_to(one, (len(concepts), *one.shape[1:])) for one in drawn])
        found = xr.DataArray(values, {"concept": list(concepts)}, ("image", "concept", "frame", "y", "x"))
        return found.isel(frame=0) if still else found

    def describe(self) -> str:
        """Name and settings."""
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.settings.items())})"


def noise(seed: int = 0, grid: int = GRID) -> Trivial:
    """Uniform noise in 0..1, drawn anew for every image, concept and token.

    It depends on seed and picture alone, not on the order in which pictures come.

    Args:
        seed: of the noise.
        grid: tokens a side.

    Example:
        >>> noise(3)([np.zeros((8, 8, 3), np.uint8)], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'y': 64, 'x': 64})
    """

    def draw(image: np.ndarray, concepts: int) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
        return random.uniform(size=(concepts, len(image), grid, grid))

    return Trivial("noise", {"seed": seed, "grid": grid}, draw, class_agnostic=False)


def constant(grid: int = GRID) -> Trivial:
    """One everywhere: AUROC is 0.5, AP the object's share of the picture, and no threshold predicts anything.

    Example:
        >>> constant(grid=2)([np.zeros((8, 8, 3), np.uint8)], ["sun"]).values.tolist()
        [[[[1.0, 1.0], [1.0, 1.0]]]]
    """
    return Trivial("constant", {"grid": grid}, lambda image, _: np.ones((1, len(image), grid, grid)))


def centre_gaussian(grid: int = GRID) -> Trivial:
    """The photographer's prior: ``exp(-(y^2 + x^2) / (2 sigma^2))`` about the centre, sigma a quarter of the side.

    Example:
        >>> centre_gaussian(grid=3)([np.zeros((8, 8, 3), np.uint8)], ["sun"]).values[0, 0].argmax()
        np.int64(4)
    """
    axis = (np.arange(grid) - (grid - 1) / 2) / (grid / 4)
    values = np.exp(-(axis[:, None] ** 2 + axis**2) / 2)
    return Trivial("centre_gaussian", {"grid": grid}, lambda image, _: np.tile(values, (1, len(image), 1, 1)))


def image_saliency(grid: int = GRID) -> Trivial:
    """How much a place differs from its surroundings: ``|x - blur(x)|`` of the luminance, averaged over a token.

    ``x = 0.299 R + 0.587 G + 0.114 B`` (ITU-R BT.601) in 0..255; the blur is a Gaussian, edges repeated, with sigma a
    sixteenth of the shorter side.

    Example:
        >>> picture = np.zeros((32, 32, 3), np.uint8)
        >>> picture[8:16, 8:16] = 255
        >>> found = image_saliency(grid=4)([picture], ["sun"]).values[0, 0]
        >>> bool(found[1, 1] == found.max())
        True
    """

    def draw(image: np.ndarray, _: int) -> np.ndarray:
        from PIL import Image

        light = image @ np.array([0.299, 0.587, 0.114])
        found = np.abs(light - _blur(light, min(light.shape[1:]) / 16)).astype(np.float32)
        box = Image.Resampling.BOX
        return np.stack([np.asarray(Image.fromarray(frame).resize((grid, grid), box)) for frame in found])[None]

    return Trivial("image_saliency", {"grid": grid}, draw)


def _blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian along the last two axes."""
    reach = max(1, round(4 * sigma))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (-2, -1):
        padding = [(0, 0)] * values.ndim
        padding[axis] = (reach, reach)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, padding, mode="edge"), len(kernel), axis)
        values = windows @ kernel
    return values


@dataclass(frozen=True)
class PipelineMaps:
    """Maps of a pipeline for real pictures; `concept_attention` makes it and says what the fields are."""

    pipe: Any = field(repr=False)
    space: Literal["output", "value", "cross"]
    softmax: Literal["each", "after"] | None
    layers: tuple[int, ...] | None
    timestep: float
    seed: int
    direction: Direction
    prompt: str
    size: int | None
    text: dict[str, Any]

    def describe(self) -> str:
        """All that decides the maps, with the pipeline's classes, its path and a checksum of some of its weights."""
        settings = {name: value for name, value in vars(self).items() if name != "pipe"}
        path = getattr(self.pipe, "name_or_path", None) or getattr(self.pipe.config, "_name_or_path", "")
        model = f"{type(self.pipe).__name__}({str(path)!r}, weights {_checksum(self.pipe)})"
        return f"concept_attention({model}, {json.dumps(settings)})"

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Saliency, (image, concept, [frame,] y, x); pictures of one size go through the model together."""
        pictures = [image if self.size is None else resize_image(image, self.size) for image in images]
        found: dict[int, xr.DataArray] = {}
        for shape in dict.fromkeys(picture.shape for picture in pictures):
            places = [at for at, picture in enumerate(pictures) if picture.shape == shape]
            found |= zip(places, self._together([pictures[at] for at in places], concepts), strict=True)
        if len({tuple(one.shape) for one in found.values()}) > 1:
            shapes = sorted({picture.shape for picture in pictures})
            raise EvaluationError(f"pictures {shapes} give maps of different grids: give size=, or one of them a call")
        stacked: Any = xr.concat([found[at] for at in range(len(pictures))], "image")
        return stacked

    def _together(self, pictures: list[np.ndarray], concepts: Sequence[str]) -> list[xr.DataArray]:
        from dit_probe.encoding import encode
        from dit_probe.probe import Probe
        from dit_probe.tracing import trace

        if not concepts:
            raise EvaluationError("no concepts: the picture shows no word and there are none for the background")
        probe = Probe(concepts, scores=(self.space,), layers=self.layers)
        given = [list(picture) if picture.ndim == 4 else picture for picture in pictures]
        with trace(self.pipe, probe, progress=False) as run:
            encode(self.pipe, given, self.prompt.format(concepts[0]), self.timestep, self.seed, **self.text)
        found = concept_maps.saliency(run.dataset, self.space, softmax=self.softmax, direction=self.direction).load()
        kept = found.drop_vars([name for name in found.coords if name != "concept"]).assign_coords(
            concept=list(concepts)
        )
        if pictures[0].ndim == 4:
            kept = _each_frame(kept, len(pictures[0]))
        return [kept.isel(sample=at) for at in range(len(pictures))]


def concept_attention(
    pipe: Any,
    *,
    space: Literal["output", "value", "cross"] = "output",
    softmax: Literal["each", "after"] | None = "each",
    layers: Sequence[int] | None = None,
    timestep: float = 500,
    seed: int = 0,
    direction: Direction = "image_to_concept",
    prompt: str = "a {}",
    size: int | None = None,
    **text: Any,
) -> PipelineMaps:
    """ConceptAttention, or its ablations, as a method: a picture is encoded, noised and passed through once.

        map = softmax over concepts of o_x o_c^T,    mean over layers          eq. (8)

    Args:
        pipe: a pipeline of a known family.
        space: as for `dit_probe.maps.saliency`; so are `softmax` and, for "cross", `direction`.
        softmax: "each", "after" or None.
        layers: indices of the layers that are averaged, negative ones from the last; None: all joint ones.
        timestep: noise level, 0 (clean) to 1000 (noise only).
        seed: of the noise, the same for every picture.
        direction: "image_to_concept" or "concept_to_image".
        prompt: what the model is told; ``{}`` becomes the first concept, which under ``classes="present"`` is what the
            picture shows. Under ``all20`` it is the first word of the vocabulary: give a prompt without it.
        size: side in pixels that pictures are stretched to; None: the pipeline's own where it has one.
        **text: for the pipeline's ``encode_prompt`` (``max_sequence_length=…``).

    Raises:
        DitProbeError: when it is called, whatever tracing, encoding and `saliency` refuse: one concept under a
            softmax, layers that do not exist.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> method = concept_attention(tiny_pipeline("flux"), size=16)
        >>> method([np.zeros((20, 30, 3), np.uint8)], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'y': 4, 'x': 4})
    """
    own = getattr(pipe, "default_sample_size", None)
    if size is None and isinstance(own, int):
        size = own * pipe.vae_scale_factor
    chosen = None if layers is None else tuple(layers)
    return PipelineMaps(pipe, space, softmax, chosen, timestep, seed, direction, prompt, size, text)


def random_twin(pipe: Any, seed: int = 0) -> Any:
    """The same pipeline with fresh weights in transformer and text encoders: what the architecture alone gives.

    The autoencoder, the tokenizers, the scheduler, devices and precisions stay.

    Args:
        pipe: a pipeline, which is not changed.
        seed: of the weights.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> random_twin(pipe, 1).vae is pipe.vae, random_twin(pipe, 1).transformer is pipe.transformer
        (True, False)
    """
    import torch

    parts = dict(pipe.components)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in sorted(parts):
            old = parts[name]
            if name.startswith("transformer") and old is not None:
                new = type(old).from_config(old.config)
            elif name.startswith("text_encoder") and old is not None:
                new = type(old)(old.config)
            else:
                continue
            parts[name] = torch.nn.Module.to(new, old.device, old.dtype).eval()
    twin = type(pipe)(**parts)
    if hasattr(pipe, "default_sample_size"):  # the demo sets one of its own
        twin.default_sample_size = pipe.default_sample_size
    return twin


def _each_frame(found: xr.DataArray, frames: int) -> xr.DataArray:
    """The map of every frame of a video; causal autoencoders give the first a latent of its own."""
    latents = found.sizes.get("frame", 1)
    if latents in (1, frames):
        return found
    if (frames - 1) % (latents - 1) == 0:
        share = (frames - 1) // (latents - 1)
        return found.isel(frame=[0, *(1 + at // share for at in range(frames - 1))])
    if frames % latents == 0:
        return found.isel(frame=[at * latents // frames for at in range(frames)])
    raise EvaluationError(f"{latents} latent frames for {frames} frames: cut the videos to a length the model takes")


def _checksum(pipe: Any) -> str:
    """Over one number of every parameter of transformer and text encoders."""
    import torch

    total = hashlib.sha256()
    for part in sorted(name for name in pipe.components if name.startswith(("transformer", "text_encoder"))):
        module = getattr(pipe, part)
        for name, parameter in module.named_parameters() if isinstance(module, torch.nn.Module) else ():
            total.update(f"{part}.{name}{tuple(parameter.shape)}".encode())
            # Quantised weights have a type of their own, and under offloading some are nowhere.
            if type(parameter) is torch.nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
                middle = parameter.detach().reshape(-1)[parameter.numel() // 2]
                total.update(repr(float(middle)).encode())
    return total.hexdigest()[:12]
