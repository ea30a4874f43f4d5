# %% [markdown]
# # Does a concept have to be in the prompt?
#
# Maps of a model's own cross-attention exist for the words of its prompt only. A concept is not in the prompt: it is
# encoded by itself. So the same pictures are shown to the model with a prompt that names an object, and with none.

# %%
import os
from dataclasses import replace

import plotly.graph_objects as go

import dit_probe as dp
from dit_probe import methods, protocols, summary
from dit_probe.datasets.segmentation import PictureBook
from dit_probe.loading import load_pipeline
from dit_probe.panels import Sheet

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
text = {"max_sequence_length": 32} if model in dp.demo.names() else {}
pipe = load_pipeline(model)

# %% [markdown]
# And a concept that is in no picture at all? Two such words are given with every picture (`absent=2`), and their maps
# are held against the objects that *are* there: `auroc_absent`. A map that follows its word has nothing to show.

# %%
protocol = replace(protocols.find("native"), absent=2)
rows = {"prompt": "a {}", "no prompt": ""}
rows = {name: methods.Passes(pipe, prompt=prompt, **text).method("output") for name, prompt in rows.items()}
found = dp.evaluate(rows, PictureBook(12, objects=2), protocol, progress=False)

# %% alt="AUROC of the right word is 0.88 with and without prompt, of words that are not there about one half."
result = summary.summarise(found)
figure = go.Figure()
for row, colour in zip(rows, ("#21918c", "#c8641b"), strict=True):
    of = result.sel({"method": row, "metric": ["auroc", "auroc_other", "auroc_absent"]})
    names = ["the right word", "another word there", "a word not there"]
    bars = {"array": of.high - of["mean"], "arrayminus": of["mean"] - of.low, "color": colour}
    dots = {"mode": "markers", "marker": {"size": 10, "color": colour}}
    figure.add_scatter(x=names, y=of["mean"].values, error_y=bars, name=row, **dots)
legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}
figure.update_layout(Sheet.page(560, 380, {"l": 80, "r": 20, "t": 50, "b": 50}), legend=legend)
figure.update_xaxes(range=[-0.5, 2.5], showgrid=False)
figure.update_yaxes(title="AUROC on the object", range=[0, 1.02], gridcolor="rgba(127,127,127,0.3)", zeroline=False)
figure

# %% [markdown]
# The word finds its object without being in the prompt. Still, a softmax shares every patch out among the words that
# are there, and a word that is in no picture gets its share of something: maps compare words, they do not detect
# things.

# %%
alone = result.sel({"method": "no prompt"})
print(summary.table(result.sel(metric=["auroc", "auroc_other", "auroc_absent"])))
assert alone.low.sel(metric="auroc") > alone.high.sel(metric="auroc_absent")
