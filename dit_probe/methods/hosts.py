"""Other people's methods by the model that they run on, found by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, get_type_hints

from dit_probe.methods.baseline import Baseline

GROUP = "dit_probe.baselines"


@dataclass(frozen=True)
class Host:
    """A kind of model, and the rows of the tables that it gives.

    A package adds rows by an entry point in the group ``dit_probe.baselines`` whose value is one of these.

    Attributes:
        architecture: what the paper's tables call the model: "CLIP ViT".
        load: a path or hub id in, with ``revision``, ``device`` and ``dtype``, and what the methods take out; None: the
            pipeline itself that is studied.
        methods: a method's name in the tables to its class, or to a `functools.partial` of it with settings.

    Example:
        >>> found = hosts()
        >>> found["clip"].architecture, "GradCAM" in found["clip"].methods
        ('CLIP ViT', True)
    """

    architecture: str
    load: Callable[..., Any] | None
    methods: Mapping[str, Callable[..., Baseline]]

    def rows(self, model: Any, **settings: Any) -> dict[str, Baseline]:
        """A row for every method, on a loaded model."""
        return {name: method(model, **settings) for name, method in self.methods.items()}

    def kinds(self) -> dict[str, Any]:
        """The class of every method, which says its passes without a model."""
        made = {name: m.func if isinstance(m, partial) else m for name, m in self.methods.items()}
        return {name: m if isinstance(m, type) else get_type_hints(m)["return"] for name, m in made.items()}


def hosts() -> Mapping[str, Host]:
    """Hosts by name, alphabetically."""
    found = {point.name: point.load() for point in entry_points(group=GROUP)}
    return MappingProxyType(found)
