"""The row "TextSpan": CLIP's similarity as a sum over layers, heads and tokens (Gandelsman et al., ICLR 2024).

The segmentations of that paper need its decomposition of the class token alone, not its labels of heads. The last
residual stream is a sum of K = 2L + 1 terms, of L attentions, L MLPs and the embedding. An attention's is a sum over
heads h and tokens j,

    c_{l,j,h} = A_l^h[0, j] W_O^h v_{l,j}^h + b_O / M,    M = heads × tokens

and the final norm, of mean μ and deviation σ at the class token, is shared out equally:

    ĉ = γ (c - μ / KM) / σ + β / KM,    S_{l,h,j} = ⟨P ĉ_{l,j,h}, t⟩ / ‖P LN(x_CLS)‖

All S of a text, with those of the MLPs and the embedding, add up to its cosine similarity with the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import dit_probe as dp
from probes.baselines.vit_method import ViTMethod


@dataclass(frozen=True)
class TextSpan(ViTMethod):
    """What every patch adds to the similarity of picture and concept, in every layer and head: S above.

    The authors' map is the sum over layers and heads, this method's is the mean: the same but for one constant factor.

    Attributes:
        contrast: texts whose mean score is subtracted. In Gandelsman et al. these are the names of ImageNet's 1000
            classes; ConceptAttention's evaluation code subtracts nothing.
        clip: raise maps, which are signed, to 0 after the mean over layers and heads; scores are left signed.

    Raises:
        ModelError: a model other than a CLIPModel.
        ConceptError: `contrast` is a string.
    """

    contrast: Sequence[str] = ()
    clip: bool = False
    kind: ClassVar = "relevance"
    needs: ClassVar = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.contrast, str):
            raise dp.errors.ConceptError(f"contrast={self.contrast!r}: give a list of words, or () for none")

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"layer": range(len(self.vit.blocks)), "head": range(self.vit.heads)}

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        found = super().__call__(images, concepts)
        return found.clip(min=0) if self.clip else found

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        vit, final = self.vit, self.vit.final
        head: Any = vit.head
        seen = vit.record(image, keep=("attention", "values"), class_only=True)
        state = seen.output[0, 0]
        texts = vit.texts(concepts)
        if self.contrast:  # scores are linear in the text
            texts = texts - vit.texts(self.contrast).mean(0)
        # Texts are brought back through projection and norm to the residual stream, where they meet each term; so none
        # of the L × H × N terms is ever as wide as the stream.
        texts = texts @ head.weight / vit.embed(state).norm()
        reading = texts * final.weight * (state.var(correction=0) + final.eps).rsqrt()
        tokens, depth = seen.values[0].shape[2], len(vit.blocks)
        parts = tokens * vit.heads
        rest = (texts @ final.bias - state.mean() * reading.sum(-1)) / ((2 * depth + 1) * parts)
        found = []
        for block, weights, values in zip(vit.blocks, seen.attention, seen.values, strict=True):
            by_head = torch.einsum("cw,whd->chd", reading, block.out.weight.unflatten(1, (vit.heads, -1)))
            terms = torch.einsum("chd,hjd->chj", by_head, values[0]) * weights[0, :, 0]
            found.append(terms + (reading @ block.out.bias / parts + rest)[:, None, None])
        return seen.patches(torch.stack(found, 1))
