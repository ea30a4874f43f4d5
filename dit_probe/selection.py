"""Which variables, layers, steps and heads of a trace a computation reads, and what to say where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dit_probe.errors import MapError

Labels = int | Sequence[int] | None
"""One label, several in the order wanted, or None for all that were recorded."""


@dataclass(frozen=True)
class Selection:
    """Variables restricted to the layers and steps at which all of them were recorded.

    Attributes:
        arrays: one per variable of the candidate chosen.
        layers: layer labels, in the order asked for.
        steps: step labels.
    """

    arrays: list[xr.DataArray]
    layers: list[Any]
    steps: list[Any]


def select(
    ds: xr.Dataset, candidates: Sequence[tuple[str, ...]], layers: Labels, steps: Labels, *, purpose: str, fix: str
) -> Selection:
    """Choose the candidate recorded at most of the (step, layer) asked for, and restrict it to them.

    Args:
        ds: a trace.
        candidates: sets of variables that would each do; earlier ones win ties, empty ones are left out.
        layers: layer labels; None: all at which every variable of the set was recorded.
        steps: step labels; None: likewise.
        purpose: what they are for, in the words of the caller's arguments.
        fix: what to trace again with when no set is there.

    Raises:
        MapError: no set of variables is complete, or a label was not recorded.

    Example:
        >>> ds = xr.Dataset({"o_x": (("step", "layer"), np.ones((2, 3)), {"layers": [0, 2]})})
        >>> select(ds, [("o_x",)], None, 1, purpose="this example", fix="o_x").layers
        [0, 2]
    """
    candidates = [names for names in candidates if names]
    present = [names for names in candidates if all(name in ds for name in names)]
    if not present:
        ways = ", or ".join(" and ".join(map(repr, names)) for names in candidates)
        found = ", ".join(map(str, ds.data_vars)) or "no variables"
        raise MapError(f"{purpose} needs {ways}; the dataset has {found}. Trace again with {fix}")

    def cells(names: tuple[str, ...]) -> int:
        count = 1
        for dim, wanted in (("layer", layers), ("step", steps)):
            recorded = _recorded(ds, names, dim)
            count *= sum(label in recorded for label in _listed(wanted, recorded))
        return count

    names = max(present, key=cells)
    chosen = {
        dim: _pick(dim, wanted, _recorded(ds, names, dim), _labels(ds[names[0]], dim), " and ".join(names))
        for dim, wanted in (("layer", layers), ("step", steps))
    }
    arrays = [_take(_take(ds[name], "layer", chosen["layer"]), "step", chosen["step"]) for name in names]
    return Selection(arrays, chosen["layer"], chosen["step"])


def select_heads(arrays: Sequence[xr.DataArray], heads: Any) -> list[xr.DataArray]:
    """Restrict arrays to some of their heads.

    Raises:
        MapError: no such head, or none asked for.

    Example:
        >>> select_heads([xr.DataArray([1.0, 2.0, 3.0], dims="head")], [2, 0])[0].values.tolist()
        [3.0, 1.0]
    """
    known = _labels(arrays[0], "head")
    chosen = _pick("head", heads, known, known, " and ".join(str(array.name) for array in arrays))
    return [_take(array, "head", chosen) for array in arrays]


def _labels(array: xr.DataArray, dim: str) -> list[Any]:
    """Labels of a dim: its coordinate, else positions; a dim that was selected away has the one label left."""
    if dim in array.coords:
        return np.atleast_1d(array[dim].values).tolist()
    return list(range(array.sizes.get(dim, 1)))


def _recorded(ds: xr.Dataset, names: tuple[str, ...], dim: str) -> list[Any]:
    """Labels at which all of the variables were recorded, as their attrs say; elsewhere they hold NaN."""
    sets = []
    for name in names:
        recorded = ds[name].attrs.get(f"{dim}s")
        sets.append(_labels(ds[name], dim) if recorded is None else np.atleast_1d(recorded).tolist())
    return [label for label in _labels(ds[names[0]], dim) if all(label in found for found in sets)]


def _listed(wanted: Any, every: list[Any]) -> list[Any]:
    return list(every) if wanted is None else np.atleast_1d(np.asarray(wanted)).tolist()


def _pick(dim: str, wanted: Any, recorded: list[Any], known: list[Any], variables: str) -> list[Any]:
    """The labels asked for, all of them recorded."""
    chosen = _listed(wanted, recorded)
    refused = [label for label in chosen if label not in recorded]
    if refused:
        why = "was not recorded" if all(label in known for label in refused) else "does not exist"
        there = ", ".join(map(str, recorded)) or "none"
        retry = "" if dim == "head" else f", or trace again with {dim}s={chosen}"
        raise MapError(
            f"{dim} {', '.join(map(str, refused))} {why} for {variables}; there are: {there}. Ask for those{retry}"
        )
    if not chosen:
        raise MapError(
            f"no {dim} to read for {variables}: "
            + ("they were recorded at none in common" if wanted is None else f"{dim}s={wanted!r} is empty")
            + f"; the dataset has {dim} {', '.join(map(str, known))}. Ask for at least one of those"
        )
    if len(set(chosen)) < len(chosen):
        raise MapError(f"{dim}s={chosen} names one twice, which would count double in the mean. Name each once")
    return chosen


def _take(array: xr.DataArray, dim: str, labels: list[Any]) -> xr.DataArray:
    every = _labels(array, dim)
    # Indexing with a list copies, so what is wanted whole is left alone.
    if dim not in array.dims or every == labels:
        return array
    return array.isel({dim: [every.index(label) for label in labels]})
