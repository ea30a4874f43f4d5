"""A multi-modal transformer of nobody's, and how a user describes it: the one file that a new family takes."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from dit_probe import anatomy
from dit_probe.anatomy import Grid, Projection, TextSide
from dit_probe.anatomy.base import TinyModel

WIDTH, HEADS = 32, 2


class ToyAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.words = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.image_out, self.words_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, p):
        joint = torch.cat([self.image(x), self.words(p)], dim=1).unflatten(-1, (3, HEADS, -1))
        q, k, v = (part.transpose(1, 2) for part in joint.unbind(2))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.image_out(o[:, : x.shape[1]]), self.words_out(o[:, x.shape[1] :])


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = ToyAttention()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        a, b = self.gate(temb).unsqueeze(1).chunk(2, dim=-1)
        x, p = self.attn(F.layer_norm(hidden_states, (WIDTH,)), F.layer_norm(encoder_hidden_states, (WIDTH,)))
        hidden_states = hidden_states + a * x
        encoder_hidden_states = encoder_hidden_states + a * p
        both = (hidden_states, encoder_hidden_states)
        # The gate is squared for text alone: no template has that.
        return tuple(s + g * F.silu(self.mlp(s)) for s, g in zip(both, (b, b.square()), strict=True))


class ToyTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(patch_size=1)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.read, self.words = nn.Linear(4, WIDTH), nn.Linear(8, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(ToyBlock() for _ in range(3))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x, p = self.read(hidden_states.flatten(2).transpose(1, 2)), self.words(encoder_hidden_states)
        temb = self.time(timestep[:, None].float())
        for layer in self.layers:
            x, p = layer(hidden_states=x, encoder_hidden_states=p, temb=temb)
        return (x,)


class ToyText(TextSide):
    def project(self, c, context):
        joint = context.block.attention.words(F.layer_norm(c, (WIDTH,))).unflatten(-1, (3, HEADS, -1))
        gates = context.block.module.gate(context.modulation).unsqueeze(1).chunk(2, dim=-1)
        return Projection.of(*joint.unbind(2), context.rotary, gates)

    def update(self, c, o, projection, context):
        a, b = projection.modulation
        c = c + a * context.block.attention.words_out(o.flatten(2))
        return c + b.square() * F.silu(context.block.module.mlp(c))


class Toy(anatomy.Anatomy):
    family = "toy"
    classes = ("ToyTransformer",)
    joint = "layers"
    text = ToyText()
    text_first = returns_text_first = False
    variants = ("toy",)

    def heads(self, model):
        return HEADS, WIDTH // HEADS

    def grid(self, model, arguments):
        return Grid.regular(*arguments["hidden_states"].shape[-2:])

    def entry(self, model):
        return model.words

    def tiny(self, variant, batch):
        inputs = {
            "hidden_states": torch.randn(batch, 4, 3, 5),
            "encoder_hidden_states": torch.randn(batch, 6, 8),
            "timestep": torch.full((batch,), 0.5),
        }
        return TinyModel(ToyTransformer(), inputs, Grid.regular(3, 5), torch.randn(3, 8))
