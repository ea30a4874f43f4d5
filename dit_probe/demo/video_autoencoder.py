"""The video model's causal autoencoder: a stock `AutoencoderKLCogVideoX`, factor 2 in time and space, trained on clips.

Trained, not built by hand: its blocks norm and bend what they pass on, so that no weights make it an exact codec.
Factor 4 with 16 channels was tried first: after 1,500 steps moving objects were smears (root mean square error 0.17).
"""

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dit_probe.demo.autoencoder import fit

SIZE, FRAMES = 32, 9
"""Pixels a side and frames of the clips."""
FACTOR = 2
"""Pixels a latent, along each side; frames a latent, after the first frame, which has one of its own."""
LATENT_CHANNELS = 8


def video_autoencoder() -> AutoencoderKLCogVideoX:
    """Build the untrained autoencoder: 9 frames of 32 x 32 pixels to 8 x 5 x 16 x 16 latents.

    Example:
        >>> clip = torch.zeros(1, 3, FRAMES, SIZE, SIZE)
        >>> tuple(video_autoencoder().encode(clip).latent_dist.mode().shape)
        (1, 8, 5, 16, 16)
    """
    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=FACTOR,
        sample_height=SIZE,
        sample_width=SIZE,
    )


def to_pixels(clips: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """Turn (sample, frame, y, x, 3) uint8 into (sample, 3, frame, y, x) float32 from -1 to 1."""
    return torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)


def train_video_autoencoder(
    clips: np.ndarray, steps: int, seed: int, device: str, batch: int = 8
) -> AutoencoderKLCogVideoX:
    """Train on clips.

    Args:
        clips: (sample, frame, y, x, 3) uint8.
        steps: Optimiser steps.
        seed: Of weights and batches.
        device: Where to train.
        batch: Clips a step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = video_autoencoder().to(device)

    def attempt(step: int) -> tuple[DiagonalGaussianDistribution, torch.Tensor]:
        pixels = to_pixels(clips[rng.integers(len(clips), size=batch)], device)
        # 3D convolutions are most of the time, and a third quicker so on a CPU
        with torch.autocast(pixels.device.type, torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            decoded = model.decode(posterior.sample()).sample
        return posterior, decoded.float() - pixels

    return fit(model, steps, attempt)


@torch.no_grad()
def encode(model: AutoencoderKLCogVideoX, clips: np.ndarray, device: str, batch: int = 32) -> torch.Tensor:
    """Encode clips to the middle of their latent distribution, unscaled: (sample, frame, channel, y, x) float16."""
    parts = []
    for start in range(0, len(clips), batch):
        latents = model.encode(to_pixels(clips[start : start + batch], device)).latent_dist.mode()
        parts.append(latents.transpose(1, 2).half().cpu())
    return torch.cat(parts)
