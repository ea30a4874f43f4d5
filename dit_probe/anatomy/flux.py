"""Flux.1 (schnell, dev, Kontext, Fill …): joint blocks, then single-stream blocks on the joined sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, ParallelText, qk_norms
from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Rotary, interleaved


class Flux(Anatomy):
    """`FluxTransformer2DModel`."""

    family = "flux"
    classes = ("FluxTransformer2DModel",)
    text = AdaZeroText(clips_half=True)
    single_text = ParallelText(clips_half=True)
    text_first = True
    pooled = True
    encoder = ("tokenizer_2", "text_encoder_2")
    timestep_scale = 1000.0
    # FluxPipeline names its calls; image-to-image, inpainting and ControlNets call in the same order.
    unlabelled_calls = ("cond", "uncond")
    variants = ("schnell", "dev")
    pipeline_variants = ("schnell", "dev")
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}
    guided_call = {"negative_prompt": "a boat", "true_cfg_scale": 2.0}

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return interleaved(arguments["image_rotary_emb"], places.in_joint(at))

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def conditioner(self, model: Any) -> nn.Module | None:
        return model.time_text_embed

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        ids = arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        return Grid(*(tuple(axis) for axis in ids.round().long().T.tolist()))

    def pooled_vectors(self, pipe: Any, words: Sequence[str]) -> Tensor:
        return pipe._get_clip_prompt_embeds(prompt=list(words), device=pipe._execution_device)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype = pipe._execution_device, pipe.transformer.dtype
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(images).latent_dist.mode()
        latents = ((latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor).to(dtype)
        rows, channels, height, width = latents.shape
        noise = draw_noise(latents, seed)
        embeds, pooled, text_ids = pipe.encode_prompt(list(prompts), None, device=device, **text)
        guidance = torch.full((rows,), 3.5, device=device) if pipe.transformer.config.guidance_embeds else None
        pack = (rows, channels, height, width)
        return EncodeInputs(
            latents=pipe._pack_latents(latents, *pack),
            noise=pipe._pack_latents(noise, *pack),
            call={
                "encoder_hidden_states": embeds,
                "pooled_projections": pooled,
                "txt_ids": text_ids,
                "img_ids": pipe._prepare_latent_image_ids(rows, height // 2, width // 2, device, dtype),
                "guidance": guidance,
            },
        )

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=variant == "dev",
            axes_dims_rope=(4, 6, 6),
        )
        height, width, tokens = 3, 4, 5
        grid = Grid.regular(height, width)
        # Ids other than zero, or a forgotten text rotation would go unseen.
        text_ids = torch.tensor([[2.0, 1.0 + token, 3.0 * token] for token in range(tokens)])
        inputs = {
            "hidden_states": torch.randn(batch, height * width, 16),
            "encoder_hidden_states": torch.randn(batch, tokens, 32),
            "pooled_projections": torch.randn(batch, 24),
            "timestep": torch.full((batch,), 0.7),
            "img_ids": torch.tensor([grid.frame, grid.y, grid.x]).T.float(),
            "txt_ids": text_ids,
            "guidance": torch.full((batch,), 3.5) if variant == "dev" else None,
        }
        return TinyModel(model, inputs, grid, concepts=torch.randn(3, 32))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        first = inputs["txt_ids"][:1]
        return {
            **inputs,
            "encoder_hidden_states": embeddings,
            "txt_ids": first.expand(embeddings.shape[1], -1),
        }

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

        clip_tokenizer, clip = parts.clip()
        t5_tokenizer, t5 = parts.t5()
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=3,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=parts.t5_width,
            pooled_projection_dim=parts.clip_width,
            guidance_embeds=variant == "dev",
            axes_dims_rope=(4, 6, 6),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=parts.vae(),
            text_encoder=clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=transformer,
        )
