"""How fast are maps from a store? `dit_probe.maps.saliency` against numpy on the same bytes, in turns.

    python benchmarks/offline.py                 # 2 GiB of float32 o_x, in records of 2 and of 48 MiB, as Flux has them
    python benchmarks/offline.py --gibibytes 0.5

The numpy arm reads one .npy file of each variable with np.load, multiplies by one einsum, applies the softmax over
concepts and averages: what somebody writes by hand when all of it fits into memory. Both read from the page cache.
Memory is what numpy and Python allocate at their worst moment (tracemalloc); beside it stands that of dask's account of
the same records, with nothing in them. Last, a store of 19 layers, 28 steps and 5 variables is opened and printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.system
import numpy as np
import torch
from alternating import bars, measure, peak, write
from overhead import SHAPES, WORDS, model_of

import dit_probe as dp
from dit_probe import planning, store
from dit_probe.anatomy import Grid, find
from dit_probe.probe import Combination
from dit_probe.report import Section
from dit_probe.schema import Sample

STEPS, LAYERS = 8, 6


def fill(place: Path, layout: Any, samples: int, random: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Write a store of noise; what was written, by variable."""
    writer = store.create(place, layout)
    slots = writer.claim([Sample(f"sample {index}", concepts=tuple(WORDS)) for index in range(samples)])
    written: dict[str, list[np.ndarray]] = {variable.name: [] for variable in layout.variables}
    for slot in slots:
        for step in layout.coords["step"][1]:
            for variable in layout.variables:
                shape = tuple(layout.sizes[dim] for dim in variable.dims)
                for layer in variable.layers:
                    values = random.standard_normal(shape, np.float32)
                    writer.write(variable.name, values, sample=slot, step=int(step), layer=int(layer))
                    written[variable.name].append(values)
    writer.finish(slots)
    writer.close()
    return written


def laid_out(model: Any, side: int, text: int, steps: int, record: tuple[str, ...], layers: Any = None) -> Any:
    return planning.layout(
        find(model),
        model,
        Combination(dp.Probe(WORDS, record=record, steps=range(steps), layers=layers)),
        grid=Grid.regular(side, side),
        prompt_tokens=text,
        concepts=len(WORDS),
        timesteps=[float("nan")] * steps,
        sigmas=[float("nan")] * steps,
        branch="cond",
    )


def opening(folder: Path, rounds: int) -> float:
    """Milliseconds to open and print a store of Flux's layers and 28 steps, tokens few."""
    shape = {**SHAPES["one block"], "layers": 19}
    model, _ = model_of(shape, "cpu", torch.float32)
    layout = laid_out(model, shape["side"], shape["text"], 28, ("o_x", "q_x", "k_x", "o_c", "k_c"))
    fill(folder / "wide.zarr", layout, 1, np.random.default_rng(0))
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        repr(dp.open(folder / "wide.zarr"))
        taken.append(time.perf_counter() - began)
    return 1000 * float(np.median(taken))


def maps(folder: Path, kind: str, gibibytes: float, rounds: int) -> dict[str, Any]:
    """Of records as the model of this shape has them."""
    shape = SHAPES[kind]
    model, _ = model_of(shape, "meta", torch.float32)
    record = shape["side"] ** 2 * shape["heads"] * shape["head_dim"] * 4
    layers, steps = LAYERS, max(1, min(STEPS, round(gibibytes * 2**30 / record / LAYERS)))
    samples = max(1, round(gibibytes * 2**30 / (record * steps * layers)))
    layout = laid_out(model, shape["side"], shape["text"], steps, ("o_x", "o_c"), range(layers))
    written = fill(folder / "run.zarr", layout, samples, np.random.default_rng(0))
    for variable in list(written):
        values = written.pop(variable)
        whole = np.lib.format.open_memmap(
            folder / f"{variable}.npy", "w+", np.float32, (samples, steps, layers, *values[0].shape)
        )
        for index, value in zip(np.ndindex(samples, steps, layers), values, strict=True):
            whole[index] = value
        whole.flush()
        del values, whole

    def by_hand() -> np.ndarray:
        o_x, o_c = (np.load(folder / f"{name}.npy") for name in ("o_x", "o_c"))
        scores = np.einsum("stlnhd,stlchd->stlcn", o_x, o_c, optimize=True)
        scores = np.exp(scores - scores.max(3, keepdims=True))
        return (scores / scores.sum(3, keepdims=True)).mean((1, 2))

    def ours() -> np.ndarray:
        return dp.maps.saliency(dp.open(folder / "run.zarr"), space="output").values

    def account() -> None:
        dask.optimize(dp.maps.saliency(dp.open(folder / "run.zarr"), space="output").data)

    found, expected = ours().reshape(samples, len(WORDS), -1), by_hand()
    assert np.abs(found - expected).max() < 1e-4, np.abs(found - expected).max()
    times = measure({"numpy": by_hand, "dit-probe": ours}, rounds)
    q25, median, q75 = np.percentile(times.wall["numpy"] / times.wall["dit-probe"], (25, 50, 75))
    return {
        "record, MiB": record / 2**20,
        "records": samples * steps * layers,
        "numpy, s": float(np.median(times.wall["numpy"])),
        "speed over numpy": median,
        "q25": q25,
        "q75": q75,
        "peak, records": peak(ours) / record,
        "of them dask's account": peak(account) / record,
        "result, records": found.nbytes / record,
        "peak of numpy, records": peak(by_hand) / record,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gibibytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for kind in ("small", "flux"):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            found[kind] = maps(Path(name), kind, options.gibibytes, options.rounds)
        print(kind, {key: round(float(value), 3) for key, value in found[kind].items()})
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        milliseconds = opening(Path(name), options.rounds)
    print(f"{milliseconds:.0f} ms to open and print 19 layers x 28 steps x 5 variables")
    speed: dict[str, dict[str, float]] = {
        f"records of {row['record, MiB']:.0f} MiB": {
            "q25": row["q25"],
            "median": row["speed over numpy"],
            "q75": row["q75"],
        }
        for row in found.values()
    }
    settings = {"GiB": options.gibibytes, "rounds": options.rounds, "dask threads": dask.system.CPU_COUNT}
    everything = {"settings": settings, "rows": found, "open, ms": milliseconds}
    text = f"{milliseconds:.0f} ms to open and print a store of 19 layers, 28 steps and 5 variables."
    sections = [Section("Speed", text, [bars(speed, "speed over numpy", {"numpy": 1})])]
    write("offline", "Maps from a store", "`saliency` against numpy on the same bytes.", everything, sections)


if __name__ == "__main__":
    main()
