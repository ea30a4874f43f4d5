"""Looks into a built wheel: both packages, the demo model with its weights, and a size that is pleasant to install.

python tests/wheel_contents.py dist/*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LARGEST = 12e6
"""Bytes: the demo model may be 8 MB, and the code is small."""

EXPECTED = (
    "dit_probe/__init__.py",
    "dit_probe/cli.py",
    "probes/__init__.py",
    "probes/concept_attention.py",
    "dit_probe/demo/flux-picturebook/model_index.json",
    "dit_probe/demo/flux-picturebook/transformer/config.json",
    "dit_probe/demo/flux-picturebook/text_encoder_2/config.json",
    "dit_probe/demo/flux-picturebook/vae/config.json",
)


def complaints(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = [f"{name} is missing" for name in EXPECTED if name not in names]
    weights = [name for name in names if name.startswith("dit_probe/demo/") and name.endswith(".safetensors")]
    if not weights:
        found.append("no .safetensors under dit_probe/demo")
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
