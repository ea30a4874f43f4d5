"""The paper's tables and Figure 4, and the checks that it lacks: which methods run on which pictures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe import methods
from dit_probe.evaluation import Method
from dit_probe.reproduce import facts, printed
from dit_probe.reproduce.setting import Setting, Source
from dit_probe.reproduce.tables import Curve, Panel
from dit_probe.summary import choose

TIMESTEPS = (100, 300, 500, 700, 900)
SEEDS = (0, 1, 2, 3)
ATTENDS = {
    "none": "neither",
    "concepts": "self-attention (SA)",
    "image": "cross-attention (CA)",
    "both": "CA and SA",
}
"""What concepts attend to, in the order of Table 5."""
HEADLINE = ("auroc", "ap", "iou_macro, mean")
SPECIFIC = ("auroc", "auroc_absent", "auroc_other")
ABSENT = 2
"""Words that are not in the picture, given to methods beside those that are."""


@dataclass(frozen=True)
class LastWord:
    """One where the last word is asked for, else zero: with a background word last, "all is background"."""

    class_agnostic = False

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Draw maps of 1 x 1 tokens, (image, concept, [frame,] y, x)."""
        frames = images[0].shape[:-3]
        values = np.zeros((len(images), len(concepts), *frames, 1, 1))
        values[:, -1] = 1
        dims = ("image", "concept", *("frame" for _ in frames), "y", "x")
        return xr.DataArray(values, {"concept": list(concepts)}, dims)

    def describe(self) -> str:
        """Its name."""
        return "last_word()"


def table1(setting: Setting) -> list[Panel]:
    """Table 1: ConceptAttention and cross-attention on pictures of one class."""
    return _methods(setting, "table1")


def table2(setting: Setting) -> list[Panel]:
    """Table 2: Table 1 with more rows of other people's methods."""
    return _methods(setting, "table2")


def _methods(setting: Setting, table: Literal["table1", "table2"]) -> list[Panel]:
    passes, panels, model = setting.passes(), [], _model(setting)
    rows: dict[str, Method] = {
        "ConceptAttention": passes.method("output", layers=setting.last),
        "cross-attention": passes.method("cross", layers=setting.last),
        "ConceptAttention, all layers": passes.method("output"),
        "cross-attention, all layers": passes.method("cross"),
    }
    if model:
        rows["ConceptAttention, reference code"] = methods.reference(setting.pipe, **setting.text)
    rows |= setting.others()
    for source in setting.single:
        found = setting.evaluate("methods", rows | setting.trivial(), source.reported, source.protocol("paper"))
        kind = "voc" if source.kind == "voc" else "imagenet"
        numbers = printed.methods(table, kind)
        beside = _beside(rows, model, numbers)
        columns = f"The paper's columns are those of {_NAMES[kind]}."
        notes = (*_notes(setting, source), _layers(setting), columns, *([_CLIP] if model == "SD3.5 DiT" else []))
        known = _facts(setting, rows, numbers, source) if table == "table2" else {}
        notes += (_UNIT,) if known else ()
        panels.append(Panel(_title(source), found, kind, numbers, beside, HEADLINE, facts=known, notes=notes))
    return panels


def _beside(rows: Iterable[str], model: str, numbers: Collection[str]) -> dict[str, str]:
    """Measured row to the paper's row of the same method on the same architecture."""
    hosts, found = methods.hosts(), {}
    for row in rows:
        method, _, host = row.partition(" | ")
        architecture = hosts[host].architecture if host else model
        found[row] = f"{method.replace('cross-attention', 'Cross attention')} | {architecture}"
    return {row: name for row, name in found.items() if name in numbers}


def _facts(
    setting: Setting, rows: Mapping[str, Method], numbers: Iterable[str], source: Source
) -> dict[str, facts.Facts]:
    """Of every row, measured or only printed."""
    sample, model = source.reported[0], _model(setting) or type(setting.pipe).__name__
    words, file = [*sample.target, *source.reported.background], setting.kept("facts", source.reported, "json")
    found = facts.measured(rows, sample.image, words, model, file)
    for name in numbers:
        method, _, architecture = name.partition(" | ")
        if (declared := facts.declared(architecture, method)) is not None:
            found[name] = declared
    return found


def table3(setting: Setting) -> list[Panel]:
    """Table 3: every patch goes to the concept with the highest score, on pictures of several classes."""
    passes, twin = setting.passes(), setting.passes(setting.twin)
    rows: dict[str, Method] = {
        "ConceptAttention": passes.method("output", layers=setting.last),
        "ConceptAttention, no softmax": passes.method("output", softmax=None, layers=setting.last),
        "cross-attention": passes.method("cross", layers=setting.last),
        "value space": passes.method("value", layers=setting.last),
        "random weights": twin.method("output", layers=setting.last),
        "noise": methods.noise(),
    }
    rows |= {name: row for name, row in setting.others().items() if not row.class_agnostic}
    panels = []
    beside = _beside(rows, _model(setting), printed.SEVERAL_CLASSES)
    for source in setting.several:
        # The last word that methods are given is a background word, where the data set has any.
        known = rows | {"all background": LastWord()} if source.reported.background else rows
        found = setting.evaluate("classes", known, source.reported, source.protocol("paper_multiclass"))
        notes = (
            *_notes(setting, source),
            _layers(setting),
            "Methods are given the words that are in the picture, as in the paper: an oracle.",
            "One map for all words has no highest word: class-agnostic methods have no row here.",
        )
        shown = ("right_of_two", "auroc")
        panels.append(Panel(_title(source), found, "voc_multi", printed.SEVERAL_CLASSES, beside, shown, notes=notes))
    return panels


def _spaces(setting: Setting, source: Source) -> xr.Dataset:
    """Rows of Table 4 and of Figure 4, left: one pass a picture for all of them."""
    passes = setting.passes()
    rows: dict[str, Method] = {}
    for space in ("cross", "value", "output"):
        rows[space] = passes.method(space, softmax=None, layers=setting.last)
        rows[f"{space}, softmax"] = passes.method(space, layers=setting.last)
    rows["cross, concepts ask, softmax"] = passes.method("cross", layers=setting.last, direction="concept_to_image")
    rows |= {f"layer {layer}": passes.method("output", layers=(layer,)) for layer in range(setting.joint)}
    rows["all layers"] = passes.method("output")
    return setting.evaluate("spaces", rows | setting.trivial(), source.reported, source.protocol("paper"))


def table4(setting: Setting) -> list[Panel]:
    """Table 4: in which space image and concepts are compared, and the softmax over concepts."""
    panels = []
    for source in setting.single:
        found = _spaces(setting, source)
        kept = [*printed.SPACES, "cross, concepts ask, softmax", *_TRIVIAL]
        notes = (
            *_notes(setting, source),
            _layers(setting),
            '"cross" has image queries on concept keys, as the paper\'s code; "concepts ask" has concept queries on '
            "image keys, as its text.",
        )
        beside = {name: name for name in printed.SPACES}
        panels.append(
            Panel(
                _title(source), found.sel({"method": kept}), "imagenet", printed.SPACES, beside, HEADLINE, notes=notes
            )
        )
    return panels


def table5(setting: Setting) -> list[Panel]:
    """Table 5: what concepts attend to."""
    panels = []
    rows = {ATTENDS[name]: setting.passes(attends=name).method("output", layers=setting.last) for name in ATTENDS}
    for source in setting.single:
        found = setting.evaluate("attends", rows | setting.trivial(), source.reported, source.protocol("paper"))
        beside, numbers = {row: row for row in rows}, {ATTENDS[name]: row for name, row in printed.ATTENDS.items()}
        notes = (*_notes(setting, source), _layers(setting))
        panels.append(Panel(_title(source), found, "imagenet", numbers, beside, HEADLINE, notes=notes))
    return panels


def figure4(setting: Setting) -> list[Panel]:
    """Figure 4: by layer, and by timestep; what is best is chosen on other pictures."""
    panels = []
    for source in setting.single:
        chosen, notes = _choose(setting, source)
        notes = (*_notes(setting, source), *notes, "The figure prints no numbers.")
        layers = {f"layer {layer}": layer for layer in range(setting.joint)}
        found = _spaces(setting, source)
        left = found.sel({"method": [*layers, "all layers", *_TRIVIAL]})
        curve = Curve("layer", {row: str(layer) for row, layer in layers.items()}, ("all layers", "random weights"))
        panels.append(Panel(f"{_title(source)}: layers", left, "imagenet", {}, {}, HEADLINE, curve, notes=notes))
        rows: dict[str, Method] = {f"t = {t}": setting.passes(timestep=t).method("output") for t in TIMESTEPS}
        timestep, layer = chosen
        one = setting.passes(timestep=timestep)
        best = f"layer {layer}, t = {timestep}"
        rows[best] = one.method("output", layers=None if layer == "all" else (int(layer),))
        found = setting.evaluate("timesteps", rows | setting.trivial(), source.reported, source.protocol("paper"))
        curve = Curve("timestep", {f"t = {t}": str(t) for t in TIMESTEPS}, (best, "random weights"))
        panels.append(Panel(f"{_title(source)}: timesteps", found, "imagenet", {}, {}, HEADLINE, curve, notes=notes))
    return panels


def _choose(setting: Setting, source: Source) -> tuple[tuple[int, str], tuple[str, ...]]:
    """Timestep and layer with the highest AUROC, and the threshold with the highest IoU, on the choosing pictures."""
    rows: dict[str, Method] = {}
    for timestep in TIMESTEPS:
        passes = setting.passes(timestep=timestep)
        rows[f"{timestep} all"] = passes.method("output")
        for layer in range(setting.joint):
            rows[f"{timestep} {layer}"] = passes.method("output", layers=(layer,))
    found = setting.evaluate("choosing", rows, source.choosing, source.protocol("native"))
    best = choose(found, "auroc")
    timestep, layer = best.split()
    threshold = str(found.iou_macro.sel({"method": best}).mean("image").idxmax("threshold").item())
    note = (
        f"Chosen on {found.sizes['image']} other pictures: timestep {timestep}, layer {layer} (highest AUROC), "
        f"threshold {threshold} (highest macro IoU of mean, Otsu and 0.5)."
    )
    return (int(timestep), layer), (note,)


def specificity(setting: Setting) -> list[Panel]:
    """Does a map follow its word? Maps of absent and of other words against the same masks."""
    passes, panels = setting.passes(), []
    rows: dict[str, Method] = {
        "output": passes.method("output", layers=setting.last),
        "cross": passes.method("cross", layers=setting.last),
        "value": passes.method("value", layers=setting.last),
    }
    for source in setting.several:
        protocol = replace(source.protocol("native"), absent=ABSENT)
        found = setting.evaluate("specificity", rows | setting.trivial(), source.reported, protocol)
        notes = (
            *_notes(setting, source),
            _layers(setting),
            f"{ABSENT} words that are not in the picture are given beside the others. auroc_absent: their maps against "
            "the objects' masks; auroc_other: the maps of the other words. 0.5 or less where a method reads the word, "
            "auroc itself where it does not.",
        )
        panels.append(Panel(_title(source), found, "other", {}, {}, (*SPECIFIC, "right_of_two"), notes=notes))
    return panels


def sanity(setting: Setting) -> list[Panel]:
    """Do maps depend on weights, words and picture? (Adebayo et al. 2018)."""
    passes = setting.passes()
    method = passes.method("output", layers=setting.last)
    rows: dict[str, Method] = {"as trained": method}
    count = _blocks(setting)
    for share in (0.25, 0.5, 0.75, 1.0):
        number = max(1, round(share * count))
        pipe = methods.randomised(setting.pipe, number)
        rows[f"last {number} of {count} blocks random"] = setting.passes(pipe).method("output", layers=setting.last)
    rows["words exchanged"] = methods.shuffled(method)
    rows["latents of noise alone"] = setting.passes(timestep=1000).method("output", layers=setting.last)
    panels = []
    for source in setting.several:
        found = setting.evaluate("sanity", rows | setting.trivial(), source.reported, source.protocol("native"))
        notes = (
            *_notes(setting, source),
            _layers(setting),
            "Blocks are randomised from the output end backwards, joint and single ones counted together.",
        )
        panels.append(Panel(_title(source), found, "other", {}, {}, ("auroc", "right_of_two", "miou"), notes=notes))
    return panels


def sensitivity(setting: Setting) -> list[Panel]:
    """How much numbers hang on the noise's seed and on the background words."""
    panels = []
    for source in setting.single:
        protocol = source.protocol("native")
        seeds = {f"seed {seed}": setting.passes(seed=seed).method("output", layers=setting.last) for seed in SEEDS}
        found = setting.evaluate("seeds", seeds | setting.trivial(), source.reported, protocol)
        notes = (*_notes(setting, source), _layers(setting))
        panels.append(Panel(f"{_title(source)}: seed of the noise", found, "other", {}, {}, HEADLINE, notes=notes))
        words = source.reported.background
        parts = [words[:1], words[: len(words) // 2], words, (*words, "background")]
        tables = []
        for number, part in enumerate(dict.fromkeys(filter(None, parts))):
            row = f"{len(part)}: {', '.join(part)}"
            rows = {row: setting.passes().method("output", layers=setting.last)}
            tables.append(setting.evaluate(f"words{number}", rows, source.reported, protocol, concepts=part))
        joined: Any = xr.concat(tables, "method", coords="minimal", compat="override", combine_attrs="drop_conflicts")
        panels.append(Panel(f"{_title(source)}: background words", joined, "other", {}, {}, HEADLINE, notes=notes))
    return panels


STUDIES: Mapping[str, Callable[[Setting], list[Panel]]] = MappingProxyType(
    {
        study.__name__: study
        for study in (table1, table2, table3, table4, table5, figure4, specificity, sanity, sensitivity)
    }
)
"""Name to study; the first six are the paper's."""

_TRIVIAL = ("random weights", *methods.trivial_rows())
_CLIP = "The reference code makes SD3.5's concepts of CLIP's states and not of T5's, and averages all layers."
_UNIT = (
    "Passes and gradients are those of a picture. Time and memory are in units of one plain pass of the row's own "
    "model, measured in turns on one picture and its words; rows without them were not run."
)
_NAMES = {"imagenet": "ImageNet-Segmentation", "voc": "PascalVOC, single class"}


def _model(setting: Setting) -> str:
    """What the paper calls models of this family."""
    name = type(setting.pipe).__name__
    return "Flux DiT" if name.startswith("Flux") else "SD3.5 DiT" if name.startswith("StableDiffusion3") else ""


def _blocks(setting: Setting) -> int:
    from dit_probe import anatomy

    return len(anatomy.find(setting.pipe).blocks(anatomy.transformer_of(setting.pipe)))


def _title(source: Source) -> str:
    return f"{source.reported.name}, {len(source.reported)} pictures"


def _layers(setting: Setting) -> str:
    first, last = setting.last[0], setting.last[-1]
    return (
        f"Layers {first} to {last} of {setting.joint}, the depth of the paper's last 10 of 19, unless a row says more."
    )


def _notes(setting: Setting, source: Source) -> tuple[str, ...]:
    """Where the run leaves the paper's."""
    where = getattr(setting.pipe, "name_or_path", "") or getattr(setting.pipe.config, "_name_or_path", "")
    name = f"{type(setting.pipe).__name__} {str(where).rsplit('/', 1)[-1]}".strip()
    model = f"Model: {name}; the paper has FLUX.1-schnell and SD3.5 turbo."
    data = "Drawn scenes stand in for photographs; pictures and masks are not resized." if source.drawn else ""
    return tuple(filter(None, (model, data, "One noise seed a picture; the published scripts average five.")))
