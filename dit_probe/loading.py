"""A pipeline from what a person types: a directory, a hub id, or the name of a demo model."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from dit_probe import demo
from dit_probe.errors import ModelError


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None, offload: bool = False) -> Any:
    """Load a diffusers pipeline, ready to run.

    Args:
        model: a saved pipeline directory, a hub id, or one of `demo.names`.
        device: torch device; None: the accelerator if there is one.
        dtype: name of a torch dtype; None: bfloat16 on an accelerator, float32 without. Demo models keep their own.
        offload: keep submodels on the CPU until they are called (needs accelerate).

    Raises:
        ModelError: no such model, dtype or device.
    """
    _hush()
    if model in demo.names():
        return demo.load(model).to(device or "cpu")
    from diffusers import DiffusionPipeline

    place = device or _accelerator()
    precision = getattr(torch, dtype or ("float32" if place == "cpu" else "bfloat16"), None)
    if not isinstance(precision, torch.dtype):
        raise ModelError(f"{dtype!r} is no torch dtype; use float32, bfloat16 or float16")
    try:
        with warnings.catch_warnings():
            # diffusers 0.39 knows `torch_dtype` only, later versions say that it will go.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            # A pickle, which other weight files are, runs what is in it.
            pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=precision, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{model!r} could not be loaded: {reason}\n"
            f"Give a saved pipeline directory, a hub id, or a demo model ({', '.join(demo.names())})"
        ) from None
    if not offload:
        return pipe.to(place)
    try:
        pipe.enable_model_cpu_offload()
    except ImportError:
        raise ModelError("offloading needs accelerate: pip install 'dit-probe[offload]'") from None
    return pipe


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    if found is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return found.type


def _hush() -> None:
    """Keep loading bars and advice of the libraries out of the output of a command."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
