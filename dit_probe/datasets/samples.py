"""What a segmentation data set is made of: one record a picture, read when it is asked for, and refused by name.

Every reader gives the same `Sample`, whatever its files look like: labels with 0 for background and `VOID` where the
annotators did not decide. Nothing is downloaded: a reader takes a path and, if wanted, the checksum of what lies there.
"""

from __future__ import annotations

import hashlib
import operator
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from dit_probe.errors import DitProbeError

VOID = -1
"""The label of pixels that belong neither to an object nor to the background: 255 in files."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, zlib.error)  # what Pillow raises on broken files
_STRETCHED = {"L;2": 85, "L;4": 17}
_ORIENTATION = 0x112


class DatasetError(DitProbeError):
    """Files of a data set that are missing, broken, of another layout or not the ones that were meant."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture or a video, and what its annotation says about it.

    Attributes:
        name: unique in its data set: "n02085936_123", "2007_000033", "scene/00012".
        image: (y, x, 3) uint8, or (frame, y, x, 3) of a video.
        mask: (y, x) or (frame, y, x) int16 labels at the image's size; 0 is background, `VOID` undecided.
        target: the words that are in the picture.
        labels: word to label in `mask`, for every word that the annotation decides about. A word of the data set that
            stands here and not in `target` is known to be absent.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    target: tuple[str, ...]
    labels: dict[str, int]


class Dataset(Protocol):
    """What can be evaluated on: a sequence of samples that are read on access.

    Attributes:
        name: of the data set and of the part of it.
        vocabulary: all class words.
        background: words for what is no class, which the paper's protocol adds to the concepts; may be empty.
        fingerprint: the same for the same samples, also elsewhere: tells whether a run may be continued.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> tuple[str, ...]: ...

    @property
    def background(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def masks(sample: Sample, words: str | Sequence[str]) -> np.ndarray:
    """Which pixels belong to each word.

    Args:
        sample: of any reader.
        words: keys of its `labels`. A word that is absent from the picture has no pixels.

    Returns:
        (word, [frame,] y, x) bool; void pixels belong to no word.

    Raises:
        DatasetError: a word that the annotation says nothing about: that is no empty mask, but an unknown one.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> sample = PictureBook(1)[0]
        >>> masks(sample, sample.target).shape == (len(sample.target), 64, 64)
        True
    """
    words = (words,) if isinstance(words, str) else tuple(words)
    if unknown := [word for word in words if word not in sample.labels]:
        raise DatasetError(
            f"{sample.name}: its annotation says nothing about {', '.join(map(repr, unknown))}, whose mask is "
            f"unknown and not empty; it has {', '.join(sample.labels) or 'no words'}. Ask for words of sample.labels"
        )
    return np.array([sample.mask == sample.labels[word] for word in words], dtype=bool).reshape(-1, *sample.mask.shape)


def valid(sample: Sample) -> np.ndarray:
    """Which pixels count, ([frame,] y, x) bool: all but the void ones.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> bool(valid(PictureBook(1)[0]).all())  # what was drawn has no undecided pixels
        True
    """
    return sample.mask != VOID


class Reader(ABC):
    """What the readers share: access by index, iteration, fingerprint and checksum.

    A reader sets `name`, `vocabulary`, `background`, `_names`, and, where it has files, `files` and the file or folder
    `root` that they are in.
    """

    name: str
    vocabulary: tuple[str, ...]
    background: tuple[str, ...]
    root: Path | None = None
    files: tuple[Path, ...] = ()

    _names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all samples, in order."""
        return self._names

    @abstractmethod
    def _read(self, position: int) -> Sample: ...

    def _identity(self) -> object:
        """What else, besides names, words and files, decides what the samples are."""
        return None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Sample:
        position, count = operator.index(index), len(self)
        if not -count <= position < count:
            raise IndexError(f"{self.name} has samples 0 to {count - 1}, not {position}")
        return self._read(position % count)

    def __iter__(self) -> Iterator[Sample]:
        return (self._read(position) for position in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """sha256 over names, words, options, paths below `root` and sizes of the files; reads no picture."""
        parts = [type(self).__name__, self.names, self.vocabulary, self.background, self._identity()]
        parts += [(_relative(path, self.root), path.stat().st_size) for path in self.files]
        return "sha256:" + hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()

    def checksum(self) -> str:
        """Read every file and sum it up as ``sha256:…``, for the argument `checksum` of the next reader.

        Of one file it is what ``sha256sum`` prints; of several, the sha256 of what ``sha256sum`` prints about them in
        the order of their paths relative to `root`.
        """
        sums = sorted((_relative(path, self.root), _sha256(path)) for path in self.files)
        if self.files == (self.root,):
            return f"sha256:{sums[0][1]}"
        listing = "".join(f"{digest}  {path}\n" for path, digest in sums)
        return "sha256:" + hashlib.sha256(listing.encode()).hexdigest()

    def _verify(self, wanted: str | None) -> None:
        if wanted is None:
            return
        algorithm, _, digest = wanted.lower().partition(":")
        if algorithm != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise DatasetError(f"checksum={wanted!r} cannot be compared: write 'sha256:' and 64 hexadecimal digits")
        if (found := self.checksum()) != f"sha256:{digest}":
            raise DatasetError(
                f"{self.root} is not what was meant: its checksum is {found}, expected {wanted}. Get the files once "
                "more; if these are the right ones, give their checksum"
            )


class Part:
    """Some samples of a data set, as a data set: read when asked for, with words as in the whole.

    Args:
        dataset: the whole, a reader or anything that has what `Dataset` lists.
        indices: of the samples in it, each once; they keep this order. Negative ones count from the end.
        name: of the part.

    Raises:
        DatasetError: an index that the whole does not have, or has twice here.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> part = Part(PictureBook(100), range(20), "the first 20")
        >>> len(part), part[-1].name
        (20, 'scene/00019')
    """

    def __init__(self, dataset: Dataset, indices: Iterable[int], name: str) -> None:
        self.dataset, self.name = dataset, name
        self.vocabulary, self.background = dataset.vocabulary, dataset.background
        count = len(dataset)
        self.indices = tuple(index + count if index < 0 else index for index in indices)
        times = Counter(self.indices)
        if wrong := [str(index) for index, found in times.items() if found > 1 or not 0 <= index < count]:
            raise DatasetError(
                f"{name}: found the indices {some(wrong)}, which {dataset.name} does not have or which stand here more "
                f"than once: give each of 0 to {count - 1} once at most"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the samples; an AttributeError where the whole has no names without reading."""
        whole: Any = self.dataset
        return tuple(whole.names[index] for index in self.indices)

    @property
    def fingerprint(self) -> str:
        """sha256 over the fingerprint of the whole and the indices."""
        return "sha256:" + hashlib.sha256(f"{self.dataset.fingerprint}\n{self.indices}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Sample:
        return self.dataset[self.indices[index]]

    def __iter__(self) -> Iterator[Sample]:
        return (self.dataset[index] for index in self.indices)


def split(dataset: Dataset, share: float = 0.1, seed: int = 0) -> tuple[Part, Part]:
    """Two disjoint parts: one to choose layers, timesteps and thresholds on, one to report numbers of.

    What is chosen and reported on the same pictures is too good. A sample goes to the first part if a hash of seed and
    name is below `share`: it stays there in another order, a longer data set or a part of it. The parts come close to
    the shares and do not meet them.

    Args:
        dataset: a reader; or anything that has what `Dataset` lists, whose samples are told apart by ``names`` and,
            where it has none, by index.
        share: of the samples to choose on, between 0 and 1.
        seed: another one gives another split.

    Returns:
        The part to choose on, named "…-choosing", and the one to report, "…-reported".

    Raises:
        DatasetError: a share out of range, or a part without samples.

    Example:
        >>> from dit_probe.datasets.segmentation import PictureBook
        >>> choosing, reported = split(PictureBook(1000))
        >>> len(choosing), len(reported), reported.name
        (106, 894, 'picture-book-scenes-1-reported')
    """
    if not 0 < share < 1:
        raise DatasetError(f"share={share} of {dataset.name}: give a number between 0 and 1, such as 0.1")
    names = getattr(dataset, "names", None) or range(len(dataset))
    digests = [hashlib.sha256(f"{seed}\n{name}".encode()).digest() for name in names]
    chosen = [int.from_bytes(digest[:8], "big") < share * 2**64 for digest in digests]
    if len(set(chosen)) < 2:
        raise DatasetError(
            f"share={share}, seed={seed} leave all {len(dataset)} samples of {dataset.name} in one part: use more "
            "samples, or another share or seed"
        )
    first, second = ([at for at, found in enumerate(chosen) if found is kept] for kept in (True, False))
    return Part(dataset, first, f"{dataset.name}-choosing"), Part(dataset, second, f"{dataset.name}-reported")


def _relative(path: Path, root: Path | None) -> str:
    return path.name if root is None or root == path else path.relative_to(root).as_posix()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(items: Collection[str]) -> str:
    """The first few of them, for an error."""
    return ", ".join(list(items)[:5]) + (" …" if len(items) > 5 else "")


def present(mask: np.ndarray, labels: Mapping[str, int]) -> tuple[str, ...]:
    """Words of the labels that occur in a mask."""
    found = set(np.unique(mask).tolist())
    return tuple(word for word, label in labels.items() if label in found)


def read_image(path: Path, *, turned: Literal["as stored", "refused", "upright"] = "as stored") -> np.ndarray:
    """Decode a picture to (y, x, 3) uint8; `turned` says what becomes of one that viewers turn (EXIF orientation).

    Raises:
        DatasetError: missing, broken, see-through, of more than 8 bits, or refused.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            deep, marked = image.mode.startswith(("I", "F")), image.getexif().get(_ORIENTATION, 1) != 1
            image: Image.Image = ImageOps.exif_transpose(image) if turned == "upright" else image
            if image.has_transparency_data:
                image = image.convert("RGBA")
            opaque = image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255
            pixels = None if deep else np.array(image.convert("RGB"))
    except _BROKEN as error:
        raise DatasetError(_unreadable(path, error)) from None
    if pixels is None:
        raise DatasetError(f"{path}: found more than 8 bits a channel, expected 8: save it as 8-bit RGB")
    if marked and turned == "refused":
        raise DatasetError(
            f"{path}: found an EXIF orientation, expected none, as it may or may not turn the mask too: save the "
            "picture upright, as the mask is"
        )
    if not opaque:
        raise DatasetError(f"{path}: found transparent pixels, expected none, as what is behind is unknown: flatten it")
    return pixels


def read_labels(path: Path) -> tuple[np.ndarray, bool]:
    """Decode a mask to its (y, x) numbers as they stand in the file, and whether they index a palette.

    Raises:
        DatasetError: missing, broken, lossy or of several channels.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Pillow stretches 2 and 4 bits of grey to 0..255, which would turn label 1 into 85 or 17
            raw = image.tile[0][3] if image.tile else None
            stretch = _STRETCHED.get(raw[0] if isinstance(raw, tuple) else str(raw), 1)
            image.load()
            mode, kind, numbers = image.mode, image.format, np.array(image)
    except _BROKEN as error:
        raise DatasetError(_unreadable(path, error)) from None
    if kind in ("JPEG", "WEBP"):
        raise DatasetError(f"{path}: a mask in {kind}, which changes the numbers of labels: export it once more as PNG")
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise DatasetError(
            f"{path}: found a mask of mode {mode}, expected one number a pixel (palette or grey). If its colours stand "
            "for classes, save it as a palette PNG"
        )
    return numbers.astype(np.int64) // stretch, mode == "P"


def to_labels(numbers: np.ndarray, allowed: Collection[int], path: object, *, void: int | None = 255) -> np.ndarray:
    """Turn a file's numbers into int16 labels, `void` into `VOID`; None where the format has no void.

    Raises:
        DatasetError: numbers that are not 0, `allowed` or `void`.
    """
    if wrong := sorted(set(np.unique(numbers).tolist()) - {0, void} - set(allowed)):
        expected = sorted({0, *allowed})
        named = f"0..{expected[-1]}" if expected == list(range(len(expected))) else ", ".join(map(str, expected))
        raise DatasetError(
            f"{path}: found {', '.join(map(str, wrong[:8]))}{' …' if len(wrong) > 8 else ''} in the mask, expected "
            f"{named}{'' if void is None else f' or {void} (void)'}. Is it a mask of this data set, not resized with "
            "interpolation, and does every label have its word?"
        )
    return np.where(numbers == void, VOID, numbers).astype(np.int16)


def same_size(image: np.ndarray, mask: np.ndarray, image_path: object, mask_path: object) -> None:
    """Refuse, with a DatasetError, a pair of different (y, x)."""
    if image.shape[:2] != mask.shape[:2]:
        (height, width), (rows, columns) = image.shape[:2], mask.shape[:2]
        raise DatasetError(
            f"{mask_path}: found {columns} x {rows} pixels (width x height), expected {width} x {height}, the size of "
            f"{image_path}. Is it that picture's mask? Resize neither: get the originals"
        )


def _unreadable(path: Path, error: Exception) -> str:
    if not path.is_file():
        return f"{path}: found no such file, expected a picture: get the data set once more or correct its list"
    size = path.stat().st_size
    return f"{path}: found {size} bytes that do not decode ({error}), expected a whole picture: copy it once more"
