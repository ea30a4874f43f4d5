"""The concept stream: eqs. (2)-(7), one block at a time.

    q_c, k_c, v_c = the text side's projections of c                    (2), (3)
    o_c = softmax(q_c [k_x; k_c]^T / sqrt(d)) [v_x; v_c]                (4), (5)
    c <- c + a1 P o_c;   c <- c + a2 MLP((1 + g) norm(c) + b)           (6), (7)

Concepts read the image; the image and the prompt never see concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe.anatomy import Anatomy, Block, Places, Projection, TextContext
from dit_probe.anatomy.block import Modulation
from dit_probe.attention import AttentionCall, attend
from dit_probe.errors import ReplayError, TraceError


@dataclass(frozen=True)
class BlockCall:
    """One block while it runs: its inputs, and what its attention call saw.

    Attributes:
        block: which block.
        arguments: the block's arguments by name.
        x, p: residual streams at its input, (row, token, width).
        attention: the joint attention call, its rows those of `x`.
        places: where image and prompt stand in it.
    """

    block: Block
    arguments: Mapping[str, Any]
    x: Tensor
    p: Tensor
    attention: AttentionCall
    places: Places

    @classmethod
    def read(
        cls,
        anatomy: Anatomy,
        block: Block,
        arguments: Mapping[str, Any],
        calls: Sequence[AttentionCall],
        places: Places,
    ) -> BlockCall:
        """From the block's arguments and the attention calls seen in it."""
        x, p = anatomy.streams(block, arguments, places)
        attention = anatomy.joint_call(calls, arguments, block.path, places.total)
        return cls(block, arguments, x, p, attention, places)


@dataclass(frozen=True)
class Step:
    """One block's worth of the concept stream: projections, ``o_c``, and ``c`` afterwards (None where it ends)."""

    projection: Projection
    o: Tensor
    c: Tensor | None


def advance(
    anatomy: Anatomy, call: BlockCall, c: Tensor, *, rows: slice, temb: Tensor | None = None, attends: str = "both"
) -> Step:
    """Take concepts through one block.

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
    concepts = c.shape[1]
    apart = temb is not None and len(temb) != len(c)  # one modulation a concept
    modulation = _rows(anatomy.modulation(call.block, call.arguments), rows) if temb is None else temb
    # Each concept stands where a lone word would: at the prompt's first position. Concepts stay a set.
    rotary = anatomy.text_rotary(call.block, call.arguments, call.places, slice(0, 1))
    context = TextContext(call.block, modulation, rotary)
    folded = c.flatten(0, 1).unsqueeze(1) if apart else c
    projection = call.block.text.project(folded, context)
    whole = _unfold(projection, concepts) if apart else projection

    attention = call.attention
    k_x, v_x = (part[rows, call.places.image] for part in (attention.k, attention.v))
    if attends == "none":
        o = whole.v
    else:
        parts = {"concepts": (whole.k, whole.v), "image": (k_x, v_x)}
        keys, values = zip(*(part for name, part in parts.items() if attends in ("both", name)), strict=True)
        mask = concept_mask(call, rows, concepts, attends)
        o = attend(whole.q, torch.cat(keys, 1), torch.cat(values, 1), scale=attention.scale, mask=mask)
    if not call.block.text_output:
        return Step(whole, o, None)
    folded_o = o.flatten(0, 1).unsqueeze(1) if apart else o
    after = call.block.text.update(folded, folded_o, projection, context)
    return Step(whole, o, after.reshape(c.shape))


def replay(anatomy: Anatomy, call: BlockCall) -> Step:
    """The text side of a block on the prompt's own tokens, attending to what the prompt attended to.

    An anatomy that describes its model gives back the model's own ``o_p`` and ``p``.
    """
    places, attention = call.places, call.attention
    rotary = anatomy.text_rotary(call.block, call.arguments, places, slice(0, places.prompt_tokens))
    context = TextContext(call.block, anatomy.modulation(call.block, call.arguments), rotary)
    projection = call.block.text.project(call.p, context)
    vectors = tuple(part.clone() for part in (attention.q, attention.k, attention.v))
    for whole, part in zip(vectors, (projection.q, projection.k, projection.v), strict=True):
        whole[:, places.prompt] = part
    o = attention.again(*vectors)[:, places.prompt]
    after = call.block.text.update(call.p, o, projection, context) if call.block.text_output else None
    return Step(projection, o, after)


def replay_differences(call: BlockCall, step: Step, p_after: Tensor | None) -> dict[str, float]:
    """Largest differences of a replay from the model, ``o_p`` and ``p``, relative to each one's largest value."""
    pairs = {"o_p": (step.o, call.places.split(call.attention.o)[1])}
    if step.c is not None and p_after is not None:
        pairs["p"] = (step.c, p_after)
    return {
        name: float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
        for name, (got, expected) in pairs.items()
    }


def check_replay(anatomy: Anatomy, call: BlockCall, step: Step, p_after: Tensor | None) -> dict[str, float]:
    """`replay_differences`, refused when they are large.

    Raises:
        ReplayError: one of them is beyond what the precision explains.
    """
    differences = replay_differences(call, step, p_after)
    limit = tolerance(call.p.dtype, call.block.module)
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


def tolerance(dtype: torch.dtype, model: nn.Module | None = None) -> float:
    """Relative difference that a replay may show: other summation orders, nothing else.

    Where the Linears of a `model` round their input to int8, those orders decide between two steps; and where image
    and prompt share the weights, they may share a scale that text alone has not. 16 steps, of the 7 bits that some
    kernels use.
    """
    limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    return max(limit, 16 / 128) if model is not None and any(map(_rounds_input, model.modules())) else limit


def _rounds_input(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
        return True
    return getattr(getattr(module, "weight", None), "act_quant_kwargs", None) is not None  # torchao's


def _unfold(projection: Projection, concepts: int) -> Projection:
    parts = (projection.q, projection.k, projection.v, projection.q_unrotated, projection.k_unrotated)
    q, k, v, q_unrotated, k_unrotated = (part.squeeze(1).unflatten(0, (-1, concepts)) for part in parts)
    return Projection(q, k, v, q_unrotated, k_unrotated)


def _rows(modulation: Modulation, rows: slice) -> Modulation:
    if isinstance(modulation, tuple):
        return tuple(part if len(part) == 1 else part[rows] for part in modulation)
    return modulation if len(modulation) == 1 else modulation[rows]


def concept_mask(call: BlockCall, rows: slice, concepts: int, attends: str) -> Tensor | None:
    """The mask that the prompt's first token saw on image keys; on concept keys, what it saw on its own.

    The first token is every row's first that is no padding: one that sees the image and itself.

    Raises:
        TraceError: no token of a row does, so that nothing says what concepts may see.
    """
    mask = call.attention.mask
    if mask is None or attends == "concepts":
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[rows] if mask.shape[0] > 1 else mask
    prompt, lowest = call.places.prompt, 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
    queries = mask[:, :, prompt] if mask.shape[2] > 1 else mask
    image, own = queries[..., call.places.image], queries[..., prompt]
    own = own.transpose(2, 3) if own.shape[2] == 1 else own.diagonal(dim1=2, dim2=3).unsqueeze(-1)
    sees = ((image > lowest).any(-1, keepdim=True) & (own > lowest)).all(1).squeeze(-1)
    if not sees.any(1).all():
        raise TraceError(
            f"{call.block.path}: no token of the prompt sees both the image and itself, which would say what concepts "
            "may see. Either a row's prompt is nothing but padding (give every row one of at least one token), or the "
            "model's text does not read the image, and then there is no concept stream in it"
        )
    each, first = torch.arange(len(sees), device=mask.device), sees.int().argmax(1)
    own = own[each, :, first].unsqueeze(2)
    image = image[each, :, first].unsqueeze(2) if image.shape[2] > 1 else image
    return image if attends == "image" else torch.cat([own.expand(*own.shape[:-1], concepts), image], -1)
