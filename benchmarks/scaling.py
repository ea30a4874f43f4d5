"""How time, memory and bytes grow with image tokens, concepts, layers, steps and samples, and with which exponent.

    python benchmarks/scaling.py

Small Flux transformers, scores of the output space in flight. One quantity grows while the others stay. ``plain`` and
``traced`` are CPU seconds of a run, the fastest of a few rounds in turns; ``added`` is their difference in the same
round, median; ``memory`` is what tensors that live at the same time take at most beyond those of the plain run;
``bytes`` what the trace keeps. An exponent is the slope of the logarithms over the sizes, 1 where a quantity doubles
with the size; that of ``added`` is left out where the difference is within the noise of the plain run.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from alternating import COLOUR, measure, write
from overhead import Bench

import dit_probe as dp
from dit_probe.methods.cost import costs
from dit_probe.panels import Sheet
from dit_probe.report import Section
from probes import ConceptAttention

BASE = {"image tokens": 256, "concepts": 8, "layers": 4, "steps": 2, "samples": 1}
SIZES = {
    "image tokens": (64, 256, 1024, 4096),
    "concepts": (4, 16, 64, 256),
    "layers": (2, 4, 8, 16),
    "steps": (1, 2, 4, 8),
    "samples": (1, 2, 4, 8),
}
COLUMNS = ("plain", "traced", "added", "memory", "bytes")


def measured(sizes: dict[str, int], rounds: int) -> dict[str, float]:
    shape = {"layers": sizes["layers"], "single": 0, "heads": 4, "head_dim": 32, "text": 64, "axes": (8, 12, 12)}
    side = int(sizes["image tokens"] ** 0.5)
    bench = Bench({**shape, "side": side}, "cpu", torch.float32, sizes["steps"] * sizes["samples"])
    words = [f"word {index}" for index in range(sizes["concepts"])]
    concepts = torch.randn(len(words), bench.concepts.shape[-1])
    probe = ConceptAttention(words, record=(), scores=("output",), steps=range(sizes["steps"]))
    kept: list[int] = []

    def traced() -> None:
        with dp.trace(bench.model, probe, concepts=concepts, verify=None, progress=False) as run:
            bench.run()
        kept.append(run.bytes_written)

    # Nothing that is returned keeps tensors alive between calls.
    arms = {"plain": lambda: (bench.run(), None)[1], "traced": traced}
    times = measure(arms, rounds)
    added = times.cpu["traced"] - times.cpu["plain"]
    noise = np.subtract(*np.percentile(times.cpu["plain"], (75, 25)))
    memory = costs(arms, repeats=1)
    return {
        "plain": times.cpu["plain"].min(),
        "traced": times.cpu["traced"].min(),
        "added": float(np.median(added)) if np.median(added) > 2 * noise else float("nan"),
        "memory": memory["traced"].memory - memory["plain"].memory,
        "bytes": kept[-1],
    }


def exponents(sizes: Any, rows: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for column in COLUMNS:
        values = np.array([row[column] for row in rows], float)
        known = np.isfinite(values) & (values > 0)
        logs = np.log(np.array(sizes)[known]), np.log(values[known])
        found[column] = float(np.polyfit(*logs, 1)[0]) if known.sum() > 2 else float("nan")
    return found


def curve(name: str, rows: list[dict[str, float]]) -> go.Figure:
    figure = go.Figure()
    for column, dash in (("plain", "dot"), ("traced", "solid")):
        values = [row[column] for row in rows]
        line = {"color": COLOUR, "dash": dash}
        figure.add_trace(go.Scatter(x=SIZES[name], y=values, name=column, line=line, mode="lines+markers"))
    figure.update_layout(Sheet.page(700, 300, {"l": 60, "r": 20, "t": 20, "b": 45}))
    figure.update_xaxes(title=name, type="log", tickvals=SIZES[name])
    return figure.update_yaxes(title="CPU seconds", type="log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"settings": {**BASE, **vars(options)}}
    sections, found["exponents"] = [], {}
    for name, sizes in SIZES.items():
        rows = [measured({**BASE, name: size}, options.rounds) for size in sizes]
        slopes = exponents(sizes, rows)
        found[name], found["exponents"][name] = {"sizes": sizes, "rows": rows}, slopes
        text = ", ".join(f"{column} {slope:.2f}" for column, slope in slopes.items())
        print(f"{name:13} {text}")
        sections.append(Section(name, f"Exponents: {text}.", [curve(name, rows)]))
    write("scaling", "How a trace grows", "Scores of the output space in flight.", found, sections)


if __name__ == "__main__":
    main()
