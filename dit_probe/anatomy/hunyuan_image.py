"""HunyuanImage 2.1: HunyuanVideo's blocks on pictures, with a second text for what is written in them.

In the prompt stream the second text's (ByT5) real tokens come first, then the prompt's, then the padding of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import TinyModel
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.hunyuan_video import RefinedText, padded


class HunyuanImage(RefinedText):
    """`HunyuanImageTransformer2DModel`. Concepts are words of the prompt's own encoder, not of ByT5."""

    family = "hunyuan-image"
    classes = ("HunyuanImageTransformer2DModel",)
    variants = ("padded", "two-texts", "distilled")

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        second = arguments.get("encoder_hidden_states_2") if model.context_embedder_2 is not None else None
        return super().prompt_tokens(model, arguments) + (0 if second is None else second.shape[1])

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        nothing = {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None}
        return {**super().with_prompt(inputs, embeddings), **nothing}

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return pipe._get_qwen_prompt_embeds(
            tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, prompt=list(texts), device=pipe._execution_device
        )[0][:, :limit]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        # How many real tokens the second text has, and so where the prompt's begin, differs from row to row.
        return [""] * length, [False] * length

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        down, across = (pipe.vae_scale_factor * patch for patch in pipe.transformer.config.patch_size)
        return Grid.regular(height // down, width // across)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import HunyuanImageTransformer2DModel

        model = HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=24,
            text_embed_2_dim=12 if variant == "two-texts" else None,
            rope_axes_dim=(8, 8),
            guidance_embeds=variant == "distilled",
            use_meanflow=variant == "distilled",
        )
        inputs = {
            "hidden_states": torch.randn(batch, 4, 3, 4),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant == "two-texts":
            second = {
                "encoder_hidden_states_2": torch.randn(batch, 4, 12),
                "encoder_attention_mask_2": padded(batch, 4),
            }
            inputs |= second
        if variant == "distilled":
            inputs |= {"guidance": torch.full((batch,), 3500.0), "timestep_r": torch.full((batch,), 500.0)}
        return TinyModel(model, inputs, Grid.regular(3, 4), torch.randn(3, 24))
