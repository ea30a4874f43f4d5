"""What was measured of every family: `benchmarks/conformance.py` writes it, ``dit-probe models`` shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("coverage.json")


@dataclass(frozen=True)
class Coverage:
    """The oracles on the tiny models of one family, weights re-randomised.

    Attributes:
        kinds: "joint", "single" or both.
        variants: configurations that were run.
        versions: diffusers versions that they were run on.
        maxima: the largest difference of every check (`dit_probe.verification.CHECKS`) over variants, layers and
            versions, in float32, relative to the largest value.
        output_equal: whether the output was the same in all of them, bit for bit, with and without tracing.
    """

    kinds: Sequence[str] = ()
    variants: Sequence[str] = ()
    versions: Sequence[str] = ()
    maxima: Mapping[str, float] = field(default_factory=dict)
    output_equal: bool = False


def of(family: str) -> Coverage:
    """What was measured of a family; nothing, for one of your own and for one that was just added.

    Example:
        >>> of("flux").kinds
        ['joint', 'single']
    """
    return Coverage(**_read().get(family, {}))


@cache
def _read() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
