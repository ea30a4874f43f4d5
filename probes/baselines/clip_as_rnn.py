"""CLIP as RNN: masks proposed for words, and words that their masks do not bear out dropped (Sun et al., CVPR 2024).

From all words h_0 on,

    y_t = f(image, h_{t-1})                          soft masks, by CLIP-ES, each brought to 0..1
    P_t = softmax over h_{t-1} of g(image marked where y_t > η, h_{t-1})
    h_t = {i of h_{t-1}: P_t,ii ≥ θ}                 the highest alone where none is

until h_t = h_{t-1}. A dense CRF on y_t and on 1 - max y_t for the background gives the segmentation. Numbers are those
of the authors' settings for Pascal VOC; what their code does otherwise is said with `ClipAsRNN`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import dit_probe as dp
from probes.baselines.clip_es import ClipES, unit_range
from probes.baselines.dense_crf import DenseCRF
from probes.baselines.visual_prompts import check_prompts, prompted
from probes.baselines.vit_method import ViTMethod

_ITERATIONS = 5


@dataclass(frozen=True)
class ClipAsRNN(ViTMethod):
    """Soft masks y_t of every iteration, of the words that pass it; a word that was dropped has a mask of zero.

    Zero is what the method says of such a word: no pixel shows it. To leave it undefined would take pictures whose
    target was dropped out of every mean. The attribute ``rejected`` counts masks of zero after the last iteration.

        proposer = ClipES(ViT.load("openai/clip-vit-base-patch16", templates=TEMPLATES))
        method = ClipAsRNN(ViT.load("openai/clip-vit-large-patch14"), proposer)

    The map is the mask of the last iteration: a mean would bring back words that were dropped. Masks are not binary,
    because a CRF's labels have no order that AP could measure; `masks` has these. With one word nothing can be dropped,
    and the map is that of CLIP-ES, brought to 0..1.

    The authors' code takes 15 templates, adds up a softmax of each and takes a softmax of the sum; here templates are
    averaged as texts, as `ViT` does. It repeats CLIP-ES without background where a CAM is zero; here it stays zero.

    Passes are upper bounds: one forward of the proposer a picture, and a word that stays to the last iteration takes
    ``iterations`` passes of the classifier forward and of the proposer's last block back.

    Attributes:
        vit: the classifier g.
        proposer: f.
        eta: η, above which a soft mask is marked.
        theta: θ, the least probability that a word stays with.
        prompts: how masks are marked, names of `probes.baselines.visual_prompts.PROMPTS`.
        iterations: at most; the recurrence ends itself after no more iterations than there are words (the bound is
            ours, the paper has none). What comes after its end repeats its last masks, as the recurrence would.

    Raises:
        ModelError: the model is no CLIPModel.
        ProbeError: a proposer that is none, or a setting out of its range.
    """

    proposer: ClipES = field(repr=False)
    eta: float = 0.4
    theta: float = 0.6
    prompts: Sequence[str] = ("blur", "circle")
    iterations: int = _ITERATIONS
    kind: ClassVar = "relevance"
    needs: ClassVar = "clip"
    forwards_a_concept: ClassVar[int] = _ITERATIONS
    backwards_a_concept: ClassVar[int] = _ITERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompts(self.prompts)
        if not isinstance(self.proposer, ClipES):
            raise dp.errors.ProbeError(f"proposer is a {type(self.proposer).__name__}; give a ClipES")
        if not (0 <= self.eta < 1 and 0 <= self.theta <= 1 and self.iterations >= 1):
            raise dp.errors.ProbeError(
                f"eta={self.eta}, theta={self.theta}, iterations={self.iterations}; "
                "ClipAsRNN takes an eta of 0 or more and below 1, a theta of 0 to 1, and 1 iteration or more"
            )
        object.__setattr__(self, "forwards_a_concept", self.iterations)
        object.__setattr__(self, "backwards_a_concept", self.iterations)

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"iteration": range(1, self.iterations + 1)}

    def describe(self) -> str:
        """All that decides the maps, with checksums of both models' weights."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("vit", "proposer")}
        return f"ClipAsRNN({self.vit.describe()}, {self.proposer.describe()}, {json.dumps(own, default=list)})"

    def check(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> None:
        super().check(images, concepts)
        self.proposer.check(images, concepts[:1])  # one word may be left, which then needs a background

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Soft masks, (image, concept, iteration, y, x) on the proposer's grid, with attributes of both models."""
        found = super().scores(images, concepts)
        rejected = (found[:, :, -1] == 0).all(["y", "x"]).sum()
        return found.assign_attrs(proposer=self.proposer.describe(), rejected=int(rejected))

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Maps, (image, concept, y, x): the soft masks of the last iteration."""
        return self.scores(images, concepts).isel(iteration=-1, drop=True)

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.proposer.record(image)
        found = torch.zeros(len(concepts), self.iterations, *seen.grid, device=seen.pixels.device)
        left = list(range(len(concepts)))
        for iteration in range(self.iterations):
            words = [concepts[at] for at in left]
            masks = unit_range(self.proposer.relevance(seen, words))
            chances = self.alignment(image, masks, words)
            stays = (chances >= self.theta) | ((chances == chances.max()) & (chances < self.theta).all())
            ended = bool(stays.all())
            left = [at for at, stay in zip(left, stays.tolist(), strict=True) if stay]
            found[:, iteration:] = 0
            found[left, iteration:] = masks[stays][:, None]
            if ended:
                break
        return found

    @torch.no_grad()
    def alignment(self, image: np.ndarray, masks: Tensor, concepts: Sequence[str]) -> Tensor:
        """P_ii, (concept,): how probable a word is, among all of them, in the picture marked by its own mask.

        Args:
            image: (y, x, 3) uint8.
            masks: (concept, y, x) in 0..1, on any grid.
            concepts: words.
        """
        texts, found = self.vit.texts(concepts), []
        for mask in _resized(masks, image.shape[:2]).cpu().numpy() > self.eta:
            seen = self.vit.record(prompted(image, mask, self.prompts), keep=(), class_only=True)
            found.append(self.vit.logits(seen.output[0, 0], texts).float().softmax(-1))
        return torch.stack(found).diagonal().cpu()

    def masks(
        self, images: Sequence[np.ndarray], concepts: Sequence[str], *, crf: DenseCRF | None = None, side: int = 64
    ) -> xr.DataArray:
        """The segmentation, (image, concept, y, x) bool: a place shows one concept, or none, which is the background.

        The CRF runs on `side` x `side` places, to which picture and soft masks are brought; its reaches are in pixels
        of the picture. The authors run one that approximates, at the size of the picture.

        Args:
            images: (y, x, 3) uint8.
            concepts: words.
            crf: None: that of the authors' settings.
            side: of the grid; work and memory grow with its fourth power.
        """
        crf = crf or DenseCRF()
        found = self(images, concepts)
        shown = np.zeros((*found.shape[:2], side, side), bool)
        for image, maps, one in zip(images, found.values, shown, strict=True):
            soft = _resized(torch.from_numpy(maps), (side, side)).numpy()
            left = np.flatnonzero(soft.any((1, 2)))  # words that were dropped are no labels
            small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
            chances = np.concatenate([1 - soft.max(0, keepdims=True), soft[left]])
            winner = crf(small, chances, (image.shape[0] / side, image.shape[1] / side)).argmax(0)
            one[left] = winner == np.arange(1, len(left) + 1)[:, None, None]
        return xr.DataArray(shown, {"concept": list(concepts)}, found.dims, attrs=found.attrs | {"crf": repr(crf)})


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps, (concept, y, x), bilinearly."""
    return interpolate(maps[None], size, mode="bilinear")[0]
