"""What a run costs, before it starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import xarray as xr

from dit_probe.datasets.samples import Dataset
from dit_probe.evaluation import results
from dit_probe.evaluation.results import IMAGES_PER_CHUNK, Method
from dit_probe.evaluation.running import check, score_image, with_words
from dit_probe.protocols import Protocol
from dit_probe.schema import human
from dit_probe.tabular import Table, Tabular


@dataclass(frozen=True)
class Plan(Tabular):
    """The price of a run, before it starts; printing it shows the table.

    Attributes:
        dataset: its name.
        images: of the whole run.
        measured: the first so many of them, which the price was measured on.
        first: method to seconds of its first call, which may load and compile.
        later: method to seconds of each later call, their median; of the first, if it was the only one; NaN if the
            pictures had no words to ask for.
        rest: seconds an image takes beside the methods: to read, to score all its maps, to store in memory.
        failed: method to reason, of those that gave no number for an image; the others' scoring is in the price.
        nbytes: of the store, an upper bound, as its numbers are compressed.
        memory: bytes by which the process's highest resident memory grew, and the run's table; not a GPU's.
    """

    dataset: str
    images: int
    measured: int
    first: Mapping[str, float]
    later: Mapping[str, float]
    rest: float
    failed: Mapping[str, str]
    nbytes: int
    memory: int

    def seconds(self, method: str) -> float:
        """Of a method on all images."""
        return self.first[method] + (self.images - 1) * self.later[method]

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return sum(map(self.seconds, self.first)) + self.images * self.rest

    def _table(self) -> Table:
        rows: list[tuple[str, ...]] = [("method", "first call", "each later", "all images")]
        for name, first in self.first.items():
            rows.append((name, *map(_duration, (first, self.later[name], self.seconds(name)))))
        rows.append(("(read, score, store)", "", _duration(self.rest), _duration(self.images * self.rest)))
        rows.append(("(the run)", "", "", _duration(self.total)))
        lines = [f"store: at most {human(self.nbytes)}, before compression"]
        lines.append(f"memory: {human(self.memory)} more than the process has needed so far, a GPU's not counted")
        lines += [f"failed: {name}, {reason}" for name, reason in self.failed.items()]
        return Table(rows, f"{self.images} images of {self.dataset}, from the first {self.measured}", lines)


def plan(
    methods: Mapping[str, Method],
    dataset: Dataset,
    protocol: str | Protocol = "native",
    *,
    concepts: Sequence[str] | None = None,
    images: int = 2,
) -> Plan:
    """Price `evaluate` by running it on the first few images, with no number kept.

    Args:
        methods: as for `evaluate`, as are `dataset`, `protocol` and `concepts`.
        dataset: of which the run takes all: give a `Part` for less.
        protocol: a name, or a `Protocol`.
        concepts: instead of the protocol's background words.
        images: how many to run on. With 1, the first call, which may load and compile, stands for all.

    Raises:
        EvaluationError: no methods or images, or two images of one name. What a method raises stands in the plan.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> from dit_probe.methods import noise
        >>> price = plan({"noise": noise(0)}, PictureBook(930))
        >>> price.images, price.measured, price.failed, price.total > price.seconds("noise") > 0
        (930, 2, {}, True)
    """
    protocol = with_words(protocol, concepts)
    measured = min(images, len(dataset))
    check(methods, dataset, protocol, measured)
    timed = {name: _Timed(method) for name, method in methods.items()}
    table = results.empty(timed, dataset, protocol)
    stored = results.opened(None, table, resume=False)
    before, rest = _peak(), []
    for at in range(measured):
        start, before_it = perf_counter(), sum(sum(method.seconds) for method in timed.values())
        score_image(timed, dataset, protocol, table, at)
        asked = sum(sum(method.seconds) for method in timed.values()) - before_it
        rest.append(perf_counter() - start - asked)
    start = perf_counter()
    results.write(*stored, table, range(measured))  # a run writes many pictures at once, too
    written = (perf_counter() - start) / measured
    grown = max(0, _peak() - before)
    calls = {name: method.seconds or [np.nan] for name, method in timed.items()}
    reasons = {name: [text for text in row if text] for name, row in zip(timed, table.failed.values, strict=True)}
    return Plan(
        dataset=dataset.name,
        images=len(dataset),
        measured=measured,
        first={name: seconds[0] for name, seconds in calls.items()},
        later={name: median(seconds[1:] or seconds) for name, seconds in calls.items()},
        rest=median(rest[1:] or rest) + written,
        failed={name: texts[0] for name, texts in reasons.items() if texts},
        nbytes=_nbytes(table, measured),
        memory=grown + table.nbytes,
    )


class _Timed:
    """A method and how long its calls took."""

    def __init__(self, method: Method) -> None:
        self.method, self.seconds = method, list[float]()
        self.class_agnostic = getattr(method, "class_agnostic", False)

    def __call__(self, images: list[np.ndarray], concepts: list[str]) -> xr.DataArray:
        start = perf_counter()
        try:
            return self.method(images, concepts)
        finally:
            self.seconds.append(perf_counter() - start)


def _nbytes(table: xr.Dataset, measured: int) -> int:
    """Of a store before compression; texts as long as those of the measured images."""
    total, chunk = 0.0, min(IMAGES_PER_CHUNK, table.sizes["image"])
    for variable in table.variables.values():
        each = float(variable.dtype.itemsize)
        if variable.dtype.kind in "OUT":
            known = variable.isel(image=slice(measured), missing_dims="ignore").values.flat
            each = float(np.mean([4 + len(str(text).encode()) for text in known]))
        whole = dict(variable.sizes)
        if "image" in whole:  # the last chunk is as long as the others
            whole["image"] += -whole["image"] % chunk
        total += each * np.prod(list(whole.values()))
    return int(total)


def _peak() -> int:
    """The highest resident memory of this process so far, in bytes; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _duration(seconds: float) -> str:
    if not seconds >= 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
