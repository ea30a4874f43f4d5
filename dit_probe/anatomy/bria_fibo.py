"""Bria FIBO: before every block, half of the text stream is replaced by a layer of the language model.

    c <- [c[: width / 2], W_l h_l]        l: the block, h_l: the layer of the language model that it is given

What a text is to this model is therefore its last two layers side by side and one more layer for every block.
Concepts come packed like this: [encoder_hidden_states, h_0, h_1, …] along the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_probe.anatomy.base import EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid
from dit_probe.anatomy.unpooled import UnpooledFlux, masked_as_first, padding_mask, word_tokenizer


class BriaFibo(UnpooledFlux):
    """`BriaFiboTransformer2DModel`. Its prompt stream is as long as the longer of prompt and negative prompt."""

    family = "bria-fibo"
    classes = ("BriaFiboTransformer2DModel",)
    timestep_scale = 1.0
    unlabelled_calls = ("cond",)
    variants = ("fibo", "key-mask", "pair-mask", "guidance")
    pipeline_variants = ("fibo",)
    tiny_call = {"height": 32, "width": 64, "max_sequence_length": 16, "negative_prompt": "a boat"}
    guided_call = {"negative_prompt": "a boat"}

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return torch.cat([arguments["encoder_hidden_states"], *arguments["text_encoder_layers"]], dim=-1)

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        return arguments["encoder_hidden_states"].shape[1]

    def entry(self, model: Any) -> nn.Module:
        return model.caption_projection[-1]

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        return model.context_embedder(embeddings[..., : model.config.joint_attention_dim])

    def feed(self, model: Any, block: Block, c: Tensor, embeddings: Tensor) -> Tensor:
        width = model.config.text_encoder_dim
        start = model.config.joint_attention_dim + block.layer * width
        layer = model.caption_projection[block.layer](embeddings[..., start : start + width])
        return torch.cat([c[..., : c.shape[-1] // 2], layer], dim=-1)

    # --- pipelines

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        # One by one, for its tokenizer may pad on the left.
        alone = [pipe.get_prompt_embeds(text, max_sequence_length=limit)[:2] for text in texts]
        dtype = pipe.transformer.dtype
        packed = [torch.cat([last, *_of_blocks(pipe, layers)], dim=-1).to(dtype) for last, layers in alone]
        longest = max(part.shape[1] for part in packed)
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in packed])

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        ids = pipe.tokenizer(prompt, truncation=True, max_length=length)["input_ids"] if prompt else [_EMPTY]
        pads = length - len(ids)
        strings = pipe.tokenizer.convert_ids_to_tokens(ids)
        return strings + [pipe.tokenizer.pad_token] * pads, [False] * len(ids) + [True] * pads

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        return Grid.regular(height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype, vae = pipe._execution_device, pipe.transformer.dtype, pipe.vae
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, vae.dtype)
        latents = vae.encode(images.unsqueeze(2)).latent_dist.mode()
        mean, std = (torch.tensor(part).to(latents) for part in (vae.config.latents_mean, vae.config.latents_std))
        latents = ((latents.squeeze(2) - mean[:, None, None]) / std[:, None, None]).to(dtype)
        rows, channels, height, width = latents.shape
        last, _, text_ids, mask, _, layers, _ = pipe.encode_prompt(
            list(prompts), device=device, guidance_scale=1, **text
        )
        packed, noise = (
            pipe._pack_latents_no_patch(part, rows, channels, height, width)
            for part in (latents, draw_noise(latents, seed))
        )
        call = {
            "encoder_hidden_states": last,
            "text_encoder_layers": _of_blocks(pipe, layers),
            "txt_ids": text_ids[0],
            "img_ids": pipe._prepare_latent_image_ids(rows, height, width, device, dtype),
        }
        if not mask.all():
            mask = F.pad(mask.bool(), (0, height * width), value=True)
            call["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None, :]}
        return EncodeInputs(packed, noise, call)

    # --- tests

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        widths = [part.shape[-1] for part in (inputs["encoder_hidden_states"], *inputs["text_encoder_layers"])]
        last, *layers = embeddings.split(widths, dim=-1)
        changed = {**super().with_prompt(inputs, last), "text_encoder_layers": layers}
        options = dict(inputs.get("joint_attention_kwargs") or {})
        if (mask := options.get("attention_mask")) is not None:
            images = inputs["hidden_states"].shape[1]
            options["attention_mask"] = masked_as_first(mask, embeddings.shape[1], images)
        return {**changed, "joint_attention_kwargs": options}

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tiny = super().tiny(variant, batch)
        model: Any = tiny.transformer
        width, blocks, tokens = model.config.text_encoder_dim, len(model.caption_projection), 5
        # A tuple: with lists, tests do not know how to change the precision.
        inputs = {
            **tiny.inputs,
            "text_encoder_layers": tuple(torch.randn(batch, tokens, width) for _ in range(blocks)),
            "guidance": torch.full((batch,), 3.5) if variant == "guidance" else None,
        }
        if "mask" in variant:
            valid = padding_mask(batch, tokens, len(tiny.grid))
            mask = valid[:, None, None, :]
            # Pipelines of diffusers 0.39 hide whatever is not a pair of valid tokens.
            mask = mask & valid[:, None, :, None] if variant == "pair-mask" else mask
            inputs["joint_attention_kwargs"] = {"attention_mask": mask}
        concepts = torch.randn(3, model.config.joint_attention_dim + blocks * width)
        return TinyModel(model, inputs, tiny.grid, concepts)

    def tiny_transformer(self, variant: str, *, text_width: int, in_channels: int = 16, **options: Any) -> Any:
        return super().tiny_transformer(
            variant,
            text_width=text_width,
            in_channels=in_channels,
            text_encoder_dim=24,
            guidance_embeds=variant == "guidance",
            **options,
        )

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLWan, BriaFiboPipeline, FlowMatchEulerDiscreteScheduler
        from transformers import SmolLM3Config, SmolLM3ForCausalLM

        tokenizer = word_tokenizer(parts)
        config = SmolLM3Config(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        )
        return BriaFiboPipeline(
            transformer=self.tiny_transformer(variant, text_width=48, in_channels=4),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=SmolLM3ForCausalLM(config),
            tokenizer=tokenizer,
        )


_EMPTY = 128000
"""The token that the pipeline puts in place of an empty prompt."""


def _of_blocks(pipe: Any, layers: Sequence[Tensor]) -> list[Tensor]:
    """One layer of the language model for every block, as the pipeline chooses: the last ones, if need be repeated."""
    blocks = len(pipe.transformer.caption_projection)
    return [*layers[-blocks:], *[layers[-1]] * (blocks - len(layers))]
