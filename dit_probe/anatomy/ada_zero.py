"""The commonest text sides: adaptive layer norm with six outputs, projections of its own, a gated MLP.

    n, a1, b, g, a2 = norm1_context(c, temb)
    c <- c + a1 * P o_c                                    eq. (6)
    c <- c + a2 * MLP((1 + g) * norm(c) + b)               eq. (7)

The paper's eqs. (6) and (7) leave out that ``n`` is itself shifted and scaled before the projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.block import Block, Projection, TextContext, TextSide


def qk_norms(block: Block) -> dict[str, nn.Module]:
    """The norms that q and k pass last before they are rotated, for `Anatomy.unrotated`."""
    attention = block.attention
    shared = {"q": attention.norm_q, "k": attention.norm_k}
    if block.kind == "single":
        return shared
    added = {"q_p": attention.norm_added_q, "k_p": attention.norm_added_k}
    return {f"{name}_x": norm for name, norm in shared.items()} | added


@dataclass(frozen=True)
class AdaZeroText(TextSide):
    """Text side of Flux and SD3 blocks: ``norm1_context``, ``add_*_proj``, ``to_add_out``, ``ff_context``.

    Attributes:
        clips_half: the model clips its text stream at float16's largest value; so must whatever follows it.
    """

    clips_half: bool = False

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed, modulation = self.normed(c, context)
        if getattr(attention, "fused_projections", False):
            projected = attention.to_added_qkv(normed).chunk(3, dim=-1)
        else:
            projected = (attention.add_q_proj(normed), attention.add_k_proj(normed), attention.add_v_proj(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in projected)
        q = q if attention.norm_added_q is None else attention.norm_added_q(q)
        k = k if attention.norm_added_k is None else attention.norm_added_k(k)
        return Projection.of(q, k, v, context.rotary, modulation)

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        """``n``, what the projections see, and ``a1, b, g, a2``, each (row, width)."""
        norm = context.block.module.norm1_context
        if not context.block.text_output:
            return norm(c, context.modulation), []
        n, *modulation = norm(c, emb=context.modulation)
        return n, modulation

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, shift, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        c = c + gate * context.block.attention.to_add_out(o.flatten(2))
        c = c + mlp_gate * block.ff_context(block.norm2_context(c) * (1 + scale) + shift)
        return c.clip(-65504, 65504) if self.clips_half and c.dtype == torch.float16 else c


@dataclass(frozen=True)
class ParallelText(TextSide):
    """Single-stream blocks of Flux and its kin, on text tokens alone: attention and MLP side by side.

    n, a = norm(c, temb);   c <- c + a * P [o_c, MLP(n)]

    Attributes:
        clips_half: as in `AdaZeroText`.
    """

    clips_half: bool = False

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed, modulation = self.normed(c, context)
        if getattr(attention, "fused_projections", False):
            projected = attention.to_qkv(normed).chunk(3, dim=-1)
        else:
            projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in projected)
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        return Projection.of(q, k, v, context.rotary, modulation)

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        """``n``, what the projections see, and the gates, shifts and scales of what follows, each (row, width)."""
        n, gate = context.block.module.norm(c, emb=context.modulation)
        return n, [gate]

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        (gate,) = projection.modulation
        normed, _ = self.normed(c, context)
        hidden = torch.cat([o.flatten(2), self.mlp(block, normed)], dim=2)
        c = c + gate.unsqueeze(1) * block.proj_out(hidden)
        return c.clip(-65504, 65504) if self.clips_half and c.dtype == torch.float16 else c

    def mlp(self, block: Any, normed: Tensor) -> Tensor:
        """The hidden layer of the MLP branch."""
        return block.act_mlp(block.proj_mlp(normed))
