# ruff: noqa: E501
# %% [markdown]
# # How do I say it here, coming from another tool?
#
# Side by side, what is usually written elsewhere, and here. The code below runs four of the rows and compares their
# numbers.
#
# | task | there | here |
# |---|---|---|
# | concept maps | `ConceptAttentionFluxPipeline(…).generate_image(prompt, concepts)` (authors' code) | `dp.trace(pipe, ConceptAttention(words))`, `dp.maps.saliency` |
# | the authors' settings | their defaults: layers 15 to 18, raw vectors | `dp.methods.reference(pipe)` |
# | encode a real image | `encode_image(image, concepts)` | `dp.encode(pipe, image, prompt, timestep=500)` |
# | maps of prompt words | `daam.trace(pipe)`, `compute_global_heat_map()` (DAAM) | `PromptAttention()`, `dp.maps.prompt_attention` |
# | one tensor of a block | `model.transformer…output.save()` (nnsight) | `Probe(record=["o_x"])`, or `interop.nnsight` |
# | a cache of everything | `run_with_cache(tokens)` (TransformerLens) | `Probe(record=…)`, or `interop.transformer_lens` |
# | change an activation | assignment, or `run_with_hooks` | `trace(…, edits=[dp.edits.zero("v_p")])` |

# %%
import os

import numpy as np
import torch
import xarray as xr

import dit_probe as dp
from dit_probe.loading import load_pipeline
from probes import ConceptAttention, PromptAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
pipe = load_pipeline(model)
pipe.set_progress_bar_config(disable=True)
words, prompt = ["sun", "boat", "water"], "a sun and a boat on water"
call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 32}

# %% [markdown]
# Here: one run, and eq. (8) over all layers and steps. `PromptAttention` shares the pass: it is DAAM's question,
# asked of a transformer.

# %%
with dp.trace(pipe, ConceptAttention(words) | PromptAttention(), progress=False) as run:
    image = pipe(prompt, generator=torch.Generator().manual_seed(1), **call).images[0]
ds = run.dataset
ours = dp.maps.saliency(ds, space="output").isel(sample=0)
prompted = dp.maps.prompt_attention(ds).isel(sample=0)
tokens = [str(token) for token in prompted.token.values]
of = [[k for k, token in enumerate(tokens) if word in token] for word in words]
daam = xr.concat([prompted.isel(prompt_token=places).mean("prompt_token") for places in of], "concept")
daam = daam.assign_coords(concept=words)

# %% [markdown]
# TransformerLens: the same run as an `ActivationCache` under its names, and eq. (8) by hand, a step at a time.

# %%
total = 0
for step in ds.step.values:
    cache = dp.interop.transformer_lens.cache(ds, step=int(step))
    for layer in range(ds.sizes["layer"]):
        o_x, o_c = (cache[f"{name}.{layer}.attn.hook_z"][0].flatten(1) for name in ("blocks", "concept_blocks"))
        total = total + torch.softmax(o_c @ o_x.T, 0)
lens = ours.copy(data=(total / (ds.sizes["step"] * ds.sizes["layer"])).reshape(ours.shape).numpy())

# %% [markdown]
# nnsight: one tensor out of its trace of the pipeline. By hand it is a path through modules that differs by family;
# `site` knows it.

# %%
model = dp.interop.nnsight.wrap(pipe)
with model.generate(prompt, generator=torch.Generator().manual_seed(1), **call) as tracer:
    o_x = model.site("o_x", layer=3).output.save()
same = np.array_equal(o_x[0].detach().numpy(), ds.o_x.sel(layer=3).isel(sample=0, step=0).values)
print("nnsight's o_x of layer 3 is ours, bit for bit:", same)

# %% alt="Maps of three words: eq. (8) here and by hand are the same; DAAM's reading, prompt attention, differs."
dp.figures.spaces(image, {"dit-probe": ours, "TransformerLens, by hand": lens, "prompt attention": daam})

# %%
xr.testing.assert_allclose(ours, lens, atol=1e-5)
assert same
