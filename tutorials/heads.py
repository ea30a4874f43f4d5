# %% [markdown]
# # Are a few heads better than all of them?
#
# Attention has heads, and not every head looks where a word is. It seems plain that the mean over good ones should
# beat the mean over all. Here heads are ranked on some pictures, with masks, and tried on others.

# %%
import os

import plotly.graph_objects as go

import dit_probe as dp
from dit_probe import summary
from dit_probe.datasets.segmentation import PictureBook, split
from dit_probe.loading import load_pipeline
from dit_probe.panels import Sheet
from probes.baselines.head_selection import SelectedHeads, rank_heads
from probes.baselines.joint_attention import JointAttention

model = os.environ.get("DIT_PROBE_MODEL", "sd35-picturebook")
text = {"max_sequence_length": 32} if model in dp.demo.names() else {}
attention = JointAttention(load_pipeline(model), text=text)

# %% [markdown]
# `JointAttention` is the model's own attention from patches to the words of its prompt, a head at a time.

# %%
choosing, reported = split(PictureBook(18, objects=2), share=0.4)
ranked = rank_heads(attention, choosing, "auroc")
best = [(int(layer), int(head)) for layer, head in ranked.layer_head.values]
print("best and worst (layer, head):", *(f"{best[k]} {ranked.values[k]:.2f}" for k in (0, 1, -2, -1)))

# %%
counts = [1, 3, 8, len(best)]
rows = {str(count): SelectedHeads(attention, tuple(best[:count])) for count in counts}
found = dp.evaluate(rows, reported, progress=False)

# %% alt="AUROC on new pictures by number of heads kept: it rises from the best one to all of them."
auroc = summary.summarise(found).sel(metric="auroc")
mean, low, high = (auroc[name].values for name in ("mean", "low", "high"))
line = {"mode": "lines+markers", "line": {"color": "#21918c"}, "marker": {"size": 9}}
figure = go.Figure(go.Scatter(x=counts, y=mean, error_y={"array": high - mean, "arrayminus": mean - low}, **line))
figure.update_layout(Sheet.page(560, 340, {"l": 80, "r": 20, "t": 20, "b": 60}))
grid = {"gridcolor": "rgba(127,127,127,0.3)", "zeroline": False}
figure.update_xaxes(title="heads kept, best first", **grid)
figure.update_yaxes(title="AUROC on other pictures", **grid)
figure

# %% [markdown]
# Not in this model: all heads together are ahead of any few. A head that gives a word little attention has little
# weight in the mean anyway, so bad ones do not spoil it, and errors of many good ones cancel.

# %%
few = summary.against(found, str(len(best)))
print(summary.table(few))
assert few.high.sel({"method": ["1", "3"]}).max() < 0
