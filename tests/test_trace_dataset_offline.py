"""Maps and metrics of a whole data set from its store, a chunk at a time: the same bits as from memory at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from dataset_cases import prompts, traced
from typer.testing import CliRunner

import dit_probe as dp
from dit_probe.cli import app

COUNT = 4
PROBE = dp.Probe(
    ["sun", "sky"], record=["o_x", "o_c", "q_x", "k_c", "v_x", "v_c"], scores=["output", "cross"], layers=[0, 1]
)


@pytest.fixture(scope="module", params=[0, 2], ids=["no shards", "shards"])
def path(request: Any, pipelines: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "run.zarr"
    traced(pipelines("flux"), prompts(COUNT), path, probe=PROBE, shard=request.param)
    return path


def tables(ds: xr.Dataset) -> dict[str, xr.DataArray]:
    """What a study of a store makes of it."""
    found = {f"scores {space}": dp.maps.scores(ds, space) for space in ("output", "value", "cross")}
    found |= {f"maps {space}": dp.maps.saliency(ds, space) for space in ("output", "value", "cross")}
    maps = found["maps output"]
    y, x = np.indices((maps.sizes["y"], maps.sizes["x"]))
    masks = xr.DataArray(np.stack([y > 1, x > 1]), dims=("concept", "y", "x")).assign_coords(concept=maps.concept)
    loaded = maps.compute()  # metrics rank the pixels of a map, which are small
    return {**found, "auroc": dp.metrics.auroc(loaded, masks), "scores": dp.metrics.score(loaded, masks).to_dataarray()}


@pytest.mark.parametrize("scheduler", ["synchronous", "threads", "distributed"])
def test_lazily_and_at_once(path: Path, scheduler: str):
    at_once = tables(dp.open(path).load())
    if scheduler == "distributed":
        distributed = pytest.importorskip("distributed")
        options = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
        with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster):
            lazily = {name: found.compute() for name, found in tables(dp.open(path)).items()}
    else:
        with dask.config.set(scheduler=scheduler):
            lazily = {name: found.compute() for name, found in tables(dp.open(path)).items()}
    assert dp.open(path).o_x.chunks is not None
    for name, found in at_once.items():
        assert found.values.tobytes() == lazily[name].values.tobytes(), name
        assert found.dims == lazily[name].dims and found.sizes.get("sample", COUNT) == COUNT


def test_one_sample_reads_its_own_chunks(path: Path):
    ds = dp.open(path)
    alone = dp.maps.saliency(ds.isel(sample=[1]), "output").values
    assert alone.tobytes() == dp.maps.saliency(ds, "output").isel(sample=[1]).values.tobytes()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_commands(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a sun\na boat on water\n")
    store = str(tmp_path / "run.zarr")
    words = ("--concepts", "sun,sky", "--steps", "1")
    size = ("--height", "64", "--width", "64")
    command = ("trace-dataset", "flux-picturebook", "--prompts", str(tmp_path / "prompts.txt"), "--store", store)
    result = run(*command, *words, *size)
    assert result.exit_code == 0, result.output
    assert "2 samples done (2 now), 0 failed, 0 pending" in result.output
    assert "2 samples done (0 now)" in run(*command, *words, *size).output
    result = run("info", store, "--check")
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in ("2 complete", "files", "nothing is left to do", "0 damaged records"))
    chunk = next((tmp_path / "run.zarr" / "score_output").glob("c.1.*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    result = run("info", store, "--check")
    assert result.exit_code == 1 and "'score_output' at sample 1, step 0, layer " in result.stderr
    assert run("trace-dataset", "flux-picturebook", "--store", store).exit_code == 2
    result = run("trace-dataset", "flux-picturebook", "--prompts", str(tmp_path / "absent"), "--store", store)
    assert result.exit_code == 2 and "cannot be read" in result.stderr
    result = run("plan", "flux-picturebook", *words, *size, "--samples", "1000000", "--shard", "64")
    assert result.exit_code == 0, result.output
    assert "1000000 samples, from 3" in result.output and "device-hours" in result.output
