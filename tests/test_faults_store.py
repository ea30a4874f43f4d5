"""Faults of a store: full disks, cuts of power at any write, two writers, damaged chunks; and any sequence of them."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_cases import Faulty, appended, check_done, fill_slot, fresh, quiet, room, run_room
from hypothesis import settings
from store_cases import LAYOUT, fill, sample, whole
from store_machine import StoreMachine
from zarr.storage import LocalStore, MemoryStore

from dit_probe import store
from dit_probe.errors import StoreError, StoreFault


@pytest.mark.parametrize("shard", [0, 2])
@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "No space.*Make space"), (errno.EIO, "Input/output")])
def test_a_disk_that_fails_at_any_write(shard: int, code: int, message: str):
    counted = Faulty(fresh())
    run_room(counted, 3, shard)
    writes = counted.count[0]
    for at in range(0, writes, 13):
        inner = fresh()
        with pytest.raises(StoreFault, match=message):
            run_room(Faulty(inner, at, code), 3, shard)
        before = check_done(inner)
        run_room(inner, 3, shard)
        assert set(before) <= set(check_done(inner)) == {0, 1, 2}
        assert not store.damaged(inner)


def test_growth_that_is_cut_short():
    """Lengths are in every array, and do not grow all at once."""
    for at in range(14):
        inner = fresh()
        run_room(inner, 2)
        with contextlib.suppress(StoreFault):
            run_room(Faulty(inner, at), 4)
        assert set(check_done(inner)) >= {0, 1}
        total = 3 if at % 2 and store.info(inner)["sizes"]["sample"] == 2 else 4  # or less than the run that was cut
        run_room(inner, total)
        assert check_done(inner) == [*range(total)]


@pytest.mark.parametrize("shard", [None, 0])
def test_overwriting_that_is_cut_short(tmp_path: Path, shard: int | None, monkeypatch: pytest.MonkeyPatch):
    path, plain = tmp_path / "run.zarr", shutil.rmtree
    for at in range(6):
        whole(path, mode="w")
        calls = iter(range(100))

        def killed(found: Path, calls: Any = calls, at: int = at) -> None:
            if next(calls) >= at:
                raise OSError(errno.EIO, "the power went")
            plain(found)

        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(StoreFault, match="the power went"):
            whole(path, mode="w")
        monkeypatch.undo()
        assert check_done(path) in ([], [0, 1])
        if shard is None:
            whole(path, mode="w")
        else:
            with room(path, 2).held(anew=True):
                pass
            run_room(path, 2)
        assert check_done(path) == [0, 1]
        plain(path)


def test_a_full_file_system(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        (disk / "filler").write_bytes(b"0" * 100_000)
        with pytest.raises(StoreFault, match=r"No space left on device.*Make space"):
            run_room(disk / "run.zarr", 40)
        before = check_done(disk / "run.zarr")
        assert 0 < len(before) < 40
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        run_room(disk / "run.zarr", 40)
        assert check_done(disk / "run.zarr") == [*range(40)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("shard", [0, 2])
def test_damaged_chunks_are_named_and_the_rest_is_read(tmp_path: Path, shard: int):
    path = tmp_path / "run.zarr"
    run_room(path, 3, shard)
    good = store.open(path).load()
    numbers = good.o_c.sel(step=3, layer=2).values[0].tobytes()
    files = list((path / "o_c").glob("c.*"))
    (file,) = [file for file in files if numbers in file.read_bytes()]
    kept = file.read_bytes()
    at = kept.index(numbers)
    for broken in (kept[:at] + bytes([kept[at] ^ 4]) + kept[at + 1 :], kept[: at + 5]):
        file.write_bytes(broken)
        found = store.damaged(path)
        assert any(line.startswith("'o_c' at sample 0, step 3, layer 2 of ") for line in found)
        with pytest.raises(StoreError, match=r"'o_c' at sample 0, step 3, layer 2 of .*run.zarr cannot be read"):
            store.open(path).o_c.sel(step=3, layer=2)[0].load()
        assert np.array_equal(store.open(path).o_c[2].values, good.o_c[2].values, equal_nan=True)
        assert np.array_equal(store.open(path).o_x.values, good.o_x.values, equal_nan=True)
    file.write_bytes(kept)
    assert not store.damaged(path)


def test_a_missing_chunk_is_found(tmp_path: Path):
    whole(tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "p" / "c.1.0.2.0.0").unlink()
    (line,) = store.damaged(tmp_path / "run.zarr")
    assert line.startswith("'p' at sample 1, step 0, layer 5 of ") and line.endswith(" is missing")


def test_one_writer_at_a_time(tmp_path: Path):
    path = tmp_path / "run.zarr"
    writer = store.create(path, LAYOUT)
    fill(writer, [sample(0)])
    assert store.info(path)["resume"] == "no: somebody is writing it"
    for mode in (None, "a", "w"):
        with pytest.raises(StoreError, match="is being written already"):
            store.create(path, LAYOUT, mode=mode)
    with pytest.raises(StoreError, match="is being written already"), room(path, 3).held(anew=True):
        pass
    assert check_done(path) == [0]  # and may be read in the meantime
    fill(writer, [sample(1)])
    writer.close()
    appended(path, 2, 1, "a")
    assert check_done(path) == [0, 1, 2]


def test_a_run_that_was_overtaken_ends():
    """Where there are no locks, as in object stores, the last run that was started has the store."""
    target = MemoryStore()
    first, second = room(target, 3), room(target, 3)
    with first.held(anew=False):
        fill_slot(first, 0)
        with second.held(anew=False) as before:
            assert before is not None and before.done.tolist() == [True, False, False]
            with pytest.raises(StoreFault, match="another run was started on the store in memory"):
                fill_slot(first, 1)
            with pytest.raises(StoreFault, match="another run"):
                first.fail(1, "reason", "hash")
            fill_slot(second, 1)
    with quiet():
        assert check_done(target) == [0, 1]


def test_a_store_that_cannot_be_written(tmp_path: Path):
    whole(tmp_path / "run.zarr")
    for mode in ("a", "w"):
        with pytest.raises(StoreError, match="opened for reading only"):
            store.create(LocalStore(tmp_path / "run.zarr", read_only=True), LAYOUT, mode=mode)
    with (
        pytest.raises(StoreError, match="opened for reading only"),
        room(MemoryStore(read_only=True), 2).held(anew=False),
    ):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/run\.zarr cannot be written: .*Not a directory"):
        store.create(tmp_path / "file" / "run.zarr", LAYOUT)
    assert check_done(LocalStore(tmp_path / "run.zarr", read_only=True)) == [0, 1]


def test_clocks_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import time

    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run_room(tmp_path / "run.zarr", 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run_room(tmp_path / "run.zarr", 4)
    assert check_done(tmp_path / "run.zarr") == [0, 1, 2, 3]


TestAnySequence = StoreMachine.TestCase
TestAnySequence.settings = settings(max_examples=20, stateful_step_count=8, deadline=None)
