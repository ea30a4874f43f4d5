"""Run every oracle on the tiny models of every family, and write the table of the documentation.

    python benchmarks/conformance.py            # with the newest diffusers
    python benchmarks/conformance.py            # and again in an environment with the oldest one: figures are merged

Writes dit_probe/anatomy/coverage.json (largest differences by family) and docs/models.md (the same for people).
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
from rich.progress import track

import dit_probe as dp
from dit_probe import testing
from dit_probe.anatomy import coverage, families

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MARK = "<!-- What follows is written by benchmarks/conformance.py. -->"
HEADS = {
    "replay_o": "replay `o_p`",
    "replay_p": "replay `p`",
    "clamped_o": "clamped `o_c`",
    "clamped_c": "clamped `c`",
    "equation": "eq. (4)",
}
NOT_MEASURED = "not measured yet"


def measure(family: str, variants: list[str]) -> dict:
    maxima: dict[str, float] = {}
    kinds: list[str] = []
    equal = True
    for variant in variants:
        for batch in (1, 2):
            tiny = testing.tiny_model(family, variant, batch=batch)
            found = dp.verify(tiny.transformer, inputs=tiny.inputs, concepts=tiny.concepts)
            assert found.ok, f"{family} {variant}:\n{found}"
            kinds = sorted({*kinds, *(layer.kind for layer in found.layers)})
            maxima = {name: max(value, maxima.get(name, 0.0)) for name, value in found.maxima.items()}
            equal = equal and found.output_equal
    versions = [diffusers.__version__]
    return {"kinds": kinds, "variants": variants, "versions": versions, "maxima": maxima, "output_equal": equal}


def merge(old: dict, new: dict) -> dict:
    """Figures of one more version."""
    versions = sorted({*old.get("versions", []), *new["versions"]}, key=lambda text: [int(n) for n in text.split(".")])
    both = [old.get("maxima", {}), new["maxima"]]
    known = [name for name in HEADS if any(name in figures for figures in both)]
    maxima = {name: float(f"{max(figures.get(name, 0.0) for figures in both):.1e}") for name in known}
    equal = old.get("output_equal", True) and new["output_equal"]
    return {**new, "versions": versions, "maxima": maxima, "output_equal": equal}


def markdown(table: dict) -> str:
    heads = ["family and model", "variants", "blocks", *HEADS.values(), "output", "diffusers"]
    rows = [heads, ["---"] * len(heads)]
    for family, anatomy in sorted(families().items()):
        models = "".join(f"<br>`{name}`" for name in anatomy.classes)
        if family not in table:
            rows.append([f"**{family}**{models}", *[NOT_MEASURED] * (len(heads) - 1)])
            continue
        found = table[family]
        figures = [_figure(found["maxima"].get(name)) for name in HEADS]
        names = ", ".join(found["variants"]), ", ".join(found["kinds"])
        equal = "equal" if found["output_equal"] else "CHANGED"
        rows.append([f"**{family}**{models}", *names, *figures, equal, ", ".join(found["versions"])])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _figure(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def main() -> None:
    variants: dict[str, list[str]] = {}
    for family, variant in testing.cases():
        variants.setdefault(family, []).append(variant)
    old = json.loads(coverage.FILE.read_text()) if coverage.FILE.exists() else {}
    new = {family: merge(old.get(family, {}), measure(family, names)) for family, names in track(variants.items())}
    table = dict(sorted((old | new).items()))
    coverage.FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    text, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(f"{text}{mark}\n\n{markdown(table)}", encoding="utf-8")


if __name__ == "__main__":
    main()
