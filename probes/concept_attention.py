"""ConceptAttention: saliency in the space of attention outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import dit_probe as dp


@dataclass(frozen=True)
class ConceptAttention(dp.Probe):
    """Record what output-space, value-space and cross-attention maps of concepts need.

        o_c = softmax(q_c [k_x; k_c]^T / sqrt(d)) [v_x; v_c]          eqs. (4), (5)
        map = softmax over concepts of o_x o_c^T                      eq. (8)

    ``ConceptAttention(words, record=(), scores=("output", "value", "cross"))`` keeps the reduced scores alone, a few
    hundred times smaller. ``pooled="zero"`` is the main path of the authors' code for Flux: concepts are modulated
    with a pooled text vector of zeros instead of the prompt's. ``attends`` is the ablation of Table 5.

    Example:
        >>> ConceptAttention(["sun", "sky"]).record
        ('o_x', 'q_x', 'k_x', 'v_x', 'o_c', 'q_c', 'k_c', 'v_c')
    """

    record: Sequence[str] = ("o_x", "q_x", "k_x", "v_x", "o_c", "q_c", "k_c", "v_c")
    source: str = "ConceptAttention, eqs. (2)-(8)"
