"""What makes training quick on a CPU with bfloat16 matrix units; harmless on others, and unused on a GPU.

Matrix products of the training run in bfloat16 inside (weights, activations and sums stay float32). PyTorch's flash
attention gets slower under that setting, so unmasked attention is written out as two products. Neither touches the
saved model.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class WrittenOutAttention(TorchFunctionMode):
    """While active, attention without a mask is softmax(q k^T / sqrt d) v in bfloat16.

    Example:
        >>> q = torch.randn(1, 2, 5, 4)
        >>> with WrittenOutAttention():
        ...     out = torch.nn.functional.scaled_dot_product_attention(query=q, key=q, value=q)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> bool((out - exact).abs().max() < 0.05)
        True
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the attention call and pass on every other call."""
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        if given.get("attn_mask") is None and not given.get("is_causal"):
            q, k, v = given["query"], given["key"], given["value"]
            scores = (q * q.shape[-1] ** -0.5).bfloat16() @ k.bfloat16().mT
            return (torch.softmax(scores, dim=-1) @ v.bfloat16()).to(q.dtype)
        return func(*args, **kwargs)


@contextlib.contextmanager
def quick_matrix_products() -> Iterator[None]:
    """Let float32 matrix products use bfloat16 inside, until the block is left.

    Example:
        >>> with quick_matrix_products():
        ...     torch.get_float32_matmul_precision()
        'medium'
        >>> torch.get_float32_matmul_precision()
        'highest'
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
