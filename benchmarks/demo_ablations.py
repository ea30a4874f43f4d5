"""The paper's ablations on all demo models: one table, one page of figures, from what demo_quality.py has measured.

    python benchmarks/demo_quality.py MODEL        # for every model, first
    python benchmarks/demo_ablations.py            # docs/demo-models.md, and ablations.html beside the results

A finding of the paper is a difference that it reports as positive. It *holds* on a model where the 95 % interval of the
paired difference over held-out pictures lies above zero, is *opposite* where it lies below, else *open*.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dit_probe.panels import INK, Sheet
from dit_probe.report import Section, page
from dit_probe.summary import markdown

RESULTS = Path("benchmarks/results/demo_quality")
MEASURES = {"auroc": "AUROC", "right_of_two": "right one of two", "miou": "mIoU"}
SPACES = ("output", "image to concept", "concept to image", "value")
ATTENDS = {"none": "neither", "concepts": "self-attention", "image": "cross-attention", "both": "both"}
COLOURS = ("#21918c", "#440154", "#e07b39", "#8a8a8a")
TIMESTEP = 500
GRID = "rgba(127,127,127,0.3)"

Results = dict[str, dict[str, Any]]


def rows(results: dict[str, Any], table: str, **where: Any) -> list[dict[str, Any]]:
    """Rows of a table with these labels, in their order."""
    return [row for row in results[table] if all(row.get(key) == value for key, value in where.items())]


def shown(row: dict[str, Any]) -> str:
    return f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row["n"] else "undefined"


def claim_of(row: dict[str, Any]) -> str:
    """The claim without the model's own layer."""
    return re.sub(r"\s*\([^)]*chosen on other pictures\)", ", chosen on other pictures", row["claim"])


def word(row: dict[str, Any]) -> str:
    return "holds" if row["low"] > 0 else "opposite" if row["high"] < 0 else "open"


def findings(models: Results) -> list[list[str]]:
    """A row for every finding and measure, a column for every model."""
    lines = [["difference that the paper reports as positive", "measured as", *models]]
    claims = dict.fromkeys(claim_of(row) for found in models.values() for row in found["findings"])
    for claim in claims:
        for metric, title in MEASURES.items():
            cells = []
            for found in models.values():
                (row,) = (row for row in found["findings"] if claim_of(row) == claim and row["metric"] == metric)
                cells.append(f"{word(row)}: {shown(row)}")
            lines.append([claim, title, *cells])
    return lines


def spaces(models: Results) -> list[list[str]]:
    """Table 4's rows with softmax and without, and the rows that look at nothing."""
    lines = [["all layers, timestep 500", "measured as", *models]]
    names = [f"{space}, {softmax}" for space in SPACES for softmax in ("softmax", "no softmax")]
    for metric, title in MEASURES.items():
        for name in names:
            where = {"metric": metric, "row": name, "timestep": TIMESTEP, "layer": "mean"}
            lines.append([name, title, *(shown(rows(found, "trained", **where)[0]) for found in models.values())])
        where = {"metric": metric, "row": "output, softmax", "layer": "mean"}
        twins = (shown(rows(found, "random twin", **where)[0]) for found in models.values())
        lines.append(["output, softmax, random weights", title, *twins])
        for name in ("centre Gaussian", "constant", "noise"):
            cells = (shown(rows(found, "trivial", metric=metric, row=name)[0]) for found in models.values())
            lines.append([name, title, *cells])
    return lines


def attends(models: Results) -> list[list[str]]:
    """Table 5."""
    lines = [["concepts attend by", "measured as", *models]]
    for name, title in ATTENDS.items():
        for metric, measure in MEASURES.items():
            cells = (shown(rows(found, "attends", metric=metric, attends=name)[0]) for found in models.values())
            lines.append([title, measure, *cells])
    return lines


def statement(models: Results) -> str:
    """What reproduces on every model, on some, on none."""
    told: dict[str, list[str]] = {"holds": [], "opposite": [], "mixed": []}
    claims = dict.fromkeys(claim_of(row) for found in models.values() for row in found["findings"])
    for claim in claims:
        words = {
            word(row)
            for found in models.values()
            for row in found["findings"]
            if claim_of(row) == claim and row["metric"] in MEASURES
        }
        told[words.pop() if len(words) == 1 and words != {"open"} else "mixed"].append(claim)
    heads = {
        "holds": "On every model and by every measure:",
        "opposite": "The opposite, on every model and by every measure:",
        "mixed": "Neither: it depends on the model or on the measure, or is open:",
    }
    parts = [f"{heads[kind]}\n\n" + "\n".join(f"* {claim}" for claim in told[kind]) for kind in heads if told[kind]]
    return "\n\n".join(parts)


def curves(models: Results, over: str) -> go.Figure:
    """AUROC and right one of two of the four spaces, softmax, by layer or timestep; a column for every model."""
    measures = ("auroc", "right_of_two")
    figure = make_subplots(
        len(measures), len(models), subplot_titles=list(models), horizontal_spacing=0.04, vertical_spacing=0.08,
        shared_yaxes=True,
    )  # fmt: skip
    for column, found in enumerate(models.values(), 1):
        fixed = {"timestep": TIMESTEP} if over == "layer" else {"layer": "mean"}
        for line, metric in enumerate(measures, 1):
            for colour, space in zip(COLOURS, SPACES, strict=True):
                points = rows(found, "trained", metric=metric, row=f"{space}, softmax", **fixed)
                points = [row for row in points if row[over] != "mean"]
                mean, low, high = (np.array([row[name] for row in points]) for name in ("mean", "low", "high"))
                figure.add_scatter(
                    x=[str(row[over]) for row in points], y=mean, name=space, line_color=colour,
                    error_y={"array": high - mean, "arrayminus": mean - low}, legendgroup=space,
                    showlegend=line == column == 1, row=line, col=column,
                )  # fmt: skip
    figure.update_layout(Sheet.page(1100, 560, {"l": 60, "r": 170, "t": 40, "b": 50}))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_xaxes(title=over, row=len(measures))
    figure.update_yaxes(range=[0.15, 1], gridcolor=GRID, zeroline=False)
    for line, metric in enumerate(measures, 1):
        figure.update_yaxes(title=MEASURES[metric], row=line, col=1)
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of demo_quality.py's JSON files")
    parser.add_argument("--out", type=Path, default=Path("docs/demo-models.md"), help="the Markdown page")
    options = parser.parse_args()
    models = {file.stem: json.loads(file.read_text()) for file in sorted(options.results.glob("*.json"))}
    titles = {
        "The paper's findings": findings,
        "Spaces and softmax (Table 4)": spaces,
        "What concepts attend to (Table 5)": attends,
    }
    pictures = ", ".join(f"{found['settings']['pictures']} for {name}" for name, found in models.items())
    lead = (
        f"Written by `benchmarks/demo_ablations.py`. Means over held-out pictures ({pictures}) with 95 % bootstrap "
        "intervals; differences are paired. The models are tiny and were trained on drawn scenes: a finding that does "
        "not hold here may hold on the released models, and the reverse."
    )
    parts = ["---\nhide: [toc]\n---", "# The paper's ablations on the demo models", lead, statement(models)]
    for title, build in titles.items():
        parts += [f"## {title}", markdown(build(models))]
    options.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    sections = [
        Section("What holds here", code=statement(models)),
        Section("Layers (Figure 4, left)", "Softmax over concepts, timestep 500.", [curves(models, "layer")]),
        Section("Timesteps (Figure 4, right)", "All layers, softmax.", [curves(models, "timestep")]),
        *(Section(title, code=markdown(build(models))) for title, build in titles.items()),
    ]
    html = options.results / "ablations.html"
    html.write_text(
        page("The paper's ablations on the demo models", sections, lead=statement(models)), encoding="utf-8"
    )
    print(statement(models), f"\n\n{options.out}\n{html}")


if __name__ == "__main__":
    main()
