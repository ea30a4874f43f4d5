"""CogView3+: streams that share one set of weights, positions added to the image alone, T5 text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Modulation
from dit_probe.anatomy.shared_weights import OneNormText


class CogView3Plus(Anatomy):
    """`CogView3PlusTransformer2DModel`. Without a negative prompt its pipeline guides by embeddings of zeros."""

    family = "cogview3plus"
    classes = ("CogView3PlusTransformer2DModel",)
    attention = "attn1"
    text = OneNormText(clips_half=True)
    text_first = True
    returns_text_first = False
    variants = ("cogview3plus",)
    pipeline_variants = ("cogview3plus",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        return arguments["emb"]

    def entry(self, model: Any) -> nn.Module:
        return model.patch_embed.text_proj

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        return Grid.regular(height // patch, width // patch)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        return Grid.regular(height // token, width // token)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype = pipe._execution_device, pipe.transformer.dtype
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = (pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor).to(dtype)
        embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device, **text)
        size = torch.tensor([images.shape[-2:]] * len(images), device=device, dtype=embeds.dtype)
        sizes = {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}
        return EncodeInputs(latents, draw_noise(latents, seed), {"encoder_hidden_states": embeds, **sizes})

    def tiny(self, variant: str, batch: int) -> TinyModel:
        inputs = {
            "hidden_states": torch.randn(batch, 4, 6, 8),
            "encoder_hidden_states": torch.randn(batch, 5, 32),
            "timestep": torch.full((batch,), 700.0),
            "original_size": torch.tensor([[12.0, 16.0]] * batch),
            "target_size": torch.tensor([[12.0, 16.0]] * batch),
            "crop_coords": torch.tensor([[0.0, 2.0]] * batch),
        }
        model = self._transformer(text_width=32)
        return TinyModel(model, inputs, Grid.regular(3, 4), concepts=torch.randn(3, 32))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline

        tokenizer, t5 = parts.t5()
        return CogView3PlusPipeline(
            tokenizer=tokenizer,
            text_encoder=t5,
            vae=parts.vae(),
            transformer=self._transformer(text_width=parts.t5_width),
            scheduler=CogVideoXDDIMScheduler(),
        )

    def _transformer(self, *, text_width: int) -> Any:
        import diffusers

        return getattr(diffusers, self.classes[0])(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=text_width,
            time_embed_dim=24,
            condition_dim=8,
            sample_size=8,
            pos_embed_max_size=16,
        )
