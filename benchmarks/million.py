"""What a store of a million samples costs to make, go on with and open, apart from the model.

    python benchmarks/million.py [samples]

The four scores of one noise level of FLUX.1 (19 layers, 4,096 image tokens, 5 concepts), 64 samples a file. All slots
and all labels are written, records of the first 32 samples only: what does not depend on how many there are is not
repeated. Seconds, and the highest resident memory so far, to benchmarks/results/million.json.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dit_probe import store
from dit_probe.dataset_tracing.running import block_size
from dit_probe.schema import Layout, Sample, Variable

RESULTS = Path(__file__).parent / "results" / "million.json"
LAYERS, TOKENS, WORDS, SHARD, WRITTEN = tuple(range(19)), 4096, ("dog", "sand", "sea", "sky", "other"), 64, 32
SCORES = ("score_output", "score_value", "score_cross", "score_cross_concept_to_image")
PROMPT = "a photograph of a dog on a beach, " * 3


def layout() -> Layout:
    variables = tuple(Variable(name, ("concept", "image_token"), "float32", LAYERS, (0,)) for name in SCORES)
    sizes = {"step": 1, "layer": len(LAYERS), "image_token": TOKENS, "prompt_token": 512, "concept": len(WORDS)}
    coords = {"step": (("step",), np.arange(1)), "layer": (("layer",), np.array(LAYERS))}
    return Layout(variables, sizes, coords, {"identity": {"model": "flux"}})


def main(samples: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": samples, "samples a file": SHARD}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found[name] = {"seconds": round(time.perf_counter() - start, 2), "peak MiB": round(peak)}
        print(name, found[name], flush=True)
        return result

    path, random = folder / "run.zarr", np.random.default_rng(0)
    room = store.Room(path, samples, uuid.uuid4().hex, block_size(samples, 1, SHARD), SHARD)
    data = random.normal(size=(len(LAYERS), len(WORDS), TOKENS)).astype(np.float32)

    def fill(slot: int) -> None:
        writer = store.create(room.reserve({slot: "0" * 32}), layout())
        writer.claim([Sample(PROMPT, slot, ("word",) * 512, WORDS)])
        for name in SCORES:
            for layer in LAYERS:
                writer.write(name, data[layer], sample=slot, step=0, layer=layer)
        writer.finish([slot])
        writer.close()

    def label() -> None:
        group = room._group
        for first in range(0, samples, room.block):
            count = min(room.block, samples - first)
            part = slice(first, first + count)
            group["prompt"][part] = np.array([PROMPT] * count, np.dtypes.StringDType())
            group["content"][part] = np.array(["0" * 32] * count, np.dtypes.StringDType())
            group["concept_name"][part] = np.array([WORDS] * count, np.dtypes.StringDType())
            group["seed"][part], group["done"][part] = np.arange(first, first + count), True

    with room.held(anew=False):
        timed("first sample, which makes the store", lambda: fill(0))
        timed(f"{WRITTEN - 1} more", lambda: [fill(slot) for slot in range(1, WRITTEN)])
        timed("their file of each variable", room.flush)
        timed("labels of all samples", label)

    def go_on() -> int:
        with store.Room(path, samples, uuid.uuid4().hex).held(anew=False) as status:
            assert status is not None
            return int(status.done.sum())

    timed("going on: the status of all samples", go_on)
    ds = timed("opening", lambda: store.open(path))
    timed("one record", lambda: ds.score_output[5, 0, 3].load())
    timed("means over 32 samples", lambda: ds.score_output[:32].mean(("layer", "sample")).load())
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        RESULTS.write_text(json.dumps(main(int([*sys.argv, 10**6][1]), Path(place)), indent=1) + "\n")
