"""`cogvideox-picturebook`: a `CogVideoXTransformer3DModel` with rotary embeddings that draws clips of 9 frames."""

from functools import cached_property
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from dit_probe.demo.denoiser import Denoiser, Texts, on_cpu, to_bytes
from dit_probe.demo.text import T5_WIDTH, VIDEO_WORDS, t5_tokenizer
from dit_probe.demo.video_autoencoder import FACTOR, FRAMES, LATENT_CHANNELS, SIZE

PATCH = 2
"""Latents a token, along each side."""


class CogVideoXDenoiser(Denoiser):
    """8 blocks of 4 heads x 32; image and text share projections and feed-forward, as in the released models."""

    def __init__(self) -> None:
        super().__init__(VIDEO_WORDS)
        self.transformer = CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=96,
            text_embed_dim=T5_WIDTH,
            num_layers=8,
            sample_width=SIZE // FACTOR,
            sample_height=SIZE // FACTOR,
            sample_frames=FRAMES,
            patch_size=PATCH,
            temporal_compression_ratio=FACTOR,
            use_rotary_positional_embeddings=True,
        )
        self.start_at_identity()

    def scheduler(self) -> CogVideoXDDIMScheduler:
        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            clip_sample=False,
        )

    @cached_property
    def _signal(self) -> torch.Tensor:
        """alpha_bar of every timestep: the share of the image in the variance of what the model sees."""
        return self.scheduler().alphas_cumprod

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform, as the schedule is noisy enough: half of its timesteps have less than a third of the image."""
        return torch.randint(len(self._signal), (count,), generator=generator) / len(self._signal)

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Variance-preserving noise and v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image."""
        signal = self._signal.to(latents)[self._timestep(time)].view(-1, *[1] * (latents.ndim - 1))
        image, other = signal.sqrt(), (1 - signal).sqrt()
        return image * latents + other * noise, image * noise - other * latents

    def _timestep(self, time: torch.Tensor) -> torch.Tensor:
        return (time * len(self._signal)).round().long()

    def embed(
        self, captions: list[str], length: int, dropped: torch.Generator | None = None, apart: bool = False
    ) -> Texts:
        return {"encoder_hidden_states": self.prompt(captions, length, apart)}

    def predict(self, latents: torch.Tensor, time: torch.Tensor, texts: Texts) -> torch.Tensor:
        frames, height, width = latents.shape[1], *(side // PATCH for side in latents.shape[-2:])
        rotary = get_3d_rotary_pos_embed(
            embed_dim=self.transformer.config.attention_head_dim,
            crops_coords=((0, 0), (height, width)),
            grid_size=(height, width),
            temporal_size=frames,
            device=latents.device,
        )
        return self.transformer(
            hidden_states=latents,
            timestep=self._timestep(time),
            image_rotary_emb=rotary,
            return_dict=False,
            **texts,
        )[0]

    def decode(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        return to_bytes(vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample)

    def pipeline(self, transformer: Any, vae: Any) -> CogVideoXPipeline:
        return CogVideoXPipeline(
            tokenizer=t5_tokenizer(VIDEO_WORDS),  # a new one: that in use has the padding of the last batch set
            text_encoder=on_cpu(self.t5),
            vae=vae,
            transformer=transformer,
            scheduler=self.scheduler(),
        )
