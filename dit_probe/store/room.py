"""A store with a slot for every sample of a data set, which many processes fill, each a block of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dit_probe.errors import StoreError, StoreFault
from dit_probe.schema import Layout, Variable
from dit_probe.store import identity, location
from dit_probe.store.byte_queue import ByteQueue
from dit_probe.store.creation import LABELS_PER_CHUNK, make, new_array
from dit_probe.store.gathered import Gathered
from dit_probe.store.lock import Lock
from dit_probe.store.reading import open
from dit_probe.store.records import unwritten
from dit_probe.store.reserved import Reserved
from dit_probe.store.writer import Writer


@dataclass(frozen=True)
class Status:
    """What is known of every slot.

    Attributes:
        done: (sample) bool.
        failed: (sample) the reason, "" where none is known.
        content: (sample) hash of what the slot was made of, "" where it is empty.
    """

    done: np.ndarray
    failed: np.ndarray
    content: np.ndarray


class Room:
    """The slots of a data set. Processes that fill it have one each, of the same store, total and run.

    Labels of `block` samples share a chunk, and records of `shard` samples a file: whoever fills a slot fills its whole
    block, so that no two processes write one chunk.

    Args:
        store: as `dit_probe.store.create` takes it.
        total: slots.
        run: a name that no other run has. The store keeps that of the last run which was started on it, and no other
            one can complete samples from then on. Nothing here asks a clock.
        block: samples, if the store has to be made; a multiple of `shard`.
        shard: samples, if the store has to be made; 0: a file a record.
    """

    def __init__(self, store: Any, total: int, run: str, block: int = LABELS_PER_CHUNK, shard: int = 0) -> None:
        self.place, self.total, self.block, self.shard = location.locate(store), total, block, shard
        self._run = run
        self._group: Any = None
        self._facts: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._ready: list[int] = []

    @contextlib.contextmanager
    def held(self, *, anew: bool) -> Iterator[Status | None]:
        """Keep the store for this run: what is in it, or None where it is yet to be made.

        Args:
            anew: delete what is there.

        Raises:
            StoreError: something else is there, a store that was not made for a data set or for a longer one, or
                somebody writes it.
        """
        name = location.text(self.place)
        found = location.find(self.place)
        if isinstance(found, str):
            raise StoreError(f"{name} is {found}, not a dit-probe store; nothing was overwritten. Use another path.")
        lock = Lock(self.place)
        try:
            found: Any = location.find(self.place)  # once more: a writer may have ended in between
            if found is not None:
                location.check_format(found, self.place)
                if anew or not (location.committed(found) or any(location.done(found))):
                    location.clear(self.place)  # asked for, or killed while it was made
                elif "content" not in found:
                    raise StoreError(
                        f"{name} was made by trace, whose samples have no status. Use another path, or mode='w' to "
                        "overwrite it."
                    )
                elif not location.committed(found):
                    location.commit(self.place)  # somebody took the consolidated metadata out
            there = self.exists()
            yield self._take_over(found) if there else None
        finally:
            lock.release()

    def exists(self) -> bool:
        """Whether the store is there; if so, its own `block` and `shard` are taken."""
        if self._group is None:
            found = location.find(self.place)
            if found is None or isinstance(found, str) or not location.committed(found):
                return False
            self._adopt(location.writable(self.place))
        return True

    def _adopt(self, group: Any) -> None:
        self._group = group
        self.block = group["done"].chunks[0]
        arrays = dict(group.arrays())
        shards = {array.shards[0] for array in arrays.values() if array.shards}
        self.shard = max(shards, default=0)
        self._facts = identity.of_group(group)
        self._arrays = {name: array for name, array in arrays.items() if "sample" in array.metadata.dimension_names}
        for name, array in self._arrays.items():
            self._arrays[name] = Gathered(array) if array.shards else array.with_config({"write_empty_chunks": True})

    def _take_over(self, seen: Any) -> Status:
        """Make the store this run's, and as long as its data set; `seen` is the group as readers see it so far."""
        group, count = self._group, seen["done"].shape[0]
        if count > self.total:
            raise StoreError(
                f"{location.text(self.place)} has {count} samples, the data set {self.total}: it is another one, or a "
                "part. Use another path, or mode='w' to overwrite it."
            )
        try:
            arrays = [array for _, array in group.arrays() if "sample" in array.metadata.dimension_names]
            # Whatever a run that was killed while it did this has left.
            shown = set(seen.array_keys())
            if any(array.shape[0] != self.total or array.basename not in shown for array in [seen["done"], *arrays]):
                for array in arrays:
                    array.resize((self.total, *array.shape[1:]))
                location.commit(self.place)
            group["done"].update_attributes({"run": self._run})
        except Exception as error:
            raise unwritten(location.text(self.place), error) from error
        self._group = None
        self.exists()
        return self.status()

    def status(self, slots: slice = slice(None)) -> Status:
        """Of these slots of a store that exists."""
        return Status(*(self._group[name][slots] for name in ("done", "failed", "content")))

    @property
    def fingerprint(self) -> str:
        """Of the data set that every sample has been compared with, "" if there is none."""
        return str(self._group["done"].attrs.get("fingerprint", ""))

    def compared(self, fingerprint: str) -> None:
        """Keep that all samples have been compared with a data set of this fingerprint."""
        self._group["done"].update_attributes({"fingerprint": fingerprint})

    # -------------------------------------------------------------- filling it

    def reserve(self, content: Mapping[int, str]) -> Reserved:
        """Slots for one trace, in this order, with the hash of what each will hold."""
        return Reserved(partial(self._writer, {slot: {"content": one, "failed": ""} for slot, one in content.items()}))

    def fail(self, slot: int, reason: str, content: str) -> None:
        """Keep why a slot stays empty."""
        self.check_run()
        try:
            self._arrays["failed"][slot], self._arrays["content"][slot] = reason, content
        except Exception as error:
            raise unwritten(f"the status of sample {slot}", error) from error

    def reopen(self, slot: int) -> None:
        """Take back that a sample is done, which will be made once more."""
        self.check_run()
        self._arrays["done"][slot] = False

    def flush(self) -> None:
        """Write what waits for its shard, then mark its samples done."""
        ready, self._ready = self._ready, []
        if ready:
            self.check_run()
        for array in self._arrays.values():
            if isinstance(array, Gathered):
                array.flush(ready)
        if not ready:
            return
        try:
            self._arrays["done"].oindex[np.array(ready)] = True
        except Exception as error:
            raise unwritten(f"that samples {ready} are done", error) from error

    def check_run(self) -> None:
        """Raise if another run was started on this store."""
        key = "/".join(part for part in (self.place.path, "done", "zarr.json") if part)
        found = sync(self.place.store.get(key, default_buffer_prototype()))
        run = None if found is None else json.loads(found.to_bytes()).get("attributes", {}).get("run")
        if run != self._run:
            raise StoreFault(
                f"another run was started on {location.text(self.place)}, and this one ends: its samples in progress "
                "are left to the other"
            )

    def _writer(self, labels: Mapping[int, Mapping[str, Any]], layout: Layout) -> Writer:
        if self.exists():
            self.check_run()
            self._check_layout(layout)
        else:
            try:
                group = make(self.place, layout, self.total, self.block, self.shard)
                group["done"].update_attributes({"run": self._run})
                location.commit(self.place)
            except Exception as error:
                raise unwritten(location.text(self.place), error) from error
            self._adopt(location.writable(self.place))
        return Writer(
            layout,
            self._group,
            add=self._add,
            # Of the arrays, pictures alone are made later; once they are there, `_take_over` has shown them.
            commit=(lambda: None) if "image" in self._arrays else lambda: location.commit(self.place),
            reader=lambda: open(self.place),
            queue=ByteQueue(),
            count=self.total,
            arrays=self._arrays,
            labels=labels,
            complete=self._complete,
        )

    def _check_layout(self, layout: Layout) -> None:
        """A sample may not fit the others; a model or probe of another identity fits none of them."""
        wrong = identity.differences(identity.of_layout(layout), self._facts)
        if not wrong:
            return
        lines, name = "\n  ".join(wrong), location.text(self.place)
        if any(line.startswith("identity.") or line.split(":")[0].endswith(".dtype") for line in wrong):
            raise StoreFault(f"{name} is of another run:\n  {lines}\nUse another path, or mode='w' to overwrite it.")
        raise StoreError(
            f"this sample does not fit the others of {name}:\n  {lines}\nAll samples of a store have the same sizes "
            "and steps; trace the others into another store."
        )

    def _add(self, group: Any, layout: Layout, variable: Variable, samples: int) -> Any:
        array = new_array(group, layout, variable, samples, self.shard)
        return Gathered(array) if self.shard else array

    def _complete(self, slot: int) -> None:
        self._ready.append(slot)
        if not self.shard:
            self.flush()
