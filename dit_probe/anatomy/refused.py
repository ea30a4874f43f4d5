"""Models in which no text token reads the image, so that eq. (4) has nothing to stand for, and why, by class name.

A family file of one's own is asked before this list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Models that are refused for one reason.

    Attributes:
        reason: what such a model does, as the rest of a sentence.
        instead: what can be had from them.
        classes: their names in diffusers.
    """

    reason: str
    instead: str
    classes: tuple[str, ...]


CAUSAL_TEXT = Group(
    "runs its text as a stream that attends causally to itself alone, in an attention call of its own: the image reads "
    "the text, no text query ever reads an image key",
    "How the image attends to the text is in the second attention call of every layer's self_attn; read it with a hook "
    "of your own",
    ("Cosmos3OmniTransformer",),
)

TEXT_KEYS_ONLY = Group(
    "gives its text keys and values, but no queries and no residual stream: there is no o_p, no text to go on to the "
    "next block, and so no concept stream",
    "How the image attends to the text is in every block's attention call, whose keys are both's and whose queries are "
    "the image's; read it with a hook of your own",
    ("NucleusMoEImageTransformer2DModel", "PRXTransformer2DModel"),
)

CROSS_ATTENTION = Group(
    "takes text in by cross-attention only: the image reads text keys and values in every block, but in none does text "
    "attend to the image, or go on to the next one changed",
    "Cross-attention maps are what such a model offers; read them with a hook of your own on its cross-attention "
    "modules",
    (
        "AceStepTransformer1DModel",
        "AllegroTransformer3DModel",
        "AnyFlowFARTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "CosmosTransformer3DModel",
        "DreamLiteTransformer2DModel",
        "HeliosTransformer3DModel",
        "HunyuanDiT2DModel",
        "Kandinsky5Transformer3DModel",
        "Kandinsky6Transformer3DModel",
        "LTX2VideoTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "LatteTransformer3DModel",
        "LongCatAudioDiTTransformer",
        "LuminaNextDiT2DModel",
        "PixArtTransformer2DModel",
        "SanaTransformer2DModel",
        "SanaVideoTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
        "SanaWMTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "StableAudio3DiTModel",
        "StableAudioDiTModel",
        "WanAnimate2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    ),
)

NO_TEXT = Group(
    "takes no text tokens in: what it is told of the content comes as a class, as features of every frame, or not",
    "Its activations can be read with hooks of your own; there is nothing in them to compare with a word",
    ("DiTTransformer2DModel", "Kandinsky6SRTransformer3DModel", "MiniMaxMusic3Transformer1DModel"),
)

REFUSED: dict[str, Group] = {
    name: group for group in (CAUSAL_TEXT, TEXT_KEYS_ONLY, CROSS_ATTENTION, NO_TEXT) for name in group.classes
}
"""Class name to the group it is refused with."""


def refusal(names: Iterable[str]) -> str | None:
    """Why a model is refused and what to do instead, by the names of its class and of its bases; None if it is not.

    Example:
        >>> refusal(["WanTransformer3DModel", "ModelMixin"]).split(":")[0]
        'it takes text in by cross-attention only'
    """
    group = next((REFUSED[name] for name in names if name in REFUSED), None)
    if group is None:
        return None
    return (
        f"it {group.reason}. {group.instead}, or trace a model whose text attends to the image ('dit-probe models' "
        "lists them)"
    )
