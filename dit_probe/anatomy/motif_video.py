"""Motif-Video: HunyuanVideo's blocks without a refiner; image tokens may read the text once more, by cross-attention.

The last single-stream blocks may be a decoder, in which a second image stream takes the place of text: no prompt is
left there, and they are not among the blocks that are traced. The tokens of a first frame stand before the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Grid, Places
from dit_probe.anatomy.hunyuan_video import RefinedText, padded
from dit_probe.anatomy.qwen_vl import tiny_vae


class MotifVideo(RefinedText):
    """`MotifVideoTransformer3DModel`."""

    family = "motif-video"
    classes = ("MotifVideoTransformer3DModel",)
    variants = ("unmasked", "masked", "decoder", "first-frame")

    pipeline_variants = ("masked",)
    tiny_call = {"height": 8, "width": 12, "num_frames": 3, "max_sequence_length": 16}

    embed = Anatomy.embed

    def blocks(self, model: Any) -> tuple[Block, ...]:
        found = super().blocks(model)
        return found[: len(found) - model.num_decoder_layers]

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        image, prompt = len(self.grid(model, arguments)), self.prompt_tokens(model, arguments)
        frame = arguments.get("image_embeds")
        start = image + (0 if frame is None else frame.shape[1])
        return Places(slice(0, image), slice(start, start + prompt), start + prompt)

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        return arguments["hidden_states"], arguments["encoder_hidden_states"][:, -places.prompt_tokens :]

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor]:
        return output[0], output[1][:, -places.prompt_tokens :]

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {
            **inputs,
            "encoder_hidden_states": embeddings,
            "encoder_attention_mask": torch.ones(embeddings.shape[:2]),
            "image_embeds": None,
        }

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        parts = pipe.text_encoder, pipe.tokenizer, list(texts)
        return pipe._get_prompt_embeds(*parts, max_sequence_length=limit, device=pipe._execution_device)[0]

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, text_width=24)
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 4, 6),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant in ("masked", "first-frame"):
            inputs["encoder_attention_mask"] = padded(batch, 5)
        if variant == "first-frame":
            inputs["image_embeds"] = torch.randn(batch, 3, 10)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        import diffusers

        tokenizer, t5 = parts.t5()
        return diffusers.MotifVideoPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(diffusers.AutoencoderKLWan, scale_factor_spatial=2, scale_factor_temporal=2),
            text_encoder=t5,  # the real one, of T5Gemma, is called in the same way
            tokenizer=tokenizer,
            # Latents, those of a first frame, and the mask of the latter.
            transformer=_transformer(variant, text_width=parts.t5_width, in_channels=9),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
        )


def _transformer(variant: str, *, text_width: int, in_channels: int = 4) -> Any:
    from diffusers import MotifVideoTransformer3DModel

    return MotifVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3 if variant == "decoder" else 2,
        num_decoder_layers=1 if variant == "decoder" else 0,
        patch_size=2,
        text_embed_dim=text_width,
        image_embed_dim=10 if variant == "first-frame" else None,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=variant == "masked",
        enable_text_cross_attention_single=variant in ("masked", "decoder"),
    )
