"""Lumina Image 2.0: single-stream blocks with grouped keys; padding is cut off before them.

Concepts are an extension beyond the paper here: one more caption token, which neither image nor caption sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Grid, Places, Projection, Rotary, TextContext, TextSide
from dit_probe.errors import TraceError


class SandwichText(TextSide):
    """Norms on both sides of attention and MLP, gates through tanh, no shifts; shared with Z-Image.

    n, a1, s, a2 = norm1(c, temb);   c <- c + tanh(a1) norm2(P o_c)
    c <- c + tanh(a2) ffn_norm2(MLP((1 + s) ffn_norm1(c)))

    Attributes:
        after_attention: the norm of P o_c.
    """

    after_attention = "norm2"

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        normed, gates = self.modulate(context.block.module, c, context)
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        head_dim = attention.inner_dim // attention.heads
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in projected)
        q = q if attention.norm_q is None else attention.norm_q(q)
        k = k if attention.norm_k is None else attention.norm_k(k)
        k, v = (part.repeat_interleave(attention.heads // part.shape[2], dim=2) for part in (k, v))
        return Projection.of(q, k, v, context.rotary, gates)

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, scale, mlp_gate = (part.unsqueeze(1) for part in projection.modulation)
        o = o.flatten(2)
        for module in context.block.attention.to_out:
            o = module(o)
        c = c + gate.tanh() * getattr(block, self.after_attention)(o)
        return c + mlp_gate.tanh() * block.ffn_norm2(block.feed_forward(block.ffn_norm1(c) * (1 + scale)))

    def modulate(self, block: Any, c: Tensor, context: TextContext) -> tuple[Tensor, Sequence[Tensor]]:
        """The first norm, and the gate of attention, the scale and the gate of the MLP."""
        normed, *gates = block.norm1(c, context.modulation)
        return normed, gates


def turned_by(angles: Tensor) -> Rotary:
    """Rotary embedding of interleaved pairs by complex numbers (row or 1, token, head_dim / 2)."""

    def rotary(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles.to(x.device).unsqueeze(2)).flatten(3).to(x.dtype)

    return rotary


def shared_start(tokenizer: Any, template: Callable[[str], str]) -> int:
    """How many tokens a template puts before the text."""
    one, other = (tokenizer(template(text))["input_ids"] for text in ("a", "the"))
    return next(index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])


class Lumina2(Anatomy):
    """`Lumina2Transformer2DModel`. The prompt of every row is its caption without padding, at positions 0, 1, 2 …"""

    family = "lumina2"
    classes = ("Lumina2Transformer2DModel",)
    joint = "no joint blocks"
    single = "layers"
    single_text = SandwichText()
    text_first = True
    unlabelled_calls = ("cond", "uncond")
    variants = ("grouped", "even")
    pipeline_variants = ("grouped",)
    tiny_call = {"height": 32, "width": 48, "max_sequence_length": 32}
    # As long as the prompt of the tests with its template, which the pipeline gives the positive prompt alone.
    guided_call = {"negative_prompt": "<Prompt Start> a boat on the water"}

    def heads(self, model: Any) -> tuple[int, int]:
        heads = model.config.num_attention_heads
        return heads, model.config.hidden_size // heads

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def time(self, arguments: Mapping[str, Any]) -> float:
        return 1000.0 * (1 - float(arguments["timestep"].flatten()[0]))

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        return Grid.regular(height // model.config.patch_size, width // model.config.patch_size)

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        tokens = arguments["encoder_attention_mask"].sum(1)
        if (tokens != tokens[0]).any():
            raise TraceError(
                f"the captions of one call have {', '.join(map(str, tokens.tolist()))} tokens, and Lumina 2 puts the "
                "image right after each row's own: image tokens stand at other places in every row. Give prompts of "
                "the same length, or one prompt a call"
            )
        return arguments["encoder_hidden_states"][:, : int(tokens[0])]

    def entry(self, model: Any) -> nn.Module:
        return model.time_caption_embed.caption_embedder

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        c = self.entry(model)(embeddings.flatten(0, 1).unsqueeze(1))
        for layer in model.context_refiner:
            c = layer(c, None, None)  # alone, a token attends to itself whatever its position
        return c.view(*embeddings.shape[:2], -1)

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        return turned_by(arguments["image_rotary_emb"][:1, places.in_joint(at)])

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        start = shared_start(pipe.tokenizer, lambda text: _templated(pipe, text))
        templated = [_templated(pipe, text) for text in texts]
        hidden, _ = pipe._get_gemma_prompt_embeds(templated, max_sequence_length=start + limit)
        return hidden[:, start:]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        strings = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(_templated(pipe, prompt))["input_ids"])
        # Another length: a system_prompt of the call's own, or a negative prompt, which gets none. Not to be guessed.
        return strings if len(strings) == length else [""] * length, [False] * length

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, text_width=24)
        # As if captions began at position 2, or a text rotation forgotten at position 0 would go unseen.
        model.rope_embedder.freqs_cis = [table[2:] for table in model.rope_embedder.freqs_cis]
        inputs = {
            "hidden_states": torch.randn(batch, 4, 6, 8),
            "encoder_hidden_states": torch.randn(batch, 7, 24),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(batch, -1),
            "timestep": torch.full((batch,), 0.3),
        }
        return TinyModel(model, inputs, Grid.regular(3, 4), concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        mask = inputs["encoder_attention_mask"].new_ones(embeddings.shape[:2])
        return {**inputs, "encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        angles = arguments["image_rotary_emb"].clone()
        angles[:, places.prompt] = angles[:, places.prompt.start, None]
        changed = super().with_streams(block, arguments, x, p, places)
        return {**changed, "image_rotary_emb": angles}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        # The image's positions begin where the caption ends. All text now stands at one position, no image token does.
        now, then = arguments["image_rotary_emb"], before["image_rotary_emb"]
        image = int((now != now[:, :1]).any(-1)[0].sum())
        return {**arguments, "image_rotary_emb": torch.cat([now[:, :-image], then[:, -image:]], dim=1)}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

        tokenizer, t5 = parts.t5()
        pipe = Lumina2Pipeline(
            transformer=_transformer(variant, text_width=parts.t5_width),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=parts.vae(),
            text_encoder=t5,  # any encoder will do, and this one's words are one token each
            tokenizer=tokenizer,
        )
        pipe.system_prompt = ""
        return pipe


def _templated(pipe: Any, text: str) -> str:
    return f"{pipe.system_prompt} <Prompt Start> {text}"


def _transformer(variant: str, *, text_width: int) -> Any:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2 if variant == "grouped" else 4,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=text_width,
    )
