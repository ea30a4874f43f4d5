"""Methods without a model: what every table needs to be read, since they look at nothing or at no word."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xarray as xr

GRID = 64
"""Tokens a side of the maps that look at nothing: those of a 1024-pixel picture in Flux and SD3.5."""


@dataclass(frozen=True)
class Trivial:
    """A method without a model; `noise`, `constant`, `centre_gaussian` and `image_saliency` make them.

    Attributes:
        name: of the method.
        settings: all that decides its maps.
        draw: (frame, y, x, 3) uint8 and the number of concepts in, (concept or 1, frame, y, x) out.
        class_agnostic: is the map the same for every concept?
    """

    name: str
    settings: dict[str, float]
    draw: Callable[[np.ndarray, int], np.ndarray] = field(repr=False)
    class_agnostic: bool = True

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Draw maps, (image, concept, [frame,] y, x); the images have to have the same number of frames."""
        still = all(image.ndim == 3 for image in images)
        drawn = [self.draw(image.reshape(-1, *image.shape[-3:]), len(concepts)) for image in images]
        values = np.stack([np.broadcast_to(one, (len(concepts), *one.shape[1:])) for one in drawn])
        found = xr.DataArray(values, {"concept": list(concepts)}, ("image", "concept", "frame", "y", "x"))
        return found.isel(frame=0) if still else found

    def describe(self) -> str:
        """Name and settings."""
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.settings.items())})"


def noise(seed: int = 0, grid: int = GRID) -> Trivial:
    """Uniform noise in 0..1, drawn anew for every image, concept and token.

    It depends on seed and picture alone, not on the order in which pictures come.

    Args:
        seed: of the noise.
        grid: tokens a side.

    Example:
        >>> noise(3)([np.zeros((8, 8, 3), np.uint8)], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'y': 64, 'x': 64})
    """

    def draw(image: np.ndarray, concepts: int) -> np.ndarray:
        random = np.random.default_rng([seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
        return random.uniform(size=(concepts, len(image), grid, grid))

    return Trivial("noise", {"seed": seed, "grid": grid}, draw, class_agnostic=False)


def constant(grid: int = GRID) -> Trivial:
    """One everywhere: AUROC is 0.5, AP the object's share of the picture, and no threshold predicts anything.

    Example:
        >>> constant(grid=2)([np.zeros((8, 8, 3), np.uint8)], ["sun"]).values.tolist()
        [[[[1.0, 1.0], [1.0, 1.0]]]]
    """
    return Trivial("constant", {"grid": grid}, lambda image, _: np.ones((1, len(image), grid, grid)))


def centre_gaussian(grid: int = GRID) -> Trivial:
    """The photographer's prior: ``exp(-(y^2 + x^2) / (2 sigma^2))`` about the centre, sigma a quarter of the side.

    Example:
        >>> centre_gaussian(grid=3)([np.zeros((8, 8, 3), np.uint8)], ["sun"]).values[0, 0].argmax()
        np.int64(4)
    """
    axis = (np.arange(grid) - (grid - 1) / 2) / (grid / 4)
    values = np.exp(-(axis[:, None] ** 2 + axis**2) / 2)
    return Trivial("centre_gaussian", {"grid": grid}, lambda image, _: np.tile(values, (1, len(image), 1, 1)))


def image_saliency(grid: int = GRID) -> Trivial:
    """How much a place differs from its surroundings: ``|x - blur(x)|`` of the luminance, averaged over a token.

    ``x = 0.299 R + 0.587 G + 0.114 B`` (ITU-R BT.601) in 0..255; the blur is a Gaussian, edges repeated, with sigma a
    sixteenth of the shorter side.

    Example:
        >>> picture = np.zeros((32, 32, 3), np.uint8)
        >>> picture[8:16, 8:16] = 255
        >>> found = image_saliency(grid=4)([picture], ["sun"]).values[0, 0]
        >>> bool(found[1, 1] == found.max())
        True
    """

    def draw(image: np.ndarray, _: int) -> np.ndarray:
        from PIL import Image

        light = image @ np.array([0.299, 0.587, 0.114])
        found = np.abs(light - blur(light, min(light.shape[1:]) / 16)).astype(np.float32)
        box = Image.Resampling.BOX
        return np.stack([np.asarray(Image.fromarray(frame).resize((grid, grid), box)) for frame in found])[None]

    return Trivial("image_saliency", {"grid": grid}, draw)


def trivial_rows() -> dict[str, Trivial]:
    """The four of them under the names that tables give them, without which no table can be read.

    Example:
        >>> list(trivial_rows())
        ['noise', 'constant', 'centre Gaussian', 'image saliency']
    """
    made = noise(), constant(), centre_gaussian(), image_saliency()
    return {method.name.replace("centre_gaussian", "centre Gaussian").replace("_", " "): method for method in made}


def blur(
    values: np.ndarray, sigma: float, reach: int | None = None, edge: Literal["edge", "reflect"] = "edge"
) -> np.ndarray:
    """Gaussian along the last two axes, cut off after `reach` (None: 4 sigma); `edge` is a mode of `numpy.pad`."""
    reach = max(1, round(4 * sigma)) if reach is None else reach
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (-2, -1):
        padding = [(0, 0)] * values.ndim
        padding[axis] = (reach, reach)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, padding, mode=edge), len(kernel), axis)
        values = windows @ kernel
    return values
