"""What DAAM and OVAM share: probabilities of words in the cross-attention of a UNet, labelled."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import dit_probe as dp
from probes.baselines.unet import Text, UNet, attention_weights

TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)
"""Midpoints of five equal parts of the noise levels 0..1000, over all of which DAAM and OVAM average."""


@dataclass(frozen=True)
class UNetMaps(dp.methods.Baseline):
    """Cross-attention probabilities of words, on the finest grid that has them.

    Attributes:
        model: the UNet.
        timesteps: noise levels in 0..1000 that are averaged, at one pass each.

    Raises:
        TraceError: no timestep, or one that is not in 0..1000.
    """

    model: UNet = field(repr=False)
    timesteps: tuple[float, ...] = TIMESTEPS

    kind: ClassVar = "probability"
    forwards: ClassVar[int] = len(TIMESTEPS)
    interpolation: ClassVar[str]

    def __post_init__(self) -> None:
        found = tuple(float(t) for t in self.timesteps)
        if not found or not all(0 <= t <= 1000 for t in found):
            raise dp.errors.TraceError(f"timesteps={self.timesteps}: give noise levels from 0 (clean) to 1000 (noise)")
        # Class attributes of `Baseline` that hang on the settings here.
        derived = {"timesteps": found, "forwards": len(found), "architecture": self.model.architecture}
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def texts(self, concepts: Sequence[str]) -> list[Text]:
        """Texts whose keys the picture's queries meet; their places, one after the other, are those of concepts."""

    @abstractmethod
    def passes(self, image: np.ndarray, texts: Sequence[Text]) -> Iterator[Mapping[str, list[Tensor]]]:
        """For every timestep, by layer: probabilities (head, token, y, x) of every concept, on the layer's own grid."""

    @property
    def settings(self) -> dict[str, object]:
        """The fields that decide maps beside the model."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "model"}

    def describe(self) -> str:
        """Model, weights, preprocessing, timesteps and texts."""
        return f"{type(self).__name__}({json.dumps(self.model.attrs | self.settings)})"

    def forward(self, image: np.ndarray) -> object:
        """The picture through autoencoder and UNet once, told nothing."""
        return self.model.run(self.model.encode(image), self.model.read(""), 500, lambda layer, q: None)

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Mean probability of a concept's tokens, (image, concept, timestep, layer_head, y, x), float32.

        Layers of a UNet differ in their number of heads, so that layer and head share a dim: ``sel(layer=…)`` and
        ``sel(head=…)`` select, ``unstack("layer_head")`` gives a dim each, with NaN where a layer has fewer heads.

        Args:
            images: (y, x, 3) uint8.
            concepts: words.

        Raises:
            ConceptError: no concept, or one that has no tokens in its text.
            TraceError: no picture, or something else than a picture.
        """
        if isinstance(concepts, str) or not concepts:
            raise dp.errors.ConceptError(f"concepts={concepts!r}: give a list of one word or more")
        if isinstance(images, np.ndarray) or not images:
            raise dp.errors.TraceError("images: give a list of one picture or more")
        for image in images:
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
                kind = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
                raise dp.errors.TraceError(f"found {kind}, expected a picture (y, x, 3) of uint8")
        texts = self.texts(concepts)
        values = [torch.stack([self._maps(found) for found in self.passes(image, texts)], 1) for image in images]
        sites = [(name, head) for name, module in self.model.layers.items() for head in range(module.heads)]
        layers, heads = zip(*sites, strict=True)
        found = xr.DataArray(
            torch.stack(values).numpy(),
            {
                "concept": list(concepts),
                "timestep": list(self.timesteps),
                "layer": ("layer_head", list(layers)),
                "head": ("layer_head", list(heads)),
            },
            ("image", "concept", "timestep", "layer_head", "y", "x"),
            attrs=self.model.attrs | {"interpolation": self.interpolation},
        )
        return found.set_index(layer_head=["layer", "head"])

    def _maps(self, found: Mapping[str, list[Tensor]]) -> Tensor:
        """One pass, (concept, layer_head, y, x)."""
        finest = max(words[0].shape[-1] for words in found.values())

        def enlarged(maps: Tensor) -> Tensor:
            same = nn.functional.interpolate(maps, (finest, finest), mode=self.interpolation, align_corners=False)
            return same.clamp(min=0).mean(1)  # bicubic undershoots

        return torch.cat([torch.stack([enlarged(maps) for maps in words]) for words in found.values()], 1).cpu()


@torch.no_grad()
def word_weights(attention: object, q: Tensor, text: Text) -> list[Tensor]:
    """Probabilities of the words of a text, (head, token, y, x) each; those of its other tokens are not kept."""
    weights, side = attention_weights(attention, q, text.states), math.isqrt(q.shape[1])
    return [weights[..., list(place)].mT.unflatten(-1, (side, side)) for place in text.places]
