"""A fully connected CRF on a small picture, by exact mean-field updates (Krähenbühl & Koltun, NIPS 2011).

Segmentations of CLIP-ES and CLIP as RNN end with it. No maintained library has it, and the usual one approximates the
sums over all pairs of pixels; here they are taken as they stand, which a picture of 64 x 64 allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import dit_probe as dp

FLOOR = 1e-5
"""Least probability of a label, so that its logarithm is finite; that of the usual library."""


@dataclass(frozen=True)
class DenseCRF:
    """Labels that agree where pixels are near and alike.

        E(x)   = Σ_i -log p_i(x_i) + Σ_{i<j} [x_i ≠ x_j] k_ij
        k      = a N(exp(-|r_i - r_j|² / 2α² - |c_i - c_j|² / 2β²)) + s N(exp(-|r_i - r_j|² / 2γ²))
        N(K)   = D^-½ K D^-½,    D_ii = Σ_j K_ij
        Q_i(l) ∝ p_i(l) exp(Σ_j k_ij Q_j(l)),    from Q = p, all pixels at once

    r is a pixel's place, c its colour. N, and pixels that are their own neighbours, are not in the paper but in the
    library that is commonly run, and the weights hold for it. With N sums over pixels are nearly means, so that a
    picture may be sampled more coarsely: `spacing`. Matrices of all pairs are kept: 64 x 64 pixels take 0.2 GB.

    Attributes:
        appearance: weight a. The five numbers and ten updates are those of both methods' code.
        alpha: reach of the appearance kernel in pixels.
        beta: its reach in colour, in levels of 0..255.
        smoothness: weight s.
        gamma: reach of the smoothness kernel in pixels.
        updates: how often Q is replaced.

    Raises:
        ProbeError: a weight below 0, a reach that is not above 0, or no update.
        MapError: when it is called: arrays that do not fit.

    Example:
        >>> picture = np.zeros((4, 6, 3), np.uint8)
        >>> picture[:, 3:] = 255
        >>> chances = np.full((2, 4, 6), 0.5)
        >>> chances[:, 1, 1], chances[:, 1, 4] = (0.9, 0.1), (0.1, 0.9)  # one pixel of each half is known
        >>> DenseCRF()(picture, chances).argmax(0)[0].tolist()
        [0, 0, 0, 1, 1, 1]
    """

    appearance: float = 4.0
    alpha: float = 67.0
    beta: float = 3.0
    smoothness: float = 3.0
    gamma: float = 1.0
    updates: int = 10

    def __post_init__(self) -> None:
        if min(self.appearance, self.smoothness) < 0 or min(self.alpha, self.beta, self.gamma, self.updates) <= 0:
            raise dp.errors.ProbeError(f"{self}: give weights of 0 or more, reaches above 0 and updates of 1 or more")

    def __call__(
        self, image: np.ndarray, probabilities: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
    ) -> np.ndarray:
        """Q of every label, (label, y, x) float32, which sums to 1 over labels.

        Args:
            image: (y, x, 3), levels of 0..255.
            probabilities: p, (label, y, x); raised to `FLOOR`, and brought to a sum of 1 by the update itself.
            spacing: pixels from one row to the next and from one column to the next, where `image` is a smaller copy
                of the picture in whose pixels `alpha` and `gamma` are meant.
        """
        if image.shape[2:] != (3,) or probabilities.shape[1:] != image.shape[:2]:
            raise dp.errors.MapError(
                f"DenseCRF: image {image.shape}, probabilities {probabilities.shape}; "
                "give (y, x, 3) and (label, y, x) of one y and x"
            )
        height, width = image.shape[:2]
        places = torch.cartesian_prod(torch.arange(height) * spacing[0], torch.arange(width) * spacing[1])
        colours = torch.from_numpy(image.reshape(-1, 3).astype(np.float32))
        pairs = self.appearance * _kernel(torch.cat([places / self.alpha, colours / self.beta], 1))
        pairs += self.smoothness * _kernel(places / self.gamma)
        logs = torch.from_numpy(probabilities.reshape(len(probabilities), -1).astype(np.float32)).clamp(FLOOR, 1).log()
        found = logs.softmax(0)
        for _ in range(self.updates):
            found = (logs + found @ pairs).softmax(0)
        return found.reshape(probabilities.shape).numpy()


def _kernel(points: Tensor) -> Tensor:
    """N of a Gaussian of points (pixel, feature)."""
    # Distances by a product of matrices, the default, lose what is near among points far from the origin.
    found = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
    roots = found.sum(1).rsqrt()
    return found.mul_(roots).mul_(roots[:, None])
