"""Sanity checks (Adebayo et al., 2018): what is left of a map without learned weights, or under another word."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dit_probe.protocols import EvaluationError


def random_twin(pipe: Any, seed: int = 0) -> Any:
    """The same pipeline with fresh weights in transformer and text encoders: what the architecture alone gives.

    The autoencoder, the tokenizers, the scheduler, devices and precisions stay.

    Args:
        pipe: a pipeline, which is not changed.
        seed: of the weights.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> random_twin(pipe, 1).vae is pipe.vae, random_twin(pipe, 1).transformer is pipe.transformer
        (True, False)
    """
    import torch

    fresh = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, old in sorted(pipe.components.items()):
            if name.startswith("transformer") and old is not None:
                new = type(old).from_config(old.config)
            elif name.startswith("text_encoder") and old is not None:
                new = type(old)(old.config)
            else:
                continue
            fresh[name] = torch.nn.Module.to(new, old.device, old.dtype).eval()
    return _with(pipe, **fresh)


def randomised(pipe: Any, blocks: int, seed: int = 0) -> Any:
    """The same pipeline with fresh weights in its last blocks: a step of the cascading randomisation.

    Blocks are counted from the output backwards, joint and single ones together, in the order they run. Their weights
    are drawn as the model's class initialises itself, and a block's are the same in every step of a cascade of one
    seed. Blocks that come after the layers of a map leave it as it is: single ones those of joint layers. With all
    blocks it is not yet a `random_twin`: text encoders, the embedders of text, time and image, and the output layer are
    still trained.

    Args:
        pipe: a pipeline, which is not changed; whatever is not fresh is shared with it.
        blocks: how many blocks get fresh weights, 0 to all. While it is made there is one more transformer in memory.
        seed: of the weights.

    Raises:
        EvaluationError: fewer than 0 blocks, or more than there are.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")  # 3 joint blocks and 1 single
        >>> other = randomised(pipe, 2).transformer
        >>> [(name, index) for name in ("transformer_blocks", "single_transformer_blocks")
        ...  for index, block in enumerate(getattr(other, name))
        ...  if block.attn.to_q.weight is not getattr(pipe.transformer, name)[index].attn.to_q.weight]
        [('transformer_blocks', 2), ('single_transformer_blocks', 0)]
    """
    import torch

    from dit_probe.anatomy import find, transformer_of

    old: Any = transformer_of(pipe)
    found = find(pipe).blocks(old)
    if not 0 <= blocks <= len(found):
        raise EvaluationError(f"blocks={blocks}; {type(old).__name__} has {len(found)}: give a number from 0 to that")
    # deepcopy takes for copied what it is told: tensors are shared, modules, and with them their hooks, are not.
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*old.parameters(), *old.buffers())}
    model = copy.deepcopy(old, shared)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(old).from_config(old.config)
    for block in found[len(found) - blocks :]:
        parent, _, name = block.path.rpartition(".")
        setattr(model.get_submodule(parent), name, fresh.get_submodule(block.path).to(old.device, old.dtype).eval())
    return _with(pipe, transformer=model)


def _with(pipe: Any, **parts: Any) -> Any:
    """The same pipeline with other parts."""
    made = type(pipe)(**{**pipe.components, **parts})
    if hasattr(pipe, "default_sample_size"):  # the demo sets one of its own
        made.default_sample_size = pipe.default_sample_size
    return made


@dataclass(frozen=True)
class Shuffled:
    """A method under the wrong words; `shuffled` makes it."""

    method: Callable[..., xr.DataArray]

    @property
    def class_agnostic(self) -> bool:
        """Is the map the same for every concept?"""
        return getattr(self.method, "class_agnostic", False)

    def describe(self) -> str:
        """What the method says of itself."""
        describe = getattr(self.method, "describe", None)
        named = self.method if hasattr(self.method, "__qualname__") else type(self.method)
        return f"shuffled({describe() if callable(describe) else f'{named.__module__}.{named.__qualname__}'})"

    def __call__(self, images: Sequence[np.ndarray], concepts: Sequence[str]) -> xr.DataArray:
        """The method's maps, each under the word before its own."""
        return self.method(images, concepts).roll(concept=-1, roll_coords=False)


def shuffled(method: Callable[..., xr.DataArray]) -> Shuffled:
    """Give every word the map of the next word in the list, and the last that of the first.

    What a metric has left of its value does not depend on the word; a class-agnostic method is unchanged.

    Args:
        method: any method.

    Example:
        >>> from dit_probe.methods import noise
        >>> picture = [np.zeros((8, 8, 3), np.uint8)]
        >>> right, wrong = (m(picture, ["sun", "sky"]) for m in (noise(), shuffled(noise())))
        >>> bool((wrong.sel(concept="sun", drop=True) == right.sel(concept="sky", drop=True)).all())
        True
    """
    return Shuffled(method)


def similarity(maps: xr.DataArray, other: xr.DataArray) -> xr.Dataset:
    """How alike two methods' maps of the same pictures are.

    ``spearman``: the correlation of ranks over all places, equal values at the mean of their ranks; -1 to 1.

    Args:
        maps: (image, concept, [frame,] y, x), of a method.
        other: those of another, on the same grid and of the same words.

    Returns:
        ``spearman`` (image, concept); NaN where a map is constant or holds NaN.

    Raises:
        EvaluationError: other sizes or words.

    Example:
        >>> from dit_probe.methods import noise
        >>> maps = noise()([np.zeros((8, 8, 3), np.uint8)], ["sun"])
        >>> similarity(maps, 3 * maps + 1).spearman.values.round(6), similarity(maps, -maps).spearman.values.round(6)
        (array([[1.]]), array([[-1.]]))
    """
    found = [(dict(array.sizes), array.coords["concept"].values.tolist()) for array in (maps, other)]
    if found[0] != found[1]:
        raise EvaluationError(f"maps of {found[0]} and {found[1]}: compare maps of the same pictures, words and grid")
    places = [dim for dim in maps.dims if dim not in ("image", "concept")]
    pair = [array.drop_vars([name for name in array.coords if name != "concept"]) for array in (maps, other)]
    ranked = xr.apply_ufunc(_spearman, *pair, input_core_dims=[places, places], vectorize=True)
    return xr.Dataset({"spearman": ranked.transpose("image", "concept").drop_attrs()})


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return np.nan
    a, b = (ranks - ranks.mean() for ranks in map(_ranks, (one, other)))
    spread = np.sqrt((a @ a) * (b @ b))
    return a @ b / spread if spread > 0 else np.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, at, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]
