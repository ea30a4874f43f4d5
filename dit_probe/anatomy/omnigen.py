"""OmniGen: the layers of a language model on (text, time token, image); text attends to the text before it alone.

    o_p = softmax(q_p k_p^T / sqrt(d) + causal mask) v_p

The image attends to everything, text never to the image. Eq. (4) has no counterpart: a concept stream that reads the
image would do what no text token of the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import Block, Grid, Modulation, Places, Projection, Rotary, TextContext, TextSide
from dit_probe.anatomy.ernie_image import rotate_halves


class LanguageModelText(TextSide):
    """Norm, projections, residual; norm, MLP, residual. Nothing is modulated: time is a token of its own."""

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed = context.block.module.input_layernorm(c)
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in projected)
        return Projection.of(q, k, v, context.rotary)

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        c = c + context.block.attention.to_out[0](o.flatten(2))
        return c + block.mlp(block.post_attention_layernorm(c))


class OmniGen(Anatomy):
    """`OmniGenTransformer2DModel`. Input images stand among the text; shorter rows are padded on the left.

    The model turns the tokens of every row to the positions of the first row.
    """

    family = "omnigen"
    classes = ("OmniGenTransformer2DModel",)
    joint = "no joint blocks"
    single = "layers"
    attention = "self_attn"
    single_text = LanguageModelText()
    text_first = True
    no_concepts = "its text tokens attend to the text before them and never to the image"
    halves = ("cond", "uncond")
    variants = ("text", "padded", "input image")

    def heads(self, model: Any) -> tuple[int, int]:
        heads = model.config.num_attention_heads
        return heads, model.config.hidden_size // heads

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.to_q, "k": block.attention.to_k}

    def time(self, arguments: Mapping[str, Any]) -> float:
        return 1000.0 * (1 - float(arguments["timestep"].flatten()[0]))

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        return Grid.regular(height // model.config.patch_size, width // model.config.patch_size)

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["input_ids"].unsqueeze(-1)  # the tokenizer's ids are all that comes from outside

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        image, text = len(self.grid(model, arguments)), self.prompt_tokens(model, arguments)
        return Places(slice(text + 1, text + 1 + image), slice(0, text), text + 1 + image)

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> Modulation:
        return ()

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        cos, sin = (part[None, places.in_joint(at), None] for part in arguments["image_rotary_emb"])
        return lambda x: rotate_halves(x.float(), cos, sin).to(x.dtype)

    def text_limit(self, pipe: Any) -> int:
        return pipe.tokenizer_max_length

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        ids = pipe.tokenizer(pipe.multimodal_processor.add_prefix_instruction(prompt))["input_ids"]
        if "<|image_1|>" in prompt or len(ids) > length:
            return [""] * length, [False] * length  # how many tokens an input image takes is not known here
        pads = length - len(ids)
        return [""] * pads + pipe.tokenizer.convert_ids_to_tokens(ids), [True] * pads + [False] * len(ids)

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import OmniGenTransformer2DModel

        model = OmniGenTransformer2DModel(
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=48,
            num_layers=3,
            pad_token_id=0,
            vocab_size=50,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=16,
        )
        height, width, text = 3, 4, 7
        pads = [2 if variant == "padded" and row == 0 else 0 for row in range(batch)]
        sizes = {row: [[2, 5]] for row in range(batch)} if variant == "input image" else {}
        total = text + 1 + height * width
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 0.3),
            "input_ids": torch.randint(1, 50, (batch, text)),
            "input_img_latents": [torch.randn(1, 4, 2, 6) for _ in sizes],
            "input_image_sizes": sizes,
            "attention_mask": torch.stack([_mask(text, total, count, sizes.get(0, [])) for count in pads]),
            # From 3 on, or a text rotation forgotten at position 0 would go unseen.
            "position_ids": torch.stack([(torch.arange(total) - count).clamp(min=0) + 3 for count in pads]),
        }
        return TinyModel(model, inputs, Grid.regular(height, width), concepts=torch.randn(3, 32))


def _mask(text: int, total: int, pads: int, images: list[list[int]]) -> Tensor:
    """Ones where a token sees another, as the pipeline gives them: pads see all and are seen by none but pads."""
    sees = torch.ones(total, total).tril()
    sees[text + 1 :] = 1
    for start, stop in images:
        sees[start:stop, start:stop] = 1
    sees[:, :pads] = 0
    sees[:pads] = 1
    return sees
