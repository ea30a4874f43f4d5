"""HiDream-I1: joint blocks, then single-stream ones; image before text in the attention call.

The text of a block is [T5 and last-layer llama tokens | llama tokens of a layer of its own], the latter new in every
block and thrown away after it. The former are the prompt stream; concepts are such tokens, and enter as T5's do.
All text stands at position zero. An image that is no square is padded, and its padding attended to with k = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Block, Grid, Places, TextContext
from dit_probe.anatomy.shift_scale_gate import ShiftScaleGateText
from dit_probe.errors import ModelError


@dataclass(frozen=True)
class HiDreamText(ShiftScaleGateText):
    """Text has modules of its own (``_t``) in a joint block; in a single one those of the image, a mixture of experts.

    Attributes:
        suffix: of the attention module's parts.
    """

    suffix: str = ""

    def vectors(self, c: Tensor, context: TextContext) -> Sequence[Tensor]:
        # Twelve vectors in a joint block, the image's first; six in a single one.
        return context.block.module.adaLN_modulation(context.modulation).split(c.shape[-1], dim=-1)[-6:]

    def projected(self, attention: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to_q, to_k, to_v = (getattr(attention, f"to_{name}{self.suffix}") for name in "qkv")
        q_norm, k_norm = (getattr(attention, f"{name}_rms_norm{self.suffix}") for name in "qk")
        # The norms run over all heads together.
        made = (q_norm(to_q(normed)), k_norm(to_k(normed)), to_v(normed))
        q, k, v = (part.to(normed.dtype).unflatten(-1, (attention.heads, -1)) for part in made)
        return q, k, v


class HiDream(Anatomy):
    """`HiDreamImageTransformer2DModel`."""

    family = "hidream"
    classes = ("HiDreamImageTransformer2DModel",)
    joint = "double_stream_blocks"
    single = "single_stream_blocks"
    text = HiDreamText("norm1_t", "norm3_t", "ff_t", "to_out_t", suffix="_t")
    single_text = HiDreamText("norm1_i", "norm3_i", "ff_i", "to_out")
    text_first = False
    returns_text_first = False
    encoder = ("tokenizer_3", "text_encoder_3")
    variants = ("square", "padded", "patches", "dense")
    pipeline_variants = ("padded",)
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}
    guided_call = {"guidance_scale": 5.0}

    def blocks(self, model: nn.Module) -> tuple[Block, ...]:
        lists = (("joint", self.joint, self.text), ("single", self.single, self.single_text))
        found = [
            (kind, f"{name}.{index}.block", wrapper.block, side)
            for kind, name, side in lists
            for index, wrapper in enumerate(getattr(model, name))
        ]
        return tuple(
            Block(layer, kind, path, module, module.attn1, side)
            for layer, (kind, path, module, side) in enumerate(found)
        )

    def unrotated(self, block: Block, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
        attention = block.attention
        if block.kind == "single":
            return {"q": attention.q_rms_norm, "k": attention.k_rms_norm}
        return {
            "q_x": attention.q_rms_norm,
            "k_x": attention.k_rms_norm,
            "q_p": attention.q_rms_norm_t,
            "k_p": attention.k_rms_norm_t,
        }

    def entry(self, model: Any) -> nn.Module:
        return model.caption_projection[-1]

    def time(self, arguments: Mapping[str, Any]) -> float:
        return float(arguments["timesteps"].flatten()[0])

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        latents = arguments["hidden_states"]
        if latents.ndim == 4:
            height, width = (size // model.config.patch_size for size in latents.shape[-2:])
            return Grid.regular(height, width)
        sizes = [(int(height), int(width)) for height, width in arguments["img_sizes"]]
        if len(set(sizes)) > 1:
            raise ModelError(
                f"the rows of this call hold images of different sizes ({sizes}); trace one size at a time"
            )
        return Grid.regular(*sizes[0])

    def prompt_embeddings(self, arguments: Mapping[str, Any]) -> Tensor:
        return arguments["encoder_hidden_states_t5"]

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        return self.prompt_embeddings(arguments).shape[1] + self._llama_tokens(arguments)

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        latents, image = arguments["hidden_states"], len(self.grid(model, arguments))
        if latents.ndim == 3:
            padded = latents.shape[1]
        else:
            padded = image if latents.shape[-1] == latents.shape[-2] else model.max_seq
        prompt, fresh = self.prompt_tokens(model, arguments), self._llama_tokens(arguments)
        return Places(slice(0, image), slice(padded, padded + prompt), padded + prompt + fresh)

    def _llama_tokens(self, arguments: Mapping[str, Any]) -> int:
        return arguments["encoder_hidden_states_llama3"][0].shape[-2]

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        return _cut(*super().streams(block, arguments, places), places)

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor | None]:
        x, p = super().outputs(block, output, places)
        assert p is not None
        return _cut(x, p, places)

    def tokens(self, pipe: Any, prompt: str, length: int) -> tuple[list[str], list[bool]]:
        t5 = min(length // 2, pipe.tokenizer_3.model_max_length)
        strings, pads = super().tokens(pipe, prompt, t5)
        llama = pipe.tokenizer_4(prompt, padding="max_length", max_length=length - t5, truncation=True)
        strings += pipe.tokenizer_4.convert_ids_to_tokens(llama["input_ids"])
        return strings, pads + [not mask for mask in llama["attention_mask"]]

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        # The pipeline keeps the proportions and goes to the area that it was made for.
        token = pipe.vae_scale_factor * 2
        scale = pipe.default_sample_size * pipe.vae_scale_factor / (width * height) ** 0.5
        return Grid.regular(int(height * scale // token), int(width * scale // token))

    def planned_prompt_tokens(self, pipe: Any, limit: int) -> int:
        return 2 * limit

    def tiny(self, variant: str, batch: int) -> TinyModel:
        model = _transformer(variant, t5_width=24, llama_width=20, pooled_width=12, max_resolution=(8, 8))
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch, 4, 6, 8 if variant == "padded" else 6),
            "timesteps": torch.full((batch,), 700.0),
            "encoder_hidden_states_t5": torch.randn(batch, 5, 24),
            "encoder_hidden_states_llama3": torch.randn(3, batch, 4, 20),
            "pooled_embeds": torch.randn(batch, 12),
        }
        if variant == "patches":
            where = torch.tensor([[0, row, column] for row in range(3) for column in range(4)] + [[0, 0, 0]] * 2)
            inputs |= {
                "hidden_states": torch.randn(batch, 14, 16),
                "hidden_states_masks": torch.ones(14).index_fill(0, torch.tensor([12, 13]), 0).expand(batch, -1),
                "img_ids": where.float().expand(batch, -1, -1),
                "img_sizes": [(3, 4)] * batch,
            }
        return TinyModel(model, inputs, self.grid(model, inputs), concepts=torch.randn(3, 24))

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        nothing = [layer[..., :0, :] for layer in inputs["encoder_hidden_states_llama3"]]
        return {**inputs, "encoder_hidden_states_t5": embeddings, "encoder_hidden_states_llama3": nothing}

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        # Without the image's padding, which concepts don't see.
        rotary = arguments["image_rotary_emb"]
        rotary = torch.cat([rotary[:, : x.shape[1]], rotary[:, -p.shape[1] :]], dim=1)
        changed = super().with_streams(block, arguments, x, p, places)
        return {**changed, "hidden_states_masks": None, "image_rotary_emb": rotary}

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer, clip = parts.clip(projection=True)
        tokenizer_2, clip_2 = parts.clip(projection=True)
        tokenizer_3, t5 = parts.t5()
        tokenizer_4, _ = parts.t5()
        llama = LlamaConfig(
            vocab_size=len(tokenizer_4),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            # The pipeline asks for the attention weights.
            attn_implementation="eager",
        )
        widths = {"t5_width": parts.t5_width, "llama_width": 32, "pooled_width": 2 * parts.clip_width}
        pipe = HiDreamImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=parts.vae(),
            text_encoder=clip,
            tokenizer=tokenizer,
            text_encoder_2=clip_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5,
            tokenizer_3=tokenizer_3,
            text_encoder_4=LlamaForCausalLM(llama),
            tokenizer_4=tokenizer_4,
            transformer=_transformer(variant, **widths, max_resolution=(10, 10)),
        )
        # It goes to the area of a square of this many latents, whatever it is asked for.
        pipe.default_sample_size = 10
        return pipe


def _cut(x: Tensor, p: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """Without the image's padding, and without the text that is thrown away after the block."""
    return x[:, : places.image.stop], p[:, : places.prompt_tokens]


def _transformer(
    variant: str, *, t5_width: int, llama_width: int, pooled_width: int, max_resolution: tuple[int, int]
) -> Any:
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[t5_width, llama_width],
        text_emb_dim=pooled_width,
        num_routed_experts=0 if variant == "dense" else 3,
        # Of two halves of a head, "dense" rotates one.
        axes_dims_rope=(4, 2, 2) if variant == "dense" else (4, 6, 6),
        max_resolution=max_resolution,
        llama_layers=[0, 1, 1, 2],
    )
