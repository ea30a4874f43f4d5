"""Activations on their way from the device to the writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from dit_probe import schema


def host(tensor: Tensor) -> tuple[Callable[[], np.ndarray], int]:
    """A function that waits for a copy on the host, which later changes cannot reach, and gives it away; and its bytes.

    bfloat16 comes as its bits (uint16), which numpy has no type for.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if not tensor.is_cuda:
        # In memory of numpy's, which a store in memory may keep as it is.
        copy = np.empty(tensor.shape, _numpy(tensor.new_empty(0)).dtype)
        half = tensor.dtype == torch.bfloat16
        target = torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(copy)
        target.copy_(tensor.detach())
        return lambda: copy, nbytes
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> np.ndarray:
        event.synchronize()
        return _numpy(pinned)

    return wait, nbytes


def _numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def score(name: str, activations: Mapping[str, Tensor]) -> Tensor:
    """One layer's score (row, concept, image_token) in float32, by the definitions of `dit_probe.maps.scores`."""
    image, concept = (activations[source].float() for source in schema.SCORE_SOURCES[name])
    # Head by head, in whichever order they lie in memory: einsum copies both, which takes 5 to 20 times as long.
    dots = torch.matmul(image.transpose(1, 2), concept.permute(0, 2, 3, 1)).sum(1).transpose(1, 2)
    heads, head_dim = image.shape[-2:]
    # Attention logits, mean over heads; the other spaces are plain dot products.
    return dots / (heads * head_dim**0.5) if name.startswith("score_cross") else dots
