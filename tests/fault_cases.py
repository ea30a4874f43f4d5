"""Things that go wrong, on purpose: stores that fail at a chosen write, processes that are killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from store_cases import LAYOUT, fill, plan, record, sample
from zarr.abc.store import Store
from zarr.storage import MemoryStore, WrapperStore

from dit_probe import store
from dit_probe.errors import IncompleteWarning, StoreError
from dit_probe.store import location


class Faulty(WrapperStore[Store]):
    """A store whose writes fail from the n-th on, as on a full disk, or after a cut of power."""

    def __init__(self, inner: Store, writes: float = float("inf"), code: int = errno.ENOSPC) -> None:
        super().__init__(inner)
        self.left, self.code, self.count = [writes], code, [0]

    def _with_store(self, store: Store) -> Faulty:
        other = type(self)(store, code=self.code)
        other.left, other.count = self.left, self.count
        return other

    def _spend(self) -> None:
        self.count[0] += 1
        self.left[0] -= 1
        if self.left[0] < 0:
            raise OSError(self.code, os.strerror(self.code))

    async def set(self, key: str, value: Any) -> None:
        self._spend()
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        self._spend()
        await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        self._spend()
        await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        self._spend()
        await super().delete_dir(prefix)


def room(target: Any, total: int, shard: int = 0, block: int = 4) -> store.Room:
    return store.Room(target, total, uuid.uuid4().hex, block, shard)


def fill_slot(into: store.Room, slot: int, stop: int | None = None) -> None:
    """One sample of `store_cases`, into its slot."""
    writer = store.create(into.reserve({slot: f"hash {slot}"}), LAYOUT)
    try:
        # The records of a sample are made from its slot, as `fill` does.
        (claimed,) = writer.claim([sample(slot)])
        assert claimed == slot
        for name, step, layer in plan()[:stop]:
            writer.write(name, record(name, slot, step, layer), sample=slot, step=step, layer=layer)
        if stop is None:
            writer.finish([slot])
    finally:
        with contextlib.suppress(Exception):
            writer.close()


def run_room(target: Any, total: int, shard: int = 0) -> None:
    """Fill what is not done, as `trace_dataset` does."""
    into = room(target, total, shard)
    with into.held(anew=False) as before:
        for slot in range(total):
            if before is None or slot >= len(before.done) or not before.done[slot]:
                fill_slot(into, slot)
                if shard and ((slot + 1) % shard == 0 or slot == total - 1):
                    into.flush()


def check_done(target: Any) -> list[int]:
    """What is said to be done is complete and right; which that is."""
    try:
        _, group = location.require(target)
    except StoreError:  # nothing yet
        return []
    done = [slot for slot, complete in enumerate(location.done(group)) if complete]
    for slot in done:
        assert (group["prompt"][slot], group["seed"][slot]) == (sample(slot).prompt, slot)
        assert group["concept_name"][slot].tolist() == list(sample(slot).concepts)
        found = {name: group[name][slot] for name in {name for name, _, _ in plan()}}
        for name, step, layer in plan():
            wanted = record(name, slot, step, layer)
            assert np.array_equal(found[name][_AT[step], _AT[layer]], wanted), (name, slot, step, layer)
    return done


_AT = {0: 0, 2: 1, 3: 1, 5: 2}
"""Where a step or layer of `store_cases` stands."""


def fresh() -> Store:
    return MemoryStore()


def appended(target: Any, first: int, count: int, mode: str | None) -> None:
    """Samples by a plain `Writer`."""
    writer = store.create(target, LAYOUT, mode=mode)
    try:
        for index in range(first, first + count):
            fill(writer, [sample(index)])
    finally:
        with contextlib.suppress(Exception):
            writer.close()


def fork(work: Callable[[], object]) -> int:
    """Run something in a copy of this process; its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which the copy does not use
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(work: Callable[[], object], after: float, *signals: int, pause: float = 0.02) -> int:
    """Start something, and send it signals after a time."""
    pid = fork(work)
    time.sleep(after)
    for number in signals or (signal.SIGKILL,):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(pause)
    return ended(pid)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    assert ended(fork(work)) == 0
    return time.perf_counter() - start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteWarning)
        yield
