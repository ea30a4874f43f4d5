"""Whole chunks in and out of an array, without the event loop and the copies that Zarr has for the general case.

Zarr's own indexing takes two to ten times as long (`benchmarks/store.py`, `benchmarks/offline.py`). What is written is
what Zarr would have written, byte for byte; what is chunked or encoded in another way than a trace, or is damaged, is
left to Zarr.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from zarr.abc.store import Store, SupportsGetSync, SupportsSetSync
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

FLUSHED_BYTES = 2**18
"""A file of this size or more is flushed when it is written: the disk then works while the model does, and not at the
end, all at once. Of smaller ones a flush would take longer than the file."""

_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


def write(array: Any, index: tuple[int, ...], values: np.ndarray) -> None:
    """``array[index] = values``.

    Args:
        array: of Zarr, or whatever is in its place.
        index: of the leading dims, along which a chunk has one entry.
        values: of all others.

    Raises:
        Exception: whatever the store raises.
    """
    chunk = _Chunk.of(array, (*index, *(slice(None) for _ in array.shape[len(index) :])))
    if chunk is None or (values.dtype, values.nbytes) != (array.dtype, chunk.nbytes):
        array[index] = values
    else:
        chunk.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def read(array: Any, index: Any) -> np.ndarray:
    """``array[index]``.

    Raises:
        Exception: whatever Zarr raises for a chunk that cannot be read.
    """
    chunk = _Chunk.of(array, index)
    data = None if chunk is None else chunk.read()
    if chunk is None or data is None or len(data) != chunk.nbytes:
        return array[index]
    shape = [size for size, part in zip(array.chunks, index, strict=True) if isinstance(part, slice)]
    return data.view(array.dtype).reshape(shape)


@dataclass(frozen=True)
class _Chunk:
    """One chunk as a trace has them: the bytes of its numbers, compressed by Blosc or not, and their crc32c."""

    store: Store
    key: str
    nbytes: int
    blosc: Blosc | None

    @classmethod
    def of(cls, array: Any, index: Any) -> _Chunk | None:
        """The chunk that is all of ``array[index]``, if there is one and it is of this kind."""
        if not isinstance(array, zarr.Array) or array.shards is not None or not isinstance(index, tuple):
            return None
        if len(index) != array.ndim or not array.size:
            return None
        place = []
        for part, size, length in zip(index, array.chunks, array.shape, strict=True):
            if isinstance(part, slice):
                start, stop, step = part.indices(length)
            else:
                start = range(length)[part]
                stop, step = start + 1, 1
            if start % size or stop - start != size or step != 1:
                return None
            place.append(start // size)
        metadata: Any = array.metadata
        codecs = metadata.codecs
        if not (isinstance(codecs[0], BytesCodec) and isinstance(codecs[-1], Crc32cCodec)) or len(codecs) > 3:
            return None
        if getattr(codecs[0].endian, "value", "little") != "little" or array.dtype.newbyteorder("<") != array.dtype:
            return None
        blosc = None
        if len(codecs) == 3:
            if not isinstance(codecs[1], BloscCodec):
                return None
            options: Any = codecs[1].to_dict()["configuration"]
            blosc = Blosc(**{**options, "shuffle": _SHUFFLES[options["shuffle"]]})
        key = "/".join(part for part in (array.path, metadata.encode_chunk_key(tuple(place))) if part)
        return cls(array.store, key, int(np.prod(array.chunks)) * array.dtype.itemsize, blosc)

    def write(self, data: np.ndarray) -> None:
        if self.blosc is not None:
            data = np.frombuffer(self.blosc.encode(data), np.uint8)
        parts = data, _checksum(data)
        if type(self.store) is LocalStore:
            _write_file(self.store.root / self.key, *parts)
            return
        whole: Any = np.concatenate(parts)
        buffer = default_buffer_prototype().buffer.from_array_like(whole)
        if isinstance(self.store, SupportsSetSync):
            self.store.set_sync(self.key, buffer)
        else:
            sync(self.store.set(self.key, buffer))

    def read(self) -> np.ndarray | None:
        """Its numbers as bytes, owned by the caller, or None where it is damaged or not there."""
        found = self._stored()
        if found is None or len(found) < 4 or found[-4:].tobytes() != _checksum(found[:-4]).tobytes():
            return None
        if self.blosc is None:
            return found[:-4]
        # Blosc says at bytes 4 to 8 how long its numbers are, and leaves what is longer as it was.
        if int.from_bytes(found[4:8].tobytes(), "little") != self.nbytes:
            return None
        numbers = np.empty(self.nbytes, np.uint8)
        with contextlib.suppress(ValueError, RuntimeError):
            self.blosc.decode(found[:-4], numbers)
            return numbers
        return None

    def _stored(self) -> np.ndarray | None:
        if type(self.store) is LocalStore:
            return _read_file(self.store.root / self.key)
        prototype = default_buffer_prototype()
        if isinstance(self.store, SupportsGetSync):
            found = self.store.get_sync(self.key, prototype=prototype)
        else:
            found = sync(self.store.get(self.key, prototype))
        return None if found is None else np.array(found.as_numpy_array())


def _checksum(data: np.ndarray) -> np.ndarray:
    memory: Any = data
    return np.array([google_crc32c.value(memory)], "<u4").view(np.uint8)


def _write_file(path: Path, *parts: np.ndarray) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = f"{path}.{uuid4().hex}.partial"  # as Zarr calls them
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "xb", buffering=0) as file:
            for part in parts:
                left = part.data
                while left:
                    left = left[file.write(left) :]
            if sum(part.nbytes for part in parts) >= FLUSHED_BYTES:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _read_file(path: Path) -> np.ndarray | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        left = data.data
        while left and (count := file.readinto(left)):
            left = left[count:]
        return data if not left else None
    return None
