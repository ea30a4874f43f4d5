"""Make the arrays of a trace, or find those of an interrupted one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore, StorePath

from dit_probe.errors import StoreError
from dit_probe.schema import FORMAT, FORMAT_VERSION, Layout, Variable
from dit_probe.store import identity, location
from dit_probe.store.byte_queue import QUEUE_BYTES, THREADS, ByteQueue
from dit_probe.store.encoding import CHECKSUM, CONFIG, FILL, LABELS, STORED, compressors
from dit_probe.store.lock import Lock
from dit_probe.store.reading import open
from dit_probe.store.records import LEADING, unwritten
from dit_probe.store.reserved import Reserved
from dit_probe.store.writer import Writer

LABELS_PER_CHUNK = 64
KEYS: Any = {"name": "default", "separator": "."}
"""Names of records without a directory for each token dim, which would take longer to make than the file in it."""


def create(
    store: Any, layout: Layout, *, mode: str | None = None, queue_bytes: int = QUEUE_BYTES, threads: int = THREADS
) -> Writer:
    """Make a store for a trace, or continue one.

    Args:
        store: path, URL, any store that Zarr or obstore has, or ``None`` for memory; or `Reserved` slots of one.
        layout: dims, variables and coordinates of the trace; its attribute ``identity`` (a dict) is what two runs
            must share to be in one store, the other attributes are kept from the first run.
        mode: ``None`` makes a store or completes an interrupted one; ``"a"`` appends samples; ``"w"`` overwrites.
        queue_bytes: bytes that wait to be written before the caller is held back.
        threads: writer threads.

    Raises:
        StoreError: something else is there, the store is complete and `mode` is None, it is of another run, or another
            process writes it.

    Example:
        >>> from dit_probe.schema import Sample
        >>> layout = Layout(
        ...     (Variable("o_c", ("concept", "head", "head_dim"), "float32", layers=(0,)),),
        ...     sizes={"step": 1, "layer": 2, "concept": 2, "head": 1, "head_dim": 4},
        ...     coords={"step": (("step",), np.arange(1)), "layer": (("layer",), np.arange(2))},
        ... )
        >>> writer = create(None, layout)
        >>> slots = writer.claim([Sample("a cat on grass", concepts=("cat", "grass"))])
        >>> writer.write("o_c", np.ones((2, 1, 4), np.float32), sample=slots[0], step=0, layer=0)
        >>> writer.finish(slots)
        >>> writer.close()
        >>> float(writer.dataset().o_c.sel(concept="cat", layer=0).sum())
        4.0
    """
    if mode not in (None, "a", "w"):
        raise StoreError(f"mode={mode!r}: it is None (create or complete), 'a' (append samples) or 'w' (overwrite)")
    if isinstance(store, Reserved):
        return store.writer(layout)
    place = location.locate(store)
    found = location.find(place)
    if isinstance(found, str):
        raise StoreError(
            f"{location.text(place)} is {found}, not a dit-probe store; nothing was overwritten. Use another path."
        )
    lock, group, count, start = Lock(place), None, 0, 0
    try:
        found: Any = location.find(place)  # once more: a writer may have ended in between
        if found is not None and mode != "w":
            location.check_format(found, place)
            # Without samples there is nothing to continue: a run that ended before its first step, whatever its layout.
            if done := location.done(found):
                if mode is None and all(done):
                    raise StoreError(
                        f"store exists: {location.text(place)} is complete ({len(done)} samples). "
                        f"mode='a' appends samples, mode='w' overwrites."
                    )
                group, count, start = _continue(place, layout), len(done), len(done) if mode == "a" else 0
        if group is None:
            group = make(place, layout)
            location.commit(place)
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise unwritten(location.text(place), error) from error
        raise
    return Writer(
        layout,
        group,
        add=new_array,
        commit=lambda: location.commit(place),
        reader=lambda: open(place),
        count=count,
        start=start,
        queue=ByteQueue(queue_bytes, threads),
        release=lock.release,
    )


def new_array(group: zarr.Group, layout: Layout, variable: Variable, samples: int, shard: int = 0) -> Any:
    """The empty array of one variable; a file is one record, or all those of `shard` samples."""
    dims, shape = layout.dims(variable), layout.shape(variable, samples)
    return group.create_array(
        variable.name,
        shape=shape,
        chunks=tuple(1 if dim in ("sample", *LEADING) else max(1, size) for dim, size in zip(dims, shape, strict=True)),
        chunk_key_encoding=KEYS,
        shards=(shard, *(max(1, size) for size in shape[1:])) if shard else None,
        dtype=STORED[variable.dtype],
        fill_value=FILL[variable.dtype],
        compressors=None if isinstance(group.store, MemoryStore) else compressors(variable.dtype),
        dimension_names=dims,
        attributes=identity.variable_attrs(layout, variable),
        config=CONFIG,
    )


def make(place: StorePath, layout: Layout, samples: int = 0, block: int = LABELS_PER_CHUNK, shard: int = 0) -> Any:
    """The group with every array, all samples empty; what is there is deleted.

    Args:
        place: where.
        layout: of the trace.
        samples: slots. Labels of a reserved slot say its status, too.
        block: samples whose labels share a chunk; tokens may have smaller ones.
        shard: samples whose records share a file.
    """
    labels: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "prompt": (("sample",), {"dtype": "string", "fill_value": ""}),
        "seed": (("sample",), {"dtype": "int64", "fill_value": -1}),
        "done": (("sample",), {"dtype": "bool", "fill_value": False}),
        "token": (("sample", "prompt_token"), {"dtype": "string", "fill_value": ""}),
        "concept_name": (("sample", "concept"), {"dtype": "string", "fill_value": ""}),
    }
    if samples:
        status = (("sample",), {"dtype": "string", "fill_value": ""})
        labels |= {"failed": status, "content": status}
    labels = {name: (dims, kind) for name, (dims, kind) in labels.items() if all(map(layout.sizes.get, dims[1:]))}
    coordinates = sorted({*layout.coords, *labels} - {*layout.sizes, "done"})
    attrs = {**layout.attrs, "format": FORMAT, "format_version": FORMAT_VERSION, "coordinates": " ".join(coordinates)}
    location.clear(place)
    group = zarr.create_group(place, attributes=identity.plain(attrs))
    for name, (dims, values) in layout.coords.items():
        strings = values.dtype.kind in "UOT"
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=tuple(max(1, size) for size in values.shape),
            dtype="string" if strings else values.dtype,
            dimension_names=dims,
            compressors=LABELS if strings else CHECKSUM,
        )
        array[...] = values.astype(np.dtypes.StringDType()) if strings else values
    for name, (dims, kind) in labels.items():
        rest = [layout.sizes[dim] for dim in dims[1:]]
        part = math.gcd(block, LABELS_PER_CHUNK) if name == "token" else block  # hundreds of words a sample
        group.create_array(
            name,
            shape=(samples, *rest),
            chunks=(part, *rest),
            dimension_names=dims,
            compressors=LABELS,
            **kind,
        )
    for variable in layout.variables:
        new_array(group, layout, variable, samples, shard)
    return location.writable(place)


def _continue(place: StorePath, layout: Layout) -> zarr.Group:
    """The group of an earlier run, which must be of the same identity."""
    group = location.writable(place)
    if "content" in group:
        raise StoreError(
            f"{location.text(place)} was made by trace_dataset and has a slot for every sample of its data set; "
            "trace_dataset continues it. Use another path for other samples."
        )
    check_identity(place, group, layout)
    return group


def check_identity(place: StorePath, group: zarr.Group, layout: Layout) -> None:
    """Raise unless a layout is that of a store, naming every difference."""
    if wrong := identity.differences(identity.of_layout(layout), identity.of_group(group)):
        lines = "\n  ".join(wrong)
        raise StoreError(
            f"{location.text(place)} is of another run:\n  {lines}\nUse another path, or mode='w' to overwrite it."
        )
