"""Cross-attention maps of concepts: query-key scores between concepts and image tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import dit_probe as dp


@dataclass(frozen=True)
class CrossAttention(dp.Probe):
    """Record queries and keys of image and concepts, with and without rotary embedding.

        image_to_concept: q_x k_c^T / sqrt(d)      what the authors' evaluation code scores (without rotary)
        concept_to_image: q_c k_x^T / sqrt(d)      what the paper's text describes

    Example:
        >>> CrossAttention(["sun", "sky"]).record[:4]
        ('q_x', 'k_x', 'q_c', 'k_c')
    """

    record: Sequence[str] = (
        "q_x",
        "k_x",
        "q_c",
        "k_c",
        "q_x_unrotated",
        "k_x_unrotated",
        "q_c_unrotated",
        "k_c_unrotated",
    )
    source: str = "ConceptAttention, Tables 1 and 4: cross-attention"
