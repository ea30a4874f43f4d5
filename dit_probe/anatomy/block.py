"""One transformer block as a family file describes it: its text side, and where tokens stand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Rotary = Callable[[Tensor], Tensor]
Modulation = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Grid:
    """Positions of the image tokens: one integer per token and axis, in the order of the image stream."""

    frame: tuple[int, ...]
    y: tuple[int, ...]
    x: tuple[int, ...]

    @classmethod
    def regular(cls, height: int, width: int, frames: int = 1) -> Grid:
        """Row-major grid of ``frames`` x ``height`` x ``width`` tokens."""
        where = [(f, y, x) for f in range(frames) for y in range(height) for x in range(width)]
        return cls(*(tuple(axis) for axis in zip(*where, strict=True)))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Places:
    """Where the image's and the prompt's tokens stand in the joint attention sequence.

    Attributes:
        image, prompt: their slices. Tokens in neither (registers, padding of the model's own) are never recorded.
        total: length of the joint sequence.
    """

    image: slice
    prompt: slice
    total: int

    @classmethod
    def of(cls, image: int, prompt: int, *, text_first: bool, before: int = 0) -> Places:
        """Two contiguous parts, after `before` tokens that are neither.

        Example:
            >>> Places.of(4, 2, text_first=True, before=1).image
            slice(3, 7, None)
        """
        first, second = (prompt, image) if text_first else (image, prompt)
        parts = slice(before, before + first), slice(before + first, before + first + second)
        return cls(*(parts[::-1] if text_first else parts), total=before + first + second)

    @property
    def prompt_tokens(self) -> int:
        """Number of the prompt's tokens."""
        return self.prompt.stop - self.prompt.start

    def in_joint(self, at: slice) -> slice:
        """Some of the prompt's tokens, as positions of the joint sequence."""
        return slice(self.prompt.start + at.start, self.prompt.start + at.stop)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """(image, prompt) parts of a joint sequence (row, token, …)."""
        return joint[:, self.image], joint[:, self.prompt]


@dataclass(frozen=True)
class Block:
    """One transformer block of a model.

    Attributes:
        layer: index among the blocks, joint ones first, counted from 0.
        kind: "joint" (two residual streams) or "single" (one sequence).
        path: module path within the transformer.
        module: the block.
        attention: the module inside it that makes the joint attention call.
        text: how the text stream runs through it.
        text_output: whether the block hands on a text stream; SD3's last one (context_pre_only) does not.
    """

    layer: int
    kind: str
    path: str
    module: Any
    attention: Any
    text: TextSide
    text_output: bool = True

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of one call by name; positional, keyword and gradient-checkpointing calls alike.

        The class's forward is read, because offloading libraries replace the one on the instance.
        """
        return arguments_of(self.module, args, kwargs)


def arguments_of(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a module's call by name, ``self`` left out."""
    bound = _signature(type(module).forward).bind_partial(module, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])


_signature = functools.cache(inspect.signature)


@dataclass(frozen=True)
class TextContext:
    """What the text side of a block needs beside its tokens.

    Attributes:
        block: the block.
        modulation: what `Anatomy.modulation` gives, its rows those of the tokens.
        rotary: turns (row, token, head, head_dim) to the tokens' positions; None when text is not rotated.
    """

    block: Block
    modulation: Modulation
    rotary: Rotary | None


@dataclass(frozen=True)
class Projection:
    """Text tokens as the attention call of a block would see them, each (row, token, head, head_dim).

    `modulation` holds the gates, shifts and scales that `TextSide.update` needs again.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_unrotated: Tensor
    k_unrotated: Tensor
    modulation: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, modulation: Sequence[Tensor] = ()
    ) -> Projection:
        """From q and k before rotation."""
        turn = (lambda x: x) if rotary is None else rotary
        return cls(turn(q), turn(k), v, q, k, tuple(modulation))


class TextSide:
    """The text half of a block, applied to any tokens: the prompt's own, or concepts.

    In a single-stream block it is the block's one set of weights, applied to text tokens alone. Submodules are called
    as modules, never through their weights, so that LoRA, quantised and offloaded layers act on concepts exactly as on
    text.
    """

    def project(self, c: Tensor, context: TextContext) -> Projection:
        """Norm, modulation, projections, qk-norm and rotary embedding: the q, k and v of eqs. (2) and (3)."""
        raise NotImplementedError

    def update(self, c: Tensor, o: Tensor, projection: Projection, context: TextContext) -> Tensor:
        """Output projection, gates and MLP, eqs. (6) and (7): ``c`` after the block.

        Args:
            c: (row, token, width) before the block.
            o: (row, token, head, head_dim), what the attention operation produced.
            projection: what `project` returned for the same tokens.
            context: as in `project`.
        """
        raise NotImplementedError


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs of (row, token, head, head_dim), in float32; cos, sin: (token, head_dim).

    Example:
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> rotate(x, torch.zeros(1, 2), torch.ones(1, 2)).flatten().tolist()
        [0.0, 1.0]
    """
    cos, sin = (part.to(x.device)[None, :, None, :] for part in (cos, sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def interleaved(rotary: tuple[Tensor, Tensor], at: slice) -> Rotary:
    """`rotate` by rows `at` of a (cos, sin) table, each (token, head_dim)."""
    cos, sin = rotary
    return partial(rotate, cos=cos[at], sin=sin[at])
