"""Mochi: text narrower than the image, tanh gates inside norms that follow attention and MLP, no padding in attention.

c <- c + norm2(P o_c; tanh a1);   c <- c + norm4(MLP(norm3(c; 1 + g)); tanh a2),   norm(y; s) = s * y / rms(y)

Attention is one call for every row, over the image and the row's own prompt tokens, without its padding. What
modulates the blocks pools the prompt; concepts are modulated as the prompt is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, qk_norms
from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Grid, Projection, TextContext
from dit_probe.attention import AttentionCall
from dit_probe.errors import TraceError


class NormedGateText(AdaZeroText):
    """`AdaZeroText` with the update above; the modulation is a1, g, a2."""

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        c = c + block.norm2_context(context.block.attention.to_add_out(o.flatten(2)), gate.tanh())
        hidden = block.ff_context(block.norm3_context(c, 1 + scale.float()))
        return c + block.norm4_context(hidden, mlp_gate.tanh())


class Mochi(Anatomy):
    """`MochiTransformer3DModel`; its last block hands its text on unchanged."""

    family = "mochi"
    classes = ("MochiTransformer3DModel",)
    attention = "attn1"
    text = NormedGateText()
    text_first = False
    returns_text_first = False
    variants = ("padded", "full")
    pipeline_variants = ("mochi",)
    tiny_call = {"height": 32, "width": 48, "num_frames": 7, "num_inference_steps": 2, "max_sequence_length": 16}

    def text_width(self, model: Any) -> int:
        return model.config.pooled_projection_dim

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def entry(self, model: Any) -> nn.Module:
        return model.time_embed.caption_proj

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        frames, height, width = arguments["hidden_states"].shape[-3:]
        patch = model.config.patch_size
        return Grid.regular(height // patch, width // patch, frames)

    def joint_call(self, calls: Sequence[AttentionCall], arguments: Mapping[str, Any], where: str, tokens: int) -> Any:
        """One call of the rows' calls: their padding is put back as zeros, and as masked queries and keys."""
        real = arguments["encoder_attention_mask"].bool()
        prompt = real.shape[1]
        counts = real.sum(1).tolist()
        if not torch.equal(real, real.cumprod(1).bool()):
            raise TraceError(
                f"{where}: the prompt's mask has padding before or between its tokens. MochiAttnProcessor2_0 then "
                "hands attention outputs to the wrong tokens; give padding on the right"
            )
        expected = [tokens - prompt + count for count in counts]
        if [call.q.shape[1] for call in calls] != expected or any(len(call.q) > 1 for call in calls):
            return super().joint_call(calls, arguments, where, tokens)  # which says what was seen instead
        q, k, v, o = (torch.cat([_padded(getattr(call, name), tokens) for call in calls]) for name in "qkvo")
        mask = None
        if any(count < prompt for count in counts):
            there = torch.arange(tokens, device=real.device) < torch.tensor(expected, device=real.device)[:, None]
            # A padded query sees nothing, for which the attention operation gives zeros, as the model does.
            mask = there[:, None, :, None] & there[:, None, None, :]
        return AttentionCall(q, k, v, o, mask=mask, scale=calls[0].scale)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_spatial_scale_factor * pipe.transformer.config.patch_size
        return Grid.regular(height // token, width // token, (frames - 1) // pipe.vae_temporal_scale_factor + 1)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return super().encode_text(pipe, texts, limit)[0]

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tokens = 5
        real = torch.ones(batch, tokens, dtype=torch.bool)
        if variant == "padded":
            real[0, 3:] = False
        inputs = {
            "hidden_states": torch.randn(batch, 12, 2, 4, 6),
            "encoder_hidden_states": torch.randn(batch, tokens, 32),
            "timestep": torch.full((batch,), 700.0),
            "encoder_attention_mask": real,
        }
        return TinyModel(_transformer(text_width=32), inputs, Grid.regular(2, 3, 2), concepts=torch.randn(3, 32))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        real = inputs["encoder_attention_mask"].new_ones(embeddings.shape[:2])
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_attention_mask": real}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        return {**arguments, "temb": before["temb"]}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

        tokenizer, t5 = parts.t5()
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
        )
        return MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=vae,
            text_encoder=t5,
            tokenizer=tokenizer,
            transformer=_transformer(text_width=parts.t5_width),
        )


def _padded(part: Tensor, tokens: int) -> Tensor:
    """(row, token, head, head_dim) with zeros behind."""
    return nn.functional.pad(part, (0, 0, 0, 0, 0, tokens - part.shape[1]))


def _transformer(*, text_width: int) -> Any:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        pooled_projection_dim=24,
        text_embed_dim=text_width,
        time_embed_dim=16,
    )
