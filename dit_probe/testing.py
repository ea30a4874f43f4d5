"""Public conformance checks: tiny random models, tiny pipelines made offline, and the oracles of the concept stream.

Three oracles, none of which knows what a family file says about its blocks:

* `clamped`: the model itself, run on the concepts as its prompt while every joint block is given the image stream
  that was recorded before;
* `attention_from_store`: eq. (4) in float64 from stored q, k and v;
* replay (`dit_probe.stream.replay`): the concept code run on the prompt's own tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_probe import rehearsal, stream
from dit_probe.anatomy import Anatomy, families, find, transformer_of
from dit_probe.anatomy.base import TinyModel


def cases(*, concepts: bool = False) -> list[tuple[str, str]]:
    """Every (family, variant) that a family file offers a tiny model for; with `concepts`, if it has a concept stream.

    Example:
        >>> ("flux", "dev") in cases()
        True
    """
    chosen = [(name, anatomy) for name, anatomy in _installed() if not (concepts and anatomy.no_concepts)]
    return [(name, variant) for name, anatomy in chosen for variant in anatomy.variants]


def pipeline_cases() -> list[tuple[str, str]]:
    """Every (family, variant) that a family file offers a tiny pipeline for.

    Example:
        >>> ("sd3", "sd3.5-medium") in pipeline_cases()
        True
    """
    return [(name, variant) for name, anatomy in _installed() for variant in anatomy.pipeline_variants]


def _installed() -> list[tuple[str, Anatomy]]:
    """Families whose models the installed diffusers has, or that bring their own."""
    import diffusers

    return [
        (name, anatomy)
        for name, anatomy in sorted(families().items())
        if not type(anatomy).__module__.startswith("dit_probe.") or any(hasattr(diffusers, c) for c in anatomy.classes)
    ]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights under which every norm, gate and bias matters, and put it in evaluation mode.

    Matrices get a standard deviation of 1.2 / sqrt(fan in); vectors, which initialise to 0 or 1, are perturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.3 * noise)
    return model.eval()


def tiny_model(
    family: str, variant: str | None = None, *, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TinyModel:
    """A small random transformer of a family, with the inputs of one call.

    Args:
        family: a family's name.
        variant: one of its variants; None: the first.
        batch: rows.
        dtype: precision of weights and inputs.
        seed: of weights and inputs.

    Example:
        >>> tiny = tiny_model("sd3", batch=1)
        >>> tuple(tiny.transformer(**tiny.inputs).sample.shape)
        (1, 4, 6, 8)
    """
    anatomy = families()[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = anatomy.tiny(variant or anatomy.variants[0], batch)
    inputs = {name: _cast(value, dtype) for name, value in tiny.inputs.items()}
    # nn.Module.to, since the models' own override only adds a warning about checkpoints.
    model = nn.Module.to(randomise(tiny.transformer, seed), dtype)
    for name, module in model.named_modules():
        if set(name.split(".")) & set(getattr(model, "_keep_in_fp32_modules", None) or ()):  # as from_pretrained does
            module.float()
    return replace(tiny, transformer=model, inputs=inputs, concepts=tiny.concepts.to(dtype))


def tiny_pipeline(family: str, variant: str | None = None, *, seed: int = 0) -> Any:
    """A small random pipeline of a family, made offline: its own tokenizers, text encoders, VAE and transformer.

    Args:
        family: a family's name.
        variant: one of its variants; None: the first.
        seed: of the weights.

    Example:
        >>> type(tiny_pipeline("sd3")).__name__
        'StableDiffusion3Pipeline'
    """
    anatomy = families()[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = anatomy.tiny_pipeline(variant or anatomy.pipeline_variants[0], _Parts())
        randomise(pipe.transformer, seed)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Parts:
    """Tokenizers and encoders of the demo models, untrained, and a VAE."""

    t5_width, clip_width = 64, 32

    @property
    def words(self) -> tuple[str, ...]:
        from dit_probe.demo.text import WORDS

        return WORDS

    def t5(self) -> tuple[Any, Any]:
        from dit_probe.demo.text import t5_encoder, t5_tokenizer

        tokenizer = t5_tokenizer()
        return tokenizer, t5_encoder(len(tokenizer))

    def clip(self, *, projection: bool = False) -> tuple[Any, Any]:
        from transformers import CLIPTextModelWithProjection

        from dit_probe.demo.text import clip_encoder, clip_tokenizer

        tokenizer = clip_tokenizer()
        encoder = clip_encoder(tokenizer)
        return tokenizer, CLIPTextModelWithProjection(encoder.config) if projection else encoder

    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )


def replay_differences(model: Any, call: Callable[[], object]) -> dict[int, dict[str, float]]:
    """Self-replay of every block in every forward: largest relative differences of ``o_p`` and ``p`` by layer.

    Args:
        model: a pipeline or transformer.
        call: runs it.

    Raises:
        ReplayError: a block's replay differs by more than its precision explains.
    """
    anatomy = find(model)
    found: dict[int, dict[str, float]] = {}

    def check(call: stream.BlockCall, output: Any) -> None:
        step = stream.replay(anatomy, call)
        p = anatomy.outputs(call.block, output, call.places)[1]
        worst = found.setdefault(call.block.layer, {})
        for name, value in stream.check_replay(anatomy, call, step, p).items():
            worst[name] = max(value, worst.get(name, 0.0))

    with torch.no_grad(), watched(model, check):
        call()
    return found


def watched(model: Any, see: Callable[[stream.BlockCall, Any], object]) -> contextlib.AbstractContextManager[None]:
    """Call `see` with every block's call and output while inside; see `dit_probe.rehearsal.watched`."""
    return rehearsal.watched(find(model), transformer_of(model), see)


@torch.no_grad()
def clamped(
    model: Any, inputs: Mapping[str, Any], concepts: Tensor, c: Mapping[int, Tensor] | None = None, **changed: Any
) -> dict[int, dict[str, Tensor]]:
    """What the model itself makes of concepts; see `dit_probe.rehearsal.clamped_calls`.

    Returns:
        Layer to ``o_c`` (row, concept, head, head_dim) and, where the block has a text output, ``c``
        (row, concept, width).
    """
    found = rehearsal.clamped_calls(find(model), model, inputs, concepts, c, **changed)
    return {
        layer: {"o_c": call.places.split(call.attention.o)[1]} | ({} if after is None else {"c": after})
        for layer, (call, after) in found.items()
    }


def attention_from_store(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None, scale: float | None = None
) -> np.ndarray:
    """softmax(q k^T scale + bias) v in float64, for arrays (…, token, head, head_dim): eqs. (4) and (5).

    `scale` is 1 / sqrt(d) if not given; `bias`, broadcastable to (…, head, query, key), is a mask's.

    Example:
        >>> one = np.ones((1, 1, 2))
        >>> attention_from_store(one, one, 3 * one).tolist()
        [[[3.0, 3.0]]]
    """
    q, k, v = (np.asarray(part, dtype=np.float64) for part in (q, k, v))
    logits = np.einsum("...qhd,...khd->...hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits += 0 if bias is None else bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("...hqk,...khd->...qhd", weights, v)


def leftovers(pipe: Any) -> list[str]:
    """Hooks and patched attributes on a pipeline and its modules, by name; tracing must leave none of its own."""
    model = getattr(pipe, "transformer", pipe)
    found = [
        f"{name or 'model'}.{kind}"
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        if getattr(module, kind)
    ]
    owners = {"transformer": (model, "cache_context"), "scheduler": (getattr(pipe, "scheduler", None), "step")}
    # Not `owner or …`: a compiled module is asked for its length then, and has none.
    found += [
        f"{name}.{attribute}"
        for name, (owner, attribute) in owners.items()
        if owner is not None and attribute in vars(owner)
    ]
    found += ["pipeline class"] if type(pipe).__name__ in [kind.__name__ for kind in type(pipe).__bases__] else []
    modes = torch.overrides._get_current_function_mode_stack()
    found += [f"mode {type(mode).__name__}" for mode in modes if type(mode).__module__.startswith("dit_probe")]
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    wrapped = [name for name, f in _AttentionBackendRegistry._backends.items() if f.__module__.startswith("dit_probe")]
    return found + [f"attention backend {name}" for name in wrapped]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    # Rotary tables and integer timesteps keep their precision, as pipelines pass them.
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
