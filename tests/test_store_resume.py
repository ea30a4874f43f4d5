"""A store is killed at any time, readable at any time, completed later, and never overwritten unless asked."""

import dataclasses
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from store_cases import COORDS, IDENTITY, LAYOUT, SIZES, VARIABLES, fill, missing, sample, whole
from zarr.storage import MemoryStore

from dit_probe import store
from dit_probe.errors import IncompleteWarning, StoreError


def test_a_complete_store_is_left_alone(tmp_path: Path):
    whole(tmp_path / "run.zarr")
    with pytest.raises(StoreError, match=r"store exists: .*run\.zarr is complete .* mode='a' .* mode='w'"):
        store.create(tmp_path / "run.zarr", LAYOUT)
    with pytest.raises(StoreError, match="mode='x'"):
        store.create(tmp_path / "run.zarr", LAYOUT, mode="x")
    assert store.open(tmp_path / "run.zarr").sizes["sample"] == 2


def test_runs_are_appended(tmp_path: Path):
    path = tmp_path / "run.zarr"
    for first in (0, 2):
        writer = store.create(
            path, dataclasses.replace(LAYOUT, attrs={"identity": IDENTITY, "time": str(first)}), mode="a"
        )
        assert fill(writer, [sample(first), sample(first + 1)]) == (first, first + 1)
        writer.close()
    ds = store.open(path)
    assert ds.identical(whole(None, 4).dataset().assign_attrs(ds.attrs))
    assert ds.attrs["time"] == "0"


def test_overwriting_is_asked_for_and_spares_what_is_not_a_store(tmp_path: Path):
    path = tmp_path / "run.zarr"
    whole(path)
    whole(path, 1, mode="w")
    assert store.open(path).sizes["sample"] == 1
    (tmp_path / "notes.txt").write_text("mine")
    for mode in (None, "a", "w"):
        with pytest.raises(StoreError, match="nothing was overwritten"):
            store.create(tmp_path, LAYOUT, mode=mode)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match="not a dit-probe store"):
        store.create(tmp_path / "other", LAYOUT)


def test_an_interrupted_run_is_completed(tmp_path: Path):
    path = tmp_path / "run.zarr"
    writer = store.create(path, LAYOUT)
    fill(writer, [sample(0)])
    fill(writer, [sample(1)], stop=3)
    writer.close()
    with pytest.warns(
        IncompleteWarning, match=r"1 of 2 samples .* sample 1 lacks 7 of 10 records, first 'o_c' at step 3"
    ):
        assert store.open(path).done.values.tolist() == [True, False]
    assert store.info(path)["incomplete"] == [1]

    writer = store.create(path, LAYOUT)
    assert writer.claim([sample(0, seed=-1)]) == (0,)
    assert writer.skipped(0)
    writer.write("o_x", np.zeros(0), sample=0)  # ignored, whatever it is
    writer.finish([0])
    assert fill(writer, [sample(1)]) == (1,)
    assert not writer.skipped(1)
    assert fill(writer, [sample(2)]) == (2,)
    writer.close()
    assert store.open(path).identical(whole(None, 3).dataset())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a dog"}, "prompt: this run has 'a dog', the store has 'a cat №0'"),
        ({"seed": 9}, "seed: this run has 9, the store has 0"),
        ({"concepts": ("dog", "sand")}, r"concept.*this run has \['dog', 'sand'\], the store has \['cat', 'grass'\]"),
    ],
)
def test_another_generation_does_not_continue_an_interrupted_run(changes: dict[str, Any], message: str):
    memory = MemoryStore()
    writer = store.create(memory, LAYOUT)
    fill(writer, [sample(0)])
    fill(writer, [sample(1)], stop=1)
    writer.close()
    writer = store.create(memory, LAYOUT)
    with pytest.raises(StoreError, match=f"sample 0 is another one .*{message}.*mode='a'"):
        writer.claim([sample(0, **changes)])
    assert writer.claim([sample(0)]) == (0,)
    writer.close()


def test_a_run_that_recorded_nothing_leaves_the_path_free(tmp_path: Path):
    store.create(tmp_path / "run.zarr", LAYOUT).close()
    with pytest.warns(IncompleteWarning, match="holds no sample"):
        assert store.open(tmp_path / "run.zarr").sizes["sample"] == 0
    other = dataclasses.replace(LAYOUT, attrs={"identity": {"model": "another"}})
    store.create(tmp_path / "run.zarr", other).close()
    assert store.info(tmp_path / "run.zarr")["identity"] == {"model": "another"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attrs": {"identity": {**IDENTITY, "model": "SD3"}}},
            "identity.model: this run has 'SD3', the store has 'toy'",
        ),
        ({"sizes": {**SIZES, "head": 3}}, r"variable o_c\.lengths\.head: this run has 3, the store has 2"),
        (
            {"coords": {**COORDS, "timestep": (("step",), np.array([1000.0, 500.0]))}},
            r"timestep: this run has \[1000.0, 500.0\], the store has \[1000.0, 250.0\]",
        ),
        ({"variables": VARIABLES[:2]}, r"variable p\.dtype: this run has none, the store has 'float16'"),
        (
            {"variables": (*VARIABLES[:2], dataclasses.replace(VARIABLES[2], dtype="float32"))},
            r"variable p\.dtype: this run has 'float32', the store has 'float16'",
        ),
        (
            {"variables": (dataclasses.replace(VARIABLES[0], layers=(0,)), *VARIABLES[1:])},
            r"variable o_x\.layers: this run has \[0\], the store has \[0, 2, 5\]",
        ),
    ],
)
def test_a_store_of_another_run_is_not_continued(changes: dict[str, Any], message: str):
    memory = MemoryStore()
    whole(memory)
    other = dataclasses.replace(LAYOUT, **changes)
    with pytest.raises(StoreError, match=message):
        store.create(memory, other, mode="a")
    with pytest.raises(StoreError, match=message.replace("the store has", "the one before has")):
        store.create(None, LAYOUT).require(other)


def test_the_last_bit_of_a_timestep_makes_no_other_run():
    memory = MemoryStore()
    whole(memory)
    coords = {**COORDS, "timestep": (("step",), np.array([1000.0, 250.00001]))}
    store.create(memory, dataclasses.replace(LAYOUT, coords=coords), mode="a").close()


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from store_cases import LAYOUT, fill, sample
from dit_probe import store
writer = store.create({path!r}, LAYOUT)
for index in range(10_000):
    fill(writer, [sample(index)])
    print(index, flush=True)
"""


@pytest.mark.parametrize("pause", [0.0, 0.013])
def test_killed_midway_and_completed(tmp_path: Path, pause: float):
    path, tests = tmp_path / "run.zarr", Path(__file__).parent
    code = KILLED.format(root=str(tests.parent), tests=str(tests), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ds = store.open(path)
        xr.open_zarr(path).load()
    count = ds.sizes["sample"]
    done = ds.done.values
    assert done[: count - 1].all()
    assert count >= 3
    assert len(caught) == (not done.all()), [str(entry.message) for entry in caught]

    if not done.all():
        writer = store.create(path, LAYOUT)
        for index in range(count):
            fill(writer, [sample(index)])
        writer.close()
    assert store.open(path).identical(whole(None, count).dataset())


def test_killed_between_two_arrays_of_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.zarr"
    writer = store.create(path, LAYOUT)
    fill(writer, [sample(0)], stop=1)
    fine, calls = zarr.Array.resize, iter(range(100))

    def killed(array: Any, shape: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        fine(array, shape)

    monkeypatch.setattr(zarr.Array, "resize", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.claim([sample(1), sample(2)])
    monkeypatch.undo()
    writer.close()
    assert missing(path).sizes["sample"] == 1
    assert xr.open_zarr(path).sizes["sample"] == 1
    writer = store.create(path, LAYOUT)
    fill(writer, [sample(0)])
    fill(writer, [sample(1)])
    writer.close()
    assert store.open(path).identical(whole(None).dataset())
