"""Slots of a store that somebody else keeps, as a place that `dit_probe.trace` can write to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dit_probe.schema import Layout
from dit_probe.store.writer import Writer


@dataclass(frozen=True)
class Reserved:
    """What `dit_probe.trace` takes as its `store` to fill slots that are reserved for it (`Room.reserve`).

    Attributes:
        writer: makes the writer, once the layout is known.
    """

    writer: Callable[[Layout], Writer]
