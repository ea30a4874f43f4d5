"""Scores and saliency maps from a trace: xarray in, xarray out, lazy with dask, no torch.

A *score* is what one image token and one concept have in common at one (step, layer), nothing reduced. A *map* is
scores put through a softmax over concepts, averaged over steps and layers, and laid out on the image.

| space | score | averaged or summed over heads |
|---|---|---|
| ``output`` | o_x . o_c, the argument of eq. (8) | sum: heads are merged, as in the model |
| ``value`` | v_x . v_c | sum |
| ``cross`` | q . k / sqrt(head_dim), the logits of eq. (4) | mean: every head has its own softmax |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from dit_probe.chunkwise import chunkwise, softmax_over_concepts, whole
from dit_probe.errors import MapError
from dit_probe.schema import SCORE_SOURCES, SCORES, SPACES
from dit_probe.selection import select, select_heads

Space = Literal["output", "value", "cross"]
Direction = Literal["image_to_concept", "concept_to_image"]
Softmax = Literal["each", "after"]

DIRECTIONS = ("image_to_concept", "concept_to_image")
"""In the order of ``SCORES["cross"]``."""

PROMPT_ATTENTION = {"image_to_prompt": "attention_x_to_p", "prompt_to_image": "attention_p_to_x"}
"""Variable that each direction of `prompt_attention` is recorded in."""

SUMMED = ("head_summed", "head_dim_summed")
"""Dims that a dot product runs over."""

_ORDER = (
    "sample",
    "branch",
    "step",
    "layer",
    "head",
    "concept",
    "prompt_token",
    "frame",
    "y",
    "x",
    "image_token",
    *SUMMED,
)


def scores(
    ds: xr.Dataset,
    space: Space = "output",
    *,
    direction: Direction = "image_to_concept",
    rotary: bool = True,
    heads: Literal["merged", "each"] | Sequence[int] = "merged",
    layers: int | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
) -> xr.DataArray:
    """Similarity of every image token to every concept at every step and layer, nothing reduced.

    ``output``: ``s[c, i] = sum_hd o_x[i, h, d] o_c[c, h, d]`` (the argument of eq. 8); ``value``: the same of v_x and
    v_c; ``cross``: ``s[c, i] = mean_h sum_d q[h, d] k[h, d] / sqrt(head_dim)`` (the logits of eq. 4).

    Raw activations are used where they were recorded, else the scores reduced in flight; where both exist, the one
    recorded at more of the steps and layers asked for. Both give the same numbers.

    Args:
        ds: a trace (`dit_probe.open`), or any dataset with the variables' names and dims; numpy or dask.
        space: ``output``, ``value`` or ``cross``.
        direction: of ``cross`` only. ``image_to_concept``: image queries on concept keys, what the reference code
            computes; ``concept_to_image``: concept queries on image keys, what the paper's text says.
        rotary: of ``cross`` only; False takes q and k before rotary embedding.
        heads: ``merged``; ``each`` keeps the dim ``head``; head numbers merge those heads only.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        (sample, [branch,] step, layer, [head,] concept, image_token), float32, or float64 where the input is.

    Raises:
        MapError: an unknown argument, variables that were not recorded, or labels that were not.

    Example:
        >>> dims = ("sample", "step", "layer"), ("head", "head_dim")
        >>> ds = xr.Dataset({
        ...     "o_x": ((*dims[0], "image_token", *dims[1]), np.ones((1, 1, 2, 6, 2, 4))),
        ...     "o_c": ((*dims[0], "concept", *dims[1]), np.ones((1, 1, 2, 3, 2, 4))),
        ... })
        >>> scores(ds, layers=1).sizes
        Frozen({'sample': 1, 'step': 1, 'layer': 1, 'concept': 3, 'image_token': 6})
        >>> float(scores(ds).max()), float(scores(ds, heads=[0]).max())
        (8.0, 4.0)
    """
    found = _unsqueezed(ds, space, direction, rotary, heads, layers, steps)
    return found.squeeze([dim for dim in SUMMED if dim in found.dims])


def _unsqueezed(
    ds: xr.Dataset, space: Space, direction: Direction, rotary: bool, heads: Any, layers: Any, steps: Any
) -> xr.DataArray:
    """As `scores`, with the dims `SUMMED` of length 1, so that dask reads and reduces a record in one task."""
    _check(ds, space=(space, SPACES), direction=(direction, DIRECTIONS))
    merged = isinstance(heads, str)
    if merged:
        _check(ds, heads=(heads, ("merged", "each")))
    cross = space == "cross"
    score = SCORES[space][DIRECTIONS.index(direction) if cross else 0]
    raw = tuple(f"{name}_unrotated" if cross and not rotary else name for name in SCORE_SOURCES[score])
    in_flight = (score,) if heads == "merged" and (rotary or not cross) else ()
    purpose = f"space={space!r}" + (f", direction={direction!r}, rotary={rotary}" if cross else "")
    fix = f"record={raw!r}"
    fix += f", or scores=({space!r},)" if in_flight else " (scores reduced in flight merge all heads, after rotary)"
    picked = select(ds, (raw, in_flight), layers, steps, purpose=purpose, fix=fix)
    arrays = picked.arrays
    if len(arrays) == 1:
        result = arrays[0].astype(_precision(*arrays))
    else:
        if not merged:
            arrays = select_heads(arrays, heads)
        result = _dot(*arrays, each=heads == "each")
        if cross:
            # The model divides by sqrt(head_dim) before its softmax; heads are averaged, not summed, because each
            # of them has a softmax of its own and their number must not change the temperature of ours.
            merged_heads = 1 if heads == "each" else arrays[0].sizes["head"]
            result = result / (merged_heads * np.sqrt(arrays[0].sizes["head_dim"]).astype(result.dtype))
    result.name = score
    result.attrs = {
        "space": space,
        "direction": direction if cross else None,
        "rotary": bool(rotary),
        "heads": heads if isinstance(heads, str) else np.atleast_1d(heads).tolist(),
        "layers": picked.layers,
        "steps": picked.steps,
    }
    return _named(_ordered(result), ds)


def saliency(
    ds: xr.Dataset,
    space: Space = "output",
    *,
    softmax: Softmax | None = "each",
    layers: int | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
    heads: Literal["merged", "each"] | Sequence[int] = "merged",
    direction: Direction = "image_to_concept",
    rotary: bool = True,
    over: Sequence[str] = ("step", "layer"),
) -> xr.DataArray:
    """How much of each patch belongs to each concept.

    ``each`` is eq. (8), ``mean over steps and layers of softmax_c(o_x . o_c)``: a softmax over concepts in every
    layer and step, then the mean. ``after`` is the softmax of the mean. None is the mean of the scores.

    Args:
        ds: a trace (`dit_probe.open`), numpy or dask; the result is lazy when it is.
        space: ``output``, ``value`` or ``cross``.
        softmax: ``each``, ``after`` or None.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.
        heads: ``merged``; ``each`` gives a map per head; head numbers merge those heads only.
        direction: of ``cross`` only, see `scores`.
        rotary: of ``cross`` only, see `scores`.
        over: dims to average; ``("step",)`` gives a map per layer, ``("layer",)`` one per step, ``()`` all of them.

    Returns:
        (sample, [branch,] [step,] [layer,] [head,] concept, [frame,] y, x). Between 0 and 1 with a softmax, else in
        the units of the scores. ``frame`` exists where there is more than one. NaN in anything averaged gives NaN.

    Raises:
        MapError: as `scores`; a single concept under a softmax; image tokens that do not fill a grid.

    Example:
        >>> dims = ("sample", "step", "layer"), ("head", "head_dim")
        >>> ds = xr.Dataset({
        ...     "o_x": ((*dims[0], "image_token", *dims[1]), np.ones((1, 1, 2, 6, 2, 4))),
        ...     "o_c": ((*dims[0], "concept", *dims[1]), np.ones((1, 1, 2, 4, 2, 4))),
        ... }, coords={"patch_y": ("image_token", [0, 0, 0, 1, 1, 1]), "patch_x": ("image_token", [0, 1, 2, 0, 1, 2])})
        >>> maps = saliency(ds)
        >>> maps.sizes, float(maps[0, 0, 0, 0])
        (Frozen({'sample': 1, 'concept': 4, 'y': 2, 'x': 3}), 0.25)
    """
    _check(ds, softmax=(softmax, ("each", "after", None)))
    for dim in over:
        _check(ds, over=(dim, ("step", "layer")))
    if softmax is not None and ds.sizes.get("concept") == 1:
        raise MapError(
            f"one concept and softmax={softmax!r}: a softmax over a single concept is 1 everywhere, whatever the "
            "image. Trace several concepts (for instance a few background words beside it), or pass softmax=None"
        )
    values = _unsqueezed(ds, space, direction, rotary, heads, layers, steps)
    attrs = {"softmax": softmax, **values.attrs}
    if softmax == "each":
        values = softmax_over_concepts(values)
    # skipna=False: a step or layer that is missing must not pass for an average of the others.
    values = values.mean([dim for dim in (*over, *SUMMED) if dim in values.dims], skipna=False)
    if softmax == "after":
        values = softmax_over_concepts(values)
    values = grid(values)
    values.name, values.attrs = "saliency", attrs
    return values


def prompt_attention(
    ds: xr.Dataset,
    direction: Literal["image_to_prompt", "prompt_to_image"] = "image_to_prompt",
    *,
    layers: int | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
) -> xr.DataArray:
    """The model's own attention between the image and the tokens of its prompt, averaged over steps and layers.

    ``softmax(q_xp k_xp^T / sqrt(head_dim))`` of eq. (1), mean over heads, restricted to the other stream: what the
    rest of a row gives to its own stream is not shown, so rows sum to less than 1. While tracing, what image tokens
    give to padding was passed on to the prompt's real tokens.

    Args:
        ds: a trace with ``attention_x_to_p`` or ``attention_p_to_x`` (the probe `PromptAttention`).
        direction: whose queries: the image's, or the prompt's.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        (sample, [branch,] prompt_token, [frame,] y, x), with the tokens' strings as coordinate ``token``.

    Raises:
        MapError: the variable, or a label, was not recorded.

    Example:
        >>> weights = np.full((1, 1, 1, 6, 2), 0.5)
        >>> ds = xr.Dataset(
        ...     {"attention_x_to_p": (("sample", "step", "layer", "image_token", "prompt_token"), weights)},
        ...     coords={"patch_y": ("image_token", [0, 0, 0, 1, 1, 1]), "patch_x": ("image_token", [0, 1, 2, 0, 1, 2]),
        ...             "token": (("sample", "prompt_token"), [["a", "fox"]])})
        >>> prompt_attention(ds).sizes
        Frozen({'sample': 1, 'prompt_token': 2, 'y': 2, 'x': 3})
    """
    _check(ds, direction=(direction, tuple(PROMPT_ATTENTION)))
    candidates = ((PROMPT_ATTENTION[direction],),)
    picked = select(ds, candidates, layers, steps, purpose=f"direction={direction!r}", fix="the probe PromptAttention")
    (array,) = picked.arrays
    array = array.astype(_precision(array))
    array = grid(_ordered(array).mean([dim for dim in ("step", "layer") if dim in array.dims], skipna=False))
    array.name = "prompt_attention"
    array.attrs = {"direction": direction, "layers": picked.layers, "steps": picked.steps}
    return array


def features(
    ds: xr.Dataset,
    which: int | Sequence[int],
    site: str = "x",
    *,
    layers: int | Sequence[int] | None = None,
    steps: int | Sequence[int] | None = None,
) -> xr.DataArray:
    """Where features of a sparse autoencoder are active, averaged over steps and layers.

    Args:
        ds: a trace with ``feature_<site>_value`` and ``feature_<site>_index`` (the probe `SparseFeatures`).
        which: numbers of features.
        site: the activation that was encoded.
        layers: layer labels; None: all that were recorded. Layers with dictionaries of their own share no features.
        steps: step labels; None: all that were recorded.

    Returns:
        (sample, [branch,] concept, [frame,] y, x), a feature being one ``concept``; 0 where it is not among those kept.

    Raises:
        MapError: the variables, or a label, were not recorded; a site of the prompt.

    Example:
        >>> tokens = ("sample", "step", "layer", "image_token", "rank"), np.array([[[[[3.0, 1.0], [2.0, 0.0]]]]])
        >>> ds = xr.Dataset({"feature_x_value": tokens, "feature_x_index": (tokens[0], [[[[[7, 5], [5, -1]]]]])})
        >>> ds = ds.assign_coords(patch_y=("image_token", [0, 0]), patch_x=("image_token", [0, 1]))
        >>> features(ds, [5, 7]).values.tolist()
        [[[[1.0, 2.0]], [[3.0, 0.0]]]]
    """
    _check(ds)
    needed = f"feature_{site}_value", f"feature_{site}_index"
    picked = select(ds, (needed,), layers, steps, purpose=f"site={site!r}", fix="the probe SparseFeatures")
    value, index = picked.arrays
    wanted = np.atleast_1d(which)
    names = {"concept": [f"feature {number}" for number in wanted]}
    # A product, and no skipna: what was not recorded stays NaN.
    found = (value * (index == xr.DataArray(wanted, names, ["concept"]))).sum("rank", skipna=False)
    array = grid(_ordered(found).mean([dim for dim in ("step", "layer") if dim in found.dims], skipna=False))
    array.name, array.attrs = "feature", {"site": site, "layers": picked.layers, "steps": picked.steps}
    return array


def grid(array: xr.DataArray) -> xr.DataArray:
    """Lay ``image_token`` out as ``(frame,) y, x``, by the coordinates ``patch_frame``, ``patch_y`` and ``patch_x``.

    Args:
        array: any array with dim ``image_token`` and its coordinates ``patch_y``, ``patch_x`` and, for a video,
            ``patch_frame``: grid positions (patches, not pixels), in any order.

    Returns:
        The same values with ``image_token`` replaced by ``y, x``, or ``frame, y, x`` where there are several frames.

    Raises:
        MapError: no such dim or coordinates, or tokens that leave holes or fall on each other.

    Example:
        >>> tokens = xr.DataArray([1, 2, 3, 4], dims="image_token", coords={
        ...     "patch_y": ("image_token", [1, 1, 0, 0]), "patch_x": ("image_token", [0, 1, 0, 1])})
        >>> grid(tokens).values.tolist()
        [[3, 4], [1, 2]]
    """
    if "image_token" not in array.dims:
        raise MapError(f"no dim 'image_token' to lay out: the array has {tuple(array.dims)}")
    missing = [name for name in ("patch_y", "patch_x") if name not in array.coords]
    if missing:
        raise MapError(
            f"no coordinate {' and '.join(missing)} over image_token, so the place of each token is unknown. "
            "Assign them: array.assign_coords(patch_y=('image_token', rows), patch_x=('image_token', columns))"
        )
    names = [name for name in ("frame", "y", "x") if f"patch_{name}" in array.coords]
    count = array.sizes["image_token"]
    places = [np.unique(np.broadcast_to(array[f"patch_{name}"].values, count), return_inverse=True) for name in names]
    sizes = [len(labels) for labels, _ in places]
    order = np.ravel_multi_index([index for _, index in places], sizes)
    if len(order) != math.prod(sizes) or len(np.unique(order)) < len(order):
        raise MapError(
            f"{len(order)} image tokens do not fill a grid of {' x '.join(map(str, sizes))} ({', '.join(names)}): "
            "some places are empty or taken twice. Check the coordinates, or select whole rows and frames"
        )
    at = array.dims.index("image_token")
    rest = [dim for dim in array.dims if dim != "image_token"]
    over_tokens = [name for name, coord in array.coords.items() if "image_token" in coord.dims]
    array = array.drop_vars({*over_tokens, *(f"patch_{name}" for name in names)})
    if not np.array_equal(order, np.arange(len(order))):
        array = array.isel(image_token=np.argsort(order))
    variable = array.variable.unstack(image_token=dict(zip(names, sizes, strict=True)))
    kept = [name for name in names if name != "frame" or sizes[0] > 1]
    variable = variable.isel({name: 0 for name in names if name not in kept})
    coords: dict[Any, Any] = dict(array.coords)
    coords |= {name: labels for name, (labels, _) in zip(names, places, strict=True) if name in kept}
    laid_out = xr.DataArray(variable, coords, name=array.name, attrs=array.attrs)
    return laid_out.transpose(*rest[:at], *kept, *rest[at:])


def _check(ds: xr.Dataset, **arguments: tuple[Any, tuple[Any, ...]]) -> None:
    """Refuse what is no dataset, and arguments outside of their choices."""
    if not isinstance(ds, xr.Dataset):
        raise MapError(f"expected a trace (an xarray.Dataset, as dit_probe.open returns), got {type(ds).__name__}")
    for name, (value, choices) in arguments.items():
        if value not in choices:
            raise MapError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}")


def _precision(*arrays: xr.DataArray) -> np.dtype[Any]:
    """float32 for half precision, which cannot hold a sum over thousands of products; float64 stays."""
    return np.dtype(np.float64 if any(array.dtype == np.float64 for array in arrays) else np.float32)


def _ordered(array: xr.DataArray) -> xr.DataArray:
    return array.transpose(..., *_ORDER, missing_dims="ignore")


def _named(array: xr.DataArray, ds: xr.Dataset) -> xr.DataArray:
    """Carry names of concepts that differ between samples, also where they were stored as a data variable."""
    return array.assign_coords(concept_name=ds["concept_name"]) if "concept_name" in ds.data_vars else array


def _dot(image: xr.DataArray, concept: xr.DataArray, *, each: bool) -> xr.DataArray:
    """Dot products, as one matrix product a chunk (einsum does not reach BLAS with this many dims)."""
    dtype = _precision(image, concept)
    over = ["head_dim"] if each else ["head", "head_dim"]

    def kernel(x: np.ndarray, c: np.ndarray) -> np.ndarray:
        x, c = (part.astype(dtype, copy=False).reshape(*part.shape[: -len(over)], -1) for part in (x, c))
        # The product the other way round takes 1.4 times as long.
        return np.ascontiguousarray(np.matmul(x, c.swapaxes(-1, -2)).swapaxes(-1, -2))

    core, made = [["image_token", *over], ["concept", *over]], ["concept", "image_token"]
    return xr.apply_ufunc(
        chunkwise(kernel, core, made, dtype),
        whole(image, core[0]),
        whole(concept, core[1]),
        input_core_dims=core,
        output_core_dims=[[*made, *SUMMED[-len(over) :]]],
        dask="allowed",
    )
