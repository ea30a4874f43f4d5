"""Open a trace: lazily, with names for concepts, exact bfloat16, and a word about what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from zarr.storage import StorePath

from dit_probe.errors import IncompleteWarning
from dit_probe.store import encoding, location
from dit_probe.store.records import LEADING, where

SHOWN = 4


def open(store: Any) -> xr.Dataset:
    """The trace in a store, lazily read: one dask chunk is one (sample, step, layer).

    bfloat16 becomes float32, exactly. Where all samples have the same concepts, their names are the coordinate
    ``concept``; otherwise ``concept_name`` (sample, concept) says which they are.

    Args:
        store: path, fsspec URL, or any store that Zarr accepts.

    Raises:
        StoreError: nothing is there, or it is no dit-probe store, or one of a newer version.

    Warns:
        IncompleteWarning: the recording of some samples was cut short.
    """
    place, group = location.require(store)
    # xarray looks for consolidated metadata at the root of the Zarr store only, this group has its own.
    consolidated = not place.path and group.metadata.consolidated_metadata is not None
    ds = xr.open_zarr(place.store, group=place.path or None, consolidated=consolidated, chunks={})
    planned = {str(name): dict(array.attrs) for name, array in ds.data_vars.items() if "layers" in array.attrs}
    for name, variable in list(ds.variables.items()):
        data: Any = variable.data
        if variable.attrs.get("dtype") == "bfloat16":
            ds[name] = (variable.dims, data.map_blocks(encoding.float32, dtype=np.float32), variable.attrs)
        elif name == "token":
            # Long and rarely looked at: stays lazy, as Python strings.
            ds = ds.assign_coords(token=(variable.dims, data.map_blocks(_objects, dtype=object), variable.attrs))
        elif variable.dtype.kind == "T":
            names = np.array(variable.values.tolist(), dtype=str).reshape(variable.shape)
            ds = ds.assign_coords({name: (variable.dims, names, variable.attrs)})
        elif name in ds.coords or name == "done":
            ds[name].load()
    if "concept_name" in ds:
        names = np.unique(ds.concept_name.values, axis=0)
        if len(names) == 1 and all(names[0]):
            ds = ds.drop_vars("concept_name").assign_coords(concept=names[0])
        elif "concept" not in ds.coords:
            ds = ds.assign_coords(concept=np.arange(ds.sizes["concept"]))
    done = ds.done.values if "done" in ds else np.zeros(0, bool)
    if not done.all() or not done.size:
        warnings.warn(_incomplete(place, done, ds, planned), IncompleteWarning, stacklevel=2)
    return ds


def info(store: Any) -> dict[str, Any]:
    """What is in a store, without opening it as a dataset.

    Returns:
        ``sizes`` (dim to length), ``done`` and ``incomplete`` (slots), ``variables`` (name to ``dims``, ``shape``,
        ``dtype``, ``layers``, ``steps``, and ``bytes`` in the store), ``bytes`` (of all of it), ``identity``,
        ``attrs``.

    Raises:
        StoreError: as `open`.
    """
    place, group = location.require(store)
    done = location.done(group)
    variables: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, array in sorted(group.arrays()):
        metadata: Any = array.metadata
        dims = tuple(metadata.dimension_names or ())
        sizes |= dict(zip(dims, array.shape, strict=True))
        if "dtype" in array.attrs:
            facts = {key: array.attrs[key] for key in ("dtype", "layers", "steps") if key in array.attrs}
            variables[name] = {"dims": dims, "shape": array.shape, **facts, "bytes": location.nbytes(place, name)}
    attrs: dict[str, Any] = dict(group.attrs)
    return {
        "sizes": sizes,
        "done": [slot for slot, complete in enumerate(done) if complete],
        "incomplete": [slot for slot, complete in enumerate(done) if not complete],
        "variables": variables,
        "bytes": location.nbytes(place),
        "identity": attrs.get("identity", {}),
        "attrs": {name: value for name, value in attrs.items() if name not in ("identity", "coordinates")},
    }


def _objects(strings: np.ndarray) -> np.ndarray:
    return strings.astype(object)


def _incomplete(place: StorePath, done: np.ndarray, ds: xr.Dataset, planned: Mapping[str, Mapping[str, Any]]) -> str:
    """What is missing, in words; lists the chunks of the first incomplete samples only."""
    if not done.size:
        return f"{location.text(place)} holds no sample: its recording ended before the first step"
    slots = np.flatnonzero(~done)
    parts: list[str] = []
    for slot in slots[:SHOWN]:
        count, lost = 0, []
        for name, attrs in planned.items():
            wanted, missing = _records(place, ds[name], slot, attrs)
            count += wanted
            lost += missing
        parts.append(f"sample {slot} lacks {len(lost)} of {count} records" + (f", first {lost[0]}" if lost else ""))
    more = f"; and {len(slots) - SHOWN} more" if len(slots) > SHOWN else ""
    return (
        f"{len(slots)} of {len(done)} samples of {location.text(place)} are incomplete: {'; '.join(parts)}{more}. The "
        f"same run on the same path completes them; ds.isel(sample=ds.done.values) leaves them out."
    )


def _records(place: StorePath, array: xr.DataArray, slot: int, attrs: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Number of planned records of a variable in one slot, and those without a chunk, in words."""
    dims = [dim for dim in LEADING if dim in array.dims]
    # A chunk's key is sample/[branch/]step/layer/0/0…; anything else is a temporary file of a write that was cut short.
    zeros = ["0"] * (array.ndim - len(dims) - 1)
    parts = [key.split("/") for key in location.keys(place, f"{array.name}/c/{slot}")]
    present = {tuple(part[: len(dims)]) for part in parts if part[len(dims) :] == zeros}
    labels = [array[dim].values.tolist() for dim in dims]
    chosen = [set(attrs.get(f"{dim}s", labels[at])) for at, dim in enumerate(dims)]
    count, missing = 0, []
    for index in np.ndindex(*map(len, labels)):
        record = [labels[at][position] for at, position in enumerate(index)]
        if all(label in chosen[at] for at, label in enumerate(record)):
            count += 1
            if tuple(map(str, index)) not in present:
                missing.append(f"{array.name!r} at {where(**dict(zip(dims, record, strict=True)))}")
    return count, missing
