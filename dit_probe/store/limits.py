"""What a store may ask of the machine that opens it: stores come from other people, too.

Nothing in a store is executed: Zarr's format 3 alone is read, of numbers, truth values and text, through the codecs
listed here, none of which can carry a pickle. Opening reads metadata, labels and coordinates; each is refused beyond
its bound before it is read; how long a text is, a chunk does not say before it is decompressed, and that alone is not
bounded. Activations of any declared size stay on disk until somebody asks for them, a chunk at a
time.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import zarr
from zarr.core.sync import sync
from zarr.storage import StorePath

from dit_probe.errors import StoreError

METADATA_BYTES = 64 * 2**20
"""Of the metadata file of a group or an array."""
LABEL_BYTES = 2**30
"""Of all labels and coordinates together, as declared; a text counts 16 bytes."""
CHUNK_BYTES = 2**32
"""Of one chunk, decompressed, as declared."""
CHUNKS = 2**26
"""Along the dims of all arrays together; dask has a number for each."""
CODECS = ("bytes", "transpose", "vlen-utf8", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed")


def check_metadata(location: StorePath) -> None:
    """Refuse metadata that would not be read in reasonable memory.

    Raises:
        StoreError: the file is larger than `METADATA_BYTES`.
    """
    key = "/".join(part for part in (location.path, "zarr.json") if part)
    try:
        size = sync(location.store.getsize(key))
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return
    if size > METADATA_BYTES:
        raise StoreError(f"{key} has {size} bytes of metadata; more than {METADATA_BYTES} are not read")


def check(place: str, group: zarr.Group) -> None:
    """Refuse arrays that are no numbers or text, are encoded by something else, or too large to be labels.

    Raises:
        StoreError: naming the array, and what it asks for.
    """
    if group.metadata.consolidated_metadata is None:
        here = group.store_path
        for name in listed(lambda: here.store.list_dir(here.path)):
            check_metadata(here / name)
    labels = chunks = 0
    for name, array in group.arrays():
        metadata: Any = array.metadata
        if unknown := [codec for codec in _codecs(metadata.codecs) if codec not in CODECS]:
            raise StoreError(f"{place}: {name!r} is encoded by {unknown[0]!r}; stores have {', '.join(CODECS)} alone")
        if array.dtype.kind not in "biufTU":
            raise StoreError(f"{place}: {name!r} has dtype {array.dtype}; stores have numbers, truth values and text")
        each = array.dtype.itemsize
        if (chunk := math.prod(array.chunks) * each) > CHUNK_BYTES:
            raise StoreError(f"{place}: a chunk of {name!r} has {chunk} bytes; more than {CHUNK_BYTES} are not read")
        if (whole := math.prod(array.shape) * each) >= 2**63:
            raise StoreError(f"{place}: {name!r} has {whole} bytes; no array has more than {2**63}")
        chunks += sum(-(-size // part) for size, part in zip(array.shape, array.chunks, strict=True))
        if name != "token" and "dtype" not in array.attrs:
            labels += max(math.prod(array.shape), math.prod(array.chunks)) * each
    if labels > LABEL_BYTES:
        raise StoreError(f"{place}: labels and coordinates of {labels} bytes; more than {LABEL_BYTES} are not read")
    if chunks > CHUNKS:
        raise StoreError(f"{place}: {chunks} chunks along the dims of its arrays; more than {CHUNKS} are not read")


def listed(keys: Callable[[], AsyncIterator[str]]) -> list[str]:
    """Keys of a store; some stores list in an event loop only, hence the function."""

    async def collect() -> list[str]:
        return [key async for key in keys()]

    return sync(collect())


def _codecs(codecs: Any) -> list[str]:
    """Names of codecs, those inside of shards included."""
    return [
        name
        for codec in codecs
        for name in (str(codec.to_dict()["name"]), *_codecs((*getattr(codec, "codecs", ()), *_index(codec))))
    ]


def _index(codec: Any) -> Any:
    return getattr(codec, "index_codecs", ())
