"""The numbers of one picture: each word's map on its own pixels, on those of other words, and all words as classes.

| column | mean over | chance | how to read it |
|---|---|---|---|
| ``auroc`` | words | 0.5 | the word's map ranks the word's pixels first |
| ``ap``, ``max_f1`` | words | the words' share, 2 share / (1 + share) | compare with `constant`, not with 1 |
| ``pointing``, ``energy_pointing`` | words | the words' share | the latter is NaN where a map has negative values |
| ``right_of_two`` | two words | 0.5 | tells two objects apart; NaN unless two words have pixels |
| ``auroc_other`` | pairs | 0.5 | maps of the other words that are there, and of background words |
| ``auroc_absent`` | pairs | 0.5 | maps of words that are not there; NaN where none was given |
| ``ap_legacy``, with thresholds | words | depends on the map's scale | see `dit_probe.metrics` |

The last two pair the map of another word with the pixels of each word of the picture, by AUROC. A method that reads the
word is near 0.5 in them, or below, for what it looks for is elsewhere; one that does not has its ``auroc``, and is no
better for being told the word. A class-agnostic map is the map of every word: both are its ``auroc``, and
``right_of_two`` is 0.5 where it is defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dit_probe.rows import Rows, ratio

if TYPE_CHECKING:
    from dit_probe.protocols import Protocol

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # dims and values
Masks = Mapping[str, np.ndarray]  # word to ([frame,] y, x) bool

BACKGROUND = "background"
"""The class that all background words are merged to."""

_OWN = ("auroc", "ap", "max_f1", "pointing", "ap_legacy")
RANKING = (*_OWN, "energy_pointing", "right_of_two", "auroc_other", "auroc_absent")
"""Metrics that no threshold is chosen for."""
THRESHOLDED = (
    "pixel_accuracy",
    "iou_foreground",
    "iou_macro",
    "boundary_f",
    "iou_pooled_legacy",
    "pixel_accuracy_void_as_error",
)


@dataclass(frozen=True)
class Tokens:
    """The maps of several methods for one picture, all on one grid. A pixel has the value of its token.

    Attributes:
        values: (method, concept, token), float.
        concepts: the words; None: class-agnostic, one map for all words.
        at: ([frame,] y, x) the token of each pixel of the mask.
        counted: ([frame,] y, x) bool, False on void.
    """

    values: np.ndarray
    concepts: list[str] | None
    at: np.ndarray
    counted: np.ndarray

    def pixels(self, mask: np.ndarray) -> np.ndarray:
        """How many of each token's pixels are in a mask, (token)."""
        return np.bincount(self.at.ravel(), mask.ravel(), self.values.shape[-1])

    def of(self, word: str) -> np.ndarray:
        """The word's maps, (method, token)."""
        return self.values[:, 0 if self.concepts is None else self.concepts.index(word)]

    def rows(self, word: str, mask: np.ndarray, seen: np.ndarray | None = None) -> Rows:
        """The word's maps on its own pixels, a row a method."""
        inside, outside = (self.pixels(part & self.counted)[None] for part in (mask, ~mask))
        return Rows(self.of(word), inside, outside, "mean", self.at, (mask[None], self.counted[None]), seen)


def ranking(tokens: Tokens, truth: Masks, absent: Sequence[str]) -> Variables:
    """`RANKING` (method).

    Args:
        tokens: maps of the words given.
        truth: the pixels of the picture's words.
        absent: words that are not in the picture, with or without a map.
    """
    if not truth:
        return {name: (("method",), np.full(len(tokens.values), np.nan)) for name in RANKING}
    own = []
    for word, mask in truth.items():
        rows = tokens.rows(word, mask)
        energy = replace(rows, values=rows.values.clip(min=0)).energy_pointing()
        energy[rows.values.min(-1) < 0] = np.nan
        own.append([*(getattr(rows, name)() for name in _OWN), energy])
    found: dict[str, np.ndarray] = dict(zip((*_OWN, "energy_pointing"), _mean(np.array(own), 0), strict=True))
    inside = np.array([tokens.pixels(mask & tokens.counted) for mask in truth.values()])
    both = Rows(np.stack([tokens.of(word) for word in truth], 1), inside[None], inside[None], "mean", tokens.at, ())
    found["right_of_two"] = both.right_of_two()
    found["auroc_other"] = found["auroc_absent"] = found["auroc"]
    if tokens.concepts is not None:
        pairs = _auroc_of_pairs(tokens, inside)
        away = np.array([[word in absent] for word in tokens.concepts])
        itself = np.array([[word == other for other in truth] for word in tokens.concepts])
        for name, kept in (("auroc_other", ~away & ~itself), ("auroc_absent", away)):
            found[name] = _mean(np.where(kept, pairs, np.nan), (1, 2))
    return {name: (("method",), values) for name, values in found.items()}


def _auroc_of_pairs(tokens: Tokens, inside: np.ndarray) -> np.ndarray:
    """(method, word, mask): AUROC of every map on every mask, each map sorted once.

    With r the number of pixels below one, half of its equals included, and n of N pixels in the mask, it is
    ``(sum of r over the mask - n^2 / 2) / (n (N - n))``.
    """
    weight, number = tokens.pixels(tokens.counted), inside.sum(-1)
    above = []
    for values in tokens.values.reshape(-1, len(weight)):
        _, group = np.unique(values, return_inverse=True)
        size = np.bincount(group, weight)
        above.append(inside @ (np.cumsum(size) - size / 2)[group] - number**2 / 2)
    table = ratio(np.array(above), number * (weight.sum() - number))
    return table.reshape(*tokens.values.shape[:2], -1)


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Over what is defined; NaN where nothing is."""
    return ratio(np.nansum(values, axis), (~np.isnan(values)).sum(axis))


def thresholded(protocol: Protocol, tokens: Tokens, truth: Masks) -> Variables:
    """`THRESHOLDED` (method, threshold) and ``counts`` (method, threshold, count), pixels summed over the words.

    Args:
        protocol: order, thresholds, void.
        tokens: as for `ranking`.
        truth: as for `ranking`.
    """
    if protocol.order == "threshold, upsample":
        seen = np.ones((1, tokens.values.shape[-1]))
    else:
        seen = None if protocol.void == "unseen" else tokens.pixels(np.ones_like(tokens.counted))[None]
    shape = len(tokens.values), len(protocol.thresholds)
    table, counts = np.full((len(truth), len(THRESHOLDED), *shape), np.nan), np.zeros((*shape, 4))
    for i, (word, mask) in enumerate(truth.items()):
        own = tokens.rows(word, mask, seen)
        for j, threshold in enumerate(protocol.thresholds):
            rows = replace(own, threshold=threshold)
            table[i, ..., j] = [getattr(rows, name)() for name in THRESHOLDED]
            counts[:, j] += np.stack(rows.counts, -1)
    found: Variables = {"counts": (("method", "threshold", "count"), counts)}
    return found | {
        name: (("method", "threshold"), values) for name, values in zip(THRESHOLDED, _mean(table, 0), strict=True)
    }


def by_class(tokens: Tokens, truth: Masks, vocabulary: Sequence[str]) -> Variables:
    """``intersection`` and ``union`` (method, class), and ``miou`` (method), of argmax over the maps.

    Args:
        tokens: as for `ranking`; NaN without several concepts, of which none is highest.
        truth: the pixels of each word of the vocabulary that the annotation decides about.
        vocabulary: all classes but `BACKGROUND`, which has the words and pixels of no class.
    """
    classes = [BACKGROUND, *vocabulary]
    table = np.full((2, len(tokens.values), len(classes)), np.nan)
    if tokens.concepts is not None and len(tokens.concepts) > 1:
        table[...] = 0
        share = tokens.values == tokens.values.max(1, keepdims=True)
        share = share / share.sum(1, keepdims=True)
        none = ~np.any([*truth.values(), np.zeros_like(tokens.counted)], axis=0)
        annotated = {word: tokens.pixels(mask & tokens.counted) for word, mask in {**truth, BACKGROUND: none}.items()}
        for label, own in annotated.items():
            table[1, :, classes.index(label)] += own.sum()
        counted = tokens.pixels(tokens.counted)
        for i, word in enumerate(tokens.concepts):
            label = word if word in classes else BACKGROUND
            both = share[:, i] @ annotated.get(label, np.zeros_like(counted))
            table[:, :, classes.index(label)] += both, share[:, i] @ counted - both
    intersection, union = table
    return {
        "intersection": (("method", "class"), intersection),
        "union": (("method", "class"), union),
        "miou": (("method",), _mean(ratio(intersection, union), 1)),
    }
