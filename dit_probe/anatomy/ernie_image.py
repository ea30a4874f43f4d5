"""ERNIE-Image: single-stream blocks that one modulation serves, on sequences whose first dim is the token.

Concepts are an extension beyond the paper here: one more text token, which neither image nor text sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Block, Grid, Places, Projection, Rotary, TextContext, TextSide
from dit_probe.anatomy.lumina2 import shared_start

# A pipeline's prompts are as long as they are; a plan that is not told how long says what this many tokens cost.
_PARAGRAPH = 512


class ErnieText(TextSide):
    """Norms, the shared shifts, scales and gates in float32, and a gated MLP.

    b1, g1, a1, b2, g2, a2 = temb
    c <- c + a1 * P o_c;   c <- c + a2 * MLP((1 + g2) * norm(c) + b2)
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        attention = context.block.attention
        shift, scale, *later = context.modulation
        normed = _modulated(context.block.module.adaLN_sa_ln(c), shift, scale)
        projected = (attention.to_q(normed), attention.to_k(normed), attention.to_v(normed))
        q, k, v = (part.unflatten(-1, (attention.heads, -1)) for part in projected)
        return Projection.of(attention.norm_q(q), attention.norm_k(k), v, context.rotary, later)

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        block = context.block.module
        gate, shift, scale, mlp_gate = projection.modulation
        c = c + _gated(context.block.attention.to_out[0](o.flatten(2)), gate)
        return c + _gated(block.mlp(_modulated(block.adaLN_mlp_ln(c), shift, scale)), mlp_gate)


def _modulated(c: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (c.float() * (1 + scale.float().unsqueeze(1)) + shift.float().unsqueeze(1)).to(c.dtype)


def _gated(c: Tensor, gate: Tensor) -> Tensor:
    return (gate.float().unsqueeze(1) * c.float()).to(c.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding that pairs the first half of a head's dims with the second, in the precision of `x`.

    Args:
        x: (row, token, head, head_dim).
        cos: of the angles, (row or 1, token, 1, head_dim).
        sin: likewise.

    Example:
        >>> rotate_halves(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.zeros(1), torch.ones(1)).flatten().tolist()
        [0.0, 1.0]
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x) + torch.cat([-second, first], dim=-1) * sin.to(x)


class ErnieImage(Anatomy):
    """`ErnieImageTransformer2DModel`. Image tokens stand before the text, padded to the longest prompt of the call."""

    family = "ernie-image"
    classes = ("ErnieImageTransformer2DModel",)
    joint = "no joint blocks"
    single = "layers"
    attention = "self_attention"
    single_text = ErnieText()
    text_first = False
    variants = ("patches", "no-text-projection")
    pipeline_variants = ("patches",)
    tiny_call = {"height": 32, "width": 48}

    def heads(self, model: Any) -> tuple[int, int]:
        heads = model.config.num_attention_heads
        return heads, model.config.hidden_size // heads

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        return {"q": block.attention.norm_q, "k": block.attention.norm_k}

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        height, width = arguments["hidden_states"].shape[-2:]
        return Grid.regular(height // model.config.patch_size, width // model.config.patch_size)

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["text_bth"]

    def entry(self, model: Any) -> nn.Module:
        # Without a projection text has no module of its own before the blocks; the image's runs in every forward too.
        return model.x_embedder if model.text_proj is None else model.text_proj

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        return embeddings if model.text_proj is None else model.text_proj(embeddings)

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        return places.split(arguments["x"].transpose(0, 1))

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor | None]:
        return places.split(output.transpose(0, 1))

    def modulation(self, block: Block, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in arguments["temb"])  # repeated for every token

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary:
        angles = arguments["rotary_pos_emb"][:1, places.in_joint(at)]
        return partial(rotate_halves, cos=angles.cos(), sin=angles.sin())

    # --- pipelines

    def text_limit(self, pipe: Any) -> int:
        return min(pipe.tokenizer.model_max_length, _PARAGRAPH)

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        start = shared_start(pipe.tokenizer, str)
        return self._padded(pipe, texts)[0][:, start:][:, :limit]

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        if getattr(pipe, "pe", None) is not None:
            # The prompt enhancer may have rewritten what the caller asked for, in words that are not known here.
            return [""] * length, [False] * length
        strings = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer(prompt, truncation=True)["input_ids"])[:length]
        # The pipeline reads one token where there is none.
        pads = length - max(len(strings), 1)
        return strings + [""] * (length - len(strings)), [False] * (length - pads) + [True] * pads

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        token = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        return Grid.regular(height // token, width // token)

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, vae = pipe._execution_device, pipe.vae
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, vae.dtype)
        latents = pipe._patchify_latents(vae.encode(images).latent_dist.mode())
        mean, variance = (part.view(1, -1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        # As the pipeline undoes it, which does not read batch_norm_eps of the VAE's config.
        latents = ((latents - mean) / (variance + 1e-5).sqrt()).to(pipe.transformer.dtype)
        embeddings, lengths = self._padded(pipe, prompts, **text)
        return EncodeInputs(latents, draw_noise(latents, seed), {"text_bth": embeddings, "text_lens": lengths})

    def _padded(self, pipe: Any, texts: Sequence[str], **text: Any) -> tuple[Tensor, Tensor]:
        device, transformer = pipe._execution_device, pipe.transformer
        hidden = pipe.encode_prompt(list(texts), device, **text)
        return pipe._pad_text(hidden, device, transformer.dtype, transformer.config.text_in_dim)

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        width = 24 if variant == "patches" else 32
        model = _transformer(text_width=width, patch=2 if variant == "patches" else 1)
        # As if positions began at 2, or a text rotation forgotten at position 0 would go unseen.
        position = model.pos_embed.forward
        model.pos_embed.forward = lambda ids: position(ids + 2)
        height, columns = (6, 8) if variant == "patches" else (3, 4)
        inputs = {
            "hidden_states": torch.randn(batch, 16, height, columns),
            "timestep": torch.full((batch,), 700.0),
            "text_bth": torch.randn(batch, 5, width),
            "text_lens": torch.tensor([3, 5][:batch]),
        }
        return TinyModel(model, inputs, Grid.regular(3, 4), concepts=torch.randn(4, width))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        # text_lens stays: it says where in the rotary embedding the image stands.
        return {**inputs, "text_bth": embeddings}

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        joint, angles = arguments["x"].clone(), arguments["rotary_pos_emb"].clone()
        joint[places.image], joint[places.prompt] = x.transpose(0, 1), p.transpose(0, 1)
        angles[:, places.prompt] = angles[:, places.prompt.start, None]
        return {**arguments, "x": joint, "rotary_pos_emb": angles}

    def clamp(self, block: Block, arguments: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        return {**arguments, "attention_mask": torch.ones_like(arguments["attention_mask"])}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import AutoencoderKLFlux2, ErnieImagePipeline, FlowMatchEulerDiscreteScheduler

        tokenizer, t5 = parts.t5()
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        )
        return ErnieImagePipeline(
            transformer=_transformer(text_width=parts.t5_width, patch=2),
            vae=vae,
            text_encoder=t5,  # any encoder will do, and this one's words are one token each
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )


def _transformer(*, text_width: int, patch: int) -> Any:
    from diffusers import ErnieImageTransformer2DModel

    return ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=3,
        ffn_hidden_size=48,
        in_channels=16,
        out_channels=16,
        patch_size=patch,
        text_in_dim=text_width,
        rope_axes_dim=(4, 6, 6),
    )
