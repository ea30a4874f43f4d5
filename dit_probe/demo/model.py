"""The parts of `flux-picturebook` as stock classes, the velocity they predict, and the directory they are saved to."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn

from dit_probe.demo.autoencoder import LATENT_CHANNELS
from dit_probe.demo.text import (
    CLIP_WIDTH,
    T5_WIDTH,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
    token_ids,
)

HEADS, HEAD_WIDTH, ROTARY_AXES = 4, 30, (2, 14, 14)
JOINT_BLOCKS, SINGLE_BLOCKS = 6, 1
SCHEDULER_SHIFT = 2.0
GRID = 16
"""Image tokens along each side at full resolution."""


class Denoiser(nn.Module):
    """The transformer and its two text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.t5_tokenizer, self.clip_tokenizer = t5_tokenizer(), clip_tokenizer()
        self.t5 = t5_encoder(len(self.t5_tokenizer))
        self.clip = clip_encoder(self.clip_tokenizer)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=JOINT_BLOCKS,
            num_single_layers=SINGLE_BLOCKS,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=HEADS,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=ROTARY_AXES,
        )
        # every block starts as the identity and the prediction at zero (Source: Peebles & Xie, DiT, 2023, adaLN-Zero)
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def matrices(self) -> list[nn.Parameter]:
        """Weights of attention and feed-forward in the transformer blocks: those that Muon updates."""
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        named = [item for block in blocks for item in block.named_parameters()]
        return [weight for name, weight in named if weight.ndim == 2 and ".linear." not in name]

    def embed(self, captions: list[str], length: int, pooled: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions.

        Args:
            captions: One a sample.
            length: T5 tokens, pads included; pads are attended, as the stock pipeline does.
            pooled: (sample,) bool: whose pooled vector to keep, the others get zeros; None keeps all.

        Returns:
            (sample, token, width) and (sample, width).
        """
        device = self.transformer.x_embedder.weight.device
        prompt = self.t5(token_ids(self.t5_tokenizer, captions, length).to(device))[0]
        vector = self.clip(token_ids(self.clip_tokenizer, captions, 32).to(device)).pooler_output
        return prompt, vector if pooled is None else vector * pooled[:, None].to(vector)

    def velocity(
        self, tokens: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor, vector: torch.Tensor
    ) -> torch.Tensor:
        """Predict noise minus image.

        Args:
            tokens: (sample, token, channel) packed noisy latents, 16 x 16 tokens or 8 x 8.
            time: (sample,) from 0 (image) to 1 (noise).
            prompt: (sample, token, width).
            vector: (sample, width).
        """
        return self.transformer(
            hidden_states=tokens,
            encoder_hidden_states=prompt,
            pooled_projections=vector,
            timestep=time,
            img_ids=positions(round(tokens.shape[1] ** 0.5)).to(tokens),
            txt_ids=torch.zeros(prompt.shape[1], 3).to(tokens),
            return_dict=False,
        )[0]


def positions(grid: int) -> torch.Tensor:
    """Rotary positions of a square of tokens in units of the full-resolution grid.

    A coarse token lies at the mean of the four fine ones that it stands for, so that coordinates mean the same
    place in both phases of the training.

    Example:
        >>> positions(8)[:2]
        tensor([[0.0000, 0.5000, 0.5000],
                [0.0000, 0.5000, 2.5000]])
    """
    stride = GRID / grid
    axis = torch.arange(grid) * stride + (stride - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(sample, channel, y, x) to (sample, token, 4 x channel), as `FluxPipeline` packs 2 x 2 latents."""
    n, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, n, channels, height, width)


@torch.no_grad()
def sample(model: Denoiser, prompts: list[str], grid: int, steps: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Draw latents by plain Euler steps; for watching a training, where the pipeline can't place coarse tokens.

    Args:
        model: The model.
        prompts: One a sample.
        grid: Tokens along each side.
        steps: Euler steps.
        seed: Of the noise.
        scale: Classifier-free guidance; 1 is off.

    Returns:
        (sample, channel, y, x) normalised latents.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), LATENT_CHANNELS, 2 * grid, 2 * grid, generator=generator)
    tokens = pack(noise).to(model.transformer.x_embedder.weight)
    texts = [(prompts, scale), ([""] * len(prompts), 1 - scale)] if scale != 1 else [(prompts, 1.0)]
    encoded = [(*model.embed(captions, 32, None), weight) for captions, weight in texts]
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = SCHEDULER_SHIFT * sigmas / (1 + (SCHEDULER_SHIFT - 1) * sigmas)
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        time = torch.full((len(prompts),), now).to(tokens)
        step = sum(weight * model.velocity(tokens, time, prompt, vector) for prompt, vector, weight in encoded)
        tokens = tokens + (after - now) * step
    return FluxPipeline._unpack_latents(tokens, 4 * grid, 4 * grid, 2)


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Turn normalised latents into (sample, y, x, 3) uint8."""
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (pixels.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu()


def save(model: Denoiser, vae: AutoencoderKL, directory: Path) -> int:
    """Write a pipeline directory that `FluxPipeline.from_pretrained` loads, and return the bytes of its weights.

    Transformer and autoencoder are stored as float16 and come back as float32. Text encoders stay float32: they are
    small, and transformers would hand back the stored type.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT, use_dynamic_shifting=False)
    # without the private entries, which would carry the path of the work folder into the saved configuration
    clean = AutoencoderKL.from_config({key: value for key, value in vae.config.items() if not key.startswith("_")})
    clean.load_state_dict(vae.state_dict())
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=clean.half(),
        text_encoder=copy.deepcopy(model.clip).cpu(),
        tokenizer=clip_tokenizer(),  # new ones: those in use have lengths and padding of the last batch set
        text_encoder_2=copy.deepcopy(model.t5).cpu(),
        tokenizer_2=t5_tokenizer(),
        transformer=copy.deepcopy(model.transformer).half().cpu(),
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
