"""What a map may hang on without showing it: a few massive channels, and tokens that draw attention to themselves.

Massive channels (arXiv 2402.17762; in diffusion transformers 2510.11538, 2605.13974) are few, far larger than the
others, and so at nearly all tokens: a dot product may be theirs alone. Attention sinks (2309.17453; in diffusion
transformers 2605.09313) are tokens that receive attention whatever the query, such as padding that is not masked.
xarray in, xarray out, lazy with dask but for the table of `sinks`; no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from dit_probe.errors import MapError
from dit_probe.maps import Space
from dit_probe.schema import SCORE_SOURCES, SCORES, SPACES, TOKEN_DIM, stream
from dit_probe.selection import Labels, select

_CHANNEL_DIMS = ("width", "text_width", "head", "head_dim")
_RECEIVED = ("received_x", "received_p", "padding")
_COLUMNS = (
    *("sample", "branch", "layer", "stream", "position", "times"),
    *("token", "padding", "patch_frame", "patch_y", "patch_x"),
)


def massive_channels(
    ds: xr.Dataset, variable: str = "x", *, ratio: float = 10.0, layers: Labels = None, steps: Labels = None
) -> xr.Dataset:
    """How large every channel is beside the median channel, and which are massive.

        magnitude[d] = mean over tokens of |a[token, d]|;   relative[d] = magnitude[d] / median over d of magnitude

    A channel is massive where ``relative > ratio``. 10 is a convention of ours: in a dot product of two such tokens
    the channel then weighs as much as 100 median ones. Work on language models asks for about 1000 times the median,
    of activations of single tokens (2402.17762, section 2), not of a mean over tokens. ``relative`` is for any other.

    Args:
        ds: a trace (`dit_probe.open`), numpy or dask.
        variable: an activation: a residual stream, whose channels are ``width``, or q, k, v or o, whose channels are
            ``head`` times ``head_dim``, all heads beside one median.
        ratio: how many medians a channel must exceed.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        ``magnitude`` in the units of the activation, ``relative`` (NaN where the median is 0) and ``massive`` (bool),
        (sample, [branch,] step, layer, width) or (…, head, head_dim). Tokens of the prompt include its padding.

    Raises:
        SiteError: no activation has this name.
        MapError: it was not recorded, or not at a layer or step.

    Example:
        >>> x = np.ones((1, 1, 1, 4, 5))
        >>> x[..., 3] = -40
        >>> ds = xr.Dataset({"x": (("sample", "step", "layer", "image_token", "width"), x)})
        >>> found = massive_channels(ds)
        >>> found.relative[0, 0, 0].values.tolist(), found.width[found.massive[0, 0, 0]].values.tolist()
        ([1.0, 1.0, 1.0, 40.0, 1.0], [3])
    """
    token = TOKEN_DIM[stream(variable)]
    fix = f"record={[variable]!r}"
    picked = select(ds, ((variable,),), layers, steps, purpose=f"variable={variable!r}", fix=fix)
    array = _floating(picked.arrays[0])
    dims = _channel_dims(array)
    magnitude = abs(array).mean(token, skipna=False)
    median = magnitude.median(dims, skipna=False)
    relative = magnitude / median.where(median > 0)
    found = xr.Dataset({"magnitude": magnitude, "relative": relative, "massive": relative > ratio})
    found = found.assign_coords({dim: np.arange(found.sizes[dim]) for dim in dims if dim not in found.coords})
    return found.assign_attrs(variable=variable, ratio=ratio, layers=picked.layers, steps=picked.steps)


def channel_share(
    ds: xr.Dataset, space: Space = "output", *, layers: Labels = None, steps: Labels = None
) -> xr.DataArray:
    """Which share of the differences that make a map comes from each channel.

    A score is a sum over channels, ``s[c, i] = sum_d x[i, d] c[c, d]``. The softmax over concepts forgets what all
    concepts have in common, and what all tokens have in common makes no picture: with x less its mean over tokens and
    c less its mean over concepts, the variance of s over tokens, summed over concepts, splits without remainder into

        share[d] = sum_ci x[i, d] c[c, d] s[c, i] / sum_ci s[c, i]^2

    the covariance of a channel's term with the whole. Shares add up to 1; one is negative where a channel works
    against the others.

    Args:
        ds: a trace with both activations of the space (`dit_probe.schema.SCORE_SOURCES`), numpy or dask.
        space: ``output``, ``value`` or ``cross`` (image queries on concept keys, after rotary embedding).
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        (sample, [branch,] step, layer, head, head_dim), a share of 1. NaN where the scores of all concepts differ
        nowhere, as those of a single one.

    Raises:
        MapError: no such space, or an activation that was not recorded.

    Example:
        >>> x, c = np.zeros((1, 1, 1, 6, 1, 3)), np.ones((1, 1, 1, 2, 1, 3))
        >>> x[0, 0, 0, :, 0] = np.eye(3)[[0, 1, 2, 0, 1, 2]]
        >>> c[0, 0, 0, 0, 0, 1] = 5  # elsewhere the concepts agree
        >>> dims = ("sample", "step", "layer"), ("head", "head_dim")
        >>> ds = xr.Dataset({
        ...     "o_x": ((*dims[0], "image_token", *dims[1]), x),
        ...     "o_c": ((*dims[0], "concept", *dims[1]), c),
        ... })
        >>> channel_share(ds).values.ravel().round(6).tolist()
        [0.0, 1.0, 0.0]
    """
    if space not in SPACES:
        raise MapError(f"space={space!r} is none of {', '.join(map(repr, SPACES))}")
    names = SCORE_SOURCES[SCORES[space][0]]
    picked = select(ds, (names,), layers, steps, purpose=f"the channels of space={space!r}", fix=f"record={names!r}")
    image, concept = map(_floating, picked.arrays)
    image = image - image.mean("image_token", skipna=False)
    concept = concept - concept.mean("concept", skipna=False)
    score = xr.dot(image, concept, dim=_channel_dims(image))
    terms = (concept * xr.dot(image, score, dim="image_token")).sum("concept", skipna=False)
    total = (score**2).sum(["concept", "image_token"], skipna=False)
    share = (terms / total.where(total > 0)).rename("channel_share")
    return share.assign_attrs(space=space, layers=picked.layers, steps=picked.steps)


def without_channels(ds: xr.Dataset, channels: xr.DataArray, variables: Sequence[str] = ("o_x", "o_c")) -> xr.Dataset:
    """The trace with some channels set to 0, so that `dit_probe.maps` leaves them out of its dot products.

    Args:
        ds: a trace, numpy or dask.
        channels: bool, True on what is left out, such as ``massive_channels(ds, "o_x").massive``. Its dims are the
            channels', and any leading ones of the variables, for channels that differ by sample, step or layer.
            Labels that it does not have are left as they are.
        variables: both sides of the product: ``o_x, o_c``; ``v_x, v_c``; ``q_x, k_c`` …

    Returns:
        The same dataset with those variables changed, and without the scores that were reduced in flight from them,
        which still have every channel.

    Raises:
        MapError: a variable was not recorded, or `channels` does not fit one.

    Example:
        >>> from dit_probe.maps import scores
        >>> dims = ("sample", "step", "layer"), ("head", "head_dim")
        >>> ds = xr.Dataset({
        ...     "o_x": ((*dims[0], "image_token", *dims[1]), np.ones((1, 1, 1, 2, 2, 4))),
        ...     "o_c": ((*dims[0], "concept", *dims[1]), np.ones((1, 1, 1, 3, 2, 4))),
        ... })
        >>> first = xr.DataArray(np.eye(2, 4, dtype=bool), dims=dims[1])
        >>> float(scores(ds).max()), float(scores(without_channels(ds, first)).max())
        (8.0, 6.0)
    """
    if not isinstance(channels, xr.DataArray):
        raise MapError(f"channels is a {type(channels).__name__}; give the DataArray massive_channels(…).massive")
    missing = [name for name in variables if name not in ds]
    if missing:
        found = ", ".join(map(str, ds.data_vars)) or "no variables"
        raise MapError(f"no {' and '.join(map(repr, missing))} to leave channels out of; the dataset has {found}")
    changed = {}
    for name in variables:
        array = ds[name]
        mask = _fitted(channels, array)
        changed[name] = array.where(~mask, array.dtype.type(0))
    stale = [score for score, sources in SCORE_SOURCES.items() if score in ds and {*sources} & {*variables}]
    return ds.assign(changed).drop_vars(stale)


def modality_share(ds: xr.Dataset, *, layers: Labels = None, steps: Labels = None) -> xr.DataArray:
    """Which share of the image's attention goes to the image, to the prompt's real tokens and to padding.

    Args:
        ds: a trace with the probe `AttentionSinks`, numpy or dask.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        (stream, sample, [branch,] step, layer, head) with ``stream`` image, prompt, padding. They add up to 1, or to
        less where the model has tokens that are none of them. Prompt and padding are NaN where the prompt is not known
        as text.

    Raises:
        MapError: the variables, or a label, were not recorded.

    Example:
        >>> dims = ("sample", "step", "layer")
        >>> ds = xr.Dataset({
        ...     "received_x": ((*dims, "head", "image_token"), np.full((1, 1, 1, 2, 4), 0.125)),
        ...     "received_p": ((*dims, "head", "prompt_token"), np.full((1, 1, 1, 2, 2), 0.25)),
        ...     "padding": ((*dims, "prompt_token"), [[[[0.0, 1.0]]]]),
        ... })
        >>> modality_share(ds).mean(["sample", "step", "layer", "head"]).values.tolist()
        [0.5, 0.25, 0.25]
    """
    image, prompt, padding = _received(ds, layers, steps, "modality_share")
    shares = [
        image.sum("image_token", skipna=False),
        (prompt * (1 - padding)).sum("prompt_token", skipna=False),
        (prompt * padding).sum("prompt_token", skipna=False),
    ]
    streams = xr.DataArray(["image", "prompt", "padding"], dims="stream", name="stream")
    return xr.concat(shares, streams, coords="minimal", compat="override").rename("modality_share")


def sinks(ds: xr.Dataset, *, times: float = 10.0, layers: Labels = None, steps: Labels = None) -> xr.Dataset:
    """The tokens that receive many times their fair share of the image's attention, by layer.

    Received attention is the mean over heads and steps. A fair share is that of attention spread evenly over image and
    prompt, ``1 / (image tokens + prompt tokens)``. A word that matters to the picture is in the table too; a sink is
    what stays there from prompt to prompt, such as an end mark or padding.

    Args:
        ds: a trace with the probe `AttentionSinks`.
        times: how many fair shares a token must exceed.
        layers: layer labels; None: all that were recorded.
        steps: step labels; None: all that were recorded.

    Returns:
        One row a token and layer, the strongest first; ``to_dataframe()`` makes a table of this dataset over ``sink``.
        ``times`` (fair shares), ``stream`` (image or prompt), ``sample``, ``layer``, ``position`` in the stream;
        ``token`` (its string) and ``padding`` (1, 0, NaN: unknown) of the prompt's, ``patch_y`` and ``patch_x`` (and
        ``patch_frame``) of the image's, each NaN for the other.

    Raises:
        MapError: the variables, or a label, were not recorded.

    Example:
        >>> dims = ("sample", "step", "layer")
        >>> ds = xr.Dataset({
        ...     "received_x": ((*dims, "head", "image_token"), np.full((1, 1, 1, 1, 38), 0.01)),
        ...     "received_p": ((*dims, "head", "prompt_token"), [[[[[0.12, 0.5]]]]]),
        ...     "padding": ((*dims, "prompt_token"), [[[[0.0, 1.0]]]]),
        ... }, coords={"token": (("sample", "prompt_token"), [["fox", "<pad>"]])})
        >>> sinks(ds)[["layer", "token", "times"]].to_dataframe().values.tolist()
        [[0, '<pad>', 20.0]]
    """
    image, prompt, padding = _received(ds, layers, steps, "sinks")
    fair = 1 / (image.sizes["image_token"] + prompt.sizes["prompt_token"])
    image, prompt, padding = (_averaged(array) for array in (image, prompt, padding))
    found = [
        _above(image / fair, times, "image_token").assign(stream="image"),
        _above(prompt.assign_coords(padding=padding) / fair, times, "prompt_token").assign(stream="prompt"),
    ]
    table = xr.concat(found, "sink", data_vars="all")
    table = table[[name for name in _COLUMNS if name in table]]
    return table.isel(sink=np.argsort(-table.times.values, kind="stable"))


def _floating(array: xr.DataArray) -> xr.DataArray:
    """float32 for half precision, which cannot hold a sum over thousands of tokens; float64 stays."""
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _channel_dims(array: xr.DataArray) -> list[str]:
    return [dim for dim in _CHANNEL_DIMS if dim in array.dims]


def _fitted(channels: xr.DataArray, array: xr.DataArray) -> xr.DataArray:
    """A mask over channels with the labels of an array, by position where dims have none."""
    labelled = [dim for dim in channels.dims if dim in array.indexes and dim in channels.indexes]
    counted = {*channels.dims, *_channel_dims(array)} - {*labelled}
    if channels.dtype != bool or any(channels.sizes.get(dim) != array.sizes.get(dim) for dim in counted):
        raise MapError(
            f"channels must be bool over {', '.join(_channel_dims(array))} of {array.name!r} ({dict(array.sizes)}), "
            f"and any of its leading dims; found {channels.dtype} of {dict(channels.sizes)}. "
            f"massive_channels(ds, {str(array.name)!r}).massive fits"
        )
    nowhere: Any = False
    fitted = channels.reindex({dim: array[dim] for dim in labelled}, fill_value=nowhere)
    return fitted.drop_vars([name for name in fitted.coords if name not in labelled])


def _received(ds: xr.Dataset, layers: Labels, steps: Labels, purpose: str) -> tuple[xr.DataArray, ...]:
    picked = select(ds, (_RECEIVED,), layers, steps, purpose=purpose, fix="the probe AttentionSinks")
    image, prompt, padding = picked.arrays
    return image, prompt, padding.where(padding >= 0)  # -1: nobody knows which tokens are padding


def _averaged(array: xr.DataArray) -> xr.DataArray:
    return array.mean([dim for dim in ("step", "head") if dim in array.dims], skipna=False)


def _above(fair_shares: xr.DataArray, times: float, token: str) -> xr.Dataset:
    """A row for every value above `times`, with what the coordinates say of its place."""
    values = fair_shares.compute()
    values = values.assign_coords(
        {dim: np.arange(size) for dim, size in values.sizes.items() if dim not in values.coords}
    )
    places = dict(zip(values.dims, np.nonzero(values.values > times), strict=True))
    rows = values.isel({dim: ("sink", at) for dim, at in places.items()}).rename({token: "position"})
    return rows.to_dataset(name="times").reset_coords()
