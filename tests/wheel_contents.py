"""Looks into a built wheel: both packages, the demo models with their weights, and a size that is pleasant to install.

python tests/wheel_contents.py dist/*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LARGEST = 28e6
"""Bytes: the demo models may be 24 MB together, and the code is small."""

EXPECTED = (
    "dit_probe/__init__.py",
    "dit_probe/cli/__init__.py",
    "dit_probe/explore/assets/explorer.css",
    "dit_probe/explore/assets/page.js",
    "probes/__init__.py",
    "probes/concept_attention.py",
    "probes/baselines/vit.py",
)


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = [f"{name} is missing" for name in EXPECTED if name not in names]
    models = sorted(file.parent for file in Path("dit_probe/demo").glob("*/model_index.json"))
    if not models:
        found.append("there is no demo model to look for")
    files = [file.as_posix() for model in models for file in model.rglob("*") if file.is_file()]
    found += [f"{file} is missing" for file in files if file not in names]
    if any(name.startswith(("tests/", "benchmarks/", "tutorials/")) for name in names):
        found.append("tests, benchmarks or tutorials are in the wheel")
    size = wheel.stat().st_size
    if size > LARGEST:
        found.append(f"{size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f} MB")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = complaints(path)
    for sentence in found:
        print(f"{path.name}: {sentence}", file=sys.stderr)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    sys.exit(1 if found else 0)
