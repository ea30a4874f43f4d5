"""EasyAnimate: first blocks with text projections of their own, then blocks that share the image's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Projection, TextContext
from dit_probe.anatomy.lumina2 import shared_start
from dit_probe.anatomy.shared_weights import SharedWeightsText


class EasyAnimateText(SharedWeightsText):
    """CogVideoX's two adaptive norms; in the first blocks with ``add_*_proj``, ``to_add_out`` and ``txt_ff``.

    The other blocks share projections, norms and MLP with the image, but have no output projection of text:

        c <- c + a1 * P o_c    at first;    c <- c + a1 * o_c    afterwards
    """

    def projected(self, attention: Any, normed: Tensor) -> Sequence[Tensor]:
        if attention.add_q_proj is None:
            return super().projected(attention, normed)
        return attention.add_q_proj(normed), attention.add_k_proj(normed), attention.add_v_proj(normed)

    def norms(self, attention: Any) -> tuple[Any, Any]:
        if attention.add_q_proj is None:
            return super().norms(attention)
        return attention.norm_added_q, attention.norm_added_k

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block, to_add_out = context.block.module, context.block.attention.to_add_out
        (gate,) = projection.modulation
        o = o.flatten(2)
        c = c + gate.unsqueeze(1) * (o if to_add_out is None else to_add_out(o))
        _, normed, _, mlp_gate = block.norm2(c[:, :1], c, context.modulation)
        hidden = (block.ff if block.txt_ff is None else block.txt_ff)(normed)
        return c + mlp_gate.unsqueeze(1) * (hidden if block.norm3 is None else block.norm3(hidden))


class EasyAnimate(Anatomy):
    """`EasyAnimateTransformer3DModel`. A second text stream, if given, stands behind the one that concepts enter by."""

    family = "easyanimate"
    classes = ("EasyAnimateTransformer3DModel",)
    attention = "attn1"
    text = EasyAnimateText()
    text_first = True
    returns_text_first = False
    heads_first = True
    variants = ("own", "mixed", "two-texts", "inpaint")
    pipeline_variants = ("mixed",)
    # Without a negative prompt the pipeline fails under guidance, which is on by default.
    tiny_call = {"height": 32, "width": 48, "num_frames": 5, "negative_prompt": ""}

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        attention = block.attention
        if attention.add_q_proj is None:
            return {"q": attention.norm_q, "k": attention.norm_k}
        return {
            "q_x": attention.norm_q,
            "k_x": attention.norm_k,
            "q_p": attention.norm_added_q,
            "k_p": attention.norm_added_k,
        }

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        second = arguments.get("encoder_hidden_states_t5")
        return super().prompt_tokens(model, arguments) + (0 if second is None else second.shape[1])

    def entry(self, model: Any) -> nn.Module:
        return model.text_proj

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        frames, height, width = arguments["hidden_states"].shape[2:]
        patch = model.config.patch_size
        return Grid.regular(height // patch, width // patch, frames)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_spatial_compression_ratio * pipe.transformer.config.patch_size
        # The pipeline rounds sizes down to sixteens.
        height, width = height // 16 * 16, width // 16 * 16
        return Grid.regular(height // token, width // token, (frames - 1) // pipe.vae_temporal_compression_ratio + 1)

    def text_limit(self, pipe: Any) -> int:
        return inspect.signature(type(pipe).encode_prompt).parameters["max_sequence_length"].default

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        start = shared_start(pipe.tokenizer, lambda text: _templated(pipe, text))
        device = pipe._execution_device
        return pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=limit, device=device
        )[0][:, start:]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        return super().tokens(pipe, _templated(pipe, prompt), length)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device = pipe._execution_device
        video = torch.cat([pipe.video_processor.preprocess_video(list(frames)) for frames in pixels])
        latents = pipe.vae.encode(video.to(device, pipe.vae.dtype)).latent_dist.mode() * pipe.vae.config.scaling_factor
        latents = latents.to(pipe.transformer.dtype)
        embeds, *_ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device, **text)
        return EncodeInputs(latents, draw_noise(latents, seed), {"encoder_hidden_states": embeds})

    def tiny(self, variant: str, batch: int) -> TinyModel:
        frames, height, width = 3, 4, 6
        inputs = {
            "hidden_states": torch.randn(batch, 4, frames, height, width),
            "encoder_hidden_states": torch.randn(batch, 5, 32),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant == "two-texts":
            inputs["encoder_hidden_states_t5"] = torch.randn(batch, 3, 32)
        if variant == "inpaint":
            inputs["inpaint_latents"] = torch.randn(batch, 5, frames, height, width)
        grid = Grid.regular(height // 2, width // 2, frames)
        return TinyModel(_transformer(variant, text_width=32), inputs, grid, concepts=torch.randn(3, 32))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {**super().with_prompt(inputs, embeddings), "encoder_hidden_states_t5": None}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLMagvit, EasyAnimatePipeline, FlowMatchEulerDiscreteScheduler

        tokenizer, t5 = parts.t5()  # any encoder will do, and this one's words are one token each
        tokenizer.chat_template = "{% for message in messages %}a cat: {{ message.content[0].text }}.{% endfor %}"
        vae = AutoencoderKLMagvit(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
        )
        transformer = _transformer(variant, text_width=parts.t5_width)
        scheduler = FlowMatchEulerDiscreteScheduler()
        return EasyAnimatePipeline(vae, t5, tokenizer, transformer, scheduler)


def _templated(pipe: Any, text: str) -> str:
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return pipe.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def _transformer(variant: str, *, text_width: int) -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=9 if variant == "inpaint" else 4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        mmdit_layers=4 if variant == "own" else 2,
        time_embed_dim=24,
        add_norm_text_encoder=variant == "two-texts",
        text_embed_dim=text_width,
        text_embed_dim_t5=text_width if variant == "two-texts" else None,
        after_norm=variant == "mixed",
    )
