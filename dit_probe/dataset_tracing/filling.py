"""One process that fills slots: it has the model, and traces what of its block is not done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_probe.dataset_tracing.samples import TraceSample, as_sample, content, with_concepts
from dit_probe.encoding import encode
from dit_probe.errors import StoreError, StoreFault, TraceError
from dit_probe.probe import Combination
from dit_probe.store import Room
from dit_probe.tracing import trace

PATIENCE = 10
"""Samples that may fail before the first that works: then it is not the samples."""
REASON = 400
"""Characters of a reason that are kept."""

# What a device says when nothing will run on it any more; torch has a name for it since 2.8.
_DEVICE: Any = getattr(torch, "AcceleratorError", ())


@dataclass(frozen=True)
class Job:
    """What is to be done, as every process gets it.

    Attributes:
        load: gives the pipeline.
        dataset: the samples.
        probes: what is recorded.
        branch, call: as `trace_dataset` says.
        batch: samples a call.
        compare: read samples that are done, and refuse those that are others now.
        retry: slots that are made although they failed, or are done.
    """

    load: Callable[[], Any]
    dataset: Sequence[Any]
    probes: Combination
    branch: str
    call: Mapping[str, Any]
    batch: int
    compare: bool
    retry: Collection[int]


@dataclass
class Outcome:
    """What became of some slots.

    Attributes:
        made: samples that were traced.
        failed: slot to reason and hash.
        kept: the failures that the store says, too.
    """

    made: int = 0
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)


_Group = list[tuple[int, TraceSample, str]]


class Filler:
    """A process's own model and its way into the store.

    Args:
        job: what is to be done.
        room: the store.
        tell: called with the number of samples whenever some are made or have failed.
    """

    def __init__(self, job: Job, room: Room, tell: Callable[[int], object] = lambda count: None) -> None:
        self._job, self._room, self._tell = job, room, tell
        self._pipe: Any = None
        self._fits = False
        self._misses = 0

    def fill(self, slots: Sequence[int]) -> Outcome:
        """Trace what is not done among adjacent slots; a sample that cannot be traced does not stop the others.

        Raises:
            StoreFault: the store cannot be written.
            StoreError: a sample is done, and is another one now.
            TraceError: of the first `PATIENCE` samples none could be traced.
        """
        outcome = Outcome()
        try:
            for group in self._groups(slots, outcome):
                self._attempt(group, outcome)
                if self._room.shard and self._ends_shard(group[-1][0], slots):
                    self._room.flush()
        finally:
            if self._room.exists():
                self._room.flush()
        return outcome

    def _ends_shard(self, slot: int, slots: Sequence[int]) -> bool:
        return (slot + 1) % self._room.shard == 0 or slot == slots[-1]

    def _groups(self, slots: Sequence[int], outcome: Outcome) -> Iterator[_Group]:
        """Samples that share a call: adjacent, and alike in what a call has once."""
        job, group = self._job, _Group()
        for slot, kept in zip(slots, self._status(slots), strict=True):
            done, failed, before = kept
            again = slot in job.retry
            if not again and (failed or (done and not job.compare)):
                continue
            try:
                sample = as_sample(job.dataset[slot])
                found = content(sample, job.probes, job.branch, job.call)
            except Exception as error:
                self._fail(slot, error, "", outcome)
                continue
            if done and not again:
                if found != before:
                    raise StoreError(
                        f"sample {slot} ({sample.prompt!r}) is another one than the store has, or is asked for with "
                        "another probe or other arguments. Use another path, or mode='w' to overwrite it."
                    )
                continue
            if done:
                self._room.reopen(slot)
            if group and (len(group) == job.batch or not self._together(group, slot, sample)):
                yield group
                group = _Group()
            group.append((slot, sample, found))
        if group:
            yield group

    def _status(self, slots: Sequence[int]) -> Iterator[tuple[bool, str, str]]:
        if not self._room.exists():
            return iter([(False, "", "")] * len(slots))
        status = self._room.status(slice(slots[0], slots[-1] + 1))
        return zip(status.done.tolist(), status.failed.tolist(), status.content.tolist(), strict=True)

    def _together(self, group: _Group, slot: int, sample: TraceSample) -> bool:
        last, first = group[-1][0], group[0][1]
        same_file = not self._room.shard or last // self._room.shard == slot // self._room.shard
        return same_file and _shared(first) == _shared(sample)

    def _attempt(self, group: _Group, outcome: Outcome) -> None:
        if self._pipe is None:
            self._pipe = self._job.load()
            self._pipe.set_progress_bar_config(disable=True)
        try:
            self._trace(group)
        except Exception as error:
            if isinstance(error, (StoreFault, _DEVICE)):
                raise
            if len(group) == 1:
                self._fail(group[0][0], error, group[0][2], outcome)
            else:
                for one in group:  # to see whose fault it is
                    self._attempt([one], outcome)
            return
        self._fits = True
        outcome.made += len(group)
        self._tell(len(group))

    def _trace(self, group: _Group) -> None:
        job, pipe, first = self._job, self._pipe, group[0][1]
        one = len(group) == 1
        prompts = first.prompt if one else [sample.prompt for _, sample, _ in group]
        target = self._room.reserve({slot: found for slot, _, found in group})
        verify = None if self._fits else "first"
        probes = with_concepts(job.probes, first.concepts)
        with trace(pipe, probes, store=target, branch=job.branch, verify=verify, progress=False):
            if first.image is not None:
                pictures = [list(s.image) if s.image.ndim == 4 else s.image for _, s, _ in group if s.image is not None]
                encode(pipe, pictures, prompts, seed=first.seed, **job.call)
            else:
                noise = [torch.Generator().manual_seed(sample.seed) for _, sample, _ in group]
                pipe(prompt=prompts, generator=noise[0] if one else noise, **job.call)

    def _fail(self, slot: int, error: Exception, found: str, outcome: Outcome) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:REASON]
        outcome.failed[slot] = reason, found
        if self._fits:
            self._room.fail(slot, reason, found)
            outcome.kept.add(slot)
        else:
            self._misses += 1
            if self._misses >= PATIENCE:
                raise TraceError(
                    f"none of the first {self._misses} samples could be traced, so it is hardly the samples; the last "
                    f"was {slot}: {error}"
                ) from error
        self._tell(1)


def _shared(sample: TraceSample) -> tuple[Any, ...]:
    """What the samples of one call share; `encode` has one seed for all, and pictures of one size."""
    return sample.concepts, *(() if sample.image is None else (sample.seed, sample.image.shape))
