"""How near to the disk is the store? One trace's records written by several means, in turns.

    python benchmarks/store.py                     # 0.6 GiB in records of 1 MiB, and 2.3 GiB in those of Flux, 24 MiB
    python benchmarks/store.py --folder /scratch   # on another disk

| arm | |
|---|---|
| np.save | all bytes in one file, and fsync: the limit that the disk sets |
| files | a file for each record, and fsync of each: the limit of this layout |
| zarr | the same chunks through zarr-python with its defaults |
| dit-probe | `dit_probe.store`'s writer, its queue and threads |
| icechunk | zarr into an Icechunk repository with one commit, where it is installed |

Every arm ends when its files have reached the disk (fsync of each); what it wrote is deleted before the next begins.
Noise, which no codec makes much smaller: bfloat16 is compressed all the same, float16 and float32 are not
(`dit_probe.store.encoding`).

Below, a run of the Flux-like model that writes these four variables is held against the same run without a trace and
against the bytes at np.save's rate of the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from alternating import bars, measure, write
from overhead import SHAPES, Bench, model_of

import dit_probe as dp
from dit_probe import planning, store
from dit_probe.anatomy import Grid, find
from dit_probe.probe import Combination
from dit_probe.report import Section
from dit_probe.schema import Layout, Sample

RECORD = ("o_x", "q_x", "k_x", "v_x")
COUNTS = {"small": (3, 8, 6), "flux": (1, 4, 6)}
"""Samples, steps and layers."""
LEFT: list[Path] = []


def cleaned() -> None:
    while LEFT:
        shutil.rmtree(LEFT.pop())
    os.sync()


def layout_of(kind: str, dtype: torch.dtype, steps: int, layers: int) -> Layout:
    """Of a trace that records `RECORD` of so many joint blocks."""
    shape = SHAPES[kind]
    model, _ = model_of(shape, "meta", dtype)
    return planning.layout(
        find(model),
        model,
        Combination(dp.Probe(record=RECORD, steps=range(steps), layers=range(layers))),
        grid=Grid.regular(shape["side"], shape["side"]),
        prompt_tokens=shape["text"],
        concepts=0,
        timesteps=[float("nan")] * steps,
        sigmas=[float("nan")] * steps,
        branch="cond",
    )


def synced(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Records:
    """The records of a few samples, and every way to write them."""

    def __init__(self, folder: Path, kind: str, dtype: str) -> None:
        self.folder, (self.samples, self.steps, self.layers) = folder, COUNTS[kind]
        self.layout = layout_of(kind, getattr(torch, dtype), self.steps, self.layers)
        variable = self.layout.variables[0]
        shape = tuple(self.layout.sizes[dim] for dim in variable.dims)
        noise = np.random.default_rng(0).standard_normal(shape, np.float32)
        bits = (noise.view(np.uint32) >> 16).astype(np.uint16)
        self.record = bits if dtype == "bfloat16" else noise.astype(dtype)
        self.count = self.samples * self.steps * self.layers * len(RECORD)
        self.bytes = self.count * self.record.nbytes

    def places(self) -> Any:
        for sample in range(self.samples):
            for step in range(self.steps):
                for layer in range(self.layers):
                    for name in RECORD:
                        yield name, sample, step, layer

    def arm(self, make: Callable[[Path], None]) -> Callable[[], None]:
        def run() -> None:
            place = Path(tempfile.mkdtemp(dir=self.folder))
            LEFT.append(place)
            make(place)
            synced(place)

        return run

    def one_file(self, place: Path) -> None:
        with open(place / "all.npy", "wb") as file:
            header = {"descr": self.record.dtype.str, "fortran_order": False, "shape": (self.count, *self.record.shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(self.count):
                file.write(self.record.data)

    def files(self, place: Path) -> None:
        for name, sample, step, layer in self.places():
            (place / f"{name}.{sample}.{step}.{layer}").write_bytes(self.record.data)

    def _arrays(self, group: zarr.Group, **options: Any) -> dict[str, Any]:
        shape = (self.samples, self.steps, self.layers, *self.record.shape)
        chunks = (1, 1, 1, *self.record.shape)
        return {
            name: group.create_array(name, shape=shape, chunks=chunks, dtype=self.record.dtype, **options)
            for name in RECORD
        }

    def zarr(self, place: Path) -> None:
        arrays = self._arrays(zarr.open_group(place / "z.zarr", mode="w"))
        for name, *index in self.places():
            arrays[name][tuple(index)] = self.record

    def icechunk(self, place: Path) -> None:
        import icechunk

        repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(place / "repo")))
        session = repository.writable_session("main")
        arrays = self._arrays(zarr.open_group(session.store, mode="w"), compressors=None)
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, *index in self.places():
                arrays[name][tuple(index)] = self.record
        session.commit("all")

    def ours(self, place: Path) -> None:
        writer = store.create(place / "run.zarr", self.layout)
        slots = writer.claim([Sample(f"sample {index}") for index in range(self.samples)])
        for name, sample, step, layer in self.places():
            writer.write(name, self.record, sample=slots[sample], step=step, layer=layer)
        writer.finish(slots)
        writer.close()


def end_to_end(folder: Path, rounds: int, forwards: int) -> dict[str, Any]:
    """A run that writes everything against one that does not, and against the disk."""
    bench = Bench(SHAPES["small"], "cpu", torch.float32, forwards)
    probe = dp.Probe(record=RECORD, steps=range(forwards))
    written: list[int] = []

    def traced(place: Path) -> None:
        with dp.trace(bench.model, probe, store=place / "run.zarr", progress=False, verify=None) as run:
            bench.run()
        written.append(run.bytes_written)

    def saved(place: Path) -> None:
        with open(place / "all.bin", "wb") as file:
            for _ in range(written[0] // 2**20):
                file.write(block)

    block = os.urandom(2**20)
    arm = Records(folder, "small", "float32").arm
    times = measure({"plain": bench.run, "traced": arm(traced)}, 1, after=cleaned)
    times = measure({"plain": bench.run, "traced": arm(traced), "np.save": arm(saved)}, rounds, after=cleaned)
    limit = np.maximum(times.wall["plain"], times.wall["np.save"])
    ratio = np.percentile(times.wall["traced"] / limit, (25, 50, 75))
    seconds = {name: float(np.median(values)) for name, values in times.wall.items()}
    return {
        "bytes": written[0],
        "seconds": seconds,
        "traced over the larger": dict(zip(("q25", "median", "q75"), ratio, strict=True)),
    }


def alone(folder: Path, kind: str, dtype: str, rounds: int) -> dict[str, Any]:
    """The writer against the disk, without a model."""
    records = Records(folder, kind, dtype)
    arms = {"np.save": records.one_file, "files": records.files, "zarr": records.zarr, "dit-probe": records.ours}
    if importlib.util.find_spec("icechunk") is not None:
        arms["icechunk"] = records.icechunk
    times = measure({name: records.arm(make) for name, make in arms.items()}, rounds, after=cleaned)
    # Speeds, not times: the larger the better.
    speed = {name: np.percentile(times.wall["np.save"] / mine, (25, 50, 75)) for name, mine in times.wall.items()}
    return {
        "record, MiB": records.record.nbytes / 2**20,
        "records": records.count,
        "MiB/s": {name: records.bytes / 2**20 / float(np.median(mine)) for name, mine in times.wall.items()},
        "CPU, s": {name: float(np.median(mine)) for name, mine in times.cpu.items()},
        "speed over np.save": {
            name: dict(zip(("q25", "median", "q75"), map(float, three), strict=True)) for name, three in speed.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--forwards", type=int, default=4, help="steps of the run that is traced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {kind: alone(options.folder, kind, options.dtype, options.rounds) for kind in COUNTS}
    whole = end_to_end(options.folder, options.rounds, options.forwards)
    sections = []
    for kind, row in found.items():
        speed, rates = row["speed over np.save"], row["MiB/s"]
        for name in rates:
            print(f"{kind:6} {name:10} {rates[name]:7.0f} MiB/s  {speed[name]['median']:.2f} of np.save")
        title = f"Records of {row['record, MiB']:.0f} MiB"
        sections.append(Section(title, "Speed.", [bars(speed, "speed over np.save", {"np.save": 1})]))
    print("traced run over the larger of plain run and np.save:", whole["traced over the larger"])
    settings = {"dtype": options.dtype, "rounds": options.rounds, "zarr": zarr.__version__}
    text = (
        "Wall time, fsync included; 1 is np.save of the same round. A traced run takes "
        f"{whole['traced over the larger']['median']:.2f} times the larger of the run alone and the disk alone."
    )
    everything = {"settings": settings, **found, "end to end": whole}
    write(f"store_{options.dtype}", "Writing a store", text, everything, sections)


if __name__ == "__main__":
    main()
