"""What every other people's method is: scores on its own grid, all of its axes kept, and a map made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

Kind = Literal["probability", "logit", "relevance"]


class Baseline(ABC):
    """A method for `dit_probe.evaluate` that keeps what it is made of.

    `scores` has every native axis (layer, head, timestep, token, iteration); calling it averages them, which is how the
    papers reduce them. Resizing, min-max, thresholds and argmax belong to the protocol and never happen here.

    Attributes:
        class_agnostic: is the map the same for every concept? It is then refused where classes compete.
        kind: what a score is.
        architecture: what the tables call the model: "CLIP ViT", "SDXL UNet".
        forwards: passes of the model an image and, in ``forwards_a_concept``, a concept.
        backwards: gradient passes an image and, in ``backwards_a_concept``, a concept.
    """

    class_agnostic: ClassVar[bool] = False
    kind: ClassVar[Kind]
    architecture: str
    forwards: ClassVar[int] = 1
    forwards_a_concept: ClassVar[int] = 0
    backwards: ClassVar[int] = 0
    backwards_a_concept: ClassVar[int] = 0

    @abstractmethod
    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Scores, (image, concept, *native axes, y, x), float32 on the method's own grid.

        Attributes of the array say the model, its revision, preprocessing and size. Of a class-agnostic method every
        concept has the same.

        Args:
            images: (y, x, 3) uint8.
            concepts: words.
        """

    @abstractmethod
    def describe(self) -> str:
        """All that decides the maps, with a checksum of the model's weights."""

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Maps, (image, concept, y, x): the mean over native axes."""
        found = self.scores(images, concepts)
        return found.mean(
            [dim for dim in found.dims if dim not in ("image", "concept", "frame", "y", "x")], skipna=False
        )
