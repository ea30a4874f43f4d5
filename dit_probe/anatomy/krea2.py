"""Krea 2: single-stream blocks on (text, image), grouped keys, a gate on what attention brings, one modulation for all.

Concepts are an extension beyond the paper here: one more text token, which neither image nor text sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Projection, Rotary, TextContext, TextSide, interleaved
from dit_probe.anatomy.qwen_vl import TINY_WIDTH, QwenVLPrompts, tiny_text_encoder, tiny_vae


class GatedText(TextSide):
    """The timestep's vectors ``t`` are those of all blocks; each block adds a table of its own.

    g1, b1, a1, g2, b2, a2 = t + table;   n = (1 + g1) * norm1(c) + b1
    c <- c + a1 * P (o_c * sigmoid(G n));   c <- c + a2 * MLP((1 + g2) * norm2(c) + b2)
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        block, attention = context.block.module, context.block.attention
        assert isinstance(context.modulation, Tensor)
        vectors = context.modulation.unflatten(-1, (6, -1)) + block.scale_shift_table
        scale, shift, *later = vectors.unbind(-2)
        normed = (1 + scale) * block.norm1(c) + shift
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in projected)
        q, k = attention.norm_q(q), attention.norm_k(k)
        k, v = (part.repeat_interleave(attention.num_heads // part.shape[2], dim=2) for part in (k, v))
        return Projection.of(q, k, v, context.rotary, [attention.to_gate(normed), *later])

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        let_through, gate, scale, shift, mlp_gate = projection.modulation
        c = c + gate * context.block.attention.to_out[0](o.flatten(2) * let_through.sigmoid())
        return c + mlp_gate * block.ff((1 + scale) * block.norm2(c) + shift)


class Krea2(QwenVLPrompts):
    """`Krea2Transformer2DModel`. A token of text is a stack of the text encoder's layers, here laid end to end.

    The pipeline gives text no positions (all are 0) and pads in the middle: prompt, pads, end of the template.
    """

    family = "krea2"
    classes = ("Krea2Transformer2DModel",)
    joint = "no joint blocks"
    single = "transformer_blocks"
    single_text = GatedText()
    text_first = True
    timestep_scale = 1000.0
    unlabelled_calls = ("cond", "uncond")
    variants = ("grouped", "masked")
    pipeline_variants = ("grouped",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 12}

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        ids = arguments["position_ids"][arguments["encoder_hidden_states"].shape[1] :]
        return Grid(*(tuple(axis) for axis in ids.round().long().T.tolist()))

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["encoder_hidden_states"].flatten(2)

    def entry(self, model: Any) -> nn.Module:
        return model.txt_in

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        stacks = embeddings.unflatten(-1, (model.config.num_text_layers, -1))
        c = model.txt_in(model.text_fusion(stacks.flatten(0, 1).unsqueeze(1)))
        return c.view(*embeddings.shape[:2], -1)

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return interleaved(arguments["image_rotary_emb"], places.in_joint(at))

    def template(self, pipe: Any) -> tuple[str, int]:
        whole = f"{pipe.prompt_template_encode_prefix}{{}}{pipe.prompt_template_encode_suffix}"
        return whole, pipe.prompt_template_encode_start_idx

    def reads_images(self, pipe: Any) -> bool:
        return False

    def hidden(self, pipe: Any, texts: list[str]) -> Tensor:
        return pipe.get_text_hidden_states(texts)[0].flatten(2)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        texts = pipe.prompt_template_encode_prefix + prompt, pipe.prompt_template_encode_suffix
        start, end = (pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(text)["input_ids"]) for text in texts)
        start = start[pipe.prompt_template_encode_start_idx :][: length - len(end)]
        pads = length - len(start) - len(end)
        return [*start, *[""] * pads, *end], [False] * len(start) + [True] * pads + [False] * len(end)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, config = pipe._execution_device, pipe.vae.config
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = pipe.vae.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0]
        parts = (config.latents_mean, config.latents_std)
        mean, std = (torch.tensor(part).view(-1, 1, 1).to(latents) for part in parts)
        latents = ((latents - mean) / std).to(pipe.transformer.dtype)
        noise = draw_noise(latents, seed)
        embeds, mask = pipe.encode_prompt(list(prompts), device=device, **text)
        height, width = (side // pipe.patch_size for side in latents.shape[2:])
        return EncodeInputs(
            latents=pipe._pack_latents(latents, *latents.shape),
            noise=pipe._pack_latents(noise, *latents.shape),
            call={
                "encoder_hidden_states": embeds,
                "encoder_attention_mask": mask,
                "position_ids": pipe.prepare_position_ids(embeds.shape[1], height, width, device),
            },
        )

    def tiny(self, variant: str, batch: int) -> TinyModel:
        grid, tokens = Grid.regular(3, 4), 5
        # Positions other than zero, or a forgotten text rotation would go unseen.
        text_ids = torch.tensor([[2.0, 1.0 + token, 3.0 * token] for token in range(tokens)])
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch, len(grid), 16),
            "encoder_hidden_states": torch.randn(batch, tokens, 3, 16),
            "timestep": torch.full((batch,), 0.7),
            "position_ids": torch.cat([text_ids, torch.tensor([grid.frame, grid.y, grid.x]).T]),
        }
        if variant == "masked":
            inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1]])[:batch].bool()
        return TinyModel(_transformer(text_width=16), inputs, grid, concepts=torch.randn(3, 3 * 16))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        stacks, ids = inputs["encoder_hidden_states"], inputs["position_ids"]
        first = ids[:1].expand(embeddings.shape[1], -1)
        return {
            **inputs,
            "encoder_hidden_states": embeddings.unflatten(-1, tuple(stacks.shape[2:])),
            "encoder_attention_mask": None,
            "position_ids": torch.cat([first, ids[stacks.shape[1] :]]),
        }

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline

        tokenizer, encoder = tiny_text_encoder("3", parts.words)
        return Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(AutoencoderKLQwenImage),
            text_encoder=encoder.model,
            tokenizer=tokenizer,
            transformer=_transformer(text_width=TINY_WIDTH),
            text_encoder_select_layers=(0, 1, 2),
        )


def _transformer(*, text_width: int) -> Any:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=text_width,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
