"""Short captioned clips of moving picture-book sprites with exact masks of every frame, made from a seed.

A sprite is drawn once, at twice the clip's resolution, and moves by whole pixels of that resolution over a background
that stands still; frames and masks are means over 2 x 2 pixels, so that a sprite moves by half pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dit_probe.datasets.backgrounds import background
from dit_probe.datasets.scenes import BACKGROUNDS, NOUNS, Owned, SceneError, choose_nouns, place_in_words
from dit_probe.datasets.sprites import sprite

MOTIONS: dict[str, tuple[int, int]] = {
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up": (-1, 0),
    "moving down": (1, 0),
    "still": (0, 0),
}
"""How a thing moves, and its direction (y, x)."""

CLIP_STYLES: tuple[str, ...] = ("list", "sentence", "word")
"""Caption styles: "boat moving right, water" / "a boat moving right on water" / "boat"."""

CLIP_WORDS: tuple[str, ...] = ("moving", "still", "left", "right", "up", "down")
"""Words of the captions that scenes don't have."""

CAPTION_WORDS: tuple[str, ...] = (*NOUNS, *BACKGROUNDS, "a", "and", "on", "in", "the", "at", *CLIP_WORDS)
"""Every word that a caption of a clip may contain."""

# side of an object as a fraction of the picture, by number of objects
_SIDES: dict[int, tuple[float, float]] = {1: (0.34, 0.5), 2: (0.3, 0.42)}
_TWO_OBJECTS = 0.45
_TRAVEL = 0.25  # of the picture, at least, by what moves


@dataclass(frozen=True)
class Moving:
    """One object of a clip.

    Attributes:
        noun: One of `NOUNS`.
        motion: One of `MOTIONS`.
        boxes: (y0, x0, y1, x1) in pixels for every frame, half-open; halves occur.
    """

    noun: str
    motion: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, eq=False)
class Clip(Owned):
    """Frames, their caption and who owns which pixel.

    Attributes:
        frames: (frame, y, x, 3) uint8.
        masks: Noun to (frame, y, x) bool: the pixels that the object covers by at least half. Masks are disjoint.
        background: One of `BACKGROUNDS`.
        caption: What the clip shows, in one of `CLIP_STYLES`.
        objects: The objects with their boxes, in the order in which the caption names them.
        seed: What the clip was made from.
    """

    frames: np.ndarray
    masks: dict[str, np.ndarray]
    background: str
    caption: str
    objects: tuple[Moving, ...]
    seed: int

    @property
    def pixels(self) -> np.ndarray:
        """(frame, y, x, 3) uint8."""
        return self.frames


def clip(
    seed: int,
    size: int = 32,
    frames: int = 9,
    objects: int | Sequence[str] | None = None,
    background_word: str | None = None,
    motions: Sequence[str] | None = None,
    style: str | None = None,
) -> Clip:
    """Draw one clip; the same arguments give the same clip.

    Args:
        seed: Any integer from 0.
        size: Width and height in pixels, 32 or more.
        frames: How many, 2 or more.
        objects: How many objects (0 to 2), or which nouns; None draws one or two.
        background_word: One of `BACKGROUNDS`; None draws one.
        motions: One of `MOTIONS` for every object, in the order of `objects`; None draws them.
        style: One of `CLIP_STYLES`; None draws one that fits.

    Raises:
        SceneError: For an unknown word, motion or style, sizes and numbers that do not fit, or objects that find no
            way past each other.

    Example:
        >>> drawn = clip(1, objects=["boat"], background_word="water", motions=["moving right"], style="sentence")
        >>> drawn.caption, drawn.frames.shape
        ('a boat moving right on water', (9, 32, 32, 3))
        >>> drawn.objects[0].boxes[0][1] + 8 <= drawn.objects[0].boxes[-1][1]
        True
    """
    rng = np.random.default_rng(seed)
    if size < 32 or frames < 2:
        raise SceneError(
            f"a clip of {frames} frames of {size} x {size} pixels: use 2 frames or more of 32 x 32 or more"
        )
    if objects is None:
        objects = 1 + int(rng.random() < _TWO_OBJECTS)
    nouns = choose_nouns(rng, objects, most=max(_SIDES))
    word = str(rng.choice(BACKGROUNDS)) if background_word is None else background_word
    if word not in BACKGROUNDS:
        raise SceneError(f"unknown background {word!r}: a clip can show {', '.join(BACKGROUNDS)}")
    if isinstance(motions, str):
        raise SceneError(f"motions={motions!r} is one string: give a list with one motion an object, [{motions!r}]")
    moves = [str(rng.choice(list(MOTIONS))) for _ in nouns] if motions is None else list(motions)
    if len(moves) != len(nouns) or not set(moves) <= set(MOTIONS):
        raise SceneError(f"motions={moves!r} for {nouns}: give each object one of {', '.join(MOTIONS)}")
    if style is not None and style not in CLIP_STYLES:
        raise SceneError(f"unknown caption style {style!r}: choose one of {', '.join(CLIP_STYLES)}")

    fine = 2 * size
    still = background(word, fine, rng)
    images = np.repeat(still[None], frames, axis=0)
    masks, placed = {}, []
    for noun, motion, (side, path) in zip(nouns, moves, _paths(rng, moves, fine, frames), strict=True):
        drawn = sprite(noun, side, rng)
        coverage = np.zeros((frames, fine, fine, 1), dtype=drawn.dtype)
        for frame, (y, x) in enumerate(path):
            here = np.s_[frame, y : y + side, x : x + side]
            coverage[here] = drawn[..., 3:]
            images[here] = images[here] * (1 - drawn[..., 3:]) + drawn[..., :3] * drawn[..., 3:]
        masks[noun] = _halved(coverage)[..., 0] >= 0.5
        boxes = tuple((y / 2, x / 2, (y + side) / 2, (x + side) / 2) for y, x in path.tolist())
        placed.append(Moving(noun, motion, boxes))
    caption = _caption(rng, placed, word, style)
    return Clip(np.round(_halved(images)).clip(0, 255).astype(np.uint8), masks, word, caption, tuple(placed), seed)


def clips(
    n: int, seed: int = 0, size: int = 32, frames: int = 9, objects: int | Sequence[str] | None = None
) -> Iterator[Clip]:
    """Draw `n` clips that no other seed's clips share.

    Args:
        n: How many, at most a million.
        seed: Which family of clips; clip i is `clip(seed * 1_000_000 + i)`.
        size: Width and height in pixels.
        frames: How many.
        objects: As for `clip`.

    Example:
        >>> [len(drawn.objects) for drawn in clips(3, seed=1, objects=2)]
        [2, 2, 2]
    """
    for index in range(n):
        yield clip(seed * 1_000_000 + index, size=size, frames=frames, objects=objects)


def describe_clip(drawn: Clip, seed: int, style: str | None = None) -> str:
    """Put a clip in words once more, with another order of objects and, unless told, another style.

    Args:
        drawn: The clip.
        seed: Any integer from 0.
        style: One of `CLIP_STYLES`; a style that doesn't fit the clip becomes a sentence.

    Example:
        >>> describe_clip(clip(0, objects=["car"], background_word="sand", motions=["still"]), seed=1, style="list")
        'car still, sand'
    """
    rng = np.random.default_rng((drawn.seed, seed))
    order = rng.permutation(len(drawn.objects))
    return _caption(rng, [drawn.objects[i] for i in order], drawn.background, style)


def _caption(rng: np.random.Generator, objects: list[Moving], word: str, style: str | None) -> str:
    if not objects:
        return word
    if style is None:
        # a lone word says less than the clip shows: seldom
        odds = [0.4, 0.5, 0.1] if len(objects) == 1 else [0.4, 0.6, 0.0]
        style = CLIP_STYLES[int(rng.choice(3, p=odds))]
    if style == "word" and len(objects) == 1:
        return f"a {objects[0].noun}" if rng.random() < 0.5 else objects[0].noun
    if style == "list":
        return ", ".join([*(f"{thing.noun} {thing.motion}" for thing in objects), word])
    named = [
        f"a still {thing.noun}" if thing.motion == "still" else f"a {thing.noun} {thing.motion}" for thing in objects
    ]
    return f"{' and '.join(named)} {place_in_words(word)}"


def _paths(rng: np.random.Generator, moves: list[str], size: int, frames: int) -> list[tuple[int, np.ndarray]]:
    """Sides and upper left corners (frame, 2) of objects that stay in the picture and never touch."""
    for _ in range(2000):  # the hardest pairs, one along and one across, take 100 tries on average
        paths = [_path(rng, MOTIONS[move], size, frames, _SIDES[len(moves)]) for move in moves]
        if len(paths) < 2 or _apart(*paths):
            return paths
    raise SceneError(
        f"objects {' and '.join(moves)} found no way past each other in {frames} frames of {size // 2} x {size // 2} "
        "pixels after 2000 tries: take another seed, other motions or one object"
    )


def _path(
    rng: np.random.Generator, direction: tuple[int, int], size: int, frames: int, sides: tuple[float, float]
) -> tuple[int, np.ndarray]:
    side = int(rng.integers(round(sides[0] * size), round(sides[1] * size) + 1))
    room = size - side
    travel = rng.integers(int(np.ceil(_TRAVEL * size)), room + 1)
    offsets = np.round(np.linspace(0, travel, frames)).astype(int)[:, None] * np.array(direction)
    low, high = -offsets.min(axis=0), room - offsets.max(axis=0)
    return side, rng.integers(low, high + 1) + offsets


def _apart(one: tuple[int, np.ndarray], other: tuple[int, np.ndarray]) -> bool:
    (a, first), (b, second) = one, other
    gap = np.maximum(first - second - b, second - first - a)  # along y and x; one of them has to be free
    return bool((gap > 2).any(axis=1).all())  # a pixel of the clip at least


def _halved(images: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 pixels of (frame, y, x, channel)."""
    frames, height, width, channels = images.shape
    return images.reshape(frames, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
