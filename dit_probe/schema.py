"""Names of the dims, coordinates, variables and attributes of a trace.

An activation's name is a letter and a stream: ``q k v o`` are per head, ``x p c`` alone are residual streams.

| stream | token dim |
|---|---|
| ``x`` image | ``image_token`` |
| ``p`` prompt | ``prompt_token`` |
| ``c`` concept | ``concept`` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_probe.errors import SiteError

FORMAT = "dit-probe"
FORMAT_VERSION = 1
TOKEN_DIM = {"x": "image_token", "p": "prompt_token", "c": "concept"}
SPACES = ("output", "value", "cross")
BRANCHES = ("cond", "uncond")
DTYPES = ("float32", "float16", "bfloat16", "float64", "uint8")

VECTORS = tuple(f"{letter}_{stream}" for letter in "qkvo" for stream in TOKEN_DIM)
UNROTATED = tuple(f"{letter}_{stream}_unrotated" for letter in "qk" for stream in TOKEN_DIM)
RESIDUALS = tuple(TOKEN_DIM)
ACTIVATIONS = VECTORS + UNROTATED + RESIDUALS

_NAME = re.compile(r"(?:[qkvo]_)?([xpc])(?:_unrotated)?")

SCORES: dict[str, tuple[str, ...]] = {
    "output": ("score_output",),
    "value": ("score_value",),
    "cross": ("score_cross", "score_cross_concept_to_image"),
}
"""Variables that a space reduced in flight is kept in; ``score_cross`` is image_to_concept."""

SCORE_SOURCES: dict[str, tuple[str, str]] = {
    "score_output": ("o_x", "o_c"),
    "score_value": ("v_x", "v_c"),
    "score_cross": ("q_x", "k_c"),
    "score_cross_concept_to_image": ("k_x", "q_c"),
}
"""The image and the concept activation whose dot product each score is."""


def stream(name: str) -> str:
    """The stream letter (``x``, ``p`` or ``c``) of an activation name.

    Raises:
        SiteError: the name is none of `ACTIVATIONS`.

    Example:
        >>> stream("o_x"), stream("q_c_unrotated"), stream("p")
        ('x', 'c', 'p')
    """
    if name not in ACTIVATIONS:
        raise SiteError(f"no activation is called {name!r}; those that exist: {', '.join(ACTIVATIONS)}")
    match = _NAME.fullmatch(name)
    assert match is not None
    return match.group(1)


def token_dims(name: str) -> tuple[str, ...]:
    """Dims of one activation at one (sample, step, layer).

    Example:
        >>> token_dims("o_x"), token_dims("c")
        (('image_token', 'head', 'head_dim'), ('concept', 'width'))
    """
    token = TOKEN_DIM[stream(name)]
    return (token, "width") if name in RESIDUALS else (token, "head", "head_dim")


@dataclass(frozen=True)
class Variable:
    """One array of a trace.

    Attributes:
        name: variable name.
        dims: dims after the leading ones: ``(sample, [branch,] step, layer, *dims)`` when `layers` is given,
            ``(sample, *dims)`` when it is not.
        dtype: one of `DTYPES`; the precision of the model, kept without loss.
        layers: layer labels at which the variable is written; the others stay NaN. ``None``: it has no layers.
        steps: step labels at which it is written.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """Everything about a trace that is the same for all of its samples.

    Attributes:
        variables: the arrays.
        sizes: length of every dim but ``sample``.
        coords: name to (dims, values), none of them over ``sample``; ``step`` and ``layer`` hold labels.
        attrs: JSON-able identity of the run (model, family, probe, dtype, grid, versions …).
    """

    variables: tuple[Variable, ...]
    sizes: Mapping[str, int]
    coords: Mapping[str, tuple[tuple[str, ...], np.ndarray]]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def dims(self, variable: Variable) -> tuple[str, ...]:
        """All dims of a variable, leading ones included."""
        if variable.layers is None:
            return ("sample", *variable.dims)
        branch = ("branch",) if "branch" in self.sizes else ()
        return ("sample", *branch, "step", "layer", *variable.dims)

    def shape(self, variable: Variable, samples: int) -> tuple[int, ...]:
        """Lengths of `dims`."""
        return tuple(samples if dim == "sample" else self.sizes[dim] for dim in self.dims(variable))


@dataclass(frozen=True)
class Sample:
    """What is known of one sample when its recording starts.

    Attributes:
        prompt: the prompt, "" when the caller passed embeddings only.
        seed: the generator's seed, -1 when unknown.
        tokens: one string per prompt token, "" where unknown.
        concepts: one name per concept.
    """

    prompt: str = ""
    seed: int = -1
    tokens: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def human(nbytes: float) -> str:
    """A number of bytes as text.

    Example:
        >>> human(3 * 2**20), human(7)
        ('3.0 MiB', '7 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
