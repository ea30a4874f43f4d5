"""The concept stream: eqs. (2)-(7), one block at a time.

    q_c, k_c, v_c = the text side's projections of c                    (2), (3)
    o_c = softmax(q_c [k_x; k_c]^T / sqrt(d)) [v_x; v_c]                (4), (5)
    c <- c + a1 P o_c;   c <- c + a2 MLP((1 + g) norm(c) + b)           (6), (7)

Concepts read the image; the image and the prompt never see concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_probe.anatomy.base import Anatomy, Block, Projection, TextContext
from dit_probe.attention import AttentionCall, attend
from dit_probe.errors import ReplayError


@dataclass(frozen=True)
class BlockCall:
    """One block while it runs: its inputs, and what its attention call saw.

    Attributes:
        block: which block.
        arguments: the block's arguments by name.
        x, p: residual streams at its input, (row, token, width).
        attention: the joint attention call, its rows those of `x`.
    """

    block: Block
    arguments: Mapping[str, Any]
    x: Tensor
    p: Tensor
    attention: AttentionCall

    def split(self, joint: Tensor, anatomy: Anatomy) -> tuple[Tensor, Tensor]:
        """(image, prompt) parts of a joint sequence (row, token, …)."""
        prompt = self.p.shape[1]
        if anatomy.text_first:
            return joint[:, prompt:], joint[:, :prompt]
        return joint[:, :-prompt], joint[:, -prompt:]


@dataclass(frozen=True)
class Step:
    """One block's worth of the concept stream: projections, ``o_c``, and ``c`` afterwards (None where it ends)."""

    projection: Projection
    o: Tensor
    c: Tensor | None


def advance(
    anatomy: Anatomy, call: BlockCall, c: Tensor, *, rows: slice, temb: Tensor | None = None, attends: str = "both"
) -> Step:
    """Take concepts through one joint block.

    Args:
        anatomy: the model's family.
        call: the block's call.
        c: concepts (row, concept, width) before the block.
        rows: the rows of the call that `c` belongs to.
        temb: modulation input (row, width) or, for one pooled vector per concept, (row * concept, width).
            None: the prompt's.
        attends: what concepts attend to (Table 5): "both" image and concepts, "image", "concepts", or "none",
            which makes ``o_c = v_c``.
    """
    modulation = call.arguments["temb"][rows] if temb is None else temb
    rotary = anatomy.text_rotary(call.arguments, call.p.shape[1])
    if rotary is not None:
        # Each concept stands where a lone word would: at the prompt's first position. Concepts stay a set.
        rotary = (rotary[0][:1], rotary[1][:1])
    context = TextContext(call.block, modulation, rotary)
    concepts = c.shape[1]
    folded = c.flatten(0, 1).unsqueeze(1) if len(modulation) != len(c) else c
    projection = anatomy.text.project(folded, context)
    whole = _unfold(projection, concepts) if folded is not c else projection

    attention = call.attention
    (k_x, _), (v_x, _) = (call.split(part[rows], anatomy) for part in (attention.k, attention.v))
    if attends == "none":
        o = whole.v
    else:
        parts = {"image": (k_x, v_x), "concepts": (whole.k, whole.v)}
        chosen = ("concepts", "image") if anatomy.text_first else ("image", "concepts")
        keys, values = zip(*(parts[part] for part in chosen if attends in ("both", part)), strict=True)
        mask = _image_mask(anatomy, call, rows, concepts, attends)
        o = attend(whole.q, torch.cat(keys, 1), torch.cat(values, 1), scale=attention.scale, mask=mask)
    if not call.block.text_output:
        return Step(whole, o, None)
    folded_o = o.flatten(0, 1).unsqueeze(1) if folded is not c else o
    after = anatomy.text.update(folded, folded_o, projection, context)
    return Step(whole, o, after.reshape(c.shape))


def replay(anatomy: Anatomy, call: BlockCall) -> Step:
    """The text side of a block on the prompt's own tokens, attending to what the prompt attended to.

    An anatomy that describes its model gives back the model's own ``o_p`` and ``p``.
    """
    context = TextContext(call.block, call.arguments["temb"], anatomy.text_rotary(call.arguments, call.p.shape[1]))
    projection = anatomy.text.project(call.p, context)
    attention = call.attention
    (k_x, _), (v_x, _) = call.split(attention.k, anatomy), call.split(attention.v, anatomy)
    order = (lambda image, text: (text, image)) if anatomy.text_first else (lambda image, text: (image, text))
    k, v = torch.cat(order(k_x, projection.k), 1), torch.cat(order(v_x, projection.v), 1)
    mask = attention.mask
    if mask is not None and mask.shape[-2] == attention.q.shape[1]:
        _, mask = call.split(mask.movedim(-2, 1), anatomy)
        mask = mask.movedim(1, -2)
    o = attend(projection.q, k, v, scale=attention.scale, mask=mask)
    after = anatomy.text.update(call.p, o, projection, context) if call.block.text_output else None
    return Step(projection, o, after)


def check_replay(anatomy: Anatomy, call: BlockCall, step: Step, p_after: Tensor | None) -> dict[str, float]:
    """Largest differences of a replay from the model, relative to the stream's largest value.

    Raises:
        ReplayError: one of them is beyond what the precision explains.
    """
    pairs = {"o_p": (step.o, call.split(call.attention.o, anatomy)[1])}
    if step.c is not None and p_after is not None:
        pairs["p"] = (step.c, p_after)
    differences = {
        name: float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
        for name, (got, expected) in pairs.items()
    }
    limit = tolerance(call.p.dtype)
    # Written so that NaN fails.
    wrong = [f"{name} by {value:.2g}" for name, value in differences.items() if not value <= limit]
    if wrong:
        raise ReplayError(
            f"{call.block.path}: the {anatomy.family} anatomy does not describe this model. Replaying the prompt's "
            f"own tokens misses {' and '.join(wrong)} of its largest value (at most {limit:.2g} in {call.p.dtype}), "
            "so a concept stream would be wrong as well. An attention processor or block was changed, or this "
            "version of diffusers is not supported"
        )
    return differences


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that a replay may show: other summation orders, nothing else."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)


def _unfold(projection: Projection, concepts: int) -> Projection:
    parts = (projection.q, projection.k, projection.v, projection.q_unrotated, projection.k_unrotated)
    q, k, v, q_unrotated, k_unrotated = (part.squeeze(1).unflatten(0, (-1, concepts)) for part in parts)
    return Projection(q, k, v, q_unrotated, k_unrotated)


def _image_mask(anatomy: Anatomy, call: BlockCall, rows: slice, concepts: int, attends: str) -> Tensor | None:
    """The mask that the prompt's first token saw on image keys; concepts never mask each other."""
    mask = call.attention.mask
    if mask is None or attends == "concepts":
        return None
    mask = mask if mask.ndim == 4 else mask.unsqueeze(0) if mask.ndim == 3 else mask[None, None]
    mask = mask[rows] if mask.shape[0] > 1 else mask
    if mask.shape[2] > 1:
        row = 0 if anatomy.text_first else mask.shape[2] - call.p.shape[1]
        mask = mask[:, :, row : row + 1]
    image, _ = call.split(mask.movedim(-1, 1), anatomy)
    image = image.movedim(1, -1)
    if attends == "image":
        return image
    allowed = image.new_full((*image.shape[:-1], concepts), mask.dtype == torch.bool)
    return torch.cat((allowed, image) if anatomy.text_first else (image, allowed), -1)
