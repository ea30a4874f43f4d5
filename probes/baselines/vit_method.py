"""What the methods on vision transformers share: pictures in, labelled scores out, and what is refused."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import dit_probe as dp
from probes.baselines.vit import ViT


@dataclass(frozen=True)
class ViTMethod(dp.methods.Baseline):
    """A method on a vision transformer: `maps` of a picture, made into labelled scores.

    On a `ViTForImageClassification` a method that takes gradients explains the class that the model sees. This is what
    the rows of ConceptAttention's tables that carry these names do; their maps do not know the concepts.

    Attributes:
        vit: the model.
        needs: "attention", which every model has; a "score" to explain; or "clip", a text encoder.

    Raises:
        ModelError: the model does not have what the method needs.
    """

    vit: ViT = field(repr=False)
    needs: ClassVar[Literal["attention", "score", "clip"]]

    def __post_init__(self) -> None:
        vit, wanted = self.vit, "CLIPModel" if self.needs == "clip" else "CLIPModel or a ViTForImageClassification"
        if (self.needs == "clip" and not vit.is_clip) or (self.needs == "score" and vit.head is None):
            raise dp.errors.ModelError(
                f"{type(self).__name__} needs a {wanted}, found a {type(vit.model).__name__}, which has no "
                f"{'text encoder' if self.needs == 'clip' else 'score to explain'}"
            )
        object.__setattr__(self, "architecture", vit.architecture)
        if vit.is_classifier:  # its one score an image does not depend on the concepts
            object.__setattr__(self, "class_agnostic", True)
            object.__setattr__(self, "backwards", self.backwards + self.backwards_a_concept)
            object.__setattr__(self, "backwards_a_concept", 0)

    @abstractmethod
    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        """Scores of a picture, (concept or 1, *axes, y, x); they may be part of a graph."""

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        """The native axes of `maps`, and their labels."""
        return {}

    def describe(self) -> str:
        """All that decides the maps, with a checksum of the model's weights."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "vit"}
        return f"{type(self).__name__}({self.vit.describe()}, {json.dumps(own, default=list)})"

    def forward(self, image: np.ndarray) -> object:
        """The picture through the vision side once."""
        return self.vit.forward(image)

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Scores, (image, concept, *axes, y, x), with the attributes of `ViT.attrs`.

        Args:
            images: (y, x, 3) uint8.
            concepts: words.

        Raises:
            ConceptError: no concepts, or a string in place of a list.
            MapError: no images, or arrays that are none.
        """
        self.check(images, concepts)
        grad = bool(self.backwards or self.backwards_a_concept)
        found = []
        for image in images:  # one at a time: what a pass leaves behind is many times the picture
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                values = self.maps(image, concepts).detach().float().cpu()
            found.append(values.expand(len(concepts), *values.shape[1:]).numpy())
        coords = {"concept": list(concepts), **{name: list(labels) for name, labels in self.axes.items()}}
        return xr.DataArray(np.stack(found), coords, ("image", "concept", *self.axes, "y", "x"), attrs=self.vit.attrs)

    def check(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> None:
        """Refuse what has no map, before the first pass."""
        name = type(self).__name__
        if isinstance(concepts, str) or not len(concepts):
            raise dp.errors.ConceptError(f"{name}: concepts={concepts!r}; give a list of one word or more")
        if not len(images):
            raise dp.errors.MapError(f"{name}: no images; give a list of (y, x, 3) uint8 arrays")
        for at, image in enumerate(images):
            if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)):
                kind = f"{image.dtype}, {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                raise dp.errors.MapError(f"{name}: image {at} is {kind}; give (y, x, 3) uint8 arrays")


def layers_of(vit: ViT, layers: Sequence[int] | None) -> list[int]:
    """Labels of layers, negative ones counted from the last; None: all.

    Raises:
        SiteError: a layer that does not exist, or none.
    """
    depth = len(vit.blocks)
    found = list(range(depth)) if layers is None else [layer + depth if layer < 0 else layer for layer in layers]
    if not found or not all(0 <= layer < depth for layer in found):
        raise dp.errors.SiteError(f"layers={layers} of a model with layers 0-{depth - 1}; give some of these, or None")
    return found
