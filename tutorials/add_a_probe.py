# %% [markdown]
# # How do I record something of my own?
#
# A probe says what to record. Where names of activations are enough, it is one line. Where something has to be
# computed while the model runs, because all of it would not fit, it is a class with one method.

# %%
import os
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

import dit_probe as dp
from dit_probe.datasets.scenes import scenes
from dit_probe.loading import load_pipeline

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
text = {"max_sequence_length": 32} if model in dp.demo.names() else {}
pipe = load_pipeline(model)
late_values = dp.Probe(record=["v_x", "v_p"], layers=[4, 5])  # the one line

# %% [markdown]
# The class: how much of its attention does every patch give to the prompt? `observes` names what comes out, and its
# dims; `observe` is called in every block. The joint attention of one head is a large matrix, so it is summed up at
# once.


# %%
@dataclass(frozen=True)
class Reading(dp.Probe):
    """Share of a patch's attention that goes to the prompt, mean over heads."""

    observes = {"reading": ("image_token",)}  # noqa: RUF012

    def observe(self, block, activations):
        """(row, image_token)."""
        to_prompt = [block.weights(head)[:, block.image, block.prompt].sum(-1) for head in range(block.heads)]
        return {"reading": torch.stack(to_prompt).mean(0)}


# %% [markdown]
# That is all. It is stored, priced, resumed and combined with others as those that come with the package are:

# %%
print((Reading() | late_values).plan(pipe, height=64, width=64, steps=1, max_sequence_length=32))

# %%
found, shares = [], []
for scene in scenes(8, seed=3, objects=2):
    with dp.trace(pipe, Reading(), progress=False) as run:
        dp.encode(pipe, scene.image, scene.caption, timestep=500, **text)
    found.append(dp.maps.grid(run.dataset.reading).isel(sample=0, step=0))
    objects = xr.DataArray(~scene.background_mask, dims=("y", "x"))
    shares.append(dp.causal.by_region(found[-1], objects))

# %% alt="A scene and, by layer, the share of a patch's attention that goes to the prompt: objects stand out."
layers = found[-1].rename(layer="concept")
layers = layers.assign_coords(concept=[f"layer {k}" for k in range(len(layers))])
dp.figures.overlay(scene.image, layers, columns=4, shared=False)

# %% [markdown]
# Patches of objects read the prompt more than patches of the background do, in every layer. To have `dit-probe
# probes` list your probe, name it under the entry point `dit_probe.probes`.

# %%
shares = xr.concat(shares, "scene").mean("scene").transpose("region", "layer")
print(np.round(shares.values, 2))
assert (shares.sel(region="inside") > shares.sel(region="outside")).all()
