"""CogView4: the blocks of CogView3+ with rotary positions for the image alone, and text from a language model.

A text mask is 0 and 1 in the model's precision and *added* to the logits, so that it hides nothing:

    o_p = softmax(q_p k^T / sqrt(d) + m m^T) v

The pipeline gives none. Concepts see what the prompt's first token saw, here as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dit_probe.anatomy.base import TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Modulation
from dit_probe.anatomy.cogview3 import CogView3Plus
from dit_probe.anatomy.lumina2 import shared_start
from dit_probe.anatomy.shared_weights import OneNormText


class CogView4(CogView3Plus):
    """`CogView4Transformer2DModel`. Its pipeline pads prompts on the left to whole sixteens, and does not mask pads."""

    family = "cogview4"
    classes = ("CogView4Transformer2DModel",)
    text = OneNormText()
    heads_first = True
    variants = ("plain", "masked")
    pipeline_variants = ("plain",)
    tiny_call = {"height": 16, "width": 32}

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        return arguments["temb"]

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        # One by one, or the longest would decide how far the others are padded.
        return pad_sequence([self._own_tokens(pipe, text, limit) for text in texts], batch_first=True)

    def _own_tokens(self, pipe: Any, text: str, limit: int) -> Tensor:
        hidden = pipe._get_glm_embeds([text], max_sequence_length=limit, device=pipe._execution_device)[0]
        special = shared_start(pipe.tokenizer, lambda text: text)
        return hidden[len(hidden) - len(_ids(pipe, text, limit)) + special :]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        strings = pipe.tokenizer.convert_ids_to_tokens(_ids(pipe, prompt, length))
        pads = length - len(strings)
        return [pipe.tokenizer.pad_token] * pads + strings, [True] * pads + [False] * len(strings)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        tiny = super().tiny(variant, batch)
        if variant != "masked":
            return tiny
        mask = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])[:batch]
        return TinyModel(tiny.transformer, {**tiny.inputs, "attention_mask": mask}, tiny.grid, tiny.concepts)

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        changed = super().with_prompt(inputs, embeddings)
        if (mask := inputs.get("attention_mask")) is not None:
            changed["attention_mask"] = mask[:, :1].expand(-1, embeddings.shape[1])
        return changed

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler

        tokenizer, t5 = parts.t5()
        return CogView4Pipeline(
            tokenizer=tokenizer,
            text_encoder=t5,  # any encoder will do, and this one's words are one token each
            vae=parts.vae(),
            transformer=self._transformer(text_width=parts.t5_width),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )


def _ids(pipe: Any, text: str, limit: int) -> list[int]:
    return pipe.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
