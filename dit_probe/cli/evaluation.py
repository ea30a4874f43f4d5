"""Commands that score maps against masks: evaluate, reproduce."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dit_probe.cli.shared import DEMO_MODEL, Device, Dtype, Offload, app, complete_model, split_numbers

DEMO_LENGTH = 32
"""T5 tokens of a prompt for the demo models; other pipelines take their own number."""

Chosen = Annotated[
    str,
    typer.Option(
        "--model", help="A saved pipeline directory, a hub id or a demo model.", autocompletion=complete_model
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="gtsegs_ijcv.mat, a folder with VOCdevkit, JPEGImages and Annotations (DAVIS), or images and masks; "
        "picture-book scenes (or clips) if not given.",
    ),
]
Classes = Annotated[Path | None, typer.Option(help="Of ImageNet-Segmentation: the table of synsets and words.")]
Rename = Annotated[Path | None, typer.Option(help="Of ImageNet-Segmentation: JSON, names to single words.")]
Words = Annotated[str | None, typer.Option(help="Of DAVIS and images with masks: a word, or a JSON file of words.")]
Count = Annotated[int, typer.Option(min=2, help="Pictures, at most; drawn ones: exactly.")]


@app.command()
def evaluate(
    store: Annotated[str, typer.Argument(help="Where the numbers of every picture go; continued if it is there.")],
    model: Chosen = DEMO_MODEL,
    data: Annotated[str | None, typer.Option(help="As for reproduce.")] = None,
    protocol: Annotated[str, typer.Option(help="chefer, paper, paper_multiclass or native.")] = "native",
    timestep: Annotated[float, typer.Option(min=0, max=1000, help="Noise level.")] = 500,
    layers: Annotated[str | None, typer.Option(help="Layers to average, as 3,4 or 10-18; all by default.")] = None,
    metrics: Annotated[str, typer.Option(help="What to print.")] = "auroc,ap,iou_macro,right_of_two",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many pictures.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Price the run on two pictures and stop.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write all means and intervals here.")] = None,
    subset: Annotated[str | None, typer.Option(help="Of PascalVOC: single_class, or a list of ids.")] = None,
    classes: Classes = None,
    rename: Rename = None,
    words: Words = None,
    count: Count = 150,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
) -> None:
    """Score a model's maps in three spaces, and maps that look at nothing, on pictures with masks."""
    import dit_probe as dp
    from dit_probe import evaluation, methods, protocols, summary
    from dit_probe.datasets.opening import open_dataset
    from dit_probe.datasets.samples import Part

    pipe, text = _pipeline(model, device, dtype, offload)
    opened = open_dataset(data or _drawn(pipe), classes=classes, rename=rename, words=words, subset=subset, count=count)
    chosen = split_numbers(layers, "--layers")
    passes, twin = (methods.Passes(p, timestep=timestep, **text) for p in (pipe, methods.random_twin(pipe)))
    spaces: tuple[Literal["output", "cross", "value"], ...] = ("output", "cross", "value")
    rows: dict[str, evaluation.Method] = {space: passes.method(space, layers=chosen) for space in spaces}
    rows["output, random weights"] = twin.method("output", layers=chosen)
    agnostic = not protocols.find(protocol).compete  # where words compete, one map for all of them has no row
    rows |= {name: row for name, row in methods.trivial_rows().items() if agnostic or not row.class_agnostic}
    priced = opened if limit is None else Part(opened, range(min(limit, len(opened))), opened.name)
    typer.echo(str(evaluation.plan(rows, priced, protocol)))
    if plan:
        return
    found = summary.summarise(
        dp.evaluate(rows, opened, protocol, store=store, limit=limit, progress=sys.stderr.isatty())
    )
    wanted = [name.strip() for name in metrics.split(",")]
    names = [name for name in found.metric.values.tolist() if name.partition(",")[0] in wanted]
    if unknown := set(wanted) - {name.partition(",")[0] for name in names}:
        known = ", ".join(dict.fromkeys(name.partition(",")[0] for name in found.metric.values.tolist()))
        raise typer.BadParameter(f"no metric {', '.join(sorted(unknown))}: there are {known}", param_hint="--metrics")
    typer.echo(summary.table(found.sel(metric=names)))
    if csv is not None:
        csv.write_text(summary.table(found, "csv"), encoding="utf-8")
    typer.echo(f"store  {store}")


@app.command()
def reproduce(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY…", help="table1 … table5, figure4, specificity, sanity, sensitivity; paper: the first six."
        ),
    ],
    model: Chosen = DEMO_MODEL,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="Folder of pages, tables and numbers.")] = Path("reproduction"),
    classes: Classes = None,
    rename: Rename = None,
    words: Words = None,
    count: Count = 120,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Rows of other people's methods on another model, a folder or hub id: clip, vit-in1k, dino, dinov2, "
            "dinov2-registers, ibot, sd2, sdxl.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
) -> None:
    """Print the paper's tables with published and measured numbers, and write their pages; continues if interrupted."""
    from dit_probe import reproduce as reproduction

    pipe, text = _pipeline(model, device, dtype, offload)
    names = [name for study in studies for name in (tuple(reproduction.STUDIES)[:6] if study == "paper" else (study,))]
    options: dict[str, Any] = {"classes": classes, "rename": rename, "words": words}
    places = data or [_drawn(pipe)]
    single, several = (
        [reproduction.source(place, several=which, count=count, **options) for place in places]
        for which in (False, True)
    )
    folder = out / Path(model).name
    others = _baselines(baseline or [], device)
    setting = reproduction.Setting(pipe, single, several, folder / "numbers", sys.stderr.isatty(), others, text)
    for name in dict.fromkeys(names):
        found = reproduction.reproduce(name, setting)
        page = found.write(folder)
        typer.echo(found.markdown() + f"\n\npage   {page.resolve()}\n")


def _pipeline(model: str, device: str | None, dtype: str | None, offload: bool) -> tuple[Any, dict[str, Any]]:
    """A pipeline and what it needs for its prompts."""
    from dit_probe import demo
    from dit_probe.loading import load_pipeline

    pipe = load_pipeline(model, device, dtype, offload)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"max_sequence_length": DEMO_LENGTH} if model in demo.names() else {}


def _baselines(named: list[str], device: str | None) -> dict[str, Any]:
    """Models of other people's methods, by the name of their host."""
    from dit_probe import methods

    known = {name: host.load for name, host in methods.hosts().items() if host.load is not None}
    found = {}
    for one in named:
        name, _, path = one.partition("=")
        if name not in known or not path:
            raise typer.BadParameter(
                f"{one!r}: give NAME=PATH, NAME one of {', '.join(known)}", param_hint="--baseline"
            )
        found[name] = known[name](path, **({"device": device} if device else {}))
    return found


def _drawn(pipe: Any) -> str:
    return "picture-book-clips" if hasattr(pipe, "video_processor") else "picture-book"
