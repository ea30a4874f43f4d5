"""What one slot of a traced data set is made of, and the hash that tells whether it was."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_probe import protocols
from dit_probe.datasets.samples import Dataset, read_image
from dit_probe.errors import TraceError
from dit_probe.probe import Combination
from dit_probe.protocols import Protocol


@dataclass(frozen=True, eq=False)
class TraceSample:
    """One sample of a data set that is traced.

    Attributes:
        prompt: what the model is told.
        image: uint8 (y, x, 3), or of a video (frame, y, x, 3): it is encoded (`dit_probe.encode`). None: the pipeline
            paints one.
        concepts: in place of the probe's. All samples of a store have the same number.
        seed: of the noise.

    Example:
        >>> TraceSample("a fox in snow", concepts=("fox", "snow"), seed=7).seed
        7
    """

    prompt: str
    image: np.ndarray | None = None
    concepts: tuple[str, ...] = ()
    seed: int = 0


_KEYS = tuple(field.name for field in fields(TraceSample))


def as_sample(found: Any) -> TraceSample:
    """A `TraceSample`, or a mapping that has its fields.

    Raises:
        TraceError: it is neither.

    Example:
        >>> as_sample({"prompt": "a sun", "concepts": ["sun", "sky"]}).concepts
        ('sun', 'sky')
    """
    if isinstance(found, Mapping):
        if "prompt" not in found or set(found) - set(_KEYS):
            raise TraceError(
                f"a sample has {', '.join(map(str, found)) or 'nothing'}; give a prompt, and no more than "
                f"{', '.join(_KEYS)}"
            )
        found = TraceSample(**found)
    if not isinstance(found, TraceSample):
        raise TraceError(f"a sample is a {type(found).__name__}; give TraceSample or a mapping of {', '.join(_KEYS)}")
    if isinstance(found.concepts, str):
        raise TraceError(f"concepts={found.concepts!r} is a string; give a list of words")
    image = found.image
    if image is not None and (image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != 3):
        raise TraceError(f"an image is {image.dtype} {image.shape}; give uint8 ([frame,] y, x, 3)")
    return replace(found, concepts=tuple(found.concepts))


def with_concepts(probes: Combination, concepts: Sequence[str]) -> Combination:
    """The probes, with a sample's own concepts where they have some.

    Example:
        >>> from dit_probe.probe import Probe
        >>> with_concepts(Combination(Probe(record=["o_c"]), Probe(record=["x"])), ["sun"])[0].concepts
        ('sun',)
    """
    if not concepts:
        return probes
    stream = probes.stream
    return Combination(
        *(replace(probe, concepts=concepts) if probe.concepts or probe is stream else probe for probe in probes)
    )


def content(sample: TraceSample, probes: Combination, branch: str, call: Mapping[str, Any]) -> str:
    """Hash of all that decides what is in a slot, beside the model.

    Example:
        >>> from dit_probe.probe import Probe
        >>> probes = Combination(Probe(["sun"], record=["o_c"]))
        >>> one, other = (content(TraceSample("a sun", seed=seed), probes, "cond", {}) for seed in (0, 1))
        >>> len(one), one == other
        (32, False)
    """
    words = [list(probe.concepts) for probe in with_concepts(probes, sample.concepts)]
    image = sample.image
    parts = [sample.prompt, sample.seed, words, probes.json(), branch, None if image is None else list(image.shape)]
    digest = hashlib.sha256(json.dumps([*parts, {name: repr(call[name]) for name in sorted(call)}]).encode())
    if image is not None:
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


class Pictures(Sequence[TraceSample]):
    """A data set of pictures with masks, as one that is traced: image, words and prompt as an evaluation gives them.

    Args:
        dataset: of `dit_probe.datasets.segmentation`, or anything that has what `Dataset` lists.
        protocol: its words and background words are the concepts; a name or a `Protocol`.
        size: side in pixels that pictures are stretched to; None: as the protocol says.
        concepts: the same for all pictures, which may then show different numbers of things.
        prompt: ``{}`` becomes the first concept.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> pictures = Pictures(PictureBook(10, objects=1))
        >>> len(pictures), pictures[0].prompt.startswith("a "), pictures[0].image.shape
        (10, True, (64, 64, 3))
    """

    def __init__(
        self,
        dataset: Dataset,
        protocol: str | Protocol = "native",
        size: int | None = None,
        concepts: Sequence[str] | None = None,
        prompt: str = "a {}",
    ) -> None:
        self._dataset, self._protocol, self._size, self._prompt = dataset, protocols.find(protocol), size, prompt
        self._concepts = None if concepts is None else tuple(concepts)

    @property
    def fingerprint(self) -> str:
        """Of the data set, and of all that is said here."""
        parts = [self._dataset.fingerprint, repr(self._protocol), self._size, self._prompt, self._concepts]
        return "sha256:" + hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        sample = self._dataset[operator.index(index)]
        words = protocols.words(self._protocol, sample, self._dataset.vocabulary, self._dataset.background)
        image = protocols.prepare(self._protocol, sample)[0]
        if self._size is not None:
            image = protocols.resize_image(sample.image, self._size)
        concepts = tuple(words) if self._concepts is None else self._concepts
        return TraceSample(self._prompt.format(words[0] if words else ""), image, concepts)


class PromptFile(Sequence[TraceSample]):
    r"""The lines of a file as samples: prompts, or, in a file ``*.jsonl``, objects with the fields of `TraceSample`.

    Args:
        path: the file; empty lines are left out. An ``image`` in it is a path, relative to the file's folder.
        seed: of the first line where it says none; every next line has one more.

    Raises:
        TraceError: no such file, no lines, or one that is no JSON object.

    Example:
        >>> _ = Path("prompts.txt").write_text("a sun\na boat\n")
        >>> [(sample.prompt, sample.seed) for sample in PromptFile("prompts.txt", seed=7)]
        [('a sun', 7), ('a boat', 8)]
    """

    def __init__(self, path: str | Path, seed: int = 0) -> None:
        self._path, self._seed = Path(path), seed
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TraceError(f"{path} cannot be read ({error}); give a text file with a prompt a line") from None
        self._lines = [line for line in text.splitlines() if line.strip()]
        if not self._lines:
            raise TraceError(f"{path} has no lines; give a prompt a line")
        if self._path.suffix == ".jsonl":
            for number, line in enumerate(self._lines):
                self._object(number, line)

    def _object(self, number: int, line: str) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{self._path}, line {number + 1} with text is no JSON ({error})") from None
        if not isinstance(found, dict) or "prompt" not in found:
            raise TraceError(
                f"{self._path}, line {number + 1} with text is {line[:80]!r}; give an object with a prompt"
            )
        return found

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self._lines))[operator.index(index)]
        line, default = self._lines[at].strip(), self._seed + at
        if self._path.suffix != ".jsonl":
            return TraceSample(line, seed=default)
        found = {"seed": default, **self._object(at, line)}
        if found.get("image") is not None:
            found["image"] = read_image(self._path.parent / found["image"])
        return as_sample(found)
