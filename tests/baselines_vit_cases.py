"""Tiny random vision transformers of the true classes, and a picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from dit_probe.demo.text import clip_tokenizer
from probes.baselines.vit import ViT

CONCEPTS = ["sun", "boat", "water"]
SIDE, PATCH, GRID = 12, 4, (3, 3)
SIZES = {"image_size": SIDE, "patch_size": PATCH}
SETTINGS = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **SIZES}
NAMES = ("CLIPModel", "ViTForImageClassification", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel")
SCORED = NAMES[:2]


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (18, 25, 3), np.uint8)


def model(name: str, seed: int = 0):
    """A model whose norms, biases, tokens and scales are as random as its matrices; attention is far from uniform."""
    config = getattr(transformers, name.replace("ForImageClassification", "").replace("Model", "") + "Config")
    if name == "CLIPModel":
        tokenizer = clip_tokenizer()
        words = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
        text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= {"intermediate_size": 32, "max_position_embeddings": 32, **words}
        vision = SETTINGS | {"intermediate_size": 32}
        config = config(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=1.0)
    elif name.startswith("Dinov2"):
        config = config(**SETTINGS, mlp_ratio=2)
    else:
        config = config(**SETTINGS, intermediate_size=32, num_labels=5)
    made = getattr(transformers, name)(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if path != "logit_scale":
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
                parameter += "norm" in path and path.endswith("weight")
    return made


def vit(name: str, **settings) -> ViT:
    """Concepts are bare words: in a sentence a random text encoder hardly tells them apart."""
    return ViT(model(name), clip_tokenizer() if name == "CLIPModel" else None, **{"templates": ["{}"], **settings})


def eager(vit: ViT, image: np.ndarray):
    """Attention of every layer, (head, query, key), as transformers itself gives it out."""
    twin = model(type(vit.model).__name__)
    twin.set_attn_implementation("eager")
    tower = twin.vision_model if vit.is_clip else twin
    asked = {} if "Dinov2" in type(twin).__name__ else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        found = tower(pixel_values=vit.pixels(image), output_attentions=True, output_hidden_states=True, **asked)
    return [layer[0] for layer in found.attentions], found


def rewritten(vit: ViT, image: np.ndarray) -> SimpleNamespace:
    """The vision side of CLIP or of the classifier once more, from its weights and the formulas, without modules.

    Lists have an entry a layer, without the axis of pictures; q, k, v are (head, token, d).
    """
    clip, prefix = vit.is_clip, "vision_model." if vit.is_clip else "vit."
    names = {name.removeprefix(prefix): weight.detach() for name, weight in vit.model.named_parameters()}

    def norm(x, name):
        return layer_norm(x, (16,), names[f"{name}.weight"], names[f"{name}.bias"], 1e-5 if clip else 1e-12)

    def dense(x, name):
        return linear(x, names[f"{name}.weight"], names[f"{name}.bias"])

    def mlp(x, at):
        y = dense(norm(x, f"{at}.layer_norm2" if clip else f"{at}.layernorm_after"), f"{at}.mlp.fc1")
        return dense(y * torch.sigmoid(1.702 * y) if clip else gelu(y), f"{at}.mlp.fc2")

    def embed(state):
        y = norm(state, "post_layernorm" if clip else "layernorm")
        return y @ names["visual_projection.weight"].T if clip else dense(y, "classifier")

    def scores(state):
        y = embed(state)
        return y / y.norm() @ vit.texts(CONCEPTS).T * torch.tensor(1.0).exp() if clip else y

    patches = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    x = conv2d(vit.pixels(image), names[f"{patches}.weight"], names.get(f"{patches}.bias"), stride=4)
    first = names["embeddings.class_embedding" if clip else "embeddings.cls_token"].reshape(1, 16)
    places = names["embeddings.position_embedding.weight" if clip else "embeddings.position_embeddings"]
    x = torch.cat([first, x[0].flatten(1).T]) + places.reshape(10, 16)
    x = norm(x, "pre_layrnorm") if clip else x
    kept = {name: [] for name in ("inputs", "normed", "q", "k", "v", "attention", "outputs")}
    for layer in range(3):
        at = f"encoder.layers.{layer}" if clip else f"layers.{layer}"
        attend, out = (f"{at}.self_attn", "out_proj") if clip else (f"{at}.attention", "o_proj")
        y = norm(x, f"{at}.layer_norm1" if clip else f"{at}.layernorm_before").requires_grad_()
        q, k, v = (dense(y, f"{attend}.{one}_proj").reshape(10, 2, 8).transpose(0, 1) for one in "qkv")
        weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1)
        after = x + dense((weights @ v).transpose(0, 1).reshape(10, 16), f"{attend}.{out}")
        after = after + mlp(after, at)
        for name, value in zip(kept, (x, y, q, k, v, weights, after), strict=True):
            kept[name].append(value)
        x = after
    return SimpleNamespace(**kept, dense=dense, mlp=mlp, embed=embed, scores=scores)
