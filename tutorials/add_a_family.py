# %% [markdown]
# # How do I trace a model that nobody described?
#
# A model is described in one file: where its blocks are, and how its text runs through them. Whether the description
# is true is no matter of opinion: run on the prompt's own tokens, it has to give what the model gives. Here is a
# model with a quirk: in its blocks the gate of the text is squared.

# %%
import plotly.graph_objects as go
import torch
from torch import nn

import dit_probe as dp
from dit_probe.anatomy import Anatomy, Grid, Projection, TextSide
from dit_probe.panels import Sheet


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.words, self.out = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x, p):
        q, k, v = torch.cat([self.image(x), self.words(p)], 1).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
        o = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return o[:, : x.shape[1]], o[:, x.shape[1] :]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.gate = Attention(), nn.Linear(32, 32)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        x, p = self.attn(hidden_states, encoder_hidden_states)
        gate = self.gate(temb).unsqueeze(1)
        return hidden_states + gate * x, encoder_hidden_states + gate.square() * p


class Newcomer(nn.Module):
    dtype, device, config = torch.float32, torch.device("cpu"), None

    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Linear(8, 32), nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        x, p, temb = hidden_states.flatten(2).mT, self.words(encoder_hidden_states), timestep[:, None].expand(-1, 32)
        for block in self.blocks:
            x, p = block(hidden_states=x, encoder_hidden_states=p, temb=temb)
        return (x,)


# %% [markdown]
# The description. `project` gives the text's queries, keys and values in a block, and what `update` needs of them;
# `update` is what a block does to the text when attention is done. Modules are called as the model calls them.


# %%
class Text(TextSide):
    def project(self, c, context):
        q, k, v = context.block.attention.words(c).unflatten(-1, (3, 2, 16)).unbind(2)
        return Projection.of(q, k, v, context.rotary, (context.block.module.gate(context.modulation).unsqueeze(1),))

    def update(self, c, o, projection, context):
        return c + projection.modulation[0].square() * context.block.attention.out(o.flatten(2))


class Described(Anatomy):
    family, classes, joint = "newcomer", ("Newcomer",), "blocks"
    text, text_first, returns_text_first = Text(), False, False

    def heads(self, model):
        return 2, 16

    def grid(self, model, arguments):
        return Grid.regular(*arguments["hidden_states"].shape[-2:])

    def entry(self, model):
        return model.words


# %% [markdown]
# `dp.verify` holds the description against the model. And had we overlooked the square? Then the same checks say so:

# %%
torch.manual_seed(0)
model, x, p = Newcomer(), torch.randn(1, 32, 6, 6), torch.randn(1, 5, 8)
inputs = {"hidden_states": x, "encoder_hidden_states": p, "timestep": torch.ones(1)}
print(right := dp.verify(model, inputs=inputs))
Text.update = lambda self, c, o, made, context: c + made.modulation[0] * context.block.attention.out(o.flatten(2))
wrong = dp.verify(model, inputs=inputs)

# %% alt="Largest difference by layer: 1e-7 for the right description, about 1 without the square."
figure = go.Figure(layout=Sheet.page(660, 320, {"l": 90, "r": 170, "t": 20, "b": 60}))
for name, found, colour in (("right", right, "#21918c"), ("without the square", wrong, "#c8641b")):
    worst = [max(layer.differences.values()) for layer in found.layers]
    figure.add_scatter(x=[*range(4)], y=worst, name=name, mode="lines+markers", line={"color": colour})
figure.update_layout(xaxis={"title": "layer", "zeroline": False}, yaxis={"title": "largest difference", "type": "log"})
figure

# %%
assert right.ok and not wrong.ok
