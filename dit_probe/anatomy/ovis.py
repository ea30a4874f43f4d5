"""Ovis-Image: Flux's blocks with gated MLPs, and prompt tokens that stand at positions (0, i, i)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_probe.anatomy.ada_zero import ParallelText
from dit_probe.anatomy.base import TinyParts
from dit_probe.anatomy.unpooled import UnpooledFlux, word_tokenizer


@dataclass(frozen=True)
class GatedParallelText(ParallelText):
    """`ParallelText` whose MLP is gated: n, a = norm(c, temb); u, g = W n; c <- c + a * P [o_c, silu(g) * u]."""

    def mlp(self, block: Any, normed: Tensor) -> Tensor:
        up, gate = block.proj_mlp(normed).chunk(2, dim=-1)
        return block.act_mlp(gate) * up


class Ovis(UnpooledFlux):
    """`OvisImageTransformer2DModel`. Qwen3 reads an instruction before the prompt, whose tokens are cut off."""

    family = "ovis"
    classes = ("OvisImageTransformer2DModel",)
    single_text = GatedParallelText(clips_half=True)
    variants = ("7b",)
    pipeline_variants = ("7b",)

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        return model.context_embedder(model.context_embedder_norm(embeddings))

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        device = pipe._execution_device
        return pipe._get_ovis_prompt_embeds(list(texts), max_sequence_length=limit, device=device)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        start = pipe.user_prompt_begin_id
        (text,) = pipe._get_messages(prompt)
        encoded = pipe.tokenizer(
            text, padding="max_length", truncation=True, max_length=start + length, add_special_tokens=False
        )
        strings = pipe.tokenizer.convert_ids_to_tokens(encoded["input_ids"][start:])
        return strings, [not mask for mask in encoded["attention_mask"][start:]]

    def text_inputs(self, pipe: Any, prompts: list[str], latents: Tensor, **text: Any) -> dict[str, Any]:
        device = pipe._execution_device
        embeddings, _, text_ids, _ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, **text
        )
        return {"encoder_hidden_states": embeddings, "txt_ids": text_ids}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline
        from transformers import Qwen3Config, Qwen3Model

        tokenizer = word_tokenizer(parts)
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        pipe = OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=parts.vae(),
            text_encoder=Qwen3Model(config),
            tokenizer=tokenizer,
            transformer=self.tiny_transformer(variant, text_width=32, out_channels=16),
        )
        pipe.system_prompt, pipe.user_prompt_begin_id = "a picture of ", 3
        return pipe
