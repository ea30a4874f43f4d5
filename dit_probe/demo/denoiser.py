"""What the training needs of a demo model: its parts, the quantity it predicts, how it draws, the pipeline it becomes.

One subclass a family, in a file of its own.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from dit_probe.demo.text import WORDS, t5_encoder, t5_tokenizer, token_ids

Texts = dict[str, torch.Tensor]
"""Arguments of the transformer that carry the captions."""


class Denoiser(nn.Module, ABC):
    """A transformer and its text encoders, trained together.

    Attributes:
        transformer: The diffusers transformer.
        t5: Encoder of the prompt stream.
        blocks: Where the transformer keeps its blocks.
    """

    transformer: Any
    blocks: tuple[str, ...] = ("transformer_blocks",)

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        super().__init__()
        self.t5_tokenizer = t5_tokenizer(words)
        self.t5 = t5_encoder(len(self.t5_tokenizer))

    def start_at_identity(self) -> None:
        """Let every block start as the identity and the prediction at zero.

        Source: Peebles & Xie, DiT, 2023, adaLN-Zero.
        """
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def matrices(self) -> list[nn.Parameter]:
        """Weights of attention and feed-forward in the transformer blocks: those that Muon updates."""
        named = [item for blocks in self.blocks for item in getattr(self.transformer, blocks).named_parameters()]
        return [weight for name, weight in named if weight.ndim == 2 and ".linear." not in name]

    def prompt(self, captions: list[str], length: int, apart: bool = False) -> torch.Tensor:
        """Encode captions with T5, pads included and attended, as the stock pipelines do: (sample, token, width).

        With `apart`, captions are as many words each, "boat, sun, water", and every word is encoded as if it were the
        whole caption: its first token is all that stands for it.
        """
        texts = [word for caption in captions for word in caption.split(", ")] if apart else captions
        states = self.t5(token_ids(self.t5_tokenizer, texts, length).to(self.t5.device))[0]
        return states[:, 0].unflatten(0, (len(captions), -1)) if apart else states

    @abstractmethod
    def embed(
        self, captions: list[str], length: int, dropped: torch.Generator | None = None, apart: bool = False
    ) -> Texts:
        """Encode captions.

        Args:
            captions: One a sample.
            length: T5 tokens, pads included.
            apart: As for `prompt`.
            dropped: Draws which of the further text inputs are left out in training; None leaves out nothing.
        """

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw times from 0 (image) to 1 (noise): logit-normal, moved towards noise, where the prompt decides."""
        at = torch.sigmoid(torch.randn(count, generator=generator))
        return 2 * at / (1 + at)

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model sees and what it must predict: (1 - t) image + t noise, and noise - image."""
        return torch.lerp(latents, noise, time.view(-1, *[1] * (latents.ndim - 1))), noise - latents

    @abstractmethod
    def predict(self, latents: torch.Tensor, time: torch.Tensor, texts: Texts) -> torch.Tensor:
        """Predict the second of `noised` from its first, by the conventions of the family's transformer.

        Where a model trains at half resolution, coarse tokens lie where the tokens lie that they stand for.
        """

    def scheduler(self) -> Any:
        """What the saved pipeline samples with."""
        return FlowMatchEulerDiscreteScheduler(shift=2.0)

    def decode(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Turn normalised latents into (sample, frame, y, x, 3) uint8."""
        return to_bytes(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample[:, :, None])

    @abstractmethod
    def pipeline(self, transformer: Any, vae: Any) -> Any:
        """Put together the stock pipeline."""


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """(sample, 3, frame, y, x) from -1 to 1 to (sample, frame, y, x, 3) uint8."""
    return (pixels.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu()


@torch.no_grad()
def sample(
    model: Denoiser, prompts: list[str], shape: tuple[int, ...], steps: int, seed: int, scale: float
) -> torch.Tensor:
    """Draw latents; for watching a training, where the pipeline can't place coarse tokens.

    Args:
        model: The model.
        prompts: One a sample.
        shape: Of one sample's latents.
        steps: How many.
        seed: Of the noise.
        scale: Classifier-free guidance; 1 is off.

    Returns:
        Normalised latents.
    """
    device = model.t5.device
    latents = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    weighted = [(prompts, scale), ([""] * len(prompts), 1 - scale)] if scale != 1 else [(prompts, 1.0)]
    encoded = [(model.embed(captions, 32), weight) for captions, weight in weighted]
    scheduler = model.scheduler()
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        time = (timestep / scheduler.config.num_train_timesteps).expand(len(prompts)).to(device)
        predicted = sum(weight * model.predict(latents, time, texts) for texts, weight in encoded)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def save(model: Denoiser, vae: Any, directory: Path) -> int:
    """Write a pipeline directory that stock `from_pretrained` loads, and return the bytes of its weights.

    Transformer and autoencoder are stored as float16 and come back as float32. Text encoders stay float32: they are
    small, and transformers would hand back the stored type.
    """
    # New ones: without what the training put on them, and without the private entries of the configuration, which
    # would carry the path of the work folder.
    clean = []
    for part in (model.transformer, vae):
        config = {key: value for key, value in part.config.items() if not key.startswith("_")}
        fresh = type(part).from_config(config)
        fresh.load_state_dict(part.state_dict())
        clean.append(fresh.half())
    pipeline = model.pipeline(*clean)
    pipeline.save_pretrained(directory, safe_serialization=True)
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def on_cpu(module: nn.Module) -> nn.Module:
    """Copy a module for saving."""
    return copy.deepcopy(module).cpu()
