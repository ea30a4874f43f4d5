"""Commands that trace: demo, trace, maps, info, plan, verify, models, probes."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from dit_probe import schema
from dit_probe.cli.shared import (
    DEMO_MODEL,
    Device,
    Dtype,
    Json,
    Model,
    NewStore,
    Offload,
    Store,
    app,
    console,
    print_json,
    split_numbers,
    split_words,
)
from dit_probe.errors import ConceptError, ProbeError

DEMO_STEPS = 12
SHOWN = 5
"""Failed samples that `info` gives the reasons of."""

Keep = Literal["vectors", "scores"]
Space = Literal["output", "value", "cross"]
Softmax = Literal["each", "after", "none"]

Prompt = Annotated[str, typer.Option(help="What to paint.")]
Concepts = Annotated[str, typer.Option(help="Words to trace, separated by commas.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's own number if not given.")]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a video.")]
Seed = Annotated[int, typer.Option(help="Of the starting noise.")]
KeepWhat = Annotated[Keep, typer.Option(help="Vectors, or only scores: a few hundred times smaller.")]
Append = Annotated[bool, typer.Option("--append", help="Add a sample to the store if it exists.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start the store anew if it exists.")]


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A saved pipeline directory, a hub id or a demo model.")] = DEMO_MODEL,
    prompt: Annotated[str | None, typer.Option(help="What to paint; by default what the model is shown with.")] = None,
    concepts: Annotated[str | None, typer.Option(help="Words to trace, separated by commas.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html"),
    store: Annotated[str | None, typer.Option(help="Where the trace goes; by default beside the page.")] = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    seed: Seed = 2,
    keep: Annotated[Keep | None, typer.Option(help="By default vectors on a demo model, else scores.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    overwrite: Overwrite = False,
) -> None:
    """Paint, trace into a store, reopen it and write one page with the maps of every concept in three spaces."""
    import dit_probe as dp
    from dit_probe import report
    from dit_probe.loading import load_pipeline

    small = model in dp.demo.names()
    if concepts is None and prompt is not None:
        raise ConceptError("no concepts for this prompt. Name some, background included: --concepts fox,snow,forest")
    shown, known = dp.demo.example(model)
    prompt, words = prompt or shown, split_words(concepts) if concepts else list(known)
    page = out.resolve()
    page.parent.mkdir(parents=True, exist_ok=True)
    # The store that the demo names itself is its own to replace.
    path, mode = (store, "w" if overwrite else None) if store else (str(page.with_suffix(".zarr")), "w")
    pipe = load_pipeline(model, device, dtype, offload)
    probe = concept_probe(words, keep or ("vectors" if small else "scores"))
    arguments = arguments_of(steps or (DEMO_STEPS if small else None), height, width, frames)
    picture = _run(pipe, probe, prompt, seed, arguments, path, mode)

    ds = dp.open(path)
    page.write_text(report.demo(ds, picture, prompt=prompt, model=model, store=path), encoding="utf-8")
    typer.echo(f"store  {path}\npage   {page}")


@app.command()
def trace(
    model: Model,
    prompt: Prompt,
    concepts: Concepts,
    store: NewStore,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    seed: Seed = 0,
    keep: KeepWhat = "vectors",
    image: Annotated[Path | None, typer.Option(help="Also save the image (or the first frame) here.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    append: Append = False,
    overwrite: Overwrite = False,
) -> None:
    """Run a pipeline once and record its concepts into a store; what an interrupted run lacks is completed."""
    from dit_probe.loading import load_pipeline

    probe = concept_probe(split_words(concepts), keep)
    pipe = load_pipeline(model, device, dtype, offload)
    arguments = arguments_of(steps, height, width, frames)
    picture = _run(pipe, probe, prompt, seed, arguments, store, "w" if overwrite else "a" if append else None)
    if image is not None:
        _first_frame(picture).save(image)
    typer.echo(f"store  {store}")


@app.command()
def maps(
    store: Store,
    space: Annotated[Space, typer.Option(help="Where image and concepts are compared.")] = "output",
    softmax: Annotated[Softmax, typer.Option(help="Softmax over concepts.")] = "each",
    layers: Annotated[str | None, typer.Option(help="Layers to average, as 3,4 or 10-18; all by default.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps to average; all by default.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Which run of the store.")] = 0,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("maps.html"),
) -> None:
    """Draw the maps of a saved trace; the model is not needed."""
    import dit_probe as dp
    from dit_probe import report

    ds = dp.open(store)
    page = report.maps(
        ds,
        space,
        softmax=None if softmax == "none" else softmax,
        layers=split_numbers(layers, "--layers"),
        steps=split_numbers(steps, "--steps"),
        sample=sample,
    )
    out.write_text(page, encoding="utf-8")
    typer.echo(f"page   {out.resolve()}")


@app.command()
def info(
    store: Store,
    check: Annotated[bool, typer.Option("--check", help="Read every record; ends with 1 if one is damaged.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a store holds, what is missing from it, and whether the run can go on."""
    import dit_probe as dp

    facts = dp.store.info(store)
    found = dp.store.damaged(store) if check else []
    if as_json:
        print_json(facts | ({"damaged": found} if check else {}))
    else:
        _print_info(facts)
    for line in found:
        typer.echo(line, err=True)
    if check and not as_json:
        typer.echo(f"{len(found)} damaged records")
    if found:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Model,
    concepts: Concepts,
    height: Annotated[int, typer.Option(min=1, help="Pixels.")],
    width: Annotated[int, typer.Option(min=1, help="Pixels.")],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")],
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 1,
    keep: KeepWhat = "vectors",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Also time a data set of so many, on three that are run here.")
    ] = None,
    shard: Annotated[int, typer.Option(min=0, help="Samples a file, as for trace-dataset.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    as_json: Json = False,
) -> None:
    """Price a trace before it runs: variables, dims and bytes; of a data set, files and hours from a measured run."""
    from dit_probe.loading import load_pipeline

    probe = concept_probe(split_words(concepts), keep)
    pipe = load_pipeline(model, device if samples else "cpu", dtype, offload)
    priced = probe.plan(pipe, height=height, width=width, steps=steps, frames=frames)
    facts: dict[str, Any] = {"bytes": priced.nbytes, "sizes": priced.layout.sizes}
    facts["variables"] = {
        variable.name: dataclasses.asdict(variable) | {"bytes": priced.bytes_of(variable)}
        for variable in priced.layout.variables
    }
    if not as_json:
        typer.echo(str(priced))
    if samples:
        from dit_probe.dataset_tracing import plan_dataset

        call = arguments_of(steps, height, width, frames if hasattr(pipe, "video_processor") else None)
        measured = [{"prompt": concepts, "seed": seed} for seed in range(3)]
        whole = plan_dataset(lambda: pipe, measured, probe, samples=samples, shard=shard, **call)
        facts["dataset"] = dataclasses.asdict(whole) | {"files": whole.files, "device_hours": whole.device_hours}
        if not as_json:
            typer.echo(str(whole))
    if as_json:
        print_json(facts)


@app.command()
def verify(
    model: Model,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference that passes; by the dtype if not given.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    as_json: Json = False,
) -> None:
    """Check, on a model's own weights, that what is traced is what it computes; ends with 1 if it is not."""
    import dit_probe as dp
    from dit_probe.loading import load_pipeline

    pipe = load_pipeline(model, device, dtype, offload)
    pipe.set_progress_bar_config(disable=True)
    found = dp.verify(pipe, tolerance=tolerance, **arguments_of(None, height, width, frames))
    if as_json:
        print_json({"ok": found.ok, "failures": found.failures, **dataclasses.asdict(found)})
    else:
        typer.echo(str(found))
    if not found.ok:
        for failure in found.failures:
            typer.echo(failure, err=True)
        raise typer.Exit(1)


@app.command()
def models(as_json: Json = False) -> None:
    """List the model families that can be traced, what is recorded of them, how each is checked; and who is refused."""
    from dit_probe.anatomy import coverage, families
    from dit_probe.anatomy.refused import GROUPS
    from dit_probe.verification import CHECKS

    if as_json:
        known = {
            name: {"models": found.classes, "concepts": not found.no_concepts} | dataclasses.asdict(coverage.of(name))
            for name, found in sorted(families().items())
        }
        print_json({"families": known, "refused": {one: group.short for group in GROUPS for one in group.classes}})
        return
    table = Table("family", "models", "blocks", "recorded", *CHECKS, "output", "diffusers")
    for name, anatomy in sorted(families().items()):
        checked = coverage.of(name)
        concepts = ", c by extension" if checked.kinds == ["single"] else " c"
        recorded = f"q k v o of x p{'' if anatomy.no_concepts else concepts}"
        figures = [f"{checked.maxima[check]:.1g}" if check in checked.maxima else "-" for check in CHECKS]
        output = "-" if not checked.versions else "equal" if checked.output_equal else "CHANGED"
        versions = ", ".join(checked.versions) or "not measured yet"
        table.add_row(name, "\n".join(anatomy.classes), " ".join(checked.kinds), recorded, *figures, output, versions)
    refused = Table("refused", "since such a model …")
    for group in GROUPS:
        refused.add_row("\n".join(group.classes), group.short)
    checks = {**CHECKS, "output": "the transformer's output with and without tracing"}
    legend = [f"{name}: {meaning}" for name, meaning in checks.items()]
    console().print(table, "Largest difference over layers, relative to the largest value.", *legend, refused, sep="\n")


@app.command()
def probes(as_json: Json = False) -> None:
    """List the probes that are installed, other packages' included."""
    rows = []
    for point in sorted(entry_points(group="dit_probe.probes"), key=lambda point: point.name):
        try:
            summary = (point.load().__doc__ or "").strip().split("\n")[0]
        except Exception as error:  # another package's probe must not hide the others
            summary = f"does not load: {error}"
        rows.append({"probe": point.name, "what it does": summary, "from": point.value})
    if as_json:
        print_json(rows)
        return
    table = Table("probe", "what it does", "from")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console().print(table)


def concept_probe(words: list[str], keep: Keep) -> Any:
    """ConceptAttention of these words."""
    found = {point.name: point for point in entry_points(group="dit_probe.probes")}
    if "ConceptAttention" not in found:
        raise ProbeError(
            "the probe ConceptAttention is not installed. Install the package again: pip install dit-probe"
        )
    concept_attention = found["ConceptAttention"].load()
    if keep == "scores":
        return concept_attention(words, record=(), scores=("output", "value", "cross"))
    return concept_attention(words)


def arguments_of(steps: int | None, height: int | None, width: int | None, frames: int | None) -> dict[str, Any]:
    """Arguments of a pipeline's call, those that are given."""
    given = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    return {name: value for name, value in given.items() if value is not None}


def _run(pipe: Any, probe: Any, prompt: str, seed: int, arguments: dict[str, int], store: str, mode: str | None) -> Any:
    """One traced call; the image, or the list of frames."""
    import torch

    import dit_probe as dp

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    with dp.trace(pipe, probe, store=store, mode=mode, progress=sys.stderr.isatty()):
        output = pipe(prompt=prompt, generator=generator, **arguments)
    return output.images[0] if hasattr(output, "images") else output.frames[0]


def _first_frame(picture: Any) -> Any:
    return picture[0] if isinstance(picture, list) else picture


def _some(slots: list[int]) -> str:
    """Slots as ranges, if they are few."""
    text = schema.ranges(slots)
    return text if len(text) <= 60 else f"{len(slots)} samples, {text[:40]} …"


def _print_info(facts: dict[str, Any]) -> None:
    """Two tables: the run, and its variables."""
    identity, attrs, sizes = facts["identity"], facts["attrs"], facts["sizes"]
    run = Table(show_header=False, box=None)
    for name in ("model", "class", "family", "dtype", "branch"):
        run.add_row(name, str(identity.get(name, "")))
    run.add_row("probes", ", ".join(str(probe.get("probe")) for probe in identity.get("probes", ())))
    failed = facts["failed"]
    pending = [slot for slot in facts["incomplete"] if slot not in failed]
    incomplete = f", incomplete: {_some(pending)}" if pending else ""
    run.add_row("samples", f"{len(facts['done'])} complete{incomplete}{f', {len(failed)} failed' if failed else ''}")
    for slot, reason in list(failed.items())[:SHOWN]:
        run.add_row("", f"sample {slot}: {escape(reason)}")
    run.add_row("continue", facts["resume"])
    run.add_row("sizes", ", ".join(f"{dim} {size}" for dim, size in sizes.items() if dim != "sample"))
    run.add_row("versions", ", ".join(f"{name} {version}" for name, version in attrs.get("versions", {}).items()))
    run.add_row("on disk", f"{schema.human(facts['bytes'])} in {facts['files']} files")
    variables = Table("variable", "dims", "dtype", "layers", "steps", "on disk")
    for name, variable in facts["variables"].items():
        labels = [schema.ranges(variable.get(key) or ()) for key in ("layers", "steps")]
        variables.add_row(name, " ".join(variable["dims"]), variable["dtype"], *labels, schema.human(variable["bytes"]))
    console().print(run, variables)
