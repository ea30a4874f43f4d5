"""Captioned picture-book scenes with exact masks, made from a seed: sprites that are nouns on textured backgrounds.

The data that the demo models are trained on, and held-out scenes to score maps against: every pixel's owner is known
because the scene was drawn, not annotated. numpy and Pillow only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dit_probe.datasets.backgrounds import PAINTERS, background
from dit_probe.datasets.sprites import SPRITES, sprite
from dit_probe.errors import DitProbeError

NOUNS: tuple[str, ...] = tuple(SPRITES)
"""What can stand in a scene."""

BACKGROUNDS: tuple[str, ...] = tuple(PAINTERS)
"""What a scene can stand on."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
STYLES: tuple[str, ...] = ("list", "sentence", "relation", "word")
"""Caption styles: "sun, boat, water" / "a sun and a boat on water" / "a sun left of a boat on water" / "sun"."""

# side of an object as a fraction of the scene, by number of objects: 18 to 28 pixels of 64, so that an object covers
# 4 to 7 of the 16 x 16 image tokens in each direction and can be localised there
_SIDES: dict[int, tuple[float, float]] = {1: (0.34, 0.44), 2: (0.31, 0.44), 3: (0.28, 0.38), 4: (0.28, 0.34)}
_COUNT_ODDS: tuple[float, ...] = (0.25, 0.45, 0.2, 0.1)
_PLACES: dict[str, str] = {"sky": "in the sky", "night": "at night"}


class SceneError(DitProbeError):
    """The scene that was asked for cannot be drawn."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene.

    Attributes:
        noun: One of `NOUNS`.
        box: (y0, x0, y1, x1) in pixels, half-open.
    """

    noun: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """(y, x) of the middle of the box in pixels."""
        y0, x0, y1, x1 = self.box
        return (y0 + y1) / 2, (x0 + x1) / 2


class Owned:
    """What scenes and clips say about who owns which pixel."""

    masks: dict[str, np.ndarray]
    background: str

    @property
    def words(self) -> tuple[str, ...]:
        """The nouns in the picture and its background word: the concepts that a map of it should tell apart."""
        return (*self.masks, self.background)

    @property
    def pixels(self) -> np.ndarray:
        """([frame,] y, x, 3) uint8."""
        raise NotImplementedError

    @property
    def background_mask(self) -> np.ndarray:
        """([frame,] y, x) bool: pixels that no object covers by half."""
        covered = np.zeros(self.pixels.shape[:-1], dtype=bool)
        for mask in self.masks.values():
            covered |= mask
        return ~covered


@dataclass(frozen=True, eq=False)
class Scene(Owned):
    """A picture, its caption and who owns which pixel.

    Attributes:
        image: (y, x, 3) uint8.
        masks: Noun to (y, x) bool: the pixels that the object covers by at least half. Masks are disjoint.
        background: One of `BACKGROUNDS`.
        caption: What the scene shows, in one of `STYLES`.
        objects: The objects with their boxes, in the order in which the caption names them.
        seed: What the scene was made from.
    """

    image: np.ndarray
    masks: dict[str, np.ndarray]
    background: str
    caption: str
    objects: tuple[Placed, ...]
    seed: int

    @property
    def pixels(self) -> np.ndarray:
        """(y, x, 3) uint8."""
        return self.image


def scene(
    seed: int,
    size: int = 64,
    objects: int | Sequence[str] | None = None,
    background_word: str | None = None,
    style: str | None = None,
) -> Scene:
    """Draw one scene; the same arguments give the same scene.

    Args:
        seed: Any integer from 0.
        size: Width and height in pixels, 32 or more.
        objects: How many objects (0 to 4), or which nouns; None draws one to four.
        background_word: One of `BACKGROUNDS`; None draws one.
        style: One of `STYLES`; None draws one that fits the number of objects.

    Raises:
        SceneError: For an unknown word or style, or a number of objects that does not fit.

    Example:
        >>> picture = scene(3, objects=["sun", "boat"], background_word="water", style="sentence")
        >>> picture.caption in ("a sun and a boat on water", "a boat and a sun on water")
        True
        >>> picture.image.shape, int((picture.masks["sun"] & picture.masks["boat"]).sum())
        ((64, 64, 3), 0)
    """
    rng = np.random.default_rng(seed)
    nouns = choose_nouns(rng, 1 + int(rng.choice(len(_COUNT_ODDS), p=_COUNT_ODDS)) if objects is None else objects)
    word = str(rng.choice(BACKGROUNDS)) if background_word is None else background_word
    if word not in BACKGROUNDS:
        raise SceneError(f"unknown background {word!r}: a scene can stand on {', '.join(BACKGROUNDS)}")
    if style is not None and style not in STYLES:
        raise SceneError(f"unknown caption style {style!r}: choose one of {', '.join(STYLES)}")
    if size < 32:
        raise SceneError(f"a scene of {size} x {size} pixels is too small to tell its objects apart: use 32 or more")

    image = background(word, size, rng)
    masks: dict[str, np.ndarray] = {}
    placed = [Placed(noun, box) for noun, box in zip(nouns, _place(rng, len(nouns), size), strict=True)]
    for thing in placed:
        y0, x0, y1, x1 = thing.box
        drawn = sprite(thing.noun, y1 - y0, rng)
        coverage = drawn[..., 3:]
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - coverage) + drawn[..., :3] * coverage
        masks[thing.noun] = np.zeros((size, size), dtype=bool)
        masks[thing.noun][y0:y1, x0:x1] = coverage[..., 0] >= 0.5
    caption = _caption(rng, placed, word, style)
    return Scene(np.round(image).clip(0, 255).astype(np.uint8), masks, word, caption, tuple(placed), seed)


def scenes(n: int, seed: int = 0, size: int = 64, objects: int | Sequence[str] | None = None) -> Iterator[Scene]:
    """Draw `n` scenes that no other seed's scenes share.

    Args:
        n: How many, at most a million.
        seed: Which family of scenes; scene i is `scene(seed * 1_000_000 + i)`.
        size: Width and height in pixels.
        objects: As for `scene`.

    Example:
        >>> [len(picture.objects) for picture in scenes(3, seed=1, objects=2)]
        [2, 2, 2]
    """
    for index in range(n):
        yield scene(seed * 1_000_000 + index, size=size, objects=objects)


def choose_nouns(rng: np.random.Generator, objects: int | Sequence[str], most: int = max(_SIDES)) -> list[str]:
    """Draw nouns, or check those that were asked for.

    Args:
        rng: What draws.
        objects: How many, or which.
        most: How many a picture has room for.

    Raises:
        SceneError: For an unknown noun, one that comes twice, or too many.

    Example:
        >>> choose_nouns(np.random.default_rng(0), ["sun", "boat"])
        ['sun', 'boat']
    """
    if isinstance(objects, str):
        raise SceneError(f"objects={objects!r} is one string: give a list of nouns, [{objects!r}], or a number")
    nouns = [str(noun) for noun in rng.permutation(NOUNS)[:objects]] if isinstance(objects, int) else list(objects)
    unknown = [noun for noun in nouns if noun not in NOUNS]
    if unknown:
        raise SceneError(f"unknown noun {unknown[0]!r}: a scene can show {', '.join(NOUNS)}")
    wanted = objects if isinstance(objects, int) else len(nouns)
    if not 0 <= wanted <= most or len(set(nouns)) != wanted:
        raise SceneError(f"objects={objects!r}: a scene shows 0 to {most} objects, each noun once")
    return nouns


def _place(rng: np.random.Generator, count: int, size: int) -> list[tuple[int, int, int, int]]:
    """Find boxes that do not touch; starts over when the first ones leave no room for the last."""
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < count:
        boxes = []
        for _ in range(60):
            low, high = _SIDES[count]
            side = int(rng.integers(round(low * size), round(high * size) + 1))
            y, x = (int(v) for v in rng.integers(1, size - side, 2))
            box = (y, x, y + side, x + side)
            if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
                boxes.append(box)
            if len(boxes) == count:
                break
    return boxes


def describe(picture: Scene, seed: int, style: str | None = None) -> str:
    """Put a scene in words once more, with another order of objects and, unless told, another style.

    Args:
        picture: The scene.
        seed: Any integer from 0.
        style: One of `STYLES`; a style that doesn't fit the scene becomes a sentence.

    Example:
        >>> describe(scene(0, objects=["car"], background_word="sand"), seed=1, style="list")
        'car, sand'
    """
    rng = np.random.default_rng((picture.seed, seed))
    order = rng.permutation(len(picture.objects))
    return _caption(rng, [picture.objects[i] for i in order], picture.background, style)


def _caption(rng: np.random.Generator, placed: list[Placed], word: str, style: str | None) -> str:
    """Put placed objects in words, in their order."""
    if not placed:
        return word
    relation = _relation(placed) if len(placed) == 2 else None
    if style is None:
        fitting = ["list", "sentence"] + ["relation"] * (relation is not None) + ["word"] * (len(placed) == 1)
        style = fitting[int(rng.integers(len(fitting)))]
    where = place_in_words(word)
    named = [f"a {thing.noun}" for thing in placed]
    if style == "word" and len(placed) == 1:
        return named[0] if rng.random() < 0.5 else placed[0].noun
    if style == "relation" and relation is not None:
        return f"{named[0]} {relation} {named[1]} {where}"
    if style == "list":
        return ", ".join([*(thing.noun for thing in placed), word])
    together = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{together} {where}"


def place_in_words(background_word: str) -> str:
    """Say where something is.

    Example:
        >>> place_in_words("water"), place_in_words("night")
        ('on water', 'at night')
    """
    return _PLACES.get(background_word, f"on {background_word}")


def _relation(placed: list[Placed]) -> str | None:
    """Say where the first object is as seen from the second; None where two relations would be equally true."""
    (y0, x0), (y1, x1) = placed[0].centre, placed[1].centre
    across, down = x0 - x1, y0 - y1
    if abs(across) > 1.3 * abs(down):
        return "left of" if across < 0 else "right of"
    if abs(down) > 1.3 * abs(across):
        return "above" if down < 0 else "below"
    return None
