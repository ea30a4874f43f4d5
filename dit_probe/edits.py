"""Ready-made edits: ablations, patching from another run, steering, blocked attention; and several side by side.

Each returns a `dit_probe.Edit` (where the words after ``**where`` are its layers, steps and branch). `tokens` are those
of the site's own stream, as indices or as a bool mask, of image tokens also (y, x) or (frame, y, x); None: all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dit_probe.edit import Edit, Point
from dit_probe.errors import EditError

Tokens = Sequence[int] | np.ndarray | Tensor | xr.DataArray | None
Heads = Sequence[int] | None


def zero(site: str, *, tokens: Tokens = None, heads: Heads = None, **where: Any) -> Edit:
    """Zero ablation: ``a[tokens, heads] = 0``.

    Args:
        site: of `Edit`, not "attends".
        tokens: which; None: all.
        heads: which, of q, k, v, o; None: all.
        **where: layers, steps, branch.

    Example:
        >>> zero("o_x", heads=[0], layers=[1]).layers
        [1]
    """
    return _replace(site, lambda a, point: torch.zeros_like(a), tokens, heads, where)


def mean(site: str, *, tokens: Tokens = None, heads: Heads = None, **where: Any) -> Edit:
    """Mean ablation: ``a[tokens] = mean over all tokens of the row``: what tokens have in common is left.

    Args:
        site: as for `zero`, as are the others.
        tokens: which.
        heads: which.
        **where: layers, steps, branch.
    """
    return _replace(site, lambda a, point: a.mean(1, keepdim=True).expand_as(a), tokens, heads, where)


def resample(site: str, *, tokens: Tokens = None, heads: Heads = None, seed: int = 0, **where: Any) -> Edit:
    """Resample ablation: every token gets the activation of another one, drawn at random among all of the row.

    Activations stay what the model is used to, in the wrong places. From another picture: `patch`.

    Args:
        site: as for `zero`, as are `tokens`, `heads` and `where`.
        tokens: which.
        heads: which.
        seed: of the draw, which is the same in all layers and steps.
        **where: layers, steps, branch.
    """

    def drawn(a: Tensor, point: Point) -> Tensor:
        order = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed))
        return a[:, order.to(a.device)]

    return _replace(site, drawn, tokens, heads, where)


def patch(
    ds: xr.Dataset, site: str, *, sample: int | None = None, tokens: Tokens = None, heads: Heads = None, **where: Any
) -> Edit:
    """Activation patching: ``a[tokens, heads] = those of another run``.

    Args:
        ds: a trace that recorded the site at these layers and steps, with the same grid and number of prompt tokens.
        site: a variable of it.
        sample: the sample that all rows get; None: row i gets sample i.
        tokens: which.
        heads: which.
        **where: layers, steps, branch.

    Raises:
        EditError: the trace does not have the site; when it is made, a layer or step that was not recorded, or sizes
            that differ.
    """
    if site not in ds:
        raise EditError(f"the trace has no {site!r}; it has {', '.join(map(str, ds.data_vars))}")
    source = ds[site]

    def recorded(a: Tensor, point: Point) -> Tensor:
        at: dict[str, Any] = {"step": point.step, "layer": point.layer}
        if "branch" in source.dims:
            at["branch"] = point.branch
        known = all(
            source.attrs.get(f"{dim}s") is None or at[dim] in source.attrs[f"{dim}s"] for dim in ("step", "layer")
        )
        if not known:
            raise EditError(f"{site} was not recorded at layer {point.layer}, step {point.step} of the trace")
        values = torch.from_numpy(np.ascontiguousarray(source.sel(at).values)).to(a)
        values = values[sample : sample + 1].expand_as(a) if sample is not None else values
        if values.shape != a.shape:
            raise EditError(f"{site} of the trace is {tuple(values.shape)}, here it is {tuple(a.shape)}")
        return values

    return _replace(site, recorded, tokens, heads, where)


def steer(direction: xr.DataArray | Tensor, site: str, strength: float, *, tokens: Tokens = None, **where: Any) -> Edit:
    """Add a direction: ``a[tokens] += strength |a| d / |d|``, with |a| the mean length of the row's tokens.

    In units of the activation's own length, so that one strength means the same in every layer.

    Args:
        direction: (head, head_dim) for q, k, v, o, (width,) for x, p; with a dim ``layer`` (and ``step``), one of
            each. `direction_of` makes it of a concept.
        site: of `Edit`.
        strength: negative ones push away.
        tokens: which.
        **where: layers, steps, branch.
    """

    def pushed(a: Tensor, point: Point) -> Tensor:
        d = direction
        if isinstance(d, xr.DataArray):
            at: dict[str, Any] = {dim: getattr(point, dim) for dim in ("layer", "step") if dim in d.dims}
            d = torch.from_numpy(np.ascontiguousarray(d.sel(at).values))
        if d.shape != a.shape[2:]:
            raise EditError(f"direction {tuple(d.shape)} for {site} {tuple(a.shape)}: give {tuple(a.shape[2:])}")
        d = d.to(a.device, torch.float32)
        length = a.float().flatten(2).norm(dim=-1).mean(1)
        return a + (strength * length.view(-1, *[1] * (a.ndim - 1)) * d / d.norm()).to(a.dtype)

    return _replace(site, pushed, tokens, None, where)


def direction_of(ds: xr.Dataset, concept: str, site: str = "o_c") -> xr.DataArray:
    """A concept's own direction, against the mean of the other concepts': (layer, *axes of the activation).

        d = mean over samples and steps of (a[concept] - mean over the other concepts of a)

    Args:
        ds: a trace with the site.
        concept: one of its concepts.
        site: of the concept stream: "o_c", "v_c", "c".

    Raises:
        EditError: no such site or concept, or no other concept.

    Example:
        >>> o = xr.DataArray([[[[[1.0, 0.0]], [[0.0, 2.0]]]]], dims=("step", "layer", "concept", "head", "head_dim"))
        >>> ds = xr.Dataset({"o_c": o.assign_coords(concept=["sun", "sky"])})
        >>> direction_of(ds, "sun").values.tolist()
        [[[1.0, -2.0]]]
    """
    if site not in ds or concept not in ds.concept.values or ds.sizes["concept"] < 2:
        raise EditError(
            f"a direction of {concept!r} needs {site!r} of it and of another concept; the trace has "
            f"{', '.join(map(str, ds.data_vars))} of {', '.join(map(str, ds.concept.values))}"
        )
    others = ds[site].sel(concept=ds.concept != concept).mean("concept")
    difference = ds[site].sel(concept=concept, drop=True) - others
    return difference.mean([dim for dim in ("sample", "branch", "step") if dim in difference.dims])


def block(
    query: Literal["image", "prompt"],
    key: Literal["image", "prompt"],
    *,
    query_tokens: Tokens = None,
    key_tokens: Tokens = None,
    **where: Any,
) -> Edit:
    """Cut edges of the joint attention: the softmax of these queries leaves these keys out.

    Args:
        query: who looks.
        key: where it may not look. A token always may look at itself.
        query_tokens: which of the query's tokens; None: all.
        key_tokens: which of the key's; None: all. ``block("image", "prompt", key_tokens=[3])`` hides the prompt's
            fourth token from the picture.
        **where: layers, steps, branch.

    Raises:
        EditError: a stream that does not exist.
    """
    for name in (query, key):
        if name not in ("image", "prompt"):
            raise EditError(f"{name!r} is no stream of the joint attention; give 'image' or 'prompt'")

    def cut(keep: Tensor, point: Point) -> Tensor:
        places = [getattr(point, name) for name in (query, key)]
        rows, columns = (
            torch.arange(place.start, place.stop)[_index(tokens, place.stop - place.start, name)]
            for place, tokens, name in zip(places, (query_tokens, key_tokens), (query, key), strict=True)
        )
        keep = keep.clone()
        keep[:, :, rows[:, None], columns] = False
        each = torch.arange(keep.shape[-1])
        keep[:, :, each, each] = True
        return keep

    return Edit("attends", cut, **where)


def by_row(edits: Sequence[Edit]) -> Edit:
    """Edits side by side: the first row of a batch gets the first, the second the second, and so on.

    Args:
        edits: one a row, of the same site, layers, steps and branch.

    Raises:
        EditError: they differ in where they are made; when it is made, another number of rows.

    Example:
        >>> by_row([zero("x", tokens=[0], layers=[1]), zero("x", tokens=[1], layers=[1])]).layers
        [1]
    """
    edits = list(edits)
    if not edits or any(replace(edit, function=edits[0].function) != edits[0] for edit in edits):
        raise EditError("edits by row need one edit a row, and all of the same site, layers, steps and branch")

    def function(a: Tensor, point: Point) -> Tensor:
        if len(a) != len(edits):
            raise EditError(f"{len(edits)} edits by row, but {point.site} has {len(a)} rows: give one for each sample")
        return torch.cat([edit.function(row, point) for edit, row in zip(edits, a.split(1), strict=True)])

    return replace(edits[0], function=function)


def _replace(
    site: str, made: Callable[[Tensor, Point], Tensor], tokens: Tokens, heads: Heads, where: dict[str, Any]
) -> Edit:
    """An edit that puts what is made in the place of some tokens and heads."""
    if heads is not None and "_" not in site:
        raise EditError(f"heads={list(heads)} at {site!r}: residual streams have no heads; edit q, k, v or o")
    if site == "attends":
        raise EditError("'attends' holds True and False, not activations: see edits.block")

    def function(a: Tensor, point: Point) -> Tensor:
        chosen = torch.zeros(a.shape[1], dtype=torch.bool)
        chosen[_index(tokens, a.shape[1], site)] = True
        mask = chosen.to(a.device).view(1, -1, *[1] * (a.ndim - 2))
        if heads is not None:
            of = torch.zeros(a.shape[2], dtype=torch.bool)
            of[_index(heads, a.shape[2], "head")] = True
            mask = mask & of.to(a.device)[:, None]
        return torch.where(mask, made(a, point), a)

    return Edit(site, function, **where)


def _index(chosen: Any, count: int, what: str) -> Tensor:
    """Indices or a bool mask as indices.

    Raises:
        EditError: a mask of another size, or an index that does not exist.
    """
    if chosen is None:
        return torch.arange(count)
    values = torch.as_tensor(np.asarray(chosen)).flatten()
    if values.dtype == torch.bool:
        if len(values) != count:
            raise EditError(f"a mask of {len(values)} tokens for {count} of {what}")
        return values.nonzero().flatten()
    if len(values) and not (-count <= int(values.min()) and int(values.max()) < count):
        raise EditError(f"tokens {values.tolist()} of {what}, which has 0-{count - 1}")
    return values.long() % count
