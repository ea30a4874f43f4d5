"""Causal tests: does what a map points at matter, there and more than anything else?

| | |
|---|---|
| `change` | an effect of edits: how much they change the picture that is generated |
| `denoising_gap` | another: what words are worth to the model that denoises real images; `denoising_loss` is its half |
| `ablation` | a design: a map's highest tokens are edited, random ones, and the same shape in another place |
| `curves` | another: more and more tokens, in the order of the map, in the opposite and in any |
| `by_region` | an effect inside and outside of masks |
| `patching` | at which layer and step an activation decides between two prompts |
| `gradients` | how a number that the model computes, such as its `denoising` loss, changes with every activation |

Effects and designs combine freely: an effect is a function that takes ``edits=[...]`` and answers along ``sample``, a
design calls it with its edits. `dit_probe.edits.by_row` gives each sample of a batch its own.
"""

from dit_probe.causal.attribution import gradients
from dit_probe.causal.cells import patching
from dit_probe.causal.effects import Effect, by_region, change, denoising, denoising_gap, denoising_loss
from dit_probe.causal.tokens import Ablate, ablation, curves, cut_from_prompt

__all__ = [
    "Ablate",
    "Effect",
    "ablation",
    "by_region",
    "change",
    "curves",
    "cut_from_prompt",
    "denoising",
    "denoising_gap",
    "denoising_loss",
    "gradients",
    "patching",
]
