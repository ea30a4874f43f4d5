"""The numbers of a run, a row a method and image, in memory and in their Zarr group.

A group can be continued at any time, by whatever it was stopped: ``scored`` of an image is written after its numbers,
and methods are in it once the attribute ``methods`` names them.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dit_probe import protocols
from dit_probe.datasets.samples import Dataset
from dit_probe.metrics import COUNTS
from dit_probe.protocols import RANKING, THRESHOLDED, EvaluationError, Protocol
from dit_probe.store import location

Method = Callable[[list[np.ndarray], list[str]], xr.DataArray]

FORMAT = "dit-probe-evaluation"
IMAGES_PER_CHUNK = 64  # a file for every number of every image would be 60,000 of them
_IN_STORE = {"name": "image"}  # a label of its dim, where xarray cannot write into labels
_LIBRARIES = ("dit-probe", "numpy", "xarray", "torch", "diffusers", "transformers")


def empty(methods: Mapping[str, Method], dataset: Dataset, protocol: Protocol) -> xr.Dataset:
    """The table before anything is known: what `evaluate` returns, with ``name`` (image) and ``scored``."""
    classes = [protocols.BACKGROUND, *(word for word in dataset.vocabulary if word != protocols.BACKGROUND)]
    labels = {"threshold": protocol.labels, "count": list(COUNTS), "class": classes}
    shape = {"method": len(methods), "image": len(dataset)}

    def column(value: Any, dtype: Any, *dims: str) -> xr.Variable:
        sizes = [*shape.values(), *(len(labels[dim]) for dim in dims)]
        return xr.Variable((*shape, *dims), np.full(sizes, value, dtype))

    variables = {name: column(np.nan, float) for name in (*RANKING, "miou")}
    variables |= {name: column(np.nan, float, "threshold") for name in THRESHOLDED}
    variables |= {"counts": column(np.nan, float, "threshold", "count")}
    variables |= {name: column(np.nan, float, "class") for name in ("intersection", "union")}
    variables |= {"failed": column("", object), "scored": column(False, bool)}
    texts = {name: ("image", np.full(len(dataset), "", object)) for name in ("name", "target")}
    facts = {
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint, "images": len(dataset)},
        "protocol": asdict(protocol),
        "methods": {name: _description(method) for name, method in methods.items()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    attrs = {"format": FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}}
    coords = {**labels, "method": list(methods), **texts}
    return xr.Dataset(variables, coords, attrs)


def _description(method: Method) -> str:
    describe = getattr(method, "describe", None)
    if callable(describe):
        return str(describe())
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"


def opened(store: Any, table: xr.Dataset, resume: bool) -> tuple[zarr.Group, list[int]]:
    """The group to write to and the methods' rows in it; what these hold already is read into the table.

    Raises:
        EvaluationError: something else is there, or numbers of another evaluation.
    """
    place = location.locate(store)
    found = location.find(place)
    where = location.text(place)
    if isinstance(found, str) or (found is not None and found.attrs.get("format") != FORMAT):
        what = found if isinstance(found, str) else "a Zarr group of something else"
        raise EvaluationError(
            f"{where} is {what}, not the store of an evaluation; nothing was written. Use another path"
        )
    if found is None or not resume:
        return _created(place, table), list(range(table.sizes["method"]))
    lines = [f"{name}: none in the store" for name in _rows(table) if _IN_STORE.get(name, name) not in found]
    for name in ("dataset", "protocol", "methods"):
        here, there = json.loads(table.attrs[name]), json.loads(str(found.attrs.get(name, "{}")))
        lines += [
            f"{name} {key}: {there.get(key, 'none')} in the store, {here.get(key, 'none')} now"
            for key in {**there, **here}
            if there.get(key) != here.get(key) and not (name == "methods" and (key not in here or key not in there))
        ]
    if lines:
        differences = "\n  ".join(lines)
        raise EvaluationError(
            f"{where} is of another evaluation:\n  {differences}\nUse another path, or resume=False to start over."
        )
    group = zarr.open_group(place, mode="r+", use_consolidated=False)
    here, there = (json.loads(str(attrs["methods"])) for attrs in (table.attrs, found.attrs))
    methods = {**there, **here}
    if len(methods) > len(there):
        _lengthen(place, group, table, methods)
    rows = [list(methods).index(name) for name in here]
    for name in _rows(table):
        array: Any = group[_IN_STORE.get(name, name)]
        table[name].values[...] = array.oindex[rows] if "method" in table[name].dims else array[...]
    for name, variable in table.data_vars.items():
        if variable.dtype.kind == "f":  # what a run was writing when it was stopped is no number yet
            table[name] = variable.where(table.scored)
    table.attrs["versions"] = found.attrs["versions"]
    return group, rows


def _created(place: Any, table: xr.Dataset) -> zarr.Group:
    group = zarr.create_group(place, overwrite=True, attributes={**table.attrs, "coordinates": "target"})
    for name, variable in table.variables.items():
        text = variable.dtype.kind in "OUT"
        sizes = dict(variable.sizes)
        array = group.create_array(
            _IN_STORE.get(str(name), str(name)),
            shape=variable.shape,
            chunks=tuple(min(IMAGES_PER_CHUNK, size) if dim == "image" else size for dim, size in sizes.items()),
            dtype="string" if text else variable.dtype,
            fill_value="" if text else False if variable.dtype == bool else np.nan,
            dimension_names=[str(dim) for dim in variable.dims],
        )
        if "image" not in variable.dims:
            array[...] = variable.values.astype(np.dtypes.StringDType())
    location.commit(place)
    return zarr.open_group(place, mode="r+", use_consolidated=False)


def _lengthen(place: Any, group: zarr.Group, table: xr.Dataset, methods: Mapping[str, str]) -> None:
    """Make room for more methods at the end; a run that is stopped in here leaves empty rows, for the next to name."""
    for name, variable in table.variables.items():
        if "method" in variable.dims:
            array: Any = group[str(name)]
            array.resize((len(methods), *array.shape[1:]))
    names: Any = group["method"]
    names[...] = np.array(list(methods), np.dtypes.StringDType())
    location.commit(place)
    # Opened anew, as the attributes are written together with the lengths that were just committed.
    zarr.open_group(place, mode="r+").update_attributes({"methods": json.dumps(methods)})


def _rows(table: xr.Dataset) -> list[str]:
    """Names of what has a row an image; ``scored``, which makes the row count, last."""
    return sorted((str(name) for name, v in table.variables.items() if "image" in v.dims), key=lambda n: n == "scored")


def write(group: zarr.Group, rows: list[int], table: xr.Dataset, at: int | Sequence[int]) -> None:
    """Store the numbers of one image or several, of the methods in the table at their rows in the group."""
    images = np.atleast_1d(at)
    for name in _rows(table):
        array: Any = group[_IN_STORE.get(name, name)]
        of_methods = "method" in table[name].dims
        values = table[name].values[:, images] if of_methods else table[name].values[images]
        values = values.astype(np.dtypes.StringDType()) if values.dtype == object else values
        array.oindex[(rows, images) if of_methods else images] = values
