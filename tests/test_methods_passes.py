"""One pass and many rows: what is shared, what is not, and what decides the maps."""

from __future__ import annotations

import numpy as np
import pytest

import dit_probe as dp
from dit_probe.datasets.segmentation import PictureBook, PictureBookClips
from dit_probe.errors import ProbeError, SiteError
from dit_probe.evaluation import evaluate
from dit_probe.methods import Passes, concept_attention
from dit_probe.protocols import EvaluationError

WORDS = ["sun", "sky", "grass"]
ROWS = [
    {},
    {"softmax": "after"},
    {"softmax": None},
    {"space": "value"},
    {"space": "value", "softmax": None},
    {"space": "cross"},
    {"space": "cross", "direction": "concept_to_image"},
    {"layers": [0]},
    {"layers": [1]},
    {"layers": [-1]},
]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def calls(pipelines):
    """The calls of the tiny Flux transformer, a list that grows."""
    made = []
    handle = pipelines("flux").transformer.register_forward_pre_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def test_ten_rows_cost_one_pass_a_picture(pipelines, calls):
    passes = Passes(pipelines("flux"), size=16)
    methods = {f"row {at}": passes.method(**row) for at, row in enumerate(ROWS)}
    found = evaluate(methods, PictureBook(3), progress=False)
    assert len(calls) == 3
    assert found.auroc.notnull().all()
    assert len({method.describe() for method in methods.values()}) == len(ROWS)


def test_a_row_is_what_a_pass_of_its_own_gives(pipelines):
    passes = Passes(pipelines("flux"), 300, 2, "image", size=16)
    for row in ROWS:
        alone = concept_attention(pipelines("flux"), timestep=300, seed=2, attends="image", size=16, **row)
        np.testing.assert_array_equal(passes.method(**row)([picture(0)], WORDS), alone([picture(0)], WORDS))
        assert passes.method(**row).describe() == alone.describe()


def test_passes_are_kept_by_content(pipelines, calls):
    method = Passes(pipelines("flux"), size=16).method()
    image = picture(0)
    first = method([image], WORDS)
    method([image.copy()], tuple(WORDS))
    assert len(calls) == 1
    image[:8] = 0  # the same array, another picture
    assert not np.allclose(method([image], WORDS), first)
    method([image], WORDS[::-1])
    assert len(calls) == 3


def test_several_seeds_are_averaged(pipelines, calls):
    one, two, both = (concept_attention(pipelines("flux"), size=16, seed=seed) for seed in (1, [2], range(1, 3)))
    maps = [method([picture(0), picture(1)], WORDS) for method in (one, two, both)]
    np.testing.assert_allclose(maps[2], (maps[0] + maps[1]) / 2, rtol=1e-6)
    assert not np.allclose(maps[0], maps[1])
    assert len(calls) == 8


@pytest.mark.parametrize("attends", ["image", "concepts", "none"])
def test_attends_is_the_probes(attends, pipelines):
    maps = concept_attention(pipelines("flux"), size=16, attends=attends)([picture(0)], WORDS)
    probe = dp.Probe(WORDS, record=["o_x", "o_c"], attends=attends)
    with dp.trace(pipelines("flux"), probe, progress=False) as run:
        dp.encode(pipelines("flux"), picture(0), "a sun")
    np.testing.assert_allclose(maps[0], dp.maps.saliency(run.dataset)[0], atol=1e-5)
    assert not np.allclose(maps, concept_attention(pipelines("flux"), size=16)([picture(0)], WORDS))


def test_in_pure_noise_there_is_no_picture(pipelines):
    for family in ("flux", "sd3"):
        method = concept_attention(pipelines(family), timestep=1000, size=16)
        maps = method([picture(0), picture(1)], WORDS)
        np.testing.assert_array_equal(maps[0], maps[1])
        assert float(maps.std()) > 0


def test_pure_noise_of_a_diffusion_model(pipelines):
    clips = [PictureBookClips(2)[at].image for at in (0, 1)]
    noisy, clear = (concept_attention(pipelines("cogvideox"), timestep=t)(clips, WORDS) for t in (1000, 0))
    assert noisy.sizes["frame"] == 9 and np.isfinite(noisy).all()
    # its last timestep keeps a trace of the video
    assert 0 < float(abs(noisy[0] - noisy[1]).max()) < float(abs(clear[0] - clear[1]).max())


def test_rows_of_a_video_share_a_pass_too(pipelines):
    calls = []
    handle = pipelines("cogvideox").transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    passes = Passes(pipelines("cogvideox"))
    shapes = {passes.method(space)([PictureBookClips(1)[0].image], WORDS).shape for space in ("output", "cross")}
    handle.remove()
    assert len(calls) == 1 and {shape[:3] for shape in shapes} == {(1, 3, 9)}


def test_wrong_use_is_said_before_anything_runs(pipelines, calls):
    with pytest.raises(SiteError, match="no layer 9 in FluxTransformer2DModel: joint layers are 0-2"):
        Passes(pipelines("flux")).method(layers=[9])
    with pytest.raises(ProbeError, match="attends='both of them'"):
        Passes(pipelines("flux"), attends="both of them")
    with pytest.raises(EvaluationError, match="needs one seed"):
        Passes(pipelines("flux"), seed=())
    with pytest.raises(EvaluationError, match="no concepts"):
        Passes(pipelines("flux")).method()([picture(0)], [])
    assert not calls
