"""Small trained models that ship with the package: stock pipelines to learn on, develop against and test with.

Each is an ordinary pipeline directory: `FluxPipeline.from_pretrained(dit_probe.demo.path("flux-picturebook"))` loads it
without any code of ours. How each was made is in its `README.md`; `python -m dit_probe.demo.train NAME` makes it again.
"""

from pathlib import Path
from typing import Any

from dit_probe.errors import DitProbeError

SAMPLE_SIZE = 64
"""Pixels a side of the pictures that the demo models of images were trained on."""

PROMPT, CONCEPTS = "a sun and a boat on water", ("sun", "boat", "water")
"""What the demo shows where nothing else is said."""
_SHOWN = {"cogvideox-picturebook": ("a boat moving right on water", ("boat", "water"))}


class DemoError(DitProbeError):
    """There is no demo model of that name."""


def names() -> list[str]:
    """List the demo models in this installation.

    Example:
        >>> "flux-picturebook" in names()
        True
    """
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/model_index.json"))


def path(name: str) -> Path:
    """Say where a demo model's pipeline directory is.

    Raises:
        DemoError: When there is no such model.

    Example:
        >>> (path("flux-picturebook") / "model_index.json").exists()
        True
    """
    if name not in names():
        raise DemoError(f"no demo model {name!r}: this installation has {', '.join(names()) or 'none'}")
    return Path(__file__).parent / name


def example(name: str) -> tuple[str, tuple[str, ...]]:
    """Give a prompt that shows what a model can do, and the concepts to look for.

    Example:
        >>> example("flux-picturebook")
        ('a sun and a boat on water', ('sun', 'boat', 'water'))
    """
    return _SHOWN.get(name, (PROMPT, CONCEPTS))


def load(name: str = "flux-picturebook", **from_pretrained: Any) -> Any:
    """Load a demo model as an ordinary pipeline.

    A stock `FluxPipeline` asked for no height and width draws 128 x 128 latents, sixteen times the area that
    flux-picturebook knows; here it draws 64 x 64 pixels. Nothing else is set on any of them.

    Args:
        name: One of `names()`.
        **from_pretrained: Passed on to `DiffusionPipeline.from_pretrained`, for example `torch_dtype`.

    Raises:
        DemoError: When there is no such model.

    Example:
        >>> pipe = load()
        >>> type(pipe).__name__, type(pipe.transformer).__name__
        ('FluxPipeline', 'FluxTransformer2DModel')
    """
    directory = path(name)
    from diffusers import DiffusionPipeline, FluxPipeline  # takes seconds: only those who load a model pay for it

    pipe = DiffusionPipeline.from_pretrained(directory, **from_pretrained)
    if isinstance(pipe, FluxPipeline):
        pipe.default_sample_size = SAMPLE_SIZE // pipe.vae_scale_factor
    return pipe
