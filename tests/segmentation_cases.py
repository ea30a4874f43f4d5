"""Pictures and masks in their true file formats, and what a refusal has to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_probe.datasets.segmentation import DatasetError


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def save(path: Path, numbers: np.ndarray, *, palette: bool = False) -> Path:
    """PNG: an exact picture, a grey mask, or one with a palette as VOC's and DAVIS's have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numbers)
    if palette:
        image = Image.frombytes("P", numbers.shape[::-1], numbers.astype(np.uint8).tobytes())
        image.putpalette([(37 * number) % 256 for number in range(768)])
    image.save(path)
    return path


def save_jpeg(path: Path, pixels: np.ndarray) -> np.ndarray:
    """Write a JPEG and return what it decodes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def refused(build: Any, *words: object) -> str:
    """The message of a DatasetError that holds every word."""
    with pytest.raises(DatasetError) as caught:
        build()
    message = str(caught.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"
    return message
