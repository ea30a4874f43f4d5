"""Open a trace: lazily, with names for concepts, exact bfloat16, and a word about what is missing."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import xarray as xr
from zarr.storage import StorePath

from dit_probe.errors import IncompleteWarning
from dit_probe.store import checked, location, lock
from dit_probe.store.records import LEADING, where

SHOWN = 4
MOST, TOGETHER = 100_000, 2**26
"""Chunks of a variable that dask is given one by one; bytes that it is given together where there are more."""
TEXT = 2**26
"""Characters of a label that are kept as text of one length."""


def open(store: Any) -> xr.Dataset:
    """The trace in a store, lazily read: one dask chunk is one (sample, step, layer), or 64 MiB of 100,000 and more.

    bfloat16 becomes float32, exactly. Where all samples have the same concepts, their names are the coordinate
    ``concept``; otherwise ``concept_name`` (sample, concept) says which they are.

    Args:
        store: path, fsspec URL, or any store that Zarr accepts.

    Raises:
        StoreError: nothing is there, or it is no dit-probe store, or one of a newer version, or it asks for more
            memory than `dit_probe.store.limits` gives. When values are computed: a record is damaged, by its name.

    Warns:
        IncompleteWarning: the recording of some samples was cut short.
    """
    place, group = location.require(store)
    # xarray looks for consolidated metadata at the root of the Zarr store only, this group has its own.
    consolidated = not place.path and group.metadata.consolidated_metadata is not None
    ds = xr.open_zarr(place.store, group=place.path or None, consolidated=consolidated, chunks=None)
    ds = ds.drop_vars("content", errors="ignore")  # what runs are continued by
    records = checked.records(location.text(place), group)
    planned = {name: array for name, array in records.items() if "layers" in array.array.attrs}
    for name, variable in list(ds.variables.items()):
        if name in records:
            ds[name] = (variable.dims, _lazy(str(name), records[str(name)]), variable.attrs)
        elif variable.dtype.kind in "OT":
            names: Any = np.array(variable.values.tolist(), dtype=object).reshape(variable.shape)
            # Of one length each, unless one long text among a million others would take gigabytes.
            longest = max(map(len, names.flat), default=1)
            names = names.astype(str) if longest * names.size < TEXT else names
            ds = ds.assign_coords({name: (variable.dims, names, variable.attrs)})
        elif name in ds.coords or name == "done":
            ds[name].load()
    if "concept_name" in ds:
        names = ds.concept_name.values
        if len(names) and all(names[0]) and (names == names[:1]).all():
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
        ``sizes`` (dim to length), ``done`` and ``incomplete`` (slots), ``failed`` (slot to reason, of the incomplete
        ones), ``variables`` (name to ``dims``, ``shape``, ``dtype``, ``layers``, ``steps``, and ``bytes`` in the
        store), ``bytes`` and ``files`` (of all of it), ``identity``, ``attrs``, and ``resume``: in words, whether the
        run could go on here and now.

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
    reasons: Any = group["failed"] if "failed" in group else np.zeros(len(done), str)
    failed = {slot: reason for slot, reason in enumerate(reasons[:].tolist()) if reason and not done[slot]}
    return {
        "sizes": sizes,
        "done": [slot for slot, complete in enumerate(done) if complete],
        "incomplete": [slot for slot, complete in enumerate(done) if not complete],
        "failed": failed,
        "variables": variables,
        "bytes": location.nbytes(place),
        "files": len(location.keys(place, "")),
        "resume": _resume(place, "failed" in group, len(done) - sum(done) - len(failed), len(failed), attrs),
        "identity": attrs.get("identity", {}),
        "attrs": {name: value for name, value in attrs.items() if name not in ("identity", "coordinates")},
    }


def _lazy(name: str, records: checked.Records) -> da.Array:
    """As dask array."""
    meta = np.empty((0,) * records.ndim, records.dtype)
    return da.from_array(records, _chunks(records), name=f"{name}-{uuid4().hex}", meta=meta, inline_array=True)


def _chunks(records: checked.Records) -> Any:
    """One dask chunk a record; where those are too many for dask's graphs, as many neighbours as are read at once."""
    chunks, shape = list(records.array.chunks), records.shape
    if math.prod(-(-size // part) for size, part in zip(shape, chunks, strict=True)) <= MOST:
        return tuple(chunks)
    for dim in reversed(range(records.ndim)):
        fit = TOGETHER // (math.prod(chunks) * records.dtype.itemsize)
        chunks[dim] = max(chunks[dim], min(shape[dim], fit * chunks[dim]))
    return tuple(chunks)


def _resume(place: StorePath, room: bool, pending: int, failed: int, attrs: Mapping[str, Any]) -> str:
    """Whether a run on this store could go on, and how."""
    if lock.held(place):
        return "no: somebody is writing it"
    if not pending and not failed:
        return "nothing is left to do"
    here = {}
    for name in attrs.get("versions", {}):
        with contextlib.suppress(PackageNotFoundError):
            here[name] = version(name)
    other = [
        f"{name} {here[name]}, then {old}"
        for name, old in attrs.get("versions", {}).items()
        if here.get(name, old) != old
    ]
    how = "trace_dataset on the same path" if room else "the same run on the same path"
    again = f"; {failed} failed ones with retry=True" if failed else ""
    now = f" (installed now: {'; '.join(other)})" if other else ""
    return f"yes: {how} makes {pending} samples{again}{now}"


def _incomplete(place: StorePath, done: np.ndarray, ds: xr.Dataset, planned: Mapping[str, checked.Records]) -> str:
    """What is missing, in words; lists the chunks of the first incomplete samples only."""
    if not done.size:
        return f"{location.text(place)} holds no sample: its recording ended before the first step"
    slots = np.flatnonzero(~done)
    if "failed" in ds:  # a slot for every sample from the start: those that nobody came to are not worth a word each
        reasons = ds.failed.values
        failed = [slot for slot in slots if reasons[slot]]
        first = "".join(f", sample {slot}: {reasons[slot]}" for slot in failed[:1])
        return (
            f"{len(slots)} of {len(done)} samples of {location.text(place)} are incomplete, {len(failed)} of them "
            f"because they failed{first}. trace_dataset on the same path completes the others; "
            "ds.isel(sample=ds.done.values) leaves them out."
        )
    present = {name: set(location.keys(place, name)) for name in planned}
    parts: list[str] = []
    for slot in slots[:SHOWN]:
        records = [record for name, array in planned.items() for record in _records(ds[name], array.array, slot)]
        lost = [text for name, key, text in records if key not in present[name]]
        parts.append(
            f"sample {slot} lacks {len(lost)} of {len(records)} records" + (f", first {lost[0]}" if lost else "")
        )
    more = f"; and {len(slots) - SHOWN} more" if len(slots) > SHOWN else ""
    return (
        f"{len(slots)} of {len(done)} samples of {location.text(place)} are incomplete: {'; '.join(parts)}{more}. The "
        f"same run on the same path completes them; ds.isel(sample=ds.done.values) leaves them out."
    )


def _records(labelled: xr.DataArray, array: Any, slot: int) -> Iterator[tuple[str, str, str]]:
    """Planned records of a variable in one slot: its name, the chunk's key below it, and where it is, in words."""
    dims = [dim for dim in LEADING if dim in labelled.dims]
    labels = [labelled[dim].values.tolist() for dim in dims]
    chosen = [set(array.attrs.get(f"{dim}s", labels[at])) for at, dim in enumerate(dims)]
    for index in np.ndindex(*map(len, labels)):
        record = [labels[at][position] for at, position in enumerate(index)]
        if all(label in chosen[at] for at, label in enumerate(record)):
            place = (slot, *index, *(0 for _ in array.shape[len(index) + 1 :]))
            at = where(**dict(zip(dims, record, strict=True)))
            yield str(labelled.name), array.metadata.encode_chunk_key(place), f"{str(labelled.name)!r} at {at}"
