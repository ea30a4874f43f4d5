"""HunyuanVideo 1.5: joint blocks alone; image tokens, ByT5's and the prompt's share the text stream.

Real tokens come first (image, ByT5, prompt), then the padding of all three. Padding attends to nothing and nobody
attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import TinyModel, TinyParts
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.hunyuan_image import real_first, tiny_byt5
from dit_probe.anatomy.hunyuan_video import RefinedText, padded
from dit_probe.anatomy.qwen_vl import TINY_WIDTH, tiny_text_encoder

_IMAGE_TOKENS, _BYT5_TOKENS = 729, 256
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


class HunyuanVideo15(RefinedText):
    """`HunyuanVideo15Transformer3DModel`. Concepts are words of the prompt's own encoder, not of ByT5."""

    family = "hunyuan-video-1.5"
    classes = ("HunyuanVideo15Transformer3DModel",)
    variants = ("text", "image", "meanflow")
    pipeline_variants = ("text",)
    tiny_call = {"height": 32, "width": 48, "num_frames": 5}

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        others = ("encoder_hidden_states_2", "image_embeds")
        return super().prompt_tokens(model, arguments) + sum(arguments[name].shape[1] for name in others)

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        c = super().embed(model, embeddings, arguments, rows)
        return c + model.cond_type_embed(torch.zeros_like(c[..., 0], dtype=torch.long))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        others = ("encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds")
        return {**super().with_prompt(inputs, embeddings), **{name: inputs[name][:, :0] for name in others}}

    def planned_prompt_tokens(self, pipe: Any, limit: int) -> int:
        return _IMAGE_TOKENS + _BYT5_TOKENS + limit

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        return pipe._get_mllm_prompt_embeds(
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            prompt=list(texts),
            device=pipe._execution_device,
            tokenizer_max_length=limit,
            system_message=pipe.system_message,
            crop_start=pipe.prompt_template_encode_start_idx,
        )[0]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import (
            extract_glyph_texts,
            format_text_input,
        )

        start = pipe.prompt_template_encode_start_idx
        encoded = pipe.tokenizer.apply_chat_template(
            format_text_input([prompt], pipe.system_message)[0],
            add_generation_prompt=True,
            return_dict=True,
            truncation=True,
            max_length=start + pipe.tokenizer_max_length,
        )
        glyphs: Any = extract_glyph_texts(prompt)  # a text or None, whatever its annotation says
        images = pipe.vision_num_semantic_tokens if "image_encoder" in pipe.components else 0
        strings, pads = real_first(pipe, glyphs, encoded["input_ids"][start:], length - images)
        return ["<image>"] * images + strings, [False] * images + pads

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, text_width=24, second_width=12)
        image = torch.randn(batch, 3, 10) if variant == "image" else torch.zeros(batch, 3, 10)
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 2, 3),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "encoder_hidden_states_2": torch.randn(batch, 4, 12),
            "encoder_attention_mask_2": padded(batch, 4),
            "image_embeds": image,
            "timestep": torch.full((batch,), 700.0),
        }
        if variant == "meanflow":
            inputs["timestep_r"] = torch.full((batch,), 500.0)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        import diffusers

        tokenizer, encoder = tiny_text_encoder("2.5", parts.words)
        tokenizer.chat_template = _CHAT
        byt5_tokenizer, byt5 = tiny_byt5()
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        )
        pipe = diffusers.HunyuanVideo15Pipeline(
            text_encoder=encoder.model.language_model,
            tokenizer=tokenizer,
            # Latents, those of a first frame, and the mask of the latter.
            transformer=_transformer(variant, text_width=TINY_WIDTH, second_width=byt5.config.d_model, in_channels=9),
            vae=vae,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder_2=byt5,
            tokenizer_2=byt5_tokenizer,
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
        )
        chat = tokenizer.apply_chat_template(
            [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": "{}"}], tokenize=False
        )
        pipe.prompt_template_encode_start_idx = len(tokenizer(chat.split("{}")[0])["input_ids"])
        pipe.tokenizer_max_length = 16
        return pipe


def _transformer(variant: str, *, text_width: int, second_width: int, in_channels: int = 4) -> Any:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=text_width,
        text_embed_2_dim=second_width,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
        use_meanflow=variant == "meanflow",
    )
