"""On pictures that a model was trained for, the rows of the tables that read it are above those that read nothing."""

from __future__ import annotations

from functools import cache

import pytest
import xarray as xr

import dit_probe as dp
from dit_probe.datasets.segmentation import PictureBook
from dit_probe.evaluation import evaluate
from dit_probe.methods import Passes, concept_attention, random_twin, trivial_rows
from dit_probe.summary import against
from probes.baselines.joint_attention import JointAttention

TRIVIAL = trivial_rows()
# Layers of the output space: all, or the one that the card chose on other scenes. In value space neither model has
# learned a map, as the cards say.
LAYERS = {"sd35-picturebook": None, "flux-picturebook": [2]}


@cache
def results(model: str) -> xr.Dataset:
    pipe = dp.demo.load(model)
    passes = Passes(pipe)
    rows = {
        "output space": passes.method("output", layers=LAYERS[model]),
        "image to concept": passes.method("cross", direction="image_to_concept"),
        "concept to image": passes.method("cross", direction="concept_to_image"),
        "image to text": JointAttention(pipe),
        "text to image": JointAttention(pipe, reading="text_to_image"),
        "random twin": concept_attention(random_twin(pipe)),
    }
    found = evaluate(rows | TRIVIAL, PictureBook(10, seed=9), progress=False)
    assert not (found.failed != "").any()
    return found


@pytest.mark.parametrize("trivial", [*TRIVIAL, "random twin"])
@pytest.mark.parametrize("model", LAYERS)
def test_rows_that_read_a_trained_model_are_above_trivial_ones(model, trivial):
    found = against(results(model), trivial).drop_sel({"method": [*({*TRIVIAL, "random twin"} - {trivial})]})
    assert found.sizes["method"] == 5
    assert (found.low > 0).all(), found.to_dataframe()
