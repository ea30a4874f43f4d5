"""Blocks of slots on the workers of a `dask.distributed` cluster: one model a worker, and only statuses come back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dit_probe.dataset_tracing.filling import Filler, Job, Outcome
from dit_probe.errors import TraceError
from dit_probe.store import Room


class Crew:
    """The workers of a client, each with a `Filler` of its own.

    Args:
        client: of `dask.distributed`.
        job: what is to be done; it is sent to every worker once, those that come later included.
        room: the arguments of a worker's `Room`.
        run: the run's name.
    """

    def __init__(self, client: Any, job: Job, room: tuple[Any, ...], run: str) -> None:
        from distributed import WorkerPlugin

        class Model(WorkerPlugin):
            """A worker's model, loaded by its first task."""

            def setup(self, worker: Any) -> None:
                self.filler = Filler(job, Room(*room))
                self.alone = threading.Lock()

            def teardown(self, worker: Any) -> None:
                del self.filler

        self._client, self._name = client, f"dit-probe-{run}"
        client.register_plugin(Model(), name=self._name)

    def fill(self, blocks: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Outcome | None]]:
        """Blocks as they are settled; None for one that ended every worker it was given to.

        Raises:
            StoreFault, StoreError, TraceError: as `Filler.fill`.
        """
        from distributed import KilledWorker, as_completed

        # A block may run twice, on a worker that is taken for dead and on the one that follows: it is the same then.
        futures = {self._submit(block): block for block in blocks}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except KilledWorker:
                    yield futures[future], None
        finally:
            self._client.cancel(list(futures))

    def _submit(self, block: Sequence[int]) -> Any:
        key = f"{self._name}-{block[0]}-{len(block)}"
        return self._client.submit(_fill, self._name, list(block), key=key, pure=False)

    def close(self) -> None:
        """Give the workers' memory back."""
        with contextlib.suppress(Exception):  # a worker that has just died does not answer, and the work is done
            self._client.unregister_worker_plugin(self._name)


def workers(client: Any) -> int:
    """How many there are.

    Raises:
        TraceError: none.
    """
    found = len(client.nthreads())
    if not found:
        raise TraceError("the client has no workers yet: client.wait_for_workers(1) waits for them")
    return found


def _fill(name: str, slots: list[int]) -> Outcome:
    from distributed import get_worker

    plugin: Any = get_worker().plugins[name]
    with plugin.alone:  # a worker with several threads still has one model
        return plugin.filler.fill(slots)
