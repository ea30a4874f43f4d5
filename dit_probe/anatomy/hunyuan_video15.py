"""HunyuanVideo 1.5: joint blocks alone; image tokens, ByT5's and the prompt's share the text stream.

Real tokens come first (image, ByT5, prompt), then the padding of all three. Padding attends to nothing and nobody
attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import TinyModel
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.hunyuan_video import RefinedText, padded


class HunyuanVideo15(RefinedText):
    """`HunyuanVideo15Transformer3DModel`. Concepts are words of the prompt's own encoder, not of ByT5."""

    family = "hunyuan-video-1.5"
    classes = ("HunyuanVideo15Transformer3DModel",)
    variants = ("text", "image", "meanflow")

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        others = ("encoder_hidden_states_2", "image_embeds")
        return super().prompt_tokens(model, arguments) + sum(arguments[name].shape[1] for name in others)

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        c = super().embed(model, embeddings, arguments, rows)
        return c + model.cond_type_embed(torch.zeros_like(c[..., 0], dtype=torch.long))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        others = ("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds")
        return {**super().with_prompt(inputs, embeddings), **{name: inputs[name][:, :0] for name in others}}

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return pipe._get_mllm_prompt_embeds(
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            prompt=list(texts),
            device=pipe._execution_device,
            tokenizer_max_length=limit,
        )[0]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        # How many real tokens stand before the prompt's differs from row to row.
        return [""] * length, [False] * length

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import HunyuanVideo15Transformer3DModel

        model = HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            text_embed_dim=24,
            text_embed_2_dim=12,
            image_embed_dim=10,
            rope_axes_dim=(4, 6, 6),
            use_meanflow=variant == "meanflow",
        )
        image = torch.randn(batch, 3, 10) if variant == "image" else torch.zeros(batch, 3, 10)
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 2, 3),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "encoder_hidden_states_2": torch.randn(batch, 4, 12),
            "encoder_attention_mask_2": padded(batch, 4),
            "image_embeds": image,
            "timestep": torch.full((batch,), 700.0),
        }
        if variant == "meanflow":
            inputs["timestep_r"] = torch.full((batch,), 500.0)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))
