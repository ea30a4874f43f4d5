"""The drawings that scenes are made of: one function a noun, one function a background, numpy and Pillow only.

Every noun has a look of its own (several parts in a fixed arrangement), and six of the ten wear a random colour, so
that a noun can be told by its shape and not by its colour alone. Sprites are drawn four times larger than needed and
reduced, which gives smooth edges; the coverage of a pixel decides whether it belongs to the object.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SUPERSAMPLING = 4

COLOURS: tuple[Colour, ...] = (
    (214, 48, 49),
    (232, 126, 34),
    (247, 220, 80),
    (58, 160, 75),
    (60, 110, 220),
    (150, 80, 190),
    (240, 140, 180),
    (245, 245, 245),
)
"""The colours that a house, fish, car, balloon, flower or rocket may wear."""

INK: Colour = (40, 36, 44)
CREAM: Colour = (248, 236, 214)
BROWN: Colour = (120, 76, 44)
LEAF: Colour = (44, 132, 58)


class Pen:
    """Draws on a square transparent sheet in coordinates from 0 to 1 (x to the right, y down)."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.sheet = Image.new("RGBA", (pixels, pixels), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.sheet)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill an ellipse with centre (x, y) and half-axes (rx, ry)."""
        n = self.pixels
        self._draw.ellipse([(x - rx) * n, (y - ry) * n, (x + rx) * n - 1, (y + ry) * n - 1], fill=(*colour, 255))

    def shape(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([(x * self.pixels, y * self.pixels) for x, y in points], fill=(*colour, 255))

    def block(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill a rectangle."""
        n = self.pixels
        self._draw.rectangle([x0 * n, y0 * n, x1 * n - 1, y1 * n - 1], fill=(*colour, 255))

    def half_disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Fill the upper half of an ellipse."""
        n = self.pixels
        box = [(x - rx) * n, (y - ry) * n, (x + rx) * n - 1, (y + ry) * n - 1]
        self._draw.pieslice(box, 180, 360, fill=(*colour, 255))

    def line(self, points: list[tuple[float, float]], width: float, colour: Colour) -> None:
        """Draw a line of a given width (a fraction of the sheet)."""
        path = [(x * self.pixels, y * self.pixels) for x, y in points]
        self._draw.line(path, fill=(*colour, 255), width=max(1, round(width * self.pixels)), joint="curve")


def _any_colour(rng: np.random.Generator) -> Colour:
    return COLOURS[int(rng.integers(len(COLOURS)))]


def _darker(colour: Colour, factor: float = 0.7) -> Colour:
    return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))


def _sun(pen: Pen, rng: np.random.Generator) -> None:
    turn = rng.uniform(0, np.pi / 4)
    for k in range(8):
        a = turn + k * np.pi / 4
        tip = (0.5 + 0.5 * np.cos(a), 0.5 + 0.5 * np.sin(a))
        left = (0.5 + 0.34 * np.cos(a - 0.3), 0.5 + 0.34 * np.sin(a - 0.3))
        right = (0.5 + 0.34 * np.cos(a + 0.3), 0.5 + 0.34 * np.sin(a + 0.3))
        pen.shape([tip, left, right], (245, 150, 30))
    pen.disc(0.5, 0.5, 0.33, 0.33, (255, 214, 50))


def _tree(pen: Pen, rng: np.random.Generator) -> None:
    green = _darker(LEAF, rng.uniform(0.7, 1.1))
    pen.block(0.41, 0.6, 0.59, 1.0, BROWN)
    for x, y, r in ((0.28, 0.46, 0.24), (0.72, 0.46, 0.24), (0.5, 0.28, 0.28)):
        pen.disc(x, y, r, r, green)
    for x, y in ((0.3, 0.42), (0.62, 0.24), (0.68, 0.52)):
        pen.disc(x, y, 0.06, 0.06, (200, 40, 40))


def _house(pen: Pen, rng: np.random.Generator) -> None:
    wall = _any_colour(rng)
    pen.block(0.12, 0.42, 0.88, 1.0, wall)
    pen.block(0.68, 0.08, 0.8, 0.34, _darker(BROWN))
    pen.shape([(0.0, 0.46), (0.5, 0.02), (1.0, 0.46)], (110, 50, 40))
    pen.block(0.24, 0.6, 0.44, 1.0, _darker(BROWN, 0.6))
    pen.block(0.56, 0.56, 0.78, 0.78, (250, 240, 150))
    pen.line([(0.67, 0.56), (0.67, 0.78)], 0.035, INK)
    pen.line([(0.56, 0.67), (0.78, 0.67)], 0.035, INK)


def _boat(pen: Pen, rng: np.random.Generator) -> None:
    pen.block(0.46, 0.02, 0.52, 0.72, BROWN)
    pen.shape([(0.55, 0.04), (0.55, 0.6), (0.97, 0.6)], (250, 250, 250))
    pen.shape([(0.43, 0.14), (0.43, 0.6), (0.1, 0.6)], CREAM)
    pen.shape([(0.0, 0.7), (1.0, 0.7), (0.8, 0.98), (0.2, 0.98)], (140, 66, 36))
    pen.block(0.04, 0.7, 0.96, 0.77, (225, 70, 60))


def _fish(pen: Pen, rng: np.random.Generator) -> None:
    body = _any_colour(rng)
    fin = _darker(body)
    pen.shape([(0.0, 0.2), (0.0, 0.82), (0.36, 0.5)], fin)
    pen.shape([(0.4, 0.34), (0.56, 0.1), (0.74, 0.32)], fin)
    pen.disc(0.6, 0.52, 0.4, 0.27, body)
    for x in (0.42, 0.58):
        pen.line([(x, 0.34), (x - 0.04, 0.52), (x, 0.7)], 0.05, fin)
    pen.disc(0.8, 0.46, 0.075, 0.075, (255, 255, 255))
    pen.disc(0.82, 0.46, 0.04, 0.04, INK)


def _car(pen: Pen, rng: np.random.Generator) -> None:
    paint = _any_colour(rng)
    pen.shape([(0.2, 0.52), (0.32, 0.22), (0.7, 0.22), (0.84, 0.52)], paint)
    pen.shape([(0.29, 0.5), (0.36, 0.29), (0.49, 0.29), (0.49, 0.5)], (190, 225, 240))
    pen.shape([(0.54, 0.5), (0.54, 0.29), (0.66, 0.29), (0.75, 0.5)], (190, 225, 240))
    pen.block(0.0, 0.5, 1.0, 0.76, paint)
    pen.block(0.92, 0.54, 1.0, 0.62, (255, 240, 140))
    for x in (0.24, 0.76):
        pen.disc(x, 0.76, 0.16, 0.16, INK)
        pen.disc(x, 0.76, 0.065, 0.065, (190, 190, 195))


def _mushroom(pen: Pen, rng: np.random.Generator) -> None:
    pen.shape([(0.38, 0.48), (0.62, 0.48), (0.7, 0.98), (0.3, 0.98)], CREAM)
    pen.half_disc(0.5, 0.56, 0.5, 0.52, (205, 40, 45))
    for x, y, r in ((0.24, 0.4, 0.08), (0.5, 0.22, 0.1), (0.76, 0.4, 0.08), (0.5, 0.46, 0.06)):
        pen.disc(x, y, r, r, (255, 255, 255))


def _balloon(pen: Pen, rng: np.random.Generator) -> None:
    skin = _any_colour(rng)
    pen.line([(0.5, 0.68), (0.42, 0.78), (0.56, 0.88), (0.5, 1.0)], 0.06, INK)
    pen.shape([(0.5, 0.62), (0.38, 0.76), (0.62, 0.76)], _darker(skin))
    pen.disc(0.5, 0.35, 0.32, 0.35, skin)
    pen.disc(0.38, 0.22, 0.08, 0.1, (255, 255, 255))


def _flower(pen: Pen, rng: np.random.Generator) -> None:
    petal = _any_colour(rng)
    pen.block(0.465, 0.5, 0.535, 1.0, LEAF)
    pen.shape([(0.5, 0.92), (0.16, 0.66), (0.2, 0.88)], LEAF)
    pen.shape([(0.5, 0.92), (0.84, 0.66), (0.8, 0.88)], LEAF)
    for k in range(5):
        a = -np.pi / 2 + k * 2 * np.pi / 5
        pen.disc(0.5 + 0.21 * np.cos(a), 0.34 + 0.21 * np.sin(a), 0.145, 0.145, petal)
    pen.disc(0.5, 0.34, 0.12, 0.12, (130, 80, 30))


def _rocket(pen: Pen, rng: np.random.Generator) -> None:
    trim = _any_colour(rng)
    pen.shape([(0.38, 0.8), (0.5, 1.0), (0.62, 0.8)], (250, 160, 40))
    pen.shape([(0.32, 0.5), (0.1, 0.88), (0.34, 0.8)], trim)
    pen.shape([(0.68, 0.5), (0.9, 0.88), (0.66, 0.8)], trim)
    pen.disc(0.5, 0.44, 0.22, 0.44, (190, 196, 206))
    pen.block(0.32, 0.66, 0.68, 0.82, (190, 196, 206))
    pen.shape([(0.5, 0.0), (0.35, 0.22), (0.65, 0.22)], trim)
    pen.disc(0.5, 0.42, 0.1, 0.1, (40, 70, 140))


SPRITES: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "sun": _sun,
    "tree": _tree,
    "house": _house,
    "boat": _boat,
    "fish": _fish,
    "car": _car,
    "mushroom": _mushroom,
    "balloon": _balloon,
    "flower": _flower,
    "rocket": _rocket,
}
"""Noun to drawing function."""


def sprite(noun: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one noun.

    Args:
        noun: A key of `SPRITES`.
        side: Width and height in pixels.
        rng: Source of the random colour and turn.

    Returns:
        (y, x, 4) float32: red, green, blue in 0..255 and coverage in 0..1.

    Example:
        >>> sprite("sun", 20, np.random.default_rng(0)).shape
        (20, 20, 4)
    """
    pen = Pen(side * SUPERSAMPLING)
    SPRITES[noun](pen, rng)
    large = np.asarray(pen.sheet, dtype=np.float32).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING, 4)
    coverage = large[..., 3:] / 255.0
    total = coverage.sum(axis=(1, 3))
    # colours are averaged over the covered samples only, so that no black of the empty sheet bleeds into the edge
    colour = (large[..., :3] * coverage).sum(axis=(1, 3)) / np.maximum(total, 1e-6)
    return np.concatenate([colour, total / SUPERSAMPLING**2], axis=-1).astype(np.float32)
