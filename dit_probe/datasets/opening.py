"""A data set from what a person types: a file or folder, told apart by what is in it, or the picture book."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_probe.datasets.samples import DatasetError, Reader
from dit_probe.datasets.segmentation import (
    DavisVideos,
    ImageMaskFolder,
    ImageNetSegmentation,
    PascalVOC,
    PictureBook,
    PictureBookClips,
)

DRAWN = {"picture-book": PictureBook, "picture-book-clips": PictureBookClips}
"""Data sets that are drawn from a seed."""
DRAWN_COUNT, DRAWN_SEED = 150, 7
"""Of the drawn data sets. Seed 0 is what the demo models are trained on."""


def open_dataset(
    place: str | Path,
    *,
    classes: str | Path | None = None,
    rename: str | Path | None = None,
    words: str | Path | Mapping[str, Any] | None = None,
    subset: str | None = None,
    count: int = DRAWN_COUNT,
    seed: int = DRAWN_SEED,
    objects: int | None = None,
) -> Reader:
    """Open a data set by its place.

    Args:
        place: ``picture-book`` or ``picture-book-clips``; a file ``*.mat`` of ImageNet-Segmentation; a folder that
            holds a VOC devkit, DAVIS's JPEGImages and Annotations, or the folders ``images`` and ``masks``.
        classes: of ImageNet-Segmentation, the table of synsets and words.
        rename: of ImageNet-Segmentation, a JSON file that maps names to single words.
        words: of DAVIS and of images with masks: a word, or a mapping, or the JSON file of one.
        subset: of PascalVOC, ``single_class`` or the path of a list of ids.
        count: of drawn scenes or clips.
        seed: of drawn scenes or clips.
        objects: in every drawn scene or clip; None: as the generator draws them.

    Raises:
        DatasetError: nothing there, or nothing that is known; what the readers refuse.

    Example:
        >>> len(open_dataset("picture-book", count=20, objects=1))
        20
    """
    if str(place) in DRAWN:
        return DRAWN[str(place)](count, seed, objects=objects)
    path = Path(place)
    if path.is_file():
        return ImageNetSegmentation(path, classes, rename=None if rename is None else _table(rename))
    named = _table(words) if isinstance(words, str | Path) and str(words).endswith(".json") else words
    if any((path / inner / "SegmentationClass").is_dir() for inner in ("", "VOC2012", "VOCdevkit/VOC2012")):
        return PascalVOC(path, subset=subset)
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return DavisVideos(path, words=named)  # pyright: ignore[reportArgumentType]  # it says itself what is wrong
    if (path / "images").is_dir() and (path / "masks").is_dir():
        if not named:
            raise DatasetError(f"{path}: found images and masks, and no words for them: give words='dog' or a table")
        return ImageMaskFolder(path / "images", path / "masks", named)  # pyright: ignore[reportArgumentType]
    raise DatasetError(
        f"{place}: found {'a folder of something else' if path.is_dir() else 'no such file or folder'}, expected "
        f"{', '.join(DRAWN)}, gtsegs_ijcv.mat, a folder with VOCdevkit, one with JPEGImages and Annotations, or one "
        "with images and masks"
    )


def _table(path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}), expected a JSON object of names and words") from None
    if not isinstance(found, dict):
        raise DatasetError(f"{path}: found a JSON {type(found).__name__}, expected an object of names and words")
    # the table of the paper's published code
    return found["categories"] if isinstance(found.get("categories"), dict) else found
