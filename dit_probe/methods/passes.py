"""Maps of a pipeline for real pictures: one traced pass, and all the rows of a table that can be made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe import maps as concept_maps
from dit_probe import schema
from dit_probe.maps import Direction, Softmax, Space
from dit_probe.methods.baseline import checksum
from dit_probe.probe import Combination, Probe
from dit_probe.protocols import EvaluationError, resize_image


class Passes:
    """Passes of real pictures through a pipeline, each of which gives the maps of many methods.

    A picture is encoded, noised and passed through once, and the scores of all spaces at all joint layers are kept
    until other pictures or other words come. Methods of one `Passes` that are asked for the same, as the rows of
    `dit_probe.evaluate` are, share the pass: Table 4 and Figure 4 (left) cost one pass a picture.

    Args:
        pipe: a pipeline of a known family, which must not change as long as this is used.
        timestep: noise level, 0 (clean) to 1000 (noise only: for flow-matching models no picture is left in it).
        seed: of the noise, the same for every picture; of several, maps are the mean, at a pass each.
        attends: what concepts attend to (Table 5): "both", "image", "concepts" or "none".
        prompt: what the model is told; ``{}`` becomes the first concept, which under ``classes="present"`` is what the
            picture shows. Under ``all20`` it is the first word of the vocabulary: give a prompt without it.
        size: side in pixels that pictures are stretched to; None: the pipeline's own where it has one.
        **text: for the pipeline's ``encode_prompt`` (``max_sequence_length=…``).

    Raises:
        EvaluationError: no seed.
        ProbeError: an unknown `attends`.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> passes = Passes(tiny_pipeline("flux"), size=16)
        >>> rows = {space: passes.method(space) for space in ("output", "value", "cross")}
        >>> picture = np.zeros((20, 30, 3), np.uint8)
        >>> [rows[space]([picture], ["sun", "sky"]).shape for space in rows]  # one pass
        [(1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4)]
    """

    def __init__(
        self,
        pipe: Any,
        timestep: float = 500,
        seed: int | Sequence[int] = 0,
        attends: str = "both",
        prompt: str = "a {}",
        size: int | None = None,
        **text: Any,
    ) -> None:
        self.pipe = pipe
        self._timestep, self._seeds, self._prompt, self._text = timestep, seeds(seed), prompt, text
        self._size = own_size(pipe) if size is None else size
        self._probe = Probe(scores=schema.SPACES, attends=attends)
        self._kept: tuple[Any, list[xr.Dataset]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the passes beside the pipeline."""
        named = {"timestep": self._timestep, "seeds": self._seeds, "attends": self._probe.attends}
        return named | {"prompt": self._prompt, "size": self._size, "text": self._text}

    def method(
        self,
        space: Space = "output",
        softmax: Softmax | None = "each",
        layers: Sequence[int] | None = None,
        direction: Direction = "image_to_concept",
    ) -> PipelineMaps:
        """A method that takes its maps from these passes.

        Args:
            space: as for `dit_probe.maps.saliency`; so are `softmax` and, for "cross", `direction`.
            softmax: "each", "after" or None.
            layers: the joint layers that are averaged, negative ones from the last; None: all.
            direction: "image_to_concept" or "concept_to_image".

        Raises:
            SiteError: a layer that does not exist.
        """
        return PipelineMaps(self, space, softmax, joint_layers(self.pipe, layers), direction)

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> list[xr.Dataset]:
        """The traces of pictures, their samples the seeds; the last ones are kept."""
        content = [(image.shape, hashlib.sha256(image.tobytes()).digest()) for image in images]
        key = content, list(concepts)
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # not two of them at a time
            self._kept = key, [self._trace(image, concepts) for image in images]
        return self._kept[1]

    def _trace(self, image: np.ndarray, concepts: Sequence[str]) -> xr.Dataset:
        probe = replace(self._probe, concepts=check(concepts))
        picture = image if self._size is None else resize_image(image, self._size)
        prompt = self._prompt.format(concepts[0])
        return traced(self.pipe, probe, picture, prompt, self._timestep, self._seeds, self._text).load()


@dataclass(frozen=True)
class PipelineMaps:
    """Maps of a pipeline for real pictures; `Passes.method` and `concept_attention` make it.

    Attributes:
        passes: where the scores come from.
        space, softmax, layers, direction: as `Passes.method` says.
    """

    passes: Passes = field(repr=False)
    space: Space
    softmax: Softmax | None
    layers: tuple[int, ...] | None
    direction: Direction

    def describe(self) -> str:
        """All that decides the maps, with the pipeline's classes, its path and a checksum of some of its weights."""
        own = {name: value for name, value in vars(self).items() if name != "passes"}
        return f"concept_attention({described(self.passes.pipe)}, {json.dumps(own | self.passes.settings)})"

    @property
    def forwards(self) -> int:
        """Passes a picture, which other methods of the same passes share."""
        return len(self.passes.settings["seeds"])

    def forward(self, image: np.ndarray) -> object:
        """The picture through autoencoder and transformer once, untraced."""
        own = self.passes.settings
        picture = image if own["size"] is None else resize_image(image, own["size"])
        return plain(self.passes.pipe, picture, own["timestep"], own["text"])

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Saliency, (image, concept, [frame,] y, x)."""
        how: Any = {"softmax": self.softmax, "layers": self.layers, "direction": self.direction}
        found = [concept_maps.saliency(ds, self.space, **how).mean("sample") for ds in self.passes(images, concepts)]
        return stacked(found, images, concepts)


def concept_attention(
    pipe: Any,
    *,
    space: Space = "output",
    softmax: Softmax | None = "each",
    layers: Sequence[int] | None = None,
    timestep: float = 500,
    seed: int | Sequence[int] = 0,
    direction: Direction = "image_to_concept",
    prompt: str = "a {}",
    size: int | None = None,
    attends: Literal["both", "image", "concepts", "none"] = "both",
    **text: Any,
) -> PipelineMaps:
    """ConceptAttention, or its ablations, as a method: a picture is encoded, noised and passed through once.

        map = softmax over concepts of o_x o_c^T,    mean over layers          eq. (8)

    The paper's equations, all joint layers, timestep 500; `reference` has the choices of the authors' code. Pure noise
    (``timestep=1000``) shows what maps owe to the words and the architecture alone.

    Args:
        pipe: a pipeline of a known family.
        space: as for `Passes.method`; so are `softmax`, `layers` and `direction`.
        softmax: "each", "after" or None.
        layers: the joint layers that are averaged; None: all.
        timestep: as for `Passes`; so are all that follow.
        seed: of the noise, or several.
        direction: of "cross".
        prompt: what the model is told.
        size: side in pixels that pictures are stretched to.
        attends: what concepts attend to.
        **text: for the pipeline's ``encode_prompt``.

    Raises:
        EvaluationError, SiteError, ProbeError: as `Passes` and `Passes.method`.
        DitProbeError: when it is called, whatever tracing, encoding and `saliency` refuse: one concept under a softmax.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> method = concept_attention(tiny_pipeline("flux"), size=16)
        >>> method([np.zeros((20, 30, 3), np.uint8)], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'y': 4, 'x': 4})
    """
    passes = Passes(pipe, timestep, seed, attends, prompt, size, **text)
    return passes.method(space, softmax, layers, direction)


def traced(
    pipe: Any,
    probe: Probe,
    picture: np.ndarray,
    prompt: str,
    timestep: float,
    seeds: Sequence[int],
    text: Mapping[str, Any],
    concepts: Any = None,
) -> xr.Dataset:
    """A picture's trace in memory, a sample a seed; `concepts` are embeddings in place of the probe's words'."""
    from dit_probe.encoding import encode
    from dit_probe.tracing import trace

    given = list(picture) if picture.ndim == 4 else picture
    with trace(pipe, probe, concepts=concepts, progress=False) as run:
        for seed in seeds:
            encode(pipe, given, prompt, timestep, seed, **text)
    return run.dataset


def plain(pipe: Any, picture: np.ndarray, timestep: float, text: Mapping[str, Any]) -> object:
    """One untraced pass of a picture: the unit in which tables say what a method costs."""
    from dit_probe.encoding import encode

    return encode(pipe, list(picture) if picture.ndim == 4 else picture, "", timestep, **text)


def stacked(maps: Sequence[xr.DataArray], images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
    """Maps of several pictures as a method returns them, those of a video with its number of frames."""
    bare = [found.drop_vars(list(found.coords)).assign_coords(concept=list(concepts)) for found in maps]
    whole = [
        _each_frame(found, len(image)) if image.ndim == 4 else found for found, image in zip(bare, images, strict=True)
    ]
    if len(sizes := {found.shape[1:] for found in whole}) > 1:
        raise EvaluationError(
            f"pictures {sorted({image.shape for image in images})} give maps of different grids, {sorted(sizes)}: "
            "give size=, or one of them a call"
        )
    joined: Any = xr.concat(whole, "image")
    return joined


def check(concepts: Sequence[str]) -> Sequence[str]:
    """The concepts, if there are any."""
    if not concepts:
        raise EvaluationError("no concepts: the picture shows no word and there are none for the background")
    return concepts


def seeds(seed: int | Sequence[int]) -> tuple[int, ...]:
    """One seed or several as a tuple, refused when there is none."""
    found = (seed,) if isinstance(seed, int) else tuple(seed)
    if not found:
        raise EvaluationError(f"seed={seed!r}: the noise needs one seed or more")
    return found


def own_size(pipe: Any) -> int | None:
    """Side in pixels of the pictures that a pipeline makes, where it says so."""
    own = getattr(pipe, "default_sample_size", None)
    return own * pipe.vae_scale_factor if isinstance(own, int) else None


def joint_layers(pipe: Any, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Labels of joint layers, negative ones counted from the last; refused as `Probe` refuses them."""
    from dit_probe.anatomy import find, transformer_of

    if layers is None:
        return None
    model = transformer_of(pipe)
    probe = Combination(Probe(["one", "other"], scores=("output",), layers=layers))
    return probe.layers(find(pipe).blocks(model), type(model).__name__)["score_output"]


def described(pipe: Any) -> str:
    """A pipeline's class, its path and a checksum of transformer and text encoders."""
    import torch

    named = {name: part for name, part in pipe.components.items() if name.startswith(("transformer", "text_encoder"))}
    weights = checksum(**{name: part for name, part in named.items() if isinstance(part, torch.nn.Module)})
    path = getattr(pipe, "name_or_path", None) or getattr(pipe.config, "_name_or_path", "")
    return f"{type(pipe).__name__}({str(path)!r}, weights {weights})"


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
