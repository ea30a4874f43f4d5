"""Which tokens are edited: a map's highest, others beside them, and more and more of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import xarray as xr

from dit_probe.causal.effects import PLACE, Effect
from dit_probe.edit import Edit
from dit_probe.edits import block, by_row
from dit_probe.errors import MetricError

Ablate = Callable[[np.ndarray], Edit]
"""Makes the edit of one sample's tokens, (token) bool."""


def cut_from_prompt(tokens: np.ndarray) -> Edit:
    """The ablation that is made unless another is given: these image tokens do not read the prompt, in any layer.

    What the words told them is gone; they still see each other and the rest of the image, and are seen.

    Example:
        >>> cut_from_prompt(np.array([True, False])).site
        'attends'
    """
    return block("image", "prompt", query_tokens=tokens, layers="all")


def ablation(
    effect: Effect,
    maps: xr.DataArray,
    k: int | Sequence[int],
    *,
    draws: int = 3,
    seed: int = 0,
    ablate: Ablate = cut_from_prompt,
) -> xr.Dataset:
    """Ablate a map's highest tokens, and as many others.

    Scattered tokens are easily made up for by their neighbours, and a map's highest lie together: beside random tokens
    stand the map's own, moved together to another place on the grid (around its border).

    Args:
        effect: of edits; runs 2 + 2 `draws` times.
        maps: (sample, [frame,] y, x) of one concept each, `saliency(…).sel(concept="boat")`.
        k: how many tokens: one number, or one a sample.
        draws: of random tokens and of places, which differ between samples.
        seed: of both.
        ablate: makes the edit.

    Returns:
        The effect with the tokens of each variable ablated: ``none``, ``top``, ``random`` (draw, …) and ``moved``
        (draw, …); and ``tokens`` (sample, [frame,] y, x), the top ones.

    Raises:
        MetricError: maps of several concepts, layers …, or not finite; more tokens than there are.

    Example:
        >>> from dit_probe.causal import by_region, change
        >>> from dit_probe.testing import tiny_pipeline
        >>> measure = change(tiny_pipeline("flux"), "a sun", height=16, width=16, num_inference_steps=1)
        >>> maps = xr.DataArray(np.random.default_rng(0).random((1, 4, 4)), dims=("sample", "y", "x"))
        >>> found = ablation(measure, maps, k=3, draws=2)
        >>> by_region(found.moved, found.tokens).sizes
        Frozen({'region': 2, 'draw': 2, 'sample': 1})
    """
    order, sizes = _ranked(maps)
    count = np.broadcast_to(np.asarray(k), len(order))
    if (count < 1).any() or (count > order.shape[1]).any():
        raise MetricError(f"k={k}: of {order.shape[1]} image tokens there can be 1 to all")
    random, top = np.random.default_rng(seed), _first(order, count)

    def moved() -> np.ndarray:
        grids = top.reshape(len(top), *sizes.values())
        *_, y, x = grids.shape
        by = [np.unravel_index(random.integers(1, y * x), (y, x)) for _ in grids]
        return np.stack([np.roll(grid, shift, axis=(-2, -1)).ravel() for grid, shift in zip(grids, by, strict=True)])

    def several(tokens: Callable[[], np.ndarray]) -> xr.DataArray:
        runs: Any = xr.concat([_under(effect, ablate, tokens()) for _ in range(draws)], "draw")
        return runs

    return xr.Dataset(
        {
            "none": effect(edits=[]),
            "top": _under(effect, ablate, top),
            "random": several(lambda: _first(random.permuted(order, axis=1), count)),
            "moved": several(moved),
            "tokens": (("sample", *sizes), top.reshape(len(top), *sizes.values())),
        }
    )


def curves(
    effect: Effect,
    maps: xr.DataArray,
    *,
    shares: Sequence[float] = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    draws: int = 2,
    seed: int = 0,
    ablate: Ablate = cut_from_prompt,
) -> xr.Dataset:
    """Deletion and insertion curves: the effect of ablating more and more tokens in the order of a map.

    ``deletion`` ablates the highest tokens first, ``insertion`` the lowest, so that, read from the right, the highest
    come back first; ``random`` takes any. A map that orders tokens by what they matter has the largest area between
    deletion and insertion.

    Args:
        effect: of edits, with whatever dims beside ``sample``; runs once for every order and share.
        maps: as for `ablation`, as are `seed` and `ablate`.
        shares: of the image's tokens that are ablated, rising, 0 to 1.
        draws: of the random order, of which the mean is kept.
        seed: of the draws.
        ablate: makes the edit.

    Returns:
        ``score`` (order, share, …), and ``area`` (order, …), its mean height by the trapezoid rule.

    Raises:
        MetricError: as `ablation`; shares that are fewer than two, do not rise, or are none of 0 to 1.
    """
    rising = np.diff(shares)
    if len(shares) < 2 or (rising <= 0).any() or shares[0] < 0 or shares[-1] > 1:
        raise MetricError(f"shares={list(shares)}: give two or more that rise, from 0 to 1")
    order, _ = _ranked(maps)
    random = np.random.default_rng(seed)
    counts = [round(share * order.shape[1]) for share in shares]

    @cache  # all orders meet where nothing and where everything is ablated
    def score(tokens: bytes) -> xr.DataArray:
        return _under(effect, ablate, np.frombuffer(bytearray(tokens), dtype=bool).reshape(order.shape))

    def curve(ranks: np.ndarray) -> Any:
        return xr.concat([score(_first(ranks, count).tobytes()) for count in counts], "share")

    drawn = xr.concat([curve(random.permuted(order, axis=1)) for _ in range(draws)], "draw").mean("draw")
    found: Any = xr.concat([curve(order), curve(order[:, ::-1]), drawn], "order")
    found = found.assign_coords(order=["deletion", "insertion", "random"], share=list(shares))
    return xr.Dataset({"score": found, "area": found.integrate("share") / (shares[-1] - shares[0])})


def _ranked(maps: xr.DataArray) -> tuple[np.ndarray, dict[Any, int]]:
    """(sample, token): tokens from the highest to the lowest; and the grid."""
    dims = [dim for dim in PLACE if dim in maps.dims]
    if {"sample", "y", "x"} - {*maps.dims} or len(maps.dims) != 1 + len(dims):
        raise MetricError(f"maps have {maps.dims}; give (sample, [frame,] y, x), of one concept: maps.sel(concept=…)")
    maps = maps.transpose("sample", *dims)
    values = maps.values.reshape(len(maps), -1)
    if not np.isfinite(values).all():
        raise MetricError("maps are not finite everywhere, and what is not cannot be ranked")
    return np.argsort(-values, axis=1, kind="stable"), {dim: maps.sizes[dim] for dim in dims}


def _first(order: np.ndarray, count: Any) -> np.ndarray:
    """(sample, token) bool: as many of the first as each sample, or all of them, should have."""
    chosen = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(chosen, order, np.arange(order.shape[1]) < np.reshape(count, (-1, 1)), axis=1)
    return chosen


def _under(effect: Effect, ablate: Ablate, tokens: np.ndarray) -> xr.DataArray:
    return effect(edits=[by_row([ablate(row) for row in tokens])] if tokens.any() else [])
