"""Qwen-Image 2.1: single-stream blocks whose text comes before the image and attends to what stands before it.

The sequence is text, in which condition images may stand, then the image to be made. Text is causal, every image
bidirectional in itself; so the image reads the text and text never reads the image, and there is no concept stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import Block, Grid, Places, Projection, Rotary, TextContext, TextSide
from dit_probe.anatomy.lumina2 import turned_by
from dit_probe.attention import AttentionCall
from dit_probe.errors import TraceError

# A pipeline's prompts are as long as they are; a plan that is not told how long says what this many tokens cost.
_PARAGRAPH = 512


class CausalText(TextSide):
    """Scales and gates that all blocks share; text takes those of timestep 0.

    s1, a1, s2, a2 = modulation;   n = (1 + s1) * norm1(c)
    c <- c + tanh(a1) * P o_c;   c <- c + tanh(a2) * MLP((1 + s2) * norm2(c))
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        assert isinstance(context.modulation, Tensor)
        scale, *later = context.modulation.chunk(4, dim=-1)
        normed = context.block.module.img_norm1(c) * (1 + scale.unsqueeze(1))
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (-1, attention.inner_dim // attention.heads)) for part in projected)
        return Projection.of(attention.norm_q(q).to(v), attention.norm_k(k).to(v), v, context.rotary, later)

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block, to_out = context.block.module, context.block.attention.to_out
        gate, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        c = c + gate.tanh() * to_out[1](to_out[0](o.flatten(2)))
        c = c + mlp_gate.tanh() * block.img_mlp(block.img_norm2(c) * (1 + scale))
        return c.clip(-65504, 65504) if c.dtype == torch.float16 else c


class QwenImage21(Anatomy):
    """`QwenImage21Transformer2DModel`. The prompt is the text between the last condition image and the image."""

    family = "qwenimage21"
    classes = ("QwenImage21Transformer2DModel",)
    joint = "no joint blocks"
    single = "transformer_blocks"
    single_text = CausalText()
    text_first = True
    no_concepts = (
        "its text stands before the image and attends causally, so no text query ever reads an image key, and a "
        "concept that did would be a token such as the model has none"
    )
    encoder = ("processor", "text_encoder")
    timestep_scale = 1000.0
    variants = ("text", "padded", "edit", "one-timestep")

    def refuse(self, model: Any) -> str | None:
        processors = {type(block.attn.processor).__name__ for block in model.transformer_blocks}
        if "QwenImage21FlexAttnProcessor" in processors:
            return (
                "QwenImage21FlexAttnProcessor pads the sequence and hands flex_attention its mask as a program, which "
                "is not followed. Trace with transformer.set_attn_processor(QwenImage21AttnProcessor()), which "
                "computes the same"
            )
        return None

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        frames, height, width = arguments["img_shapes"][0][-1]
        return Grid.regular(height, width, frames)

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        embeddings = arguments["encoder_hidden_states"]
        images = arguments["img_mask"][0, : embeddings.shape[1]].nonzero()
        return embeddings[:, 0 if len(images) == 0 else int(images[-1]) + 1 :]

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        embeddings, condition = arguments["encoder_hidden_states"], arguments["img_shapes"][0][:-1]
        text = embeddings.shape[1] - int(arguments["img_mask"][0, : embeddings.shape[1]].sum())
        prompt, images = self.prompt_tokens(model, arguments), sum(f * height * width for f, height, width in condition)
        # Condition images and the text before them are neither the image nor the prompt.
        image = len(self.grid(model, arguments))
        return Places.of(image, prompt, text_first=True, before=text - prompt + images)

    def entry(self, model: Any) -> nn.Module:
        return model.txt_in

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        if arguments.get("kv_cache_mode") == "cached":
            raise TraceError(
                f"{block.path}: in this step text does not run: its keys and values come from the first step's cache. "
                "Call the pipeline with use_kv_cache=False, or record the first step alone (steps=[0])"
            )
        return super().streams(block, arguments, places)

    def joint_call(self, calls: Sequence[AttentionCall], arguments: Mapping[str, Any], where: str, tokens: int) -> Any:
        """One call out of one for every stretch of text and every image, each on all the keys up to its end."""
        if not calls or sum(call.q.shape[1] for call in calls) != tokens or calls[-1].k.shape[1] != tokens:
            return super().joint_call(calls, arguments, where, tokens)
        rows = max(1 if call.mask is None else len(call.mask) for call in calls)
        mask = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool, device=calls[-1].q.device)
        start = 0
        for call in calls:
            stop = start + call.q.shape[1]
            mask[:, :, start:stop, : call.k.shape[1]] = True if call.mask is None else call.mask
            start = stop
        q, o = torch.cat([call.q for call in calls], dim=1), torch.cat([call.o for call in calls], dim=1)
        return replace(calls[-1], q=q, o=o, mask=mask, kernel=None)

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Tensor:
        # With a row for timestep 0 after those of the samples, text takes that one.
        modulation = arguments["modulation"]
        return modulation if arguments.get("target_token_mask") is None else modulation[-1:]

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return turned_by(arguments["rotary_emb"][None, places.in_joint(at)])

    # --- pipelines

    def text_limit(self, pipe: Any) -> int:
        return min(pipe.processor.tokenizer.model_max_length, _PARAGRAPH)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        def split(text: str) -> list[str]:
            return pipe.processor.tokenizer.convert_ids_to_tokens(pipe.processor.tokenizer(text)["input_ids"])

        strings = split(pipe.prompt_template_t2i.format(prompt or " "))[pipe._drop_idx :]
        if len(strings) > length:  # there are condition images, and what stands before them is not in the prompt
            strings = split(
                "<|vision_end|>" + pipe.prompt_template_ti2i.split("<|vision_end|>")[1].format(prompt or " ")
            )
        pads = length - len(strings)
        return strings + [""] * pads, [False] * len(strings) + [True] * pads

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = 2 * pipe.vae_scale_factor
        return Grid.regular(height // token * 2, width // token * 2)

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import QwenImage21Transformer2DModel

        model = QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=24,
            axes_dims_rope=(4, 6, 6),
            causal_condition=variant != "one-timestep",
        )
        # Of the text encoder's tokens, those that stand for images, four latent tokens each: the last three for ours.
        condition = [(1, 2, 2), (1, 4, 2)] if variant == "edit" else []
        slots = [False, False, True, False, True, True] if variant == "edit" else []
        slots += [False] * 5
        images = sum(height * width for _, height, width in condition)
        mask = torch.tensor([[True] * (len(slots) - 2) + [False] * 2, [True] * len(slots)][:batch])
        inputs = {
            "hidden_states": torch.randn(batch, images + 12, 8),
            "encoder_hidden_states": torch.randn(batch, len(slots), 24),
            "timestep": torch.full((batch,), 0.7),
            "img_shapes": [[*condition, (1, 4, 3)]] * batch,
            "img_mask": torch.tensor([slots + [True] * 3] * batch),
            "encoder_hidden_states_mask": mask if variant in ("padded", "edit") else None,
        }
        return TinyModel(model, inputs, Grid.regular(4, 3), concepts=torch.randn(3, 24))
