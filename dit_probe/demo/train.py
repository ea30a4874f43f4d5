"""Train a demo model from nothing: `python -m dit_probe.demo.train flux-picturebook`.

Scenes are drawn, an autoencoder is trained on them, and then the transformer with both text encoders on the latents
by rectified flow, first on 8 x 8 tokens (the scenes at half resolution, tokens at the same coordinates: three times
as many steps an hour) and then on 16 x 16. Most batches hold captions of one length, so that no pads stand between the
nouns and the image; the others have pads as the stock pipelines add them. No loss ever sees a mask. On a GPU if there
is one.

The learning rate follows the share of the budget that is used up. With `--steps` the budget is steps and a run repeats
exactly on the same machine; with `--minutes` it is minutes of training, for machines that are shared: the schedule then
ends on time whatever else runs. Interrupted, run the same command with `--resume`.
"""

import argparse
import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from dit_probe.demo.cpu_speed import WrittenOutAttention, quick_matrix_products
from dit_probe.demo.denoiser import Denoiser, decode, sample, save
from dit_probe.demo.examples import CAPTIONS_A_SCENE, Examples, by_length, prepare
from dit_probe.demo.flux import FluxDenoiser
from dit_probe.demo.muon import Muon
from dit_probe.demo.sd3 import SD3Denoiser

RATE = 2e-3
WARM_UP_STEPS = 50
FALL_FROM = 0.6
"""Share of the budget after which the learning rate falls linearly to zero."""
EMPTY_CAPTIONS = 0.1
EMA_DECAY = 0.998
UNPADDED = 0.85
"""Share of the batches whose captions have one length and no pads."""
# T5 lengths of the other batches, their odds and batch sizes: long ones teach the model to pass over the pads of the
# stock pipelines; their batches are smaller, which keeps a step about as long
LENGTHS: tuple[tuple[int, float, int], ...] = (
    (24, 0.4, 32),
    (32, 0.2, 32),
    (64, 0.2, 32),
    (256, 0.15, 16),
    (512, 0.05, 8),
)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        denoiser: Makes the untrained model.
        coarse: Share of the budget spent at half resolution.
        batch: Samples a step.
    """

    denoiser: Callable[[], Denoiser]
    coarse: float = 0.7
    batch: int = 32


RECIPES: dict[str, Recipe] = {
    "flux-picturebook": Recipe(FluxDenoiser),
    "sd35-picturebook": Recipe(SD3Denoiser),
}

PROMPTS: tuple[str, ...] = (
    "sun", "a fish", "tree, night", "a car on sand", "boat, sun, water", "a house and a tree on grass",
    "a balloon above a mushroom in the sky", "a rocket left of a house at night", "a flower right of a car on brick",
    "fish, mushroom, balloon, water", "a sun, a boat and a flower on sand", "house, car, tree, rocket, grass",
)  # fmt: skip


@dataclass
class Budget:
    """How long to train: minutes on the clock, or where those are None a number of steps."""

    steps: int
    minutes: float | None

    def used(self, step: int, seconds: float) -> float:
        """Share of the budget used up, from 0."""
        return step / self.steps if self.minutes is None else seconds / (60 * self.minutes)


class Trainer:
    """Model, averaged model, optimisers and where the training stands."""

    def __init__(self, recipe: Recipe, examples: Examples, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.recipe, self.examples, self.seed, self.device = recipe, examples, seed, device
        self.model = recipe.denoiser().to(device)
        self.by_length = by_length(examples.captions, self.model.t5_tokenizer)
        self.odds = torch.tensor([float(len(pairs)) for pairs in self.by_length.values()])
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        matrices = self.model.matrices()
        chosen = {id(weight) for weight in matrices}
        rest = [weight for weight in self.model.parameters() if id(weight) not in chosen]
        self.optimisers = [Muon(matrices, RATE), torch.optim.AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0.0)]
        self.step, self.seconds = 0, 0.0

    def advance(self, used: float) -> float:
        """Take one optimiser step at a share `used` of the budget and return its loss."""
        rate = RATE * min(1.0, (self.step + 1) / WARM_UP_STEPS) * min(1.0, (1 - used) / (1 - FALL_FROM))
        loss = self._loss(coarse=used < self.recipe.coarse)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
        return loss.item()

    def _loss(self, coarse: bool) -> torch.Tensor:
        """Rectified-flow loss of a batch that depends on the seed and the step only: a resumed run continues."""
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + self.step)
        latents = self.examples.coarse if coarse else self.examples.fine
        rows, captions, length = self._captions(generator)
        image = latents[rows].float()
        noise = torch.randn(image.shape, generator=generator)
        # logit-normal times moved towards noise, where the prompt decides what is drawn
        at = torch.sigmoid(torch.randn(len(rows), generator=generator))
        at = 2 * at / (1 + at)
        image, noise, at = image.to(self.device), noise.to(self.device), at.to(self.device)
        noisy = torch.lerp(image, noise, at.view(-1, *[1] * (image.ndim - 1)))
        with WrittenOutAttention() if self.device == "cpu" else contextlib.nullcontext():
            velocity = self.model.velocity(noisy, at, self.model.embed(captions, length, generator))
        return (velocity - (noise - image)).square().mean()

    def _captions(self, generator: torch.Generator) -> tuple[torch.Tensor, list[str], int]:
        """Draw samples, a caption of each, some of them empty, and the number of T5 tokens."""
        if torch.rand((), generator=generator) < UNPADDED:
            length = list(self.by_length)[int(torch.multinomial(self.odds, 1, generator=generator))]
            pairs = self.by_length[length]
            rows, which = pairs[torch.randint(len(pairs), (self.recipe.batch,), generator=generator)].T
        else:
            odds = torch.tensor([row[1] for row in LENGTHS])
            length, _, size = LENGTHS[int(torch.multinomial(odds, 1, generator=generator))]
            rows = torch.randint(len(self.examples.captions), (min(size, self.recipe.batch),), generator=generator)
            which = torch.randint(CAPTIONS_A_SCENE, rows.shape, generator=generator)
        empty = (torch.rand(len(rows), generator=generator) < EMPTY_CAPTIONS).tolist()
        chosen = [self.examples.captions[row][k] for row, k in zip(rows.tolist(), which.tolist(), strict=True)]
        return rows, ["" if drop else caption for drop, caption in zip(empty, chosen, strict=True)], length

    def state(self) -> dict:
        """Everything a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict) -> None:
        """Take up the state of an earlier run."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]


def train(
    trainer: Trainer, vae: AutoencoderKL, budget: Budget, work: Path, save_every: float, draw_every: float
) -> None:
    """Train until the budget is used up, with a checkpoint and a picture of samples every so many seconds."""
    last_save = last_drawing = last_print = time.monotonic()
    losses: list[float] = []
    while (used := budget.used(trainer.step, trainer.seconds)) < 1:
        began = time.monotonic()
        losses.append(trainer.advance(used))
        now = time.monotonic()
        trainer.seconds += now - began
        if now - last_print > 30:
            mean, speed = sum(losses) / len(losses), len(losses) / (now - last_print)
            print(f"step {trainer.step} used {used:.3f} loss {mean:.4f} {speed:.2f} steps/s", flush=True)
            last_print, losses = now, []
        if now - last_save > save_every:
            checkpoint(trainer, work)
            last_save = now
        if now - last_drawing > draw_every:
            draw_samples(trainer, vae, work / f"samples-{trainer.step:06d}.png", used < trainer.recipe.coarse)
            last_drawing = time.monotonic()
    checkpoint(trainer, work)


def checkpoint(trainer: Trainer, work: Path) -> None:
    """Write the checkpoint so that a kill half-way leaves the earlier one."""
    torch.save(trainer.state(), work / "checkpoint.new")
    (work / "checkpoint.new").replace(work / "checkpoint.pt")


def draw_samples(trainer: Trainer, vae: AutoencoderKL, file: Path, coarse: bool) -> None:
    """Draw the fixed prompts with the averaged weights, without and with guidance, one row of images each."""
    from PIL import Image

    latents = trainer.examples.coarse if coarse else trainer.examples.fine
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    rows = [
        decode(vae, sample(trainer.average, list(PROMPTS), latents.shape[1:], scheduler, 16, 0, scale))
        for scale in (1.0, 3.0)
    ]
    picture = torch.cat([torch.cat(list(images), dim=1) for images in rows], dim=0).numpy()
    enlarge = 128 // rows[0].shape[1]
    size = (picture.shape[1] * enlarge, picture.shape[0] * enlarge)
    Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(file)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="pipeline directory to write; default WORK/pipeline")
    parser.add_argument("--work", type=Path, help="checkpoints and latents; default training/NAME")
    parser.add_argument("--steps", type=int, default=9000, help="optimiser steps, unless --minutes is given")
    parser.add_argument("--minutes", type=float, help="train this long instead")
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--autoencoder-steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in WORK")
    parser.add_argument("--export-only", action="store_true", help="write the pipeline of the checkpoint and stop")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--draw-every", type=float, default=600, help="seconds between pictures of samples")
    options = parser.parse_args(arguments)
    options.work = options.work or Path("training") / options.name
    options.work.mkdir(parents=True, exist_ok=True)
    vae, examples = prepare(options.work, options.scenes, options.autoencoder_steps, options.seed, options.device)
    trainer = Trainer(RECIPES[options.name], examples, options.seed, options.device)
    if options.resume or options.export_only:
        trainer.restore(torch.load(options.work / "checkpoint.pt", map_location=options.device))
    if not options.export_only:
        budget = Budget(options.steps, options.minutes)
        with quick_matrix_products():
            train(trainer, vae, budget, options.work, options.save_every, options.draw_every)
    out = options.out or options.work / "pipeline"
    size = save(trainer.average, vae, out)
    minutes = trainer.seconds / 60
    print(f"step {trainer.step}, {minutes:.0f} minutes of training: {out} ({size / 1e6:.2f} MB of weights)")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # denormal numbers of a young model cost several times the time
    main()
