"""Models that are refused, and why, by class name: in nearly all no word reads the image, as eq. (4) has it.

A family file of one's own is asked before this list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Models that are refused for one reason.

    Attributes:
        reason: what such a model does, as the rest of a sentence; the gist of it before the first colon.
        instead: what can be had from them.
        classes: their names in diffusers.
    """

    reason: str
    instead: str
    classes: tuple[str, ...]

    @property
    def short(self) -> str:
        """The gist of the reason."""
        return self.reason.split(":")[0]


CAUSAL_TEXT = Group(
    "runs its text as a stream that attends causally to itself alone, in an attention call of its own: the image reads "
    "the text, no text query ever reads an image key",
    "How the image attends to the text is in the second attention call of every layer's self_attn; read it with a hook "
    "of your own",
    ("Cosmos3OmniTransformer",),
)

NO_WORDS_IN_SEQUENCE = Group(
    "has no words in its sequence: beside the image stand gist tokens, learned queries that a resampler fills from the "
    "whole prompt, and words are read by cross-attention only, so a concept cannot be one more of them",
    "How image and gist tokens read the words is in the cross_attention modules of its layers and perceiver; read it "
    "with a hook of your own",
    ("BriaFibo2Transformer2DModel",),
)

PACKED = Group(
    "packs text, sound, references and video into one sequence that index tensors take apart: no family file describes "
    "that yet, and diffusers has no pipeline for it, only modular blocks",
    "Its text does read the video, so describe it in a file of your own (see CONTRIBUTING.md)",
    ("MiniMaxH3Transformer3DModel",),
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

GROUPS = (CAUSAL_TEXT, TEXT_KEYS_ONLY, NO_WORDS_IN_SEQUENCE, CROSS_ATTENTION, NO_TEXT, PACKED)
REFUSED: dict[str, Group] = {name: group for group in GROUPS for name in group.classes}
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
    return f"it {group.reason}. {group.instead}, or trace one of the models that 'dit-probe models' lists"
