"""What every other people's method is: scores on its own grid, all of its axes kept, and a map made of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from torch import nn

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
        backwards: gradient passes an image and, in ``backwards_a_concept``, a concept. A method whose settings decide
            how many sets them for each instance.
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

    @abstractmethod
    def forward(self, image: np.ndarray) -> object:
        """Take a picture through the model once and keep nothing: the unit in which tables say what a method costs."""

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Maps, (image, concept, y, x): the mean over native axes."""
        found = self.scores(images, concepts)
        return found.mean(
            [dim for dim in found.dims if dim not in ("image", "concept", "frame", "y", "x")], skipna=False
        )


def checksum(**modules: nn.Module | None) -> str:
    """Twelve digits over name, shape and middle number of every parameter: tells one set of weights from another.

    Quantised weights, which have a type of their own, and weights that offloading keeps nowhere count by their shape.

    Args:
        **modules: the parts of a model by name; None has no weights.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 3)
        >>> before = checksum(layer=layer)
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> checksum(layer=layer) == before, len(before)
        (False, 12)
    """
    import torch

    total = hashlib.sha256()
    for part in sorted(modules):
        module = modules[part]
        for name, parameter in module.named_parameters() if module is not None else ():
            total.update(f"{part}.{name}{tuple(parameter.shape)}".encode())
            if type(parameter) is torch.nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
                total.update(repr(float(parameter.detach().reshape(-1)[parameter.numel() // 2])).encode())
    return total.hexdigest()[:12]
