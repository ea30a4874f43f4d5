# %% [markdown]
# # Does the model use what a map shows?
#
# A map of "boat" lies on the boat. That may be a trace of what happened, and not what made it happen. So the patches
# under the map are changed while the model paints, and beside them others, for comparison.

# %%
import os

import numpy as np
import torch
import xarray as xr

import dit_probe as dp
from dit_probe.loading import load_pipeline
from dit_probe.panels import Sheet, data_uri
from probes import ConceptAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
call = {"num_inference_steps": 6, "guidance_scale": 3.0, "max_sequence_length": 32}
pipe = load_pipeline(model)
pipe.set_progress_bar_config(disable=True)


def paint(*traced):
    """Four pictures of one prompt, with probes or under edits; (picture, y, x, colour) uint8."""
    edits = [edit for edit in traced if isinstance(edit, dp.Edit)]
    probes = [probe for probe in traced if isinstance(probe, dp.Probe)]
    with dp.trace(pipe, *probes, edits=edits, progress=False) as run:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
        pictures = pipe(["a sun and a boat on water"] * 4, generator=seeds, **call).images
    return np.stack(pictures), run.dataset if probes else None


# %% [markdown]
# One run to record: maps of the boat, and the direction that "sun" has in the values of every layer, against the
# other two.

# %%
before, ds = paint(ConceptAttention(["sun", "boat", "water"], record=["v_c"], scores=["cross"]))
boat = dp.maps.saliency(ds, space="cross").sel(concept="boat").values.reshape(4, -1)
tokens = [row >= np.sort(row)[-16] for row in boat]
sun = dp.edits.direction_of(ds, "sun", "v_c")
noise = xr.zeros_like(sun) + np.random.default_rng(0).standard_normal(sun.shape)

# %% [markdown]
# Three edits of the 16 patches that the map has highest: they are kept from reading the prompt; their values are
# pushed towards "sun"; and pushed as hard in a random direction. A fourth cuts off 16 random patches.

# %%
random = [np.random.default_rng(seed).permutation(row) for seed, row in enumerate(tokens)]
cut, cut_random = (
    dp.edits.by_row([dp.edits.block("image", "prompt", query_tokens=row, layers="all") for row in rows])
    for rows in (tokens, random)
)
to_sun, to_noise = (
    dp.edits.by_row([dp.edits.steer(way, "v_x", 1.0, tokens=row) for row in tokens]) for way in (sun, noise)
)
edits = {"boat cut off": cut, "random cut off": cut_random, "to sun": to_sun, "to random": to_noise}
after = {"before": before} | {name: paint(edit)[0] for name, edit in edits.items()}

# %% alt="Four pictures down, edits across. Cut off, boats are gone or elsewhere; steered to sun, they are suns."
sheet = Sheet(4, len(after), (1, 1), side=130, gap=(6, 6), shape=before.shape[1:3])
for column, (name, pictures) in enumerate(after.items()):
    sheet.title(name, column, wrap=False)
    for row, picture in enumerate(pictures):
        sheet.picture(data_uri(picture), row * len(after) + column)
sheet.figure()

# %% [markdown]
# Only suns are yellow, so yellow pixels say whether there is more sun; and the pixels under the map, how much has
# changed.

# %%
inside = np.kron(np.reshape(tokens, (4, 16, 16)), np.ones((4, 4))).astype(bool)
change = {name: abs(p.astype(float) - before).mean(-1)[inside].mean() / 255 for name, p in after.items()}
yellow = {name: int(((p[..., 0] > 180) & (p[..., 1] > 128) & (p[..., 2] < 115)).sum()) for name, p in after.items()}
print("\n".join(f"{name:14} change {change[name]:.2f}, yellow {yellow[name]}" for name in after))
assert change["boat cut off"] > 2 * change["random cut off"]
assert yellow["to sun"] > 1.3 * max(yellow["before"], yellow["to random"])
