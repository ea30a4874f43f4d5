"""Run methods over a data set and keep a number for every image: resumable, with what failed and why.

A method is any callable ``(images, concepts) -> maps``: a list of ([frame,] y, x, 3) uint8 arrays and a list of words
in, an `xarray.DataArray` (image, concept, [frame,] y, x) with the words as coordinate ``concept`` out, of any grid and
units. It may say ``class_agnostic = True`` (the same map for every word: it is scored as a foreground, not among
classes) and have ``describe()``, a string with all that decides its maps: a run is continued only with methods that say
the same.

`noise`, `constant`, `centre_gaussian`, `image_saliency` look at nothing or at no word, a `random_twin` has not learned
anything: without their rows a table cannot be read. They stand in `dit_probe.methods`, as `concept_attention` does.
`plan` says beforehand what a run costs; `dit_probe.summary` makes tables of its numbers.
"""

from dit_probe.evaluation.pricing import Plan, plan
from dit_probe.evaluation.results import FORMAT, Method
from dit_probe.evaluation.running import EvaluationWarning, evaluate
from dit_probe.methods import centre_gaussian as centre_gaussian
from dit_probe.methods import concept_attention as concept_attention
from dit_probe.methods import constant as constant
from dit_probe.methods import image_saliency as image_saliency
from dit_probe.methods import noise as noise
from dit_probe.methods import random_twin as random_twin

__all__ = ["FORMAT", "EvaluationWarning", "Method", "Plan", "evaluate", "plan"]
