"""Writing a store: wrong records are refused, threads and their errors are awaited, memory is bounded."""

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from store_cases import COORDS, LAYOUT, bits, hide, missing, plan, record, sample, whole
from zarr.storage import MemoryStore

from dit_probe import store
from dit_probe.errors import StoreError, TraceError
from dit_probe.schema import Layout, Sample, Variable
from dit_probe.store.byte_queue import ByteQueue


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


def test_images_that_a_killed_run_had_not_shown_yet(tmp_path: Path):
    picture = np.ones((4, 5, 3), np.uint8)
    for stop in (3, None):
        writer = store.create(tmp_path / "run.zarr", LAYOUT)
        slots = writer.claim([sample(0)])
        for name, step, layer in plan()[:stop]:
            writer.write(name, record(name, 0, step, layer), sample=0, step=step, layer=layer)
        writer.write_images(slots, [picture])
        if stop is None:
            writer.finish(slots)
        writer.close()
        if stop:
            hide(tmp_path / "run.zarr", "image")
    assert np.array_equal(store.open(tmp_path / "run.zarr").image[0], picture)


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
