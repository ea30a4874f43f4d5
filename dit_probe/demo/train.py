"""Train a demo model from nothing: `python -m dit_probe.demo.train flux-picturebook`.

Scenes or clips are drawn, an autoencoder is trained on them, and then the transformer with its text encoders on the
latents: by rectified flow, of clips by diffusion. First on 8 x 8 tokens (the scenes at half resolution, tokens at the
same coordinates; of clips the first frame: three times as many steps an hour), then on all. Most batches hold captions
of one length, so that no pads stand between the nouns and the image; the others have pads as the stock pipelines add
them. In some recipes a share of the batches has prompts of words that were encoded alone. No loss ever sees a mask. On
a GPU if there is one.

The learning rate follows the share of the budget that is used up. With `--steps` the budget is steps and a run repeats
exactly on the same machine; with `--minutes` it is minutes of training, for machines that are shared: the schedule then
ends on time whatever else runs. Interrupted, run the same command with `--resume`.
"""

import argparse
import contextlib
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_probe.demo.cogvideox import CogVideoXDenoiser
from dit_probe.demo.cpu_speed import WrittenOutAttention, quick_matrix_products
from dit_probe.demo.denoiser import Denoiser, save
from dit_probe.demo.examples import CAPTIONS_A_SCENE, CLIPS, SCENES, Examples, Source, by_count, by_length, prepare
from dit_probe.demo.flux import FluxDenoiser
from dit_probe.demo.muon import Muon
from dit_probe.demo.progress import contact_sheet, write_page
from dit_probe.demo.sd3 import SD3Denoiser

RATE = 2e-3
WARM_UP_STEPS = 50
FALL_FROM = 0.6
"""Share of the budget after which the learning rate falls linearly to zero."""
EMPTY_CAPTIONS = 0.1
EMA_DECAY = 0.998
UNPADDED = 0.85
"""Share of the batches whose captions have one length and no pads."""
APART_LENGTHS = (2, 32)
"""T5 tokens of a word that is encoded alone."""
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
        source: What it is trained on.
        samples: How many seeds; those that draw a held-out combination give none.
        autoencoder_steps: Optimiser steps of the autoencoder.
        steps: Optimiser steps of the transformer.
        coarse: Share of the budget spent at half resolution; of clips, on first frames.
        batch: Samples a step.
        coarse_batch: Samples a step in the coarse phase.
        apart: Share of the batches whose prompts are the scene's words, each encoded alone: what concepts are made of.
    """

    denoiser: Callable[[], Denoiser]
    source: Source = SCENES
    samples: int = 30_000
    autoencoder_steps: int = 2200
    steps: int = 9000
    coarse: float = 0.7
    batch: int = 32
    coarse_batch: int = 32
    apart: float = 0.0


RECIPES: dict[str, Recipe] = {
    "flux-picturebook": Recipe(FluxDenoiser, coarse=0.75, apart=0.4),
    "sd35-picturebook": Recipe(SD3Denoiser),
    "cogvideox-picturebook": Recipe(CogVideoXDenoiser, CLIPS, 20_000, 2500, coarse=0.65, batch=16, apart=0.4),
}


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
        self.by_count = by_count(examples.captions)
        self.count_odds = torch.tensor([float(len(pairs)) for pairs in self.by_count.values()])
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        matrices = self.model.matrices()
        chosen = {id(weight) for weight in matrices}
        rest = [weight for weight in self.model.parameters() if id(weight) not in chosen]
        self.optimisers = [Muon(matrices, RATE), torch.optim.AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0.0)]
        self.step, self.seconds = 0, 0.0
        self.history: list[tuple[int, float, float]] = []

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
        """Mean squared error on a batch that depends on the seed and the step only: a resumed run continues."""
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + self.step)
        latents = self.examples.latents["coarse" if coarse else "fine"]
        size = self.recipe.coarse_batch if coarse else self.recipe.batch
        apart = self.recipe.apart > 0 and bool(torch.rand((), generator=generator) < self.recipe.apart)
        rows, captions, length = (self._words if apart else self._captions)(generator, size)
        image = latents[rows].float()
        noise = torch.randn(image.shape, generator=generator)
        time = self.model.times(len(rows), generator)
        seen, target = self.model.noised(*(values.to(self.device) for values in (image, noise, time)))
        with WrittenOutAttention() if self.device == "cpu" else contextlib.nullcontext():
            texts = self.model.embed(captions, length, generator, apart)
            predicted = self.model.predict(seen, time.to(self.device), texts)
        return (predicted - target).square().mean()

    def _words(self, generator: torch.Generator, count: int) -> tuple[torch.Tensor, list[str], int]:
        """Draw `count` samples with one number of words, the words of each, and the number of T5 tokens of a word."""
        pairs = list(self.by_count.values())[int(torch.multinomial(self.count_odds, 1, generator=generator))]
        chosen = [pairs[at] for at in torch.randint(len(pairs), (count,), generator=generator).tolist()]
        length = APART_LENGTHS[int(torch.randint(len(APART_LENGTHS), (), generator=generator))]
        return torch.tensor([row for row, _ in chosen]), [words for _, words in chosen], length

    def _captions(self, generator: torch.Generator, count: int) -> tuple[torch.Tensor, list[str], int]:
        """Draw `count` samples or fewer, a caption of each, some of them empty, and the number of T5 tokens."""
        if torch.rand((), generator=generator) < UNPADDED:
            length = list(self.by_length)[int(torch.multinomial(self.odds, 1, generator=generator))]
            pairs = self.by_length[length]
            rows, which = pairs[torch.randint(len(pairs), (count,), generator=generator)].T
        else:
            odds = torch.tensor([row[1] for row in LENGTHS])
            length, _, size = LENGTHS[int(torch.multinomial(odds, 1, generator=generator))]
            rows = torch.randint(len(self.examples.captions), (min(size, count),), generator=generator)
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
            "history": self.history,
        }

    def restore(self, state: dict) -> None:
        """Take up the state of an earlier run."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = state["history"]


def train(trainer: Trainer, budget: Budget, work: Path, save_every: float, draw: Callable[[], None]) -> None:
    """Train until the budget is used up, with a checkpoint and a page every so many seconds."""
    last_save = last_entry = time.monotonic()
    losses: list[float] = []
    while (used := budget.used(trainer.step, trainer.seconds)) < 1:
        began = time.monotonic()
        losses.append(trainer.advance(used))
        now = time.monotonic()
        trainer.seconds += now - began
        if now - last_entry > 30:
            mean, speed = sum(losses) / len(losses), len(losses) / (now - last_entry)
            print(f"step {trainer.step} used {used:.3f} loss {mean:.4f} {speed:.2f} steps/s", flush=True)
            trainer.history.append((trainer.step, trainer.seconds / 60, mean))
            last_entry, losses = now, []
        if now - last_save > save_every:
            checkpoint(trainer, work)
            draw()
            last_save = last_entry = time.monotonic()
            losses = []
    checkpoint(trainer, work)
    draw()


def checkpoint(trainer: Trainer, work: Path) -> None:
    """Write the checkpoint so that a kill half-way leaves the earlier one."""
    torch.save(trainer.state(), work / "checkpoint.new")
    (work / "checkpoint.new").replace(work / "checkpoint.pt")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="pipeline directory to write; default WORK/pipeline")
    parser.add_argument("--work", type=Path, help="checkpoints and latents; default training/NAME")
    parser.add_argument("--steps", type=int, help="optimiser steps, unless --minutes is given; default the recipe's")
    parser.add_argument("--minutes", type=float, help="train this long instead")
    parser.add_argument("--samples", type=int, help="scenes or clips to draw; default the recipe's")
    parser.add_argument("--autoencoder-steps", type=int, help="default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in WORK")
    parser.add_argument("--export-only", action="store_true", help="write the pipeline of the checkpoint and stop")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between checkpoints and pages")
    options = parser.parse_args(arguments)
    recipe, work = RECIPES[options.name], options.work or Path("training") / options.name
    work.mkdir(parents=True, exist_ok=True)
    samples, steps = options.samples or recipe.samples, options.autoencoder_steps or recipe.autoencoder_steps
    vae, examples = prepare(recipe.source, work, samples, steps, options.seed, options.device)
    trainer = Trainer(recipe, examples, options.seed, options.device)
    if options.resume or options.export_only:
        trainer.restore(torch.load(work / "checkpoint.pt", map_location=options.device))
    budget = Budget(options.steps or recipe.steps, options.minutes)

    def draw() -> None:
        coarse = budget.used(trainer.step, trainer.seconds) < recipe.coarse
        shape = examples.latents["coarse" if coarse else "fine"].shape[1:]
        sheet = contact_sheet(trainer.average, vae, recipe.source.prompts, shape)
        write_page(work / "training.html", options.name, trainer.history, sheet, recipe.source.prompts)

    if not options.export_only:
        with quick_matrix_products():
            train(trainer, budget, work, options.save_every, draw)
    out = options.out or work / "pipeline"
    size = save(trainer.average, vae, out)
    (out / "training.json").write_text(json.dumps({"step, minutes, loss": trainer.history}) + "\n")
    minutes = trainer.seconds / 60
    print(f"step {trainer.step}, {minutes:.0f} minutes of training: {out} ({size / 1e6:.2f} MB of weights)")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # denormal numbers of a young model cost several times the time
    main()
