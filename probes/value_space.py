"""Maps in the space of attention values."""

from collections.abc import Sequence
from dataclasses import dataclass

import dit_probe as dp


@dataclass(frozen=True)
class ValueSpace(dp.Probe):
    """Record values of image and concepts: map = softmax over concepts of v_x v_c^T (Table 4, "value").

    Example:
        >>> ValueSpace(["sun", "sky"]).record
        ('v_x', 'v_c')
    """

    record: Sequence[str] = ("v_x", "v_c")
    source: str = "ConceptAttention, Table 4: value space"
