"""ConsisID: CogVideoX with a face, which is added to the image stream between blocks and never meets text."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from dit_probe.anatomy.base import Anatomy, TinyModel, TinyParts
from dit_probe.anatomy.block import Grid
from dit_probe.anatomy.cogvideox import CogVideoX

_FACE = 8


class ConsisID(CogVideoX):
    """`ConsisIDTransformer3DModel`; "faceless" is one made without ``is_train_face``."""

    family = "consisid"
    classes = ("ConsisIDTransformer3DModel",)
    variants = ("face", "faceless", "sincos", "learned")
    # diffusers wants OpenCV for this pipeline, which draws key points on faces with it.
    pipeline_variants = ("face",) if find_spec("cv2") else ()
    tiny_call = {
        "image": torch.zeros(1, 3, 32, 48),
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "id_cond": torch.full((1, _FACE), 0.5),
        "id_vit_hidden": [torch.full((1, 3, _FACE), 0.5), torch.full((1, 3, _FACE), -0.5)],
    }
    # A real video has no identity image beside it to make the other half of the latents from.
    prepare = Anatomy.prepare

    def tiny(self, variant: str, batch: int) -> TinyModel:
        frames, height, width = 3, 4, 6
        model = _transformer(variant, text_width=32, text_tokens=5)
        grid = Grid.regular(height // 2, width // 2, frames)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch, frames, 8, height, width),
            "encoder_hidden_states": torch.randn(batch, 5, 32),
            "timestep": torch.full((batch,), 700),
        }
        if model.config.is_train_face:
            inputs["id_cond"] = torch.randn(batch, _FACE)
            inputs["id_vit_hidden"] = (torch.randn(batch, 3, _FACE), torch.randn(batch, 3, _FACE))
        if model.config.use_rotary_positional_embeddings:
            angles = torch.rand(len(grid), 8).mul(6).repeat_interleave(2, dim=-1)
            inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
        return TinyModel(model, inputs, grid, concepts=torch.randn(self.clamped_concepts(model), 32))

    def tiny_pipeline(self, variant: str, parts: TinyParts) -> Any:
        from diffusers import ConsisIDPipeline

        plain = CogVideoX().tiny_pipeline("5b", parts)
        transformer = _transformer(variant, text_width=parts.t5_width, text_tokens=226)
        return ConsisIDPipeline(**{**plain.components, "transformer": transformer})


def _transformer(variant: str, *, text_width: int, text_tokens: int) -> Any:
    from diffusers import ConsisIDTransformer3DModel

    heads, head_dim = 2, 16
    return ConsisIDTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=text_width,
        num_layers=4,  # an odd number, and the model runs out of face layers
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=text_tokens,
        use_rotary_positional_embeddings=variant != "sincos",
        use_learned_positional_embeddings=variant == "learned",
        is_train_face=variant == "face",
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=_FACE,
        LFE_vit_dim=_FACE,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=int(heads * head_dim / 3 * 2),
        LFE_num_scale=2,
    )
