"""Do the maps of a demo model fall on the objects? Held-out scenes, a random-weight twin, trivial maps, intervals.

    python benchmarks/demo_quality.py sd35-picturebook

Scenes (or clips) come from seeds that training never saw, about one in five with two words that no training sample had
together. Each is encoded through the autoencoder, noised at a timestep and passed through the transformer once, with
its nouns and its background word as concepts. Three numbers an image, chance in brackets:

* **AUROC** (0.5) and **AP** (the object's share of the picture): how well a noun's map tells its object's pixels from
  all others, mean over the nouns. A pixel has the value of its token; masks stay exact.
* **right one of two** (0.5), scenes of two nouns: at a pixel of one object, is its own map higher than the other's?
* **macro mIoU**: the argmax over the nouns and the background word against who owns the pixel, mean over them.

The image is the unit; intervals are 95 % percentile bootstraps over images. The twin has the same architecture and
autoencoder and fresh weights elsewhere. Layers are chosen on another hundred scenes, never on those that are reported.
Of clips, ``static`` rows score the mean of a map over its frames: what a map that does not follow the motion would get.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import dit_probe as dp
from dit_probe import metrics, statistics
from dit_probe.datasets.clips import Clip, clips
from dit_probe.datasets.scenes import Scene, scenes
from dit_probe.demo.examples import held_out
from probes import ConceptAttention

HELD_OUT_FAMILY, CHOOSING_FAMILY = 7, 8
TIMESTEPS = (100, 300, 500, 700, 900)
MAIN_TIMESTEP = 500
SPACES: dict[str, dict[str, Any]] = {
    "output": {"space": "output"},
    "image to concept": {"space": "cross", "direction": "image_to_concept"},
    "concept to image": {"space": "cross", "direction": "concept_to_image"},
    "value": {"space": "value"},
}
ATTENDS = ("both", "image", "concepts", "none")
"""Table 5: cross-attention and self-attention of the concepts, one of them, none."""
METRICS = ("auroc", "ap", "right_of_two", "miou")

Picture = Scene | Clip


@dataclass(frozen=True)
class Drawn:
    """A group of pictures with equally many words, ready for one forward pass.

    Attributes:
        pictures: The scenes or clips.
        masks: (sample, concept, frame, y, x) bool, concepts being the words of each.
    """

    pictures: list[Picture]
    masks: xr.DataArray
