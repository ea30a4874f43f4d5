"""Reading a store: every bit and every label comes back, and what is no store is said to be none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from store_cases import CONCEPTS, COORDS, IDENTITY, LAYOUT, bits, fill, plan, record, sample, whole
from zarr.storage import MemoryStore, StorePath, WrapperStore

from dit_probe import store
from dit_probe.errors import StoreError
from dit_probe.schema import Layout, Sample, Variable
from dit_probe.store import encoding


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
    assert [key for key in counting.seen if key.startswith("o_x/c")] == ["o_x/c.1.1.2.0.0.0"]


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
