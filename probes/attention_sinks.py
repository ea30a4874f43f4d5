"""How much attention every token receives from the image: where sinks and padding would show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import dit_probe as dp


@dataclass(frozen=True)
class AttentionSinks(dp.Probe):
    """Average the joint softmax of eq. (1) over the image's queries, one number a head and key; needs no concepts.

        a = softmax([q_p; q_x] [k_p; k_x]^T / sqrt(d))
        received_x[h, j] = mean over image queries i of a[h, i, j], j an image token;  received_p: j a prompt token

    All of an image query's attention goes somewhere: ``received_x`` and ``received_p`` of a head add up to 1, or to
    less where the model has tokens that are neither (registers). ``padding`` is 1 on padding, 0 on real tokens, and -1
    where the prompt is not known as text, for a trace holds finite numbers only: `dit_probe.diagnostics`, which reads
    all three, makes it NaN. Unlike in `PromptAttention`, nothing is passed on from padding to other tokens.

    Example:
        >>> sorted(AttentionSinks().observes)
        ['padding', 'received_p', 'received_x']
    """

    source: str = "column means of the joint attention, eq. (1)"

    observes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "received_x": ("head", "image_token"),
        "received_p": ("head", "prompt_token"),
        "padding": ("prompt_token",),
    }

    def observe(self, block: dp.Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Column means of one block, one head at a time: all heads at once would not fit for real models."""
        received = torch.stack([block.weights(head)[:, block.image].mean(1) for head in range(block.heads)], 1)
        x, p = received[..., block.image], received[..., block.prompt]
        padding = torch.full_like(p[:, 0], -1.0) if block.prompt_pads is None else block.prompt_pads
        return {"received_x": x, "received_p": p, "padding": padding}
