"""One picture's pass through a vision transformer, recorded by the attention function that it computes with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes.baselines.vit_layout import Block

_NAME = "dit_probe_vit"
_WATCHED: ContextVar[tuple[Recording, Collection[str], bool]] = ContextVar("_WATCHED")
LISTS = ("inputs", "normed", "queries", "keys", "values", "attention", "context")
"""Lists of a `Recording`."""


@dataclass
class Recording:
    """What one picture left in a model: lists have an entry a layer, tensors a leading axis of one picture.

    Tokens are the class token, registers if there are any, then patches row by row.

    Attributes:
        grid: patches down and across.
        skip: tokens before the first patch.
        pixels: (1, 3, y, x), what entered the model.
        inputs: (1, token, width), the residual stream as each block gets it.
        normed: (1, token, width), what attention gets: `inputs` after the block's first norm.
        queries, keys, values: (1, head, token, d).
        attention: (1, head, query, key), rows sum to 1; under ``class_only`` those of the class token alone.
        context: (1, head, token, d), attention times values, before the output projection.
        output: (1, token, width), the residual stream after the last block, before the final norm.
    """

    grid: tuple[int, int]
    skip: int
    pixels: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    context: list[Tensor] = field(default_factory=list)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def patches(self, values: Tensor) -> Tensor:
        """Numbers of all tokens, (..., token), as a map of the patches, (..., y, x)."""
        return values[..., self.skip :].unflatten(-1, self.grid)


@contextmanager
def watch(
    tower: Any, blocks: Sequence[Block], seen: Recording, keep: Collection[str], class_only: bool
) -> Iterator[None]:
    """Record whatever passes through `tower` into `seen`; afterwards hooks are gone and attention is what it was.

    Args:
        tower: a vision model of transformers.
        blocks: its blocks.
        seen: what is filled.
        keep: its lists that are wanted.
        class_only: compute and keep the attention of the first query alone.
    """
    _register()
    configs = {id(part.config): part.config for part in tower.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    handles, token = [], _WATCHED.set((seen, keep, class_only))

    def enter(_: nn.Module, args: Any) -> None:
        seen.inputs.append(args[0])

    def read(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.normed.append(out)

    def hand_on(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.output = out

    try:
        for block in blocks:
            if "inputs" in keep:
                handles.append(block.module.register_forward_pre_hook(enter))
            if "normed" in keep:
                handles.append(block.norm1.register_forward_hook(read))
        handles.append(blocks[-1].module.register_forward_hook(hand_on))
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        for handle in handles:
            handle.remove()
        _WATCHED.reset(token)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' eager function computes it, recorded; (1, token, head, d) out."""
    seen, keep, class_only = _WATCHED.get()
    found = {"queries": query, "keys": key, "values": value}
    scores = (query[:, :, :1] if class_only else query) @ key.mT * scaling
    if mask is not None:
        scores = scores + (mask[..., :1, :] if class_only else mask)
    weights = found["attention"] = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if class_only:
        context = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    else:
        context = weights @ value
    found["context"] = context
    for name, tensor in found.items():
        if name in keep:
            getattr(seen, name).append(tensor)
    return context.transpose(1, 2).contiguous(), None
