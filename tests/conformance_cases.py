"""One tiny model of every family, variant, batch and precision, traced once for all the oracles that look at it."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import dit_probe as dp
from dit_probe import anatomy, stream, testing

SIZES = {
    "one": (1, torch.float32),
    "two": (2, torch.float32),
    "two in bfloat16": (2, torch.bfloat16),
    "one in float16": (1, torch.float16),
}
WITH_CONCEPTS = testing.cases(concepts=True)
# In this order, so that pytest keeps the tests of one subject together whichever list they are taken from.
CASES = [*WITH_CONCEPTS, *(case for case in testing.cases() if case not in WITH_CONCEPTS)]
# The last variant of every family is the one in float16.
IN_FLOAT16 = dict(CASES).items()
VECTORS = dp.schema.VECTORS
RECORD = (*VECTORS, *dp.schema.RESIDUALS, *(f"{letter}_{token}_unrotated" for letter in "qk" for token in "xpc"))


@dataclass(frozen=True)
class Run:
    """Outputs before, during and after a trace, what it recorded, and what it left hooked."""

    before: torch.Tensor
    during: torch.Tensor
    after: torch.Tensor
    ds: Any
    leftovers: list[str]


@torch.no_grad()
def predict(tiny: testing.TinyModel) -> torch.Tensor:
    output = tiny.transformer(**tiny.inputs)[0]
    return torch.stack(output) if isinstance(output, list) else output


class Subject:
    """A tiny model and what oracles compare of it. No test changes the model; what is cached here is shared."""

    def __init__(self, case: tuple[str, str], batch: int = 2, dtype: torch.dtype = torch.float32):
        self.case, self.batch, self.dtype = case, batch, dtype
        self.tiny = testing.tiny_model(*case, batch=batch, dtype=dtype)
        self.model: Any = self.tiny.transformer
        self.family = anatomy.find(self.model)
        self.blocks = self.family.blocks(self.model)
        # Rows with the same concepts.
        self.concepts = self.tiny.concepts.expand(batch, -1, -1)
        self.words = [f"concept {index}" for index in range(len(self.tiny.concepts))]

    def predict(self) -> torch.Tensor:
        return predict(self.tiny)

    def probe(self, **options) -> dp.Probe:
        """A probe with concepts, in single-stream blocks too."""
        return dp.Probe(self.words, **{"layers": "all", "through": "all", **options})

    def trace(self, probe, concepts=None, **options):
        concepts = self.tiny.concepts if concepts is None else concepts
        with torch.no_grad(), dp.trace(self.model, probe, concepts=concepts, progress=False, **options) as run:
            output = self.predict()
        # Chunks are as many as they are small; threads would only cost.
        return output, run.dataset.load(scheduler="synchronous")

    @functools.cached_property
    def run(self) -> Run:
        if self.family.no_concepts:
            probe = dp.Probe(record=[name for name in RECORD if dp.schema.stream(name) != "c"], layers="all")
        else:
            probe = self.probe(record=RECORD, scores=dp.schema.SPACES)
        before = self.predict()
        during, ds = self.trace(probe)
        return Run(before, during, self.predict(), ds, testing.leftovers(self.model))

    @property
    def ds(self):
        """What `run` recorded of its one step."""
        return self.run.ds.isel(step=0)

    @functools.cached_property
    def calls(self) -> dict[int, tuple[stream.BlockCall, Any]]:
        """Call and output of every block in one forward, by layer."""
        return self.watch(self.predict)

    def watch(self, predict) -> dict[int, tuple[stream.BlockCall, Any]]:
        found = {}
        with (
            torch.no_grad(),
            testing.watched(self.model, lambda call, output: found.update({call.block.layer: (call, output)})),
        ):
            predict()
        return found

    def entering(self, change: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and prompt stream before the first block, when something is added to the latents."""
        latents = next(name for name in inspect.signature(type(self.model).forward).parameters if name != "self")
        value = self.tiny.inputs[latents]
        changed = tuple(part + change for part in value) if isinstance(value, tuple) else value + change
        call, _ = self.watch(lambda: self.model(**{**self.tiny.inputs, latents: changed}))[0]
        return call.x, call.p

    @functools.cached_property
    def clamped(self) -> dict[int, dict[str, torch.Tensor]]:
        """What the model itself makes of the concepts, by layer."""
        return testing.clamped(self.model, self.tiny.inputs, self.concepts)


@functools.lru_cache(maxsize=8)
def subject_of(case: tuple[str, str], size: str = "two") -> Subject:
    return Subject(case, *SIZES[size])


def limit(dtype: torch.dtype) -> float:
    return stream.tolerance(dtype)


def close(found, expected, dtype=torch.float32) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= limit(dtype) * np.abs(expected).max()


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
