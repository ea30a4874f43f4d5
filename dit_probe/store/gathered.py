"""Arrays whose shards are written whole, after their samples are complete."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import numpy as np

from dit_probe.store.records import unwritten


class Gathered:
    """What a `Writer` assigns to in place of a sharded Zarr array: it waits in memory until `flush`.

    A shard is one file. Zarr would read and write all of it for every record, and two threads would undo each other.

    Args:
        array: the Zarr array, sharded along ``sample``.
    """

    def __init__(self, array: Any) -> None:
        # Records that are not planned stay out of the file.
        self._array = array.with_config({"write_empty_chunks": False})
        self.dtype, self.shape, self._lock = array.dtype, array.shape, threading.Lock()
        self._waiting: dict[int, np.ndarray] = {}

    def __setitem__(self, index: tuple[int, ...], values: np.ndarray) -> None:
        slot, *rest = index
        with self._lock:
            if slot not in self._waiting:
                self._waiting[slot] = np.full(self.shape[1:], self._array.fill_value, self.dtype)
        self._waiting[slot][tuple(rest)] = values

    def flush(self, slots: Collection[int]) -> None:
        """Write these slots, each shard at once; what waits for others, which failed, is dropped."""
        size = self._array.shards[0]
        for start in sorted({slot // size * size for slot in slots}):
            ready = {slot: self._waiting[slot] for slot in slots if start <= slot < start + size}
            stop = min(start + size, self.shape[0])
            try:
                whole = len(ready) == stop - start
                shard = np.empty((stop - start, *self.shape[1:]), self.dtype) if whole else self._array[start:stop]
                for slot, values in ready.items():
                    shard[slot - start] = values
                self._array[start:stop] = shard
            except Exception as error:
                name = f"{self._array.basename!r} of samples {start}-{stop - 1}"
                raise unwritten(name, error) from error
        self._waiting.clear()
