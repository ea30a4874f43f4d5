"""Do the maps of a demo model fall on the objects? Held-out scenes, a random-weight twin, trivial maps, intervals.

    python benchmarks/demo_quality.py sd35-picturebook

Scenes (or clips) come from seeds that training never saw; about one in five has two words that no training sample had
together. Each is encoded through the autoencoder, noised at a timestep and passed through the transformer once, with
its nouns and its background word as concepts. Four numbers an image, chance in brackets:

* **auroc** (0.5) and **ap** (the object's share of the picture): how well a noun's map tells its object's pixels from
  all others, mean over the nouns. A pixel has the value of its token; masks stay exact.
* **right_of_two** (0.5), pictures of two nouns: at a pixel of one object, is its own map higher than the other's?
* **miou**: argmax over the nouns and the background word against who owns the pixel, mean over those words.

The image is the unit; intervals are 95 % percentile bootstraps over images. The twin has the same architecture and
autoencoder and fresh weights elsewhere. The chosen layer is the one with the highest auroc on another hundred
pictures, never on those that are reported. Of clips, the ``still`` maps are means over frames: what a map that does not
follow the motion would get.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr
from tqdm import tqdm

import dit_probe as dp
from dit_probe import anatomy, metrics
from dit_probe.datasets.clips import Clip, clips
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, Scene, scenes
from dit_probe.demo.examples import held_out
from dit_probe.methods import random_twin
from dit_probe.panels import Sheet
from dit_probe.report import Section, page
from dit_probe.statistics import bootstrap
from dit_probe.summary import markdown
from probes import ConceptAttention

REPORTED, CHOOSING = 7, 8
"""Families of seeds; training has 0."""
TIMESTEPS, MAIN = (100, 300, 500, 700, 900), 500
SPACES: dict[str, dict[str, Any]] = {
    "output": {"space": "output"},
    "image to concept": {"space": "cross", "direction": "image_to_concept"},
    "concept to image": {"space": "cross", "direction": "concept_to_image"},
    "value": {"space": "value"},
}
SOFTMAX: tuple[Literal["each"] | None, ...] = ("each", None)
ATTENDS = {
    "both": "cross- and self-attention",
    "image": "cross-attention",
    "concepts": "self-attention",
    "none": "none",
}
"""What concepts attend to: the rows of Table 5."""
LENGTH = 32
"""T5 tokens of prompts and concepts."""
SEEN = {"auroc": (0.3, 1), "ap": (0, 1), "right_of_two": (0.3, 1), "miou": (0, 1)}
COLOURS = ("#21918c", "#440154", "#e07b39", "#8a8a8a")

Picture = Scene | Clip


def joined(parts: Iterable[xr.DataArray], dim: str | xr.Variable) -> xr.DataArray:
    """Stack arrays; the stubs of `xarray.concat` know datasets only."""
    stacked: Any = xr.concat(list(parts), dim, coords="minimal", compat="override")
    return stacked


def groups(pictures: Sequence[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures with equally many concepts, at most `size` together."""
    sorted_by: dict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        sorted_by[len(picture.words)].append(picture)
    for count in sorted(sorted_by):
        for start in range(0, len(sorted_by[count]), size):
            yield sorted_by[count][start : start + size]


def truth(group: Sequence[Picture]) -> xr.DataArray:
    """(sample, concept, [frame,] y, x): who owns a pixel; the last concept is the background."""
    masks = np.stack([np.stack([*picture.masks.values(), picture.background_mask]) for picture in group])
    return xr.DataArray(
        masks, dims=("sample", "concept", "frame", "y", "x")[:2] + ("frame", "y", "x")[5 - masks.ndim :]
    )


def score(maps: xr.DataArray, group: Sequence[Picture]) -> xr.DataArray:
    """(metric, sample, …) of maps (sample, …, concept, [frame,] y, x), concepts as in `truth`."""
    masks = truth(group)
    if "frame" in maps.dims:
        # the causal autoencoder: the first frame has a latent of its own, then as many frames as fit share one
        share = (masks.sizes["frame"] - 1) // (maps.sizes["frame"] - 1)
        maps = maps.isel(frame=[0, *(1 + frame // share for frame in range(masks.sizes["frame"] - 1))])
    nouns = {"concept": slice(0, -1)}
    ranked = metrics.score(maps.isel(nouns), masks.isel(nouns), metrics=("auroc", "ap")).mean("concept")
    found = {
        "auroc": ranked["auroc"],
        "ap": ranked["ap"],
        "right_of_two": metrics.right_of_two(maps.isel(nouns), masks.isel(nouns)),
        "miou": metrics.argmax_iou(maps, masks).mean("concept"),
    }
    return joined(found.values(), xr.Variable("metric", list(found)))


def still(maps: xr.DataArray) -> xr.DataArray:
    """What a map would be that does not follow the motion."""
    return maps.mean("frame").expand_dims(frame=maps.sizes["frame"])


def layers(maps: xr.DataArray) -> xr.DataArray:
    """Every layer's map and, under the label "mean", the mean of all."""
    names = [str(layer) for layer in maps.layer.values]
    bare = maps.drop_vars(list(maps.coords))
    each = bare.assign_coords(layer=names)
    return joined([each, bare.mean("layer").expand_dims(layer=["mean"])], "layer")


def measure(
    pipe: Any, pictures: Sequence[Picture], timestep: int, *, attends: str = "both", batch: int = 25
) -> xr.DataArray:
    """Score every space, softmax and layer: (metric, sample, layer, map, softmax), samples in the order of `groups`."""
    words = [*NOUNS, *BACKGROUNDS]
    with torch.no_grad():
        first = anatomy.find(pipe).encode_text(pipe, words, LENGTH)[:, 0]
    embedded = dict(zip(words, first, strict=True))
    parts = []
    for group in groups(pictures, batch):
        # every picture has its own concepts: the embeddings say which, the names only count them
        concepts = torch.stack([torch.stack([embedded[word] for word in picture.words]) for picture in group])
        probe = ConceptAttention([f"word {k}" for k in range(concepts.shape[1])], attends=attends)
        pixels = [list(p.frames) if isinstance(p, Clip) else p.image for p in group]
        with dp.trace(pipe, probe, concepts=concepts, progress=False) as run:
            dp.encode(pipe, pixels, [p.caption for p in group], timestep=timestep, max_sequence_length=LENGTH)
        found, rows = run.dataset.load(), []
        for space in SPACES.values():
            for softmax in SOFTMAX:
                maps = layers(dp.maps.saliency(found, softmax=softmax, over=("step",), **space))
                rows.append(score(maps, group))
                if space["space"] == "output" and "frame" in maps.dims:
                    rows.append(score(still(maps), group))
        parts.append(joined(rows, "row"))
    return joined(parts, "sample").assign_coords(row=rows_of(isinstance(pictures[0], Clip)))


def rows_of(video: bool) -> list[str]:
    """Names of the maps that `measure` scores, in its order."""
    names = []
    for space in SPACES:
        for softmax in SOFTMAX:
            names.append(f"{space}, {'softmax' if softmax else 'no softmax'}")
            if space == "output" and video:
                names.append(f"{names[-1]}, still")
    return names


def trivial(pictures: Sequence[Picture], grid: tuple[int, ...]) -> xr.DataArray:
    """Score maps that look at nothing: (metric, sample, row)."""
    y, x = (np.arange(side) - (side - 1) / 2 for side in grid[-2:])
    gauss = np.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * (grid[-1] / 4) ** 2)) + np.zeros(grid)
    rng, parts = np.random.default_rng(0), []
    for group in groups(pictures, 25):
        shape = (len(group), len(group[0].words), *grid)
        # the background's map is the opposite of the nouns', so that the argmax is the best that a fixed map can be
        centred = np.broadcast_to(gauss, shape).copy()
        centred[:, -1] = 0.5
        rows = {"constant": np.ones(shape), "centre Gaussian": centred, "noise": rng.normal(size=shape)}
        dims = ("sample", "concept", *("frame", "y", "x")[3 - len(grid) :])
        scored = [score(xr.DataArray(values, dims=dims), group) for values in rows.values()]
        parts.append(joined(scored, xr.Variable("row", list(rows))))
    return joined(parts, "sample")


def table(scores: xr.DataArray) -> list[dict[str, Any]]:
    """Means over images with intervals, a row each."""
    found = bootstrap(scores)
    flat = found.to_dataframe().reset_index()
    kept = [name for name in flat.columns if name in ("metric", *scores.dims, *found.data_vars)]
    return json.loads(flat[kept].round(4).to_json(orient="records") or "[]")


def pick(rows: Sequence[dict], **where: Any) -> dict:
    """The one row with these labels."""
    (found,) = (row for row in rows if all(row.get(key) == value for key, value in where.items()))
    return found


def shown(row: dict) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row["n"] else "undefined"


def summary(results: dict[str, Any], metric: str) -> str:
    """The main table: a row a map, at the main timestep."""
    rows = [[f"{metric}, timestep {MAIN}", "all layers", "chosen layer", "which", "all layers, random twin"]]
    for name, layer in results["chosen"].items():
        cells = [pick(results["trained"], metric=metric, row=name, timestep=MAIN, layer=at) for at in ("mean", layer)]
        twin = pick(results["random twin"], metric=metric, row=name, layer="mean")
        rows.append([name, shown(cells[0]), shown(cells[1]), layer, shown(twin)])
    fixed = [row for row in results["trivial"] if row["metric"] == metric]
    return markdown([*rows, *([row["row"], shown(row), "", "", ""] for row in fixed)])


def curves(results: dict[str, Any], metric: str, over: str, order: Sequence[Any]) -> go.Figure:
    """A metric of the four spaces under the softmax, by layer or by timestep."""
    figure = go.Figure()
    fixed = {"timestep": MAIN} if over == "layer" else {"layer": "mean"}
    for colour, space in zip(COLOURS, SPACES, strict=True):
        rows = [pick(results["trained"], metric=metric, row=f"{space}, softmax", **fixed, **{over: at}) for at in order]
        mean = np.array([row["mean"] for row in rows])
        bars = {"array": [r["high"] - r["mean"] for r in rows], "arrayminus": [r["mean"] - r["low"] for r in rows]}
        figure.add_scatter(x=list(order), y=mean, error_y=bars, name=space, line_color=colour)
    figure.update_layout(Sheet.page(760, 330, {"l": 60, "r": 190, "t": 20, "b": 50}))
    grid = "rgba(127,127,127,0.3)"
    figure.update_xaxes(title=over, type="category", showgrid=False)
    figure.update_yaxes(title=metric, range=SEEN[metric], gridcolor=grid, zeroline=False)
    return figure


def write_page(file: Path, name: str, results: dict[str, Any]) -> None:
    """Write tables and figures as one page."""
    order = sorted({row["layer"] for row in results["trained"]} - {"mean"}, key=int)
    measured = "\n\n".join((__doc__ or "").split("\n\n")[2:])
    sections = [Section("What is measured", code=measured)]
    sections += [Section(f"Maps against masks: {metric}", code=summary(results, metric)) for metric in SEEN]
    main = ("auroc", "right_of_two")
    sections += [
        Section(
            "Layers", f"Softmax over concepts, timestep {MAIN}.", [curves(results, m, "layer", order) for m in main]
        ),
        Section("Timesteps", "Mean over layers, softmax.", [curves(results, m, "timestep", TIMESTEPS) for m in main]),
        Section(
            "What concepts attend to", "Output space, all layers, softmax (Table 5).", code=attention_table(results)
        ),
        Section(
            "The paper's findings",
            "Paired differences; output space and all layers unless said.",
            code=claims_table(results),
        ),
        Section("Words that no training sample had together", code=generalisation(results)),
    ]
    file.write_text(page(f"Quality of {name}", sections, facts=results["settings"]))


def attention_table(results: dict[str, Any]) -> str:
    """Table 5: what concepts attend to."""
    measures = ("auroc", "right_of_two", "miou")
    rows = [["concepts attend by", *measures]]
    for attends, words in ATTENDS.items():
        rows.append([words, *(shown(pick(results["attends"], metric=m, attends=attends)) for m in measures)])
    return markdown(rows)


def generalisation(results: dict[str, Any]) -> str:
    """Pictures with words that no training sample had together, and the others."""
    rows = [["all layers, softmax", "metric", "with held-out pairs", "without"]]
    for space in SPACES:
        for metric in ("auroc", "right_of_two"):
            where = {"metric": metric, "row": f"{space}, softmax"}
            rows.append([space, metric, *(shown(pick(results["pairs"], held_out=h, **where)) for h in (True, False))])
    return markdown(rows)


def findings(by_time: dict[int, xr.DataArray], attends: dict[str, xr.DataArray], best: str) -> list[dict[str, Any]]:
    """What the paper found, as paired differences that it says are positive."""
    main = by_time[MAIN]
    output = {at: scores.sel(row="output, softmax", layer="mean") for at, scores in by_time.items()}
    every = main.sel(layer="mean")
    single = main.sel(row="output, softmax").drop_sel(layer="mean")
    claims = {
        "Table 4: output space above image-to-concept attention": ("output, softmax", "image to concept, softmax"),
        "Table 4: output space above value space": ("output, softmax", "value, softmax"),
        "Table 4: image-to-concept attention above value space": ("image to concept, softmax", "value, softmax"),
        "Table 4: softmax helps output space": ("output, softmax", "output, no softmax"),
        "Table 4: softmax helps image-to-concept attention": (
            "image to concept, softmax",
            "image to concept, no softmax",
        ),
    }
    pairs = {claim: (every.sel(row=a), every.sel(row=b)) for claim, (a, b) in claims.items()}
    pairs |= {
        "Table 5: cross- and self-attention above cross-attention alone": (attends["both"], attends["image"]),
        "Table 5: cross- and self-attention above self-attention alone": (attends["both"], attends["concepts"]),
        "Table 5: cross- and self-attention above none": (attends["both"], attends["none"]),
        "Figure 4: the last layer above the first": (single.isel(layer=-1), single.isel(layer=0)),
        f"Figure 4: all layers above the best one ({best}, chosen on other pictures)": (
            output[MAIN],
            single.sel(layer=best),
        ),
        "Figure 4: timestep 500 above 100": (output[MAIN], output[TIMESTEPS[0]]),
        "Figure 4: timestep 500 above 900": (output[MAIN], output[TIMESTEPS[-1]]),
    }
    return [
        row | {"claim": claim}
        for claim, (more, less) in pairs.items()
        for row in table(
            more.drop_vars(["row", "layer"], errors="ignore") - less.drop_vars(["row", "layer"], errors="ignore")
        )
    ]


def claims_table(results: dict[str, Any]) -> str:
    """Which of the paper's findings hold on this model."""
    measures = ("auroc", "right_of_two", "miou")
    rows = [["difference that the paper finds positive", *measures]]
    for claim in dict.fromkeys(row["claim"] for row in results["findings"]):
        cells = [pick(results["findings"], claim=claim, metric=m) for m in measures]
        words = ["yes" if c["low"] > 0 else "opposite" if c["high"] < 0 else "open" for c in cells]
        rows.append([claim, *(f"{word}: {shown(cell)}" for word, cell in zip(words, cells, strict=True))])
    return markdown(rows)


def evaluate(pipe: Any, count: int, video: bool) -> dict[str, Any]:
    """Everything about one model."""
    draw = clips if video else scenes
    pictures, others = list(draw(count, seed=REPORTED)), list(draw(100, seed=CHOOSING))
    steps = tqdm(total=len(TIMESTEPS) + len(ATTENDS) + 1, unit="pass")

    def run(model: Any, timestep: int, attends: str = "both", chosen: Sequence[Picture] = pictures) -> xr.DataArray:
        steps.update()
        return measure(model, chosen, timestep, attends=attends)

    first = run(pipe, MAIN, chosen=others).sel(metric="auroc").mean("sample").drop_sel(layer="mean")
    chosen = {str(name): str(first.sel(row=name).idxmax("layer").item()) for name in first.row.values}
    by_time = {at: run(pipe, at) for at in TIMESTEPS}
    trained = joined(by_time.values(), xr.Variable("timestep", list(by_time)))
    output = {"row": "output, softmax", "layer": "mean"}
    attends = {name: (by_time[MAIN] if name == "both" else run(pipe, MAIN, name)).sel(output) for name in ATTENDS}
    ordered = [picture for group in groups(pictures, 25) for picture in group]
    unseen = np.array([held_out(picture.words) for picture in ordered])
    pairs = [
        row | {"held_out": which}
        for which in (True, False)
        for row in table(by_time[MAIN].sel(layer="mean").isel(sample=np.flatnonzero(unseen == which)))
    ]
    grid = (5, 8, 8) if video else (16, 16)
    found = {
        "chosen": chosen,
        "trained": table(trained),
        "random twin": table(run(random_twin(pipe), MAIN)),
        "trivial": table(trivial(pictures, grid)),
        "attends": table(joined(attends.values(), xr.Variable("attends", list(attends)))),
        "pairs": pairs,
        "findings": findings(by_time, attends, chosen["output, softmax"]),
    }
    steps.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a demo model, or a directory with one")
    parser.add_argument("--count", type=int, default=500, help="held-out scenes or clips")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/demo_quality"), help="folder of the results"
    )
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    if options.model in dp.demo.names():
        pipe = dp.demo.load(options.model)
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(options.model)
    name = Path(options.model).name
    results = evaluate(pipe, options.count, video=hasattr(pipe, "video_processor"))
    results["settings"] = {"model": name, "pictures": options.count, "T5 tokens": LENGTH, "seeds of": REPORTED}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(results, indent=0) + "\n")
    write_page(options.out / f"{name}.html", name, results)
    print(
        "\n\n".join(
            [
                *(summary(results, m) for m in SEEN),
                attention_table(results),
                claims_table(results),
                generalisation(results),
            ]
        )
    )


if __name__ == "__main__":
    main()
