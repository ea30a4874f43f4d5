"""Any sequence of making, filling, cutting short, continuing and reading: what is done is complete and right."""

from __future__ import annotations

import contextlib
from typing import Any

from fault_cases import Faulty, appended, check_done, fill_slot, fresh, room, run_room
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_cases import sample

from dit_probe.errors import StoreError
from dit_probe.store import location

MOST = 6


class StoreMachine(RuleBasedStateMachine):
    """A store in memory, made by `trace` (kind 0) or with a slot for every sample (a shard of 0, 1 or 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = fresh()
        self.total, self.done = 0, set[int]()

    @initialize(shard=st.sampled_from([None, 0, 1, 2]))
    def begin(self, shard: int | None) -> None:
        self.shard = shard

    def _run(self, target: Any, total: int) -> None:
        if self.shard is not None:
            run_room(target, total, self.shard)
            return
        # A plain run: the same generations in the same order complete what is there, then new ones are appended.
        known = len(self._flags())
        if known and not all(self._flags()):
            appended(target, 0, max(known, total), None)
        elif known < total:
            appended(target, known, total - known, "a")

    def _flags(self) -> list[bool]:
        found = location.find(location.locate(self.inner))
        return [] if found is None or isinstance(found, str) else location.done(found)

    @rule(more=st.integers(0, 3))
    def complete(self, more: int) -> None:
        """A run that nothing disturbs."""
        self.total = max(1, min(self.total + more, MOST))
        self._run(self.inner, self.total)
        assert self._flags().count(True) >= self.total

    @rule(more=st.integers(0, 3), writes=st.integers(0, 60))
    def cut(self, more: int, writes: int) -> None:
        """One whose writes end somewhere, as by a kill: nothing that it does afterwards arrives."""
        self.total = max(1, min(self.total + more, MOST))
        with contextlib.suppress(StoreError, OSError):
            self._run(Faulty(self.inner, writes), self.total)

    @rule()
    def overtake(self) -> None:
        """Two runs at once: the first one ends."""
        if self.shard is None or not self._flags():
            return
        first, second = room(self.inner, self.total), room(self.inner, self.total)
        with first.held(anew=False) as before, second.held(anew=False):
            if before is None:  # it was cut short while it was made
                return
            for slot in range(self.total):
                if not before.done[slot]:
                    with contextlib.suppress(StoreError):
                        fill_slot(first, slot)
                        first.flush()
                        raise AssertionError("the first run went on")
                    break

    @rule(slot=st.integers(0, MOST - 1))
    def fail(self, slot: int) -> None:
        """A sample that cannot be traced, after some of its records."""
        if self.shard is None or not self._flags() or slot >= self.total or slot in self.done:
            return
        into = room(self.inner, self.total)
        with into.held(anew=False) as before:
            if before is None:
                return
            fill_slot(into, slot, stop=3)
            into.flush()
            into.fail(slot, f"no {sample(slot).prompt}", "")

    @invariant()
    def done_is_complete_and_right(self) -> None:
        found = set(check_done(self.inner))
        assert self.done <= found, "a sample that was done is lost"
        self.done = found
