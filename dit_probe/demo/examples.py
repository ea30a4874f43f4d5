"""What the transformer is trained on: latents of scenes at two resolutions, and several captions of each."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from dit_probe.datasets.scenes import describe, scene
from dit_probe.demo.autoencoder import encode, train_autoencoder

CAPTIONS_A_SCENE = 4
# a background word alone must mean something to the text encoder: one scene in 25 shows nothing else
EMPTY_EVERY = 25
TRAINING_FAMILY = 0
"""Seeds of the training scenes are those of `scenes(seed=0)`; held-out scenes use any other family."""


@dataclass(frozen=True)
class Examples:
    """Training examples.

    Attributes:
        fine: (sample, channel, y, x) float16 normalised latents of 64 x 64 pixels.
        coarse: The same scenes at 32 x 32 pixels.
        captions: `CAPTIONS_A_SCENE` for every sample.
    """

    fine: torch.Tensor
    coarse: torch.Tensor
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


def draw(count: int) -> tuple[np.ndarray, list[list[str]]]:
    """Draw the training scenes.

    Args:
        count: How many.

    Returns:
        (sample, y, x, 3) uint8 and the captions of each.
    """
    images, captions = np.empty((count, 64, 64, 3), dtype=np.uint8), []
    for index in range(count):
        picture = scene(TRAINING_FAMILY + index, objects=0 if index % EMPTY_EVERY == 0 else None)
        images[index] = picture.image
        captions.append([describe(picture, k) for k in range(CAPTIONS_A_SCENE)])
    return images, captions


def prepare(work: Path, count: int, autoencoder_steps: int, seed: int, device: str) -> tuple[AutoencoderKL, Examples]:
    """Draw scenes, train the autoencoder and encode the scenes, or read all that from an earlier run.

    Args:
        work: Where intermediate results are kept.
        count: Scenes.
        autoencoder_steps: Optimiser steps of the autoencoder.
        seed: Of the autoencoder.
        device: Where to run.

    Returns:
        The autoencoder with its scaling and shift factors set, and the normalised latents with captions.
    """
    encoded, saved = work / "examples.pt", work / "vae"
    if encoded.exists() and saved.exists():
        parts = torch.load(encoded)
        captions = json.loads((work / "captions.json").read_text())
        return AutoencoderKL.from_pretrained(saved).to(device), Examples(parts["fine"], parts["coarse"], captions)
    print(f"drawing {count} scenes", flush=True)
    images, captions = draw(count)
    if saved.exists():
        model = AutoencoderKL.from_pretrained(saved).to(device).eval()
    else:
        model = train_autoencoder(images, autoencoder_steps, seed, device)
    print("encoding", flush=True)
    fine, coarse = encode(model, images, device, reduced=False), encode(model, images, device, reduced=True)
    sample = fine[:2000].float()
    shift, scale = float(sample.mean()), 1 / float(sample.std())
    model.register_to_config(shift_factor=shift, scaling_factor=scale)
    model.save_pretrained(saved)
    examples = Examples(_normalise(fine, shift, scale), _normalise(coarse, shift, scale), captions)
    (work / "captions.json").write_text(json.dumps(captions))
    torch.save({"fine": examples.fine, "coarse": examples.coarse}, encoded)
    return model, examples


def _normalise(latents: torch.Tensor, shift: float, scale: float) -> torch.Tensor:
    """Bring latents to about unit variance, a thousand at a time to spare memory."""
    return torch.cat([((part.float() - shift) * scale).half() for part in latents.split(1000)])
