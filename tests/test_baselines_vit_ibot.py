"""iBOT's weights in a ViTModel, against a forward in DINO's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, gelu, layer_norm

import dit_probe as dp
from probes.baselines.ibot import ibot
from probes.baselines.vit import ViT
from probes.baselines.vit_attention import ViTAttention
from tests.baselines_vit_cases import picture


def teacher(width: int = 128, layers: int = 3, patch: int = 4, side: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, side**2 + 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    names = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    names |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
    for name, shape in [("norm", (width,)), *((f"blocks.{i}.{n}", s) for i in range(layers) for n, s in names.items())]:
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"masked_embed": (1, width), "head.mlp.0.weight": (7, width)}
    return {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def forward(state: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int):
    """Output tokens, (token, width), and the last block's attention, with queries, keys and values in one matrix."""
    width = state["cls_token"].shape[-1]

    def norm(x, name):
        return layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def dense(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = torch.cat([state["cls_token"][0], x[0].flatten(1).T]) + state["pos_embed"][0]
    attention = None
    for layer in range(3):
        at = f"blocks.{layer}"
        q, k, v = dense(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + dense((attention @ v).transpose(0, 1).reshape(len(x), width), f"{at}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
    return norm(x, "norm"), attention


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
@pytest.mark.parametrize("heads", [None, 4])
def test_the_converted_model_puts_out_the_same(prefix: str, heads: int | None):
    state = teacher()
    vit = ViT(ibot({f"{prefix}{name}": tensor for name, tensor in state.items()}, heads), architecture="iBOT ViT")
    assert vit.heads == (heads or 2)  # a head to 64 channels
    tokens, attention = forward(state, vit.pixels(picture()), vit.heads)
    torch.testing.assert_close(vit.model(vit.pixels(picture())).last_hidden_state[0], tokens, rtol=1e-4, atol=1e-4)
    found = ViTAttention(vit).scores([picture()], ["sun"])
    np.testing.assert_allclose(found[0, 0, 0], attention[:, 0, 1:].reshape(-1, 3, 3), rtol=1e-3, atol=1e-6)
    assert found.attrs["architecture"] == "iBOT ViT"


def test_other_layouts_are_refused():
    with pytest.raises(dp.errors.ModelError, match=r"'norm.weight'\] are missing"):
        ibot({name: tensor for name, tensor in teacher().items() if name != "norm.weight"})
    for name in ("blocks.0.gamma_1", "fc_norm.weight"):
        with pytest.raises(dp.errors.ModelError, match=f"{name} has no place"):
            ibot(teacher() | {name: torch.ones(128)})
