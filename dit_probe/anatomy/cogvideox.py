"""CogVideoX 2B, 5B and 1.5: two residual streams that share one set of weights, told apart by their modulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid
from dit_probe.anatomy.shared_weights import SharedWeightsText


class CogVideoX(Anatomy):
    """`CogVideoXTransformer3DModel`."""

    family = "cogvideox"
    classes = ("CogVideoXTransformer3DModel",)
    attention = "attn1"
    text = SharedWeightsText()
    text_first = True
    returns_text_first = False
    heads_first = True
    variants = ("2b", "5b", "1.5")
    pipeline_variants = ("2b", "5b", "1.5")
    tiny_call = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 226}

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        if arguments.get("image_rotary_emb") is None:
            return {}
        attention = block.attention
        return {"q": attention.norm_q, "k": attention.norm_k}

    def entry(self, model: Any) -> nn.Module:
        return model.patch_embed.text_proj

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        c = self.entry(model)(embeddings)
        patch_embed = model.patch_embed
        if patch_embed.use_positional_embeddings or patch_embed.use_learned_positional_embeddings:
            # Zero for the sin-cos table, not for a learned one; every concept stands where a lone word would.
            c = c + patch_embed.pos_embedding[:, :1].to(c)
        return c

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        _, frames, _, height, width = arguments["hidden_states"].shape
        patch, patch_t = model.config.patch_size, model.config.get("patch_size_t") or 1
        return Grid.regular(height // patch, width // patch, frames // patch_t)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        config = pipe.transformer.config
        token = pipe.vae_scale_factor_spatial * config.patch_size
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        # The pipeline rounds up to whole patches in time.
        return Grid.regular(height // token, width // token, -(-latent_frames // (config.get("patch_size_t") or 1)))

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype, config = pipe._execution_device, pipe.transformer.dtype, pipe.transformer.config
        video = torch.cat([pipe.video_processor.preprocess_video(list(frames)) for frames in pixels])
        height, width = video.shape[-2:]
        latents = pipe.vae.encode(video.to(device, pipe.vae.dtype)).latent_dist.mode()
        latents = (latents * pipe.vae.config.scaling_factor).permute(0, 2, 1, 3, 4).to(dtype)
        frames = latents.shape[1]
        if frames % (config.patch_size_t or 1):
            raise ValueError(
                f"{len(pixels[0])} frames make {frames} latent frames, which patches of {config.patch_size_t} frames "
                "do not divide; give a number of frames that they do"
            )
        embeds, _ = pipe.encode_prompt(list(prompts), None, False, device=device, **text)
        rotary = None
        if config.use_rotary_positional_embeddings:
            rotary = pipe._prepare_rotary_positional_embeddings(height, width, frames, device)
        return EncodeInputs(
            latents, draw_noise(latents, seed), {"encoder_hidden_states": embeds, "image_rotary_emb": rotary}
        )

    def clamped_concepts(self, model: Any) -> int:
        # A position table, 2B's or the learned one of 5B-I2V, has room for exactly this many text tokens.
        table = model.patch_embed.use_positional_embeddings or model.patch_embed.use_learned_positional_embeddings
        return model.config.max_text_seq_length if table else 3

    def tiny(self, variant: str, batch: int) -> TinyModel:
        frames, height, width = (4 if variant == "1.5" else 3), 4, 6
        model = _transformer(variant, text_width=32, text_tokens=5, frames=9, height=height, width=width)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch, frames, 4, height, width),
            "encoder_hidden_states": torch.randn(batch, 5, 32),
            "timestep": torch.full((batch,), 700),
        }
        grid = Grid.regular(height // 2, width // 2, frames // (model.config.patch_size_t or 1))
        if variant != "2b":
            angles = torch.rand(len(grid), 8).mul(6).repeat_interleave(2, dim=-1)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        return TinyModel(model, inputs, grid, concepts=torch.randn(self.clamped_concepts(model), 32))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

        tokenizer, t5 = parts.t5()
        vae = AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        transformer = _transformer(variant, text_width=parts.t5_width, text_tokens=226, frames=9, height=4, width=6)
        scheduler = CogVideoXDDIMScheduler()
        return CogVideoXPipeline(
            tokenizer=tokenizer, text_encoder=t5, vae=vae, transformer=transformer, scheduler=scheduler
        )


def _transformer(variant: str, *, text_width: int, text_tokens: int, frames: int, height: int, width: int) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=text_width,
        num_layers=3,
        sample_width=width,
        sample_height=height,
        sample_frames=frames,
        patch_size=2,
        patch_size_t=2 if variant == "1.5" else None,
        patch_bias=variant != "1.5",
        temporal_compression_ratio=4,
        max_text_seq_length=text_tokens,
        use_rotary_positional_embeddings=variant != "2b",
    )
