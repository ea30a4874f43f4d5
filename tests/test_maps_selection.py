"""Which layers, steps and heads a map is made of, and the messages about what is not there."""

import json

import numpy as np
import pytest
from maps_cases import CONCEPTS, LAYER_LABELS, SAMPLES, STEP_LABELS, expected_scores, in_flight, make, merged, softmax

from dit_probe import maps
from dit_probe.errors import MapError


def test_layers_and_steps_are_labels_in_any_order():
    ds = make()
    expected = softmax(merged(expected_scores(ds, "output"), "output"), 3)
    got = maps.saliency(ds, layers=[7, 1], steps=2)
    np.testing.assert_allclose(got.values.reshape(SAMPLES, CONCEPTS, -1), expected[:, 1][:, [3, 0]].mean(1), rtol=1e-12)
    assert got.attrs["layers"] == [7, 1]
    assert got.attrs["steps"] == [2]
    assert maps.scores(ds, layers=np.array([4, 3])).layer.values.tolist() == [4, 3]
    assert maps.scores(ds, layers=range(3, 5)).layer.values.tolist() == [3, 4]
    np.testing.assert_allclose(maps.saliency(ds.isel(layer=3), layers=7), maps.saliency(ds, layers=7))


def test_over_keeps_the_dims_that_are_not_averaged():
    ds = make()
    by_layer = maps.saliency(ds, over=("step",))
    assert by_layer.dims == ("sample", "layer", "concept", "y", "x")
    assert maps.saliency(ds, over=()).dims == ("sample", "step", "layer", "concept", "y", "x")
    np.testing.assert_allclose(by_layer.mean("layer"), maps.saliency(ds), rtol=1e-12)
    np.testing.assert_allclose(by_layer.sel(layer=4), maps.saliency(ds, layers=4), rtol=1e-12)
    with pytest.raises(MapError, match="over='sample'"):
        maps.saliency(ds, over=("sample",))


def test_heads():
    ds = make()
    expected = softmax(expected_scores(ds, "output"), 4).mean((1, 2))
    each = maps.saliency(ds, heads="each")
    assert each.dims == ("sample", "head", "concept", "y", "x")
    np.testing.assert_allclose(each.values.reshape(expected.shape), expected, rtol=1e-12)
    # A head of the selected few is the same head, and all of them are the merged map.
    np.testing.assert_allclose(maps.saliency(ds, heads=[1]), each.isel(head=1), rtol=1e-12)
    np.testing.assert_allclose(maps.saliency(ds, "cross", heads=[1, 0]), maps.saliency(ds, "cross"), rtol=1e-12)
    with pytest.raises(MapError, match=r"head 2 does not exist for o_x and o_c; there are: 0, 1"):
        maps.saliency(ds, heads=[0, 2])
    with pytest.raises(MapError, match="heads='all' is none of 'merged', 'each'"):
        maps.saliency(ds, heads="all")


def test_attrs_are_json_and_say_what_was_computed():
    got = maps.saliency(make(), "cross", softmax="after", heads=(0, 1), rotary=False, direction="concept_to_image")
    assert got.name == "saliency"
    assert json.loads(json.dumps(got.attrs)) == {
        "space": "cross",
        "direction": "concept_to_image",
        "rotary": False,
        "softmax": "after",
        "heads": [0, 1],
        "layers": LAYER_LABELS,
        "steps": STEP_LABELS,
    }
    assert maps.scores(make(), "cross", direction="concept_to_image").name == "score_cross_concept_to_image"
    assert maps.saliency(make()).attrs["direction"] is None


def test_all_means_where_every_variable_was_recorded():
    ds = make()
    ds["o_x"].attrs.update(layers=[1, 3, 7], steps=[0, 2])
    ds["o_c"].attrs.update(layers=np.array([3, 4, 7]))
    got = maps.saliency(ds)
    assert got.attrs["layers"] == [3, 7]
    assert got.attrs["steps"] == [0, 2]
    with pytest.raises(MapError, match=r"layer 1, 4 was not recorded for o_x and o_c; there are: 3, 7\. .*layers="):
        maps.saliency(ds, layers=[1, 4])
    with pytest.raises(MapError, match=r"step 9 does not exist for o_x and o_c; there are: 0, 2"):
        maps.saliency(ds, steps=9)
    ds["o_c"].attrs["layers"] = [4]
    with pytest.raises(MapError, match="no layer to read for o_x and o_c: they were recorded at none in common"):
        maps.saliency(ds)


@pytest.mark.parametrize("layers", [[], [3, 3], "all", -1])
def test_selections_that_make_no_sense_are_refused(layers):
    with pytest.raises(MapError, match="layer"):
        maps.saliency(make(), layers=layers)


def test_messages_name_what_to_record():
    ds = make()[["o_x", "q_x"]]
    with pytest.raises(
        MapError,
        match=r"'o_x' and 'o_c', or 'score_output'; the dataset has o_x, q_x.*record=\('o_x', 'o_c'\), or scores=",
    ):
        maps.saliency(ds)
    with pytest.raises(MapError, match=r"'q_x_unrotated' and 'k_c_unrotated'; .*reduced in flight merge"):
        maps.saliency(in_flight(make()), "cross", rotary=False)
    with pytest.raises(MapError, match=r"'k_x' and 'q_c'; .*reduced in flight merge"):
        maps.saliency(in_flight(make()), "cross", direction="concept_to_image", heads="each")
    with pytest.raises(MapError, match="space='outputs' is none of"):
        maps.saliency(ds, "outputs")
    with pytest.raises(MapError, match="softmax='before' is none of"):
        maps.saliency(ds, softmax="before")
    with pytest.raises(MapError, match="direction='up' is none of"):
        maps.saliency(ds, direction="up")
    with pytest.raises(MapError, match=r"expected a trace \(an xarray.Dataset.*got DataArray"):
        maps.scores(ds["o_x"])
