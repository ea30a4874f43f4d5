"""Records: one on its way to the store, and the account of one sample: which are planned, queued and written."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dit_probe.errors import StoreError, StoreFault
from dit_probe.schema import BRANCHES, Layout, Variable
from dit_probe.store import chunks
from dit_probe.store.encoding import finite

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


class Record:
    """One chunk on its way to the store."""

    def __init__(self, variable: Variable, array: Any, layout: Layout, where: str) -> None:
        self._variable, self._array = variable, array
        self._name = f"{variable.name!r} at {where}"
        self._shape = tuple(layout.sizes[dim] for dim in variable.dims)
        self.nbytes = math.prod(self._shape) * array.dtype.itemsize

    def check(self, values: Any) -> None:
        """Raise unless these are its values."""
        dtype, shape = getattr(values, "dtype", type(values).__name__), getattr(values, "shape", None)
        if not isinstance(values, np.ndarray) or (dtype, shape) != (self._array.dtype, self._shape):
            bits = " (the bits of bfloat16)" if self._variable.dtype == "bfloat16" else ""
            raise StoreError(
                f"{self._name} is {dtype} {shape}; the layout wants {self._array.dtype}{bits} {self._shape}, "
                f"({', '.join(self._variable.dims)})"
            )

    def store(self, values: np.ndarray | Callable[[], np.ndarray], index: tuple[int, ...]) -> int:
        """Write the chunk; its number of bytes."""
        try:
            data = values() if callable(values) else values
            self.check(data)
            if not finite(data, self._variable.dtype):
                raise StoreError(
                    f"non-finite value in {self._name} (overflow in {self._variable.dtype}?). Activations are kept "
                    f"without loss or not at all: run the model in float32 or bfloat16, or leave this record out."
                )
            chunks.write(self._array, index, data, own=callable(values))
        except StoreError:
            raise
        except Exception as error:
            raise unwritten(self._name, error) from error
        return data.nbytes


def unwritten(what: str, error: Exception) -> StoreFault:
    """What to raise where the store, and nobody else, is at fault; its cause is the store's own error."""
    full = " Make space and run it again: it continues." if getattr(error, "errno", None) == errno.ENOSPC else ""
    return StoreFault(f"{what} was not written: {type(error).__name__}: {error}.{full}")
