"""The model's own joint attention between image tokens and the prompt's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import dit_probe as dp


@dataclass(frozen=True)
class PromptAttention(dp.Probe):
    """Reduce the joint softmax of eq. (1) to its image-prompt blocks, mean over heads; needs no concepts.

        a = softmax([q_p; q_x] [k_p; k_x]^T / sqrt(d))
        attention_x_to_p = a[x, p], attention_p_to_x = a[p, x]

    These are the model's own weights: masks, registers and whatever else shares the sequence count in the softmax.
    Padding draws attention of its own; what image tokens give to it is taken out and the rest scaled up again, so that
    each image token's attention to the prompt's real tokens adds up to what it gives to the whole prompt. Rows of
    padding in ``attention_p_to_x`` are left as they are: they are queries, and no other row depends on them.

    Example:
        >>> sorted(PromptAttention().observes)
        ['attention_p_to_x', 'attention_x_to_p']
    """

    source: str = "joint attention, eq. (1)"

    observes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_x_to_p": ("image_token", "prompt_token"),
        "attention_p_to_x": ("prompt_token", "image_token"),
    }

    def observe(self, block: dp.Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attention weights of one block, one head at a time: all heads at once would not fit for real models."""
        x_to_p = p_to_x = torch.zeros(())
        for head in range(block.heads):
            weights = block.weights(head) / block.heads
            to_prompt = weights[:, block.image, block.prompt]
            if block.prompt_pads is not None:
                to_prompt = _without_pads(to_prompt, block.prompt_pads)
            x_to_p, p_to_x = x_to_p + to_prompt, p_to_x + weights[:, block.prompt, block.image]
        return {"attention_x_to_p": x_to_p, "attention_p_to_x": p_to_x}


def _without_pads(weights: Tensor, pads: Tensor) -> Tensor:
    kept = weights.masked_fill(pads.to(weights.device)[:, None], 0.0)
    return kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
