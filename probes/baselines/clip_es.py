"""CLIP-ES: CLIP's GradCAM against words for the background, spread by CLIP's own attention (Lin et al., CVPR 2023).

What the authors' code does where the paper is silent is followed and marked (code); (ours) is where we differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import max_pool2d, normalize

import dit_probe as dp
from probes.baselines.gradients import GradCAM
from probes.baselines.vit_method import ViTMethod
from probes.baselines.vit_recording import Recording

BACKGROUND = (
    *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway"),
    *("railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley"),
    *("bridge", "sign"),
)
"""The authors' words for the background of Pascal VOC; for COCO, and in CLIP as RNN, without keyboard and sign."""
TEMPLATES = ("a clean origami {}.",)
"""The authors' text around a word, for `ViT`."""


@dataclass(frozen=True)
class ClipES(ViTMethod):
    """GradCAM of a softmax over concepts and background, refined by class-aware attention-based affinity.

        s   = softmax(exp(logit scale) <norm(mean_j P LN(y_j)), t>)    over concepts and background
        M_c = minmax(GradCAM of s_c, token form, last block)                (minmax: code)
        T   = (S + Sᵀ) / 2,    S = Sinkhorn(mean of the attention of the last blocks, all heads)
        map = Tᵗ (B_c M_c),    B_c = 1 in the boxes around the regions of M_c > λ, 0 elsewhere

    The picture is embedded as the mean of its patches y_j, not as its class token (code), which is what tells M_c from
    `GradCAM`. Attention is that among patches. Where no evidence is positive, M_c and the map are zero, and the
    attribute ``zero_maps`` of the scores counts them.

        vit = ViT.load("openai/clip-vit-base-patch16", templates=TEMPLATES)
        maps = ClipES(vit)(images, ["dog", "horse"])

    The authors give CLIP the picture at its own size; ours is the size of `ViT`. Their boxes lack the picture's last
    row and column (code), ours do not (ours).

    Attributes:
        background: words that concepts compete with, less those that are concepts themselves (ours; the authors choose
            lists that do not meet the classes).
        threshold: λ, a share of the highest M_c.
        power: t, of T; 0: no affinity, the CAM in its boxes.
        sinkhorn: normalisations of columns, then rows; 3 (code) leave the sums near 1.
        blocks: how many of the last blocks; all of a model that has fewer.

    Raises:
        ModelError: the model is no CLIPModel.
        ProbeError: a setting out of its range.
        ConceptError: `background` is a string; when it is called: one concept and no other word.
    """

    background: Sequence[str] = BACKGROUND
    threshold: float = 0.4
    power: int = 2
    sinkhorn: int = 3
    blocks: int = 8
    kind: ClassVar = "relevance"
    needs: ClassVar = "clip"
    backwards_a_concept: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.background, str):
            raise dp.errors.ConceptError(f"background={self.background!r}: give a list of words")
        if not 0 <= self.threshold < 1 or self.power < 0 or min(self.sinkhorn, self.blocks) < 1:
            raise dp.errors.ProbeError(
                f"threshold={self.threshold}, power={self.power}, sinkhorn={self.sinkhorn}, blocks={self.blocks}; "
                "ClipES takes a threshold of 0 or more and below 1, a power of 0 or more, and 1 or more of the others"
            )

    def check(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> None:
        super().check(images, concepts)
        if len({*concepts, *self.background}) < 2:
            raise dp.errors.ConceptError(
                f"ClipES: a softmax over {list(concepts)} is 1 whatever the picture; give words for the background"
            )

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Scores as `ViTMethod.scores` has them; the attribute ``zero_maps`` counts maps without any relevance."""
        found = super().scores(images, concepts)
        return found.assign_attrs(zero_maps=int((found == 0).all(["y", "x"]).sum()))

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        return self.relevance(self.record(image), concepts)

    def record(self, image: np.ndarray) -> Recording:
        """The pass of a picture, which does not depend on the concepts."""
        return self.vit.record(image, gradients=True, keep=("attention", "normed"))

    def relevance(self, seen: Recording, concepts: Sequence[str]) -> Tensor:
        """The maps, (concept, y, x), of a pass of `record`."""
        cams = self.cams(seen, concepts)
        boxed = torch.stack([cam * boxes(cam, self.threshold) for cam in cams])
        return (boxed.flatten(1) @ self.affinity(seen)).reshape(cams.shape)

    def cams(self, seen: Recording, concepts: Sequence[str]) -> Tensor:
        """M, (concept, y, x) in 0..1, before affinity."""
        vit, others = self.vit, [word for word in self.background if word not in concepts]
        picture = normalize(vit.embed(seen.output[0, seen.skip :]).mean(0), dim=-1)
        logits = picture @ vit.texts([*concepts, *others]).mT * vit.model.logit_scale.exp()
        cam = GradCAM(vit, "token", score="softmax")
        return unit_range(torch.cat([cam.relevance(seen, s) for s in logits.float().softmax(-1)[: len(concepts)]]))

    def affinity(self, seen: Recording) -> Tensor:
        """T to its power, (patch, patch), symmetric."""
        found = torch.stack(seen.attention[-self.blocks :]).detach().float().mean((0, 1, 2))[seen.skip :, seen.skip :]
        for _ in range(self.sinkhorn):
            found = found / found.sum(0, keepdim=True)
            found = found / found.sum(1, keepdim=True)
        return torch.linalg.matrix_power((found + found.mT) / 2, self.power)


def unit_range(maps: Tensor) -> Tensor:
    """Maps, (..., y, x), each brought to 0..1, without gradient; a map that is the same everywhere becomes zero."""
    maps = maps.detach().float()
    low, high = (each(maps, (-2, -1), keepdim=True) for each in (torch.amin, torch.amax))
    return torch.where(high > low, (maps - low) / (high - low), 0)


def boxes(cam: Tensor, threshold: float) -> Tensor:
    """Places, (y, x) bool, in the boxes around the regions where a map is above a share of its highest value.

    A region is what hangs together by edges or corners.

    Example:
        >>> cam = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.1, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
        >>> boxes(cam, 0.4).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    """
    inside = cam > threshold * cam.max()
    labels = torch.arange(1.0, cam.numel() + 1, device=cam.device).reshape(cam.shape) * inside
    while True:  # every region takes the highest number of its places, one step at a time
        grown = max_pool2d(labels[None], 3, stride=1, padding=1)[0] * inside
        if torch.equal(grown, labels):
            break
        labels = grown
    found = torch.zeros_like(inside)
    for label in labels[inside].unique():
        rows, columns = (labels == label).nonzero(as_tuple=True)
        found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return found
