"""The demo models' image autoencoder: a stock `AutoencoderKL` of factor 2, trained on scenes in a few minutes."""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn import functional

Codec = TypeVar("Codec", bound=torch.nn.Module)

LATENT_CHANNELS = 4
# weight of the divergence from a unit normal: enough to keep latents bounded and smooth, far too little to blur
KL_WEIGHT = 1e-3


def autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder: 64 x 64 pixels to 4 x 32 x 32 latents, no attention."""
    return AutoencoderKL(
        block_out_channels=(24, 40),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    )


def to_pixels(images: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """Turn (sample, y, x, 3) uint8 into (sample, 3, y, x) float32 from -1 to 1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def halve(images: torch.Tensor) -> torch.Tensor:
    """Halve the resolution of (sample, channel, y, x) by averaging 2 x 2 pixels."""
    return functional.avg_pool2d(images, 2)


def train_autoencoder(images: np.ndarray, steps: int, seed: int, device: str, batch: int = 8) -> AutoencoderKL:
    """Train on scenes, and on scenes reduced by half.

    In a quarter of the steps the decoder sees latents averaged over 2 x 2 and must give the image averaged over 2 x 2:
    latents then behave like a small picture under a change of scale, which the transformer's coarse phase relies on.

    Args:
        images: (sample, y, x, 3) uint8.
        steps: Optimiser steps.
        seed: Of weights and batches.
        device: Where to train.
        batch: Images a step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = autoencoder().to(device)

    def attempt(step: int) -> tuple[DiagonalGaussianDistribution, torch.Tensor]:
        pixels = to_pixels(images[rng.integers(len(images), size=batch)], device)
        kind = step % 4
        if kind == 3:
            pixels = halve(pixels)
        posterior = model.encode(pixels).latent_dist
        latents = posterior.sample()
        if kind == 1:
            latents, pixels = halve(latents), halve(pixels)
        return posterior, model.decode(latents).sample - pixels

    return fit(model, steps, attempt)


def fit(model: Codec, steps: int, attempt: Callable[[int], tuple[DiagonalGaussianDistribution, torch.Tensor]]) -> Codec:
    """Train an autoencoder: absolute and squared error and a little divergence from a unit normal.

    Args:
        model: Of images or videos.
        steps: Optimiser steps.
        attempt: Step to the posterior of a batch and the error of what was decoded from a sample of it.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    started = time.monotonic()
    for step in range(steps):
        posterior, error = attempt(step)
        # Kullback-Leibler, per latent number
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * divergence
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            mean, rms, seconds = error.abs().mean(), error.square().mean().sqrt(), time.monotonic() - started
            print(f"autoencoder step {step} error {mean:.4f} rms {rms:.4f} {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def encode(model: AutoencoderKL, images: np.ndarray, device: str, reduced: bool, batch: int = 64) -> torch.Tensor:
    """Encode images to the middle of their latent distribution, unscaled.

    Args:
        model: A trained autoencoder.
        images: (sample, y, x, 3) uint8.
        device: Where to run.
        reduced: Encode the images at half their resolution.
        batch: Images a call.

    Returns:
        (sample, channel, y, x) float16 on the CPU.
    """
    parts = []
    for start in range(0, len(images), batch):
        pixels = to_pixels(images[start : start + batch], device)
        parts.append(model.encode(halve(pixels) if reduced else pixels).latent_dist.mode().half().cpu())
    return torch.cat(parts)
