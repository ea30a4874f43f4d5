"""What two runs must share to be in one store, and how they differ."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import zarr

from dit_probe.errors import StoreError
from dit_probe.schema import Layout, Variable

Facts = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as it comes back from JSON.

    Raises:
        StoreError: it cannot be JSON.

    Example:
        >>> plain({"layers": (1, np.int64(2))})
        {'layers': [1, 2]}
    """

    def convert(item: Any) -> Any:
        if isinstance(item, np.ndarray | np.generic):
            return item.tolist()
        raise StoreError(
            f"attribute {item!r} ({type(item).__name__}) cannot be stored as JSON; give numbers, str, lists"
        )

    return json.loads(json.dumps(value, default=convert))


def variable_attrs(layout: Layout, variable: Variable) -> Facts:
    """Attributes of a variable's array: its precision, and the layers and steps at which it is planned."""
    attrs: Facts = {"dtype": variable.dtype}
    if variable.layers is not None:
        every = layout.coords["step"][1] if "step" in layout.coords else range(layout.sizes["step"])
        attrs |= {"layers": list(variable.layers), "steps": list(every if variable.steps is None else variable.steps)}
    return plain(attrs)


def of_layout(layout: Layout) -> Facts:
    """Facts of a layout, flat."""
    facts = _flat("identity", plain(layout.attrs.get("identity", {})))
    for variable in layout.variables:
        if variable.layers is not None:
            lengths = dict(zip(layout.dims(variable)[1:], layout.shape(variable, 0)[1:], strict=True))
            facts |= _flat(f"variable {variable.name}", {"lengths": lengths, **variable_attrs(layout, variable)})
    return facts | {name: values.tolist() for name, (_, values) in layout.coords.items()}


def of_group(group: zarr.Group) -> Facts:
    """Facts of a store, flat; the counterpart of `of_layout`."""
    facts = _flat("identity", dict(group.attrs).get("identity", {}))
    for name, array in group.arrays():
        metadata: Any = array.metadata
        dims = metadata.dimension_names or ()
        if "layers" in array.attrs:
            lengths = dict(zip(dims[1:], array.shape[1:], strict=True))
            facts |= _flat(f"variable {name}", {"lengths": lengths, **dict(array.attrs)})
        elif "sample" not in dims:
            facts[name] = np.asarray(array[...]).tolist()
    return facts


def differences(new: Facts, old: Facts, *, other: str = "the store") -> list[str]:
    """One line for every fact that differs.

    Example:
        >>> differences({"identity.dtype": "float32"}, {"identity.dtype": "bfloat16"})
        ["identity.dtype: this run has 'float32', the store has 'bfloat16'"]
    """
    return [
        f"{key}: this run has {_short(new, key)}, {other} has {_short(old, key)}"
        for key in sorted({*new, *old})
        if key not in new or key not in old or not _same(new[key], old[key])
    ]


def _short(facts: Facts, key: str) -> str:
    text = repr(facts[key]) if key in facts else "none"
    return text if len(text) <= 200 else f"{text[:120]} … {text[-60:]}"


def _flat(prefix: str, value: Any) -> Facts:
    if isinstance(value, dict) and value:
        return {name: leaf for key, item in value.items() for name, leaf in _flat(f"{prefix}.{key}", item).items()}
    return {prefix: value}


def _same(new: Any, old: Any) -> bool:
    if new == old:
        return True
    try:
        one, other = np.asarray(new, float), np.asarray(old, float)
    except (ValueError, TypeError):
        return False
    # Timesteps computed on another device may differ in the last bits; a NaN is a timestep that nobody knows yet.
    unknown = np.isnan(one) | np.isnan(other) if one.shape == other.shape else False
    return one.shape == other.shape and bool((unknown | np.isclose(one, other, rtol=1e-5, atol=0)).all())
