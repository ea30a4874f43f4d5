"""The store: lossless, killed at any time and readable at any time, and never overwritten unless asked."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from zarr.storage import MemoryStore, StorePath, WrapperStore

from dit_probe import store
from dit_probe.errors import IncompleteWarning, StoreError, TraceError
from dit_probe.schema import Layout, Sample, Variable
from dit_probe.store import encoding
from dit_probe.store.byte_queue import ByteQueue

SIZES = {
    "step": 2,
    "layer": 3,
    "image_token": 6,
    "prompt_token": 4,
    "concept": 2,
    "head": 2,
    "head_dim": 4,
    "width": 8,
}
COORDS = {
    "step": (("step",), np.array([0, 3])),
    "timestep": (("step",), np.array([1000.0, 250.0])),
    "layer": (("layer",), np.array([0, 2, 5])),
    "kind": (("layer",), np.array(["joint", "joint", "single"])),
    "y": (("image_token",), np.arange(6) // 3),
    "x": (("image_token",), np.arange(6) % 3),
}
VARIABLES = (
    Variable("o_x", ("image_token", "head", "head_dim"), "bfloat16", layers=(0, 2, 5), steps=(0, 3)),
    Variable("o_c", ("concept", "head", "head_dim"), "float32", layers=(0, 2), steps=(3,)),
    Variable("p", ("prompt_token", "width"), "float16", layers=(5,)),
)
IDENTITY = {"model": "toy", "family": "flux", "probes": [{"concepts": ["cat", "grass"]}]}
LAYOUT = Layout(VARIABLES, SIZES, COORDS, {"identity": IDENTITY, "time": "now"})
CONCEPTS = ("cat", "grass")


def sample(index: int, **changes: Any) -> Sample:
    return dataclasses.replace(
        Sample(f"a cat №{index}", index, ("▁a", "▁cat", "</s>"), CONCEPTS),
        **changes,
    )


def bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, cut off."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def record(name: str, slot: int, step: int, layer: int, layout: Layout = LAYOUT) -> np.ndarray:
    variable = next(variable for variable in layout.variables if variable.name == name)
    random = np.random.default_rng([len(name), slot, step, layer])
    values = random.normal(size=[layout.sizes[dim] for dim in variable.dims])
    return bits(values) if variable.dtype == "bfloat16" else values.astype(variable.dtype)


def plan(layout: Layout = LAYOUT) -> list[tuple[str, int, int]]:
    every = layout.coords["step"][1].tolist()
    return [
        (variable.name, step, layer)
        for step in every
        for variable in layout.variables
        for layer in variable.layers or ()
        if step in (every if variable.steps is None else variable.steps)
    ]


def fill(writer: store.Writer, samples: list[Sample], *, stop: int | None = None) -> tuple[int, ...]:
    slots = writer.claim(samples)
    for slot in slots:
        for name, step, layer in plan(writer.layout)[:stop]:
            writer.write(name, record(name, slot, step, layer, writer.layout), sample=slot, step=step, layer=layer)
    if stop is None:
        writer.finish(slots)
    return slots


def whole(target: Any, count: int = 2, **arguments: Any) -> store.Writer:
    writer = store.create(target, LAYOUT, **arguments)
    for index in range(count):
        fill(writer, [sample(index)])
    writer.close()
    return writer


def missing(opened: Any) -> xr.Dataset:
    with pytest.warns(IncompleteWarning):
        return store.open(opened)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["path", "str", "memory", "none", "url", "group"])
def test_any_store_that_zarr_accepts(tmp_path: Path, kind: str):
    target: Any = {
        "path": tmp_path / "run.zarr",
        "str": str(tmp_path / "run.zarr"),
        "memory": MemoryStore(),
        "none": None,
        "url": f"memory://{tmp_path.name}/run.zarr",
        "group": StorePath(MemoryStore(), "runs/first"),
    }[kind]
    writer = whole(target)
    assert writer.bytes_written == 2 * sum(record(name, 0, step, layer).nbytes for name, step, layer in plan())
    ds = writer.dataset() if target is None else store.open(target)
    assert ds.o_x.dims == ("sample", "step", "layer", "image_token", "head", "head_dim")
    assert ds.sizes["sample"] == 2
    for name, step, layer in plan():
        for slot in range(2):
            found = ds[name].sel(step=step, layer=layer).isel(sample=slot).values
            wanted = record(name, slot, step, layer)
            assert np.array_equal(found, encoding.float32(wanted) if name == "o_x" else wanted)
    if target is not None:
        facts = store.info(target)
        assert facts["done"] == [0, 1]
        assert facts["incomplete"] == []
        assert facts["identity"] == IDENTITY
        assert facts["variables"]["o_c"]["layers"] == [0, 2]
        assert facts["variables"]["o_c"]["bytes"] > 0


def test_labels_come_back():
    ds = whole(None).dataset()
    assert ds.prompt.values.tolist() == ["a cat №0", "a cat №1"]
    assert ds.seed.values.tolist() == [0, 1]
    assert ds.token.values.tolist()[1] == ["▁a", "▁cat", "</s>", ""]
    assert ds.kind.values.tolist() == ["joint", "joint", "single"]
    assert ds.timestep.dims == ("step",)
    assert ds.timestep.values.tolist() == [1000, 250]
    assert ds.concept.values.tolist() == list(CONCEPTS)
    assert "concept_name" not in ds
    assert ds.sel(concept="grass", layer=2, step=3).o_c.isel(sample=1).values.shape == (2, 4)
    assert ds.attrs["identity"] == IDENTITY
    assert ds.attrs["time"] == "now"
    assert set(ds.data_vars) == {"o_x", "o_c", "p", "done"}
    assert ds.done.values.all()
    assert np.isnan(ds.o_c.sel(layer=5)).all()
    assert np.isnan(ds.o_x.dtype.type(ds.o_c.sel(step=0))).all()


def test_samples_with_other_concepts_keep_their_names():
    writer = store.create(None, LAYOUT)
    fill(writer, [sample(0), sample(1, concepts=("dog", "sand"))])
    writer.close()
    ds = writer.dataset()
    assert ds.concept.values.tolist() == [0, 1]
    assert ds.concept_name.values.tolist() == [["cat", "grass"], ["dog", "sand"]]


def test_readers_need_nothing_of_ours(tmp_path: Path):
    whole(tmp_path / "run.zarr")
    ds = xr.open_zarr(tmp_path / "run.zarr")
    assert ds.o_x.dtype == np.uint16
    assert ds.o_x.attrs["dtype"] == "bfloat16"
    assert np.array_equal(ds.o_x[1, 0, 2].values, record("o_x", 1, 0, 5))
    assert set(ds.coords) == {*COORDS, "prompt", "seed", "token", "concept_name"}
    assert [str(word) for word in ds.concept_name.values[0]] == list(CONCEPTS)


class Counting(WrapperStore[MemoryStore]):
    """Remembers the keys that were read."""

    def __init__(self, inner: MemoryStore, seen: list[str] | None = None) -> None:
        super().__init__(inner)
        self.seen = [] if seen is None else seen

    def _with_store(self, store: MemoryStore) -> Counting:
        return type(self)(store, self.seen)

    async def get(self, key: str, *arguments: Any, **named: Any) -> Any:
        self.seen.append(key)
        return await super().get(key, *arguments, **named)


def test_opening_reads_no_chunk_and_lists_nothing():
    memory = MemoryStore()
    whole(memory)
    counting = Counting(memory)
    ds = store.open(counting)
    assert not [key for key in counting.seen if key.startswith(("o_x/c", "o_c/c", "p/c", "token/c"))]
    assert ds.o_x.chunks is not None
    assert ds.o_x.data.chunksize == (1, 1, 1, 6, 2, 4)
    ds.o_x[1, 1, 2].load()
    assert [key for key in counting.seen if key.startswith("o_x/c")] == ["o_x/c/1/1/2/0/0/0"]


ELEMENTS: dict[str, Any] = {
    "float16": st.floats(width=16, allow_nan=False, allow_infinity=False),
    "float32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "float64": st.floats(allow_nan=False, allow_infinity=False),
    "uint8": st.integers(0, 255),
    # every bit pattern whose exponent is not all ones: subnormals and minus zero included
    "bfloat16": st.integers(0, 2**16 - 1).filter(lambda pattern: pattern & 0x7F80 != 0x7F80),
}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(sorted(ELEMENTS)), branch=st.booleans())
def test_every_bit_comes_back(data: st.DataObject, dtype: str, branch: bool):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    values = data.draw(arrays.arrays(encoding.STORED[dtype], shape, elements=ELEMENTS[dtype]))
    sizes = {"step": 1, "layer": 2, "image_token": shape[0], "width": shape[1]} | ({"branch": 2} if branch else {})
    layout = Layout((Variable("x", ("image_token", "width"), dtype, layers=(1,)),), sizes, {})
    writer = store.create(None, layout)
    (slot,) = writer.claim([Sample()])
    for label in ("cond", "uncond") if branch else (None,):
        writer.write("x", values, sample=slot, step=0, layer=1, branch=label)
    writer.finish([slot])
    writer.close()
    found = writer.dataset().x[(*(0, 1)[: 1 + branch], 0, 1)].values
    if dtype == "bfloat16":
        assert found.dtype == np.float32
        found = bits(found)
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()


def test_the_writers_array_may_change_after_it_is_written():
    writer = store.create(
        None, Layout((Variable("x", ("width",), "float32", (0,)),), {"step": 1, "layer": 1, "width": 4}, {})
    )
    values = np.ones(4, np.float32)
    slots = writer.claim([Sample()])
    writer.write("x", values, sample=0, step=0, layer=0)
    writer.finish(slots)
    values[:] = 7
    writer.close()
    assert writer.dataset().x.values.ravel().tolist() == [1, 1, 1, 1]


def test_nothing_to_open(tmp_path: Path):
    with pytest.raises(StoreError, match=r"nothing is at .*absent"):
        store.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"a directory that holds notes\.txt, not a dit-probe store"):
        store.open(tmp_path)
    with pytest.raises(StoreError, match="a file"):
        store.info(tmp_path / "notes.txt")
    zarr.create_group(tmp_path / "other").create_array("theirs", shape=(1,), dtype="f4")
    with pytest.raises(StoreError, match=r"Zarr group \(it holds theirs\)"):
        store.open(tmp_path / "other")
    with pytest.raises(StoreError, match="a Zarr array"):
        store.open(tmp_path / "other" / "theirs")
    with pytest.raises(StoreError, match="no place for a store"):
        store.open("nosuchprotocol://x")
    with pytest.raises(StoreError, match="no place for a store"):
        store.open(3)


def test_a_newer_format(tmp_path: Path):
    whole(tmp_path / "run.zarr")
    zarr.open_group(tmp_path / "run.zarr").attrs["format_version"] = 2
    with pytest.raises(StoreError, match=r"format version 2, this dit-probe reads up to 1: pip install"):
        store.open(tmp_path / "run.zarr")


# ----------------------------------------------------------------- modes, resume


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


def test_many_samples(tmp_path: Path):
    layout = Layout((Variable("x", ("width",), "float32", (0,)),), {"step": 1, "layer": 1, "width": 4}, {})
    writer = store.create(tmp_path / "run.zarr", layout)
    for _ in range(3):
        slots = writer.claim([Sample(prompt="p" * (index % 7)) for index in range(25)])
        for slot in slots:
            writer.write("x", np.full(4, slot, np.float32), sample=slot, step=0, layer=0)
        writer.finish(slots)
    writer.close()
    ds = store.open(tmp_path / "run.zarr")
    assert ds.x[:, 0, 0, 0].values.tolist() == list(range(75))
    assert ds.prompt.values[74] == "p" * 3


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
from test_store import LAYOUT, fill, sample
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


# ---------------------------------------------------------------------- writing


def test_wrong_records_are_refused_at_once():
    writer = store.create(None, LAYOUT)
    writer.claim([sample(0)])
    good = record("o_c", 0, 3, 0)
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"'o_c' .* is float64 \(2, 2, 4\); the layout wants float32", {"values": good.astype(float)}),
        (
            r"is float32 \(1, 2, 4\); the layout wants float32 \(2, 2, 4\), \(concept, head, head_dim\)",
            {"values": good[:1]},
        ),
        (r"is list None", {"values": [1.0]}),
        (r"wants uint16 \(the bits of bfloat16\)", {"name": "o_x", "values": np.zeros((6, 2, 4), np.float32)}),
        ("no layer is labelled 1; this store has 0, 2, 5", {"layer": 1}),
        ("no step is labelled 1", {"step": 1}),
        ("needs a step", {"step": None}),
        ("has no branch", {"branch": "cond"}),
        (r"is not planned; planned are layers \[0, 2\], steps \[3\]", {"layer": 5}),
        (r"is not planned", {"step": 0}),
        ("sample 4 was not claimed or is finished; those being recorded: 0", {"sample": 4}),
        ("no variable is called 'q_x'; this store has o_x, o_c, p", {"name": "q_x"}),
    ]
    for message, changes in wrong:
        with pytest.raises(StoreError, match=message):
            writer.write(**{"name": "o_c", "values": good, "sample": 0, "step": 3, "layer": 0, **changes})
    writer.write("o_c", good, sample=0, step=3, layer=0)
    with pytest.raises(StoreError, match="written already"):
        writer.write("o_c", good, sample=0, step=3, layer=0)
    with pytest.raises(StoreError, match="3 concepts"):
        writer.claim([sample(1, concepts=("a", "b", "c"))])
    with pytest.raises(StoreError, match="5 prompt_tokens"):
        writer.claim([sample(1, tokens=tuple("abcde"))])
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.claim([sample(1)])


@pytest.mark.parametrize(("name", "value"), [("o_c", np.nan), ("o_c", -np.inf), ("p", np.inf), ("o_x", np.nan)])
def test_non_finite_values_are_refused(name: str, value: float):
    writer = store.create(None, LAYOUT)
    slots = writer.claim([sample(0)])
    layer = 5 if name == "p" else 2
    values = record(name, 0, 3, layer)
    values.flat[3] = bits(np.array(value)) if name == "o_x" else value
    with pytest.raises(
        StoreError, match=rf"non-finite value in {name!r} at sample 0, step 3, layer {layer} \(overflow in"
    ):
        _write_and_finish(writer, slots, name, values, layer=layer)
    writer.close()  # said once, not again
    assert not missing(_place(writer)).done.any()


def _write_and_finish(writer: store.Writer, slots: Any, name: str, values: Any, *, layer: int) -> None:
    writer.write(name, values, sample=slots[0], step=3, layer=layer)
    writer.finish(slots)


def _place(writer: store.Writer) -> Any:
    return writer._group.store


def test_a_planned_record_that_is_missing_is_named():
    writer = store.create(None, LAYOUT)
    slots = writer.claim([sample(0), sample(1)])
    for slot in slots:
        for name, step, layer in plan():
            if slot == 0 or (name, layer) != ("o_x", 2):
                writer.write(name, record(name, slot, step, layer), sample=slot, step=step, layer=layer)
    with pytest.raises(TraceError, match=r"not written: 'o_x' at sample 1, step 0, layer 2; 'o_x' at sample 1, step 3"):
        writer.finish(slots)
    writer.close()
    assert missing(_place(writer)).done.values.tolist() == [True, False]


def test_arrays_that_arrive_later_are_awaited_in_the_writer_thread():
    writer = store.create(None, LAYOUT)
    slots = writer.claim([sample(0)])
    arrived, threads = threading.Event(), set()

    def later(values: np.ndarray) -> Any:
        def wait() -> np.ndarray:
            arrived.wait()
            threads.add(threading.current_thread())
            return values

        return wait

    for name, step, layer in plan():
        values = record(name, 0, step, layer)
        writer.write(name, later(values), sample=0, step=step, layer=layer, nbytes=values.nbytes)
    assert writer.bytes_written == 0
    arrived.set()
    writer.finish(slots)
    writer.close()
    assert threading.current_thread() not in threads
    assert writer.dataset().identical(whole(None, 1).dataset())


def test_an_error_in_a_thread_reaches_the_caller():
    writer = store.create(None, LAYOUT)
    slots = writer.claim([sample(0)])

    def broken() -> np.ndarray:
        raise OSError("disk full")

    with pytest.raises(
        StoreError, match="'o_c' at sample 0, step 3, layer 2 was not written: OSError: disk full"
    ) as caught:
        _write_and_finish(writer, slots, "o_c", broken, layer=2)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StoreError, match="disk full"):
        writer.write("o_c", broken, sample=0, step=3, layer=0)
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dit-probe-writer")]


def test_an_error_that_nobody_heard_of_is_raised_on_close():
    writer = store.create(None, LAYOUT)
    writer.claim([sample(0)])
    writer.write("o_c", lambda: np.zeros(3), sample=0, step=3, layer=2)
    with pytest.raises(StoreError, match=r"is float64 \(3,\)"):
        writer.close()
    writer.close()


def test_the_queue_is_bounded_in_bytes():
    queue, gate = ByteQueue(limit=100, threads=2), threading.Event()
    for tag in range(2):
        queue.put(gate.wait, 50, tag)  # being written counts: its memory is not free yet
    caller = threading.Thread(target=queue.put, args=(lambda: None, 1, 2))
    caller.start()
    caller.join(0.2)
    assert caller.is_alive()
    gate.set()
    caller.join(10)
    assert not caller.is_alive()
    queue.wait([0, 1, 2])
    queue.put(lambda: None, 1000, 3)  # larger than the limit, and alone
    queue.close()
    assert queue.failure is None


def test_memory_stays_below_the_bound_when_the_disk_is_slow():
    writer = store.create(None, LAYOUT, queue_bytes=400)
    held, peak, lock = 0, 0, threading.Lock()

    def slow(values: np.ndarray) -> Any:
        def wait() -> np.ndarray:
            nonlocal held
            time.sleep(0.005)
            with lock:
                held -= values.nbytes
            return values

        return wait

    slots = writer.claim([sample(0), sample(1)])
    for slot in slots:
        for name, step, layer in plan():
            values = record(name, slot, step, layer)
            writer.write(name, slow(values), sample=slot, step=step, layer=layer, nbytes=values.nbytes)
            with lock:
                held += values.nbytes
                peak = max(peak, held)
    writer.finish(slots)
    writer.close()
    assert peak <= 400
    assert writer.dataset().identical(whole(None).dataset())


def test_threads_write_distinct_chunks_of_one_array_while_it_grows(tmp_path: Path):
    sizes = {"step": 4, "layer": 8, "width": 256}
    layout = Layout((Variable("x", ("width",), "bfloat16", tuple(range(8))),), sizes, {})
    writer = store.create(tmp_path / "run.zarr", layout, threads=4)
    every = [(step, layer) for step in range(4) for layer in range(8)]
    for slot in range(6):
        writer.claim([Sample()])
        for step, layer in every:
            writer.write(
                "x", np.full(256, slot * 32 + step * 8 + layer, np.uint16), sample=slot, step=step, layer=layer
            )
    writer.finish(range(6))
    writer.close()
    raw = xr.open_zarr(tmp_path / "run.zarr").x.values
    assert np.array_equal(raw, np.broadcast_to(np.arange(6 * 32).reshape(6, 4, 8, 1), raw.shape))


# ------------------------------------------------------------ images, timesteps


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 4, 5, 3)])
def test_images_are_kept_beside_the_activations(shape: tuple[int, ...]):
    memory = MemoryStore()
    pictures = [np.full(shape, 40 * index, np.uint8) for index in range(3)]
    for first, mode in ((0, None), (2, "a")):
        writer = store.create(memory, LAYOUT, mode=mode)
        for index in range(first, first + 2 - first // 2):
            slots = writer.claim([sample(index)])
            for name, step, layer in plan():
                writer.write(name, record(name, index, step, layer), sample=index, step=step, layer=layer)
            writer.write_images(slots, pictures[index : index + 1])
            writer.finish(slots)
        writer.close()
    ds = store.open(memory)
    assert ds.image.dims[-3:] == ("pixel_y", "pixel_x", "channel")
    assert np.array_equal(ds.image.values, np.stack(pictures))
    writer = store.create(memory, LAYOUT, mode="a")
    slots = writer.claim([sample(3)])
    with pytest.raises(StoreError, match="images of this run are"):
        writer.write_images(slots, [np.zeros((1, 1, 3), np.uint8)])
    writer.close()


def test_timesteps_that_nobody_announced():
    memory = MemoryStore()
    open_ended = {**COORDS, "timestep": (("step",), np.array([np.nan, np.nan]))}
    layout = dataclasses.replace(LAYOUT, coords=open_ended)
    for count, mode in enumerate((None, "a")):
        writer = store.create(memory, layout, mode=mode)
        slots = writer.claim([sample(count)])
        for step, timestep in ((0, 900.0), (1, 500.0), (3, 100.0)):  # step 1 is not kept
            writer.set_timestep(step, timestep)
        with pytest.raises(StoreError, match="step 3 is at timestep 50 in this sample and at 100 in the ones before"):
            writer.set_timestep(3, 50)
        for name, step, layer in plan():
            writer.write(name, record(name, count, step, layer), sample=count, step=step, layer=layer)
        writer.finish(slots)
        writer.require(layout)
        writer.close()
    ds = store.open(memory)
    assert ds.timestep.values.tolist() == [900, 100]
    assert ds.sizes["sample"] == 2


def test_attributes_must_be_json():
    with pytest.raises(StoreError, match=r"<object object.*cannot be stored as JSON"):
        store.create(None, dataclasses.replace(LAYOUT, attrs={"identity": {"model": object()}}))
