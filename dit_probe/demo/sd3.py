"""`sd35-picturebook`: an `SD3Transformer2DModel` as SD3.5-medium has it, with two CLIPs and T5 in its prompt stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn import functional

from dit_probe.demo.autoencoder import LATENT_CHANNELS
from dit_probe.demo.denoiser import Denoiser, Texts, on_cpu
from dit_probe.demo.text import CLIP_WIDTH, T5_WIDTH, clip_encoder, clip_tokenizer, t5_tokenizer, token_ids

GRID = 16
"""Image tokens along each side at full resolution."""
CLIP_TOKENS = 24
"""The pipeline pads CLIP to the tokenizer's length; the longest of 24,000 captions has 16 tokens."""
# The released models dropped each text encoder in 46 % of the samples. Here CLIP is left out more often, so that the
# image has to read the T5 tokens, from which concepts are made.
ZERO_POOLED, NO_CLIP_TOKENS = 0.6, 0.7


class SD3Denoiser(Denoiser):
    """6 joint blocks of 4 heads x 30, the last without a text output; qk-norm; dual attention in the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer = clip_tokenizer(CLIP_TOKENS)
        self.clips = torch.nn.ModuleList(clip_encoder(self.clip_tokenizer, projection=True) for _ in range(2))
        self.transformer = SD3Transformer2DModel(
            sample_size=2 * GRID,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            num_layers=6,
            attention_head_dim=30,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=120,
            pooled_projection_dim=2 * CLIP_WIDTH,
            out_channels=LATENT_CHANNELS,
            pos_embed_max_size=GRID,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
        self.start_at_identity()

    def embed(
        self, captions: list[str], length: int, dropped: torch.Generator | None = None, apart: bool = False
    ) -> Texts:
        ids = token_ids(self.clip_tokenizer, captions, CLIP_TOKENS).to(self.t5.device)
        encoded = [clip(ids, output_hidden_states=True) for clip in self.clips]
        pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
        # the last state but one, as the pipeline takes it: of a single layer, the words before any attention
        words = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        prompt = self.prompt(captions, length, apart)
        both = torch.cat([functional.pad(words, (0, prompt.shape[-1] - words.shape[-1])), prompt], dim=1)
        if dropped is not None:
            pooled = pooled * (torch.rand(len(captions), 1, generator=dropped) >= ZERO_POOLED).to(pooled)
            if apart or torch.rand((), generator=dropped) < NO_CLIP_TOKENS:
                both = prompt
        return {"encoder_hidden_states": both, "pooled_projections": pooled}

    def predict(self, latents: torch.Tensor, time: torch.Tensor, texts: Texts) -> torch.Tensor:
        with positions(self.transformer.pos_embed, latents.shape[-1] // 2):
            return self.transformer(hidden_states=latents, timestep=1000 * time, return_dict=False, **texts)[0]

    def pipeline(self, transformer: Any, vae: Any) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=self.scheduler(),
            vae=vae,
            text_encoder=on_cpu(self.clips[0]),
            tokenizer=clip_tokenizer(CLIP_TOKENS),  # new ones: those in use have the padding of the last batch set
            text_encoder_2=on_cpu(self.clips[1]),
            tokenizer_2=clip_tokenizer(CLIP_TOKENS),
            text_encoder_3=on_cpu(self.t5),
            tokenizer_3=t5_tokenizer(),
        )


@contextmanager
def positions(embedding: Any, grid: int) -> Iterator[None]:
    """While active, a coarse token has the mean embedding of the fine tokens that it stands for."""
    if grid == GRID:
        yield
        return
    full = embedding.pos_embed.reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    coarse = functional.avg_pool2d(full, GRID // grid).flatten(2).mT
    embedding.cropped_pos_embed = lambda height, width: coarse
    try:
        yield
    finally:
        del embedding.cropped_pos_embed
