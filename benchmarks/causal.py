"""Do edits under a noun's map, and along its direction, change that noun and spare the rest?

    python benchmarks/causal.py sd35-picturebook

Held-out scenes of two objects, each noun in turn; the scene is the unit, its two nouns are averaged, and intervals are
95 % bootstraps over scenes. Rerunning goes on where it stopped.

* **denoising**: real scenes with exact masks, noised at timestep 500. What the noun is worth is the loss with it in the
  caption less the loss without it (`causal.denoising_gap`): below 0 where it helps. The 16 of 256 tokens that its map
  (image-to-concept attention, all layers) has highest are ablated, or 16 random ones, or the same shape elsewhere.
  Regions: the noun's own pixels, those of the other object, the rest.
* **generated**: the caption's picture, once and with those tokens ablated in every step of the conditional branch; mean
  absolute change of the pixels (0 to 1) inside and outside of the map's 16 highest tokens; maps are the run's own.
* **away**: the whole caption, all image tokens steered away from the noun's direction (`edits.direction_of` on other
  scenes) by a quarter of their length, or away from a random direction: the loss less that without steering. Above 0
  where the noun is harmed. Both of values, v_c in v_x, and of outputs, o_c in o_x.
* **worth**: under the same edits, what the noun is worth on its own pixels, and the other noun on its own.
* **towards**: the caption without the noun, steered towards it: the loss less that without steering. Below 0 where the
  direction does what the word does.

An ablation cuts tokens off from the prompt in all layers (`causal.cut_from_prompt`). The ablation, and the site and
strength of steering, were chosen on four other scenes.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

import dit_probe as dp
from dit_probe import anatomy, causal
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, Scene, describe, scenes
from dit_probe.report import Section, page
from dit_probe.statistics import bootstrap
from dit_probe.summary import markdown
from probes import ConceptAttention

REPORTED, CHOOSING = 7, 8
"""Families of seeds; training has 0."""
TOKENS, DRAWS = 16, 1
STRENGTH = 0.25
STREAMS = {"v": ("v_c", "v_x"), "o": ("o_c", "o_x")}
"""Steering: where a direction is read and where it is added."""
TEXT = {"max_sequence_length": 32}
CALL = {"num_inference_steps": 8, "guidance_scale": 3.0, **TEXT}
WORDS = [*NOUNS, *BACKGROUNDS]
REGIONS = ("own", "other", "rest")


def pairs(group: Sequence[Scene]) -> list[tuple[Scene, str, str]]:
    """Every scene twice: with each noun as the one that is meant."""
    named = [(scene, *scene.masks) for scene in group]
    return [(scene, *pair) for scene, one, other in named for pair in ((one, other), (other, one))]


def sentence(scene: Scene, *nouns: str) -> str:
    """A caption with only these nouns."""
    kept = tuple(thing for thing in scene.objects if thing.noun in nouns)
    return describe(replace(scene, objects=kept), seed=0, style="sentence")


def regions(values: xr.DataArray, samples: Sequence[tuple[Scene, str, str]]) -> xr.DataArray:
    """Means over the noun's own pixels, the other's, and the rest: (region, …, scene)."""
    own, other = (np.stack([scene.masks[nouns[at]] for scene, *nouns in samples]) for at in (0, 1))
    masks = xr.DataArray(np.stack([own, other, ~(own | other)]), dims=("which", "sample", "y", "x"))
    found = causal.by_region(values, masks).sel(region="inside", drop=True).rename(which="region")
    return by_scene(found.assign_coords(region=list(REGIONS)))


def by_scene(values: xr.DataArray) -> xr.DataArray:
    """Mean over draws and over the two nouns of a scene."""
    values = values.mean("draw") if "draw" in values.dims else values
    return values.coarsen(sample=2).mean()


class Model:
    """A pipeline, with its embedded words and their directions."""

    def __init__(self, name: str) -> None:
        self.pipe = dp.demo.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            embedded = anatomy.find(self.pipe).encode_text(self.pipe, WORDS, TEXT["max_sequence_length"])[:, 0]
        self.embedded = dict(zip(WORDS, embedded, strict=True))
        chosen = list(scenes(16, seed=CHOOSING, objects=2))
        with dp.trace(self.pipe, dp.Probe(WORDS, record=["v_c", "o_c"]), progress=False) as run:
            self.encode(chosen)
        found = run.dataset.load()
        self.directions = {
            name: {noun: dp.edits.direction_of(found, noun, site) for noun in NOUNS}
            for name, (site, _) in STREAMS.items()
        }

    def encode(self, group: Sequence[Scene]) -> None:
        captions = [sentence(scene, *scene.masks) for scene in group]
        dp.encode(self.pipe, [scene.image for scene in group], captions, **TEXT)

    def maps(self, group: Sequence[Scene], generate: Any = None) -> xr.DataArray:
        """(sample, y, x), samples as in `pairs`, of the scenes themselves or of what is generated."""
        concepts = torch.stack([torch.stack([self.embedded[word] for word in scene.words]) for scene in group])
        probe = ConceptAttention([f"word {k}" for k in range(3)], record=(), scores=("cross",))
        with dp.trace(self.pipe, probe, concepts=concepts, progress=False) as run:
            if generate is None:
                self.encode(group)
            else:
                generate()
        both = dp.maps.saliency(run.dataset.load(), space="cross").isel(concept=[0, 1])
        both = both.drop_vars([*both.coords]).transpose("sample", "concept", "y", "x")
        return xr.DataArray(both.values.reshape(-1, *both.shape[2:]), dims=("sample", "y", "x"))

    def denoising(self, group: Sequence[Scene]) -> dict[str, Any]:
        samples = pairs(group)
        effect = partial(
            causal.denoising_gap,
            self.pipe,
            [scene.image for scene, _, _ in samples],
            [sentence(scene, *scene.masks) for scene, _, _ in samples],
            [sentence(scene, other) for scene, _, other in samples],
            **TEXT,
        )
        found = causal.ablation(effect, self.maps(group), TOKENS, draws=DRAWS, seed=group[0].seed)
        return {name: regions(found[name], samples) for name in ("none", "top", "random", "moved")}

    def generated(self, group: Sequence[Scene]) -> dict[str, Any]:
        captions, seeds = [sentence(scene, *scene.masks) for scene in group], [scene.seed for scene in group]

        def generate() -> None:
            self.pipe(captions, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **CALL)

        maps = self.maps(group, generate)
        twice = [caption for caption in captions for _ in range(2)]
        measure = causal.change(self.pipe, twice, seeds=[seed for seed in seeds for _ in range(2)], **CALL)
        found = causal.ablation(measure, maps, TOKENS, draws=DRAWS, seed=group[0].seed)
        changed = causal.by_region(found, found.tokens)
        return {name: by_scene(changed[name]) for name in ("top", "random", "moved")}

    def steering(self, group: Sequence[Scene]) -> dict[str, Any]:
        samples, random = pairs(group), np.random.default_rng(group[0].seed)
        images, both = (
            list(column) for column in zip(*((s.image, sentence(s, *s.masks)) for s, _, _ in samples), strict=True)
        )
        captions = {"both": both}
        captions |= {
            f"without {name}": [sentence(s, pair[1 - at]) for s, *pair in samples]
            for at, name in enumerate(REGIONS[:2])
        }
        directions: dict[tuple[str, str], list[xr.DataArray]] = {}
        for name, of in self.directions.items():
            nouns = [of[noun] for _, noun, _ in samples]
            directions[name, "noun"] = nouns
            directions[name, "random"] = [d.copy(data=random.standard_normal(d.shape)) for d in nouns]

        def steered(strength: float, *which: str) -> dict[str, dict[str, xr.DataArray]]:
            """Losses by what was added and by caption."""
            edits: dict[str, list[dp.Edit]] = {"none": []}
            for (name, kind), chosen in directions.items():
                rows = [dp.edits.steer(d, STREAMS[name][1], strength) for d in chosen]
                edits[f"{name} {kind}"] = [dp.edits.by_row(rows)]
            loss = partial(causal.denoising_loss, self.pipe, images, **TEXT)
            return {
                name: {caption: regions(loss(captions[caption], edits=made), samples) for caption in which}
                for name, made in edits.items()
            }

        found: dict[str, Any] = {}
        away = steered(-STRENGTH, *captions)
        towards = steered(STRENGTH, "without own")
        for name, losses in away.items():
            worth = [(losses["both"] - losses[f"without {place}"]).sel(region=place) for place in REGIONS[:2]]
            found[f"worth, {name}"] = xr.concat(worth, "region")
            if name != "none":
                found[f"away, {name}"] = losses["both"] - away["none"]["both"]
                found[f"towards, {name}"] = towards[name]["without own"] - towards["none"]["without own"]
        return found

    def measure(self, group: Sequence[Scene]) -> list[dict[str, float]]:
        """One dict of numbers a scene."""
        parts = {
            "denoising": self.denoising(group),
            "generated": self.generated(group),
            "steering": self.steering(group),
        }
        rows: list[dict[str, float]] = [{} for _ in group]
        for part, found in parts.items():
            for name, values in found.items():
                for region in values.region.values:
                    for row, value in zip(rows, values.sel(region=region).values, strict=True):
                        row[f"{part}, {name}, {region}"] = round(float(value), 6)
        return rows


def shown(values: np.ndarray) -> str:
    found = bootstrap(values)
    return f"{float(found['mean']):.3f} [{float(found.low):.3f}, {float(found.high):.3f}]"


def tables(rows: Sequence[dict[str, float]]) -> dict[str, str]:
    """A table for each part: what was edited down, regions across; and paired differences below."""

    def column(part: str, name: str, region: str) -> np.ndarray:
        return np.array([row[f"{part}, {name}, {region}"] for row in rows])

    def table(
        part: str, head: str, names: dict[str, str], places: Sequence[str], less: Sequence[tuple[str, str]]
    ) -> str:
        lines = [[head, *places]]
        lines += [[words, *(shown(column(part, name, place)) for place in places)] for name, words in names.items()]
        for one, two in less:
            differences = (column(part, one, place) - column(part, two, place) for place in places)
            lines.append([f"{names[one]} less {names[two]}", *map(shown, differences)])
        return markdown(lines)

    ablated = {"top": "map's tokens", "random": "random tokens", "moved": "same shape elsewhere"}
    controls = [("top", "random"), ("top", "moved")]
    said = {"v noun": "v_c", "v random": "random, v", "o noun": "o_c", "o random": "random, o"}
    both = [("v noun", "v random"), ("o noun", "o random")]
    return {
        "denoising": table(
            "denoising", "worth of the noun; ablated", {"none": "nothing", **ablated}, REGIONS,
            [("top", "none"), ("random", "none"), ("moved", "none"), *controls],
        ),
        "generated": table("generated", "change; ablated", ablated, ("inside", "outside"), controls),
        "worth": table(
            "steering", "worth of a noun on its pixels; away from",
            {"worth, none": "nothing"} | {f"worth, {name}": words for name, words in said.items()}, REGIONS[:2],
            [(f"worth, {one}", "worth, none") for one in said] + [(f"worth, {a}", f"worth, {b}") for a, b in both],
        ),
        **{
            sign: table(
                "steering", f"loss less that without steering; {sign}",
                {f"{sign}, {name}": words for name, words in said.items()}, REGIONS,
                [(f"{sign}, {a}", f"{sign}, {b}") for a, b in both],
            )
            for sign in ("away", "towards")
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a demo model of images")
    parser.add_argument("--count", type=int, default=100, help="held-out scenes")
    parser.add_argument("--batch", type=int, default=4, help="scenes side by side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/causal"), help="folder of the results")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.model}.json"
    settings = {"model": options.model, "seeds of": REPORTED, "tokens": TOKENS, "draws": DRAWS}
    settings |= {
        "strength": STRENGTH,
        "steps": CALL["num_inference_steps"],
        "guidance": CALL["guidance_scale"],
        "batch": options.batch,
    }
    results = json.loads(file.read_text()) if file.exists() else {"settings": settings, "scenes": []}
    if results["settings"] != settings:
        raise SystemExit(
            f"{file} was made with {results['settings']}, not {settings}: remove it, or choose another --out"
        )
    rows = results["scenes"]
    left = list(scenes(options.count, seed=REPORTED, objects=2))[len(rows) :]
    if left:
        model = Model(options.model)
        for start in tqdm(range(0, len(left), options.batch), total=math.ceil(len(left) / options.batch)):
            rows += model.measure(left[start : start + options.batch])
            part = file.with_suffix(".part")
            part.write_text(json.dumps(results, indent=0) + "\n")
            part.replace(file)
    found = tables(rows)
    measured = "\n\n".join((__doc__ or "").split("\n\n")[2:])
    sections = [Section("What is measured", code=measured)]
    sections += [Section(name.capitalize(), code=text) for name, text in found.items()]
    facts = {**settings, "scenes measured": len(rows)}
    (options.out / f"{options.model}.html").write_text(
        page(f"Edits under the maps of {options.model}", sections, facts=facts)
    )
    print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
