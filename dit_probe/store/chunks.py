"""Whole chunks in and out of an array, without the event loop and the copies that Zarr has for the general case.

Zarr's own indexing takes two to ten times as long (`benchmarks/store.py`, `benchmarks/offline.py`). What is written is
what Zarr would have written, byte for byte; what is chunked or encoded in another way than a trace, or is damaged, is
left to Zarr.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def write(array: Any, index: tuple[int, ...], values: np.ndarray, *, own: bool = False) -> None:
    """``array[index] = values``.

    Args:
        array: of Zarr, or whatever is in its place.
        index: of the leading dims, along which a chunk has one entry.
        values: of all others.
        own: nobody else will change them.

    Raises:
        Exception: whatever the store raises.
    """
    form = _Form.of(array)
    box = None if form is None else _box(array, (*index, *(slice(None) for _ in array.shape[len(index) :])))
    whole = box is not None and all(len(part) == 1 for part in box)
    if form is None or not whole or (values.dtype, values.shape) != (array.dtype, array.shape[len(index) :]):
        array[index] = values  # or it says what does not fit
    else:
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        form.write([part.start for part in box or ()], flat, own=own and values.flags.owndata)


def read(array: Any, index: Any) -> np.ndarray:
    """``array[index]``, of as many chunks as that are.

    Raises:
        Exception: whatever Zarr raises for a chunk that cannot be read.
    """
    form, box = _Form.of(array), _box(array, index)
    if form is None or box is None:
        return array[index]
    counts = [len(part) for part in box]
    values = np.empty([count * size for count, size in zip(counts, array.chunks, strict=True)], array.dtype)
    each = values.reshape(*counts, -1)
    for cell in np.ndindex(*counts):
        found = form.read([part[at] for part, at in zip(box, cell, strict=True)], each[cell].view(np.uint8))
        if found is None:
            each[cell] = array.fill_value
        elif not found:
            return array[index]  # which says what is wrong
    return values[tuple(slice(None) if isinstance(part, slice) else 0 for part in index)]


def _box(array: Any, index: Any) -> list[range] | None:
    """Numbers of the chunks, along each dim, that ``array[index]`` is all of, if there are such."""
    if not isinstance(index, tuple) or len(index) != len(array.shape):
        return None
    box = []
    for part, size, length in zip(index, array.chunks, array.shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(length)
        elif isinstance(part, int | np.integer):
            start, step = range(length)[part], 1
            stop = start + 1
        else:
            return None
        if start % size or stop % size or step != 1 or stop <= start:
            return None
        box.append(range(start // size, stop // size))
    return box


@dataclass(frozen=True)
class _Form:
    """Chunks as a trace has them: the bytes of the numbers, compressed by Blosc or not, and their crc32c."""

    store: Store
    key: Callable[[tuple[int, ...]], str]
    nbytes: int
    blosc: Blosc | None
    checked: bool

    @classmethod
    def of(cls, array: Any) -> _Form | None:
        """That of an array, if it has this one."""
        if not isinstance(array, zarr.Array) or array.shards is not None:
            return None
        metadata: Any = array.metadata
        numbers, *others = metadata.codecs
        checked = bool(others) and isinstance(others[-1], Crc32cCodec)
        compressors = others[:-1] if checked else others
        if not isinstance(numbers, BytesCodec) or any(not isinstance(one, BloscCodec) for one in compressors):
            return None
        if getattr(numbers.endian, "value", "little") != "little" or array.dtype.newbyteorder("<") != array.dtype:
            return None
        options = [one.to_dict()["configuration"] for one in compressors]
        blosc = [Blosc(**{**each, "shuffle": _SHUFFLES[each["shuffle"]]}) for each in options]
        if len(blosc) > 1:
            return None
        nbytes = math.prod(array.chunks) * array.dtype.itemsize
        key = f"{array.path}/".lstrip("/")
        name = metadata.encode_chunk_key
        return cls(array.store, lambda place: f"{key}{name(place)}", nbytes, blosc[0] if blosc else None, checked)

    def write(self, place: Sequence[int], data: np.ndarray, *, own: bool) -> None:
        if self.blosc is not None:
            data, own = np.frombuffer(self.blosc.encode(data), np.uint8), True
        key, parts = self.key(tuple(place)), [data, *([_checksum(data)] if self.checked else [])]
        if type(self.store) is LocalStore:
            _write_file(f"{self.store.root}/{key}", *parts)
            return
        # A store in memory keeps what it is given, so it is given nothing that somebody else might change or want back.
        whole: Any = parts[0] if own and not self.checked else np.concatenate(parts)
        buffer = default_buffer_prototype().buffer.from_array_like(whole)
        if isinstance(self.store, SupportsSetSync):
            self.store.set_sync(key, buffer)
        else:
            sync(self.store.set(key, buffer))

    def read(self, place: Sequence[int], numbers: np.ndarray) -> bool | None:
        """Put a chunk's bytes there; False where it is damaged, None where it is missing."""
        key, prototype = self.key(tuple(place)), default_buffer_prototype()
        length = 4 if self.checked else 0
        if type(self.store) is LocalStore:
            found = _read_file(f"{self.store.root}/{key}", numbers if self.blosc is None else None, length)
        else:
            store: Any = self.store
            direct = isinstance(store, SupportsGetSync)
            whole = store.get_sync(key, prototype=prototype) if direct else sync(store.get(key, prototype))
            found = None if whole is None else _parts(whole.as_numpy_array(), length)
        if found is None:
            return None
        data, checksum = found
        if self.checked and checksum.tobytes() != _checksum(data).tobytes():
            return False
        if self.blosc is None:
            if len(data) == len(numbers) and not np.shares_memory(data, numbers):
                numbers[...] = data
            return len(data) == len(numbers)
        # Blosc says at bytes 4 to 8 how long its numbers are, and leaves what is longer as it was.
        if int.from_bytes(data[4:8].tobytes(), "little") != len(numbers):
            return False
        with contextlib.suppress(ValueError, RuntimeError):
            self.blosc.decode(data, numbers)
            return True
        return False


def _checksum(data: np.ndarray) -> np.ndarray:
    memory: Any = data
    return np.array([google_crc32c.value(memory)], "<u4").view(np.uint8)


def _parts(whole: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Data, and the checksum of so many bytes."""
    end = max(len(whole) - length, 0)
    return whole[:end], whole[end:]


def _write_file(path: str, *parts: np.ndarray) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = f"{path}.{uuid4().hex}.partial"  # as Zarr calls them
    try:
        with open(_new(partial), "wb", buffering=0) as file:
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


def _new(path: str) -> int:
    """Descriptor of a new file; its directories are made if it is the first there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


def _read_file(path: str, numbers: np.ndarray | None, length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Data and checksum of a file, the data at `numbers` where that has the length."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        size = max(os.fstat(file.fileno()).st_size - length, 0)
        data = np.empty(size, np.uint8) if numbers is None or len(numbers) != size else numbers
        left = data.data
        while left and (count := file.readinto(left)):
            left = left[count:]
        return data[: len(data) - len(left)], np.frombuffer(file.read(length + 1), np.uint8)
    return None
