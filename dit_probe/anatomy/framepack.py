"""FramePack: HunyuanVideo that continues a video; what was made before stands in the image stream, ever coarser.

History tokens and the tokens of the first image (at the head of the text stream) are read by image, prompt and, were
they let, by concepts; the paper's concepts read the image that is being made and each other, and so they do here.
The pipeline makes a long video window by window, each with steps of its own; the first window's are recorded, which is
the video's end unless it samples forward (``sampling_type="vanilla"``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import Anatomy, TinyModel
from dit_probe.anatomy.block import Block, Grid, Places
from dit_probe.anatomy.hunyuan_video import HunyuanVideo, padded

# How the model patches its three kinds of history: frames, height, width.
_HISTORY = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}


class Framepack(HunyuanVideo):
    """`HunyuanVideoFramepackTransformer3DModel`. Without a batch, the padding of the prompt is cut off."""

    family = "framepack"
    classes = ("HunyuanVideoFramepackTransformer3DModel",)
    variants = ("guided", "unguided")
    pipeline_variants = ()
    prepare = Anatomy.prepare

    def prompt_tokens(self, model: Any, arguments: Mapping[str, Any]) -> int:
        mask = arguments["encoder_attention_mask"]
        return int(mask.sum(dtype=torch.int)) if len(mask) == 1 else mask.shape[1]

    def places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        history = sum(
            math.prod(math.ceil(size / step) for size, step in zip(arguments[name].shape[2:], patch, strict=True))
            for name, patch in _HISTORY.items()
        )
        image = slice(history, history + len(self.grid(model, arguments)))
        start = image.stop + arguments["image_embeds"].shape[1]
        prompt = slice(start, start + self.prompt_tokens(model, arguments))
        return Places(image, prompt, prompt.stop)

    def planned_grid(self, pipe: Any, height: int, width: int, frames: int) -> Grid:
        # Whatever the length of the video, it is made in windows of as many latent frames.
        window = inspect.signature(type(pipe).__call__).parameters["latent_window_size"].default
        return super().planned_grid(pipe, height, width, (window - 1) * pipe.vae_scale_factor_temporal + 1)

    def clamped_places(self, model: Any, arguments: Mapping[str, Any]) -> Places:
        return self.places(model, arguments)

    def streams(self, block: Block, arguments: Mapping[str, Any], places: Places) -> tuple[Tensor, Tensor]:
        return _cut(arguments["hidden_states"], arguments["encoder_hidden_states"], places)

    def outputs(self, block: Block, output: Any, places: Places) -> tuple[Tensor, Tensor]:
        x, p = output
        return _cut(x, p, places)

    def with_streams(
        self, block: Block, arguments: Mapping[str, Any], x: Tensor, p: Tensor, places: Places
    ) -> dict[str, Any]:
        history = arguments["hidden_states"][:, : places.image.start]
        # Concepts of the stream do not see the history, and so must not those of the model's own run.
        mask = torch.ones(len(x), 1, 1, places.total, dtype=torch.bool, device=x.device)
        mask[..., : places.image.start] = False
        joined = {"hidden_states": torch.cat([history, x], dim=1), "encoder_hidden_states": p}
        return {**arguments, **joined, "attention_mask": mask}

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        return {**super().with_prompt(inputs, embeddings), "image_embeds": inputs["image_embeds"][:, :0]}

    def tiny(self, variant: str, batch: int) -> TinyModel:
        from diffusers import HunyuanVideoFramepackTransformer3DModel

        model = HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            text_embed_dim=24,
            pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=variant == "guided",
            has_image_proj=True,
            image_proj_dim=10,
            has_clean_x_embedder=True,
        )
        inputs = {
            "hidden_states": torch.randn(batch, 4, 2, 4, 6),
            "indices_latents": torch.arange(7, 9),
            "latents_clean": torch.randn(batch, 4, 2, 4, 6),
            "indices_latents_clean": torch.tensor([0, 6]),
            "latents_history_2x": torch.randn(batch, 4, 2, 4, 6),
            "indices_latents_history_2x": torch.arange(4, 6),
            "latents_history_4x": torch.randn(batch, 4, 3, 4, 6),
            "indices_latents_history_4x": torch.arange(1, 4),
            "encoder_hidden_states": torch.randn(batch, 5, 24),
            "encoder_attention_mask": padded(batch, 5),
            "pooled_projections": torch.randn(batch, 12),
            "image_embeds": torch.randn(batch, 3, 10),
            "timestep": torch.full((batch,), 700.0),
        }
        if variant == "guided":
            inputs["guidance"] = torch.full((batch,), 6000.0)
        return TinyModel(model, inputs, Grid.regular(2, 3, 2), torch.randn(3, 24))


def _cut(x: Tensor, p: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    return x[:, places.image.start - places.image.stop :], p[:, -places.prompt_tokens :]
