"""Write a trace: slots for samples, records that go through a queue bounded in bytes, ``done`` when all are there.

Device work never waits for the disk and memory never grows without limit: `Writer.write` returns at once while the
queue has room and blocks the caller while it has not. What was promised is accounted for: `Writer.finish` sets ``done``
only after every planned record of a sample is in the store.

Every write is one whole chunk of its own, so threads need no locks between them.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dit_probe.errors import StoreError, TraceError
from dit_probe.schema import Layout, Sample, Variable
from dit_probe.store import identity
from dit_probe.store.byte_queue import ByteQueue
from dit_probe.store.encoding import CONFIG
from dit_probe.store.records import QUEUED, WRITTEN, Account, Record, positions, unwritten, where

LABELS = ("prompt", "seed", "done", "token", "concept_name", "failed", "content")
IMAGE_DIMS = ("pixel_frame", "pixel_y", "pixel_x", "channel")


class Writer:
    """Fills the slots of one store, chunk by chunk; made by `dit_probe.store.create`.

    Args:
        layout: what every sample consists of.
        group: the group, with an array for every variable.
        add: makes the array of a variable: (group, layout, variable, samples) to array.
        commit: makes the present lengths visible to readers in one atomic step.
        reader: opens the store.
        queue: where writes wait.
        count: slots that the store already has.
        start: slot that the first `claim` gets.
        arrays: those of the group by name, if they are known.
        labels: slots that are reserved for this writer, which `claim` gives in this order, to what their labels are
            beside those of a `Sample`; what they hold is written anew.
        complete: what `finish` does with a slot when all of its records are written; None: it marks it done.
        release: called by `close`, at last.

    Attributes:
        layout: as given, and as it has grown since.
        bytes_written: bytes of records that are in the store, before compression.
    """

    def __init__(
        self,
        layout: Layout,
        group: zarr.Group,
        *,
        add: Callable[[zarr.Group, Layout, Variable, int], Any],
        commit: Callable[[], None],
        reader: Callable[[], xr.Dataset],
        queue: ByteQueue,
        count: int = 0,
        start: int = 0,
        arrays: dict[str, Any] | None = None,
        labels: Mapping[int, Mapping[str, Any]] | None = None,
        complete: Callable[[int], None] | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.bytes_written = 0
        self._group = group
        self._add, self._commit, self._reader, self._queue = add, commit, reader, queue
        self._count, self._reserved, self._release = count, labels, release
        self._slots, self._next = range(start, sys.maxsize) if labels is None else tuple(labels), 0
        self._complete = complete or (lambda slot: self._label(slot, done=True))
        self._arrays: dict[str, Any] = arrays if arrays is not None else arrays_of(group, layout)
        self._labels = {name: self._arrays[name] for name in LABELS if name in self._arrays}
        self._accounts: dict[int, Account] = {}
        self._skipped: set[int] = set()
        self._lock = threading.Lock()
        self._told = self._closed = False

    # ------------------------------------------------------------------ slots

    def claim(self, samples: Sequence[Sample]) -> tuple[int, ...]:
        """Slots for the samples of one generation, in order.

        Slots of an interrupted run come first: one that is done and was made from the same prompt, seed and concepts
        is `skipped`, one that is not done is written again.

        Args:
            samples: what is known of each sample.

        Raises:
            StoreError: a slot holds another sample, or a sample has more tokens or other concepts than the layout.
        """
        self._check()
        rows = [self._row(sample) for sample in samples]
        slots = tuple(self._slots[self._next : self._next + len(samples)])
        if len(slots) < len(samples):
            raise StoreError(
                f"{len(samples)} samples came and {len(slots)} slots are left for them. Make one picture of a prompt"
            )
        old = {slot: row for slot, row in zip(slots, rows, strict=True) if slot < self._count}
        skipped = set() if self._reserved else {slot for slot, row in old.items() if self._matches(slot, row)}
        end = max(self._count, *(slot + 1 for slot in slots))
        if end > self._count:
            for array in self._arrays.values():
                array.resize((end, *array.shape[1:]))
        for slot, row in zip(slots, rows, strict=True):
            if slot not in skipped:
                self._label(slot, **row, **(self._reserved or {}).get(slot, {}))
                self._accounts[slot] = Account(slot, self.layout)
        if end > self._count:
            # Readers see the new slots from here on, labels included: a kill before this line leaves no trace of them.
            self._commit()
            self._count = end
        self._skipped |= skipped
        self._next += len(samples)
        return slots

    def skipped(self, slot: int) -> bool:
        """Whether this slot was complete before; writes to it are ignored."""
        return slot in self._skipped

    def require(self, layout: Layout) -> None:
        """Raise unless another generation has the layout of this store.

        Raises:
            StoreError: naming every difference.
        """
        new, old = identity.of_layout(layout), identity.of_layout(self.layout)
        if wrong := identity.differences(new, old, other="the one before"):
            lines = "\n  ".join(wrong)
            raise StoreError(
                f"this generation does not fit the store that an earlier one opened:\n  {lines}\n"
                f"All samples of a store have the same size and steps; trace the others into another store."
            )

    def set_timestep(self, step: int, timestep: float) -> None:
        """Say which timestep a step has, where the layout left it open (NaN) because nobody announced it.

        Args:
            step: label; one that is not kept is ignored.
            timestep: what the model was given, 0..1000.

        Raises:
            StoreError: the step has another timestep in this store.
        """
        self._check()
        known = positions(self.layout)["step"]
        if step not in known or "timestep" not in self.layout.coords:
            return
        array: Any = self._group["timestep"]
        values = array[...]
        before = float(values[known[step]])
        if np.isnan(before):
            values[known[step]] = timestep
            array[...] = values
        elif not np.isclose(before, timestep, rtol=1e-5):
            raise StoreError(
                f"step {step} is at timestep {timestep:g} in this sample and at {before:g} in the ones before. All "
                f"samples of a store have the same timesteps; trace the others into another store."
            )

    # ---------------------------------------------------------------- records

    def write(
        self,
        name: str,
        values: np.ndarray | Callable[[], np.ndarray],
        *,
        sample: int,
        step: int | None = None,
        layer: int | None = None,
        branch: str | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Queue one record: one variable at one (sample, branch, step, layer).

        Args:
            name: variable.
            values: array of the variable's token dims (bfloat16: its bits as uint16), not to be changed before the
                slot is finished; or a function that gives it away, called in a writer thread.
            sample: slot.
            step: step label.
            layer: layer label.
            branch: branch label, where the trace has that dim.
            nbytes: bytes that `values` holds until it is written; by default the size of the record.

        Raises:
            StoreError: the record does not belong to the layout, was written before, or an earlier write failed.
        """
        self._check()
        if sample in self._skipped:
            return
        variable = next((variable for variable in self.layout.variables if variable.name == name), None)
        if variable is None:
            known = ", ".join(variable.name for variable in self.layout.variables)
            raise StoreError(f"no variable is called {name!r}; this store has {known}")
        account = self._account(sample)
        index = account.index(variable, step=step, layer=layer, branch=branch)
        record = Record(variable, self._arrays[name], self.layout, where(sample, step, layer, branch))
        if not callable(values):
            record.check(values)

        def task() -> None:
            written = record.store(values, (sample, *index))
            account.mark(variable, index, WRITTEN)
            with self._lock:
                self.bytes_written += written

        account.mark(variable, index, QUEUED)
        self._queue.put(task, record.nbytes if nbytes is None else nbytes, sample)
        self._check()

    def write_images(self, slots: Sequence[int], pictures: Sequence[np.ndarray]) -> None:
        """Keep the pictures that were made, beside the activations: the variable ``image``.

        Args:
            slots: their samples.
            pictures: uint8 (pixel_y, pixel_x, channel), for videos with pixel_frame in front.

        Raises:
            StoreError: their size or dtype differs from that of earlier ones.
        """
        self._check()
        todo = [(slot, picture) for slot, picture in zip(slots, pictures, strict=True) if slot not in self._skipped]
        if todo and all(variable.name != "image" for variable in self.layout.variables):
            shape = todo[0][1].shape
            dims = IMAGE_DIMS[-len(shape) :]
            image = Variable("image", dims, "uint8")
            self.layout = dataclasses.replace(
                self.layout,
                variables=(*self.layout.variables, image),
                sizes={**self.layout.sizes, **dict(zip(dims, shape, strict=True))},
            )
            if "image" not in self._arrays:
                self._arrays["image"] = self._add(self._group, self.layout, image, self._count)
            elif self._arrays["image"].shape[1:] != shape:
                found = self._arrays["image"].shape[1:]
                raise StoreError(f"the images of this run are {shape} {dims}, those of the store {found}")
            self._commit()  # though it be there: a run that was killed may have made it and not shown it
        for slot, picture in todo:
            self.write("image", picture, sample=slot)

    def finish(self, slots: Iterable[int]) -> None:
        """Wait for the records of these slots and mark each slot done.

        Raises:
            TraceError: records that were planned were not written.
            StoreError: a write failed.
        """
        slots = [slot for slot in slots if slot not in self._skipped]
        self._queue.wait(slots)
        self._check()
        lost: list[str] = []
        for slot in slots:
            missing = list(self._account(slot).missing())
            if not missing:
                self._complete(slot)
                del self._accounts[slot]
            lost += missing
        if lost:
            more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise TraceError(
                f"planned and not written: {'; '.join(lost[:3])}{more}. Either fewer steps ran than planned, or a "
                f"cache skipped the block (diffusers' enable_cache: turn it off while tracing). The samples stay "
                f"incomplete."
            )

    def close(self) -> None:
        """Write what is queued and end the threads; the store is readable afterwards.

        Raises:
            StoreError: a write failed and no call has said so yet.
        """
        self._queue.close()
        if not self._closed:
            self._closed = True
            self._release()
            if self._queue.failure is not None and not self._told:
                self._fail(self._queue.failure)

    def dataset(self) -> xr.Dataset:
        """The store as `dit_probe.open` reads it."""
        return self._reader()

    # ----------------------------------------------------------------- checks

    def _label(self, slot: int, **values: Any) -> None:
        """Write labels of a slot."""
        for name, value in values.items():
            if name in self._labels:
                try:
                    self._labels[name][slot] = value
                except Exception as error:
                    raise unwritten(f"label {name!r} of sample {slot}", error) from error

    def _row(self, sample: Sample) -> dict[str, Any]:
        """The labels of a sample as the store keeps them."""
        row: dict[str, Any] = {"prompt": sample.prompt, "seed": sample.seed}
        for name, dim, values in (
            ("token", "prompt_token", sample.tokens),
            ("concept_name", "concept", sample.concepts),
        ):
            if name not in self._labels:
                continue
            size = self.layout.sizes[dim]
            if len(values) > size or (name == "concept_name" and values and len(values) != size):
                raise StoreError(
                    f"sample {sample.prompt!r} has {len(values)} {dim}s ({', '.join(map(repr, values[:8]))}), the "
                    f"layout has {size}. All samples of a store have the same number; use another store for the others."
                )
            row[name] = np.array([*values, *[""] * (size - len(values))], dtype=np.dtypes.StringDType())
        return row

    def _matches(self, slot: int, row: Mapping[str, Any]) -> bool:
        """Whether a slot of an earlier run is done; it must hold the same sample either way."""
        pairs = {name: (np.asarray(row[name]).tolist(), np.asarray(self._labels[name][slot]).tolist()) for name in row}
        if -1 in pairs["seed"]:
            del pairs["seed"]
        wrong = [
            f"{name}: this run has {new!r}, the store has {old!r}"
            for name, (new, old) in pairs.items()
            if name != "token" and new != old
        ]
        if wrong:
            raise StoreError(
                f"the store's sample {slot} is another one than this run's ({'; '.join(wrong)}). An interrupted run is "
                f"continued by the same generations in the same order; mode='a' appends after the existing samples, "
                f"mode='w' overwrites the store."
            )
        return bool(self._labels["done"][slot])

    def _account(self, slot: int) -> Account:
        if slot not in self._accounts:
            open_slots = ", ".join(map(str, self._accounts)) or "none"
            raise StoreError(f"sample {slot} was not claimed or is finished; those being recorded: {open_slots}")
        return self._accounts[slot]

    def _check(self) -> None:
        """Raise what went wrong in a thread, in the caller."""
        if self._queue.failure is not None:
            self._fail(self._queue.failure)
        if self._closed:
            raise StoreError("this writer is closed; create another one on the same store with mode='a' to add samples")

    def _fail(self, failure: BaseException) -> None:
        self._told = True
        raise (type(failure) if isinstance(failure, StoreError) else StoreError)(str(failure)) from failure.__cause__


def arrays_of(group: zarr.Group, layout: Layout) -> dict[str, Any]:
    """The arrays over ``sample`` of a store, by name."""
    return {name: array.with_config(CONFIG) for name, array in group.arrays() if name not in layout.coords}
