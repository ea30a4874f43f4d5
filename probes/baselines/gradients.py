"""Maps from gradients of a score: GradCAM in both of its forms, Transformer Interpretability without relevance, LeGrad.

The score s_c is CLIP's ``logits_per_image`` of concept c, or a classifier's logit of the class that it sees. Its
gradients G_l^h = ds_c / dA_l^h cost one pass forward a picture and one back a concept. Nothing is brought to 0..1 here,
so that nothing is divided by 0: where no evidence is positive a map is zero, and ``zero_maps`` counts those.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import dit_probe as dp
from probes.baselines.vit_method import ViTMethod, layers_of
from probes.baselines.vit_recording import Recording


@dataclass(frozen=True)
class GradientMethod(ViTMethod):
    """A method on the gradients of a score.

    Attributes:
        score: "logit", or "softmax": the logit's softmax over the concepts, or over a classifier's classes. With words
            for the background among the concepts this is the better one of CLIP (Lin et al. 2023, CLIP is also an
            efficient segmenter).

    Raises:
        ConceptError: when it is called: a softmax over one concept, which has no gradient.
    """

    score: Literal["logit", "softmax"] = field(default="logit", kw_only=True)
    kind: ClassVar = "relevance"
    needs: ClassVar = "score"
    keep: ClassVar[Sequence[str]] = ("attention",)
    backwards_a_concept: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("logit", "softmax"):
            raise dp.errors.ProbeError(f"score={self.score!r}; {type(self).__name__} explains 'logit' or 'softmax'")

    @abstractmethod
    def relevance(self, seen: Recording, score: Tensor) -> Tensor:
        """The map, (*axes, y, x), of one score of one pass."""

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.vit.record(image, gradients=True, keep=self.keep)
        scores = self.explained(seen, seen.output[:, 0], concepts)
        return torch.stack([self.relevance(seen, score) for score in scores])

    def explained(self, seen: Recording, state: Tensor, concepts: Sequence[str]) -> list[Tensor]:
        """Scores, one a concept or a classifier's own, that a state (1, width) of the residual stream gives."""
        texts = self.vit.texts(concepts) if self.vit.is_clip else None
        found = self.vit.logits(state, texts)[0]
        found = found.softmax(-1) if self.score == "softmax" else found
        return [found[self.vit.logits(seen.output[0, 0]).argmax()]] if self.vit.is_classifier else list(found)

    def scores(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """Scores as `ViTMethod.scores` has them; the attribute ``zero_maps`` counts maps without any relevance."""
        found = super().scores(images, concepts)
        return found.assign_attrs(zero_maps=int((found == 0).all([*self.axes, "y", "x"]).sum()))

    def check(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> None:
        super().check(images, concepts)
        if self.score == "softmax" and len(concepts) == 1 and self.vit.is_clip:
            raise dp.errors.ConceptError(
                f"{type(self).__name__}: a softmax over {list(concepts)} is 1 whatever the picture; "
                'give words for the background, or score="logit"'
            )


@dataclass(frozen=True)
class GradCAM(GradientMethod):
    """GradCAM of the class token's attention (Chefer et al. 2021), or of the tokens that the last block reads.

        "attention"  w_h = mean_j G_l^h[0, j],    map = (mean_h w_h A_l^h[0, patches])^+
        "token"      a   = mean_j ds_c / dF_j,    map_j = (F_j . a)^+,    F what attention of layer l reads

    Means over j are over patches. "token" is Selvaraju et al. 2017 as it is applied to transformers: F comes before
    attention, because patches that the last block puts out do not enter the score.

    Attributes:
        form: "attention", which ConceptAttention's tables repeat, or "token".
        layers: each has a map of its own; the last one unless others are given. None: all.

    Raises:
        ProbeError: no such form.
        SiteError: a layer that does not exist.
    """

    form: Literal["attention", "token"] = "attention"
    layers: Sequence[int] | None = (-1,)
    keep: ClassVar = ("attention", "normed")

    def __post_init__(self) -> None:
        super().__post_init__()
        layers_of(self.vit, self.layers)
        if self.form not in ("attention", "token"):
            raise dp.errors.ProbeError(f"form={self.form!r}; GradCAM has 'attention' and 'token'")

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"layer": layers_of(self.vit, self.layers)}

    def relevance(self, seen: Recording, score: Tensor) -> Tensor:
        kept = seen.attention if self.form == "attention" else seen.normed
        kept = [kept[layer] for layer in self.axes["layer"]]
        found = []
        for values, slope in zip(kept, torch.autograd.grad(score, kept, retain_graph=True), strict=True):
            if self.form == "attention":
                weights = slope[0, :, 0, seen.skip :].mean(-1)
                found.append((weights[:, None] * values[0, :, 0]).mean(0))
            else:
                found.append(values[0] @ slope[0, seen.skip :].mean(0))
        return seen.patches(torch.stack(found)).relu()


@dataclass(frozen=True)
class GenericAttention(GradientMethod):
    """Gradient times attention over the layers (Chefer et al. 2021b, Generic attention-model explainability).

        R <- R + mean_h (G_l^h A_l^h)^+ R,    R_0 = I,    map = R[0, patches]

    The one-pass successor of TransInterp (2021a), which puts relevance in the place of A; what CLIP is explained with.

    Attributes:
        first: first layer that is added, negative ones from the last: 0 all of them, -1 the last alone, as the authors'
            CLIP notebook has it.

    Raises:
        SiteError: a layer that does not exist.
    """

    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        layers_of(self.vit, [self.first])

    def relevance(self, seen: Recording, score: Tensor) -> Tensor:
        kept = seen.attention[self.first :]
        slopes = torch.autograd.grad(score, kept, retain_graph=True)
        row = torch.zeros_like(kept[0][0, 0, 0])
        row[0] = 1
        # One row of the product is wanted: from the last layer down it is vector times matrix.
        for values, slope in zip(reversed(kept), reversed(slopes), strict=True):
            row = row + row @ (slope * values)[0].relu().mean(0)
        return seen.patches(row)


@dataclass(frozen=True)
class LeGrad(GradientMethod):
    """LeGrad (Bousselham et al. 2024): how a layer's attention could raise the score that the layer itself gives.

        s_l = score of head(norm(mean over tokens of x_l)),    map_l^h = mean over queries of (ds_l / dA_l^h)^+

    x_l is the residual stream after block l. The authors' map is the mean over heads and layers; the paper has all
    layers, their code by default the last two.

    Attributes:
        layers: None: all.

    Raises:
        SiteError: a layer that does not exist.
    """

    layers: Sequence[int] | None = None
    keep: ClassVar = ("attention", "inputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        layers_of(self.vit, self.layers)

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"layer": layers_of(self.vit, self.layers), "head": range(self.vit.heads)}

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen = self.vit.record(image, gradients=True, keep=self.keep)
        streams = [*seen.inputs[1:], seen.output]
        found = []
        for layer in self.axes["layer"]:
            scores = self.explained(seen, streams[layer].mean(1), concepts)
            found.append(torch.stack([self.relevance(seen, score, layer) for score in scores]))
        return torch.stack(found, 1)

    def relevance(self, seen: Recording, score: Tensor, layer: int = -1) -> Tensor:
        """The map, (head, y, x), of the score of one layer."""
        (slope,) = torch.autograd.grad(score, seen.attention[layer], retain_graph=True)
        return seen.patches(slope[0].relu().mean(1))
