"""Run tasks in background threads, with a bound on the bytes that wait."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable

QUEUE_BYTES = 256 * 2**20
THREADS = 8
"""More than cores, for most of the time they wait for the disk: with 4, 6 and 8, records of 24 MiB took 1.2, 1.1 and
1.0 times as long as one file."""


class ByteQueue:
    """Tasks that threads run in the background, with a bound on the bytes they hold.

    Args:
        limit: bytes queued or being written at any time; one task larger than that is let in when it is alone.
        threads: most threads; one starts when a task comes and all others are at work.

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
        self._lock = threading.Lock()
        self._task_there, self._task_done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._bytes = self._idle = 0
        self._waiting: Counter[int] = Counter()
        self._closing = False

    def put(self, task: Callable[[], object], nbytes: int, tag: int) -> None:
        """Queue a task that holds `nbytes`; blocks while the queue is full, unless a task has failed."""
        with self._lock:
            self._task_done.wait_for(
                lambda: not self._bytes or self._bytes + nbytes <= self.limit or self.failure is not None
            )
            if self.failure is not None:
                return
            self._tasks.append((task, nbytes, tag))
            self._bytes += nbytes
            self._waiting[tag] += 1
            if len(self._tasks) > self._idle and len(self._threads) < self._size:
                # A daemon: a program that forgets `close` still ends (its samples are not `done` then).
                name = f"dit-probe-writer-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._task_there.notify()

    def wait(self, tags: Iterable[int]) -> None:
        """Block until no task of these tags is queued or running."""
        tags = tuple(tags)
        with self._lock:
            self._task_done.wait_for(lambda: not any(self._waiting[tag] for tag in tags))

    def close(self) -> None:
        """Run what is queued, then end the threads."""
        with self._lock:
            self._closing = True
            self._task_there.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                self._task_there.wait_for(lambda: self._tasks or self._closing)
                self._idle -= 1
                if not self._tasks:
                    return
                task, nbytes, tag = self._tasks.popleft()
            failure = None
            try:
                task()
            except BaseException as error:
                failure = error
            del task  # its array is free before the bytes are given back
            with self._lock:
                self.failure = self.failure or failure
                self._bytes -= nbytes
                self._waiting[tag] -= 1
                self._task_done.notify_all()
