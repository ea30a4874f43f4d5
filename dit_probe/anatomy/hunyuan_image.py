"""HunyuanImage 2.1: HunyuanVideo's blocks on pictures, with a second text for what is written in them.

In the prompt stream the second text's (ByT5) real tokens come first, then the prompt's, then the padding of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import TinyModel, TinyParts
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.hunyuan_video import RefinedText, padded
from dit_probe.anatomy.qwen_vl import TINY_WIDTH, tiny_text_encoder

_BYT5_TOKENS = 128


class HunyuanImage(RefinedText):
    """`HunyuanImageTransformer2DModel`. Concepts are words of the prompt's own encoder, not of ByT5."""

    family = "hunyuan-image"
    classes = ("HunyuanImageTransformer2DModel",)
    variants = ("padded", "two-texts", "distilled")
    pipeline_variants = ("two-texts",)
    tiny_call = {"height": 16, "width": 24}

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        second = arguments.get("encoder_hidden_states_2") if model.context_embedder_2 is not None else None
        return super().prompt_tokens(model, arguments) + (0 if second is None else second.shape[1])

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        nothing = {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None}
        return {**super().with_prompt(inputs, embeddings), **nothing}

    def planned_prompt_tokens(self, pipe: Any, limit: int) -> int:
        return _BYT5_TOKENS + limit

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return pipe._get_qwen_prompt_embeds(
            tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, prompt=list(texts), device=pipe._execution_device
        )[0][:, :limit]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

        start = pipe.prompt_template_encode_start_idx
        encoded = pipe.tokenizer(
            pipe.prompt_template_encode.format(prompt), truncation=True, max_length=start + pipe.tokenizer_max_length
        )
        return real_first(pipe, extract_glyph_text(prompt), encoded["input_ids"][start:], length)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        down, across = (pipe.vae_scale_factor * patch for patch in pipe.transformer.config.patch_size)
        return Grid.regular(height // down, width // across)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, text_width=24, second_width=12)
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

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        import diffusers

        tokenizer, encoder = tiny_text_encoder("2.5", parts.words)
        byt5_tokenizer, byt5 = tiny_byt5()
        vae = diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=32,
            scaling_factor=0.8,
        )
        pipe = diffusers.HunyuanImagePipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=byt5,
            tokenizer_2=byt5_tokenizer,
            transformer=_transformer(variant, text_width=TINY_WIDTH, second_width=byt5.config.d_model),
            guider=diffusers.AdaptiveProjectedMixGuidance(),
        )
        pipe.tokenizer_max_length = 16
        return pipe


def real_first(pipe: Any, glyphs: str | None, ids: Sequence[int], length: int) -> tuple[list[str], list[bool]]:
    """Strings of a prompt stream: what `glyphs` are for ByT5, then the prompt's tokens, then the padding of both."""
    second = pipe.tokenizer_2(glyphs or "", truncation=True, max_length=pipe.tokenizer_2_max_length)["input_ids"]
    strings = pipe.tokenizer_2.convert_ids_to_tokens(second if glyphs else [])
    strings = (strings + pipe.tokenizer.convert_ids_to_tokens(ids))[:length]
    missing = length - len(strings)
    return strings + [""] * missing, [False] * len(strings) + [True] * missing


def tiny_byt5() -> tuple[Any, Any]:
    """The tokenizer of bytes, which needs no files, and a small random T5 for it."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return ByT5Tokenizer(), T5EncoderModel(T5Config(vocab_size=384, **sizes))


def _transformer(variant: str, *, text_width: int, second_width: int) -> Any:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=text_width,
        text_embed_2_dim=second_width if variant == "two-texts" else None,
        rope_axes_dim=(8, 8),
        guidance_embeds=variant == "distilled",
        use_meanflow=variant == "distilled",
    )
