"""The command encode: real pictures, or a clip, into a store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_probe.cli.evaluation import DEMO_LENGTH
from dit_probe.cli.shared import Device, Dtype, Model, NewStore, Offload, app, split_words
from dit_probe.cli.tracing import Append, Concepts, KeepWhat, Overwrite, concept_probe
from dit_probe.errors import TraceError


@app.command()
def encode(
    model: Model,
    pictures: Annotated[
        list[Path], typer.Argument(help="Pictures, a sample each; of a video model, frames of a clip.")
    ],
    concepts: Concepts,
    store: NewStore,
    prompt: Annotated[str, typer.Option(help="What the model is told that they show; nothing by default.")] = "",
    timestep: Annotated[float, typer.Option(min=0, max=1000, help="Noise level.")] = 500,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels that pictures are stretched to.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, the same for all.")] = 0,
    keep: KeepWhat = "vectors",
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    append: Append = False,
    overwrite: Overwrite = False,
) -> None:
    """Take real pictures through the model once, at one noise level, and record their concepts into a store."""
    import dit_probe as dp
    from dit_probe.datasets.samples import read_image
    from dit_probe.loading import load_pipeline
    from dit_probe.protocols import resize_image

    if missing := [str(path) for path in pictures if not path.is_file()]:
        raise TraceError(f"no picture at {', '.join(missing)}")
    probe = concept_probe(split_words(concepts), keep)
    read = [read_image(path, turned="upright") for path in pictures]
    read = read if size is None else [resize_image(image, size) for image in read]
    pipe = load_pipeline(model, device, dtype, offload)
    text = {"max_sequence_length": DEMO_LENGTH} if model in dp.demo.names() else {}
    mode = "w" if overwrite else "a" if append else None
    with dp.trace(pipe, probe, store=store, mode=mode, progress=sys.stderr.isatty()):
        for images in [read] if hasattr(pipe, "video_processor") else read:
            dp.encode(pipe, images, prompt, timestep, seed, **text)
    typer.echo(f"store  {store}")
