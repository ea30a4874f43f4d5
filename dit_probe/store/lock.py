"""One writer at a time, for stores in a directory: held by the kernel, so that no crash leaves it behind."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
from typing import Any

from zarr.storage import LocalStore, StorePath

from dit_probe.errors import StoreError
from dit_probe.store import location

TRIES = 3
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class Lock:
    """The right to write a store that is a directory.

    It is ``flock`` on the directory itself: nothing is added to the store, and it ends with the process, whatever ends
    that. Where there is none (other stores, Windows, file systems without locks) it does nothing.

    Args:
        place: the store; the directory is made.

    Raises:
        StoreError: another process, or another writer of this one, has it; or the place cannot be written.

    Example:
        >>> lock = Lock(location.locate("run.zarr"))
        >>> held("run.zarr")
        True
        >>> lock.release()
        >>> held("run.zarr")
        False
    """

    def __init__(self, place: StorePath) -> None:
        self._close: Any = lambda: None
        if place.store.read_only:
            raise StoreError(f"{location.text(place)} is opened for reading only; give one that can be written")
        if not isinstance(place.store, LocalStore):
            return
        root = place.store.root / place.path
        try:
            import fcntl

            root.mkdir(parents=True, exist_ok=True)
            file = os.open(root, os.O_RDONLY)
        except ImportError:
            return
        except OSError as error:
            raise StoreError(f"{root} cannot be written: {error}; give another path") from error
        self._close = weakref.finalize(self, _unlock, file, os.getpid())
        for attempt in range(TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in _HELD:
                    self._close()
                    return
            if attempt < TRIES - 1:
                time.sleep(0.02)  # `held` has it for a moment
        self._close()
        raise StoreError(
            f"{location.text(place)} is being written already, by another process or an open writer of this one. Wait "
            "for it, or trace into another store"
        )

    def release(self) -> None:
        """Give it back; twice does nothing more."""
        self._close()


def held(store: Any) -> bool:
    """Whether somebody is writing a store; False where that cannot be told."""
    place = location.locate(store)
    if not isinstance(place.store, LocalStore) or not (place.store.root / place.path).is_dir():
        return False
    try:
        Lock(StorePath(LocalStore(place.store.root), place.path)).release()
    except StoreError:
        return True
    return False


def _unlock(file: int, owner: int) -> None:
    import fcntl

    if os.getpid() == owner:  # a fork shares the lock, and must not end it
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
