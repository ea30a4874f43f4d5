"""AuraFlow: attention enters a block's output only through the MLP, and 8 register tokens stand before the prompt.

c <- c + a2 * MLP((1 + g) * norm(c + a1 * P o_c) + b)

Registers are neither image nor prompt: the prompt reads them, concepts do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText, ParallelText
from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Projection, TextContext


class ThroughMLPText(AdaZeroText):
    """`AdaZeroText` with the one residual of the equation above."""

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, shift, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        inner = block.norm2_context(c + gate * context.block.attention.to_add_out(o.flatten(2)))
        return c + mlp_gate * block.ff_context(inner * (1 + scale) + shift)


class ThroughMLPSingleText(ParallelText):
    """Single-stream blocks: the same with the weights that image tokens use too."""

    def normed(self, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        n, *modulation = context.block.module.norm1(c, emb=context.modulation)
        return n, modulation

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block, to_out = context.block.module, context.block.attention.to_out
        gate, shift, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        inner = block.norm2(c + gate * to_out[1](to_out[0](o.flatten(2))))
        return c + mlp_gate * block.ff(inner * (1 + scale) + shift)


class AuraFlow(Anatomy):
    """`AuraFlowTransformer2DModel`."""

    family = "auraflow"
    classes = ("AuraFlowTransformer2DModel",)
    joint = "joint_transformer_blocks"
    text = ThroughMLPText()
    single_text = ThroughMLPSingleText()
    text_first = True
    timestep_scale = 1000.0
    variants = ("auraflow",)
    pipeline_variants = ("auraflow",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        image, prompt = len(self.grid(model, arguments)), self.prompt_tokens(model, arguments)
        return Places.of(image, prompt, text_first=True, before=model.register_tokens.shape[1])

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        x, p = super().streams(block, arguments, places)
        return x, p[:, -places.prompt_tokens :]  # without registers, which only the text stream of joint blocks has

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor | None]:
        if isinstance(output, Tensor):
            return places.split(output)
        return output[1], output[0][:, -places.prompt_tokens :]

    def entry(self, model: Any) -> nn.Module:
        return model.context_embedder

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        patch = model.config.patch_size
        return Grid.regular(height // patch, width // patch)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        return Grid.regular(height // token, width // token)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        device = pipe._execution_device
        return pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, device=device, max_sequence_length=limit
        )[0]

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device = pipe._execution_device
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        latents = latents.to(pipe.transformer.dtype)
        embeds = pipe.encode_prompt(list(prompts), None, False, device=device, **text)[0]
        return EncodeInputs(latents, draw_noise(latents, seed), {"encoder_hidden_states": embeds})

    def tiny(self, variant: str, batch: int) -> TinyModel:
        inputs = {
            "hidden_states": torch.randn(batch, 4, 6, 8),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "timestep": torch.full((batch,), 0.7),
        }
        return TinyModel(_transformer(text_width=24), inputs, Grid.regular(3, 4), concepts=torch.randn(3, 24))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

        tokenizer, t5 = parts.t5()
        return AuraFlowPipeline(
            tokenizer=tokenizer,
            text_encoder=t5,
            vae=parts.vae(),
            transformer=_transformer(text_width=parts.t5_width),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )


def _transformer(*, text_width: int) -> Any:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=3,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
