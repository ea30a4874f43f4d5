"""What the controls of the page mean: views of one run or two."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dit_probe.errors import MapError
from dit_probe.explore.source import Source, View

Chosen = dict[str, Any]
"""Values of the controls by their ids."""

CONTROLS = (
    *("sample", "space", "softmax", "layers", "steps", "layer", "step", "heads", "branch", "concepts", "frame"),
    *("drawing", "compare", "second-sample", "second-space"),
)

Runs = dict[str, tuple[Source, View]]
"""``first`` and, where two are compared, ``second``."""


def runs(chosen: Chosen, first: Source, other: Source | None) -> Runs:
    """The runs on the page and their views, with the whole ranges of layers and steps; see `at`.

    Args:
        chosen: values of the controls.
        first: the first store.
        other: the second store, if there is one.

    Raises:
        MapError: a sample or space that is not there, or ranges in which nothing was recorded.
    """
    found = {"first": (first, _view(chosen, first))}
    if chosen["compare"] == "none":
        return found
    source = other if chosen["compare"] == "second" and other else first
    space = chosen["space"] if chosen["second-space"] == "same" else chosen["second-space"]
    view = _view(chosen | {"sample": chosen["second-sample"], "space": space}, source)
    mine, names = first.names(found["first"][1].sample), source.names(view.sample)
    wanted = {mine[index] for index in found["first"][1].concepts}
    # Those of the same name; other runs may have others altogether, which are shown then.
    concepts = [index for index, name in enumerate(names) if name in wanted] or range(len(names))
    return found | {"second": (source, dataclasses.replace(view, concepts=tuple(concepts)))}


def at(view: View, chosen: Chosen) -> View:
    """The view at the one layer and step that were chosen; the whole of it where none was."""
    one = {f"{name}s": (chosen[name],) for name in ("layer", "step") if chosen[name] is not None}
    return dataclasses.replace(view, **one)


def place(row: int | None, column: int | None, grid: Sequence[int], other: Sequence[int]) -> tuple[int, int] | None:
    """The patch of another grid that covers the middle of this one's; None where none is chosen.

    Args:
        row: in `grid`.
        column: in `grid`.
        grid: frames, rows and columns.
        other: the same of the other grid.

    Example:
        >>> place(3, 0, (1, 4, 4), (1, 16, 16)), place(3, None, (1, 4, 4), (1, 4, 4))
        ((14, 2), None)
    """
    if row is None or column is None or not (0 <= row < grid[1] and 0 <= column < grid[2]):
        return None
    return int((row + 0.5) * other[1] / grid[1]), int((column + 0.5) * other[2] / grid[2])


def _view(chosen: Chosen, source: Source) -> View:
    sample, space, count = chosen["sample"], chosen["space"], source.ds.sizes["sample"]
    if sample is None or not 0 <= sample < count:
        raise MapError(f"no sample {'' if sample is None else sample}: {source.name} has {count}, counted from 0")
    if space not in source.spaces:
        raise MapError(f"{source.name} has no {space} space. Choose one of {', '.join(source.spaces)}")
    labels: dict[str, Any] = {}
    for name, every in zip(("layers", "steps"), source.offered(space), strict=True):
        low, high = sorted(chosen[name])
        labels[name] = tuple(label for label in every if low <= label <= high)
        if not labels[name]:
            found = ", ".join(map(str, every))
            raise MapError(f"{space} was recorded at none of the {name} {low} to {high}; there are {found}")
    return View(
        sample=sample,
        space=space,
        softmax=None if chosen["softmax"] == "none" else chosen["softmax"],
        heads=tuple(sorted(map(int, chosen["heads"]))),
        branch=chosen["branch"] if chosen["branch"] in source.branches else next(iter(source.branches), None),
        concepts=tuple(sorted(index for index in chosen["concepts"] if index < source.ds.sizes["concept"])),
        frame=min(chosen["frame"] or 0, source.grid[0] - 1),
        **labels,
    )
