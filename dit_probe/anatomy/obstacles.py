"""What others have put into a model that a trace would disturb, or be misled by."""

from __future__ import annotations

from typing import Any

from torch import nn

from dit_probe.anatomy.base import Anatomy
from dit_probe.anatomy.structural import Structural


def obstacle(anatomy: Anatomy, model: nn.Module) -> str | None:
    """Why a model, as it stands now, cannot be traced truthfully; None when nothing is in the way."""
    if not _touched(model):
        return None
    own = {id(part) for block in anatomy.blocks(model) for part in (block.module, block.attention)} | {id(model)}
    for path, module in model.named_modules():
        # Asked of every module: an adapter's are in training mode whatever the model's is.
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            return (
                f"{path} is in training mode with dropout, so tracing would change its random numbers. Call .eval() "
                "on the transformer"
            )
        # The concept stream calls none of these; in a model of no known family, the model itself runs on concepts.
        spared = id(module) in own or hasattr(module, "processor") or path == "proj_out"
        if cached(module) and (isinstance(anatomy, Structural) or not spared):
            return (
                f"{cached(module)[0]} on {path or 'the model'} keeps something from call to call, and tracing calls "
                "this module too, so both would go wrong. Switch the cache off (transformer.disable_cache()), or, in "
                "a known family, let it act on whole blocks or attention modules"
            )
    return None


def _touched(model: nn.Module) -> bool:
    """Whether any module deserves a closer look; asked in every step, where `named_modules` would take milliseconds."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            own = module.__dict__  # a module looks for what it has not got in many places
            if "_diffusers_hook" in own or (own["training"] and isinstance(module, nn.Dropout)):
                return True
            waiting.extend(module._modules.values())
    return False


def cached(module: nn.Module) -> list[str]:
    """Names of diffusers' hooks on a module that keep a state from call to call, and may answer in its place."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [type(hook).__name__ for hook in registry.hooks.values() if hook._is_stateful]
