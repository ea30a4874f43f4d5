"""Muon in float32, batched over equal shapes: the optimiser of the transformer blocks' matrices.

torch's own Muon orthogonalises one matrix at a time in bfloat16; on a CPU, stacking the matrices of one shape and
staying in float32 is several times faster.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch

# quintic Newton-Schulz coefficients (Source: Jordan et al., Muon, 2024)
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Push all singular values of a stack of matrices towards 1.

    Args:
        matrices: (matrix, row, column) float32.
        iterations: Newton-Schulz iterations.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 8, 5)))
        >>> bool((values > 0.5).all() and (values < 1.4).all())
        True
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, scaled to the root mean square of an Adam update (Moonlight's rule).

    Args:
        parameters: Matrices only.
        lr: Learning rate, in the units of AdamW's.
        momentum: Nesterov momentum.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._direction(parameter, group["momentum"]) for parameter in parameters])
                scale = 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(updates), strict=True):
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _direction(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None  # step() leaves parameters without a gradient out
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, state["momentum"], momentum)
