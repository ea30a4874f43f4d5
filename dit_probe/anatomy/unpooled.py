"""Flux's kin that no pooled text vector modulates: what Chroma, Bria, FIBO, Ovis and LongCat have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.base import EncodeInputs, TinyModel, TinyParts, draw_noise
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.flux import Flux


class UnpooledFlux(Flux):
    """Flux's blocks, packed latents and positions, modulated by the timestep alone. No family by itself."""

    pooled = False
    encoder = ("tokenizer", "text_encoder")
    pipeline_variants = ()
    tiny_call = {"height": 16, "width": 24, "max_sequence_length": 16}
    guided_call = {"negative_prompt": "a boat"}

    def conditioner(self, model: Any) -> nn.Module | None:
        return None

    def prepare(self, pipe: Any, pixels: Sequence[Any], prompts: Sequence[str], seed: int, **text: Any) -> EncodeInputs:
        device, dtype, config = pipe._execution_device, pipe.transformer.dtype, pipe.vae.config
        images = pipe.image_processor.preprocess([frames[0] for frames in pixels]).to(device, pipe.vae.dtype)
        latents = (pipe.vae.encode(images).latent_dist.mode() - config.shift_factor) * config.scaling_factor
        latents, noise = latents.to(dtype), draw_noise(latents, seed).to(dtype)
        packed, packed_noise = (pipe._pack_latents(part, *part.shape) for part in (latents, noise))
        call = self.text_inputs(pipe, list(prompts), packed, **text)
        return EncodeInputs(packed, packed_noise, {**call, "img_ids": self.positions(pipe, latents)})

    def text_inputs(self, pipe: Any, prompts: list[str], latents: Tensor, **text: Any) -> dict[str, Any]:
        """Transformer arguments that come of the prompts, as the pipeline makes them without guidance."""
        raise NotImplementedError

    def positions(self, pipe: Any, latents: Tensor) -> Tensor:
        """Position ids of the image tokens of latents (row, channel, y, x)."""
        rows, _, height, width = latents.shape
        return pipe._prepare_latent_image_ids(rows, height // 2, width // 2, latents.device, latents.dtype)

    # --- tests

    def tiny(self, variant: str, batch: int) -> TinyModel:
        grid, tokens, width = Grid.regular(3, 4), 5, 32
        # Ids other than zero, or a forgotten text rotation would go unseen.
        text_ids = torch.tensor([[2.0, 1.0 + token, 3.0 * token] for token in range(tokens)])
        inputs = {
            "hidden_states": torch.randn(batch, len(grid), 16),
            "encoder_hidden_states": torch.randn(batch, tokens, width),
            "timestep": torch.full((batch,), 700.0 / self.timestep_scale),
            "img_ids": torch.tensor([grid.frame, grid.y, grid.x]).T.float(),
            "txt_ids": text_ids,
        }
        model = self.tiny_transformer(variant, text_width=width)
        return TinyModel(model, inputs, grid, concepts=torch.randn(3, width))

    def tiny_transformer(self, variant: str, *, text_width: int, in_channels: int = 16, **options: Any) -> Any:
        """Three joint and two single-stream blocks of two heads of 16."""
        import diffusers

        return getattr(diffusers, self.classes[0])(
            in_channels=in_channels,
            num_layers=3,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=text_width,
            axes_dims_rope=(4, 6, 6),
            **options,
        )

    def t5_pipeline(self, name: str, variant: str, parts: TinyParts) -> Any:
        """A pipeline whose one text encoder is T5, by the name of its class."""
        import diffusers

        tokenizer, encoder = parts.t5()
        return getattr(diffusers, name)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=parts.vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=self.tiny_transformer(variant, text_width=parts.t5_width),
        )


def masked_as_first(mask: Tensor, concepts: int, images: int) -> Tensor:
    """A mask for another prompt, every token of which is what the prompt's first one was.

    Args:
        mask: (row, token), or (row, head, query, key) with one query for all or one for each token.
        concepts: how many tokens the other prompt has.
        images: how many the image has.
    """
    tokens = mask.shape[-1]
    kept = [0] * concepts + list(range(tokens - images, tokens))
    if mask.ndim == 4 and mask.shape[2] == tokens:
        mask = mask[:, :, kept]
    return mask[..., kept]


def padding_mask(batch: int, tokens: int, images: int) -> Tensor:
    """A test's mask (row, prompt + image), True where valid: every row pads more, and none its first token."""
    valid = torch.ones(batch, tokens + images, dtype=torch.bool)
    for row in range(batch):
        valid[row, max(1, tokens - 1 - row) : tokens] = False
    return valid


def word_tokenizer(parts: TinyParts) -> Any:
    """The tests' T5 tokenizer as language models have theirs: of no class of its own, and open to a chat template."""
    from transformers import PreTrainedTokenizerFast

    backend = parts.t5()[0].backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
