"""Marks that draw CLIP's eye to a region of a picture: a red circle, or surroundings that are blurred or lose colour.

A red circle alone makes CLIP speak of what it surrounds (Shtedritski et al., ICCV 2023). CLIP as RNN combines it with
changed surroundings: circle and blur on Pascal VOC, blur and grey on COCO.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import dit_probe as dp

SIGMA = 2.6
"""Standard deviation of the blur in pixels, that of the window of 15 x 15 pixels in CLIP as RNN's code."""


def circle(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A red ellipse, one pixel wide, around the region's centre of mass, as wide and as high as the region."""
    rows, columns = np.nonzero(mask)
    y, x = int(rows.mean()), int(columns.mean())
    down, across = ((int(np.ptp(each)) + 1) // 2 for each in (rows, columns))
    drawn = Image.fromarray(image)
    ImageDraw.Draw(drawn).ellipse((x - across, y - down, x + across, y + down), outline=(255, 0, 0))
    return np.array(drawn)


def blur(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Surroundings blurred by a Gaussian of `SIGMA`."""
    return _outside(image, mask, Image.fromarray(image).filter(ImageFilter.GaussianBlur(SIGMA)))


def grey(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Surroundings without colour."""
    return _outside(image, mask, Image.fromarray(image).convert("L").convert("RGB"))


def black(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Black surroundings."""
    return _outside(image, mask, 0)


PROMPTS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": circle,
    "blur": blur,
    "grey": grey,
    "black": black,
}
"""Visual prompts by name."""


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that are none.

    Raises:
        ProbeError: a string in place of a list, or a name that is not in `PROMPTS`.
    """
    if isinstance(prompts, str) or not set(prompts) <= set(PROMPTS):
        raise dp.errors.ProbeError(f"prompts={prompts!r}; give a list of some of {', '.join(map(repr, PROMPTS))}")


def prompted(image: np.ndarray, mask: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """A picture with a region marked; where nothing is in the region, the picture itself.

    Args:
        image: (y, x, 3) uint8.
        mask: (y, x) bool, the region.
        prompts: names of `PROMPTS`, applied one after the other: a circle that is to stay sharp comes last.

    Raises:
        ProbeError: no such prompt.
        MapError: a mask that is not bool, or of another size than the picture.

    Example:
        >>> picture = np.full((5, 6, 3), 200, np.uint8)
        >>> mask = np.zeros((5, 6), bool)
        >>> mask[1:4, 2:5] = True
        >>> prompted(picture, mask, ["black"])[1, :, 0].tolist()
        [0, 0, 200, 200, 200, 0]
    """
    check_prompts(prompts)
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise dp.errors.MapError(f"a mask of {mask.dtype}, {mask.shape}, for a picture {image.shape}; give (y, x) bool")
    for name in prompts if mask.any() else ():
        image = PROMPTS[name](image, mask)
    return image


def _outside(image: np.ndarray, mask: np.ndarray, other: Image.Image | int) -> np.ndarray:
    return np.where(mask[..., None], image, np.asarray(other, np.uint8))
