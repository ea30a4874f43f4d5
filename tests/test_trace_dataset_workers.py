"""Data sets traced by workers of dask.distributed: the same store as by one process, whoever is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dataset_cases import CALL, PROBE, Broken, bits, load, prompts, traced
from zarr.storage import MemoryStore

import dit_probe as dp
from dit_probe.errors import IncompleteWarning, StoreFault, TraceError

distributed = pytest.importorskip("distributed")
COUNT = 9


@pytest.fixture(scope="module")
def whole(pipelines: Any) -> Any:
    store = MemoryStore()
    traced(pipelines("flux"), prompts(COUNT), store)
    return bits(store)


@pytest.fixture
def client() -> Any:
    """Two workers that are threads of this process."""
    options = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def test_workers_make_the_store_of_one_process(client: Any, whole: dict[str, Any], tmp_path: Path):
    with pytest.warns(IncompleteWarning, match="2 of 9 samples failed"):
        first = dp.trace_dataset(
            load, Broken(COUNT, 0, 5), PROBE, tmp_path, client=client, shard=2, progress=False, **CALL
        )
    assert first.failed.keys() == {0, 5} and first.made == COUNT - 2
    assert dp.store.info(tmp_path)["failed"].keys() == {0, 5}
    again = dp.trace_dataset(load, prompts(COUNT), PROBE, tmp_path, client=client, retry=True, progress=False, **CALL)
    assert (again.made, again.done) == (2, COUNT)
    assert bits(tmp_path) == whole
    assert not [
        name for name in client.run(lambda dask_worker: [*dask_worker.plugins]).values() if "dit-probe" in str(name)
    ]


def test_a_worker_that_cannot_go_on_ends_the_run(client: Any, tmp_path: Path):
    with pytest.raises(TraceError, match="a store in memory is not shared"):
        dp.trace_dataset(load, prompts(2), PROBE, MemoryStore(), client=client, progress=False, **CALL)
    dp.trace_dataset(load, prompts(3), PROBE, tmp_path, client=client, progress=False, **CALL)

    def other() -> Any:
        return dp.testing.tiny_pipeline("sd3")

    with pytest.raises(StoreFault, match=r"identity\.class: this run has 'SD3"):
        dp.trace_dataset(other, prompts(5), PROBE, tmp_path, client=client, progress=False, **CALL)


def test_samples_that_end_their_workers_stay_pending(client: Any, tmp_path: Path):
    """As dask says it, after a task has ended as many workers as it may."""

    def lost() -> Any:
        raise distributed.KilledWorker("task", SimpleNamespace(address="tcp://gone"), 3)

    with (
        pytest.warns(IncompleteWarning, match="samples 0-0 ended every worker"),
        pytest.raises(TraceError, match="each ended its worker"),
    ):
        dp.trace_dataset(lost, prompts(1), PROBE, tmp_path, client=client, progress=False, **CALL)
    dp.trace_dataset(load, prompts(1), PROBE, tmp_path, client=client, progress=False, **CALL)
    with pytest.warns(IncompleteWarning, match="samples 1-1 ended every worker"):
        found = dp.trace_dataset(lost, prompts(2), PROBE, tmp_path, client=client, progress=False, **CALL)
    assert (found.done, found.failed, found.pending) == (1, {}, (1,))


def test_a_worker_that_is_killed(whole: dict[str, Any], tmp_path: Path):
    """The other one makes what it left, each sample once."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        pids = list(client.run(os.getpid).values())

        def kill() -> None:
            done = tmp_path / "done" / "c"
            while not done.exists() or len([*done.iterdir()]) < 2:  # both have begun, or one with a second block
                time.sleep(0.01)
            os.kill(pids[1], signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = dp.trace_dataset(load, prompts(COUNT), PROBE, tmp_path, client=client, progress=False, **CALL)
        thread.join()
    assert found.done == COUNT and not found.failed and not found.pending
    assert bits(tmp_path) == whole
