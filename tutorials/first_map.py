# %% [markdown]
# # Where in the picture is a word?
#
# A *concept* is a word that is carried through the model beside the picture. It reads the picture, and the picture
# never sees it, so that what is painted stays the same. Afterwards every patch of the picture is compared with every
# concept.

# %%
import os

import numpy as np
import torch

import dit_probe as dp
from dit_probe.loading import load_pipeline
from probes import ConceptAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
small = {"num_inference_steps": 8, "guidance_scale": 3.0, "max_sequence_length": 32}
call = small if model in dp.demo.names() else {}
pipe = load_pipeline(model)
pipe.set_progress_bar_config(disable=True)

# %% [markdown]
# Whatever the pipeline does inside of the `with` is recorded. Backgrounds are concepts, too: a map says which of
# *these* words a patch resembles most, so something has to be there for every patch.

# %%
probe = ConceptAttention(["sun", "boat", "water"])
with dp.trace(pipe, probe, store="run.zarr", mode="w", progress=False):
    image = pipe("a sun and a boat on water", generator=torch.Generator().manual_seed(1), **call).images[0]

# %% [markdown]
# The recording has names and labels, and stays on disk until it is asked for.

# %%
ds = dp.open("run.zarr")
print(dict(ds.o_x.sizes))

# %% alt="The painted picture, a sun and a boat on water, and three maps: each is bright where its word is."
maps = dp.maps.saliency(ds, space="cross").isel(sample=0)
dp.figures.overlay(image, maps)

# %% [markdown]
# Is that the sun? In this picture only the sun is yellow, so the pixels can say, and they know nothing of the map.

# %%
red, green, blue = np.moveaxis(np.asarray(image).reshape(16, image.height // 16, 16, -1, 3).mean((1, 3)), -1, 0)
yellow = (red > 150) & (green > 120) & (blue < 120)
sun = dp.metrics.resize(maps.sel(concept="sun"), 16, 16)
there, elsewhere = sun.values[yellow].mean(), sun.values[~yellow].mean()
print(f"{yellow.sum()} yellow patches: the sun's map is {there:.2f} there and {elsewhere:.2f} elsewhere")
assert there > 2 * elsewhere
