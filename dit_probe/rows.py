"""Metrics of rows, a map and its mask each, in numpy; `dit_probe.metrics` says what they are and gives them labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from dit_probe.errors import MetricError

Threshold = Literal["mean", "otsu"] | float

_by = partial(np.take_along_axis, axis=-1)


@dataclass(frozen=True)
class Rows:
    """Some rows, (row, token) or (row, concept, token). A method with the name of a metric gives it for each row.

    Attributes:
        values: of the maps, float.
        inside: how many valid pixels of a token are on the object; of 1 row, if all maps have the same mask.
        outside: how many are not.
        threshold: rule as for `dit_probe.metrics.score`.
        at: ([frame,] y, x) the token of each pixel.
        pixels: mask, and what is valid, (row, [frame,] y, x); only ``boundary_f`` looks at them.
        seen: how much each token has to say about minimum, maximum and threshold; None: its valid pixels.
    """

    values: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    threshold: Threshold
    at: np.ndarray
    pixels: Sequence[np.ndarray]
    seen: np.ndarray | None = None

    @cached_property
    def weight(self) -> np.ndarray:
        return self.inside + self.outside

    @cached_property
    def curve(self) -> tuple[np.ndarray, ...]:
        """By falling value: order, where a value ends, object and other pixels down to there and of each value."""
        order = np.argsort(-self.values, axis=-1)
        values, inside, outside = (_by(part, order) for part in (self.values, self.inside, self.outside))
        ends = np.diff(values, axis=-1, append=np.nan) != 0
        totals = [np.cumsum(part, axis=-1) for part in (inside, outside)]
        # Totals never fall: up to the end of its ties, the highest so far is that of the value before.
        reached = [np.maximum.accumulate(np.where(ends, total, 0), axis=-1) for total in totals]
        return order, ends, *totals, *(np.diff(total, axis=-1, prepend=0) for total in reached)

    @cached_property
    def _seen(self) -> np.ndarray:
        return self.weight if self.seen is None else self.seen

    @cached_property
    def scaled(self) -> np.ndarray:
        """Min-maxed over what is seen; 0 where a map is constant."""
        low = np.where(self._seen > 0, self.values, np.inf).min(-1, keepdims=True)
        span = np.where(self._seen > 0, self.values, -np.inf).max(-1, keepdims=True) - low
        return np.where(span > 0, self.values - low, 0) / np.where(span > 0, span, 1)

    @cached_property
    def predicted(self) -> np.ndarray:
        if isinstance(self.threshold, (int, float)):
            return self.scaled > self.threshold
        if self.threshold == "mean":
            return self.scaled - 1e-12 > ratio((self.scaled * self._seen).sum(-1), self._seen.sum(-1))[:, None]
        order, ends, *_ = self.curve
        values, weight = _by(self.scaled, order), _by(self._seen, order)
        above, mass = np.cumsum(weight, axis=-1), np.cumsum(weight * values, axis=-1)
        below = above[:, -1:] - above
        spread = (mass * above[:, -1:] - mass[:, -1:] * above) ** 2 / np.maximum(above * below, 1)
        last = np.where(ends & (below > 0), spread, 0).argmax(-1)
        return self.scaled > _by(values, np.minimum(last + 1, values.shape[-1] - 1)[:, None])

    @cached_property
    def counts(self) -> tuple[np.ndarray, ...]:
        true, false = ((self.predicted * part).sum(-1) for part in (self.inside, self.outside))
        return true, false, self.inside.sum(-1) - true, self.outside.sum(-1) - false

    def auroc(self) -> np.ndarray:
        _, _, true, _, gained, spent = self.curve
        return ratio((spent * (true - gained / 2)).sum(-1), self.inside.sum(-1) * self.outside.sum(-1))

    def ap(self) -> np.ndarray:
        _, _, true, false, gained, _ = self.curve
        return ratio((gained * true / np.maximum(true + false, 1)).sum(-1), self.inside.sum(-1))

    def max_f1(self) -> np.ndarray:
        _, ends, true, false, *_ = self.curve
        return (ends * 2 * ratio(true, true + false + self.inside.sum(-1, keepdims=True), true[:, -1:] > 0)).max(-1)

    def pixel_accuracy(self) -> np.ndarray:
        true, false, missed, rest = self.counts
        return ratio(true + rest, true + false + missed + rest)

    def iou_foreground(self) -> np.ndarray:
        true, false, missed, _ = self.counts
        return ratio(true, true + false + missed, true + missed > 0)

    def iou_macro(self) -> np.ndarray:
        _, false, missed, rest = self.counts
        return (self.iou_foreground() + ratio(rest, rest + false + missed, rest + false > 0)) / 2

    def boundary_f(self) -> np.ndarray:
        return boundary_f(self.predicted[:, self.at], *self.pixels)

    def pointing(self) -> np.ndarray:
        top = self.values == np.where(self.weight > 0, self.values, -np.inf).max(-1, keepdims=True)
        return ratio((top * self.inside).sum(-1), (top * self.weight).sum(-1), self.inside.any(-1))

    def energy_pointing(self) -> np.ndarray:
        if (low := self.values.min()) < 0:
            raise MetricError(f"energy_pointing of maps down to {low:.3g}: use maps >= 0, as after a softmax")
        return ratio((self.values * self.inside).sum(-1), (self.values * self.weight).sum(-1), self.inside.any(-1))

    def ap_legacy(self) -> np.ndarray:
        parts = (1 - self.scaled, self.scaled), (self.outside, self.inside), (self.inside, self.outside)
        values, inside, outside = (np.concatenate(part, axis=-1) for part in parts)
        return replace(self, values=values, inside=inside, outside=outside).ap()

    def iou_pooled_legacy(self) -> np.ndarray:
        return (accuracy := self.pixel_accuracy()) / (2 - accuracy)

    def pixel_accuracy_void_as_error(self) -> np.ndarray:
        valid = self.weight.sum(-1)
        return 2 * self.pixel_accuracy() * valid / (valid + self.at.size)

    def right_of_two(self) -> np.ndarray:
        present = self.inside.sum(-1) > 0
        two = present.sum(-1) == 2
        pair = np.take(np.argsort(present, axis=-1), [-2, -1], axis=-1, mode="wrap")[..., None]  # one: with itself
        parts = (np.take_along_axis(part, pair, axis=1) for part in (self.values, self.inside))
        (a, b), (first, second) = (np.moveaxis(part, 1, 0) for part in parts)
        win = (a > b) + 0.5 * (a == b)
        means = [ratio((part * own).sum(-1), own.sum(-1), two) for part, own in ((win, first), (1 - win, second))]
        return np.mean(means, axis=0)


def ratio(part: np.ndarray, whole: np.ndarray, about: Any = True) -> np.ndarray:
    """NaN where there is nothing to divide by, or nothing of what the ratio is about."""
    defined = (whole > 0) & about
    return np.where(defined, part, np.nan) / np.where(defined, whole, 1)


def boundary_f(predicted: np.ndarray, mask: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """That metric of boolean pixels (row, [frame,] y, x); what is drawn on void is not asked to be right."""
    drawn, true = rim(predicted), rim(mask & valid)
    reach = max(1.0, 0.0075 * math.hypot(*mask.shape[-2:]))
    claimed, place = drawn & valid, tuple(range(1, mask.ndim))
    hits, claims = (claimed & dilated(true, reach)).sum(place), claimed.sum(place)
    precision = np.where(claims > 0, hits / np.maximum(claims, 1), 1)  # nothing claimed, nothing wrong
    recall = ratio((true & dilated(drawn, reach)).sum(place), true.sum(place))
    return np.where(recall == 0, 0, ratio(2 * precision * recall, precision + recall))


def rim(area: np.ndarray) -> np.ndarray:
    """Pixels of an area (..., y, x) with one of their four neighbours outside; the picture's edge is no outline."""
    around = np.pad(area, [(0, 0)] * (area.ndim - 2) + [(1, 1)] * 2, mode="edge")
    up, down, left, right = around[..., :-2, 1:-1], around[..., 2:, 1:-1], around[..., 1:-1, :-2], around[..., 1:-1, 2:]
    return area & ~(up & down & left & right)


def dilated(area: np.ndarray, reach: float) -> np.ndarray:
    """Pixels (..., y, x) within `reach` of an area: a disk is a stack of runs, the outermost the shortest."""
    run, found, width, height = area.copy(), np.zeros_like(area), 0, area.shape[-2]
    for off in range(min(int(reach), height - 1), -1, -1):
        while width < int(math.sqrt(reach**2 - off**2)):
            width += 1
            run[..., width:] |= area[..., :-width]
            run[..., :-width] |= area[..., width:]
        found[..., off:, :] |= run[..., : height - off, :]
        found[..., : height - off, :] |= run[..., off:, :]
    return found
