"""Is ``import dit_probe`` light? Its time over that of the libraries it cannot do without, measured in one run.

    python benchmarks/import_time.py

Names of the package load on first use, so the import is measured bare and with the names that a first trace needs.
The imports alternate in fresh interpreters and the fastest of each counts, so that a busy machine slows both.
Budget: a ratio of 1.3.
"""

from __future__ import annotations

import subprocess
import sys
import time

ROUNDS = 7
BUDGET = 1.3
BASE = "import torch, xarray, zarr"
OURS = ("import dit_probe", "import dit_probe as dp; dp.trace, dp.open, dp.maps, dp.Probe")


def seconds(statement: str) -> float:
    """Wall time of one fresh interpreter that runs the statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> int:
    for statement in (BASE, *OURS):
        seconds(statement)  # files into the page cache
    rounds = [[seconds(statement) for statement in (BASE, *OURS)] for _ in range(ROUNDS)]
    base, *ours = (min(column) for column in zip(*rounds, strict=True))
    print(f"{base:.2f} s  {BASE}")
    for statement, time_taken in zip(OURS, ours, strict=True):
        print(f"{time_taken:.2f} s  {statement}: ratio {time_taken / base:.2f} (budget {BUDGET})")
    return 0 if max(ours) <= BUDGET * base else 1


if __name__ == "__main__":
    sys.exit(main())
