"""The paper's tables and Figure 4 as commands, and the checks that it lacks.

| study | what it asks |
|---|---|
| ``table1``, ``table2`` | ConceptAttention and cross-attention on pictures of one class |
| ``table3`` | which of several classes a patch belongs to |
| ``table4`` | in which space image and concepts are compared, with a softmax over concepts or without |
| ``table5`` | what concepts attend to |
| ``figure4`` | layers, timesteps; the best ones are chosen on other pictures |
| ``specificity`` | the maps of absent and of other words against the same masks |
| ``sanity`` | random weights, exchanged words, latents of noise alone |
| ``sensitivity`` | the seed of the noise, the background words |

Every table has rows that look at nothing and a model with random weights; every number has a 95 % bootstrap interval
over pictures. The numbers of pictures are kept: interrupted and run again, a study continues, and studies that share
rows (``table1`` and ``table2``; ``table4`` and ``figure4``) compute them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_probe.protocols import EvaluationError
from dit_probe.reproduce import drawing, tables
from dit_probe.reproduce.setting import Setting as Setting
from dit_probe.reproduce.setting import Source as Source
from dit_probe.reproduce.setting import source as source
from dit_probe.reproduce.studies import STUDIES as STUDIES
from dit_probe.reproduce.tables import Panel as Panel


@dataclass(frozen=True)
class Reproduction:
    """What a study found.

    Attributes:
        name: of the study.
        lead: what it asks.
        panels: its tables.
    """

    name: str
    lead: str
    panels: Sequence[Panel]

    def markdown(self) -> str:
        """The tables and what has to be known about them."""
        return "\n\n".join([f"## {self.name}", self.lead, *(tables.text(panel) for panel in self.panels)])

    def csv(self) -> str:
        """A line for every panel, row and metric."""
        return tables.table(self.panels)

    def page(self) -> str:
        """One HTML page that needs no network."""
        return drawing.drawn(self.name, self.lead, self.panels)

    def write(self, folder: Path) -> Path:
        """Write ``NAME.md``, ``NAME.csv`` and ``NAME.html`` and return the last's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("md", self.markdown() + "\n"), ("csv", self.csv()), ("html", self.page())):
            (folder / f"{self.name}.{suffix}").write_text(content, encoding="utf-8")
        return folder / f"{self.name}.html"


def reproduce(name: str, setting: Setting) -> Reproduction:
    """Run a study, or read from the setting's folder what is already known of it.

    Args:
        name: of `STUDIES`.
        setting: pipeline, pictures, folder.

    Raises:
        EvaluationError: no study of that name; no pictures of the kind it needs; a folder with numbers of another
            model or other pictures.

    Example:
        >>> import tempfile
        >>> from dit_probe.testing import tiny_pipeline
        >>> pictures, pipe = [source("picture-book", several=False, count=2)], tiny_pipeline("flux")
        >>> pipe.default_sample_size = 8
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     setting = Setting(pipe, pictures, (), Path(folder), progress=False)
        ...     found = reproduce("table5", setting)
        >>> found.panels[0].rows[:2]
        ['neither', 'self-attention (SA)']
    """
    if name not in STUDIES:
        raise EvaluationError(f"no study {name!r}: there are {', '.join(STUDIES)}")
    panels = STUDIES[name](setting)
    if not panels:
        kind = "several classes" if name in ("table3", "specificity", "sanity") else "one class"
        raise EvaluationError(f"{name} needs pictures of {kind}, and none were given")
    return Reproduction(name, (STUDIES[name].__doc__ or "").strip().splitlines()[0], panels)
