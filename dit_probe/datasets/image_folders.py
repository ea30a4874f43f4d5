"""Readers of folders of pictures and masks: PascalVOC, DAVIS videos, and any two folders with equal names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from dit_probe.datasets import samples
from dit_probe.datasets.samples import VOID, DatasetError, Reader, Sample, present, same_size, some, to_labels

VOC_CLASSES: tuple[str, ...] = (
    "plane", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
    "motorcycle", "person", "pot", "sheep", "sofa", "train", "monitor",
)  # fmt: skip
"""PascalVOC's classes 1 to 20 in the paper's single words."""

VOC_BACKGROUND: tuple[str, ...] = ("background", "floor", "grass", "tree", "sky")
"""What the published run adds to the target; the paper's text says "background, grass, sky"."""

_VOC_LABELS = {word: label for label, word in enumerate(VOC_CLASSES, 1)}
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class PascalVOC(Reader):
    """Reader of PascalVOC's segmentation pictures (Everingham et al.; VOCtrainval_11-May-2012.tar).

    ``JPEGImages/<id>.jpg``, ``SegmentationClass/<id>.png`` with palette indices 0 (background), 1 to 20 and 255 (void),
    and lists of ids in ``ImageSets/Segmentation``. Labels are the classes' numbers in every picture. Opening reads the
    list and looks for the files.

    Args:
        root: the folder VOC2012, or VOCdevkit, or what holds VOCdevkit.
        year: of the folder's name.
        split: ``train``, ``val`` or ``trainval``: a list of ids. 2012's ``val`` has 1,449.
        subset: ``"single_class"`` for `single_class_ids`, found on first use; or ids, or the path of a list of them.
        checksum: ``sha256:…`` over the split's files, as `checksum` gives it; reads all of them.

    Raises:
        DatasetError: no such folder, list or subset; a missing file; another checksum. On access: a broken file,
            sizes that differ, a number that is no class.

    Example:
        >>> data = PascalVOC("VOCdevkit", subset="single_class")  # doctest: +SKIP
        >>> len(data.single_class_ids())  # doctest: +SKIP
        930
    """

    vocabulary = VOC_CLASSES
    background = VOC_BACKGROUND

    def __init__(
        self,
        root: str | Path,
        year: str | int = "2012",
        split: str = "val",
        subset: str | Path | Sequence[str] | None = None,
        *,
        checksum: str | None = None,
    ) -> None:
        places = [Path(root), Path(root) / f"VOC{year}", Path(root) / "VOCdevkit" / f"VOC{year}"]
        self.root = next((place for place in places if (place / "SegmentationClass").is_dir()), None)
        if self.root is None:
            raise DatasetError(
                f"{root}: found no SegmentationClass there, in VOC{year} or VOCdevkit/VOC{year}, expected an unpacked "
                "VOCtrainval archive: give the folder that holds VOCdevkit"
            )
        self.name = f"pascal-voc-{year}-{split}"
        self._ids = _listed(self.root / "ImageSets" / "Segmentation" / f"{split}.txt")
        self._files = _pairs(self.root / "JPEGImages", self.root / "SegmentationClass", self._ids)
        self.files = tuple(path for pair in self._files.values() for path in pair)
        self._chosen: tuple[str, ...] | None = self._ids
        if subset == "single_class":
            self.name, self._chosen = f"{self.name}-single-class", None
        elif subset is not None:
            chosen = _listed(Path(subset)) if isinstance(subset, str | Path) else tuple(subset)
            self.name, self._chosen = f"{self.name}-subset", chosen
            if wrong := [name for name, times in Counter(chosen).items() if times > 1 or name not in self._files]:
                raise DatasetError(f"subset= has {some(wrong)}, expected ids of {split}, each once: take another split")
        self._verify(checksum)

    @property
    def names(self) -> tuple[str, ...]:
        return self._single_class_ids if self._chosen is None else self._chosen

    def single_class_ids(self) -> tuple[str, ...]:
        """Ids of the split with exactly one of the classes 1 to 20 in the full-size mask; the paper counts 930 in val.

        Reads every mask once. The published code asks for at most two numbers, background included, in the mask shrunk
        to 224 pixels: that depends on the size, takes two classes without background and loses small objects.
        """
        return self._single_class_ids

    @cached_property
    def _single_class_ids(self) -> tuple[str, ...]:
        return tuple(name for name in self._ids if len(present(self._mask(name), _VOC_LABELS)) == 1)

    def _mask(self, name: str) -> np.ndarray:
        path = self._files[name][1]
        return to_labels(samples.read_labels(path)[0], _VOC_LABELS.values(), path)

    def _read(self, position: int) -> Sample:
        name = self.names[position]
        image, mask = samples.read_image(self._files[name][0]), self._mask(name)
        same_size(image, mask, *self._files[name])
        return Sample(name, image, mask, present(mask, _VOC_LABELS), dict(_VOC_LABELS))


class DavisVideos(Reader):
    """Reader of videos in the layout of DAVIS 2016 and 2017 (Perazzi et al.; Pont-Tuset et al.).

    ``JPEGImages/480p/<sequence>/*.jpg`` and ``Annotations/480p/<sequence>/*.png``, a mask for every frame. 2017's are
    palette pictures of object numbers, 255 void; 2016's are grey, 255 the object. A sample is a sequence (80 frames of
    854 x 480 are 98 MB): `frames` takes fewer. Opening lists folders.

    Args:
        root: the folder that holds JPEGImages.
        split: a list in ImageSets without its suffix (``2017/val``, ``480p/val``), the path of a list, or sequences;
            None: those of `words`. Lists have a sequence a line, or a frame's two paths as in 2016.
        words: sequence to word, for all of its objects together; or to a word for each object from 1, where equal
            words are one label. The data set itself has no words.
        resolution: the folder's name.
        frames: which frames of every sequence: ``slice(0, 16)``.
        background: words for what is no object.
        checksum: ``sha256:…`` over the files, as `checksum` gives it; reads all of them.

    Raises:
        DatasetError: no such folder, list or sequence; frames without masks; no words; another checksum. On access: a
            broken file, sizes that differ, an object without a word.

    Example:
        >>> data = DavisVideos("DAVIS", "2017/val", words={"camel": "camel", "judo": ["man", "man"]})  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        split: str | Path | Sequence[str] | None = None,
        words: Mapping[str, str | Sequence[str]] | None = None,
        *,
        resolution: str = "480p",
        frames: slice = slice(None),
        background: Sequence[str] = (),
        checksum: str | None = None,
    ) -> None:
        self.root, self.background = Path(root), tuple(background)
        self._pictures, self._masks = (self.root / kind / resolution for kind in ("JPEGImages", "Annotations"))
        self.name = f"davis-{split}" if isinstance(split, str | Path) else "davis"
        sequences = tuple(words or ()) if split is None else split
        if isinstance(sequences, str | Path):
            inside = self.root / "ImageSets" / f"{split}.txt"
            sequences = _listed(inside if inside.is_file() else Path(sequences), sequences=True)
        words = words or {}
        if missing := [name for name in sequences if name not in words] or ([] if words else ["all"]):
            raise DatasetError(
                f"{self.root} does not say what its videos show: found no words for {some(missing)} in words=, give "
                "words={'camel': 'camel', 'judo': ['man', 'man'], …}, a word or one for each object"
            )
        given = {name: words[name] for name in sequences}
        self._merged = [name for name, word in given.items() if isinstance(word, str)]
        self._words = {name: (word,) if isinstance(word, str) else tuple(word) for name, word in given.items()}
        pairs = {name: _pairs(self._pictures / name, self._masks / name) for name in sequences}
        self._frames = {name: list(found.values())[frames] for name, found in pairs.items()}
        if empty := [name for name, chosen in self._frames.items() if not chosen]:
            raise DatasetError(f"{some(empty)}: found no frames in {frames} below {self._pictures}: choose others")
        self.files = tuple(path for chosen in self._frames.values() for pair in chosen for path in pair)
        self._names = tuple(self._frames)
        self.vocabulary = tuple(dict.fromkeys(word for objects in self._words.values() for word in objects))
        self._verify(checksum)

    def _identity(self) -> object:
        return self._words, self._merged

    def _read(self, position: int) -> Sample:
        pairs, objects = self._frames[name := self._names[position]], self._words[name]
        images, read = [samples.read_image(path) for path, _ in pairs], [samples.read_labels(path) for _, path in pairs]
        for image, (mask, _), (picture, annotation) in zip(images, read, pairs, strict=True):
            same_size(image, mask, picture, annotation)
            same_size(images[0], image, pairs[0][0], picture)
        numbers = np.stack([mask for mask, _ in read])
        if set(np.unique(numbers).tolist()) <= {0, 255} and numbers.any():
            # 2016's masks. In a palette, or where there are several objects, 255 would be void and the video empty
            if any(palette for _, palette in read) or len(objects) > 1:
                raise DatasetError(
                    f"{self._masks / name}: found 0 and 255 alone, expected object numbers in a palette, or grey masks "
                    f"and one word; its words are {', '.join(objects)}. Give one word, or other frames"
                )
            numbers = np.minimum(numbers, 1)
        if name in self._merged:
            numbers = np.where(numbers == 255, 255, np.minimum(numbers, 1))
        allowed = range(1, len(objects) + 1)
        places = np.stack([to_labels(frame, allowed, path) for frame, (_, path) in zip(numbers, pairs, strict=True)])
        labels = {word: label for label, word in enumerate(dict.fromkeys(objects), 1)}
        mask = np.array([0, *(labels[word] for word in objects), VOID], np.int16)[places]  # VOID is -1: the last entry
        return Sample(name, np.stack(images), mask, present(mask, labels), labels)


class ImageMaskFolder(Reader):
    """Reader of two folders with a mask for every picture, paired by name without suffix. Opening lists the folders.

    Args:
        images: the folder of pictures.
        masks: the folder of masks without loss (PNG, TIFF, BMP), a number a pixel.
        words: one word, or stem to word: masks are 0 and 1, or 0 and 255. Or word to label, 0 background, 255 void.
        background: words for what is neither.
        checksum: ``sha256:…`` over the files, as `checksum` gives it; reads all of them.

    Raises:
        DatasetError: no such folder or pictures; a picture without mask or the reverse; no words or labels; another
            checksum. On access: a broken file or lossy mask, sizes that differ, a number without a word.

    Example:
        >>> data = ImageMaskFolder("images", "masks", words={"boat": 1, "sun": 2})  # doctest: +SKIP
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        words: str | Mapping[str, int] | Mapping[str, str],
        *,
        background: Sequence[str] = (),
        checksum: str | None = None,
    ) -> None:
        self.root = Path(os.path.commonpath([Path(images).absolute(), Path(masks).absolute()]))
        self.name, self.background = Path(images).name, tuple(background)
        self._files = _pairs(Path(images).absolute(), Path(masks).absolute())
        self.files = tuple(path for pair in self._files.values() for path in pair)
        table = {} if isinstance(words, str) else words
        self._labels = {word: label for word, label in table.items() if isinstance(label, int)}
        free = set(self._labels.values()) & (set(range(1, 2**15)) - {255})
        if len(free) != len(self._labels) or (free and len(free) != len(table)):
            raise DatasetError(f"words={words!r}: expected for each word its own label, 1 to 32767, not 255 (void)")
        self._names = tuple(self._files)
        self._words = dict.fromkeys(self._files, words) if isinstance(words, str) else table
        if not self._labels and (missing := [stem for stem in self._files if not self._words.get(stem)]):
            raise DatasetError(
                f"{len(missing)} of {len(self)} pictures have no word: {some(missing)}. Give words='dog' for all, "
                f"words={{{missing[0]!r}: 'dog', …}}, or words={{'dog': 1, …}} where masks have labels"
            )
        self.vocabulary = tuple(self._labels) or tuple(dict.fromkeys(str(self._words[stem]) for stem in self._files))
        self._verify(checksum)

    def _identity(self) -> object:
        return self._labels or [self._words[stem] for stem in self._files]

    def _read(self, position: int) -> Sample:
        picture, path = self._files[name := self._names[position]]
        image, (numbers, _) = samples.read_image(picture, turned="refused"), samples.read_labels(path)
        same_size(image, numbers, picture, path)
        labels = self._labels or {str(self._words[name]): 1}
        if not self._labels and 1 not in numbers:  # with 1 beside it, 255 is void or a mistake, and refused
            numbers = np.where(numbers == 255, 1, numbers)
        mask = to_labels(numbers, labels.values(), path, void=255 if self._labels else None)
        return Sample(name, image, mask, present(mask, labels), dict(labels))


def _listed(path: Path, *, sequences: bool = False) -> tuple[str, ...]:
    """Entries of a list, one a line; of 2016's pairs of frames, the sequences."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}), expected a list with a name a line: give one") from None
    names = Counter(Path(line.split()[0]).parent.name if sequences and "/" in line else line for line in lines)
    wrong = [name for name, times in names.items() if len(name.split()) != 1 or (times > 1 and not sequences)]
    if wrong or not names:
        raise DatasetError(f"{path}: found {some(wrong) or 'no names'}, expected a name a line, each once: correct it")
    return tuple(names)


def _stems(folder: Path) -> dict[str, Path]:
    """Pictures by name without suffix, frame 2 before frame 10."""
    try:
        found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_file()]
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be listed ({error.strerror}), expected a folder: give its path") from None
    # ._frame.jpg is what macOS leaves beside frame.jpg
    found = [path for path in found if path.name[0] != "." and path.suffix.lower() in _PICTURES]
    by_stem = {path.stem: path for path in sorted(found, key=lambda path: (len(path.stem), path.name))}
    twice = [path.name for path in found if by_stem[path.stem] != path]
    if twice or not found:
        raise DatasetError(f"{folder}: found {some(twice) or 'no pictures'}, expected one for each name: sort them")
    return by_stem


def _pairs(pictures: Path, masks: Path, wanted: Collection[str] | None = None) -> dict[str, tuple[Path, Path]]:
    """Picture and mask by stem; of all, both ways, where none are wanted."""
    here, there = _stems(pictures), _stems(masks)
    every = {**here, **there} if wanted is None else wanted
    for folder, found in ((pictures, here), (masks, there)):
        if missing := [stem for stem in every if stem not in found]:
            raise DatasetError(
                f"{folder}: found none of {len(missing)} of {len(every)} names, {some(missing)}; expected a picture "
                f"in {pictures.name} and a mask in {masks.name} for each. Add what is missing, or take the names out"
            )
    return {stem: (here[stem], there[stem]) for stem in every}
