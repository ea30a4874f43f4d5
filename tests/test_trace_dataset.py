"""Data sets traced into one store: every sample once, continued, accounted for, whatever its neighbours do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_cases import CALL, PROBE, Broken, bits, prompts, traced
from zarr.storage import MemoryStore

import dit_probe as dp
from dit_probe.dataset_tracing import Pictures, PromptFile, TraceSample, filling, plan_dataset
from dit_probe.datasets.segmentation import PictureBook
from dit_probe.errors import IncompleteWarning, StoreError, StoreFault, TraceError


@pytest.fixture(scope="module")
def pipe(pipelines: Any) -> Any:
    return pipelines("flux")


@pytest.fixture(scope="module")
def whole(pipe: Any) -> Any:
    """A run that nothing disturbed."""
    store = MemoryStore()
    assert traced(pipe, prompts(5), store).made == 5
    return store


def test_every_sample_is_what_a_trace_of_it_alone_is(pipe: Any, whole: Any):
    ds = dp.open(whole)
    for slot, sample in enumerate(prompts(5)):
        with dp.trace(pipe, PROBE, progress=False) as run:
            pipe(sample["prompt"], generator=torch.Generator().manual_seed(sample["seed"]), **CALL)
        alone = run.dataset
        for name in ("o_c", "score_output", "image", "prompt", "seed", "token"):
            assert np.array_equal(ds[name].values[slot], alone[name].values[0]), name
    assert ds.done.values.all() and not any(ds.failed.values)


def test_a_run_goes_on_where_it_stopped(pipe: Any, whole: Any):
    store = MemoryStore()
    with pytest.warns(IncompleteWarning, match=r"2 of 5 samples failed, first sample 1: OSError: file 1 is gone"):
        first = traced(pipe, Broken(5, 1, 3), store)
    assert (first.done, first.made, first.failed.keys(), first.pending) == (3, 3, {1, 3}, ())
    facts = dp.store.info(store)
    assert facts["failed"] == {1: "OSError: file 1 is gone", 3: "OSError: file 3 is gone"}
    assert facts["resume"] == "yes: trace_dataset on the same path makes 0 samples; 2 failed ones with retry=True"
    with pytest.warns(IncompleteWarning, match="2 of 5 samples .* failed, sample 1: OSError"):
        assert np.isnan(dp.open(store).o_c[1].values).all()
    assert traced(pipe, prompts(5), store).made == 0  # failed ones are not tried unasked
    again = traced(pipe, prompts(5), store, retry=True)
    assert (again.done, again.made, again.failed) == (5, 2, {})
    assert bits(store) == bits(whole)
    assert dp.store.info(store)["resume"] == "nothing is left to do"


def test_samples_that_are_made_anew(pipe: Any, whole: Any, tmp_path: Path):
    store = tmp_path / "run.zarr"
    traced(pipe, prompts(5), store)
    chunk = store / "o_c" / "c.3.0.1.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert [line.split(" of ")[0] for line in dp.store.damaged(store)] == ["'o_c' at sample 3, step 0, layer 1"]
    assert traced(pipe, prompts(5), store, retry=[3]).made == 1
    assert bits(store) == bits(whole) and not dp.store.damaged(store)
    with pytest.raises(TraceError, match="retry has 7, but samples are 0 to 4"):
        traced(pipe, prompts(5), store, retry=[7])


def test_a_longer_data_set_is_appended_to(pipe: Any, whole: Any, tmp_path: Path):
    store = tmp_path / "run.zarr"
    traced(pipe, prompts(3), store)
    assert traced(pipe, prompts(5), store).made == 2
    assert bits(store) == bits(whole)
    with pytest.raises(StoreError, match="has 5 samples, the data set 3"):
        traced(pipe, prompts(3), store)


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_shards_are_few_files_with_the_same_numbers(pipe: Any, whole: Any, tmp_path: Path, shard: int):
    store = tmp_path / "run.zarr"
    with pytest.warns(IncompleteWarning):
        traced(pipe, Broken(5, 1), store, shard=shard)
    traced(pipe, prompts(5), store, retry=True)  # the shard of sample 1 is written once more, with what it had
    assert bits(store) == bits(whole)
    files = list((store / "o_c").glob("c.*"))
    assert len(files) == -(-5 // shard)
    assert not dp.store.damaged(store)


def test_batches_are_of_samples_that_are_alike(pipe: Any, monkeypatch: pytest.MonkeyPatch):
    calls = list[Any]()
    plain = filling.Filler._trace
    monkeypatch.setattr(
        filling.Filler, "_trace", lambda self, group: (calls.append([one[0] for one in group]), plain(self, group))
    )
    samples = [TraceSample("a sun", concepts=words, seed=seed) for seed, words in enumerate([("sun", "sky")] * 4)]
    samples += [TraceSample("a boat", concepts=("boat", "water"))] * 2
    store = MemoryStore()
    traced(pipe, samples, store, batch=3)
    assert calls == [[0], [1, 2, 3], [4, 5]]
    ds = dp.open(store)
    assert ds.concept_name.values[[0, 4]].tolist() == [["sun", "sky"], ["boat", "water"]]


def test_the_first_samples_may_fail(pipe: Any, tmp_path: Path):
    store = tmp_path / "run.zarr"
    with pytest.warns(IncompleteWarning):
        found = traced(pipe, Broken(4, 0, 1), store)
    assert found.failed.keys() == {0, 1} and found.made == 2
    assert dp.store.info(store)["failed"].keys() == {0, 1}


def test_what_never_works_is_no_data_set_with_bad_samples(pipe: Any, tmp_path: Path):
    with pytest.raises(TraceError, match="no sample could be traced.*sample 0: OSError"):
        traced(pipe, Broken(3, 0, 1, 2), tmp_path / "run.zarr")
    with pytest.raises(TraceError, match="none of the first 10 samples could be traced"):
        traced(pipe, Broken(12, *range(12)), tmp_path / "run.zarr")
    assert not list((tmp_path / "run.zarr").iterdir())


def test_samples_that_do_not_fit_fail_by_name(pipe: Any):
    samples: list[Any] = prompts(3)
    samples[1] = {**samples[1], "concepts": ["sun", "sky", "boat"]}
    samples[2] = {"seed": 3}
    store = MemoryStore()
    with pytest.warns(IncompleteWarning):
        found = traced(pipe, samples, store)
    assert "lengths.concept: this run has 3, the store has 2" in found.failed[1]
    assert (
        found.failed[2]
        == "TraceError: a sample has seed; give a prompt, and no more than prompt, image, concepts, seed"
    )
    assert "sample 1: StoreError" in str(found) and found.done == 1


def test_another_run_is_refused_by_name(pipe: Any, pipelines: Any, whole: Any):
    changed = prompts(5)
    changed[2] = {**changed[2], "prompt": "a fox"}
    with pytest.raises(StoreError, match=r"sample 2 \('a fox'\) is another one than the store has"):
        traced(pipe, changed, whole)
    with pytest.raises(StoreError, match=r"sample 0 .* another probe or other arguments"):
        traced(pipe, prompts(5), whole, num_inference_steps=2)
    more = prompts(6)
    store = MemoryStore()
    traced(pipe, prompts(5), store)
    with pytest.raises(StoreFault, match=r"identity\.class: this run has 'SD3Transformer2DModel', the store has 'Flux"):
        traced(pipelines("sd3"), more, store)
    with pytest.raises(StoreError, match="sample 0 .* is another one"):
        traced(pipe, more, store, height=32)
    with pytest.warns(IncompleteWarning):
        assert dp.open(store).done.values.tolist() == [True] * 5 + [False]


def test_a_known_fingerprint_spares_reading(pipe: Any):
    class Counted(list[Any]):
        fingerprint, reads = "sha256:1", 0

        def __getitem__(self, index: Any) -> Any:
            type(self).reads += 1
            return super().__getitem__(index)

    store = MemoryStore()
    traced(pipe, Counted(prompts(3)), store)
    assert Counted.reads == 3
    traced(pipe, Counted(prompts(3)), store)
    assert Counted.reads == 3
    Counted.fingerprint = "sha256:2"
    traced(pipe, Counted(prompts(3)), store)
    assert Counted.reads == 6


def test_pictures_with_masks_are_encoded(pipe: Any):
    store = MemoryStore()
    book = Pictures(PictureBook(2, objects=1), size=16)
    probe = dp.Probe(["one"], scores=["output"])
    found = dp.trace_dataset(lambda: pipe, book, probe, store, progress=False, timestep=400)
    ds = dp.open(store)
    assert found.done == 2 and ds.timestep.values.tolist() == [400]
    assert ds.prompt.values[0] == f"a {book[0].concepts[0]}"
    assert np.array_equal(ds.image.values[1], book[1].image)
    several = Pictures(PictureBook(3), concepts=["sun", "sky"])
    assert {sample.concepts for sample in several} == {("sun", "sky")} and several.fingerprint != book.fingerprint
    assert book.fingerprint != Pictures(PictureBook(2, objects=1), size=32).fingerprint


def test_files_of_prompts(tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (4, 2)).save(tmp_path / "one.png")
    lines = tmp_path / "samples.jsonl"
    lines.write_text('{"prompt": "a", "image": "one.png", "concepts": ["x", "y"]}\n\n{"prompt": "b", "seed": 9}\n')
    samples = list(PromptFile(lines, seed=4))
    assert samples[0].image is not None and samples[0].image.shape == (2, 4, 3)
    assert [(sample.prompt, sample.seed, sample.concepts) for sample in samples] == [("a", 4, ("x", "y")), ("b", 9, ())]
    for text, message in (("", "no lines"), ("x\n", "no JSON"), ("[1]\n", "an object with a prompt")):
        lines.write_text(text)
        with pytest.raises(TraceError, match=message):
            PromptFile(lines)
    with pytest.raises(TraceError, match="cannot be read"):
        PromptFile(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"mode": "a"}, "mode='a'"),
        ({"dataset": []}, "no samples"),
    ],
)
def test_wrong_arguments(pipe: Any, options: dict[str, Any], message: str):
    with pytest.raises(TraceError, match=message):
        traced(pipe, options.pop("dataset", prompts(2)), MemoryStore(), **options)


def test_a_trace_and_a_data_set_do_not_share_a_store(pipe: Any, tmp_path: Path):
    traced(pipe, prompts(2), tmp_path / "set.zarr")
    with (
        pytest.raises(StoreError, match="was made by trace_dataset"),
        dp.trace(pipe, PROBE, store=tmp_path / "set.zarr", mode="a", progress=False),
    ):
        pipe("a sun", **CALL)
    with dp.trace(pipe, PROBE, store=tmp_path / "one.zarr", progress=False):
        pipe("a sun", **CALL)
    with pytest.raises(StoreError, match="was made by trace, whose samples have no status"):
        traced(pipe, prompts(2), tmp_path / "one.zarr")
    assert traced(pipe, prompts(2), tmp_path / "one.zarr", mode="w").made == 2


def test_a_plan_counts_the_files_that_a_run_makes(pipe: Any, tmp_path: Path):
    for shard in (0, 2):
        plan = plan_dataset(lambda: pipe, prompts(3), PROBE, samples=5, shard=shard, **CALL)
        path = tmp_path / f"{shard}.zarr"
        traced(pipe, prompts(5), path, shard=shard)
        chunks = [file for name in dp.store.info(path)["variables"] for file in (path / name).glob("c.*")]
        labels = 7 * -(-5 // max(shard, 64))
        assert plan.files == len(chunks) + labels
        assert plan.measured == 3 and f"{plan.device_hours:.3g}" in str(plan)
