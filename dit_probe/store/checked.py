"""Reading records so that a damaged one is named: a chunk that was cut short, has a flipped bit, or is missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dit_probe.errors import StoreError
from dit_probe.store import chunks, encoding, location
from dit_probe.store.records import LEADING, where


class Records:
    """An array of a store as `dask.array.from_array` takes it; what it cannot read it names.

    Args:
        array: the Zarr array.
        place: the store, in words.
        labels: dim to labels, for each of the leading dims.
        convert: what becomes of the numbers that were read.
        dtype: after that.
    """

    def __init__(
        self,
        array: Any,
        place: str,
        labels: Mapping[str, Sequence[Any]],
        convert: Callable[[np.ndarray], np.ndarray] | None = None,
        dtype: Any = None,
    ) -> None:
        self.array, self._place, self._convert = array, place, convert
        self.dims = tuple(array.metadata.dimension_names)
        self._labels = {dim: labels.get(dim, range(size)) for dim, size in zip(self.dims, array.shape, strict=True)}
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype if dtype is None else np.dtype(dtype)

    def __getitem__(self, index: Any) -> Any:
        try:
            values = chunks.read(self.array, index)
        except Exception as error:
            name, error = self._culprit(index) or (self._name(index), error)
            raise StoreError(
                f"{name} of {self._place} cannot be read: {type(error).__name__}: {error}. The chunk is "
                "damaged; all others can be read. Trace this sample again, or leave it out"
            ) from error
        return values if self._convert is None else self._convert(np.asarray(values))

    def _culprit(self, index: Any) -> tuple[str, Exception] | None:
        """Which of several records cannot be read, and why."""
        leading = [dim for dim in self.dims if dim == "sample" or dim in LEADING]
        parts = index if isinstance(index, tuple) else (index,)
        asked = dict(zip(self.dims, parts, strict=False))
        chosen = [np.atleast_1d(np.arange(len(self._labels[dim]))[asked.get(dim, slice(None))]) for dim in leading]
        for record in itertools.product(*chosen):
            try:
                chunks.read(self.array, (*map(int, record), *(slice(None) for _ in self.dims[len(record) :])))
            except Exception as error:
                return self._name(record), error
        return None

    def _name(self, index: Any) -> str:
        index = index if isinstance(index, tuple) else (index,)
        found: dict[str, Any] = {}
        for dim, part in zip(self.dims, index, strict=False):
            if dim == "sample" or dim in LEADING:
                chosen = np.atleast_1d(np.asarray(self._labels[dim])[part]).tolist()
                found[dim] = chosen[0] if len(chosen) == 1 else f"{chosen[0]}-{chosen[-1]}"
        return f"{self.array.basename!r} at {where(**found)}"

    def damaged(self, samples: Sequence[int]) -> Iterator[str]:
        """Planned records of these samples that cannot be read or are not there, in words."""
        attrs = self.array.attrs
        dims = [dim for dim in self.dims if dim in LEADING]
        chosen = [
            [at for at, label in enumerate(self._labels[dim]) if label in set(attrs.get(f"{dim}s", self._labels[dim]))]
            for dim in dims
        ]
        for sample in samples:
            for cell in np.ndindex(*map(len, chosen)):
                index = (sample, *(places[at] for places, at in zip(chosen, cell, strict=True)))
                try:
                    values = self[index]
                except StoreError as error:
                    yield str(error).partition(". The chunk")[0]
                    continue
                # Writers refuse what is not finite, so a NaN is the fill value of a chunk that is not there.
                if values.dtype.kind == "f" and np.isnan(values).any():
                    yield f"{self._name(index)} of {self._place} is missing"


def damaged(store: Any) -> list[str]:
    """Read every record of every complete sample, and say which are damaged: checksums that do not fit, missing files.

    Args:
        store: path, URL, or any store that Zarr accepts.

    Returns:
        One line for each, naming the variable, sample, step and layer; empty if all is well.

    Raises:
        StoreError: as `open`.

    Example:
        >>> from dit_probe import store
        >>> from dit_probe.schema import Layout, Sample, Variable
        >>> layout = Layout((Variable("c", ("width",), "float32", (0,)),), {"step": 1, "layer": 1, "width": 2}, {})
        >>> writer = store.create("run.zarr", layout)
        >>> slots = writer.claim([Sample("a cat")])
        >>> writer.write("c", np.ones(2, np.float32), sample=0, step=0, layer=0)
        >>> writer.finish(slots)
        >>> writer.close()
        >>> store.damaged("run.zarr")
        []
        >>> from pathlib import Path
        >>> _ = Path("run.zarr/c/c.0.0.0.0").write_bytes(b"")
        >>> store.damaged("run.zarr")
        ["'c' at sample 0, step 0, layer 0 of run.zarr cannot be read: ..."]
    """
    place, group = location.require(store)
    done = [slot for slot, complete in enumerate(location.done(group)) if complete]
    found = records(location.text(place), group)
    return [line for array in found.values() for line in array.damaged(done)]


def records(place: str, group: Any) -> dict[str, Records]:
    """The variables of a store and its tokens, by name; bfloat16 becomes float32, text Python's."""
    arrays = dict(group.arrays())
    labels = {dim: arrays[dim][:].tolist() for dim in LEADING if dim in arrays}
    found: dict[str, Records] = {}
    for name, array in arrays.items():
        if name == "token":
            found[name] = Records(array, place, labels, _objects, object)
        elif array.attrs.get("dtype") == "bfloat16":
            found[name] = Records(array, place, labels, encoding.float32, np.float32)
        elif "dtype" in array.attrs:
            found[name] = Records(array, place, labels)
    return found


def _objects(strings: np.ndarray) -> np.ndarray:
    return strings.astype(object)
