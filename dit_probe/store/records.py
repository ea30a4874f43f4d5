"""The account of one sample: which records are planned, queued and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dit_probe.errors import StoreError
from dit_probe.schema import BRANCHES, Layout, Variable

LEADING = ("branch", "step", "layer")
ABSENT, PLANNED, QUEUED, WRITTEN = range(4)


def where(sample: object = None, step: object = None, layer: object = None, branch: object = None) -> str:
    """Where a record is, in words.

    Example:
        >>> where(0, step=2, layer=3)
        'sample 0, step 2, layer 3'
    """
    labels = {"sample": sample, "branch": branch, "step": step, "layer": layer}
    return ", ".join(f"{dim} {label}" for dim, label in labels.items() if label is not None)


def positions(layout: Layout) -> dict[str, dict[Any, int]]:
    """Label to position, for each of the leading dims that the layout has."""
    found: dict[str, dict[Any, int]] = {}
    for dim in LEADING:
        if dim in layout.sizes:
            default = BRANCHES if dim == "branch" else range(layout.sizes[dim])
            values = layout.coords[dim][1].tolist() if dim in layout.coords else default
            found[dim] = {value: index for index, value in enumerate(values)}
    return found


class Account:
    """States of every record of one sample.

    Args:
        sample: slot.
        layout: what is planned.

    Example:
        >>> variable = Variable("o_c", ("concept",), "float32", layers=(5,))
        >>> coords = {"layer": (("layer",), np.array([5, 9]))}
        >>> layout = Layout((variable,), {"step": 1, "layer": 2, "concept": 2}, coords)
        >>> account = Account(0, layout)
        >>> account.index(variable, step=0, layer=5)
        (0, 0)
        >>> list(account.missing())
        ["'o_c' at sample 0, step 0, layer 5"]
    """

    def __init__(self, sample: int, layout: Layout) -> None:
        self.sample = sample
        self._states: dict[str, np.ndarray] = {}
        self._layout = layout
        self._positions = positions(layout)
        for variable in layout.variables:
            if variable.layers is None:
                continue
            steps = self._positions["step"] if variable.steps is None else variable.steps
            wanted = np.outer(
                [step in steps for step in self._positions["step"]],
                [layer in variable.layers for layer in self._positions["layer"]],
            )
            states = np.zeros([len(labels) for labels in self._positions.values()], np.int8)
            states[...] = np.where(wanted, PLANNED, ABSENT)
            self._states[variable.name] = states

    def index(self, variable: Variable, **labels: Any) -> tuple[int, ...]:
        """Position of a planned record below its sample.

        Raises:
            StoreError: a label is missing, unknown or too many; the record is not planned or was written before.
        """
        at = f"{variable.name!r} at {where(self.sample, **labels)}"
        dims = self._layout.dims(variable)
        index: list[int] = []
        for dim in LEADING:
            label = labels.get(dim)
            if (label is None) == (dim in dims):
                has = "needs a" if dim in dims else "has no"
                raise StoreError(f"{at}: the variable {has} {dim}; its dims are ({', '.join(dims)})")
            if label is not None:
                if label not in self._positions[dim]:
                    known = ", ".join(map(str, self._positions[dim]))
                    raise StoreError(f"{at}: no {dim} is labelled {label!r}; this store has {known}")
                index.append(self._positions[dim][label])
        if variable.name in self._states:
            state = self._states[variable.name][tuple(index)]
            if state == ABSENT:
                steps = "all" if variable.steps is None else list(variable.steps)
                raise StoreError(
                    f"{at} is not planned; planned are layers {list(variable.layers or ())}, steps {steps}"
                )
            if state != PLANNED:
                raise StoreError(f"{at} was written already; every record is written once")
        return tuple(index)

    def mark(self, variable: Variable, index: tuple[int, ...], state: int) -> None:
        """Note the state of a record; variables without layers have no account."""
        if variable.name in self._states:
            self._states[variable.name][index] = state

    def missing(self) -> Iterator[str]:
        """Planned records that are not in the store, in words."""
        labels = {dim: list(known) for dim, known in self._positions.items()}
        for name, states in self._states.items():
            for index in np.argwhere((states == PLANNED) | (states == QUEUED)):
                at: Mapping[str, Any] = {dim: labels[dim][i] for dim, i in zip(labels, index, strict=True)}
                yield f"{name!r} at {where(self.sample, **at)}"
