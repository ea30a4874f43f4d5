"""A small layout, and the records and samples that the tests of the store write in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from dit_probe import store
from dit_probe.errors import IncompleteWarning
from dit_probe.schema import Layout, Sample, Variable

SIZES = {
    "step": 2,
    "layer": 3,
    "image_token": 6,
    "prompt_token": 4,
    "concept": 2,
    "head": 2,
    "head_dim": 4,
    "width": 8,
}
COORDS = {
    "step": (("step",), np.array([0, 3])),
    "timestep": (("step",), np.array([1000.0, 250.0])),
    "layer": (("layer",), np.array([0, 2, 5])),
    "kind": (("layer",), np.array(["joint", "joint", "single"])),
    "y": (("image_token",), np.arange(6) // 3),
    "x": (("image_token",), np.arange(6) % 3),
}
VARIABLES = (
    Variable("o_x", ("image_token", "head", "head_dim"), "bfloat16", layers=(0, 2, 5), steps=(0, 3)),
    Variable("o_c", ("concept", "head", "head_dim"), "float32", layers=(0, 2), steps=(3,)),
    Variable("p", ("prompt_token", "width"), "float16", layers=(5,)),
)
IDENTITY = {"model": "toy", "family": "flux", "probes": [{"concepts": ["cat", "grass"]}]}
LAYOUT = Layout(VARIABLES, SIZES, COORDS, {"identity": IDENTITY, "time": "now"})
CONCEPTS = ("cat", "grass")


def sample(index: int, **changes: Any) -> Sample:
    return dataclasses.replace(
        Sample(f"a cat №{index}", index, ("▁a", "▁cat", "</s>"), CONCEPTS),
        **changes,
    )


def bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, cut off."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def record(name: str, slot: int, step: int, layer: int, layout: Layout = LAYOUT) -> np.ndarray:
    variable = next(variable for variable in layout.variables if variable.name == name)
    random = np.random.default_rng([len(name), slot, step, layer])
    values = random.normal(size=[layout.sizes[dim] for dim in variable.dims])
    return bits(values) if variable.dtype == "bfloat16" else values.astype(variable.dtype)


def plan(layout: Layout = LAYOUT) -> list[tuple[str, int, int]]:
    every = layout.coords["step"][1].tolist()
    return [
        (variable.name, step, layer)
        for step in every
        for variable in layout.variables
        for layer in variable.layers or ()
        if step in (every if variable.steps is None else variable.steps)
    ]


def fill(writer: store.Writer, samples: list[Sample], *, stop: int | None = None) -> tuple[int, ...]:
    slots = writer.claim(samples)
    for slot in slots:
        for name, step, layer in plan(writer.layout)[:stop]:
            writer.write(name, record(name, slot, step, layer, writer.layout), sample=slot, step=step, layer=layer)
    if stop is None:
        writer.finish(slots)
    return slots


def whole(target: Any, count: int = 2, **arguments: Any) -> store.Writer:
    writer = store.create(target, LAYOUT, **arguments)
    for index in range(count):
        fill(writer, [sample(index)])
    writer.close()
    return writer


def missing(opened: Any) -> xr.Dataset:
    with pytest.warns(IncompleteWarning):
        return store.open(opened)


def hide(path: Path, name: str) -> None:
    """Leave a store as a kill does between making an array and showing it to readers."""
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    del metadata["consolidated_metadata"]["metadata"][name]
    file.write_text(json.dumps(metadata))
