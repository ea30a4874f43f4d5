"""Segmentation data sets to score maps against: lazy readers with one kind of record, over files or drawn scenes.

| reader | what it reads |
|---|---|
| `ImageNetSegmentation` | ``gtsegs_ijcv.mat`` |
| `PascalVOC` | the VOC devkit's segmentation part, whole or its pictures of a single class |
| `DavisVideos` | video folders in the layout of DAVIS 2016 and 2017 |
| `ImageMaskFolder` | any two folders of pictures and masks with equal names |
| `PictureBook`, `PictureBookClips` | nothing: scenes and clips drawn from a seed |

>>> data = PictureBook(3)
>>> data[0].name, data[0].image.shape, data[0].mask.shape
('scene/00000', (64, 64, 3), (64, 64))
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_probe.datasets.clips import clip
from dit_probe.datasets.image_folders import DavisVideos as DavisVideos
from dit_probe.datasets.image_folders import ImageMaskFolder as ImageMaskFolder
from dit_probe.datasets.image_folders import PascalVOC as PascalVOC
from dit_probe.datasets.samples import VOID as VOID
from dit_probe.datasets.samples import Dataset as Dataset
from dit_probe.datasets.samples import DatasetError, Reader, Sample, same_size, some, to_labels
from dit_probe.datasets.samples import Part as Part
from dit_probe.datasets.samples import masks as masks
from dit_probe.datasets.samples import split as split
from dit_probe.datasets.samples import valid as valid
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, scene

IMAGENET_BACKGROUND: tuple[str, ...] = ("background", "floor", "tree", "person", "grass", "face")
"""What the published run adds to the target; the paper's text says "background, grass, sky"."""

_LAYOUT = {"img": ("(3, x, y)", 3, "uint8"), "gt": ("(x, y)", 2, "uint8"), "id": ("(length, 1)", 2, "uint16")}
_ORIGINAL = "Is it the original gtsegs_ijcv.mat, and all of it? Compare its size, or get it once more"
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)  # h5py's, of whatever is broken
_TABLE = (
    "a mapping or a file with a line for every synset, 'n02085936,maltese'. Such lists are the ILSVRC synset words "
    "(synset_words.txt, LOC_synset_mapping.txt: 1,000 synsets) and ImageNet's words.txt (all synsets, of WordNet 3.0)"
)


class ImageNetSegmentation(Reader):
    """Reader of ``gtsegs_ijcv.mat``: 4,276 ImageNet pictures with one object's mask each (Guillaumin et al., 2014).

    MATLAB v7.3, which is HDF5: ``/value/img``, ``/value/gt`` and ``/value/id`` are columns of object references, to a
    (3, x, y) uint8 picture, to a cell that refers to a (x, y) mask of 0 and 1, and to the UTF-16 codes of a name such
    as "n02085936_123". MATLAB stores columns first, which reverses all axes. The mask is that of the one annotated
    object: further instances and other things are background.

    Opening reads the names and no picture. Each process and thread opens the file for itself on first access, and a
    reader can be pickled, so that it can be handed to workers.

    Args:
        path: of the file; several hundred megabytes.
        classes: WordNet synset (n and eight digits) to word, or the path of such a table: text, CSV or JSON. Of several
            names ("Maltese dog, Maltese terrier") the first counts.
        rename: name to single word, {"frosted bat": "bat"}; other names stay. The paper's published code has such a
            table in imagenet_class_map.json: under "categories", 445 names to 72 words.
        checksum: ``sha256:…`` of the file; reads all of it.

    Raises:
        DatasetError: no such file, truncated, not HDF5 or of another layout; another checksum; synsets without a word
            or with several words. On access: a picture or mask that is broken, of another type, size or range.

    Example:
        >>> data = ImageNetSegmentation("gtsegs_ijcv.mat", classes={"n02085936": "maltese"})  # doctest: +SKIP
        >>> data[0].target  # doctest: +SKIP
        ('maltese',)
    """

    name = "imagenet-segmentation"
    background = IMAGENET_BACKGROUND

    def __init__(
        self,
        path: str | Path,
        classes: Mapping[str, str] | str | Path | None = None,
        *,
        rename: Mapping[str, str] | None = None,
        checksum: str | None = None,
    ) -> None:
        self.root = self._path = Path(path)
        self.files = (self._path,)
        if classes is None:
            raise DatasetError(
                f"{path} names its classes by WordNet synset, found no words for them: give classes=, {_TABLE}"
            )
        known = _classes(classes)
        self._local = threading.local()
        rows = len(self._open()["value/id"])
        self._verify(checksum)
        names: dict[str, None] = {}
        for row in range(rows):
            name = self._follow(row, "id").astype("<u2").tobytes().decode("utf-16-le", "replace").strip("\0 ")
            if not re.fullmatch(r"n\d{8}_\S+", name):
                raise DatasetError(f"{path}, row {row}: found the name {name!r}, expected 'n02085936_123'. {_ORIGINAL}")
            # results are kept by name: the second mask of a picture must not replace the first
            names[f"{name}#{row}" if name in names else name] = None
        self._names = tuple(names)
        synsets = dict.fromkeys(map(self.synset, names))
        if missing := [synset for synset in synsets if synset not in known]:
            raise DatasetError(
                f"{path}: found {len(missing)} of {len(synsets)} synsets without a word in classes=: {some(missing)}; "
                f"expected {_TABLE}. Add them"
            )
        self._words = {synset: (rename or {}).get(known[synset], known[synset]) for synset in synsets}
        if several := [f"{synset} {word!r}" for synset, word in self._words.items() if len(word.split()) != 1]:
            raise DatasetError(
                f"{len(several)} classes are not one word: {some(several)}. A concept is one word: shorten them with "
                "rename={'Maltese dog': 'dog', …} or in the table itself"
            )
        self.vocabulary = tuple(dict.fromkeys(self._words.values()))

    def synset(self, name: str) -> str:
        """Of a sample's name, to cluster by class: several synsets share a word."""
        return name.partition("_")[0]

    def _identity(self) -> object:
        return sorted(self._words.items())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()

    def _open(self) -> Any:
        """The file as this thread of this process opened it: a handle that went through a fork is not used."""
        if getattr(self._local, "process", None) == os.getpid():
            return self._local.handle
        try:
            import h5py
        except ImportError:
            raise DatasetError("gtsegs_ijcv.mat is read with h5py, found none: pip install 'dit-probe[eval]'") from None
        if not self._path.is_file():
            raise DatasetError(f"{self._path}: found no such file, expected gtsegs_ijcv.mat: give its path")
        handle = None
        try:
            handle = h5py.File(self._path, "r")
            columns: list[Any] = [handle[f"value/{column}"] for column in _LAYOUT]
            found = [(column.shape, h5py.check_ref_dtype(column.dtype) is h5py.Reference) for column in columns]
            problem = "" if set(found) == {((*found[0][0][:1], 1), True)} else f"(shape, of references?) {found}"
        except _FAILURES as error:
            problem = f"{self._path.stat().st_size} bytes that open with {error}"
        if problem:
            if handle is not None:
                handle.close()  # or the file could not be replaced while the error is looked at
            raise DatasetError(
                f"{self._path}: found {problem}; expected HDF5 (MATLAB v7.3, not older) with /value/img, /value/gt and "
                f"/value/id, columns (n, 1) of object references and equally long. {_ORIGINAL}"
            )
        self._local.process, self._local.handle = os.getpid(), handle
        return handle

    def _follow(self, row: int, column: str) -> np.ndarray:
        """What a row of a column refers to, with its axes as they lie in the file."""
        handle = self._open()
        shape, dims, kind = _LAYOUT[column]
        try:
            found = handle[handle[f"value/{column}"][row, 0]]
            if column == "gt" and found.shape != (1, 1):
                raise ValueError(f"a cell of {found.shape} masks, expected (1, 1)")
            array = np.asarray(handle[found[0, 0]] if column == "gt" else found)
        except _FAILURES as error:
            raise DatasetError(f"{self._path}, row {row}: /value/{column} is broken ({error}). {_ORIGINAL}") from None
        if array.ndim != dims or array.dtype != kind or (dims == 3 and len(array) != 3):
            raise DatasetError(
                f"{self._path}, row {row}: found /value/{column} {array.shape} {array.dtype}, expected {shape} {kind}. "
                f"{_ORIGINAL}"
            )
        return array

    def _read(self, position: int) -> Sample:
        name, place = self._names[position], f"{self._path}, row {position}"
        image, mask = (np.ascontiguousarray(self._follow(position, column).T) for column in ("img", "gt"))
        same_size(image, mask, f"{place}, /value/img", f"{place}, /value/gt")
        word = self._words[self.synset(name)]
        return Sample(name, image, to_labels(mask, (1,), f"{place}, /value/gt", void=None), (word,), {word: 1})


class _Drawn(Reader):
    """What is drawn from a seed. Labels are places in `NOUNS`, as in every sample; its own background word is 0."""

    vocabulary = NOUNS
    background = BACKGROUNDS

    def __init__(self, count: int, seed: int, kind: str, **options: Any) -> None:
        self._first, self._options = seed * 1_000_000, options
        self.name = f"picture-book-{kind}s-{seed}"
        self._names = tuple(f"{kind}/{position:05d}" for position in range(count))

    def _identity(self) -> object:
        # what a seed draws may change from version to version
        return self._first, self._options, self[0].image.tobytes() if len(self) else b""

    def _sample(self, position: int, image: np.ndarray, owners: Mapping[str, np.ndarray], behind: str) -> Sample:
        labels = {noun: label for label, noun in enumerate(NOUNS, 1)}
        mask = np.zeros(image.shape[:-1], dtype=np.int16)
        for noun, owned in owners.items():
            mask[owned] = labels[noun]
        return Sample(self._names[position], image, mask, tuple(owners), {**labels, behind: 0})


class PictureBook(_Drawn):
    """Picture-book scenes as a data set: sample i is ``scene(seed * 1_000_000 + i)``, drawn on access.

    Args:
        count: of scenes, at most a million.
        seed: which family; 0 is the one that the demo models are trained on.
        size: width and height in pixels.
        objects: as for `scene`.

    Raises:
        SceneError: on access, for sizes and objects that `scene` refuses.

    Example:
        >>> sample = PictureBook(100, seed=7, objects=["sun", "boat"])[12]
        >>> sample.name, sample.target, masks(sample, sample.target).shape
        ('scene/00012', ('sun', 'boat'), (2, 64, 64))
    """

    def __init__(self, count: int, seed: int = 1, size: int = 64, objects: int | Sequence[str] | None = None) -> None:
        super().__init__(count, seed, "scene", size=size, objects=objects)

    def _read(self, position: int) -> Sample:
        drawn = scene(self._first + position, **self._options)
        return self._sample(position, drawn.image, drawn.masks, drawn.background)


class PictureBookClips(_Drawn):
    """Clips of moving sprites as a data set: sample i is ``clip(seed * 1_000_000 + i)``, drawn on access.

    Args:
        count: of clips, at most a million.
        seed: which family; 0 is the one that the demo models are trained on.
        size: width and height in pixels.
        frames: in every clip.
        objects: as for `clip`.

    Raises:
        SceneError: on access, for sizes, frames and objects that `clip` refuses.

    Example:
        >>> sample = PictureBookClips(2)[1]
        >>> sample.name, sample.image.shape, sample.mask.shape
        ('clip/00001', (9, 32, 32, 3), (9, 32, 32))
    """

    def __init__(
        self, count: int, seed: int = 1, size: int = 32, frames: int = 9, objects: int | Sequence[str] | None = None
    ) -> None:
        super().__init__(count, seed, "clip", size=size, frames=frames, objects=objects)

    def _read(self, position: int) -> Sample:
        drawn = clip(self._first + position, **self._options)
        return self._sample(position, drawn.frames, drawn.masks, drawn.background)


def _classes(table: Mapping[str, str] | str | Path) -> dict[str, str]:
    """Synset to name, from a mapping, lines of text, or JSON."""
    if isinstance(table, Mapping):
        entries: Any = table
    else:
        try:
            text = Path(table).read_text(encoding="utf-8-sig")
            entries = json.loads(text) if text.lstrip().startswith("{") else text.splitlines()
        except (OSError, ValueError) as error:
            raise DatasetError(f"{table}: cannot be read ({error}), expected {_TABLE}") from None
    if isinstance(entries, Mapping):
        # torchvision and Keras list [synset, name] under the number of the class
        entries = [",".join(map(str, v[:2] if isinstance(v, list) else (key, v))) for key, v in entries.items()]
    found: dict[str, str] = {}
    for number, line in enumerate(filter(str.strip, entries), 1):
        match = re.fullmatch(r"(n\d{8})[\s,]+(.+)", line.strip())
        if match:
            found[match[1]] = match[2].split(",")[0].replace("_", " ").strip(' "')
        elif number > 1:  # the first may be a heading; were it a class, its synset would be missed
            raise DatasetError(f"classes=, entry {number}: found {line!r}, expected {_TABLE}")
    return found
