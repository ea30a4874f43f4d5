"""Make the arrays of a trace, or find those of an interrupted one."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from zarr.storage import StorePath

from dit_probe.errors import StoreError
from dit_probe.schema import FORMAT, FORMAT_VERSION, Layout, Variable
from dit_probe.store import identity, location
from dit_probe.store.byte_queue import QUEUE_BYTES, THREADS, ByteQueue
from dit_probe.store.encoding import COMPRESSORS, CONFIG, FILL, STORED
from dit_probe.store.reading import open
from dit_probe.store.records import LEADING
from dit_probe.store.writer import Writer

LABELS_PER_CHUNK = 64


def create(
    store: Any, layout: Layout, *, mode: str | None = None, queue_bytes: int = QUEUE_BYTES, threads: int = THREADS
) -> Writer:
    """Make a store for a trace, or continue one.

    Args:
        store: path, fsspec URL, any store that Zarr accepts, or ``None`` for memory.
        layout: dims, variables and coordinates of the trace; its attribute ``identity`` (a dict) is what two runs
            must share to be in one store, the other attributes are kept from the first run.
        mode: ``None`` makes a store or completes an interrupted one; ``"a"`` appends samples; ``"w"`` overwrites.
        queue_bytes: bytes that wait to be written before the caller is held back.
        threads: writer threads.

    Raises:
        StoreError: something else is there, the store is complete and `mode` is None, or it is of another run.

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
    place = location.locate(store)
    found = location.find(place)
    if isinstance(found, str):
        raise StoreError(
            f"{location.text(place)} is {found}, not a dit-probe store; nothing was overwritten. Use another path."
        )
    group, count, start = None, 0, 0
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
    return Writer(
        layout,
        group or _make(place, layout),
        add=new_array,
        commit=lambda: location.commit(place),
        reader=lambda: open(place),
        count=count,
        start=start,
        queue=ByteQueue(queue_bytes, threads),
    )


def new_array(group: zarr.Group, layout: Layout, variable: Variable, samples: int) -> Any:
    """The empty array of one variable."""
    dims, shape = layout.dims(variable), layout.shape(variable, samples)
    return group.create_array(
        variable.name,
        shape=shape,
        chunks=tuple(1 if dim in ("sample", *LEADING) else max(1, size) for dim, size in zip(dims, shape, strict=True)),
        dtype=STORED[variable.dtype],
        fill_value=FILL[variable.dtype],
        compressors=COMPRESSORS.get(variable.dtype),
        dimension_names=dims,
        attributes=identity.variable_attrs(layout, variable),
        config=CONFIG,
    )


def _make(place: StorePath, layout: Layout) -> zarr.Group:
    """The group with every array, no sample yet."""
    labels: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "prompt": (("sample",), {"dtype": "string", "fill_value": ""}),
        "seed": (("sample",), {"dtype": "int64", "fill_value": -1}),
        "done": (("sample",), {"dtype": "bool", "fill_value": False}),
        "token": (("sample", "prompt_token"), {"dtype": "string", "fill_value": ""}),
        "concept_name": (("sample", "concept"), {"dtype": "string", "fill_value": ""}),
    }
    labels = {name: (dims, kind) for name, (dims, kind) in labels.items() if all(map(layout.sizes.get, dims[1:]))}
    coordinates = sorted({*layout.coords, *labels} - {*layout.sizes, "done"})
    attrs = {**layout.attrs, "format": FORMAT, "format_version": FORMAT_VERSION, "coordinates": " ".join(coordinates)}
    group = zarr.create_group(place, overwrite=True, attributes=identity.plain(attrs))
    for name, (dims, values) in layout.coords.items():
        strings = values.dtype.kind in "UOT"
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=tuple(max(1, size) for size in values.shape),
            dtype="string" if strings else values.dtype,
            dimension_names=dims,
        )
        array[...] = values.astype(np.dtypes.StringDType()) if strings else values
    for name, (dims, kind) in labels.items():
        rest = [layout.sizes[dim] for dim in dims[1:]]
        chunks = (LABELS_PER_CHUNK, *rest)
        group.create_array(name, shape=(0, *rest), chunks=chunks, dimension_names=dims, **kind)
    for variable in layout.variables:
        new_array(group, layout, variable, 0)
    location.commit(place)
    return zarr.open_group(place, mode="r+", use_consolidated=False)


def _continue(place: StorePath, layout: Layout) -> zarr.Group:
    """The group of an earlier run, which must be of the same identity."""
    group = zarr.open_group(place, mode="r+", use_consolidated=False)
    if wrong := identity.differences(identity.of_layout(layout), identity.of_group(group)):
        lines = "\n  ".join(wrong)
        raise StoreError(
            f"{location.text(place)} is of another run:\n  {lines}\nUse another path, or mode='w' to overwrite it."
        )
    return group
