"""What a row of a table is: its model, whether it knows the word, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dit_probe import methods

COLUMNS = ("model", "one map for all words", "passes", "gradients", "time", "memory")
"""The last two in units of one plain pass of the row's own model."""
Facts = tuple[str, ...]


def measured(
    rows: Mapping[str, Any], image: np.ndarray, concepts: Sequence[str], architecture: str, file: Path
) -> dict[str, Facts]:
    """Facts of methods that are there; those that say nothing of a plain pass have neither time nor memory.

    Args:
        rows: name to method.
        image: ([frame,] y, x, 3) uint8, on which they are timed.
        concepts: words that they are asked for.
        architecture: of those that do not say theirs.
        file: JSON, where they are kept; a row that is there is not measured again.
    """
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in [name for name in rows if name not in found]:
        model, *said = _said(rows[name])
        found[name] = (model or architecture, *said, *_price(rows[name], image, concepts))
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return {name: tuple(found[name]) for name in rows}


def declared(architecture: str, method: str) -> Facts | None:
    """Facts of a row that was not measured, as the class of its method says them; None where no class is known."""
    for host in methods.hosts().values():
        if host.architecture == architecture and method in host.methods:
            return (architecture, *_said(host.kinds()[method])[1:], "", "")
    return None


def _said(method: Any) -> Facts:
    one_map = "yes" if getattr(method, "class_agnostic", False) else "no"
    counts = [
        _count(getattr(method, name, 0), getattr(method, f"{name}_a_concept", 0)) for name in ("forwards", "backwards")
    ]
    return (str(getattr(method, "architecture", "")), one_map, *counts)


def _count(an_image: int, a_concept: int) -> str:
    parts = [str(an_image)] if an_image or not a_concept else []
    return " + ".join([*parts, *([f"{a_concept} a word"] if a_concept else [])])


def _price(method: Any, image: np.ndarray, concepts: Sequence[str]) -> Facts:
    if not hasattr(method, "forward"):
        return "", ""
    number = count()

    def another() -> np.ndarray:
        """A picture that was not seen before: some methods keep the last one's pass."""
        changed = image.copy()
        changed.reshape(-1)[:8] = np.frombuffer(next(number).to_bytes(8, "little"), np.uint8)
        return changed

    calls = {"row": lambda: method([another()], list(concepts)), "pass": lambda: method.forward(another())}
    found = methods.costs(calls)
    return tuple(f"{ratio:.{1 if ratio < 10 else 0}f}x" for ratio in found["row"] / found["pass"])
