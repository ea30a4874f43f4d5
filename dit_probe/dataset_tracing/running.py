"""`trace_dataset`: every sample of a data set into a slot of one store, in this process or on a cluster."""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from zarr.storage import MemoryStore

from dit_probe.dataset_tracing import scheduling
from dit_probe.dataset_tracing.filling import Filler, Job, Outcome
from dit_probe.errors import IncompleteWarning, TraceError
from dit_probe.probe import Combination, Probe
from dit_probe.store import LABELS_PER_CHUNK, Room, Status, location

SHOWN = 5
_SHARES = 4  # blocks a worker: the last ones to finish keep the others waiting for a quarter of a share at most


@dataclass(frozen=True)
class Account:
    """What became of every sample; printing it says so in a few lines.

    Attributes:
        store: where, in words.
        done: number of complete samples, of this run and earlier ones.
        failed: sample to the reason why there is nothing of it.
        pending: samples that nobody came to, or whose worker was ended by them.
        made: samples that this run traced.
    """

    store: str
    done: int
    failed: Mapping[int, str]
    pending: tuple[int, ...]
    made: int

    def __str__(self) -> str:
        lines = [f"{self.done} samples done ({self.made} now), {len(self.failed)} failed, {len(self.pending)} pending"]
        lines += [f"  sample {slot}: {reason}" for slot, reason in list(self.failed.items())[:SHOWN]]
        if len(self.failed) > SHOWN:
            lines.append(f"  and {len(self.failed) - SHOWN} more: store.info(…)['failed']")
        return "\n".join([*lines, f"store  {self.store}"])


def trace_dataset(
    load: Callable[[], Any],
    dataset: Sequence[Any],
    probe: Probe | Combination,
    store: Any,
    *,
    batch: int = 1,
    client: Any = None,
    shard: int = 0,
    retry: bool | Sequence[int] = False,
    mode: str | None = None,
    branch: str = "cond",
    progress: bool = True,
    **call: Any,
) -> Account:
    """Trace every sample of a data set into one store; run again, it goes on with what is not done.

    Sample i is slot i. A sample is done when all its records are in the store, and never said to be before. One that
    cannot be traced is noted with the reason, and the next one follows. A done sample is not made again; if the data
    set has a `fingerprint` that the store knows, it is not read again either, else it is compared by a hash of image,
    prompt, concepts, seed, probe and arguments.

    Args:
        load: gives the pipeline; called once in this process, or once on every worker.
        dataset: samples by index: `TraceSample`, or mappings of its fields. `Pictures` makes one of a data set with
            masks. With a client it is sent to every worker once: give one that reads files when it is asked.
        probe: what to record.
        store: a directory, a URL, or a store that Zarr or obstore has.
        batch: samples a call, where they have the same concepts (and for images the same seed and size).
        client: of `dask.distributed`; its workers take blocks of samples. One worker for each GPU.
        shard: samples whose records of one variable share a file, when the store is made; 0: every record has its own.
            A worker holds `shard` samples in memory, and what it did not write when it was killed is traced again.
        retry: True: failed samples are tried once more. Or slots that are made anew, whatever they are.
        mode: None makes a store or goes on with one; "w" overwrites.
        branch: as for `trace`.
        progress: show samples done, the rate and the time left.
        **call: for the pipeline (``num_inference_steps=…``); for samples with an image, for `encode` (``timestep=…``).

    Returns:
        What became of every sample. ``dp.open(store)`` reads them.

    Raises:
        TraceError: no samples, or none of the first ones can be traced.
        StoreError: something else is in the store: another model, probe, arguments or data set; or somebody writes it.
        StoreFault: the store cannot be written any more. What is done stays; run again when there is space.

    Warns:
        IncompleteWarning: at the end, if samples failed.

    Example:
        >>> import dit_probe as dp
        >>> from functools import partial
        >>> load = partial(dp.testing.tiny_pipeline, "flux")
        >>> samples = [{"prompt": "a sun in the sky", "seed": seed} for seed in range(3)]
        >>> probe = dp.Probe(["sun", "sky"], scores=["output"])
        >>> size = {"height": 16, "width": 16, "num_inference_steps": 1}
        >>> print(dp.trace_dataset(load, samples, probe, "run.zarr", progress=False, **size))
        3 samples done (3 now), 0 failed, 0 pending
        store  run.zarr
        >>> dp.trace_dataset(load, samples, probe, "run.zarr", progress=False, **size).made
        0
        >>> dict(dp.open("run.zarr").score_output.sizes)
        {'sample': 3, 'step': 1, 'layer': 3, 'concept': 2, 'image_token': 16}
    """
    total = _check(dataset, batch, shard, mode)
    block = block_size(total, batch, shard, None if client is None else scheduling.workers(client))
    run = uuid.uuid4().hex
    room = Room(store, total, run, block, shard)
    if client is not None and isinstance(room.place.store, MemoryStore):
        raise TraceError("a store in memory is not shared with workers; give a directory or a URL")
    fingerprint = str(getattr(dataset, "fingerprint", ""))
    with room.held(anew=mode == "w") as before:
        known = before is not None and bool(fingerprint) and room.fingerprint == fingerprint
        again = _again(retry, before, total)
        job = Job(load, dataset, Combination(probe), branch, call, batch, not known, again)
        settled = 0 if before is None else int((before.done | (before.failed != "")).sum()) - len(again)
        with (
            tqdm(total=total, initial=settled, unit="sample", disable=not progress) as bar,
            _hands(client, job, room, (room.place, total, run, block, shard), run, bar) as fill,
        ):
            outcomes = _run(fill, room, before, known, again, total)
        failed = {slot: why for outcome in outcomes for slot, why in outcome.failed.items()}
        if not room.exists():
            reasons = [f"sample {slot}: {reason}" for slot, (reason, _) in failed.items()]
            why = reasons[0] if reasons else "each ended its worker"
            raise TraceError(f"no sample could be traced, and there is no store; {why}")
        kept = {slot for outcome in outcomes for slot in outcome.kept}
        for slot in failed.keys() - kept:
            room.fail(slot, *failed[slot])
        if fingerprint and not known:
            room.compared(fingerprint)
        account = _account(room, sum(outcome.made for outcome in outcomes))
    if failed:
        slot, (reason, _) = next(iter(failed.items()))
        warnings.warn(
            f"{len(failed)} of {total} samples failed, first sample {slot}: {reason}. retry=True tries them once more",
            IncompleteWarning,
            stacklevel=2,
        )
    return account


def block_size(total: int, batch: int, shard: int, workers: int | None = None) -> int:
    """Samples whose labels share a chunk, and which one worker takes at a time.

    A thousand blocks are quickly read when a store is opened, and enough for any cluster; a small data set has as many
    as its workers can share.

    Example:
        >>> block_size(500, 1, 0), block_size(10**6, 1, 0), block_size(500, 1, 0, workers=8), block_size(500, 1, 48)
        (64, 1024, 16, 96)
    """
    block = LABELS_PER_CHUNK * min(max(1, -(-total // (1024 * LABELS_PER_CHUNK))), 16)
    if workers is not None:
        block = min(block, max(batch, -(-total // (_SHARES * workers))))
    return shard * -(-block // shard) if shard else block


def _check(dataset: Sequence[Any], batch: int, shard: int, mode: str | None) -> int:
    if not len(dataset):
        raise TraceError("the data set has no samples")
    if batch < 1 or shard < 0:
        raise TraceError(f"batch={batch}, shard={shard}: give a batch of 1 or more, and a shard of 0 or more")
    if mode not in (None, "w"):
        raise TraceError(f"mode={mode!r}: it is None (make or go on) or 'w' (overwrite)")
    return len(dataset)


def _again(retry: bool | Sequence[int], before: Status | None, total: int) -> frozenset[int]:
    """Slots that are made although they are settled."""
    if before is None or retry is False:
        return frozenset()
    if retry is True:
        return frozenset(slot for slot, why in enumerate(before.failed.tolist()) if why and not before.done[slot])
    if wrong := [slot for slot in retry if not 0 <= slot < total]:
        raise TraceError(f"retry has {wrong[0]}, but samples are 0 to {total - 1}")
    return frozenset(slot for slot in retry if before.done[slot] or before.failed[slot])


_Fill = Callable[[Sequence[Sequence[int]]], Iterator[Outcome]]


@contextlib.contextmanager
def _hands(client: Any, job: Job, room: Room, arguments: tuple[Any, ...], run: str, bar: Any) -> Iterator[_Fill]:
    """What fills blocks and gives their outcomes: this process, or the workers of a client."""
    if client is None:
        filler = Filler(job, room, bar.update)
        yield lambda blocks: map(filler.fill, blocks)
        return
    crew = scheduling.Crew(client, job, arguments, run)

    def fill(blocks: Sequence[Sequence[int]]) -> Iterator[Outcome]:
        for block, outcome in crew.fill(blocks):
            if outcome is None:
                warnings.warn(
                    f"samples {block[0]}-{block[-1]} ended every worker that they were given to, and stay pending",
                    IncompleteWarning,
                    stacklevel=2,
                )
                continue
            bar.update(outcome.made + len(outcome.failed))
            yield outcome

    try:
        yield fill
    finally:
        crew.close()


def _run(
    fill: _Fill, room: Room, before: Status | None, known: bool, again: frozenset[int], total: int
) -> list[Outcome]:
    """The first sample that works makes the store, alone; then blocks side by side."""
    outcomes, start = list[Outcome](), 0
    while not room.exists() and start < total:
        outcomes += fill([[start]])
        start += 1
    if not room.exists():
        return outcomes
    blocks = [range(max(first, start), min(first + room.block, total)) for first in range(0, total, room.block)]
    if known and before is not None:
        settled = before.done | (before.failed != "")
        blocks = [block for block in blocks if not all(settled[slot] and slot not in again for slot in block)]
    return [*outcomes, *fill([block for block in blocks if block])]


def _account(room: Room, made: int) -> Account:
    status = room.status()
    failed = {slot: why for slot, why in enumerate(status.failed.tolist()) if why and not status.done[slot]}
    pending = tuple(slot for slot, done in enumerate(status.done.tolist()) if not done and slot not in failed)
    return Account(location.text(room.place), int(status.done.sum()), failed, pending, made)
