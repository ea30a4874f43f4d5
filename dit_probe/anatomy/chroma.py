"""Chroma: Flux's blocks, whose modulation is looked up for every block, and a padding mask that is added to the logits.

No block has modulation weights: a small network turns the timestep into one vector (row, 3 or 12, width) for each.

    joint:  b1, g1, a1, b, g, a2 = temb[:, 6:];   n = (1 + g1) * norm(c) + b1;   then eqs. (6) and (7) as in Flux
    single: b1, g1, a1 = temb

The pipeline's mask is 1 and 0 in floating point, its outer product with itself added to the logits: a hidden token
loses one nat against the others, and is not hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dit_probe.anatomy.base import TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Modulation
from dit_probe.anatomy.unpooled import UnpooledFlux, masked_as_first, padding_mask


class Chroma(UnpooledFlux):
    """`ChromaTransformer2DModel`. Prompt and negative prompt are two calls that the pipeline does not name."""

    family = "chroma"
    classes = ("ChromaTransformer2DModel",)
    unlabelled_calls = ("cond", "uncond")
    variants = ("unmasked", "added-mask", "bool-mask")
    pipeline_variants = ("added-mask",)

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        temb = arguments["temb"]
        return temb[:, 6:] if block.kind == "joint" else temb

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        device = pipe._execution_device
        embeddings, _ = pipe._get_t5_prompt_embeds(list(texts), max_sequence_length=limit, device=device)
        return embeddings

    def text_inputs(self, pipe: Any, prompts: list[str], latents: Tensor, **text: Any) -> dict[str, Any]:
        device = pipe._execution_device
        embeddings, text_ids, mask, *_ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, **text
        )
        mask = pipe._prepare_attention_mask(len(latents), latents.shape[1], latents.dtype, mask)
        return {"encoder_hidden_states": embeddings, "txt_ids": text_ids, "attention_mask": mask}

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        changed = super().with_prompt(inputs, embeddings)
        if (mask := inputs.get("attention_mask")) is not None:
            images = inputs["hidden_states"].shape[1]
            changed["attention_mask"] = masked_as_first(mask, embeddings.shape[1], images)
        return changed

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tiny = super().tiny(variant, batch)
        if variant == "unmasked":
            return tiny
        mask = padding_mask(batch, tokens=5, images=len(tiny.grid))
        mask = mask if variant == "bool-mask" else mask.float()
        return TinyModel(tiny.transformer, {**tiny.inputs, "attention_mask": mask}, tiny.grid, tiny.concepts)

    def tiny_transformer(self, variant: str, *, text_width: int, in_channels: int = 16, **options: Any) -> Any:
        small = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2}
        with warnings.catch_warnings():
            # diffusers warns of its own import of FluxPosEmbed.
            warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
            return super().tiny_transformer(variant, text_width=text_width, in_channels=in_channels, **small, **options)

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        return self.t5_pipeline("ChromaPipeline", variant, parts)
