"""CLIP's patches compared with words, the attention of its last block replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

import dit_probe as dp
from probes.baselines.vit_method import ViTMethod


@dataclass(frozen=True)
class DenseCLIP(ViTMethod):
    """Cosine of every patch's embedding with a concept's: map_j = <norm(P LN(y_j)), t_c>.

    What differs is how the last block makes y, of its input x and of q, k, v, each head for itself:

        "ordinary"  W = softmax(q k^T / sqrt d)                              y as the model has it
        "sclip"     W = softmax(q q^T / sqrt d) + softmax(k k^T / sqrt d)    x' = x + O(W v),  y = x' + MLP(LN(x'))
        "naclip"    W = softmax(k k^T / sqrt d + G)                          y = O(W v)

    SCLIP is Wang et al. 2024, NACLIP Hajimiri et al. 2025; G_ij = exp(-|i - j|^2 / 2 sigma^2) of patches, distances in
    patches, and 0 to and from the class token. Their sliding windows and refinement of edges are left out.

    Attributes:
        attention: "ordinary", "sclip" or "naclip".
        sigma: of NACLIP's neighbourhood, in patches.

    Raises:
        ModelError: the model is no CLIPModel.
        ProbeError: no such attention, or a sigma that is not positive.
    """

    attention: Literal["ordinary", "sclip", "naclip"] = "sclip"
    sigma: float = 5.0
    kind: ClassVar = "logit"
    needs: ClassVar = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("ordinary", "sclip", "naclip") or not self.sigma > 0:
            raise dp.errors.ProbeError(
                f"attention={self.attention!r}, sigma={self.sigma}; DenseCLIP has 'ordinary', 'sclip' and 'naclip', "
                "and a sigma above 0"
            )

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.vit.record(image, keep=("inputs", "queries", "keys", "values"))
        block = self.vit.blocks[-1]
        q, k, v, x = seen.queries[-1], seen.keys[-1], seen.values[-1], seen.inputs[-1]
        scale = q.shape[-1] ** -0.5
        if self.attention == "ordinary":
            weights = (q @ k.mT * scale).softmax(-1)
        elif self.attention == "sclip":
            weights = (q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)
        else:
            weights = (k @ k.mT * scale + self.neighbourhood(seen.grid).to(k)).softmax(-1)
        y = block.out((weights @ v).transpose(1, 2).flatten(2))
        if self.attention != "naclip":
            y = x + y
            y = y + block.mlp(block.norm2(y))
        cosines = normalize(self.vit.embed(y), dim=-1) @ self.vit.texts(concepts).mT
        return seen.patches(cosines[0].mT)

    def neighbourhood(self, grid: tuple[int, int]) -> Tensor:
        """G, (token, token), 0 in the row and column of the class token."""
        places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
        window = torch.exp(-(torch.cdist(places, places) ** 2) / (2 * self.sigma**2))
        return torch.nn.functional.pad(window, (1, 0, 1, 0))
