"""Models of no known family: a guess from the names of their parts, to be believed only when it has replayed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy.ada_zero import AdaZeroText
from dit_probe.anatomy.base import Anatomy
from dit_probe.anatomy.block import Block, Grid, Places, Rotary, interleaved
from dit_probe.errors import ConceptError, ModelError


@dataclass(frozen=True)
class Structural(Anatomy):
    """Joint blocks found by the names of their arguments and attributes.

    Attributes:
        joint: attribute that holds the joint blocks.
        attention: attribute of a block that holds its attention module.
        text_first, returns_text_first: order in the attention call, and in what a block returns.
        rotates: whether text is rotated by its part of the block's ``image_rotary_emb``.
        fast: whether the text side is described; if not, the model itself is run on concepts.
        entry_name: the module that takes text embeddings into the prompt stream.
        size: heads, head dim and width of the text stream, as the attention call showed them.
    """

    joint: str = ""
    attention: str = ""
    text_first: bool = True
    returns_text_first: bool = True
    rotates: bool = False
    fast: bool = True
    entry_name: str = ""
    size: tuple[int, int, int] | None = None

    # Not in a class body as a string: only what names itself there is a known family.
    @property
    def family(self) -> str:  # type: ignore[override]
        """What the store says in place of a family."""
        return "unknown (guessed)" if self.fast else "unknown (clamped)"

    classes = ()
    single = "no single blocks"
    text = AdaZeroText()

    @property
    def settled(self) -> bool:
        """Whether this guess has replayed on its model."""
        return self.size is not None

    @property
    def _known(self) -> tuple[int, int, int]:
        if self.size is None:
            raise ModelError("this model's family is guessed in its first traced forward; trace it once before that")
        return self.size

    def candidates(self) -> Iterator[Structural]:
        """Guesses to try, the cheap kind first."""
        for fast in (True, False):
            for text_first in (True, False):
                for returns_text_first in (True, False):
                    for rotates in (True, False) if fast else (False,):
                        yield replace(
                            self,
                            fast=fast,
                            text_first=text_first,
                            returns_text_first=returns_text_first,
                            rotates=rotates,
                        )

    def heads(self, model: Any) -> tuple[int, int]:
        return self._known[:2]

    def text_width(self, model: Any) -> int:
        return self._known[2]

    def grid(self, model: Any, arguments: Mapping[str, Any]) -> Grid:
        if (ids := arguments.get("img_ids")) is not None:
            ids = ids[0] if ids.ndim == 3 else ids
            return Grid(*(tuple(axis) for axis in ids[:, -3:].round().long().T.tolist()))
        shape, patch = arguments["hidden_states"].shape, getattr(model.config, "patch_size", 1)
        if len(shape) not in (4, 5) or not isinstance(patch, int):
            raise ModelError(
                f"{type(model).__name__}: no img_ids and no latents of 4 or 5 dims say where the image tokens are "
                f"(hidden_states {tuple(shape)}). Describe the family in a file: see CONTRIBUTING.md"
            )
        frames = shape[2] if len(shape) == 5 else 1
        return Grid.regular(shape[-2] // patch, shape[-1] // patch, frames)

    def entry(self, model: Any) -> nn.Module:
        return model.get_submodule(self.entry_name)

    def embed(self, model: Any, embeddings: Tensor, arguments: Mapping[str, Any], rows: slice) -> Tensor:
        alone = embeddings.flatten(0, 1).unsqueeze(1)
        return self.entry(model)(alone).view(*embeddings.shape[:2], -1)

    def text_rotary(self, block: Block, arguments: Mapping[str, Any], places: Places, at: slice) -> Rotary | None:
        return interleaved(arguments["image_rotary_emb"], places.in_joint(at)) if self.rotates else None

    def with_prompt(self, inputs: Mapping[str, Any], embeddings: Tensor) -> dict[str, Any]:
        prompt = self.prompt_tokens(None, inputs)
        changed = {**inputs, "encoder_hidden_states": embeddings}
        count = embeddings.shape[1]
        if (ids := inputs.get("txt_ids")) is not None:
            changed["txt_ids"] = ids[..., :1, :].expand(*ids.shape[:-2], count, -1)
        for name, value in inputs.items():
            if "mask" in name and isinstance(value, Tensor) and value.shape == (len(embeddings), prompt):
                changed[name] = torch.ones_like(value[:, :1]).expand(-1, count)
        return changed

    def encode_text(self, pipe: Any, texts: Sequence[str], limit: int) -> Tensor:
        if not hasattr(pipe, "_get_t5_prompt_embeds"):
            raise ConceptError(
                f"how {type(pipe).__name__} encodes a lone word is not known. Give embeddings: "
                "trace(..., concepts=tensor of (concept, text width))"
            )
        return super().encode_text(pipe, texts, limit)


def guess(model: nn.Module) -> Structural | None:
    """The list of blocks that take an image and a text stream, if the model has one."""
    for name, blocks in model.named_children():
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            continue
        takes = inspect.signature(type(blocks[0]).forward).parameters
        attention = [child for child, _ in blocks[0].named_children() if child.startswith("attn")]
        if {"hidden_states", "encoder_hidden_states"} <= takes.keys() and attention:
            return Structural(joint=name, attention=attention[0])
    return None
