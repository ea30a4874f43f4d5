"""Following a pipeline: where a call begins and ends, where a step ends, which branch of guidance runs.

Three attributes are replaced on the instances for the time of a trace and put back afterwards: the pipeline's class
(by a subclass whose ``__call__`` tells us), the scheduler's ``step`` and the transformer's ``cache_context``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_probe.errors import TraceError


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, its arguments read, not yet run."""

    run: Callable[[], Any]
    rows: int
    labels: list[str]
    texts: dict[str, list[str | None]]
    seeds: list[int]
    max_sequence_length: int | None


@dataclass
class Generation:
    """One pipeline call, one `encode`, or the forwards of a bare transformer: samples that run side by side.

    Attributes:
        rows: samples.
        texts: branch to one prompt per row, None where it is not known as text.
        labels: one prompt per row, as the store shows it.
        seeds: one per row, -1 where unknown.
        timesteps, sigmas: one per step, as the scheduler gives them.
        step: the step that runs now.
        embeddings: concept embeddings (row or 1, concept, text width).
        pooled: pooled vectors (concept, width).
        slots: samples of the store, one per row.
        pads: branch to (row, prompt_token) bool, True on padding.
        ran: the (step, branch) that the transformer was called for.
    """

    rows: int
    texts: Mapping[str, Sequence[str | None]]
    labels: Sequence[str]
    seeds: Sequence[int] = ()
    timesteps: Sequence[float] = ()
    sigmas: Sequence[float] = ()
    step: int = 0
    embeddings: Tensor | None = None
    pooled: Tensor | None = None
    slots: tuple[int, ...] = ()
    pads: dict[str, Tensor] = field(default_factory=dict)
    ran: set[tuple[int, str]] = field(default_factory=set)


@contextlib.contextmanager
def followed(pipe: Any, called: Callable[[Call], Any], stepped: Callable[[], None]) -> Iterator[None]:
    """Report calls and steps of a pipeline while inside.

    Args:
        pipe: a diffusers pipeline.
        called: replaces the call; runs it and returns its result.
        stepped: called after every scheduler step.
    """
    kind, scheduler = type(pipe), pipe.scheduler
    depth = 0

    class Followed(kind):
        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            run = functools.partial(kind.__call__, self, *args, **kwargs)
            if depth:
                return run()
            depth += 1
            try:
                bound = inspect.signature(kind.__call__).bind_partial(self, *args, **kwargs)
                return called(_read(run, bound.arguments))
            finally:
                depth -= 1

    Followed.__name__, Followed.__qualname__, Followed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    step = scheduler.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        stepped()
        return result

    with _replaced(scheduler, "step", counted):
        pipe.__class__ = Followed
        try:
            yield
        finally:
            pipe.__class__ = kind


@contextlib.contextmanager
def context_names(transformer: Any, names: list[str]) -> Iterator[None]:
    """Keep in `names` the name of the innermost ``cache_context`` ("cond", "uncond" …) while inside.

    Pipelines with a guider of diffusers' say "pred_cond" and "pred_uncond".
    """
    original = getattr(transformer, "cache_context", None)
    if original is None:
        yield
        return

    @contextlib.contextmanager
    def named(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        names.append(name.removeprefix("pred_"))
        try:
            with original(name, *args, **kwargs) as value:
                yield value
        finally:
            names.pop()

    with _replaced(transformer, "cache_context", named):
        yield


def schedule(pipe: Any) -> tuple[list[float], list[float]]:
    """Timesteps and noise levels of the call that runs, one per step."""
    scheduler = pipe.scheduler
    timesteps = scheduler.timesteps.float().tolist()
    count = getattr(pipe, "_num_timesteps", None) or len(timesteps)
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.as_tensor(scheduler.sigmas).float().tolist()[: len(timesteps)]
    else:
        kept = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
        sigmas = (1 - kept).sqrt().tolist()
    # Image-to-image calls skip the first part of the schedule.
    return timesteps[-count:], sigmas[-count:]


def pictures(result: Any) -> list[np.ndarray] | None:
    """The images (y, x, channel) or videos (frame, y, x, channel) that a call returned, uint8; None for latents."""
    output = result[0] if isinstance(result, tuple) else getattr(result, "images", getattr(result, "frames", None))
    if isinstance(output, torch.Tensor) or output is None:
        return None
    return [_uint8(picture) for picture in output]


def _uint8(picture: Any) -> np.ndarray:
    if isinstance(picture, list):
        return np.stack([_uint8(frame) for frame in picture])
    array = np.asarray(picture)
    return array if array.dtype == np.uint8 else (array.clip(0, 1) * 255).round().astype(np.uint8)


def _read(run: Callable[[], Any], arguments: Mapping[str, Any]) -> Call:
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    labels = [prompt] if isinstance(prompt, str) else list(prompt or [""] * (1 if embeds is None else len(embeds)))
    texts: dict[str, list[str | None]] = {}
    for branch, prefix in (("cond", ""), ("uncond", "negative_")):
        text = arguments.get(f"{prefix}prompt")
        text = [text or ""] * len(labels) if text is None or isinstance(text, str) else list(text)
        # Embeddings, or a text of its own for another encoder: nobody can say what the prompt stream's tokens are.
        others = [arguments.get(f"{prefix}{name}") for name in ("prompt_embeds", "prompt_2", "prompt_3")]
        # Ideogram's call may have the prompt rewritten by a language model before it is encoded.
        rewritten = arguments.get("prompt_upsampling")
        texts[branch] = list(text) if all(other is None for other in others) and not rewritten else [None] * len(labels)
    if (arguments.get("num_videos_per_prompt") or 1) > 1:
        # Some pipelines ignore it, and two videos of one prompt would look like the halves of guidance.
        raise TraceError("num_videos_per_prompt cannot be traced; give a list that has the prompt as often")
    copies = arguments.get("num_images_per_prompt") or 1
    rows = len(labels) * copies
    generators = arguments.get("generator")
    generators = list(generators) if isinstance(generators, Sequence) else [generators] * rows
    return Call(
        run,
        rows,
        [label for label in labels for _ in range(copies)],
        {branch: [text for text in found for _ in range(copies)] for branch, found in texts.items()},
        [-1 if generator is None else generator.initial_seed() for generator in generators],
        arguments.get("max_sequence_length"),
    )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    # Read from the instance alone: an attribute that another library put there must come back, not vanish.
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


_ABSENT = object()
