"""Layer-wise relevance propagation as a backward pass with other rules.

Each function computes what its layer computes; backwards it hands on relevance instead of a gradient. The relevance of
any tensor of a model written in them is `torch.autograd.grad(score, tensor, seed)`. Where a tensor is used twice
autograd adds what comes back, which is the rule of a clone, x Σ_k R_k / x; where one token is read the others get
nothing, which is the rule of CLS pooling.

Two sets of rules of the transformer relprop (Chefer, Gur and Wolf, CVPR 2021):

| | `orig` | `ours` |
|---|---|---|
| linear | a denominator for each sign of the input: inputs of both signs get twice the relevance | one: conserving |
| sum | by ratio | by ratio, then rescaled to the sum |
| others | the same | the same |
"""

# pyright: reportIncompatibleMethodOverride=false
# torch calls a Function's forward with the arguments of apply, which its own signature cannot say.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

Rules = Literal["orig", "ours"]
STABILISER = 1e-9


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Divide stably: a / (b + sign(b) 1e-9), and 0 where b is 0.

    Example:
        >>> divide(torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0])).tolist()
        [-0.5, 0.0]
    """
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b + STABILISER * b.sign()))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
    """Linear layer, x W^T + b, by the rule α=1, β=0; the bias gets nothing.

        orig: R_j = x_j⁺ Σ_i W_ij⁺ R_i / (W⁺x⁺)_i + x_j⁻ Σ_i W_ij⁻ R_i / (W⁻x⁻)_i
        ours: both denominators are (W⁺x⁺ + W⁻x⁻)_i

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,) or None.
        rules: which.

    Example:
        >>> x = torch.tensor([[1.0, -1.0]], requires_grad=True)
        >>> y = linear(x, torch.tensor([[3.0, -1.0]]), None, "ours")
        >>> torch.autograd.grad(y, x, torch.ones(1, 1))[0].tolist()
        [[0.75, 0.25]]
    """
    return _apply(_Linear, x, weight, bias, rules)


def add(a: Tensor, b: Tensor, rules: Rules) -> Tensor:
    """Sum of two tensors of one shape, (image, …): R_a = a R / (a+b), R_b = b R / (a+b).

    `ours` then rescales both parts, in each image, to the sums |ΣR_a| / (|ΣR_a| + |ΣR_b|) ΣR and its complement.
    """
    return _apply(_Add, a, b, rules)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product a b: with S = R / (a b), R_a = a (S b^T) / 2, R_b = b (a^T S) / 2.

    Also of q k^T; the scale of the dot product belongs to the softmax, which leaves relevance alone.
    """
    return _apply(_Matmul, a, b)


def unchanged(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Function of x, of its shape, that hands relevance on as it is: softmax, GELU, LayerNorm."""
    return _apply(_Unchanged, function, x)


def patches(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution that cuts an image into patches, by the z^B rule (Montavon et al. 2017) between its extremes l and h.

        S = R / (W*x - W⁺*l - W⁻*h)     R_x = x (W^T*S) - l (W⁺^T*S) - h (W⁻^T*S)

    Args:
        image: (image, channel, y, x).
        weight: (dim, channel, y, x), its stride its own size.
        bias: (dim,) or None; gets nothing.
    """
    return _apply(_Patches, image, weight, bias)


def _apply(function: type[Function], *args: Any) -> Tensor:
    return function.apply(*args)  # pyright: ignore[reportReturnType]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rules = rules
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        signs = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
        outputs = [functional.linear(part, sign) for part, sign in signs]
        if ctx.rules == "ours":
            outputs = [outputs[0] + outputs[1]] * 2
        shares = (
            part * (divide(relevance, output) @ sign) for (part, sign), output in zip(signs, outputs, strict=True)
        )
        return sum(shares, torch.zeros_like(x)), None, None, None


class _Add(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rules: Rules) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rules = rules
        return a + b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        share = divide(relevance, a + b)
        parts = [a * share, b * share]
        if ctx.rules == "ours":
            whole = _total(relevance)
            sums = [_total(part) for part in parts]
            sizes = sums[0].abs() + sums[1].abs()
            parts = [
                part * divide(divide(found.abs(), sizes) * whole, found)
                for part, found in zip(parts, sums, strict=True)
            ]
        return *parts, None


class _Matmul(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        ctx.save_for_backward(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, Tensor]:
        a, b, product = ctx.saved_tensors
        share = divide(relevance, product) / 2
        return a * (share @ b.mT), b * (a.mT @ share)


class _Unchanged(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # A function that returns its argument (a dropout at rest) must not return the very same tensor here.
        return function(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[None, Tensor]:
        return None, relevance


class _Patches(Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(image, weight)
        return functional.conv2d(image, weight, bias, stride=tuple(weight.shape[-2:]))

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        stride = tuple(weight.shape[-2:])
        low, high = (edge(image, dim=(1, 2, 3), keepdim=True).expand_as(image) for edge in (torch.amin, torch.amax))
        terms = [(image, weight), (-low, weight.clamp(min=0)), (-high, weight.clamp(max=0))]
        output = sum((functional.conv2d(x, w, stride=stride) for x, w in terms), torch.zeros_like(relevance))
        share = divide(relevance, output)
        back = (x * functional.conv_transpose2d(share, w, stride=stride) for x, w in terms)
        return sum(back, torch.zeros_like(image)), None, None


def _total(part: Tensor) -> Tensor:
    return part.sum(dim=tuple(range(1, part.dim())), keepdim=True)
