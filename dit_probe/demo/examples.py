"""What the transformers are trained on: latents of scenes or clips, and several captions of each."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

from dit_probe.datasets.clips import clip, describe_clip
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, describe, scene
from dit_probe.demo import autoencoder, video_autoencoder

CAPTIONS_A_SCENE = 4
# a background word alone must mean something to the text encoder: one scene in 25 shows nothing else
EMPTY_EVERY = 25
TRAINING_FAMILY = 0
"""Seeds of the training scenes are those of `scenes(seed=0)`; held-out scenes use any other family."""

HELD_OUT: frozenset[frozenset[str]] = frozenset(
    frozenset(pair.split())
    for pair in ("boat brick", "fish sky", "tree night", "car water", "sun car", "boat mushroom", "fish house")
)
"""Words that no training sample has together: nouns with backgrounds and nouns with nouns, in any relation."""

Latents = dict[str, torch.Tensor]
"""Resolution ("fine", "coarse") to normalised float16 latents, one a sample."""


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    Attributes:
        draw: Number of seeds to pixels, uint8, and the captions of each sample.
        train: Pixels, steps, seed and device to a trained autoencoder.
        encode: Autoencoder, pixels and device to latents, not yet normalised.
        vae: The autoencoder's class.
        prompts: Drawn while the training runs.
        shifted: Whether the family's pipeline takes a mean from its latents.
    """

    draw: Callable[[int], tuple[np.ndarray, list[list[str]]]]
    train: Callable[[np.ndarray, int, int, str], Any]
    encode: Callable[[Any, np.ndarray, str], Latents]
    vae: type[Any]
    prompts: tuple[str, ...]
    shifted: bool = True


@dataclass(frozen=True)
class Examples:
    """Training examples.

    Attributes:
        latents: At every resolution.
        captions: `CAPTIONS_A_SCENE` for every sample.
    """

    latents: Latents
    captions: list[list[str]]


def by_length(captions: list[list[str]], tokenizer: Any) -> dict[int, torch.Tensor]:
    """Sort captions by their number of tokens: batches of one length need no pads.

    Args:
        captions: Of every sample.
        tokenizer: What counts.

    Returns:
        Length to (caption, 2) pairs of sample and number of its caption; lengths that are rare are left out.

    Example:
        >>> from dit_probe.demo.text import t5_tokenizer
        >>> by_length([["sun", "a sun"], ["a car", "car"]], t5_tokenizer())[3].tolist()
        [[0, 1], [1, 0]]
    """
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for sample, several in enumerate(captions):
        for which, ids in enumerate(tokenizer(several).input_ids):
            found[len(ids)].append((sample, which))
    total = sum(len(pairs) for pairs in found.values())
    return {length: torch.tensor(found[length]) for length in sorted(found) if len(found[length]) > 0.005 * total}


def by_count(captions: list[list[str]]) -> dict[int, list[tuple[int, str]]]:
    """Sort samples by how many nouns and backgrounds their captions name, for prompts of words that stand alone.

    Args:
        captions: Of every sample.

    Returns:
        Count to pairs of sample and its words, "boat, sun, water".

    Example:
        >>> by_count([["a sun", "sun, water"], ["a car"]])
        {2: [(0, 'sun, water')], 1: [(1, 'car')]}
    """
    known, found = {*NOUNS, *BACKGROUNDS}, defaultdict[int, list[tuple[int, str]]](list)
    for sample, several in enumerate(captions):
        words = dict.fromkeys(word for caption in several for word in re.findall(r"\w+", caption) if word in known)
        if words:
            found[len(words)].append((sample, ", ".join(words)))
    return dict(found)


def held_out(words: Sequence[str]) -> bool:
    """Whether a scene or clip has two words of `HELD_OUT`.

    Example:
        >>> held_out(["boat", "sun", "brick"]), held_out(["boat", "sun", "water"])
        (True, False)
    """
    return any(pair <= set(words) for pair in HELD_OUT)


def draw_scenes(count: int) -> tuple[np.ndarray, list[list[str]]]:
    """Draw the training scenes, (sample, y, x, 3) uint8, and the captions of each; `count` seeds give fewer."""
    images, captions = [], []
    for index in range(count):
        picture = scene(TRAINING_FAMILY + index, objects=0 if index % EMPTY_EVERY == 0 else None)
        if not held_out(picture.words):
            images.append(picture.image)
            captions.append([describe(picture, k) for k in range(CAPTIONS_A_SCENE)])
    return np.stack(images), captions


def draw_clips(count: int) -> tuple[np.ndarray, list[list[str]]]:
    """Draw the training clips, (sample, frame, y, x, 3) uint8, and the captions of each; `count` seeds give fewer."""
    size, frames = video_autoencoder.SIZE, video_autoencoder.FRAMES
    videos, captions = [], []
    for index in range(count):
        drawn = clip(TRAINING_FAMILY + index, size, frames, objects=0 if index % EMPTY_EVERY == 0 else None)
        if not held_out(drawn.words):
            videos.append(drawn.frames)
            captions.append([describe_clip(drawn, k) for k in range(CAPTIONS_A_SCENE)])
    return np.stack(videos), captions


def encode_scenes(vae: AutoencoderKL, images: np.ndarray, device: str) -> Latents:
    """Latents of 64 x 64 pixels, and of the same scenes at 32 x 32."""
    both = {"fine": False, "coarse": True}
    return {name: autoencoder.encode(vae, images, device, reduced) for name, reduced in both.items()}


def encode_clips(vae: AutoencoderKLCogVideoX, clips: np.ndarray, device: str) -> Latents:
    """Latents of clips, and of their first frames, which are pictures to the causal autoencoder."""
    latents = video_autoencoder.encode(vae, clips, device)
    return {"fine": latents, "coarse": latents[:, :1]}


SCENES = Source(
    draw_scenes,
    autoencoder.train_autoencoder,
    encode_scenes,
    AutoencoderKL,
    (
        "sun", "a fish", "house, night", "a car on sand", "boat, sun, water", "a house and a tree on grass",
        "a balloon above a mushroom in the sky", "a rocket left of a house at night",
        "a flower right of a car on brick", "fish, mushroom, balloon, water", "a sun, a boat and a flower on sand",
        "house, car, tree, rocket, grass",
    ),
)  # fmt: skip
CLIPS = Source(
    draw_clips,
    video_autoencoder.train_video_autoencoder,
    encode_clips,
    AutoencoderKLCogVideoX,
    (
        "sun", "a fish moving left on water", "boat moving right, water", "a still tree on grass",
        "a rocket moving up at night", "a balloon moving down in the sky", "a car moving left on sand",
        "a still house and a car moving right on grass", "a sun moving right and a still boat on water",
        "a mushroom moving up and a flower moving down on brick",
    ),
    shifted=False,
)  # fmt: skip


def prepare(
    source: Source, work: Path, count: int, autoencoder_steps: int, seed: int, device: str
) -> tuple[Any, Examples]:
    """Draw samples, train the autoencoder and encode them, or read all that from an earlier run.

    Args:
        source: Of the samples.
        work: Where intermediate results are kept.
        count: Samples.
        autoencoder_steps: Optimiser steps of the autoencoder.
        seed: Of the autoencoder.
        device: Where to run.

    Returns:
        The autoencoder with its scaling and shift factors set, and the normalised latents with captions.
    """
    encoded, saved = work / "examples.pt", work / "vae"
    if encoded.exists() and saved.exists():
        captions = json.loads((work / "captions.json").read_text())
        return source.vae.from_pretrained(saved).to(device), Examples(torch.load(encoded), captions)
    print(f"drawing {count} samples", flush=True)
    pixels, captions = source.draw(count)
    if saved.exists():
        model = source.vae.from_pretrained(saved).to(device).eval()
    else:
        model = source.train(pixels, autoencoder_steps, seed, device)
    print("encoding", flush=True)
    latents = source.encode(model, pixels, device)
    known = latents["fine"][:2000].float()
    shift = float(known.mean()) if source.shifted else 0.0
    scale = 1 / float((known - shift).square().mean().sqrt())
    model.register_to_config(scaling_factor=scale, **({"shift_factor": shift} if source.shifted else {}))
    model.save_pretrained(saved)
    latents = {name: _normalise(values, shift, scale) for name, values in latents.items()}
    (work / "captions.json").write_text(json.dumps(captions))
    torch.save(latents, encoded)
    return model, Examples(latents, captions)


def _normalise(latents: torch.Tensor, shift: float, scale: float) -> torch.Tensor:
    """Bring latents to about unit variance, a thousand at a time to spare memory."""
    return torch.cat([((part.float() - shift) * scale).half() for part in latents.split(1000)])
