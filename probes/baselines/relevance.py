"""Maps by relevance propagation: LRP, partial LRP and transformer attribution (Chefer, Gur and Wolf, CVPR 2021).

A score is handed down the model as relevance R, by the rules of `probes.baselines.relevance_rules`, which start from 1:

    classifier:  the logit of the class that the model itself sees; the concept changes nothing
    CLIP:        w_c · LN(x_CLS) with w_c = P^T t_c, the projection and the unit vector of the text as one linear layer;
                 the norm of the embedding and the logit scale are constants
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

import dit_probe as dp
from probes.baselines import relevance_rules as rule
from probes.baselines.relevance_rules import Rules
from probes.baselines.vit import ViT
from probes.baselines.vit_method import ViTMethod


@dataclass
class Propagation:
    """A vision transformer written in relevance rules, after a forward pass of one picture.

    Attributes:
        pixels: (1, 3, y, x).
        rules: which.
        grid: patches down and across.
        inputs: (1, token, width), the residual stream as each block gets it.
        attention: (1, head, query, key) of each block.
        pooled: (1, width), the class token after the final norm.
    """

    pixels: Tensor
    rules: Rules
    grid: tuple[int, int]
    inputs: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    pooled: Tensor = field(default_factory=lambda: torch.empty(0))

    def relevance(self, weight: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Relevance of tensors for the score weight · pooled, each of its tensor's shape.

        Args:
            weight: (width,).
            of: some of the tensors above.
        """
        score = rule.linear(self.pooled, weight[None], None, self.rules)
        return torch.autograd.grad(score, list(of), torch.ones_like(score), retain_graph=True)

    def patches(self, values: Tensor) -> Tensor:
        """Numbers of all tokens, (…, token), as a map of the patches, (…, y, x)."""
        return values[..., 1:].unflatten(-1, self.grid)


def propagate(vit: ViT, pixels: Tensor, rules: Rules) -> Propagation:
    """Run the vision side of a CLIPModel or a ViTForImageClassification on layers that hand back relevance.

    Args:
        vit: the model.
        pixels: (1, 3, y, x), of `ViT.pixels`.
        rules: `orig` or `ours`.
    """
    grid = pixels.shape[-2] // vit.patch, pixels.shape[-1] // vit.patch
    seen = Propagation(pixels.detach().clone().requires_grad_(), rules, grid)

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return rule.linear(x, layer.weight, layer.bias, rules)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (vit.heads, -1)).transpose(1, 2)

    embeddings = vit.tower.embeddings
    first = embeddings.class_embedding if vit.is_clip else embeddings.cls_token
    patches = rule.patches(seen.pixels, vit.convolution.weight, vit.convolution.bias).flatten(2).mT
    tokens = torch.cat([first.expand(1, 1, -1), patches], 1)
    positions = embeddings.interpolate_pos_encoding(tokens, *pixels.shape[-2:])
    tokens = rule.add(tokens, positions, rules)
    if vit.is_clip:
        tokens = rule.unchanged(vit.tower.pre_layrnorm, tokens)
    for block in vit.blocks:
        seen.inputs.append(tokens)
        normed = rule.unchanged(block.norm1, tokens)
        q, k, v = (heads(linear(normed, layer)) for layer in (block.q, block.k, block.v))
        scale = q.shape[-1] ** -0.5
        weights = rule.unchanged(lambda s, scale=scale: (s * scale).softmax(-1), rule.matmul(q, k.mT))
        seen.attention.append(weights)
        context = rule.matmul(weights, v).transpose(1, 2).flatten(2)
        tokens = rule.add(tokens, linear(context, block.out), rules)
        mlp: Any = block.mlp
        hidden = linear(rule.unchanged(block.norm2, tokens), mlp.fc1)
        tokens = rule.add(tokens, linear(rule.unchanged(mlp.activation_fn, hidden), mlp.fc2), rules)
    seen.pooled = rule.unchanged(vit.final, tokens)[:, 0]
    return seen


@dataclass(frozen=True)
class RelevanceMethod(ViTMethod):
    """A method on the relevance of a score.

    Raises:
        ModelError: no score to explain, or weights of half precision, which relevance outgrows.
    """

    kind: ClassVar = "relevance"
    needs: ClassVar = "score"
    backwards_a_concept: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        dtype = self.vit.convolution.weight.dtype
        if dtype not in (torch.float32, torch.float64):
            raise dp.errors.ModelError(
                f"{type(self).__name__}: weights are {dtype}, which relevance outgrows; load them as torch.float32"
            )

    def propagate(self, image: np.ndarray, concepts: Sequence[str], rules: Rules) -> tuple[Propagation, Tensor]:
        """A pass of a picture, and the linear layers, (concept or 1, width), that make a score of what it pools."""
        seen = propagate(self.vit, self.vit.pixels(image), rules)
        head: Any = self.vit.head
        if self.vit.is_clip:
            return seen, self.vit.texts(concepts) @ head.weight
        return seen, head.weight[head(seen.pooled).argmax(-1)]

    def gradients(self, image: np.ndarray, concepts: Sequence[str], first: int) -> list[tuple[Tensor, ...]]:
        """For every score, G_l = ds / dA_l of layers from `first` on; of CLIP, s is ``logits_per_image``."""
        seen = self.vit.record(image, gradients=True, keep=("attention",))
        logits = self.vit.logits(seen.output[0, :1], self.vit.texts(concepts) if self.vit.is_clip else None)[0]
        scores = [logits.max()] if self.vit.is_classifier else logits
        return [torch.autograd.grad(score, seen.attention[first:], retain_graph=True) for score in scores]


@dataclass(frozen=True)
class LRP(RelevanceMethod):
    """Relevance of every pixel, signed, at the resolution of the model's input: Σ_channels R, by the `orig` rules.

    By these rules relevance grows with depth, so that values say something within a map alone. They divide by sums near
    0, so that maps are all but chaotic: between float32 and float64, or after a change of pixels by one part in 10^4,
    they may be other maps. Load the model with ``dtype=torch.float64`` where maps are to be repeated.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32)
        >>> method = LRP(ViT(ViTForImageClassification(config).eval()))
        >>> method.scores([np.zeros((40, 50, 3), np.uint8)], ["sun"]).sizes
        Frozen({'image': 1, 'concept': 1, 'y': 32, 'x': 32})
    """

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen, weights = self.propagate(image, concepts, "orig")
        return torch.cat([seen.relevance(weight, [seen.pixels])[0].sum(1) for weight in weights])


@dataclass(frozen=True)
class PartialLRP(RelevanceMethod):
    """Relevance of the last block's attention (Voita et al. 2019): map^h = (R_A^h)^+[0, patches], of every head.

    Attributes:
        rules: `orig` as in Chefer et al. 2021, or `ours` as in the class of ConceptAttention's evaluation code.
        gradient: multiply by the gradient, map^h = (G^h R_A^h)^+[0, patches].

    Raises:
        ProbeError: no such rules.
    """

    rules: Rules = "orig"
    gradient: bool = False

    def __post_init__(self) -> None:
        if self.rules not in get_args(Rules):
            raise dp.errors.ProbeError(f"rules={self.rules!r}; there are {get_args(Rules)}")
        if self.gradient:
            object.__setattr__(self, "forwards", 2)
            object.__setattr__(self, "backwards_a_concept", 2)
        super().__post_init__()

    @property
    def axes(self) -> Mapping[str, Sequence[int]]:
        return {"head": range(self.vit.heads)}

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen, weights = self.propagate(image, concepts, self.rules)
        found = torch.cat([seen.relevance(weight, seen.attention[-1:])[0] for weight in weights])
        if self.gradient:
            found = found * torch.cat([gradient for (gradient,) in self.gradients(image, concepts, -1)])
        return seen.patches(found[:, :, 0].relu())


@dataclass(frozen=True)
class TransInterp(RelevanceMethod):
    """Transformer attribution (Chefer et al. 2021): relevance of attention, weighted by its gradient, over the layers.

        Ā_l = mean_h (G_l^h R_A_l^h)^+,    C = (I + Ā_L) … (I + Ā_first),    map = C[0, patches]

    R is of the `ours` rules. Heads and layers are mixed by the product and have no maps of their own.

    Attributes:
        first: first layer of the product, counted from 0; 1 in the authors' evaluation.

    Raises:
        SiteError: no such layer.
    """

    first: int = 1
    forwards: ClassVar[int] = 2
    backwards_a_concept: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = len(self.vit.blocks)
        if not 0 <= self.first < depth:
            raise dp.errors.SiteError(f"first={self.first} of a model with layers 0-{depth - 1}; give one of these")

    def maps(self, image: np.ndarray, concepts: Sequence[str]) -> Tensor:
        seen, weights = self.propagate(image, concepts, "ours")
        kept, rows = seen.attention[self.first :], []
        for weight, gradients in zip(weights, self.gradients(image, concepts, self.first), strict=True):
            row = nn.functional.one_hot(torch.tensor(0), kept[0].shape[-1]).to(kept[0])
            # One row of the product is wanted: from the last layer down it is vector times matrix.
            for relevance, gradient in zip(seen.relevance(weight, kept)[::-1], gradients[::-1], strict=True):
                row = row + row @ (gradient * relevance)[0].relu().mean(0)
            rows.append(row)
        return seen.patches(torch.stack(rows))
