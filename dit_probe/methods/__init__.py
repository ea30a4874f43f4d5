"""Ready-made methods for `dit_probe.evaluate`.

Each is a callable ``(images, concepts) -> maps``: ([frame,] y, x, 3) uint8 arrays and words in, (image, concept,
[frame,] y, x) out; ``describe()`` says all that decides the maps.

| | |
|---|---|
| `noise`, `constant`, `centre_gaussian`, `image_saliency` | look at nothing, or at no word |
| `concept_attention` | a pipeline's maps |
| `Passes` | many of them of one pass: spaces, layers, softmax (Table 4, Figure 4) |
| `reference` | with the choices of the authors' evaluation code |
| `random_twin`, `randomised` | pipelines that have not learned anything, or not all |
| `shuffled` | a method under the wrong words |
| `similarity` | how alike the maps of two methods are |
| `Baseline` | what other people's methods derive from: scores with every native axis, and a map |
| `hosts` | the models that they run on, by entry point, and the rows that each gives |
| `costs` | seconds and memory of calls, measured in turns |
"""

from dit_probe.methods.baseline import Baseline, checksum
from dit_probe.methods.cost import Cost, costs
from dit_probe.methods.hosts import Host, hosts
from dit_probe.methods.passes import Passes, PipelineMaps, concept_attention
from dit_probe.methods.published import (
    REFERENCE_BACKGROUND,
    REFERENCE_VOC_BACKGROUND,
    Reference,
    ReferenceSettings,
    reference,
)
from dit_probe.methods.sanity import Shuffled, random_twin, randomised, shuffled, similarity
from dit_probe.methods.trivial import GRID, Trivial, centre_gaussian, constant, image_saliency, noise, trivial_rows

__all__ = [
    "GRID",
    "REFERENCE_BACKGROUND",
    "REFERENCE_VOC_BACKGROUND",
    "Baseline",
    "Cost",
    "Host",
    "Passes",
    "PipelineMaps",
    "Reference",
    "ReferenceSettings",
    "Shuffled",
    "Trivial",
    "centre_gaussian",
    "checksum",
    "concept_attention",
    "constant",
    "costs",
    "hosts",
    "image_saliency",
    "noise",
    "random_twin",
    "randomised",
    "reference",
    "shuffled",
    "similarity",
    "trivial_rows",
]
