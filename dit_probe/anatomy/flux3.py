"""Flux.3: two residual streams that share one set of weights; text passes text-only blocks before it meets the image.

``n = (1 + g) * norm(c) + b``;   ``c <- c + a (P o_c + MLP(n))``. Text is modulated as at timestep 0 in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import (
    Block,
    Grid,
    Modulation,
    Places,
    Projection,
    Rotary,
    TextContext,
    TextSide,
    interleaved,
)


class SharedParallelText(TextSide):
    """Attention and MLP side by side, with the weights that image tokens use too; q and k are float32 until rotated."""

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed, gate = self._normed(c, context)
        if attention.fused_projections:
            projected = attention.to_qkv(normed).chunk(3, dim=-1)
        else:
            projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in projected)
        turned = Projection.of(attention.norm_q(q.float()), attention.norm_k(k.float()), v, context.rotary)
        vectors = (turned.q, turned.k, turned.q_unrotated, turned.k_unrotated)
        q, k, q_unrotated, k_unrotated = (vector.to(v.dtype) for vector in vectors)
        return Projection(q, k, v, q_unrotated, k_unrotated, (gate,))

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block, to_out = context.block.module, context.block.attention.to_out
        (gate,) = projection.modulation
        normed, _ = self._normed(c, context)
        return c + gate * (to_out[1](to_out[0](o.flatten(2))) + block.ff(normed))

    def _normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Tensor]:
        assert isinstance(context.modulation, Tensor)
        shift, scale, gate = context.modulation.chunk(3, dim=-1)
        return (1 + scale) * context.block.module.norm(c) + shift, gate


class Flux3(Anatomy):
    """`Flux3Transformer2DModel`; reference images are image tokens with a frame number of their own."""

    family = "flux3"
    classes = ("Flux3Transformer2DModel",)
    joint = "single_transformer_blocks"
    single = ""
    text = SharedParallelText()
    text_first = True
    timestep_scale = 1000.0
    unlabelled_calls = ("cond", "uncond")
    variants = ("base", "distilled", "references")

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        return arguments["temb_mod_context"][:, :1]  # given per token, the same for each

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return interleaved(arguments["image_rotary_emb"], places.in_joint(at))

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def entry(self, model: Any) -> nn.Module:
        return model.txt_mode_blocks[-1] if len(model.txt_mode_blocks) else model.context_embedder

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        def at(timestep: Tensor, embedder: nn.Module) -> Tensor:
            return embedder(model.time_proj(timestep).to(embeddings.dtype))[:, None]

        time = at(torch.zeros(len(embeddings)).to(embeddings), model.timestep_embedder)
        if arguments.get("target_timestep") is not None:
            target = arguments["target_timestep"].to(embeddings)
            target = target if len(target) == 1 else target[rows]
            time = time + at(target * 1000, model.target_timestep_embedder)
        modulation = model.early_stream_modulations["txt"](F.silu(time))
        rotary = model.pos_embed(arguments["txt_ids"][:1])
        # A row for each concept: in the text-only blocks too, none sees another.
        count = embeddings.shape[1]
        c = model.context_embedder(embeddings).flatten(0, 1)[:, None]
        for block in model.txt_mode_blocks:
            c = block(c, modulation.repeat_interleave(count, 0), rotary)
        return c.reshape(len(embeddings), count, -1)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        ids = [arguments["img_ids"], arguments.get("image_cond_ids")]
        frame, y, x, _ = torch.cat([part for part in ids if part is not None]).long().T.tolist()
        return Grid(tuple(frame), tuple(y), tuple(x))

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import Flux3Transformer2DModel

        model = Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=8,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=variant == "distilled",
        )
        height, width, tokens = 3, 4, 5
        grid = Grid.regular(height, width)
        inputs = {
            "hidden_states": torch.randn(batch, len(grid), 16),
            "encoder_hidden_states": torch.randn(batch, tokens, 32),
            "timestep": torch.full((batch,), 0.7),
            "img_ids": _ids(grid),
            "txt_ids": torch.tensor([[0, 0, 0, 1 + 2 * token] for token in range(tokens)]),
        }
        if variant == "distilled":
            inputs["target_timestep"] = torch.tensor([0.5, 0.3][:batch])
        if variant == "references":
            reference = Grid((10,) * 6, (0, 0, 0, 1, 1, 1), (0, 1, 2) * 2)
            inputs |= {"image_cond_hidden_states": torch.randn(batch, 6, 8), "image_cond_ids": _ids(reference)}
            grid = Grid(grid.frame + reference.frame, grid.y + reference.y, grid.x + reference.x)
        return TinyModel(model, inputs, grid, concepts=torch.randn(3, 32))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        ids = inputs["txt_ids"][:1].expand(embeddings.shape[1], -1)
        return {**inputs, "encoder_hidden_states": embeddings, "txt_ids": ids}


def _ids(grid: Grid) -> Tensor:
    return torch.tensor([grid.frame, grid.y, grid.x, [0] * len(grid)]).T
