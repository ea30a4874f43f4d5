"""Text sides modulated by six vectors in the order shift, scale, gate: three for attention, three for the MLP.

b1, g1, a1, b2, g2, a2 = modulation
c <- c + a1 * P o_c,   where q, k, v are projected from (1 + g1) * norm1(c) + b1       eq. (6)
c <- c + a2 * MLP((1 + g2) * norm2(c) + b2)                                            eq. (7)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.block import Projection, TextContext, TextSide


@dataclass(frozen=True)
class ShiftScaleGateText(TextSide):
    """The equations above; a subclass says how the six vectors and q, k, v are made.

    Attributes:
        norm1, norm2, mlp: attributes of the block.
        out: attribute of its attention module.
        clips_half: the model clips its text stream at float16's largest value.
    """

    norm1: str
    norm2: str
    mlp: str
    out: str
    clips_half: bool = False

    def vectors(self, c: Tensor, context: TextContext) -> Sequence[Tensor]:
        """``b1, g1, a1, b2, g2, a2``, each (row, width)."""
        raise NotImplementedError

    def projected(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v after the qk-norm, each (row, token, head, head_dim)."""
        raise NotImplementedError

    def project(self, c: Tensor, context: TextContext) -> Projection:
        shift, scale, *later = (part.unsqueeze(1) for part in self.vectors(c, context))
        normed = getattr(context.block.module, self.norm1)(c)
        q, k, v = self.projected(context.block.attention, normed * (1 + scale) + shift)
        return Projection.of(q, k, v, context.rotary, later)

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, shift, scale, mlp_gate = projection.modulation
        c = c + gate * getattr(context.block.attention, self.out)(o.flatten(2))
        c = c + mlp_gate * getattr(block, self.mlp)(getattr(block, self.norm2)(c) * (1 + scale) + shift)
        return c.clip(-65504, 65504) if self.clips_half and c.dtype == torch.float16 else c
