"""Where the vision transformers of transformers 5 have their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import dit_probe as dp

Colours = tuple[tuple[float, ...], tuple[float, ...]]
_CLIP: Colours = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET: Colours = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: Colours = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Layout:
    """Where a class has its parts, as dotted paths: `tower` and `head` below the model, others below tower or block.

    Attributes:
        architecture: what tables call it.
        colours: mean and standard deviation that it was trained with, where its files do not say.
        tower: what has patches, blocks and the final norm; "" is the model itself.
        head: linear layer from the normed class token to an embedding or to classes.
    """

    architecture: str
    colours: Colours
    tower: str = ""
    head: str = ""
    patches: str = "embeddings.patch_embeddings.projection"
    blocks: str = "encoder.layer"
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attention"
    out: str = "o_proj"
    final: str = "layernorm"


_VIT: dict[str, Any] = {"blocks": "layers", "norms": ("layernorm_before", "layernorm_after")}
LAYOUTS = {
    "CLIPModel": Layout(
        "CLIP ViT",
        _CLIP,
        tower="vision_model",
        head="visual_projection",
        patches="embeddings.patch_embedding",
        blocks="encoder.layers",
        norms=("layer_norm1", "layer_norm2"),
        attention="self_attn",
        out="out_proj",
        final="post_layernorm",
    ),
    "ViTForImageClassification": Layout("ViT classifier", _HALF, tower="vit", head="classifier", **_VIT),
    "ViTModel": Layout("ViT", _IMAGENET, **_VIT),
    "Dinov2Model": Layout("DINOv2 ViT", _IMAGENET),
    "Dinov2WithRegistersModel": Layout("DINOv2 ViT with registers", _IMAGENET),
}
"""The model classes that `ViT` takes; what derives from them is taken, too."""


@dataclass(frozen=True)
class Block:
    """Modules of one transformer block; `scale1` and `scale2` are DINOv2's layer scales, None elsewhere."""

    module: nn.Module
    norm1: nn.Module
    attention: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    norm2: nn.Module
    mlp: nn.Module
    scale1: nn.Module | None
    scale2: nn.Module | None


def part_of(root: Any, path: str) -> Any:
    """The module at a dotted path; "" is `root`.

    Raises:
        ModelError: there is none.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        from transformers import __version__

        raise dp.errors.ModelError(
            f"{type(root).__name__} has no {path!r} in transformers {__version__}; its parts are named as in 5.24"
        ) from None


def block_of(module: nn.Module, layout: Layout) -> Block:
    """The parts of one block."""
    attention = part_of(module, layout.attention)
    q, k, v, out = (part_of(attention, name) for name in ("q_proj", "k_proj", "v_proj", layout.out))
    norm1, norm2 = (part_of(module, name) for name in layout.norms)
    scale1, scale2 = (getattr(module, name, None) for name in ("layer_scale1", "layer_scale2"))
    return Block(module, norm1, attention, q, k, v, out, norm2, part_of(module, "mlp"), scale1, scale2)
