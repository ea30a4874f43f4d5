"""The authors' choices against a slow version of them, written from stored vectors with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dit_probe as dp
from dit_probe.errors import SiteError
from dit_probe.methods import (
    REFERENCE_BACKGROUND,
    REFERENCE_VOC_BACKGROUND,
    ReferenceSettings,
    concept_attention,
    reference,
)
from dit_probe.protocols import EvaluationError, resize_image
from dit_probe.testing import attention_from_store, randomise, tiny_pipeline

WORDS, LENGTH = ["sun", "sky", "grass", "boat"], 16
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
PLAIN = {
    "layers": (0, 2),
    "normalise": False,
    "heads": "merged",
    "blur": None,
    "seeds": (3,),
    "pooled": "prompt",
    "prompt_pooled": "prompt",
    "size": 16,
    "max_sequence_length": LENGTH,
}
SWITCHES = [
    {"normalise": True},
    {"heads": "each"},
    {"softmax": None},
    {"blur": 1.0},
    {"seeds": (3, 8)},
    {"timestep": 200},
    {"pooled": "zero"},
    {"prompt_pooled": "zero"},
    {"layers": (1,)},
]


@pytest.fixture(scope="module")
def flux():
    pipe = tiny_pipeline("flux")
    randomise(pipe.transformer, 11)
    randomise(pipe.text_encoder, 12)
    return pipe


def slow(pipe, settings: ReferenceSettings) -> np.ndarray:
    """(concept, y, x), from vectors that an ordinary trace has stored."""
    names = {"output": ("o_x", "o_c"), "value": ("v_x", "v_c"), "cross": ("q_x_unrotated", "k_c_unrotated")}
    picture, maps = resize_image(IMAGE, settings.size or 16, "nearest"), []
    for seed in settings.seeds:
        probe = dp.Probe(WORDS, record=names[settings.space], pooled=settings.pooled)
        handle = pipe.transformer.register_forward_pre_hook(without_pooled, with_kwargs=True, prepend=True)
        if settings.prompt_pooled == "prompt":
            handle.remove()
        with dp.trace(pipe, probe, progress=False) as run:
            dp.encode(pipe, picture, "a sun", settings.timestep, seed, max_sequence_length=LENGTH)
        handle.remove()
        x, c = (run.dataset[name].values[0, 0].astype(np.float64) for name in names[settings.space])
        maps += [by_hand(x[layer], c[layer], settings) for layer in settings.layers]
    found = np.mean(maps, 0).reshape(len(WORDS), 4, 4)
    return found if settings.blur is None else blurred(found, settings.blur)


def without_pooled(module, args, kwargs):
    return args, {**kwargs, "pooled_projections": torch.zeros_like(kwargs["pooled_projections"])}


def by_hand(x: np.ndarray, c: np.ndarray, settings: ReferenceSettings) -> np.ndarray:
    """(concept, token) of one layer; x and c are (token, head, head_dim)."""
    if settings.normalise:
        c = c.copy()
        for head in range(c.shape[1]):
            for channel in range(c.shape[2]):
                values = c[:, head, channel] - c[:, head, channel].min()
                c[:, head, channel] = values / values.sum()
    heads = [slice(head, head + 1) for head in range(c.shape[1])] if settings.heads == "each" else [slice(None)]
    found = []
    for head in heads:
        scores = np.array([[float((x[i, head] * c[k, head]).sum()) for i in range(len(x))] for k in range(len(c))])
        if settings.space == "cross" and settings.heads == "merged":
            scores /= c.shape[1]
        if settings.softmax == "each":
            scores = np.exp(scores) / np.exp(scores).sum(0)
        found.append(scores)
    return np.mean(found, 0)


def blurred(maps: np.ndarray, sigma: float) -> np.ndarray:
    """Weights of a 3 x 3 neighbourhood, mirrored at the edge."""
    out, (_, height, width) = np.zeros_like(maps), maps.shape
    weights = {(dy, dx): np.exp(-(dy**2 + dx**2) / (2 * sigma**2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    for y in range(height):
        for x in range(width):
            for (dy, dx), weight in weights.items():
                v, u = abs(y + dy), abs(x + dx)
                v, u = 2 * (height - 1) - v if v >= height else v, 2 * (width - 1) - u if u >= width else u
                out[:, y, x] += weight / sum(weights.values()) * maps[:, v, u]
    return out


def maps_of(pipe, space: str, **settings) -> tuple[np.ndarray, ReferenceSettings]:
    method = reference(pipe, space, **settings)
    found = method([IMAGE], WORDS)
    assert found.dims == ("image", "concept", "y", "x") and found.concept.values.tolist() == WORDS
    return found[0].values, method.settings


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_each_choice_alone(flux, switch):
    before, _ = maps_of(flux, "output", **PLAIN)
    found, settings = maps_of(flux, "output", **PLAIN | switch)
    np.testing.assert_allclose(found, slow(flux, settings), rtol=2e-4, atol=1e-5)
    assert abs(found - before).max() > 1e-4


@pytest.mark.parametrize("space", ["output", "value", "cross"])
def test_all_choices_together(flux, space):
    found, settings = maps_of(flux, space, size=16, max_sequence_length=LENGTH, layers=(1, -1))
    assert settings.normalise == (space != "cross") and settings.heads == ("merged" if space == "output" else "each")
    assert len(settings.seeds) == 5 and settings.layers == (1, 2) and settings.timestep == 500
    np.testing.assert_allclose(found, slow(flux, settings), rtol=2e-4, atol=1e-5)


def test_without_the_choices_it_is_the_papers_method(flux):
    plain, _ = maps_of(flux, "output", **PLAIN)
    paper = concept_attention(flux, layers=(0, 2), seed=3, size=16, max_sequence_length=LENGTH)
    np.testing.assert_allclose(plain, paper([resize_image(IMAGE, 16, "nearest")], WORDS)[0], rtol=1e-4)


@pytest.fixture(scope="module")
def sd3():
    pipe = tiny_pipeline("sd3", "sd3")
    randomise(pipe.transformer, 13)
    return pipe


def test_stable_diffusion_has_choices_of_its_own(sd3):
    found, settings = maps_of(sd3, "output", size=16, max_sequence_length=LENGTH)
    assert settings.layers == (0, 1, 2) and settings.timestep == 602 and settings.pooled == "prompt"
    with torch.no_grad():
        text = sd3.encode_prompt(
            " ".join(WORDS), None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    embeddings = text[0][0, : 1 + len(WORDS)]
    probe = dp.Probe(["first", *WORDS], record=["q_x", "k_x", "v_x", "k_c", "v_c", "o_c", "o_x"])
    picture = resize_image(IMAGE, 16, "lanczos")
    with dp.trace(sd3, probe, concepts=embeddings, progress=False) as run:
        dp.encode(sd3, picture, "a sun", 602, 0, max_sequence_length=LENGTH)
    q, k, v, k_c, v_c, o_c, o_x = (run.dataset[name].values[0, 0] for name in probe.record)
    image = attention_from_store(q, np.concatenate([k, k_c], 1), np.concatenate([v, v_c], 1))
    assert abs(image - o_x).max() > 0.01  # not what the image reads beside the prompt
    expected = np.mean([by_hand(image[at], o_c[at, 1:].astype(np.float64), settings) for at in settings.layers], 0)
    np.testing.assert_allclose(found, expected.reshape(len(WORDS), 4, 4), rtol=2e-4, atol=1e-5)
    turned = reference(sd3, size=16, max_sequence_length=LENGTH)([IMAGE], WORDS[::-1])[0, ::-1]
    assert abs(found - turned.values).max() > 1e-4  # concepts depend on their order


@pytest.mark.parametrize(("depth", "layers"), [(19, (14, 15, 16, 17)), (6, (4, 5)), (3, (2,)), (38, (29, 31, 33, 35))])
def test_layers_of_another_depth(depth, layers):
    from diffusers import FluxTransformer2DModel

    pipe = tiny_pipeline("flux")
    pipe.transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": depth})
    method = reference(pipe)
    assert method.settings.layers == layers
    assert f'"layers": {list(layers)}' in method.describe()


def test_what_decides_the_maps_is_described(flux):
    methods = [reference(flux, **{**PLAIN, **switch}) for switch in ({}, *SWITCHES)]
    assert len({method.describe() for method in methods}) == len(methods)
    assert len({reference(flux, space).describe() for space in ("output", "value", "cross")}) == 3
    assert REFERENCE_BACKGROUND == ("background", "floor", "tree", "person", "grass", "face")
    assert REFERENCE_VOC_BACKGROUND == ("background", "floor", "grass", "tree", "sky")
    assert [reference(tiny_pipeline("flux", v)).settings.max_sequence_length for v in ("schnell", "dev")] == [256, 512]


def test_wrong_use(flux, sd3, pipelines):
    with pytest.raises(EvaluationError, match="of CogVideoXPipeline: the authors evaluated Flux.1"):
        reference(pipelines("cogvideox"))
    with pytest.raises(EvaluationError, match="space='value' of StableDiffusion3Pipeline"):
        reference(sd3, "value")
    with pytest.raises(EvaluationError, match="softmax='after'; choose one of 'each', None"):
        reference(flux, softmax="after")
    with pytest.raises(EvaluationError, match="space='outputs'; choose one of 'output', 'value', 'cross'"):
        reference(flux, "outputs")
    with pytest.raises(EvaluationError, match="no CLIP tokens"):
        reference(flux, embed="clip")
    with pytest.raises(EvaluationError, match="needs one seed"):
        reference(flux, seeds=())
    with pytest.raises(SiteError, match="no layer 14"):
        reference(flux, layers=range(14, 18))
    with pytest.raises(EvaluationError, match="no concepts"):
        reference(flux)([IMAGE], [])
