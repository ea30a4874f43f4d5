"""Arms of a benchmark measured in turns, and what their ratios say."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dit_probe.panels import Sheet
from dit_probe.report import Section, page

RESULTS = Path(__file__).resolve().parent / "results"
COLOUR = "#21918c"


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by arm: process CPU time, which a busy machine disturbs least, and wall time."""

    cpu: Mapping[str, np.ndarray]
    wall: Mapping[str, np.ndarray]

    def ratios(self, base: str, clock: str = "cpu") -> dict[str, dict[str, float]]:
        """Every arm over the base in the same round: median, quartiles, and the ratio of the fastest rounds."""
        seconds = getattr(self, clock)
        found = {}
        for name, mine in seconds.items():
            each = mine / seconds[base]
            low, middle, high = np.percentile(each, (25, 50, 75))
            found[name] = {"median": middle, "q25": low, "q75": high, "fastest": mine.min() / seconds[base].min()}
        return found


def measure(
    arms: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0, after: Callable[[], object] = lambda: None
) -> Times:
    """Run every arm once to warm up and then once a round, in an order that is drawn anew for each.

    `after` cleans up behind each, and is not timed.
    """
    order, drawn = list(arms), random.Random(seed)
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for name in order:
        arms[name]()
        after()
    for _ in range(rounds):
        drawn.shuffle(order)
        for name in order:
            began = time.process_time(), time.perf_counter()
            arms[name]()
            cpu[name].append(time.process_time() - began[0])
            wall[name].append(time.perf_counter() - began[1])
            after()
    return Times(*({name: np.array(values) for name, values in seconds.items()} for seconds in (cpu, wall)))


def peak(call: Callable[[], object]) -> int:
    """Bytes that numpy and Python allocate in a call, at the worst moment."""
    tracemalloc.start()
    call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def bars(ratios: Mapping[str, Mapping[str, float]], title: str, marks: Mapping[str, float] | None = None) -> go.Figure:
    """Median ratios with their quartiles; `marks` are vertical lines."""
    names = list(ratios)[::-1]
    middle = np.array([ratios[name]["median"] for name in names])
    spread = {
        "array": np.array([ratios[name]["q75"] for name in names]) - middle,
        "arrayminus": middle - np.array([ratios[name]["q25"] for name in names]),
    }
    figure = go.Figure(
        go.Scatter(
            x=middle,
            y=names,
            mode="markers",
            marker={"size": 9, "color": COLOUR},
            error_x={"type": "data", "symmetric": False, "color": COLOUR, **spread},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    for text, value in (marks or {}).items():
        figure.add_vline(value, line={"width": 1, "dash": "dot"}, annotation_text=text, annotation_position="top")
    longest = max(map(len, names))
    figure.update_layout(Sheet.page(1080, 90 + 30 * len(names), {"l": 20 + 7 * longest, "r": 20, "t": 30, "b": 45}))
    figure.update_xaxes(title=title)
    return figure


def write(name: str, title: str, lead: str, found: Mapping[str, Any], sections: list[Section]) -> None:
    """Results as JSON and as a page, under ``benchmarks/results``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, default=float) + "\n")
    facts = found.get("settings")
    (RESULTS / f"{name}.html").write_text(page(title, sections, lead=lead, facts=facts), encoding="utf-8")
    print(RESULTS / f"{name}.html")
