"""DAAM and OVAM against a second writing in loops, and what each of them promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import dit_probe as dp
from dit_probe.errors import ConceptError, TraceError
from dit_probe.testing import leftovers
from probes.baselines.daam import DAAM
from probes.baselines.ovam import OVAM
from probes.baselines.tiny_unet import tiny_pipeline
from probes.baselines.unet import UNet

KINDS = ("sd", "sdxl")
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8)
HEADS = {"sd": [2, 4, 4, 4, 2, 2], "sdxl": [2, 4, 4, 4, 4, 4, 4, 2, 2]}  # in the order of the layers


@pytest.fixture(scope="module")
def unets():
    return {kind: UNet(tiny_pipeline(kind)) for kind in KINDS}


@pytest.fixture
def count():
    """Counts calls of modules: ``count(module)`` is a list that grows."""
    handles = []

    def counter(*modules):
        made = []
        handles.extend(module.register_forward_hook(lambda *_: made.append(1)) for module in modules)
        return made

    yield counter
    for handle in handles:
        handle.remove()


def plain_pass(unet: UNet, prompt: str, t: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Queries and keys (token, head, head_dim) of a pass that the pipeline's own parts make, by layer."""
    pipe, found, handles = unet.pipe, {}, []
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2") and not name.startswith("mid_block"):
            for part in ("q", "k"):

                def keep(m, args, out, name=name, part=part, heads=module.heads):
                    found.setdefault(name, {})[part] = out[0].double().numpy().reshape(out.shape[1], heads, -1)

                handles.append(getattr(module, f"to_{part}").register_forward_hook(keep))
    with torch.no_grad():
        pixels = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(unet.seed))
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        noised = scheduler.scale_model_input(scheduler.add_noise(latents, noise, torch.tensor([t])), torch.tensor(t))
        states, _, *pooled = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {"text_embeds": pooled[0], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])} if pooled else None
        pipe.unet(noised, t, states, added_cond_kwargs=added)
    for handle in handles:
        handle.remove()
    return {name: (parts["q"], parts["k"]) for name, parts in found.items()}


def cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def linear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def matrix(small: int, large: int, kernel) -> np.ndarray:
    """Interpolation along one axis, pixel centres aligned, edges repeated."""
    found = np.zeros((large, small))
    for i in range(large):
        centre = (i + 0.5) * small / large - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            found[i, min(max(j, 0), small - 1)] += kernel(centre - j)
    return found


def slowly(q: np.ndarray, k: np.ndarray, places, kernel, side: int = 8) -> np.ndarray:
    """Maps (head, y, x) of a word, one head, query and token after the other."""
    small, heads = int(len(q) ** 0.5), q.shape[1]
    found = np.zeros((heads, side, side))
    for head in range(heads):
        chances = np.zeros((len(q), len(k)))
        for i in range(len(q)):
            logits = [q[i, head] @ k[j, head] / q.shape[2] ** 0.5 for j in range(len(k))]
            chances[i] = np.exp(np.array(logits) - max(logits))
            chances[i] /= chances[i].sum()
        for place in places:
            resize = matrix(small, side, kernel)
            large = resize @ chances[:, place].reshape(small, small) @ resize.T
            found[head] += np.maximum(large, 0) / len(places)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_daam_is_the_loop_over_heads_queries_and_tokens(kind, unets):
    daam = DAAM(unets[kind], timesteps=(400,))
    concepts = ["sun", "zoo", "sky"]
    prompt = "a sun, a zoo, a sky"
    tokens = ["a</w>", "sun</w>", ",</w>", "a</w>", "z", "o", "o</w>", ",</w>", "a</w>", "sky</w>"]
    assert daam.prompt(concepts) == prompt and unets[kind].pipe.tokenizer.tokenize(prompt) == tokens
    found = daam.scores([PICTURE], concepts)
    expected = plain_pass(unets[kind], prompt, 400)
    assert list(dict.fromkeys(found.layer.values)) == list(expected)
    for layer, (q, k) in expected.items():
        for concept, places in {"sun": (2,), "zoo": (5, 6, 7), "sky": (10,)}.items():
            maps = found.sel(layer=layer, concept=concept).isel(image=0, timestep=0)
            np.testing.assert_allclose(maps, slowly(q, k, places, cubic), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ovam_is_the_loop_with_late_keys(kind, unets):
    ovam = OVAM(unets[kind], timesteps=(400,), prompt="water")
    pipe, concept = unets[kind].pipe, "zoo"
    found = ovam.scores([PICTURE], [concept])
    # Keys of the text alone: those of a pass that is told it, without its padding.
    text = "a photograph of a zoo"
    length = len(pipe.tokenizer(text).input_ids)
    keys = {layer: k[:length] for layer, (_, k) in plain_pass(unets[kind], text, 400).items()}
    for layer, (q, _) in plain_pass(unets[kind], "water", 400).items():
        maps = found.sel(layer=layer, concept=concept).isel(image=0, timestep=0)
        places = range(length - 4, length - 1)
        np.testing.assert_allclose(maps, slowly(q, keys[layer], places, linear), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ovam_of_the_prompt_itself_is_daam(kind):
    # The text fills all of the encoder's length, so that there is no padding in which they could differ.
    unet = UNet(tiny_pipeline(kind, length=4), factors=(1,))  # where nothing is resized
    daam = DAAM(unet, form="a {}").scores([PICTURE], ["sun"])
    ovam = OVAM(unet, prompt="a sun", text="a {}").scores([PICTURE], ["sun"])
    assert float(daam.std()) > 0
    np.testing.assert_allclose(ovam, daam, rtol=1e-5)
    other = OVAM(unet, prompt="a sky", text="a {}").scores([PICTURE], ["sun"])
    assert float(abs(other - daam).max()) > 1e-3 * float(daam.max())


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_of_one_row_are_kept(kind, unets):
    for method in (DAAM, OVAM):
        found = method(unets[kind], timesteps=(500,)).scores([PICTURE], ["sun"])
        per_layer = [found.sel(layer=name).sizes["head"] for name in unets[kind].layers]
        assert per_layer == HEADS[kind] == [module.heads for module in unets[kind].layers.values()]
        assert float(found.std(("y", "x")).min()) > 0  # none of them is empty
        assert leftovers(unets[kind].pipe.unet) == []


def test_a_map_is_the_mean_over_timesteps_and_all_heads(unets):
    images, concepts = [PICTURE, OTHER], ["sun", "sky"]
    for method in (DAAM, OVAM):
        both = method(unets["sd"], timesteps=(200, 700))
        found = both.scores(images, concepts)
        assert found.dims == ("image", "concept", "timestep", "layer_head", "y", "x") and found.dtype == np.float32
        assert found.timestep.values.tolist() == [200, 700] and both.forwards == 2
        np.testing.assert_allclose(both(images, concepts), found.mean(("timestep", "layer_head")), rtol=1e-5)
        late = method(unets["sd"], timesteps=(700,)).scores([OTHER], concepts)
        np.testing.assert_allclose(found.isel(image=[1], timestep=[1]), late, rtol=1e-5)
        assert not np.allclose(found.isel(timestep=0), found.isel(timestep=1))
    assert DAAM(unets["sd"]).timesteps == OVAM(unets["sd"]).timesteps == (100, 300, 500, 700, 900)


def test_the_mean_is_ovams_sum_but_for_a_factor(unets):
    ovam = OVAM(unets["sdxl"], timesteps=(200, 700))
    found = ovam.scores([PICTURE], ["sun", "sky"])
    layers = [found.sel(layer=name).sum(("head", "timestep")) for name in unets["sdxl"].layers]
    summed, mean = np.mean(layers, axis=0), ovam([PICTURE], ["sun", "sky"]).values
    np.testing.assert_allclose(summed / summed.max(), mean / mean.max(), rtol=1e-5)


def test_new_words_of_ovam_cost_keys_and_no_pass(unets, count):
    ovam = OVAM(unets["sdxl"], timesteps=(300, 600))
    layers = unets["sdxl"].layers
    passes, keys = count(unets["sdxl"].pipe.unet), count(*(layer.to_k for layer in layers.values()))
    first = ovam.scores([PICTURE], ["sun"])
    assert len(passes) == 2
    keys.clear()
    again = ovam.scores([PICTURE.copy()], ["sun", "boat"])
    assert len(passes) == 2
    assert len(keys) == 2 * 2 * len(layers)  # words x timesteps
    np.testing.assert_array_equal(again.sel(concept=["sun"]), first)
    ovam.scores([OTHER], ["sun"])
    ovam.scores([PICTURE], ["sun"])
    assert len(passes) == 6  # one picture is kept


def test_ovams_words_do_not_compete_and_daams_do(unets):
    for method, alone in ((OVAM, True), (DAAM, False)):
        one, two = (method(unets["sd"])([PICTURE], words).sel(concept="sun") for words in (["sun"], ["sun", "sky"]))
        assert np.allclose(one, two, rtol=1e-5) == alone


def test_daam_makes_one_pass_a_timestep(unets, count):
    passes = count(unets["sd"].pipe.unet)
    DAAM(unets["sd"], timesteps=(100, 500, 900))([PICTURE], ["sun", "sky"])
    assert len(passes) == 3


def test_wrong_use_is_said_before_anything_runs(unets, count):
    calls = count(unets["sd"].pipe.vae.encoder, unets["sd"].pipe.unet)
    daam, ovam = DAAM(unets["sd"]), OVAM(unets["sd"])
    with pytest.raises(ConceptError, match="'sun,sky'.*is not in"):
        DAAM(unets["sd"], form="a sun").scores([PICTURE], ["sun,sky"])
    with pytest.raises(ConceptError, match="cut at 77"):
        daam([PICTURE], ["zoozoozoozoozoo" + "z" * n for n in range(12)])
    for method in (daam, ovam):
        with pytest.raises(ConceptError, match=r"concepts=\[\]"):
            method([PICTURE], [])
        with pytest.raises(ConceptError, match="concepts='sun'"):
            method([PICTURE], "sun")
        with pytest.raises(TraceError, match="one picture or more"):
            method([], ["sun"])
        with pytest.raises(TraceError, match=r"found float64 \(16, 16, 3\), expected a picture"):
            method([PICTURE / 255], ["sun"])
        with pytest.raises(TraceError, match="found uint8 .5, 16, 16, 3."):
            method([np.stack([PICTURE] * 5)], ["sun"])
    with pytest.raises(TraceError, match="timesteps=.1001,."):
        DAAM(unets["sd"], timesteps=(1001,))
    with pytest.raises(TraceError, match="timesteps=.."):
        OVAM(unets["sd"], timesteps=())
    assert not calls


def test_methods_say_all_that_decides_their_maps(unets):
    sd, twin = unets["sd"], UNet(unets["sd"].pipe, size=32)
    said = [
        method.describe()
        for method in (
            DAAM(sd),
            DAAM(twin),
            DAAM(sd, timesteps=(500,)),
            DAAM(sd, form="{}"),
            DAAM(sd, separator=" and "),
            DAAM(UNet(sd.pipe, seed=1)),
            DAAM(UNet(sd.pipe, factors=(1,))),
            DAAM(unets["sdxl"]),
            OVAM(sd),
            OVAM(sd, prompt="a photo"),
            OVAM(sd, text="{}"),
        )
    ]
    assert len(set(said)) == len(said)
    ovam = OVAM(sd)
    before = ovam.describe()
    found = ovam.scores([PICTURE], ["sun"])
    assert ovam.describe() == before
    settings = json.loads(before.removeprefix("OVAM(").removesuffix(")"))
    assert settings["timesteps"] == [100, 300, 500, 700, 900] and "_kept" not in settings
    assert found.attrs["size"] == 16 and found.attrs["weights"] == settings["weights"]
    assert (ovam.architecture, ovam.kind, ovam.class_agnostic) == ("SD1 UNet", "probability", False)


def test_they_are_evaluated_like_any_other_method(unets):
    from dit_probe.datasets.segmentation import PictureBook

    methods = {"daam": DAAM(unets["sd"], timesteps=(500,)), "ovam": OVAM(unets["sdxl"], timesteps=(500,))}
    found = dp.evaluate(methods, PictureBook(2), progress=False)
    assert found.failed.values.tolist() == [["", ""], ["", ""]] and found.auroc.notnull().all()
