"""Run tasks in background threads, with a bound on the bytes that wait."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable

QUEUE_BYTES = 256 * 2**20
THREADS = 4


class ByteQueue:
    """Tasks that threads run in the background, with a bound on the bytes they hold.

    Args:
        limit: bytes queued or being written at any time; one task larger than that is let in when it is alone.
        threads: number of threads; they start with the first task.

    Attributes:
        failure: the first exception of a task, ``None`` while all went well.

    Example:
        >>> queue, seen = ByteQueue(limit=100, threads=1), []
        >>> queue.put(lambda: seen.append(1), 8, tag=0)
        >>> queue.close()
        >>> seen
        [1]
    """

    def __init__(self, limit: int = QUEUE_BYTES, threads: int = THREADS) -> None:
        self.limit = limit
        self.failure: BaseException | None = None
        self._size = threads
        self._threads: list[threading.Thread] = []
        self._tasks: deque[tuple[Callable[[], object], int, int]] = deque()
        self._changed = threading.Condition()
        self._bytes = 0
        self._waiting: Counter[int] = Counter()
        self._closing = False

    def put(self, task: Callable[[], object], nbytes: int, tag: int) -> None:
        """Queue a task that holds `nbytes`; blocks while the queue is full, unless a task has failed."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._bytes or self._bytes + nbytes <= self.limit or self.failure is not None
            )
            if self.failure is not None:
                return
            if not self._threads:
                # Daemons: a program that forgets `close` still ends (its samples are not `done` then).
                self._threads = [
                    threading.Thread(target=self._work, name=f"dit-probe-writer-{index}", daemon=True)
                    for index in range(self._size)
                ]
                for thread in self._threads:
                    thread.start()
            self._tasks.append((task, nbytes, tag))
            self._bytes += nbytes
            self._waiting[tag] += 1
            self._changed.notify_all()

    def wait(self, tags: Iterable[int]) -> None:
        """Block until no task of these tags is queued or running."""
        tags = tuple(tags)
        with self._changed:
            self._changed.wait_for(lambda: not any(self._waiting[tag] for tag in tags))

    def close(self) -> None:
        """Run what is queued, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closing)
                if not self._tasks:
                    return
                task, nbytes, tag = self._tasks.popleft()
            failure = None
            try:
                task()
            except BaseException as error:
                failure = error
            del task  # its array is free before the bytes are given back
            with self._changed:
                self.failure = self.failure or failure
                self._bytes -= nbytes
                self._waiting[tag] -= 1
                self._changed.notify_all()
