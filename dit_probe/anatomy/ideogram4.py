"""Ideogram 4: single-stream blocks on one packed sequence of left padding, prompt and image, told apart by indicators.

Concepts are an extension beyond the paper here: one more text token, which neither image nor text sees. The
unconditional half of guidance is another transformer's, without text; it is not traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import Block, Grid, Places, Projection, Rotary, TextContext
from dit_probe.anatomy.ernie_image import rotate_halves
from dit_probe.anatomy.lumina2 import SandwichText, shared_start
from dit_probe.errors import TraceError

_IMAGE, _TEXT = 2, 3
"""What `indicator` calls the tokens of either; padding is neither."""


class IdeogramText(SandwichText):
    """Lumina's order of norms and gates, a modulation of every block's own.

    s1, a1, s2, a2 = modulation(temb);   n = (1 + s1) norm1(c);   the rest is `SandwichText`'s
    """

    after_attention = "attention_norm2"

    def project(self, c: Tensor, context: TextContext) -> Projection:
        block, attention = context.block.module, context.block.attention
        scale, *gates = block.adaln_modulation(context.modulation).squeeze(1).chunk(4, dim=-1)
        normed = block.attention_norm1(c) * (1 + scale.unsqueeze(1))
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in projected)
        return Projection.of(attention.norm_q(q), attention.norm_k(k), v, context.rotary, gates)


class Ideogram4(Anatomy):
    """`Ideogram4Transformer2DModel`. All that stands before the image is the prompt; its padding sees padding alone."""

    family = "ideogram4"
    classes = ("Ideogram4Transformer2DModel",)
    joint = "no joint blocks"
    single = "layers"
    attention = "attention"
    single_text = IdeogramText()
    text_first = True
    variants = ("padded", "full")

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def time(self, arguments: Mapping[str, Any]) -> float:
        return 1000.0 * (1 - float(arguments["timestep"].flatten()[0]))

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        indicator, segments = arguments["indicator"], arguments["segment_ids"]
        image, total = indicator == _IMAGE, indicator.shape[1]
        start = total - int(image[0].sum())
        packed = (segments != segments[:, -1:]) & (image | (indicator == _TEXT))
        if image[:, :start].any() or not image[:, start:].all() or packed.any():
            raise TraceError(
                "the rows of this call are not each one prompt and then its image, at the same place in every row. "
                "Call the transformer on one sample a row, as the pipeline does"
            )
        if start == 0 or not (indicator == _TEXT).any(1).all():
            raise TraceError(
                "this call has no text, as those of the unconditional transformer have none: there is no prompt stream"
            )
        if arguments["timestep"].ndim > 1:
            raise TraceError("this call has a timestep for every token; give one for every row, as the pipeline does")
        return Places(image=slice(start, total), prompt=slice(0, start), total=total)

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        where = arguments["position_ids"][0, arguments["indicator"][0] == _IMAGE]
        return Grid(*(tuple(axis) for axis in (where - where.amin(0)).T.tolist()))

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        images = int((arguments["indicator"][0] == _IMAGE).sum())
        return arguments["encoder_hidden_states"][:, :-images]

    def entry(self, model: Any) -> nn.Module:
        return model.llm_cond_proj

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        no_image = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return model.llm_cond_proj(model.llm_cond_norm(embeddings)) + model.embed_image_indicator(no_image)

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["adaln_input"]

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        cos, sin = arguments["image_rotary_emb"]
        where = torch.arange(places.total, device=cos.device)[places.in_joint(at)].expand(len(cos), -1)
        if where.shape[1] == 1:
            # The prompt's first token is every row's first that sees the image; what stands before it is padding.
            sees = arguments["attention_mask"][:, 0, places.prompt, places.image.start]
            where = sees.int().argmax(1, keepdim=True)
        rows = torch.arange(len(cos), device=cos.device).unsqueeze(1)
        return partial(rotate_halves, cos=cos[rows, where].unsqueeze(2), sin=sin[rows, where].unsqueeze(2))

    # --- pipelines

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        start = shared_start(partial(pipe.tokenizer, add_special_tokens=False), partial(_templated, pipe))
        lengths = [len(_ids(pipe, text)) for text in texts]
        longest = max(lengths)
        hidden = pipe.encode_prompt(list(texts), 0, 0, longest, pipe._execution_device)[0]
        apart = [row[longest - length + start :] for row, length in zip(hidden, lengths, strict=True)]
        return nn.utils.rnn.pad_sequence(apart, batch_first=True)[:, :limit]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        strings = pipe.tokenizer.convert_ids_to_tokens(_ids(pipe, prompt))
        pads = length - len(strings)
        return [""] * pads + strings, [True] * pads + [False] * len(strings)

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import Ideogram4Transformer2DModel

        model = Ideogram4Transformer2DModel(
            in_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=48,
            adaln_dim=12,
            llm_features_dim=24,
            rope_theta=100,
            mrope_section=(4, 2, 2),
        )
        grid, tokens = Grid.regular(3, 4), 6
        image = torch.tensor([grid.frame, grid.y, grid.x]).T + 100
        rows = []
        for length in [4, 6][:batch] if variant == "padded" else [6] * batch:
            # Positions other than zero, or a forgotten text rotation would go unseen.
            text = torch.arange(3, 3 + length).unsqueeze(1).expand(-1, 3)
            pads = tokens - length
            rows.append(
                (
                    torch.cat([torch.zeros(pads, 3, dtype=torch.long), text, image]),
                    torch.tensor([-1] * pads + [1] * (length + len(grid))),
                    torch.tensor([0] * pads + [_TEXT] * length + [_IMAGE] * len(grid)),
                )
            )
        position_ids, segment_ids, indicator = (torch.stack(part) for part in zip(*rows, strict=True))
        inputs = {
            "hidden_states": torch.randn(batch, tokens + len(grid), 8),
            "timestep": torch.full((batch,), 0.3),
            "encoder_hidden_states": torch.randn(batch, tokens + len(grid), 24),
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "indicator": indicator,
        }
        return TinyModel(model, inputs, grid, concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        rows, count, _ = embeddings.shape
        indicator, position_ids = inputs["indicator"], inputs["position_ids"]
        start = int((indicator[0] != _IMAGE).sum())
        first = position_ids[torch.arange(rows), (indicator == _TEXT).int().argmax(1)].unsqueeze(1)
        latents, features = inputs["hidden_states"][:, start:], inputs["encoder_hidden_states"][:, start:]
        segment = inputs["segment_ids"][:, start:]
        return {
            **inputs,
            "hidden_states": torch.cat([latents.new_zeros(rows, count, latents.shape[-1]), latents], dim=1),
            "encoder_hidden_states": torch.cat([embeddings, features], dim=1),
            "position_ids": torch.cat([first.expand(-1, count, -1), position_ids[:, start:]], dim=1),
            "segment_ids": torch.cat([segment[:, :1].expand(-1, count), segment], dim=1),
            "indicator": torch.cat([indicator.new_full((rows, count), _TEXT), indicator[:, start:]], dim=1),
        }


def _templated(pipe: Any, text: str) -> str:
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return pipe.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def _ids(pipe: Any, text: str) -> list[int]:
    return pipe.tokenizer(_templated(pipe, text), add_special_tokens=False)["input_ids"]
