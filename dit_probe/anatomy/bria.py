"""Bria 3.2: Flux's blocks, of which the single-stream ones too take and return text and image apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import TinyParts
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.unpooled import UnpooledFlux


class Bria(UnpooledFlux):
    """`BriaTransformer2DModel`. T5 reads a text without padding; zeros are appended to what it makes of it."""

    family = "bria"
    classes = ("BriaTransformer2DModel",)
    timestep_scale = 1.0
    unlabelled_calls = ("cond",)
    variants = ("3.2",)
    pipeline_variants = ("3.2",)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        # One by one: given several, the pipeline warns that every one of them was truncated.
        encode = pipe._get_t5_prompt_embeds
        device = pipe._execution_device
        return torch.cat([encode(text, max_sequence_length=limit, device=device) for text in texts])

    def text_inputs(self, pipe: Any, prompts: list[str], latents: Tensor, **text: Any) -> dict[str, Any]:
        device = pipe._execution_device
        embeddings, _, text_ids = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False, **text)
        return {"encoder_hidden_states": embeddings, "txt_ids": text_ids}

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        # Its factor counts the packing of latents already.
        token = pipe.vae_scale_factor
        return Grid.regular(height // token, width // token)

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        return self.t5_pipeline("BriaPipeline", variant, parts)
