"""What a trace holds in memory at its worst moment, beyond the model's own tensors.

    python benchmarks/memory.py

Scores alone should add one layer's activations and a constant, whatever the number of layers and steps; raw capture
adds the queue of what waits for the disk, which is bounded. On a CPU, tensors are followed from the operation that
makes them to their end (`dit_probe.methods.costs`), and numpy's own by tracemalloc; on a CUDA device, its allocator
counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from alternating import peak, write
from overhead import SHAPES, WORDS, Bench

import dit_probe as dp
from dit_probe.methods.cost import costs
from dit_probe.report import Section
from dit_probe.summary import markdown
from probes import ConceptAttention

LAYERS, STEPS = (2, 6, 12), (1, 4)


def row(layers: int, steps: int) -> dict[str, float]:
    shape = {**SHAPES["small"], "layers": layers, "single": 0}
    bench = Bench(shape, "cuda" if torch.cuda.is_available() else "cpu", torch.float32, steps)

    def run(**options: Any) -> Callable[[], None]:
        probe = ConceptAttention(WORDS, steps=range(steps), **options)

        def arm() -> None:
            with dp.trace(bench.model, probe, concepts=bench.concepts, progress=False):
                bench.run()

        return arm

    arms = {"plain": lambda: (bench.run(), None)[1], "scores": run(record=(), scores=("output", "value", "cross"))}
    found = costs(arms, repeats=1)
    # q, k, v, o of all tokens: what one attention call sees.
    tokens = shape["side"] ** 2 + shape["text"]
    layer = 4 * tokens * shape["heads"] * shape["head_dim"] * 4
    extra = found["scores"].memory - found["plain"].memory
    scores = 3 * len(WORDS) * shape["side"] ** 2 * 4 * layers * steps
    return {
        "layers": layers,
        "steps": steps,
        "plain, MiB": found["plain"].memory / 2**20,
        "added, MiB": extra / 2**20,
        "added, layers' q k v o": extra / layer,
        "host, MiB": peak(arms["scores"]) / 2**20,
        "scores kept, MiB": scores / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(layers, steps) for layers in LAYERS for steps in STEPS]
    cells = [[*rows[0]], *([f"{value:.3g}" for value in each.values()] for each in rows)]
    print(markdown(cells))
    found = {"settings": {"concepts": len(WORDS), "torch": torch.__version__}, "rows": rows}
    write("memory", "Memory of a trace", "Three scores of six concepts in flight, replay of the first step included.",
          found, [Section("At the worst moment", code=markdown(cells))])  # fmt: skip


if __name__ == "__main__":
    main()
