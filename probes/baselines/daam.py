"""DAAM: what the cross-attention of a UNet gives to the words of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from probes.baselines.unet import Text
from probes.baselines.unet_maps import UNetMaps, word_weights


@dataclass(frozen=True)
class DAAM(UNetMaps):
    """Diffusion attentive attribution maps of a real picture (Tang et al., ACL 2023).

        M_c = mean over t, l, h and tokens k of c of  max(bicubic(softmax_k(Q_l^h K_l^hT / sqrt(d))[:, k]), 0)

    All concepts are words of one prompt, "a dog, a background, a grass", padded as the pipeline pads it: they compete
    in the softmax with each other and with the padding, and another order gives other maps. A word of several tokens
    or occurrences is the mean over all of them; the middle block does not count. By default, as in the paper, maps are
    averaged over noise levels, here of one picture in place of a generation's steps; ``timesteps=(500,)`` is one.

    The public code resizes and clamps the sum over timesteps. It drops the first half of rows x heads as the
    unconditional half, which of a pass of one row, as in ConceptAttention's runners, are half of its heads.

    Attributes:
        form: of a concept in the prompt.
        separator: between concepts.

    Example:
        >>> from probes.baselines.tiny_unet import tiny_pipeline
        >>> from probes.baselines.unet import UNet
        >>> daam = DAAM(UNet(tiny_pipeline()), timesteps=(500,))
        >>> daam.prompt(["sun", "sky"])
        'a sun, a sky'
        >>> picture = np.zeros((20, 30, 3), np.uint8)
        >>> daam.scores([picture], ["sun", "sky"]).sizes
        Frozen({'image': 1, 'concept': 2, 'timestep': 1, 'layer_head': 18, 'y': 8, 'x': 8})
        >>> daam([picture], ["sun", "sky"]).dims
        ('image', 'concept', 'y', 'x')
    """

    form: str = "a {}"
    separator: str = ", "

    interpolation: ClassVar[str] = "bicubic"

    def prompt(self, concepts: Sequence[str]) -> str:
        """What the UNet is told."""
        return self.separator.join(self.form.format(concept) for concept in concepts)

    def texts(self, concepts: Sequence[str]) -> list[Text]:
        """The prompt, with all concepts in it."""
        return [self.model.read(self.prompt(concepts), concepts)]

    def passes(self, image: np.ndarray, texts: Sequence[Text]) -> Iterator[Mapping[str, list[Tensor]]]:
        """One pass a timestep; columns of the words are taken while it runs."""
        (prompt,), latents = texts, self.model.encode(image)
        for timestep in self.timesteps:
            found: dict[str, list[Tensor]] = {}

            def see(name: str, q: Tensor, found: dict[str, list[Tensor]] = found) -> None:
                found[name] = word_weights(self.model.layers[name], q, prompt)

            self.model.run(latents, prompt, timestep, see)
            yield found
