"""What a call costs: seconds, and bytes of the tensors that are alive at its worst moment."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a call costs.

    Attributes:
        seconds: median.
        memory: bytes of tensors that the call makes and that live at the same time, at most. What was there before it,
            the weights among it, does not count.
    """

    seconds: float
    memory: int

    def __truediv__(self, unit: Cost) -> tuple[float, float]:
        """Seconds and memory in units of another call's."""
        return self.seconds / unit.seconds, self.memory / unit.memory if unit.memory else float("nan")


def costs(calls: Mapping[str, Callable[[], object]], repeats: int = 3) -> dict[str, Cost]:
    """Time calls and weigh their tensors: each once to warm up, once to weigh, then in turns by the clock.

    In turns, so that whatever else the machine does falls on all of them. On a CUDA device memory is what its allocator
    counts. On the CPU, which has no such count, every tensor is followed from the operation that makes it to its end;
    buffers inside an operation are not seen.

    Args:
        calls: what to measure; each has to do the same work every time, so nothing that keeps its last result.
        repeats: how many times each is timed.

    Example:
        >>> import torch
        >>> x = torch.zeros(1000)
        >>> found = costs({"sum": lambda: x + 1, "both": lambda: (x + 1) * 2})
        >>> found["sum"].memory, found["both"].memory  # 4 bytes x 1000; at the second operation there are two of them
        (4000, 8000)
    """
    import torch

    def run(call: Callable[[], object]) -> float:
        began = perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return perf_counter() - began

    for call in calls.values():
        call()
    memory = {name: _peak(call) for name, call in calls.items()}
    times = [{name: run(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: Cost(median(each[name] for each in times), memory[name]) for name in calls}


def _peak(call: Callable[[], object]) -> int:
    """Bytes of tensors that a call makes and that are alive at the same time, at most."""
    import torch

    if not torch.cuda.is_initialized():
        return _followed(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _followed(call: Callable[[], object]) -> int:
    """The same on the CPU: storages are counted from the operation that returns them to their end."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def storages(values: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]

    known: set[int] = set()
    alive = peak = 0

    def gone(storage: int, size: int) -> None:
        nonlocal alive
        known.discard(storage)
        alive -= size

    class Weighed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal alive, peak
            given = {id(storage) for storage in storages((args, kwargs))}
            found = func(*args, **(kwargs or {}))
            for storage in storages(found):
                if id(storage) in known or id(storage) in given:  # a view, or an operation in place
                    continue
                known.add(id(storage))
                alive += storage.nbytes()
                weakref.finalize(storage, gone, id(storage), storage.nbytes())
            peak = max(peak, alive)
            return found

    with Weighed():
        call()
    return peak
