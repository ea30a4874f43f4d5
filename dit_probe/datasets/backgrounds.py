"""The six textured backgrounds of the picture-book scenes: one function a word, numpy and Pillow only."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Sheet = tuple[Image.Image, ImageDraw.ImageDraw]


def _sheet(size: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Sheet:
    """Start with a vertical gradient."""
    mix = np.linspace(0, 1, size)[:, None, None]
    rows = (1 - mix) * np.array(top) + mix * np.array(bottom)
    image = Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))
    return image, ImageDraw.Draw(image)


def _grass(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (128, 190, 84), (92, 160, 60))
    for _ in range(46):
        x, y = rng.uniform(0, size, 2)
        height, lean = rng.uniform(0.05, 0.09) * size, rng.uniform(-0.02, 0.02) * size
        shade = (70, 136, 48) if rng.random() < 0.6 else (160, 212, 104)
        draw.line([(x, y), (x + lean, y - height)], fill=shade, width=max(1, size // 48))
    return image


def _sand(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (236, 212, 158), (222, 192, 132))
    x = np.linspace(0, size, 17)
    phase = rng.uniform(0, 2 * np.pi)
    for y in np.arange(rng.uniform(0, 0.2), 1.05, 0.2) * size:
        line = y + 0.02 * size * np.sin(4 * np.pi * x / size + phase + y)
        draw.line(list(zip(x, line, strict=True)), fill=(206, 172, 110), width=max(1, size // 48))
    for _ in range(14):
        px, py = rng.uniform(0, size, 2)
        r = size / 80
        draw.ellipse([px - r, py - r, px + r, py + r], fill=(180, 140, 90))
    return image


def _sky(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (120, 186, 240), (188, 222, 250))
    for _ in range(int(rng.integers(3, 6))):
        x, y = rng.uniform(0, size, 2)
        w = rng.uniform(0.07, 0.11) * size
        for dx, dy, r in ((-1.0, 0.1, 0.7), (0.0, -0.15, 1.0), (1.0, 0.1, 0.75)):
            cx, cy, rr = x + dx * w, y + dy * w, r * w
            draw.ellipse([cx - rr, cy - 0.7 * rr, cx + rr, cy + 0.7 * rr], fill=(238, 246, 255))
    return image


def _brick(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (206, 190, 176), (206, 190, 176))
    height, width, gap = size / 8, size / 4, size / 48
    shift_y = rng.uniform(0, height)
    for row in range(-1, 9):
        offset = (row % 2) * width / 2 + rng.uniform(0, 0.05) * width
        for column in range(-1, 5):
            x, y = column * width + offset, row * height + shift_y
            shade = rng.uniform(0.88, 1.08)
            colour = (int(168 * shade), int(84 * shade), int(68 * shade))
            draw.rectangle([x, y, x + width - gap, y + height - gap], fill=colour)
    return image


def _night(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (16, 18, 52), (44, 40, 88))
    for _ in range(26):
        x, y = rng.uniform(0, size, 2)
        r = size * rng.uniform(0.008, 0.016)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(250, 246, 214))
    return image


def _water(size: int, rng: np.random.Generator) -> Image.Image:
    image, draw = _sheet(size, (40, 128, 186), (20, 84, 150))
    x = np.linspace(0, size, 33)
    for k, y in enumerate(np.arange(rng.uniform(0, 0.12), 1.05, 0.125) * size):
        line = y + 0.022 * size * np.sin(8 * np.pi * x / size + (k % 2) * np.pi + rng.uniform(0, 0.5))
        draw.line(list(zip(x, line, strict=True)), fill=(130, 200, 228), width=max(1, size // 48))
    return image


PAINTERS: dict[str, Callable[[int, np.random.Generator], Image.Image]] = {
    "grass": _grass,
    "sand": _sand,
    "sky": _sky,
    "brick": _brick,
    "night": _night,
    "water": _water,
}
"""Background word to painting function."""


def background(word: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint one background.

    Args:
        word: A key of `PAINTERS`.
        size: Width and height in pixels.
        rng: Source of the random texture.

    Returns:
        (y, x, 3) float32 in 0..255.

    Example:
        >>> background("brick", 64, np.random.default_rng(0)).shape
        (64, 64, 3)
    """
    large = np.asarray(PAINTERS[word](2 * size, rng), dtype=np.float32)
    return large.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
