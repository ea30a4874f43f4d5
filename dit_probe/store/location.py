"""Where a store is, and what is there."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, StorePath

from dit_probe.errors import StoreError
from dit_probe.schema import FORMAT, FORMAT_VERSION
from dit_probe.store import limits
from dit_probe.store.limits import listed


def locate(store: Any) -> StorePath:
    """A path, fsspec URL, store of Zarr or obstore, dict or None (memory) as a place in a Zarr store; touches nothing.

    Raises:
        StoreError: it is none of these.
    """
    if isinstance(store, StorePath):
        return store
    if store is None or isinstance(store, dict):
        return StorePath(MemoryStore(store))
    if isinstance(store, Store):
        return StorePath(store)
    try:
        if type(store).__module__.startswith("obstore"):
            return StorePath(ObjectStore(store))
        if not isinstance(store, str | os.PathLike):
            return StorePath(FsspecStore.from_mapper(store))
        path = os.fspath(store).removeprefix("file://")
        if "://" in path or "::" in path:
            return StorePath(FsspecStore.from_url(path))
        return StorePath(LocalStore(Path(path).expanduser()))
    except Exception as error:
        raise StoreError(
            f"{store!r} is no place for a store ({type(error).__name__}: {error}); give a path, an fsspec URL, a store "
            f"of Zarr or obstore, or None for memory"
        ) from error


def text(location: StorePath) -> str:
    """The place as a person writes it."""
    if isinstance(location.store, LocalStore):
        return str(location.store.root / location.path)
    if isinstance(location.store, FsspecStore):
        return "/".join(part for part in (location.store.path, location.path) if part)
    return "the store in memory" if isinstance(location.store, MemoryStore) else str(location)


def find(location: StorePath) -> zarr.Group | str | None:
    """The group there; or what else is there, in words; or None when nothing is."""
    if isinstance(location.store, LocalStore):
        # Asked of the file system, since asking Zarr makes the directory.
        root = location.store.root / location.path
        if not root.exists():
            return None
        if not root.is_dir():
            return "a file"
    try:
        limits.check_metadata(location)
        return zarr.open_group(location, mode="r", zarr_format=3)
    except ContainsArrayError:
        return "a Zarr array"
    except FileNotFoundError:
        names = sorted(listed(lambda: location.store.list_dir(location.path)))
        return f"a directory that holds {', '.join(names[:4])}{' …' if len(names) > 4 else ''}" if names else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"a Zarr node whose metadata cannot be read ({error})"


def require(store: Any) -> tuple[StorePath, zarr.Group]:
    """The place and group of a dit-probe store.

    Raises:
        StoreError: nothing is there, or something else, or a store of a newer version.
    """
    location = locate(store)
    found = find(location)
    if found is None:
        raise StoreError(f"nothing is at {text(location)}; dp.trace(..., store=path) makes a store")
    if isinstance(found, str):
        raise StoreError(f"{text(location)} is {found}, not a dit-probe store; give the path that dp.trace wrote to")
    check_format(found, location)
    return location, found


def check_format(group: zarr.Group, location: StorePath) -> None:
    """Raise unless the group is a dit-probe store that this version can read."""
    if group.attrs.get("format") != FORMAT:
        names = ", ".join(sorted(group.keys())[:6]) or "nothing"
        raise StoreError(
            f"{text(location)} is a Zarr group (it holds {names}) but not a dit-probe store: its attribute 'format' is "
            f"{group.attrs.get('format')!r}. Use another path."
        )
    version: Any = group.attrs.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"{text(location)} has format version {version}, this dit-probe reads up to {FORMAT_VERSION}: "
            f"pip install --upgrade dit-probe"
        )
    limits.check(text(location), group)


def writable(location: StorePath) -> zarr.Group:
    """The group, with the lengths that its arrays have now."""
    return zarr.open_group(location, mode="r+", use_consolidated=False)


def clear(location: StorePath) -> None:
    """Delete what is there; a directory itself stays, for a lock is held on it.

    What says that samples are complete goes first, and what says that this is a store goes last: whenever it is cut
    short, the rest is no complete sample, and may be overwritten.
    """
    sync(location.store.delete_dir(_below(location, "done")))
    if not isinstance(location.store, LocalStore):
        sync(location.store.delete_dir(location.path))
        return
    root = location.store.root / location.path
    for path in sorted(root.iterdir(), key=lambda path: path.name == "zarr.json") if root.exists() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


_FILTERS = threading.Lock()


def commit(location: StorePath) -> None:
    """Make the present lengths of all arrays what readers see, in one atomic write.

    Icechunk has commits of its own.
    """
    if not location.store.supports_consolidated_metadata:
        return
    # The filters are the process's: of two runs in two threads, one would undo the other's.
    with _FILTERS, warnings.catch_warnings():
        # Consolidated metadata is not in the Zarr v3 specification yet; a reader that ignores it finds the same arrays.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(location)


def committed(group: zarr.Group) -> bool:
    """Whether a group was made to its end."""
    return group.metadata.consolidated_metadata is not None or not group.store.supports_consolidated_metadata


def done(group: zarr.Group) -> list[bool]:
    """Which samples are complete, one entry per sample that readers see."""
    array: Any = group["done"] if "done" in group else np.zeros(0, bool)
    return array[:].tolist()


def keys(location: StorePath, name: str) -> Sequence[str]:
    """Every key below a name, relative to it."""
    start = _below(location, name)
    return [key.rsplit(start, 1)[-1] if start else key for key in listed(lambda: location.store.list_prefix(start))]


def nbytes(location: StorePath, name: str = "") -> int:
    """Bytes of everything below a name, as stored."""
    return sync(location.store.getsize_prefix(_below(location, name)))


def _below(location: StorePath, name: str) -> str:
    path = "/".join(part for part in (location.path, name) if part)
    return f"{path}/" if path else ""
