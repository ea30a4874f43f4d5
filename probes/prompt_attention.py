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
    needs: ClassVar[tuple[str, ...]] = ("q_x", "k_x", "q_p", "k_p")

    def observe(self, block: dp.Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attention weights of one block, one head at a time: all heads at once would not fit for real models."""
        q_x, k_x, q_p, k_p = (activations[name].float() for name in self.needs)
        prompt = q_p.shape[1]
        x_to_p = q_x.new_zeros(len(q_x), q_x.shape[1], prompt)
        p_to_x = x_to_p.transpose(1, 2).clone()
        for head in range(q_x.shape[2]):
            keys = (k_p[:, :, head], k_x[:, :, head])
            for q, total, part in ((q_x, x_to_p, slice(0, prompt)), (q_p, p_to_x, slice(prompt, None))):
                logits = torch.cat([q[:, :, head] @ key.transpose(1, 2) for key in keys], -1) * block.scale
                weights = logits.softmax(-1)[..., part]
                if total is x_to_p and block.prompt_pads is not None:
                    weights = _without_pads(weights, block.prompt_pads)
                total += weights / q_x.shape[2]
        return {"attention_x_to_p": x_to_p, "attention_p_to_x": p_to_x}


def _without_pads(weights: Tensor, pads: Tensor) -> Tensor:
    kept = weights.masked_fill(pads.to(weights.device)[:, None], 0.0)
    return kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
