"""Maps that are attention and nothing else: they know the picture, and no word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import dit_probe as dp
from probes.baselines.vit_method import ViTMethod, layers_of


@dataclass(frozen=True)
class ViTAttention(ViTMethod):
    """What the class token attends to: A_l^h[0, patches], of every head of the last block unless `layers` say others.

    "ViT attention" of a classifier or of CLIP, "self-attention" of DINO, iBOT and DINOv2 with and without registers
    (Caron et al. 2021, Emerging properties in self-supervised vision transformers). The class token's attention to
    itself and to registers is left out, so that a map sums to less than 1.

    Attributes:
        layers: those whose attention is shown, negative ones from the last; None: all.

    Raises:
        SiteError: a layer that does not exist.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> from probes.baselines.vit import ViT
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=32)
        >>> method = ViTAttention(ViT(ViTModel(config).eval(), architecture="DINO ViT"))
        >>> method.scores([np.zeros((40, 50, 3), np.uint8)], ["sun"]).sizes
        Frozen({'image': 1, 'concept': 1, 'layer': 1, 'head': 2, 'y': 2, 'x': 2})
    """

    layers: Sequence[int] | None = (-1,)
    class_agnostic: ClassVar = True
    kind: ClassVar = "probability"
    needs: ClassVar = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        layers_of(self.vit, self.layers)

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"layer": layers_of(self.vit, self.layers), "head": range(self.vit.heads)}

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.vit.record(image, keep=("attention",), class_only=True)
        return torch.stack([seen.patches(seen.attention[layer][:, :, 0]) for layer in self.axes["layer"]], 1)


@dataclass(frozen=True)
class Rollout(ViTMethod):
    """Attention rollout (Abnar & Zuidema 2020): how attention mixes tokens over the layers, residuals taken as half.

        B_l = rownorm(mean_h A_l^h + I),    J = B_L B_(L-1) ... B_start,    map = J[0, patches]

    Attributes:
        start: first layer of the product: 1 as in the evaluation code of Chefer et al. 2021, which ConceptAttention's
            tables follow; 0 as Abnar & Zuidema have it.

    Raises:
        SiteError: a layer that does not exist.
    """

    start: int = 1
    class_agnostic: ClassVar = True
    kind: ClassVar = "probability"
    needs: ClassVar = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < len(self.vit.blocks):
            raise dp.errors.SiteError(f"start={self.start} of a model with layers 0-{len(self.vit.blocks) - 1}")

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.vit.record(image, keep=("attention",))
        row = torch.zeros_like(seen.attention[0][:, 0, 0])
        row[:, 0] = 1
        # One row of the product is wanted: from the last layer down it is vector times matrix.
        for layer in reversed(seen.attention[self.start :]):
            mixed = layer.mean(1) + torch.eye(layer.shape[-1], device=layer.device, dtype=layer.dtype)
            row = (row[:, None] @ (mixed / mixed.sum(-1, keepdim=True)))[:, 0]
        return seen.patches(row)
