"""HunyuanVideo: image before text, text never rotated, padding masked as keys; and what its relatives share with it.

Before the first block a refiner lets the text tokens attend to each other, modulated by the timestep and the mean of
the text. A concept goes through it alone, as a prompt of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, ParallelText, qk_norms
from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import Block, Grid, TextContext


class ReplacingText(ParallelText):
    """Single blocks; those for image-to-video modulate the first frame's tokens in another way than the rest."""

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        norm, temb = context.block.module.norm, context.modulation
        if "TokenReplace" in type(norm).__name__:
            n, gate, _ = norm(c, temb, temb, 0)  # none of these tokens is of the first frame
        else:
            n, gate = norm(c, emb=temb)
        return n, [gate]


class RefinedText(Anatomy):
    """Joint and single blocks of the Hunyuan models behind their token refiner. No family by itself."""

    text = AdaZeroText()
    single_text = ReplacingText()
    text_first = False
    returns_text_first = False

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        sizes, patch = arguments["hidden_states"].shape[2:], model.config.patch_size
        if isinstance(patch, int):
            patch = (model.config.patch_size_t, patch, patch)
        *frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        return Grid.regular(height, width, *frames)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        config = pipe.transformer.config
        token = pipe.vae_scale_factor_spatial * config.patch_size
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        return Grid.regular(height // token, width // token, latent_frames // config.patch_size_t)

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        count = embeddings.shape[1]
        alone, times = embeddings.flatten(0, 1).unsqueeze(1), arguments["timestep"][rows].repeat_interleave(count)
        return self.entry(model)(alone, times).view(*embeddings.shape[:2], -1)

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        mask = inputs["encoder_attention_mask"].new_ones(embeddings.shape[:2])
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


class HunyuanVideo(RefinedText):
    """`HunyuanVideoTransformer3DModel`, text to video and image to video (concatenated or replaced first frame)."""

    family = "hunyuan-video"
    classes = ("HunyuanVideoTransformer3DModel",)
    pooled = True
    pooled_argument = 1
    variants = ("padded", "token-replace", "unguided")

    def conditioner(self, model: Any) -> nn.Module:
        return model.time_text_embed

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return pipe._get_llama_prompt_embeds(
            list(texts), _template(), device=pipe._execution_device, max_sequence_length=limit
        )[0]

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        return pipe._get_clip_prompt_embeds(list(words), device=pipe._execution_device)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        template, start = _template()["template"], _template()["crop_start"]
        encoded = pipe.tokenizer(
            template.format(prompt), padding="max_length", max_length=start + length, truncation=True
        )
        strings = pipe.tokenizer.convert_ids_to_tokens(encoded["input_ids"])[start:]
        return strings, [not mask for mask in encoded["attention_mask"][start:]]

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import HunyuanVideoTransformer3DModel

        model = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=24,
            pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=variant != "unguided",
            image_condition_type="token_replace" if variant == "token-replace" else None,
        )
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 4, 6),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "pooled_projections": torch.randn(batch, 12),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant != "unguided":
            inputs["guidance"] = torch.full((batch,), 6000.0)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))


def padded(batch: int, tokens: int) -> Tensor:
    """A mask under which the last tokens of every row are padding, more in the first row than in the second."""
    kept = torch.tensor([tokens - 2, tokens - 1])[:batch, None]
    return (torch.arange(tokens)[None] < kept).long()


def _template() -> dict[str, Any]:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    return DEFAULT_PROMPT_TEMPLATE
