"""One call of the transformer, as far as it is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_probe.anatomy import Block, Places
from dit_probe.edit import BlockEdits


@dataclass
class Forward:
    """One call of the transformer, as far as it is recorded.

    Attributes:
        step: step label.
        branches: branch to the rows that belong to it.
        wanted: variable to the layers at which it is recorded in this step.
        embeddings: concept embeddings (row or 1, concept, text width), None without a concept stream.
        pooled: one pooled vector per concept (concept, width), for pooled="concepts".
        pads: branch to (row, prompt_token) bool, True on padding.
        arguments: of the call, by name.
        places: where image and prompt stand in the joint sequence.
        through: the last layer that the concept stream reaches.
        verify: layers to replay.
        edits: layer to what is edited there.
    """

    step: int
    branches: Mapping[str, slice]
    wanted: Mapping[str, tuple[int, ...]]
    arguments: Mapping[str, Any]
    places: Places
    embeddings: Tensor | None = None
    pooled: Tensor | None = None
    pads: Mapping[str, Tensor] = field(default_factory=dict)
    through: int = -1
    verify: frozenset[int] = frozenset()
    edits: Mapping[int, BlockEdits] = field(default_factory=dict)
    c: dict[str, Tensor] = field(default_factory=dict)
    temb: dict[str, Tensor] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def active(self, block: Block) -> bool:
        """Whether anything is to be done in a block: gathered, edited, or a concept stream taken through."""
        if block.layer in self.layers | self.verify | self.edits.keys():
            return True
        return self.embeddings is not None and block.layer < min(self.through + 1, max(self.layers, default=0))

    @property
    def layers(self) -> set[int]:
        """Layers at which any variable is recorded."""
        return {layer for layers in self.wanted.values() for layer in layers}
