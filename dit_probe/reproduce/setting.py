"""What a study runs on: a pipeline, pictures to choose on and pictures to report, and a folder for the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xarray as xr

from dit_probe import anatomy, methods, protocols
from dit_probe.datasets.opening import DRAWN, open_dataset
from dit_probe.datasets.samples import Dataset, Part, split
from dit_probe.evaluation import Method, evaluate
from dit_probe.protocols import EvaluationError, Protocol
from dit_probe.reproduce.printed import Kind

CHOOSING_SEED = 8
"""Of the drawn pictures that hyper-parameters are chosen on; another than that of the reported ones."""
CHOOSING_SHARE = 0.1
"""Of a data set of files, the share of pictures that hyper-parameters are chosen on; they are not reported."""
PAPER_LAST = 10 / 19
"""Share of the joint layers that the paper averages: "the last 10 of the 19"."""


@dataclass(frozen=True)
class Source:
    """A data set, split into pictures to choose on and pictures to report.

    Attributes:
        kind: which printed columns it has.
        choosing: pictures that hyper-parameters are chosen on.
        reported: the others.
        drawn: are these picture-book scenes, standing in for a data set?
    """

    kind: Kind
    choosing: Dataset
    reported: Dataset
    drawn: bool

    def protocol(self, name: str) -> Protocol:
        """A protocol by its name; drawn pictures and their masks keep their size, which no paper says anything of."""
        found = protocols.find(name)
        return replace(found, image_size=None, mask_size=None) if self.drawn else found


def source(place: str, *, several: bool, count: int, **options: Any) -> Source:
    """Open a data set of pictures of one class, or of several.

    Args:
        place: as for `dit_probe.datasets.opening.open_dataset`.
        several: all pictures; else, of drawn scenes and PascalVOC, those with one class. Others are taken whole.
        count: of reported pictures; drawn ones to choose on are a third of it. Of files, the first so many are taken.
        **options: for `open_dataset`.
    """
    if place in DRAWN:
        objects = None if several else 1
        drawn = [
            open_dataset(place, count=number, seed=seed, objects=objects)
            for number, seed in ((max(1, count // 3), CHOOSING_SEED), (count, 7))
        ]
        return Source("other", *drawn, drawn=True)
    whole = open_dataset(place, subset=None if several else "single_class", **options)
    kind: Kind = "other"
    if whole.name.startswith("imagenet"):
        kind = "imagenet"
    elif whole.name.startswith("voc"):
        kind = "voc_multi" if several else "voc"
    choosing, reported = split(whole, CHOOSING_SHARE)
    return Source(kind, choosing, Part(reported, range(min(count, len(reported))), reported.name), drawn=False)


@dataclass(frozen=True)
class Setting:
    """What a study runs on.

    Attributes:
        pipe: the pipeline.
        single: pictures of one class each, by the place they come from.
        several: pictures of any number of classes, likewise.
        folder: where numbers are kept: a store for every set of rows, continued when it is there.
        progress: show bars.
        baselines: loaded models by the name of their `dit_probe.methods.Host`; each gives rows of Tables 1 to 3.
        text: for the pipeline's ``encode_prompt``.
    """

    pipe: Any = field(repr=False)
    single: Sequence[Source]
    several: Sequence[Source]
    folder: Path
    progress: bool = True
    baselines: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)

    def passes(self, pipe: Any = None, **options: Any) -> methods.Passes:
        """Traced passes of the pipeline or another."""
        return methods.Passes(pipe or self.pipe, **self.text, **options)

    def evaluate(
        self, name: str, rows: Mapping[str, Method], dataset: Dataset, protocol: Protocol, **options: Any
    ) -> xr.Dataset:
        """Score rows on pictures, or read them from the folder; studies that share rows give them one name."""
        store = str(self.kept(name, dataset, "zarr"))
        return evaluate(rows, dataset, protocol, store=store, progress=self.progress, **options)

    def kept(self, name: str, dataset: Dataset, suffix: str) -> Path:
        """Where the numbers of some rows on a data set are kept."""
        return self.folder / f"{name}-{dataset.name}.{suffix}".replace("/", "-")

    @cached_property
    def joint(self) -> int:
        """How many joint layers the model has."""
        model = anatomy.transformer_of(self.pipe)
        found = sum(block.kind == "joint" for block in anatomy.find(self.pipe).blocks(model))
        if not found:
            raise EvaluationError(f"{type(model).__name__} has no joint blocks, and the paper is about those")
        return found

    @property
    def last(self) -> tuple[int, ...]:
        """The layers at the depth of the paper's last 10 of 19."""
        return tuple(range(self.joint - max(1, round(PAPER_LAST * self.joint)), self.joint))

    @cached_property
    def twin(self) -> Any:
        """The pipeline with random weights."""
        return methods.random_twin(self.pipe)

    def others(self) -> dict[str, methods.Baseline]:
        """Rows of other people's methods, "method | host": on the pipeline itself and on the `baselines`."""
        known = methods.hosts()
        if unknown := [name for name in self.baselines if name not in known]:
            raise EvaluationError(f"no methods run on {unknown[0]!r}: there are {', '.join(known)}")
        found = {name: host.rows(self.pipe, text=self.text) for name, host in known.items() if host.load is None}
        found |= {name: known[name].rows(model) for name, model in self.baselines.items()}
        return {f"{method} | {name}": row for name, rows in found.items() for method, row in rows.items()}

    def trivial(self) -> dict[str, Method]:
        """The rows without which a table cannot be read: the model with random weights, and maps of nothing."""
        twin = self.passes(self.twin).method("output", layers=self.last)
        return {"random weights": twin, **methods.trivial_rows()}
