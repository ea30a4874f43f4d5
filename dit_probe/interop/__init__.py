"""The tools that people already use: `interop.nnsight` and `interop.transformer_lens`.

Each is an extra (``pip install "dit-probe[nnsight]"``, ``"dit-probe[transformer-lens]"``) and is imported when it is
first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_probe.interop import nnsight, transformer_lens

__all__ = ["nnsight", "transformer_lens"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dit_probe.interop' has no attribute {name!r}")
    return import_module(f"dit_probe.interop.{name}")
