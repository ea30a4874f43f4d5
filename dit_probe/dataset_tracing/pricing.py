"""What a data set will cost, from a few samples of it that are traced and thrown away."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from dit_probe import schema, store
from dit_probe.dataset_tracing.running import block_size, trace_dataset
from dit_probe.errors import TraceError
from dit_probe.probe import Combination, Probe
from dit_probe.store import LABELS_PER_CHUNK
from dit_probe.store.writer import LABELS


@dataclass(frozen=True)
class DatasetPlan:
    """Bytes, files and time of a data set; printing it shows them.

    Attributes:
        samples: of the data set.
        measured: samples that were traced.
        seconds: a sample, on one device: the median of the calls after the first, pipeline and store.
        nbytes: a sample, in the store after compression.
        records: files a sample without shards.
        variables: files of one shard.
        shard: samples a shard; 0: none.
    """

    samples: int
    measured: int
    seconds: float
    nbytes: float
    records: int
    variables: int
    shard: int

    @property
    def files(self) -> int:
        """Of the whole store, but for a few of metadata."""
        block = block_size(self.samples, 1, self.shard)
        own = -(-self.samples // self.shard) * self.variables if self.shard else self.samples * self.records
        tokens = -(-self.samples // math.gcd(block, LABELS_PER_CHUNK))
        return own + tokens + (len(LABELS) - 1) * -(-self.samples // block)

    @property
    def device_hours(self) -> float:
        """Of all samples, one after the other."""
        return self.samples * self.seconds / 3600

    def __str__(self) -> str:
        rows = [
            f"{self.samples} samples, from {self.measured} that were traced here",
            f"bytes         {schema.human(self.samples * self.nbytes)} ({schema.human(self.nbytes)} a sample)",
            f"files         {self.files} ({f'{self.shard} samples a shard' if self.shard else 'no shards'})",
            f"seconds       {self.samples * self.seconds:.3g} ({self.seconds:.3g} a sample)",
            f"device-hours  {self.device_hours:.3g}; on n devices, this by n hours",
        ]
        return "\n".join(rows)


def plan_dataset(
    load: Callable[[], Any],
    dataset: Sequence[Any],
    probe: Probe | Combination,
    *,
    samples: int | None = None,
    measure: int = 3,
    batch: int = 1,
    shard: int = 0,
    branch: str = "cond",
    **call: Any,
) -> DatasetPlan:
    """Trace the first samples into a directory that is deleted afterwards, and say what all of them will cost.

    Args:
        load: as for `trace_dataset`; so are `dataset`, `probe`, `batch`, `shard`, `branch` and `call`.
        dataset: of any length from `measure` batches on.
        probe: what to record.
        samples: how many there will be; None: as many as the data set has.
        measure: batches that are traced; the first one, which warms up, is not counted if there are more.
        batch: samples a call.
        shard: samples a file.
        branch: as for `trace`.
        **call: for the pipeline, or `encode`.

    Raises:
        TraceError: as `trace_dataset`, or none of the samples could be traced.

    Example:
        >>> import dit_probe as dp
        >>> load = lambda: dp.testing.tiny_pipeline("flux")
        >>> dataset = [{"prompt": "a sun"}] * 3
        >>> probe = dp.Probe(["sun", "sky"], scores=["output"])
        >>> call = {"height": 16, "width": 16, "num_inference_steps": 1}
        >>> plan = dp.dataset_tracing.plan_dataset(load, dataset, probe, samples=10**6, shard=64, **call)
        >>> plan.samples, plan.records, plan.files, plan.device_hours > 0
        (1000000, 4, 52737, True)
    """
    total = len(dataset) if samples is None else samples
    pipe = load()
    with tempfile.TemporaryDirectory() as folder:
        path, seconds, count = Path(folder, "run.zarr"), list[float](), 0
        for first in range(0, min(measure * batch, len(dataset)), batch):
            part = [dataset[slot] for slot in range(min(first + batch, len(dataset)))]
            start = perf_counter()
            account = trace_dataset(lambda: pipe, part, probe, path, batch=batch, branch=branch, progress=False, **call)
            count = account.done
            seconds += [(perf_counter() - start) / account.made] if account.made else []
        if not count:
            raise TraceError("nothing to measure: the data set has no samples")
        facts = store.info(path)
    layered = [variable for variable in facts["variables"].values() if "layers" in variable]
    branches = facts["sizes"].get("branch", 1)
    return DatasetPlan(
        samples=total,
        measured=count,
        seconds=median(seconds[1:] or seconds),
        nbytes=sum(variable["bytes"] for variable in facts["variables"].values()) / count,
        records=sum(branches * len(variable["layers"]) * len(variable["steps"]) for variable in layered)
        + (len(facts["variables"]) - len(layered)),
        variables=len(facts["variables"]),
        shard=shard,
    )
