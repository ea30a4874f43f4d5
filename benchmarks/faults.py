"""How many faults a run of a data set has survived: kills at random moments, random sequences, a long run.

    python benchmarks/faults.py

Every part writes its counts to benchmarks/results/faults.json; rerunning goes on where it stopped, kill by kill. The
tests run the same code for a few turns (`tests/test_faults_*.py`); the cases are theirs.

* **serial**: a run of 6 samples is started in a process of its own and killed (SIGKILL) at a random moment of its
  length, in turn with a file a record and with two samples a file. What it left done is compared with an undisturbed
  run; the same run completes it; the whole is compared, bit by bit.
* **workers**: two processes of dask.distributed fill 12 samples, one of them is killed at a random moment.
* **sequences**: the state machine of `tests/store_machine.py`: make, fill, cut short, fail, overtake, continue, read.
* **soak**: 2,000 samples by one process; resident memory and open files every 50 samples. The slope is that of a
  straight line through the second half; the interval, 95 %, is a bootstrap over blocks of 5 neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from dataset_cases import CALL, PROBE, bits, load, prompts, traced  # noqa: E402
from fault_cases import killed, quiet, timed  # noqa: E402
from hypothesis import settings  # noqa: E402
from hypothesis.database import InMemoryExampleDatabase  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402
from store_machine import StoreMachine  # noqa: E402

import dit_probe as dp  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
KILLS, SEQUENCES, SOAK = 50, 500, 2000
EVERY, AT_ONCE = 50, 25
COUNT, WORKER_COUNT = 6, 12


def known() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(part: str, found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**known(), part: found}, indent=1) + "\n")
    print(part, json.dumps(found), flush=True)


def serial(folder: Path) -> None:
    found = known().get("serial", {"kills": 0, "nothing done yet": 0, "done at the kill": [], "wrong": 0})
    if found["kills"] >= KILLS:
        return
    pipe, samples = load(), prompts(COUNT)
    traced(pipe, samples, folder / "whole.zarr")
    whole = bits(folder / "whole.zarr")
    length = timed(lambda: traced(pipe, samples, folder / "timed.zarr"))
    for turn in range(found["kills"], KILLS):
        path = folder / f"{turn}.zarr"
        shard = 2 * (turn % 2)
        killed(lambda path=path, shard=shard: traced(pipe, samples, path, shard=shard), random.uniform(0, length))
        done = 0
        if (path / "zarr.json").exists():
            with contextlib.suppress(dp.errors.StoreError), quiet():
                left = dp.open(path)
                done = int(left.done.sum()) if "done" in left else 0
                found["wrong"] += sum(
                    left[name][slot].values.tobytes()
                    != whole[name][slot * len(whole[name]) // COUNT :][: len(whole[name]) // COUNT]
                    for name in ("o_c", "score_output")
                    for slot in range(COUNT)
                    if done and bool(left.done[slot])
                )
        made = traced(pipe, samples, path, shard=shard).made
        found["wrong"] += made != COUNT - done
        found["wrong"] += bits(path) != whole
        found["kills"] += 1
        found["nothing done yet"] += not done
        found["done at the kill"].append(done)
        shutil.rmtree(path)
        keep("serial", found)


def workers(folder: Path) -> None:
    from distributed import Client, LocalCluster

    found = known().get("workers", {"kills": 0, "wrong": 0})
    if found["kills"] >= KILLS:
        return
    samples = prompts(WORKER_COUNT)
    traced(load(), samples, folder / "whole.zarr")
    whole = bits(folder / "whole.zarr")
    for turn in range(found["kills"], KILLS):
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            path, pids = folder / f"w{turn}.zarr", list(client.run(os.getpid).values())
            thread = threading.Thread(target=_kill_later, args=(path, pids[turn % 2]))
            thread.start()
            account = dp.trace_dataset(load, samples, PROBE, path, client=client, progress=False, **CALL)
            thread.join()
        found["kills"] += 1
        found["wrong"] += account.done != WORKER_COUNT or bits(path) != whole
        keep("workers", found)


def _kill_later(path: Path, pid: int) -> None:
    while not (path / "done" / "c").exists():
        time.sleep(0.01)
    time.sleep(random.uniform(0, 2))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def sequences(folder: Path) -> None:
    found = known().get("sequences", {"sequences": 0, "steps at most": 12, "wrong": 0})
    while found["sequences"] < SEQUENCES:
        options = settings(
            max_examples=AT_ONCE,
            stateful_step_count=12,
            deadline=None,
            database=InMemoryExampleDatabase(),
            print_blob=True,
        )
        run_state_machine_as_test(StoreMachine, settings=options)  # raises, with the sequence, if one is wrong
        found["sequences"] += AT_ONCE
        keep("sequences", found)


def soak(folder: Path) -> None:
    if "soak" in known():
        return
    pages, files, start = list[int](), list[int](), time.perf_counter()

    class Watched(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index % EVERY == 0:
                pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
                files.append(len(os.listdir("/proc/self/fd")))
            return super().__getitem__(index)

    samples = Watched({"prompt": "a sun in the sky", "seed": seed} for seed in range(SOAK))
    account = traced(load(), samples, folder / "soak.zarr", shard=16)
    kib = np.array(pages) * os.sysconf("SC_PAGE_SIZE") / 1024
    low, high = np.percentile(_slopes(kib[len(kib) // 2 :]), [2.5, 97.5])
    keep(
        "soak",
        {
            "samples": account.done,
            "seconds a sample": round((time.perf_counter() - start) / SOAK, 3),
            "KiB a sample": [round(float(value), 3) for value in (_slope(kib[len(kib) // 2 :]), low, high)],
            "resident MiB": [round(float(kib[at]) / 1024, 1) for at in (1, len(kib) // 2, -1)],
            "open files": [files[1], files[-1]],
            "files of the store": dp.store.info(folder / "soak.zarr")["files"],
        },
    )


def _slope(values: np.ndarray, at: np.ndarray | None = None) -> float:
    where = np.arange(len(values)) if at is None else at
    return float(np.polyfit(where * EVERY, values[where], 1)[0])


def _slopes(values: np.ndarray, block: int = 5) -> list[float]:
    drawn = np.random.default_rng(0).integers(0, len(values) - block + 1, (1000, len(values) // block))
    return [_slope(values, (starts[:, None] + np.arange(block)).ravel()) for starts in drawn]


if __name__ == "__main__":
    parts: dict[str, Callable[[Path], None]] = {
        "serial": serial,
        "workers": workers,
        "sequences": sequences,
        "soak": soak,
    }
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as place:
            parts[name](Path(place))
