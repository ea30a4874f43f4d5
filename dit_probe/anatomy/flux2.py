"""Flux.2 (dev, Klein): as Flux, but one modulation, made outside of the blocks, serves all blocks of a kind.

The pipelines leave the chat template in the prompt stream, and number its tokens 0, 1, 2 … on a fourth rotary axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, qk_norms
from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
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
from dit_probe.errors import TraceError


class PlainNormText(AdaZeroText):
    """`AdaZeroText` whose norms are plain: ``n = (1 + g0) * norm(c) + b0``, and b0, g0, a1, b, g, a2 come ready."""

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        assert isinstance(context.modulation, Tensor)
        shift, scale, *modulation = context.modulation.chunk(6, dim=-1)
        return (1 + scale.unsqueeze(1)) * context.block.module.norm1_context(c) + shift.unsqueeze(1), modulation


@dataclass(frozen=True)
class FusedParallelText(TextSide):
    """Single-stream block, on text tokens alone: one matrix in for q, k, v and the MLP, one out for o and the MLP.

    q, k, v, m = W ((1 + g) * norm(c) + b);   c <- c + a * P [o_c, act(m)]
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        joint, _, gate = self._fused(c, context)
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in joint.chunk(3, dim=-1))
        return Projection.of(attention.norm_q(q), attention.norm_k(k), v, context.rotary, [gate])

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        attention = context.block.attention
        (gate,) = projection.modulation
        _, hidden, _ = self._fused(c, context)
        out = attention.to_out(torch.cat([o.flatten(2), attention.mlp_act_fn(hidden)], dim=-1))
        c = c + gate.unsqueeze(1) * out
        return c.clip(-65504, 65504) if c.dtype == torch.float16 else c

    def _fused(self, c: Tensor, context: TextContext) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v side by side, the MLP's hidden layer, and the gate."""
        assert isinstance(context.modulation, Tensor)
        attention = context.block.attention
        shift, scale, gate = context.modulation.chunk(3, dim=-1)
        normed = (1 + scale.unsqueeze(1)) * context.block.module.norm(c) + shift.unsqueeze(1)
        joint, hidden = attention.to_qkv_mlp_proj(normed).tensor_split([3 * attention.inner_dim], dim=-1)
        return joint, hidden, gate


class Flux2(Anatomy):
    """`Flux2Transformer2DModel`; reference images are image tokens with a frame number of their own."""

    family = "flux2"
    classes = ("Flux2Transformer2DModel",)
    text = PlainNormText(clips_half=True)
    single_text = FusedParallelText()
    text_first = True
    timestep_scale = 1000.0
    variants = ("dev", "klein", "references")
    pipeline_variants = ("klein",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        return arguments["temb_mod_txt" if block.kind == "joint" else "temb_mod"]

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return interleaved(arguments["image_rotary_emb"], places.in_joint(at))

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        if arguments.get("kv_cache_mode") is not None:
            raise TraceError(
                "the transformer runs with a cache of the reference images' keys (kv_cache_mode), so that its tokens "
                "change from step to step, and some keys belong to no token of the streams. Flux2KleinPipeline takes "
                "reference images without a cache"
            )
        frame, y, x, _ = arguments["img_ids"].reshape(-1, *arguments["img_ids"].shape[-2:])[0].long().T.tolist()
        return Grid(tuple(frame), tuple(y), tuple(x))

    # --- pipelines

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        hidden = pipe.encode_prompt(list(texts), device=pipe._execution_device, max_sequence_length=limit)[0]
        encoded = [self._template(pipe, text, limit) for text in texts]
        alone = [[ids for ids, real in zip(*self._template(pipe, t, limit), strict=True) if real] for t in ("a", "")]
        before = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*alone, strict=False))))
        # Pads stand on the left with some tokenizers.
        starts = [mask.index(1) + before for _, mask in encoded]
        count = limit - max(starts)
        if count < 1:
            raise ValueError(f"max_sequence_length={limit} leaves no room beside the {before} tokens of the template")
        return torch.stack([row[start : start + count] for row, start in zip(hidden, starts, strict=True)])

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        ids, mask = self._template(pipe, prompt, length)
        tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
        return tokenizer.convert_ids_to_tokens(ids), [not real for real in mask]

    def _template(self, pipe: Any, text: str, length: int) -> tuple[list[int], list[int]]:
        """Ids of a text in the pipeline's chat template, and which are real."""
        size = {"padding": "max_length", "truncation": True, "max_length": length}
        if hasattr(pipe, "system_message"):  # dev: a processor, which tokenises the template by itself
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            messages = format_input([text], system_message=pipe.system_message)
            encoded = pipe.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **size)
        else:
            filled = pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            encoded = pipe.tokenizer([filled], **size)
        return encoded["input_ids"][0], encoded["attention_mask"][0]

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, model = pipe._execution_device, pipe.transformer
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe._encode_vae_image(images, generator=None).to(model.dtype)
        embeds, text_ids = pipe.encode_prompt(list(prompts), device=device, **text)
        guidance = torch.full((len(latents),), 4.0, device=device) if model.config.guidance_embeds else None
        return EncodeInputs(
            latents=pipe._pack_latents(latents),
            noise=pipe._pack_latents(draw_noise(latents, seed)),
            call={
                "encoder_hidden_states": embeds,
                "txt_ids": text_ids,
                "img_ids": pipe._prepare_latent_ids(latents).to(device),
                "guidance": guidance,
            },
        )

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        height, width, tokens = 3, 4, 5
        grid = Grid.regular(height, width)
        if variant == "references":  # the pipelines give a first reference image frame 10
            grid = Grid(grid.frame + (10,) * 6, (*grid.y, 0, 0, 0, 1, 1, 1), grid.x + (0, 1, 2) * 2)
        inputs = {
            "hidden_states": torch.randn(batch, len(grid), 16),
            "encoder_hidden_states": torch.randn(batch, tokens, 32),
            "timestep": torch.full((batch,), 0.7),
            "img_ids": torch.tensor([grid.frame, grid.y, grid.x, [0] * len(grid)]).T,
            "txt_ids": torch.tensor([[0, 0, 0, 1 + 2 * token] for token in range(tokens)]),
            "guidance": torch.full((batch,), 4.0) if variant == "dev" else None,
        }
        return TinyModel(_transformer(variant, text_width=32), inputs, grid, concepts=torch.randn(3, 32))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        ids = inputs["txt_ids"][..., :1, :]
        ids = ids.expand(*ids.shape[:-2], embeddings.shape[1], -1)
        return {**inputs, "encoder_hidden_states": embeddings, "txt_ids": ids}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
        from transformers import Qwen3Config, Qwen3ForCausalLM

        tokenizer, _ = parts.t5()
        tokenizer.chat_template = "picture of {{ messages[0].content }} scene"
        # The pipeline reads the hidden states of layers 9, 18 and 27.
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        )
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(config),
            tokenizer=tokenizer,
            transformer=_transformer(variant, text_width=3 * config.hidden_size),
        )


def _transformer(variant: str, *, text_width: int) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=variant == "dev",
    )
