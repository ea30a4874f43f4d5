# %% [markdown]
# # Do maps cut an object out of a real picture?
#
# A picture that the model did not paint is encoded, mixed with noise, and passed through once. No training, no masks:
# a patch belongs to the concept whose map is highest there. How far does that get?

# %%
import os

import numpy as np
import xarray as xr

import dit_probe as dp
from dit_probe.datasets.scenes import scenes
from dit_probe.loading import load_pipeline
from probes import ConceptAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
text = {"max_sequence_length": 32} if model in dp.demo.names() else {}
pipe = load_pipeline(model)


# %% [markdown]
# Drawn scenes have exact masks. For photographs there are `ImageNetSegmentation`, `PascalVOC` and `ImageMaskFolder`
# in `dit_probe.datasets.segmentation`. The words are those of the picture and of its background.


# %%
def cut(scene):
    """Maps of a scene's words, and which of the words each pixel is given to."""
    with dp.trace(pipe, ConceptAttention(scene.words), progress=False) as run:
        dp.encode(pipe, scene.image, scene.caption, timestep=500, **text)
    maps = dp.maps.saliency(run.dataset, space="cross").isel(sample=0)
    truth = xr.DataArray([*scene.masks.values(), scene.background_mask], dims=("concept", "y", "x"))
    given = dp.metrics.resize(maps, *truth.shape[1:], method="bilinear").argmax("concept").values
    return maps, truth.assign_coords(concept=[*scene.words]), given


pictures = [*scenes(10, seed=3, size=64, objects=2)]
found = [cut(scene) for scene in pictures]


# %% [markdown]
# Intersection over union of what is cut out and what is there, against one mask for everything: all pixels.


# %%
def iou(given, truth):
    """Of every word."""
    chosen = np.arange(len(truth))[:, None, None] == given
    return (chosen & truth.values).sum((1, 2)) / (chosen | truth.values).sum((1, 2))


ours = np.array([iou(given, truth) for _, truth, given in found])
everything = np.array([truth.values.mean((1, 2)) for _, truth, _ in found])

# %% alt="A drawn scene and, for each word, true mask, map, and what is cut out: the object with ragged edges."
maps, truth, given = found[1]
chosen = xr.zeros_like(truth, dtype=float) + (np.arange(len(truth))[:, None, None] == given)
shown = {"mask": truth * 1.0, "map": dp.metrics.resize(maps, 64, 64), "cut out": chosen}
dp.figures.spaces(pictures[1].image, shown, opacity=0.75)

# %%
for name, values in {"cut out": ours, "everything": everything}.items():
    print(f"{name:12} objects {values[:, :2].mean():.2f}, background {values[:, 2].mean():.2f}")
assert ours[:, :2].mean() > 2 * everything[:, :2].mean()
