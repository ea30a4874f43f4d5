"""Text sides whose projections and MLP are the image's too: what tells the streams apart is their modulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.block import Projection, TextContext, TextSide


class SharedWeightsText(TextSide):
    """The text half of two adaptive norms, then the projections and MLP that image tokens use too; CogVideoX.

    n, a1 = norm1(c, temb);   c <- c + a1 * P o_c
    m, a2 = norm2(c, temb);   c <- c + a2 * MLP(m)
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed, modulation = self.normed(c, context)
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in self.projected(attention, normed))
        norm_q, norm_k = self.norms(attention)
        q = q if norm_q is None else norm_q(q)
        k = k if norm_k is None else norm_k(k)
        return Projection.of(q, k, v, context.rotary, modulation)

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        """``n``, what the projections see, and the gates, shifts and scales of what follows."""
        # norm1 works row by row and token by token: c stands in for the image as well, whose half is dropped.
        _, normed, _, gate = context.block.module.norm1(c[:, :1], c, context.modulation)
        return normed, [gate]

    def projected(self, attention: Any, normed: Tensor) -> Sequence[Tensor]:
        """q, k and v, heads side by side."""
        if getattr(attention, "fused_projections", False):
            return attention.to_qkv(normed).chunk(3, dim=-1)
        return attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)

    def norms(self, attention: Any) -> tuple[Any, Any]:
        """The qk-norms of text, None where there are none."""
        return attention.norm_q, attention.norm_k

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        to_out = context.block.attention.to_out
        (gate,) = projection.modulation
        c = c + gate * to_out[1](to_out[0](o.flatten(2)))
        _, normed, _, mlp_gate = block.norm2(c[:, :1], c, context.modulation)
        return c + mlp_gate * block.ff(normed)


@dataclass(frozen=True)
class OneNormText(SharedWeightsText):
    """One adaptive norm returns ten tensors, the text's last: CogView3+, CogView4, GLM-Image.

    _, _, _, _, _, n, a1, b, g, a2 = norm1(x, c, temb)
    c <- c + a1 * P o_c;   c <- c + a2 * MLP((1 + g) * norm(c) + b)

    Attributes:
        clips_half: as in `AdaZeroText`.
    """

    clips_half: bool = False

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        _, _, _, _, _, normed, *modulation = context.block.module.norm1(c[:, :1], c, context.modulation)
        return normed, modulation

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        to_out = context.block.attention.to_out
        gate, shift, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        c = c + gate * to_out[1](to_out[0](o.flatten(2)))
        c = c + mlp_gate * block.ff(block.norm2_context(c) * (1 + scale) + shift)
        return c.clip(-65504, 65504) if self.clips_half and c.dtype == torch.float16 else c
