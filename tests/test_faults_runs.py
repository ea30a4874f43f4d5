"""Faults of a run: killed, interrupted, with a model that fails; every sample is there once, as if undisturbed."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_cases import CALL, PROBE, Broken, bits, prompts, traced
from fault_cases import ended, fork, killed, quiet, timed
from store_cases import hide
from zarr.storage import MemoryStore

import dit_probe as dp
from dit_probe.errors import IncompleteWarning, StoreError

COUNT = 6


@pytest.fixture(scope="module")
def pipe(pipelines: Any) -> Any:
    return pipelines("flux")


@pytest.fixture(scope="module")
def whole(pipe: Any) -> Any:
    store = MemoryStore()
    traced(pipe, prompts(COUNT), store)
    return bits(store)


def partly_right(store: Path, whole: dict[str, Any]) -> int:
    """Samples that a killed run left done; each is as in the undisturbed run."""
    with quiet():
        ds = dp.open(store)
        one = len(whole["o_c"]) // COUNT
        for slot in ds.sample.values if "sample" in ds.coords else range(ds.sizes["sample"]):
            if ds.done.values[slot]:
                assert ds.o_c[slot].values.tobytes() == whole["o_c"][slot * one : (slot + 1) * one]
    return int(ds.done.sum())


@pytest.mark.parametrize("shard", [0, 2])
def test_killed_and_continued(pipe: Any, whole: dict[str, Any], tmp_path: Path, shard: int):
    def run(path: Path) -> None:
        traced(pipe, prompts(COUNT), path, shard=shard)

    length = timed(lambda: run(tmp_path / "timed.zarr"))
    for turn in range(2):
        path = tmp_path / f"{turn}.zarr"
        assert killed(lambda path=path: run(path), random.uniform(0.2, 0.9) * length) in (-signal.SIGKILL, 0)
        done = partly_right(path, whole) if (path / "zarr.json").exists() else 0
        assert traced(pipe, prompts(COUNT), path, shard=shard).made == COUNT - done
        assert bits(path) == whole


def test_interrupted_twice(pipe: Any, whole: dict[str, Any], tmp_path: Path):
    path = tmp_path / "run.zarr"
    length = timed(lambda: traced(pipe, prompts(COUNT), tmp_path / "timed.zarr"))
    status = killed(lambda: traced(pipe, prompts(COUNT), path), 0.6 * length, signal.SIGINT, signal.SIGINT, pause=0.003)
    assert status in (130, 1, 0)
    with quiet():
        done = int(dp.open(path).done.sum())
    assert traced(pipe, prompts(COUNT), path).made == COUNT - done
    assert bits(path) == whole


def test_pictures_that_a_killed_run_had_not_shown_yet(pipe: Any, whole: dict[str, Any], tmp_path: Path):
    path = tmp_path / "run.zarr"
    with quiet():
        traced(pipe, Broken(COUNT, 3), path)
    hide(path, "image")
    with quiet():
        assert "image" not in dp.open(path)
    assert traced(pipe, prompts(COUNT), path, retry=True).made == 1
    assert bits(path) == whole


def test_two_processes_and_a_reader(pipe: Any, whole: dict[str, Any], tmp_path: Path):
    path = tmp_path / "run.zarr"
    pid = fork(lambda: traced(pipe, prompts(COUNT), path))
    while not (path / "done" / "c" / "0").exists():
        pass
    refused = partly_right(path, whole)
    with pytest.raises(StoreError, match=r"run\.zarr is being written already, by another process"):
        traced(pipe, prompts(COUNT), path)
    assert partly_right(path, whole) >= refused
    assert ended(pid) == 0
    assert traced(pipe, prompts(COUNT), path).made == 0 and bits(path) == whole


class Failing:
    """A model that, for some samples, raises or gives what is no number."""

    def __init__(self, pipe: Any, raises: str, undefined: str) -> None:
        self.pipe, self.raises, self.undefined = pipe, raises, undefined
        self.block = pipe.transformer.transformer_blocks[1]

    def __enter__(self) -> None:
        self.encode = self.pipe.encode_prompt

        def encode(prompt: Any, *arguments: Any, **named: Any) -> Any:
            self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            return self.encode(prompt, *arguments, **named)

        def spoil(module: Any, arguments: Any, output: Any) -> Any:
            if self.raises in self.prompts:
                raise RuntimeError("the model broke")
            for row, prompt in enumerate(self.prompts):
                if prompt == self.undefined:
                    for part in output:
                        part[row] = float("nan")
            return output

        self.pipe.encode_prompt = encode
        self.hook = self.block.register_forward_hook(spoil)

    def __exit__(self, *error: object) -> None:
        self.hook.remove()
        del self.pipe.encode_prompt


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # diffusers, of a black picture
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_fails_on_some_samples(pipe: Any, whole: dict[str, Any], batch: int):
    samples, store = prompts(COUNT), MemoryStore()
    bad = [dict(sample) for sample in samples]
    bad[2]["prompt"], bad[4]["prompt"] = "a fox", "a cat"
    probe = dp.Probe(PROBE.concepts, record=["o_c"], scores=["output"], layers=[0, 1, 2])
    with Failing(pipe, raises="a fox", undefined="a cat"), pytest.warns(IncompleteWarning):
        found = traced(pipe, bad, store, probe=probe, batch=batch)
    assert found.failed.keys() == {2, 4} and not found.pending and found.done == COUNT - 2
    assert found.failed[2] == "RuntimeError: the model broke"
    assert "non-finite value in" in found.failed[4] and "sample 4, step 0" in found.failed[4]
    assert not dp.testing.leftovers(pipe)
    assert traced(pipe, bad, store, probe=probe, batch=batch, retry=True).done == COUNT
    assert not dp.store.damaged(store)


def test_a_device_that_is_gone_ends_the_run(pipe: Any, tmp_path: Path):
    lost = getattr(torch, "AcceleratorError", None)
    if lost is None:
        pytest.skip("torch before 2.8 has no name for it")
    calls = iter(range(100))

    def look(module: Any, arguments: Any) -> None:
        if next(calls) == 2:
            raise lost("CUDA error: an illegal memory access was encountered")

    hook = pipe.transformer.proj_out.register_forward_pre_hook(look)
    with pytest.raises(lost, match="illegal memory access"):
        traced(pipe, prompts(4), tmp_path / "run.zarr")
    hook.remove()
    facts = dp.store.info(tmp_path / "run.zarr")
    assert (len(facts["done"]), facts["failed"]) == (2, {})
    assert traced(pipe, prompts(4), tmp_path / "run.zarr", **CALL).made == 2
