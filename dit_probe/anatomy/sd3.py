"""Stable Diffusion 3 and 3.5: joint blocks only, no rotary embedding, image before text in the attention call.

SD3.5-medium's ``attn2`` is self-attention among image tokens; no text, hence no concept, takes part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText
from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Grid


class SD3(Anatomy):
    """`SD3Transformer2DModel`."""

    family = "sd3"
    classes = ("SD3Transformer2DModel",)
    text = AdaZeroText()
    text_first = False
    pooled = True
    encoder = ("tokenizer_3", "text_encoder_3")
    variants = ("sd3", "sd3.5-large", "sd3.5-medium")
    pipeline_variants = ("sd3", "sd3.5-large", "sd3.5-medium")
    tiny_call = {"height": 16, "width": 16, "max_sequence_length": 16}

    def refuse(self, model: Any) -> str | None:
        attention = model.transformer_blocks[0].attn
        if type(attention.processor).__name__.startswith("Fused") and attention.norm_q is not None:
            return (
                "fuse_qkv_projections() was called, and diffusers' fused SD3 processor leaves out norm_q, norm_k and "
                "the norm_added_*: the model no longer computes what it was trained to. "
                "Call transformer.unfuse_qkv_projections() first"
            )
        return None

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def conditioner(self, model: Any) -> nn.Module:
        return model.time_text_embed

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        return Grid.regular(height // patch, width // patch)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        return Grid.regular(height // token, width // token)

    def planned_prompt_tokens(self, pipe: Any, limit: int) -> int:
        return pipe.tokenizer_max_length + limit

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        clip_length = pipe.tokenizer_max_length
        clip = pipe.tokenizer(prompt, padding="max_length", max_length=clip_length, truncation=True)
        strings = pipe.tokenizer.convert_ids_to_tokens(clip["input_ids"])
        pads = [not mask for mask in clip["attention_mask"]]
        t5_strings, t5_pads = super().tokens(pipe, prompt, length - clip_length)
        return strings + t5_strings, pads + t5_pads

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        device = pipe._execution_device
        return torch.cat(
            [pipe._get_clip_prompt_embeds(list(words), device=device, clip_model_index=which)[1] for which in (0, 1)],
            dim=-1,
        )

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device = pipe._execution_device
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(images).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        latents = latents.to(pipe.transformer.dtype)
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, device=device, **text
        )
        call = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        return EncodeInputs(latents, draw_noise(latents, seed), call)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 2) if variant == "sd3.5-medium" else (),
            qk_norm=None if variant == "sd3" else "rms_norm",
        )
        inputs = {
            "hidden_states": torch.randn(batch, 4, 6, 8),
            "encoder_hidden_states": torch.randn(batch, 5, 32),
            "pooled_projections": torch.randn(batch, 24),
            "timestep": torch.full((batch,), 700.0),
        }
        return TinyModel(model, inputs, Grid.regular(3, 4), concepts=torch.randn(3, 32))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            SD3Transformer2DModel,
            StableDiffusion3Pipeline,
        )

        tokenizer, clip = parts.clip(projection=True)
        tokenizer_2, clip_2 = parts.clip(projection=True)
        tokenizer_3, t5 = parts.t5()
        transformer = SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=parts.t5_width,
            caption_projection_dim=32,
            pooled_projection_dim=2 * parts.clip_width,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,) if variant == "sd3.5-medium" else (),
            qk_norm=None if variant == "sd3" else "rms_norm",
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=parts.vae(),
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=clip_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5,
            tokenizer_3=tokenizer_3,
        )
