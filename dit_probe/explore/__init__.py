"""Look instead of reading: a local page on a trace, and a page of it to send to somebody.

`app` is a Dash application (``pip install "dit-probe[explore]"``), `page` one HTML file that
needs nothing but a browser. ``dit-probe explore run.zarr`` and ``dit-probe report run.zarr`` are the two from a shell.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_probe.explore.application import app
    from dit_probe.explore.serving import serve
    from dit_probe.explore.single_file import page
    from dit_probe.explore.source import with_masks

__all__ = ["app", "page", "serve", "with_masks"]

_PLACES = {"app": "application", "page": "single_file", "serve": "serving", "with_masks": "source"}


def __getattr__(name: str) -> Any:
    # Dash is an extra, and the page needs none of it.
    if name not in __all__:
        raise AttributeError(f"module 'dit_probe.explore' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"dit_probe.explore.{_PLACES[name]}"), name)
    return value
