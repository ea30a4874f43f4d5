"""The only place that knows model families. A new family is one new file here."""

from __future__ import annotations

import importlib
import pkgutil
import weakref
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn

from dit_probe.anatomy import structural
from dit_probe.anatomy.base import Anatomy
from dit_probe.anatomy.block import Block, Grid, Places, Projection, TextContext, TextSide
from dit_probe.anatomy.obstacles import obstacle
from dit_probe.anatomy.refused import refusal
from dit_probe.errors import ModelError

Settled = TypeVar("Settled", bound=Anatomy)
__all__ = [
    "Anatomy",
    "Block",
    "Grid",
    "Places",
    "Projection",
    "TextContext",
    "TextSide",
    "families",
    "find",
    "transformer_of",
]


def families() -> dict[str, Anatomy]:
    """Every family that can be traced, by name: those of this folder, and every other subclass of `Anatomy`.

    A package of yours names its module under the entry point ``dit_probe.anatomies``; in a script, importing the file
    is enough.

    Example:
        >>> {"cogvideox", "flux", "sd3"} <= families().keys()
        True
    """
    _import_all()
    named = [kind for kind in _subclasses(Anatomy) if isinstance(vars(kind).get("family"), str)]
    return {kind.family: kind() for kind in named}


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for point in entry_points(group="dit_probe.anatomies"):
        point.load()


def _subclasses(kind: type[Anatomy]) -> Iterator[type[Anatomy]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def transformer_of(model: Any) -> nn.Module:
    """The transformer of a pipeline, or the transformer that was given.

    Raises:
        ModelError: it is neither, or it is wrapped: compiled before tracing, or in a model of peft's.
    """
    transformer = getattr(model, "transformer", model)
    if hasattr(transformer, "_orig_mod"):
        raise ModelError(
            f"{type(transformer._orig_mod).__name__} was compiled with torch.compile: hooks placed after compiling "
            "never fire, and nothing would be recorded. Trace the model underneath "
            "(pipe.transformer = pipe.transformer._orig_mod) and compile it inside the trace"
        )
    if hasattr(transformer, "get_base_model"):
        raise ModelError(
            f"{type(transformer).__name__} is a wrapper of peft's around the transformer. Trace what it wraps, the "
            "adapter is inside (pipe.transformer = pipe.transformer.get_base_model())"
        )
    if not isinstance(transformer, nn.Module):
        raise ModelError(
            f"{type(model).__name__} is neither a diffusers pipeline with a `transformer` nor a transformer module. "
            "Pass the pipeline (FluxPipeline.from_pretrained(...)) or its .transformer"
        )
    return transformer


def find(model: Any) -> Anatomy:
    """The anatomy of a pipeline's or transformer's family.

    Raises:
        ModelError: the family is unknown, or this very model cannot be traced truthfully.
    """
    transformer = transformer_of(model)
    names = {kind.__name__ for kind in type(transformer).__mro__}
    anatomy = next((anatomy for anatomy in families().values() if names & set(anatomy.classes)), None)
    if anatomy is None and (reason := refusal(names)) is not None:
        raise ModelError(f"{type(transformer).__name__} cannot be traced: {reason}")
    anatomy = anatomy or _SETTLED.get(transformer) or structural.guess(transformer)
    if anatomy is None:
        known = ", ".join(f"{name} ({', '.join(a.classes)})" for name, a in sorted(families().items()))
        raise ModelError(
            f"no anatomy for {type(transformer).__name__}, and none to guess: no list of blocks in it takes both "
            f"hidden_states and encoder_hidden_states. Families known: {known}. "
            "Add one: a subclass of Anatomy in a file of yours (see CONTRIBUTING.md)"
        )
    reason = anatomy.refuse(transformer) or _compiled(anatomy, transformer) or obstacle(anatomy, transformer)
    if reason is not None:
        raise ModelError(f"{type(transformer).__name__} cannot be traced: {reason}.")
    return anatomy


_SETTLED: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, anatomy: Settled) -> Settled:
    """Let `find` give this anatomy for this very model from now on."""
    _SETTLED[model] = anatomy
    return anatomy


def _compiled(anatomy: Anatomy, model: nn.Module) -> str | None:
    if model._compiled_call_impl is not None:
        found = "it was compiled (transformer.compile())"
    elif any(block.module._compiled_call_impl is not None for block in anatomy.blocks(model)):
        found = "its blocks were compiled (compile_repeated_blocks or block.compile())"
    else:
        return None
    return f"{found}: hooks placed afterwards never fire. Open the trace first and compile inside it"
