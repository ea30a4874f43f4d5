"""OVAM: what the queries of a UNet find in words that it was never told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from probes.baselines.unet import Text
from probes.baselines.unet_maps import UNetMaps, word_weights


@dataclass(frozen=True)
class OVAM(UNetMaps):
    """Open-vocabulary attention maps of a real picture (Marcos-Manchón et al., CVPR 2024), without token optimisation.

        K = W_K tau(text of c)
        M_c = mean over l of bilinear(sum over t, h of softmax_k(Q_l^h K_l^hT / sqrt(d))[:, c])

    Q is of a pass that knows nothing of the concept; the softmax is over the tokens of the concept's own text, begin
    and end marks with them and no padding, and a concept of several tokens is their mean. But for a constant factor,
    which no ranking and no min-max can see, M is the mean over timesteps and all heads that calling this gives.

    Queries of the last picture are kept on the device (SDXL at 1024 pixels: about 180 MB a timestep at half
    precision), so that another concept costs no pass, only one projection of keys a layer.

    The public code has no SDXL and by default no softmax, and takes the queries of the unconditional row, which are
    those of `prompt` "".

    Attributes:
        prompt: what the UNet is told while it looks at the picture.
        text: of a concept.

    Example:
        >>> from probes.baselines.tiny_unet import tiny_pipeline
        >>> from probes.baselines.unet import UNet
        >>> ovam = OVAM(UNet(tiny_pipeline("sdxl")), timesteps=(500,))
        >>> ovam([np.zeros((20, 30, 3), np.uint8)], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'y': 8, 'x': 8})
    """

    prompt: str = ""
    text: str = "a photograph of a {}"

    _kept: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    interpolation: ClassVar[str] = "bilinear"

    def texts(self, concepts: Sequence[str]) -> list[Text]:
        """A text a concept."""
        return [self.model.read(self.text.format(concept), [concept], padding=False) for concept in concepts]

    def passes(self, image: np.ndarray, texts: Sequence[Text]) -> Iterator[Mapping[str, list[Tensor]]]:
        """Keys of every text, on queries of this picture's passes."""
        for seen in self._queries(image):
            yield {
                name: [word for text in texts for word in word_weights(self.model.layers[name], q, text)]
                for name, q in seen.items()
            }

    def _queries(self, image: np.ndarray) -> list[dict[str, Tensor]]:
        """Queries by layer, a pass a timestep; the last picture's are kept."""
        key = f"{image.shape} {hashlib.sha256(image.tobytes()).hexdigest()}"
        if key not in self._kept:
            self._kept.clear()  # not two of them at a time
            prompt, latents = self.model.read(self.prompt), self.model.encode(image)
            passes = [dict[str, Tensor]() for _ in self.timesteps]
            for timestep, found in zip(self.timesteps, passes, strict=True):
                self.model.run(latents, prompt, timestep, found.__setitem__)
            self._kept[key] = passes
        return self._kept[key]
