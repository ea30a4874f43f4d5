"""iBOT, whose weights are published in DINO's layout, as a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import dit_probe as dp

_WHOLE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_UNUSED = ("head.", "masked_embed")  # what training alone needs


def ibot(state: Mapping[str, Tensor], heads: int | None = None) -> Any:
    """A ViTModel with the weights of iBOT's teacher (Zhou et al. 2022), or of any ViT in DINO's layout.

    Queries, keys and values, one matrix of 3 x width rows there, become three. Norms have eps 1e-6.

        state = torch.load("checkpoint_teacher.pth")["state_dict"]
        vit = ViT(ibot(state), architecture="iBOT ViT")

    Args:
        state: names to tensors; prefixes ``module.`` and ``backbone.`` fall away.
        heads: attention heads, which the file does not say; None: a head to 64 channels, as all published sizes have.

    Raises:
        ModelError: the names are of another layout, or of a variant with layer scale or mean pooling.
    """
    from transformers import ViTConfig, ViTModel

    bare = {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}
    bare = {name: tensor for name, tensor in bare.items() if not name.startswith(_UNUSED)}
    if missing := sorted({*_WHOLE, "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} - set(bare)):
        raise dp.errors.ModelError(f"no ViT in DINO's layout: {missing} are missing; give the teacher's state_dict")
    width, _, patch, _ = bare["patch_embed.proj.weight"].shape
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in bare if name.startswith("blocks.")),
        num_attention_heads=heads or width // 64,
        intermediate_size=len(bare["blocks.0.mlp.fc1.weight"]),
        patch_size=patch,
        image_size=patch * round((bare["pos_embed"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,
        qkv_bias="blocks.0.attn.qkv.bias" in bare,
    )
    model = ViTModel(config, add_pooling_layer=False)
    found = {}
    for name, tensor in bare.items():
        found |= {_WHOLE[name]: tensor} if name in _WHOLE else _of_block(name, tensor)
    model.load_state_dict(found)
    return model.eval()


def _of_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    _, layer, *rest = name.split(".") if name.startswith("blocks.") else ("", "", name)
    part, kind = ".".join(rest[:-1]), rest[-1]
    if part == "attn.qkv":
        thirds = zip("qkv", torch.chunk(tensor, 3), strict=True)
        return {f"layers.{layer}.attention.{letter}_proj.{kind}": third for letter, third in thirds}
    if part not in _BLOCK:
        raise dp.errors.ModelError(f"{name} has no place in a ViTModel: layer scale and mean pooling are not supported")
    return {f"layers.{layer}.{_BLOCK[part]}.{kind}": tensor}
