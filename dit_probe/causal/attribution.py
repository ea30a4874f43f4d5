"""What a number that the model computes depends on: its derivative by any activation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils import checkpoint as recompute

from dit_probe.anatomy import Block, find, transformer_of
from dit_probe.edit import Edit, Point
from dit_probe.errors import MetricError
from dit_probe.probe import Combination, Probe
from dit_probe.tracing import trace


def gradients(
    model: Any,
    metric: Callable[[], Tensor],
    sites: Sequence[str] = ("o_x",),
    *,
    layers: Sequence[int] | str | None = None,
    checkpoint: bool = False,
) -> xr.Dataset:
    """How a number changes with each activation that it was computed from, and gradient times activation.

        gradient = d metric / d a
        attribution = sum over head_dim (width, of x and p) of a * gradient

    The attribution is, to first order, what the metric owes to a token (and head): its value less that with the
    activation zeroed. Rows of a batch do not see each other, so a metric that is a sum over them gives each its own.

    Args:
        model: the pipeline, if the metric takes real images through it (`denoising`), or the bare transformer.
        metric: runs the transformer, and returns one number that depends on what it predicts.
        sites: of `dit_probe.Edit`, not "attends".
        layers: as a probe's: None or "joint", "single", "all", or indices.
        checkpoint: keep no block's intermediate results, and compute each block again on the way back: the same
            numbers at the price of another forward, where the graph of all blocks is more than the memory holds.

    Returns:
        The trace of the run, with ``gradient_<site>``, of the activation's dims, in units of the metric per unit of the
        activation; ``attribution_<site>``, without the last dim, in units of the metric; and the ``metric``. Several
        runs of the transformer are several samples.

    Raises:
        MetricError: the metric is not one number, depends on none of these activations, or runs without gradients.
        SiteError, EditError: a site or layer that does not exist, or cannot be edited.

    Example:
        >>> from dit_probe.testing import tiny_model
        >>> tiny = tiny_model("flux", batch=1)
        >>> predict = lambda: tiny.transformer(**tiny.inputs).sample
        >>> found = gradients(tiny.transformer, lambda: predict().square().mean(), layers=[0, 2])
        >>> dict(found.attribution_o_x.sizes)
        {'sample': 1, 'step': 1, 'layer': 2, 'image_token': 12, 'head': 2}
    """
    transformer = transformer_of(model)
    blocks = find(model).blocks(transformer)
    probe = Probe(record=sites, layers=layers)
    places = Combination(probe).layers(blocks, type(transformer).__name__)
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def keep(a: Tensor, point: Point) -> Tensor:
        if not a.requires_grad:
            raise MetricError(
                "the metric runs the transformer without gradients, as pipelines do (torch.no_grad). Call the "
                "transformer itself, or take real images through it with causal.denoising"
            )
        seen.setdefault((point.site, point.layer), []).append(a)
        return a

    edits = [Edit(site, keep, layers=chosen) for site, chosen in places.items()]
    first = min(layer for chosen in places.values() for layer in chosen)
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(_by_activations(transformer, blocks[first].module))
        if checkpoint:
            undo.enter_context(_recomputed(blocks))
        run = undo.enter_context(trace(model, probe, edits=edits, progress=False))
        value = metric()
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(f"the metric returned {found}; give one number, a tensor, such as the mean of a loss")
        if not value.requires_grad:
            raise MetricError("the metric depends on no activation of the transformer: nothing to differentiate")
        activations = [a for runs in seen.values() for a in runs]
        # Not backward(), which would leave .grad on whatever else requires it; zero where nothing depends on it.
        slopes = iter(torch.autograd.grad(value, activations, allow_unused=True, materialize_grads=True))
    ds = run.dataset.load()
    for site in places:
        ds[f"gradient_{site}"] = xr.full_like(ds[site], np.nan, np.promote_types(ds[site].dtype, np.float32))
    for (site, layer), runs in seen.items():
        slope = torch.cat([next(slopes) for _ in runs])
        ds[f"gradient_{site}"].loc[{"layer": layer}] = slope[:, None].double().cpu().numpy()
    for site in places:
        product = ds[site] * ds[f"gradient_{site}"]
        ds[f"attribution_{site}"] = product.sum([product.dims[-1]], skipna=False)
    return ds.assign(metric=value.item())


@contextlib.contextmanager
def _by_activations(model: nn.Module, first: nn.Module) -> Iterator[None]:
    """Differentiate by what enters a block and all that follows from it, and by no parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = first.register_forward_pre_hook(_anchored, with_kwargs=True)
    try:
        model.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _anchored(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a block as the beginning of a graph; a copy, since some blocks write into what they are given."""

    def anchor(value: Any) -> Any:
        known = not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad
        return value if known or not torch.is_grad_enabled() else value.detach().requires_grad_().clone()

    return tuple(map(anchor, args)), {name: anchor(value) for name, value in kwargs.items()}


@contextlib.contextmanager
def _recomputed(blocks: Sequence[Block]) -> Iterator[None]:
    """Blocks that keep their input alone and are run again on the way back, without the edits: they change nothing."""
    with contextlib.ExitStack() as undo:
        for module in {id(block.module): block.module for block in blocks}.values():
            own = vars(module).get("forward")
            undo.callback(setattr, module, "forward", own) if own else undo.callback(delattr, module, "forward")
            module.forward = functools.partial(recompute.checkpoint, module.forward, use_reentrant=False)
        yield
