"""A hook-based microscope for multi-modal diffusion transformers.

>>> import dit_probe as dp
>>> from probes import ConceptAttention
>>> pipe = dp.demo.load("flux-picturebook")
>>> with dp.trace(pipe, ConceptAttention(["sun", "boat", "water"]), progress=False) as run:
...     image = pipe("a sun and a boat on water", num_inference_steps=4, max_sequence_length=32).images[0]
>>> dp.maps.saliency(run.dataset, space="output").dims
('sample', 'concept', 'y', 'x')
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_probe import (
        causal,
        dataset_tracing,
        demo,
        diagnostics,
        edits,
        errors,
        explore,
        figures,
        interop,
        maps,
        methods,
        metrics,
        schema,
        self_attention,
        store,
        summary,
        testing,
    )
    from dit_probe.dataset_tracing import trace_dataset
    from dit_probe.edit import Edit
    from dit_probe.encoding import encode
    from dit_probe.evaluation import evaluate
    from dit_probe.probe import Observation, Probe
    from dit_probe.store import open
    from dit_probe.tracing import trace
    from dit_probe.verification import verify

__version__ = "0.1.0"
__all__ = [
    "Edit",
    "Observation",
    "Probe",
    "causal",
    "dataset_tracing",
    "demo",
    "diagnostics",
    "edits",
    "encode",
    "errors",
    "evaluate",
    "explore",
    "figures",
    "interop",
    "maps",
    "methods",
    "metrics",
    "open",
    "schema",
    "self_attention",
    "store",
    "summary",
    "testing",
    "trace",
    "trace_dataset",
    "verify",
]

_NAMES = {
    "Edit": "edit",
    "Observation": "probe",
    "Probe": "probe",
    "encode": "encoding",
    "evaluate": "evaluation",
    "open": "store",
    "trace": "tracing",
    "trace_dataset": "dataset_tracing",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing dit_probe costs no more than what a session of it needs.
    if name not in __all__:
        raise AttributeError(f"module 'dit_probe' has no attribute {name!r}")
    module = import_module(f"dit_probe.{_NAMES.get(name, name)}")
    value = getattr(module, name) if name in _NAMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
