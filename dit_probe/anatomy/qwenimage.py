"""Qwen-Image, its edit, layered and ControlNet uses: joint blocks only, text before the image in the attention call.

Text positions start where the largest image's end, half its longer side, and count up on every axis.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import qk_norms
from dit_probe.anatomy.base import EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Rotary, TextContext, interleaved
from dit_probe.anatomy.qwen_vl import TINY_WIDTH, QwenVLPrompts, tiny_text_encoder, tiny_vae
from dit_probe.anatomy.shift_scale_gate import ShiftScaleGateText


class QwenImageText(ShiftScaleGateText):
    """``txt_*`` of the block, ``add_*_proj`` of its attention, which the processor never calls fused."""

    def vectors(self, c: Tensor, context: TextContext) -> Sequence[Tensor]:
        return context.block.module.txt_mod(context.modulation).chunk(6, dim=-1)

    def projected(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = (attention.add_q_proj(normed), attention.add_k_proj(normed), attention.add_v_proj(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in made)
        q = q if attention.norm_added_q is None else attention.norm_added_q(q)
        k = k if attention.norm_added_k is None else attention.norm_added_k(k)
        return q, k, v


class QwenImage(QwenVLPrompts):
    """`QwenImageTransformer2DModel`; with ``zero_cond_t`` reference images, never text, are modulated as at time 0."""

    family = "qwenimage"
    classes = ("QwenImageTransformer2DModel",)
    text = QwenImageText("txt_norm1", "txt_norm2", "txt_mlp", "to_add_out", clips_half=True)
    text_first = True
    timestep_scale = 1000.0
    variants = ("plain", "masked", "edit", "zero-cond-t", "layered")
    pipeline_variants = ("plain",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 32}
    guided_call = {"negative_prompt": "a boat on the water", "true_cfg_scale": 2.0}

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Tensor:
        temb = arguments["temb"]
        # The second half of the rows is the conditioning of time 0.
        return temb.chunk(2)[0] if getattr(block.module, "zero_cond_t", False) else temb

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary | None:
        if arguments.get("image_rotary_emb") is None:
            return None
        turns = arguments["image_rotary_emb"][1][at]
        table = turns.real.repeat_interleave(2, dim=-1), turns.imag.repeat_interleave(2, dim=-1)
        return interleaved(table, slice(None))

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return qk_norms(block)

    def entry(self, model: Any) -> nn.Module:
        return model.txt_in

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        return model.txt_in(model.txt_norm(embeddings))

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        shapes = arguments["img_shapes"]
        # One list of images a row, or one image a row; the model takes the first row's for all of them.
        shapes = shapes[0] if isinstance(shapes, list) else shapes
        where, start = [], 0
        for frames, height, width in shapes if isinstance(shapes, list) else [shapes]:
            where += [(start + f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
            start += frames
        return Grid(*(tuple(axis) for axis in zip(*where, strict=True)))

    def template(self, pipe: Any) -> tuple[str, int]:
        return pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx

    def reads_images(self, pipe: Any) -> bool:
        return "image" in inspect.signature(pipe._get_qwen_prompt_embeds).parameters

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, config = pipe._execution_device, pipe.vae.config
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(images.unsqueeze(2)).latent_dist.mode()
        mean, std = (
            torch.tensor(part).view(-1, 1, 1, 1).to(latents) for part in (config.latents_mean, config.latents_std)
        )
        latents = ((latents - mean) / std).to(pipe.transformer.dtype)
        rows, channels, _, height, width = latents.shape
        noise = draw_noise(latents, seed)
        embeds, mask = pipe.encode_prompt(list(prompts), device=device, **text)
        return EncodeInputs(
            latents=pipe._pack_latents(latents, rows, channels, height, width),
            noise=pipe._pack_latents(noise, rows, channels, height, width),
            call={
                "encoder_hidden_states": embeds,
                "encoder_hidden_states_mask": mask,
                "img_shapes": [[(1, height // 2, width // 2)]] * rows,
            },
        )

    def tiny(self, variant: str, batch: int) -> TinyModel:
        shapes = [(1, 3, 4)] if variant in ("plain", "masked") else [(1, 3, 4), (1, 2, 3)]
        model = _transformer(variant, text_width=24)
        inputs: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "timestep": torch.full((batch,), 0.7),
            "img_shapes": [shapes] * batch,
        }
        grid = self.grid(model, inputs)
        inputs["hidden_states"] = torch.randn(batch, len(grid), 16)
        if variant == "masked":
            inputs["encoder_hidden_states_mask"] = torch.arange(5) < torch.tensor([[3], [5]])[:batch]
        if variant == "layered":
            inputs["additional_t_cond"] = torch.zeros(batch, dtype=torch.long)
        return TinyModel(model, inputs, grid, concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_hidden_states_mask": None}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        # The model counts text positions itself.
        image, text = arguments["image_rotary_emb"]
        return {**arguments, "image_rotary_emb": (image, text[:1].expand(len(text), -1))}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

        tokenizer, encoder = tiny_text_encoder("2.5", parts.words)
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(AutoencoderKLQwenImage),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=_transformer(variant, text_width=TINY_WIDTH),
        )


def _transformer(variant: str, *, text_width: int) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=variant == "zero-cond-t",
        use_additional_t_cond=variant == "layered",
        use_layer3d_rope=variant == "layered",
    )
