# %% [markdown]
# # Does the model know left from right?
#
# One picture cannot say. This traces a data set of prompts into one store, and answers from the store. The same lines
# run a million prompts on many GPUs ([data sets](../datasets.md)).

# %%
import os

import numpy as np
import plotly.graph_objects as go

import dit_probe as dp
from dit_probe.loading import load_pipeline
from dit_probe.panels import Sheet
from probes import ConceptAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
call = {"num_inference_steps": 6, "guidance_scale": 3.0, "max_sequence_length": 32}
seeds = range(10)


def load():
    """The pipeline; on a cluster every worker calls this once."""
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# %% [markdown]
# Two prompts with the same noise, that differ in one word. Of the recording only scores are kept: a few hundred times
# smaller than activations, and enough for maps.

# %%
samples = [{"prompt": f"a sun {side} of a boat on water", "seed": seed} for side in ("left", "right") for seed in seeds]
probe = ConceptAttention(["sun", "boat", "water"], record=(), scores=["cross"])
print(dp.trace_dataset(load, samples, probe, "run.zarr", batch=5, progress=False, **call))

# %% [markdown]
# A run that was stopped goes on where it was, and what is done is not made again. This one is complete:

# %%
again = dp.trace_dataset(load, samples, probe, "run.zarr", batch=5, progress=False, **call)
print(again.made, "made now")

# %% [markdown]
# The store is lazy: maps of all samples are one array, computed when asked for. Where is a thing? At the centre of
# mass of its map, sharpened by a power.

# %% alt="Sun minus boat in patches, left prompt across and right prompt up: all points lie on the diagonal."
maps = dp.maps.saliency(dp.open("run.zarr"), space="cross") ** 4
place = (maps * maps.x).sum(["y", "x"]) / maps.sum(["y", "x"])
apart = (place.sel(concept="sun") - place.sel(concept="boat")).values.reshape(2, -1)
dots = {"mode": "markers", "marker": {"size": 9, "color": "#21918c"}}
figure = go.Figure(go.Scatter(x=apart[0], y=apart[1], **dots))
figure.add_scatter(
    x=[-8, 8], y=[-8, 8], mode="lines", line={"color": "#767676", "dash": "dot", "width": 1}, showlegend=False
)
figure.update_layout(Sheet.page(440, 420, {"l": 80, "r": 20, "t": 20, "b": 70}), showlegend=False)
axis = {"range": [-8, 8], "gridcolor": "rgba(127,127,127,0.3)", "zeroline": False}
figure.update_xaxes(title="a sun left of a boat: x of sun - x of boat", **axis)
figure.update_yaxes(title="a sun right of a boat", **axis)
figure

# %% [markdown]
# It does not. A model that did would have all points left of zero and above it. Where things stand was in the noise:
# the same seed puts them in the same place, whatever the prompt says.

# %%
moved = apart[1] - apart[0]
print(f"the word moves the sun by {moved.mean():.2f} patches; seeds agree with r = {np.corrcoef(apart)[0, 1]:.3f}")
assert again.made == 0
assert abs(moved).max() < 2 and np.corrcoef(apart)[0, 1] > 0.9
