"""What a run will hold, before it starts: the layout of its store, and what that costs."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_probe import schema
from dit_probe.anatomy import Anatomy, Block, Grid, find, transformer_of
from dit_probe.errors import ProbeError
from dit_probe.probe import Combination
from dit_probe.tabular import Table, Tabular

_EXTENSION = "the concept stream runs through single-stream blocks too, which the paper does not do"
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}


@dataclass(frozen=True)
class Plan(Tabular):
    """The price of a run, before anything runs; printing it shows the table.

    Attributes:
        layout: variables, dims, coordinates.
        samples: samples per run.
    """

    layout: schema.Layout
    samples: int

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of all variables."""
        return sum(self.bytes_of(variable) for variable in self.layout.variables)

    def bytes_of(self, variable: schema.Variable) -> int:
        """Uncompressed bytes of one variable."""
        chunk = math.prod(self.layout.sizes[dim] for dim in variable.dims) * _BYTES[variable.dtype]
        chunks = 1 if variable.layers is None else len(variable.layers) * len(variable.steps or ())
        return self.samples * self.layout.sizes.get("branch", 1) * chunks * chunk

    def _table(self) -> Table:
        sizes = self.layout.sizes
        rows = [("variable", "dims at one (sample, step, layer)", "layers", "steps", "dtype", "size")]
        for variable in self.layout.variables:
            dims = " ".join(f"{dim}={sizes[dim]}" for dim in variable.dims)
            layers, steps = schema.ranges(variable.layers or ()), schema.ranges(variable.steps or ())
            rows.append((variable.name, dims, layers, steps, variable.dtype, schema.human(self.bytes_of(variable))))
        return Table(rows, below=(f"{self.samples} sample(s), {schema.human(self.nbytes)} before compression",))


def layout(
    anatomy: Anatomy,
    model: Any,
    probes: Combination,
    *,
    grid: Grid,
    prompt_tokens: int,
    concepts: int,
    timesteps: Sequence[float],
    sigmas: Sequence[float],
    branch: str,
) -> schema.Layout:
    """Everything about a run that is the same for all of its samples.

    Args:
        anatomy: the model's family.
        model: the transformer.
        probes: what is recorded.
        grid: positions of the image tokens.
        prompt_tokens: length of the prompt stream.
        concepts: number of concepts.
        timesteps: what the scheduler gives, one per step of the run, 0..1000; NaN where not known yet.
        sigmas: noise levels, one per step.
        branch: "cond", "uncond" or "both".

    Raises:
        SiteError: a layer or step that does not exist.
    """
    blocks = anatomy.blocks(model)
    layers = probes.layers(blocks, type(model).__name__)
    steps = probes.steps(len(timesteps))
    dtype = str(model.dtype).removeprefix("torch.")
    heads, head_dim = anatomy.heads(model)
    text_width = "width" if anatomy.text_width(model) == heads * head_dim else "text_width"
    dims = {name: schema.token_dims(name) for probe in probes for name in probe.record}
    dims |= {name: (schema.TOKEN_DIM[name], text_width) for name in ("p", "c") if name in dims}
    dims |= {name: ("concept", "image_token") for name in probes.names if name in schema.SCORE_SOURCES}
    dims |= {name: tuple(observed) for probe in probes for name, observed in probe.observes.items()}
    variables = [
        schema.Variable(name, dims[name], dtype if name in schema.ACTIVATIONS else "float32", layers[name], steps[name])
        for name in probes.names
    ]
    kept_layers = sorted({layer for chosen in layers.values() for layer in chosen})
    kept_steps = sorted({step for chosen in steps.values() for step in chosen})
    sizes = {
        "step": len(kept_steps),
        "layer": len(kept_layers),
        "image_token": len(grid),
        "prompt_token": prompt_tokens,
        "concept": concepts,
        "head": heads,
        "head_dim": head_dim,
        "width": heads * head_dim,
        text_width: anatomy.text_width(model),
    }
    for dim, size in (item for probe in probes for item in probe.sizes.items()):
        if sizes.setdefault(dim, size) != size:
            raise ProbeError(f"one store has one length of {dim!r}, but the probes say {sizes[dim]} and {size}")
    coords: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "step": (("step",), np.array(kept_steps, dtype=np.int64)),
        "timestep": (("step",), np.array([timesteps[step] for step in kept_steps], dtype=np.float64)),
        "sigma": (("step",), np.array([sigmas[step] for step in kept_steps], dtype=np.float64)),
        "layer": (("layer",), np.array(kept_layers, dtype=np.int64)),
        "kind": (("layer",), np.array([blocks[layer].kind for layer in kept_layers], dtype=str)),
        "patch_frame": (("image_token",), np.array(grid.frame, dtype=np.int64)),
        "patch_y": (("image_token",), np.array(grid.y, dtype=np.int64)),
        "patch_x": (("image_token",), np.array(grid.x, dtype=np.int64)),
    }
    if branch == "both":
        sizes["branch"] = len(schema.BRANCHES)
        coords["branch"] = (("branch",), np.array(schema.BRANCHES, dtype=str))
    attrs = {
        "identity": {
            "model": _name(model),
            "class": type(model).__name__,
            "family": anatomy.family,
            "blocks": len(blocks),
            "dtype": dtype,
            "branch": branch,
            "probes": probes.json(),
            **({"extension": _EXTENSION} if probes.stream is not None and probes.stream.through == "all" else {}),
        },
        "versions": _versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return schema.Layout(tuple(variables), sizes, coords, attrs)


def described(model: type, probes: Combination, target: Any, nbytes: int) -> Table:
    """What a run is, for `dit_probe.tracing.Run`: its model, probes, variables and store, and how much it wrote.

    Example:
        >>> print(described(dict, Combination(), "run.zarr", 2048).text().splitlines()[-1])
        written  2.0 KiB before compression
    """
    rows = [("run", f"of {model.__name__}"), ("probes", ", ".join(type(probe).__name__ for probe in probes))]
    rows += [("records", " ".join(probes.names)), ("store", "memory" if target is None else str(target))]
    return Table([*rows, ("written", f"{schema.human(nbytes)} before compression" if nbytes else "nothing yet")])


def to_verify(layout: schema.Layout, blocks: Sequence[Block]) -> frozenset[int]:
    """Layers to replay before anything is trusted: the first joint one, and the first single one if it is recorded."""
    last = max(layer for variable in layout.variables for layer in variable.layers or (0,))
    firsts = {block.kind: block.layer for block in reversed(blocks)}
    return frozenset(layer for kind, layer in firsts.items() if kind == "joint" or layer <= last)


def plan(
    pipe: Any,
    probes: Combination,
    *,
    height: int,
    width: int,
    steps: int,
    frames: int = 1,
    samples: int = 1,
    branch: str = "cond",
    max_sequence_length: int | None = None,
) -> Plan:
    """What a pipeline call of this size would record: variables, dims and bytes; nothing runs.

    Args:
        pipe: the pipeline.
        probes: what is recorded.
        height: of the image, pixels.
        width: of the image, pixels.
        steps: denoising steps.
        frames: frames of the video.
        samples: images or videos.
        branch: "cond", "uncond" or "both" halves of guidance.
        max_sequence_length: T5 tokens of the prompt; None: the pipeline's default.

    Raises:
        ModelError: the family is unknown.
        SiteError: a layer or step that does not exist.
        ProbeError: the probes contradict each other.
    """
    anatomy, model = find(pipe), transformer_of(pipe)
    if model is pipe:
        raise ProbeError("plan needs the pipeline, whose VAE and text encoder fix the sizes; found its transformer")
    stream = probes.stream
    described = layout(
        anatomy,
        model,
        probes,
        grid=anatomy.planned_grid(pipe, height, width, frames),
        prompt_tokens=anatomy.planned_prompt_tokens(pipe, max_sequence_length or anatomy.text_limit(pipe)),
        concepts=len(stream.concepts) if stream else 0,
        timesteps=[float("nan")] * steps,
        sigmas=[float("nan")] * steps,
        branch=branch,
    )
    return Plan(described, samples)


def _name(model: Any) -> str:
    """The hub's name of a model, or that of its directory; where the directory lies makes no other model of it."""
    path = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if not os.path.isdir(path):
        return path
    parts = [part for part in Path(path).parts if part != "transformer"]
    # The hub's cache: models--owner--name/snapshots/revision.
    cached = [part.removeprefix("models--").replace("--", "/") for part in parts if part.startswith("models--")]
    return f"{cached[-1]}@{parts[-1]}" if cached else parts[-1]


@functools.cache
def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("dit-probe", "torch", "diffusers", "transformers")}
