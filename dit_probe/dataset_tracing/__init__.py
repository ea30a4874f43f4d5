"""Data sets, traced: every sample a slot of one store, by one process or a cluster, continued after any end.

    dp.trace_dataset(load, samples, probe, "run.zarr", batch=4)

The work is cut into blocks of adjacent samples whose chunks no other block shares; a block is an idempotent task. What
is in the store decides what is left to do, so that there is nothing else to keep, and nothing to lose.
"""

from dit_probe.dataset_tracing.pricing import DatasetPlan, plan_dataset
from dit_probe.dataset_tracing.running import Account, trace_dataset
from dit_probe.dataset_tracing.samples import Pictures, PromptFile, TraceSample

__all__ = ["Account", "DatasetPlan", "Pictures", "PromptFile", "TraceSample", "plan_dataset", "trace_dataset"]
