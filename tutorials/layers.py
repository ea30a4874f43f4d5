# %% [markdown]
# # Which layers, and how much noise, know where things are?
#
# A model paints in steps, from noise to picture, and every step goes through every layer. Real pictures can be put in
# at any point: noise of that level is added, and one pass follows. So each layer and noise level has a score of its
# own.

# %%
import os

import xarray as xr

import dit_probe as dp
from dit_probe import methods, summary
from dit_probe.datasets.segmentation import PictureBook
from dit_probe.loading import load_pipeline

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
text = {"max_sequence_length": 32} if model in dp.demo.names() else {}
pipe = load_pipeline(model)
layers = range(len(pipe.transformer.transformer_blocks))

# %% [markdown]
# `timestep` is the noise level, from 0 (none) to 1000 (noise only). All layers are rows of one pass.

# %%
pictures = PictureBook(8, objects=2)
found = {}
for timestep in (100, 400, 700, 900):
    passes = methods.Passes(pipe, timestep=timestep, **text)
    rows = {str(layer): passes.method("output", layers=(layer,)) for layer in layers}
    found[timestep] = dp.evaluate(rows, pictures, progress=False)

# %% alt="AUROC by layer and noise level: highest in layer 2, lowest in the last layer, falling with noise."
scores = [result.auroc.mean("image").drop_vars("method").rename(method="layer") for result in found.values()]
table = xr.concat(scores, "step").assign_coords(layer=[*layers], step=range(4), timestep=("step", [*found]))
dp.figures.ablation(table.rename("AUROC"))

# %% [markdown]
# The last layer is the worst here, and a mean over all layers has it in. Choosing the best layer on these pictures
# and reporting it on the same ones would flatter it: `datasets.segmentation.split` keeps some pictures apart for
# that.

# %%
last = summary.against(found[400], str(layers[-1]))
print(summary.table(last))
assert last.low.sel({"method": "2"}) > 0
