"""Stores that are no directories: in buckets of an S3-compatible server on this machine, and in a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fault_cases import appended, check_done, fill_slot, quiet, room, run_room
from store_cases import whole

from dit_probe import store
from dit_probe.errors import StoreFault

KEYS = {"access_key_id": "tests", "secret_access_key": "tests"}


@pytest.fixture(scope="module")
def server() -> Any:
    """The address of an empty S3, with a bucket ``runs``."""
    pytest.importorskip("moto")
    boto3, threaded = pytest.importorskip("boto3"), pytest.importorskip("moto.server").ThreadedMotoServer
    running = threaded(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    names = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **names).create_bucket(Bucket="runs")
    yield address
    running.stop()


def bucket(server: str, kind: str, name: str) -> Any:
    if kind == "obstore":
        obstore = pytest.importorskip("obstore.store")
        options = {"endpoint": server, "region": "us-east-1", "client_options": {"allow_http": True}, **KEYS}
        return obstore.S3Store("runs", prefix=name, **options)
    pytest.importorskip("s3fs")
    from zarr.storage import FsspecStore

    options = {"key": "tests", "secret": "tests", "client_kwargs": {"endpoint_url": server}}
    return FsspecStore.from_url(f"s3://runs/{name}", storage_options=options)


@pytest.mark.filterwarnings("ignore")  # those of botocore and aiohttp are not ours
@pytest.mark.parametrize("kind", ["obstore", "s3fs"])
@pytest.mark.parametrize("shard", [0, 2])
def test_a_bucket(server: str, kind: str, shard: int):
    target = bucket(server, kind, f"{kind}-{shard}")
    run_room(target, 2, shard)
    assert check_done(target) == [0, 1]
    run_room(target, 3, shard)
    assert check_done(target) == [0, 1, 2] and not store.damaged(target)
    facts = store.info(target)
    assert facts["bytes"] > 0 and facts["resume"] == "nothing is left to do"
    assert store.open(target).o_x.sel(step=3, layer=2).load().notnull().all()
    first, second = room(target, 4), room(target, 4)
    with first.held(anew=False), second.held(anew=False), pytest.raises(StoreFault, match="another run was started"):
        fill_slot(first, 3)
        first.flush()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["obstore", "s3fs"])
def test_traces_in_a_bucket(server: str, kind: str):
    target = bucket(server, kind, f"{kind}-plain")
    whole(target)
    appended(target, 2, 1, "a")
    assert check_done(target) == [0, 1, 2]
    whole(target, 1, mode="w")
    assert check_done(target) == [0]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(tmp_path: Path, scheme: str):
    url = f"{scheme}://{tmp_path}/run.zarr"
    run_room(url, 2, 2)
    assert check_done(url) == [0, 1]


def test_a_repository_with_history():
    """Icechunk: what a run wrote is there once it is committed, and what was before can be read, too."""
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.in_memory_storage())
    snapshots = []
    for total in (2, 3):
        session = repository.writable_session("main")
        run_room(session.store, total)
        snapshots.append(session.commit(f"{total} samples"))
    assert check_done(repository.readonly_session("main").store) == [0, 1, 2]
    with quiet():
        assert check_done(repository.readonly_session(snapshot_id=snapshots[0]).store) == [0, 1]
