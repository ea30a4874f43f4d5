"""Chunks past Zarr's own machinery: the same bytes, the same numbers, and Zarr wherever a chunk is of another kind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from dit_probe.store import chunks
from dit_probe.store.encoding import FILL, STORED, compressors

CODECS = {
    **{
        dtype: {"dtype": STORED[dtype], "compressors": compressors(dtype), "fill_value": FILL[dtype]}
        for dtype in STORED
    },
    "blosc zstd": {"dtype": "float32", "compressors": (BloscCodec(cname="zstd", shuffle="shuffle"), Crc32cCodec())},
    "no checksum": {"dtype": "float32", "compressors": None},
    "nothing but blosc": {"dtype": "float32", "compressors": (BloscCodec(cname="lz4", shuffle="bitshuffle"),)},
    "no shuffle": {"dtype": "float16", "compressors": (BloscCodec(shuffle="noshuffle"), Crc32cCodec())},
}
OTHER: dict[str, dict[str, Any]] = {
    "big endian": {"dtype": ">f4", "compressors": (Crc32cCodec(),)},
    "gzip": {"dtype": "float32", "compressors": (GzipCodec(), Crc32cCodec())},
    "transposed": {
        "dtype": "float32",
        "filters": (TransposeCodec(order=(1, 0, 2, 3)),),
        "compressors": (Crc32cCodec(),),
    },
    "several a chunk": {"dtype": "float32", "chunks": (2, 1, 5, 7), "compressors": (Crc32cCodec(),)},
    "parts of records": {"dtype": "float32", "chunks": (1, 1, 5, 4), "compressors": (Crc32cCodec(),)},
    "sharded": {"dtype": "float32", "shards": (2, 3, 5, 7), "compressors": (Crc32cCodec(),)},
}
SHAPE = (2, 3, 5, 7)


class Other(WrapperStore[MemoryStore]):
    """One that has an event loop's methods only."""


def array(store: Any, **options: Any) -> Any:
    options = {"chunks": (1, 1, 5, 7), "config": {"write_empty_chunks": True}} | options
    return zarr.create_array(store, name="group/a", shape=SHAPE, **options)


def numbers(dtype: Any) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(SHAPE) * 50).astype(dtype)


@pytest.mark.parametrize("where", ["disk", "memory", "other"])
@pytest.mark.parametrize("kind", CODECS)
def test_a_store_holds_the_bytes_that_zarr_writes(tmp_path: Path, where: str, kind: str, monkeypatch: Any):
    theirs, ours = (
        MemoryStore(),
        {"disk": LocalStore(tmp_path), "memory": MemoryStore(), "other": Other(MemoryStore())}[where],
    )
    values = numbers(CODECS[kind]["dtype"])
    array(theirs, **CODECS[kind])[...] = values
    mine = array(ours, **CODECS[kind])
    with monkeypatch.context() as patched:
        patched.setattr(zarr.Array, "__setitem__", None)  # none of it goes through Zarr's indexing
        patched.setattr(zarr.Array, "__getitem__", None)
        for index in np.ndindex(2, 3):
            chunks.write(mine, index, values[index])
            read = chunks.read(mine, (*(slice(at, at + 1) for at in index), slice(None), slice(0, 7)))
            assert read.dtype == values.dtype and np.array_equal(read, values[index][None, None])
            assert np.array_equal(chunks.read(mine, (*index, slice(None), slice(None))), values[index])
            assert np.array_equal(chunks.read(mine, (index[0] - 2, index[1], slice(None), slice(None))), values[index])
    stored = {key: value for key, value in theirs._store_dict.items() if "/c/" in key}
    assert len(stored) == 6
    prototype = zarr.core.buffer.default_buffer_prototype()
    for key, value in stored.items():
        assert zarr.core.sync.sync(ours.get(key, prototype)).to_bytes() == value.to_bytes()
    assert np.array_equal(mine[...], values)
    if where == "disk":
        assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_kept_in_another_way_is_left_to_zarr(kind: str):
    values, mine = numbers(np.float32), array(MemoryStore(), **OTHER[kind])
    for index in np.ndindex(2, 3):
        chunks.write(mine, index, values[index])
        assert np.array_equal(chunks.read(mine, (*index, slice(None), slice(None))), values[index])
    assert np.array_equal(mine[...], values)
    assert np.array_equal(
        chunks.read(mine, (slice(None), 1, slice(1, 3), slice(None, None, 2))), values[:, 1, 1:3, ::2]
    )


def test_values_of_another_shape_are_refused_and_those_of_another_type_converted():
    mine = array(MemoryStore(), **CODECS["float32"])
    with pytest.raises(ValueError, match="broadcast"):
        chunks.write(mine, (0, 0), np.ones((7, 5), np.float32))
    chunks.write(mine, (0, 0), np.full((5, 7), 2, np.float64))
    assert (mine[0, 0] == 2).all()


def test_numbers_that_are_read_can_be_written_to():
    mine = array(MemoryStore(), **CODECS["float32"])
    chunks.write(mine, (0, 0), np.ones((5, 7), np.float32))
    read = chunks.read(mine, (0, 0, slice(None), slice(None)))
    read[...] = 2
    assert (mine[0, 0] == 1).all()


def test_a_store_in_memory_keeps_an_array_that_is_its_own_and_copies_others():
    mine = array(MemoryStore(), **CODECS["no checksum"])
    given = np.ones((2, 5, 7), np.float32)
    chunks.write(mine, (0, 0), given[0])
    chunks.write(mine, (0, 1), own := given[1].copy(), own=True)
    chunks.write(mine, (0, 2), other := given[1].copy())
    chunks.write(mine, (1, 0), given[0], own=True)  # it says so, but has its memory from somewhere else
    given[...] = other[...] = 2
    assert (mine[0] == 1).all() and (mine[1, 0] == 1).all()
    stored = mine.store._store_dict["group/a/c/0/1/0/0"].as_numpy_array()
    assert np.shares_memory(stored, own)


def test_what_is_not_there_is_the_fill_value(tmp_path: Path):
    mine = array(LocalStore(tmp_path), **CODECS["float32"])
    assert np.isnan(chunks.read(mine, (1, 2, slice(None), slice(None)))).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_damage_is_an_error(tmp_path: Path, kind: str):
    mine = array(LocalStore(tmp_path), **CODECS[kind])
    chunks.write(mine, (0, 0), numbers(CODECS[kind]["dtype"])[0, 0])
    file = tmp_path / "group/a/c/0/0/0/0"
    kept = file.read_bytes()
    for broken in (kept[:9] + bytes([kept[9] ^ 1]) + kept[10:], kept[:-3], kept[:2], b""):
        file.write_bytes(broken)
        with pytest.raises(Exception, match=r"."):
            chunks.read(mine, (0, 0, slice(None), slice(None)))
    # The checksum fits, the length does not.
    mine = array(LocalStore(tmp_path), **CODECS[kind], overwrite=True)
    form = chunks._Form.of(mine)
    assert form is not None
    form.write((0, 0, 0, 0), np.zeros(12, np.uint8), own=True)
    with pytest.raises(Exception, match=r"."):
        chunks.read(mine, (0, 0, slice(None), slice(None)))


def test_large_records_reach_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[bool, str]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        names = {path.name for path in (tmp_path / "large").rglob("*") if path.is_file()} - {"zarr.json"}
        seen.append((all(name.endswith(".partial") for name in names), os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    side = int(chunks.FLUSHED_BYTES**0.5)
    for name, width in (("small", side - 1), ("large", side)):
        mine = zarr.create_array(
            LocalStore(tmp_path / name),
            shape=(1, side, width),
            chunks=(1, side, width),
            dtype="uint8",
            compressors=Crc32cCodec(),
        )
        chunks.write(mine, (0,), np.zeros((side, width), np.uint8))
    ((unnamed, file),) = [(early, file) for early, file in seen if "large" in file or "small" in file]
    assert unnamed and "large" in file and file.endswith(".partial")


def test_a_flush_that_fails_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = zarr.create_array(
        LocalStore(tmp_path),
        shape=(1, 2**18),
        chunks=(1, 2**18),
        dtype="uint8",
        compressors=Crc32cCodec(),
        fill_value=7,
    )

    def full(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk does not answer")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="does not answer"):
        chunks.write(mine, (0,), np.zeros(2**18, np.uint8))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["zarr.json"]
    assert (mine[0] == 7).all()
