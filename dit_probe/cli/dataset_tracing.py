"""The command trace-dataset: every sample of a data set into one store."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_probe.cli.evaluation import DEMO_LENGTH, Classes, Rename, Words
from dit_probe.cli.shared import Device, Dtype, Model, Offload, app, split_words
from dit_probe.cli.tracing import Frames, Height, KeepWhat, Overwrite, Steps, Width, arguments_of, concept_probe
from dit_probe.errors import TraceError


@app.command()
def trace_dataset(
    model: Model,
    store: Annotated[str, typer.Option(help="Directory or URL of the store; a run that is there is continued.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Text with a prompt a line, or JSONL: prompt, seed, concepts, image (a path).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Pictures with masks, as for evaluate; they are encoded.")] = None,
    concepts: Annotated[
        str | None, typer.Option(help="Words to trace, separated by commas; with --data each picture's own by default.")
    ] = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    timestep: Annotated[float, typer.Option(min=0, max=1000, help="Noise level of pictures.")] = 500,
    size: Annotated[int | None, typer.Option(min=1, help="Side in pixels that pictures are stretched to.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; every next one has one more.")] = 0,
    keep: KeepWhat = "scores",
    batch: Annotated[int, typer.Option(min=1, help="Samples a call.")] = 1,
    shard: Annotated[int, typer.Option(min=0, help="Samples a file; 0: a file for every record.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes on this machine, the n-th on the n-th GPU.")] = 0,
    scheduler: Annotated[str | None, typer.Option(help="Address of a dask scheduler, as tcp://host:8786.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed samples once more.")] = False,
    classes: Classes = None,
    rename: Rename = None,
    words: Words = None,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    overwrite: Overwrite = False,
) -> None:
    """Trace a data set into one store; run again, it goes on. Ends with 1 if samples failed."""
    import dit_probe as dp
    from dit_probe.dataset_tracing import PromptFile
    from dit_probe.loading import load_pipeline

    if (prompts is None) == (data is None):
        raise typer.BadParameter("give one of them: --prompts FILE or --data FOLDER", param_hint="--prompts / --data")
    call: dict[str, Any] = arguments_of(steps, height, width, frames)
    if data is None:
        assert prompts is not None
        dataset: Any = PromptFile(prompts, seed)
    else:
        named = split_words(concepts) if concepts else None
        dataset = _pictures(data, size, named, classes=classes, rename=rename, words=words)
        call = {"timestep": timestep, **({"max_sequence_length": DEMO_LENGTH} if model in dp.demo.names() else {})}
    own = [*dataset[0].concepts]
    if not (concepts or own):
        raise typer.BadParameter("no concepts: name some, background included", param_hint="--concepts")
    probe = concept_probe(split_words(concepts) if concepts else own, keep)
    load = functools.partial(load_pipeline, model, device, dtype, offload)
    with _client(workers, scheduler) as client:
        account = dp.trace_dataset(
            functools.partial(_on_own_device, load) if workers and device is None else load,
            dataset,
            probe,
            store,
            batch=batch,
            client=client,
            shard=shard,
            retry=retry,
            mode="w" if overwrite else None,
            progress=sys.stderr.isatty(),
            **call,
        )
    typer.echo(str(account))
    if account.failed or account.pending:
        raise typer.Exit(1)


def _pictures(data: str, size: int | None, concepts: list[str] | None, **options: Any) -> Any:
    from dit_probe.dataset_tracing import Pictures
    from dit_probe.datasets.opening import open_dataset

    return Pictures(open_dataset(data, **options), size=size, concepts=concepts)


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None) -> Any:
    """A client of a cluster that is there, or of one on this machine; None where neither is asked for."""
    if not workers and scheduler is None:
        yield None
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise TraceError("several workers need dask.distributed: pip install 'dit-probe[distributed]'") from None
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
        return
    with LocalCluster(n_workers=workers, threads_per_worker=1) as cluster, Client(cluster) as client:
        client.wait_for_workers(workers)
        yield client


def _on_own_device(load: functools.partial[Any]) -> Any:
    """The pipeline on the GPU that has the worker's number; without GPUs, where `load` puts it."""
    import torch
    from distributed import get_worker

    if not torch.cuda.is_available():
        return load()
    model, _, *rest = load.args
    return load.func(model, f"cuda:{int(get_worker().name) % torch.cuda.device_count()}", *rest)
