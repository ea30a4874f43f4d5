"""A data set of a few prompts, traced by a model so small that a sample costs a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xarray as xr

import dit_probe as dp
from dit_probe import testing

PROBE = dp.Probe(["sun", "sky"], record=["o_c"], scores=["output"], layers=[0, 1])
CALL = {"height": 16, "width": 16, "num_inference_steps": 1}


def load() -> Any:
    return testing.tiny_pipeline("flux")


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"a sun {'and a boat ' * (seed % 2)}in the sky", "seed": seed} for seed in range(count)]


class Broken(list[Any]):
    """Samples some of which cannot be read."""

    def __init__(self, count: int, *broken: int) -> None:
        super().__init__(prompts(count))
        self.broken = broken

    def __getitem__(self, index: Any) -> Any:
        if index in self.broken:
            raise OSError(f"file {index} is gone")
        return super().__getitem__(index)


def traced(pipe: Any, dataset: Any, store: Any, **options: Any) -> Any:
    options = {"progress": False, **CALL, **options}
    return dp.trace_dataset(lambda: pipe, dataset, options.pop("probe", PROBE), store, **options)


def bits(store: Path | Any) -> dict[str, Any]:
    """All that a store says of its samples, by name."""
    ds = dp.open(store) if not isinstance(store, xr.Dataset) else store
    return {
        str(name): array.values.tobytes() if array.dtype != object else array.values.tolist()
        for name, array in ds.variables.items()
    }
