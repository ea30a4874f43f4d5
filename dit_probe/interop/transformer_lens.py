"""TransformerLens' habits on MMDiTs: an `ActivationCache` of a trace, hook points, and the T5 encoder in a bridge.

Names are TransformerLens' own; as its encoder-decoders have ``encoder_blocks`` beside ``blocks``, the prompt's and the
concepts' streams have blocks of their own:

| here | TransformerLens | shape |
|---|---|---|
| ``q_x k_x v_x`` | ``blocks.L.attn.hook_q``, ``hook_k``, ``hook_v`` | (batch, pos, head_index, d_head) |
| ``o_x`` | ``blocks.L.attn.hook_z`` | (batch, pos, head_index, d_head) |
| ``x`` | ``blocks.L.hook_resid_post`` | (batch, pos, d_model) |
| ``q_p`` … ``p`` | ``prompt_blocks.L.attn.hook_q`` … ``prompt_blocks.L.hook_resid_post`` | as above |
| ``q_c`` … ``c`` | ``concept_blocks.L.attn.hook_q`` … ``concept_blocks.L.hook_resid_post`` | as above |
| ``q_x_unrotated`` … | ``blocks.L.attn.hook_q_unrotated`` … | as above |

``q`` and ``k`` are what the attention operation consumed, as everywhere in this package. In a model with rotary
embedding that is TransformerLens' ``hook_rot_q``, and its ``hook_q`` is ``hook_q_unrotated`` here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xarray as xr
import zarr
from torch import Tensor, nn

from dit_probe import schema, store
from dit_probe.anatomy import find, transformer_of
from dit_probe.anatomy.block import arguments_of
from dit_probe.edit import ATTENTION_SITES, RESIDUAL_SITES, Edit, Point
from dit_probe.errors import DitProbeError, ModelError, SiteError, StoreError
from dit_probe.store import location
from dit_probe.store.creation import new_array
from dit_probe.tracing import trace
from dit_probe.transfer import host

try:
    from transformer_lens import ActivationCache
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedRootModule import HookedRootModule
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import build_bridge_from_module
except ImportError as error:
    raise DitProbeError(
        'this needs TransformerLens 4, which is an extra: pip install "dit-probe[transformer-lens]"'
    ) from error

_BLOCKS = {"x": "blocks", "p": "prompt_blocks", "c": "concept_blocks"}
_ENCODER_DIMS = ("encoder_layer", "prompt_token", "encoder_width")


def hook_name(site: str, layer: int) -> str:
    """The TransformerLens name of an activation.

    Raises:
        SiteError: no activation is called so.

    Example:
        >>> hook_name("o_x", 3), hook_name("p", 0)
        ('blocks.3.attn.hook_z', 'prompt_blocks.0.hook_resid_post')
    """
    block = f"{_BLOCKS[schema.stream(site)]}.{layer}"
    if site in schema.RESIDUALS:
        return f"{block}.hook_resid_post"
    letter = "z" if site[0] == "o" else site[0]
    return f"{block}.attn.hook_{letter}{'_unrotated' * site.endswith('_unrotated')}"


def cache(source: Any, *, step: int | None = None, branch: str = "cond") -> ActivationCache:
    """A trace at one step as TransformerLens' `ActivationCache`, its batch the samples.

    Shorthand (``cache["z", 3]``), `stack_activation`, `to`, `remove_batch_dim` and `apply_slice_to_batch_dim` work;
    what needs an unembedding or the weights of a language model does not.

    Args:
        source: a run of `dit_probe.trace`, its dataset, or where its store is.
        step: label of the step; needed where there are several.
        branch: which, where the trace has both.

    Raises:
        SiteError: no step is named and there are several, or the step or branch was not recorded.

    Example:
        >>> import dit_probe as dp
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> with dp.trace(pipe, dp.Probe(record=["o_x", "x"]), progress=False) as run:
        ...     image = pipe("a sun", height=16, width=16, num_inference_steps=1).images[0]
        >>> tuple(cache(run).stack_activation("z").shape)
        (3, 1, 16, 2, 16)
    """
    ds = store.open(source) if isinstance(source, str | os.PathLike) else getattr(source, "dataset", source)
    steps = ds.step.values.tolist()
    if step is None and len(steps) == 1:
        step = steps[0]
    if step not in steps:
        raise SiteError(f"step={step}: a cache is of one step, and the trace has {schema.ranges(steps)}")
    at: dict[str, Any] = {"step": step}
    if "branch" in ds.dims:
        if branch not in ds.branch.values:
            raise SiteError(f"branch={branch!r}; the trace has {', '.join(ds.branch.values)}")
        at["branch"] = branch
    found: dict[str, Tensor] = {}
    for name in schema.ACTIVATIONS:
        if name in ds and step in ds[name].attrs.get("steps", steps):
            for layer in ds[name].attrs.get("layers", ds.layer.values.tolist()):
                values = ds[name].sel(at | {"layer": layer}).transpose("sample", ...).values
                found[hook_name(name, layer)] = torch.from_numpy(np.ascontiguousarray(values))
    return ActivationCache(found, SimpleNamespace(cfg=SimpleNamespace(n_layers=int(ds.layer.max()) + 1)))


class HookedMMDiT(HookedRootModule):
    """A pipeline or transformer with TransformerLens' hook points at the sites of `dit_probe.Edit`.

    A hook that returns a tensor is an edit, and one that returns None leaves the output as it is, bit for bit. Weights
    stay where they are: the model is no part of this module. ``hook.ctx["point"]`` is the `dit_probe.edit.Point`.

    Args:
        model: a pipeline, which `forward` then calls as usual; or a bare transformer, of which every forward is a step.

    Raises:
        ModelError: as for `dit_probe.trace`.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> model = HookedMMDiT(tiny_pipeline("sd3"))
        >>> call = dict(height=16, width=16, num_inference_steps=2, output_type="latent")
        >>> _, cache = model.run_with_cache("a sun", **call, names_filter="prompt_blocks.1.attn.hook_v")
        >>> tuple(cache["prompt_blocks.1.attn.hook_v"].shape)
        (1, 333, 2, 16)
        >>> latent = model.run_with_hooks("a sun", **call, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)])
    """

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        anatomy, transformer = find(model), transformer_of(model)
        # Not by setattr, which would make a bare transformer a part of this module.
        self.__dict__["model"] = model
        blocks = anatomy.blocks(transformer)
        heads, head_dim = anatomy.heads(transformer)
        self.cfg = SimpleNamespace(n_layers=len(blocks), n_heads=heads, d_head=head_dim, d_model=heads * head_dim)
        self._sites: dict[str, tuple[str, int]] = {}
        for block in blocks:
            for site in (*ATTENTION_SITES, *RESIDUAL_SITES):
                if site != "p" or block.text_output:
                    self._sites[hook_name(site, block.layer)] = site, block.layer
        for name in self._sites:
            _place(self, name.split("."), HookPoint())
        self.setup()

    def forward(self, *args: Any, steps: Sequence[int] | None = None, branch: str = "cond", **kwargs: Any) -> Any:
        """Call the model with the hooks that are set.

        Args:
            *args: of the model.
            steps: in which hooks are called; None: in every one. A cache keeps the last of them.
            branch: whose rows hooks see: "cond", "uncond" or, one after the other, "both".
            **kwargs: of the model.
        """
        edits = [
            Edit(self._sites[name][0], partial(_call, point), (self._sites[name][1],), steps, branch)
            for name, point in self.hook_dict.items()
            if point.has_hooks()
        ]
        if not edits:
            return self.model(*args, **kwargs)
        with trace(self.model, edits=edits, progress=False):
            return self.model(*args, **kwargs)

    def run_with_cache(  # type: ignore[override]
        self, *args: Any, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        """TransformerLens' own, with an `ActivationCache`; `forward` says which step and branch it holds."""
        output, found = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        return output, ActivationCache(found, self, has_batch_dim=not remove_batch_dim)

    def _enable_hook_with_name(self, name: str, hook: Any, dir: Any) -> None:
        if name not in self.hook_dict:
            raise SiteError(f"no hook point is called {name!r}; those that exist: {', '.join(self.hook_dict)}")
        super()._enable_hook_with_name(name, hook, dir)


def _place(root: nn.Module, path: Sequence[str], point: HookPoint) -> None:
    """Add a hook point below a module, with the modules on the way to it."""
    for part in path[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.add_module(path[-1], point)


def _call(hook_point: HookPoint, activation: Tensor, at: Point) -> Tensor:
    hook_point.ctx["point"] = at
    # A copy, for what a hook keeps must not change when the model goes on.
    return hook_point(activation.clone())


def text_encoder(pipe: Any) -> TransformerBridge:
    """The pipeline's T5 encoder as a `TransformerBridge`: its weights are the pipeline's own, its modules a copy.

    It takes token ids, not text: a bridge has its own idea of special tokens, the pipeline's tokenizer decides. Names
    are those of TransformerLens' T5 (``encoder_blocks.L.hook_resid_post`` …), without a decoder.

    Raises:
        ModelError: the text encoder is no T5.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> bridge = text_encoder(tiny_pipeline("flux"))
        >>> _, cache = bridge.run_with_cache(torch.tensor([[5, 6, 1]]), return_type=None)
        >>> tuple(cache["encoder_blocks.0.hook_resid_post"].shape)
        (1, 3, 64)
    """
    from transformers import T5EncoderModel

    name = find(pipe).encoder[1]
    encoder: Any = getattr(pipe, name, None)
    if not isinstance(encoder, T5EncoderModel):
        raise ModelError(
            f"{name} of {type(pipe).__name__} is {type(encoder).__name__}; only a T5EncoderModel is bridged. Other "
            "language models: transformer_lens.TransformerBridge.boot_transformers"
        )
    # The bridge puts its modules in the place of the model's.
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    return build_bridge_from_module(
        copy.deepcopy(encoder, shared),
        "T5ForConditionalGeneration",
        hf_config=encoder.config,
        model_name=name,
        post_adapter_hook=_without_decoder,
    )


def _without_decoder(adapter: Any) -> None:
    parts = adapter.component_mapping
    for name in [name for name in parts if name.startswith("decoder") or name == "unembed"]:
        del parts[name]


@torch.no_grad()
def record_text_encoder(pipe: Any, source: Any) -> xr.Dataset:
    """Record the residual stream of the T5 encoder, beside the prompt stream that is made of it.

    The variable ``text_encoder`` (sample, encoder_layer, prompt_token, encoder_width): what enters every block of the
    encoder, and last what leaves its final norm, which is what the transformer is given (the ``hidden_states`` of
    transformers). Prompt tokens that are another encoder's, as CLIP's in Stable Diffusion 3, are NaN.

    Args:
        pipe: the pipeline that the trace is of.
        source: a run or dataset, to which the variable is added in memory; or where a store is, in which it is
            written, or written anew after samples were appended.

    Returns:
        The dataset with the variable.

    Raises:
        ModelError: the text encoder is no T5, or the pipeline does not call it once for a prompt.
        SiteError: a sample's prompt stream is not made of its prompt alone.
        StoreError: as `dit_probe.open`, or a value is not finite.

    Example:
        >>> import dit_probe as dp
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("sd3")
        >>> with dp.trace(pipe, dp.Probe(record=["p"]), store="run.zarr", progress=False) as run:
        ...     image = pipe("a sun", height=16, width=16, num_inference_steps=1, max_sequence_length=8).images[0]
        >>> dict(record_text_encoder(pipe, "run.zarr").text_encoder.sizes)
        {'sample': 1, 'encoder_layer': 2, 'prompt_token': 85, 'encoder_width': 64}
    """
    bridge = text_encoder(pipe)
    if isinstance(source, xr.Dataset) or hasattr(source, "dataset"):
        ds = getattr(source, "dataset", source)
        rows = [_residuals(pipe, bridge, ds, sample).float().cpu().numpy() for sample in range(ds.sizes["sample"])]
        return ds.assign(text_encoder=(("sample", *_ENCODER_DIMS), np.stack(rows)))
    place, _ = location.require(source)
    group, ds = zarr.open_group(place, mode="r+", use_consolidated=False), store.open(place)
    array: Any = group.get("text_encoder")
    for sample in range(ds.sizes["sample"]):
        row = _residuals(pipe, bridge, ds, sample)
        if array is None:
            kind = schema.Variable("text_encoder", _ENCODER_DIMS, str(row.dtype).removeprefix("torch."))
            layout = schema.Layout((kind,), dict(zip(_ENCODER_DIMS, row.shape, strict=True)), {})
            array = new_array(group, layout, kind, ds.sizes["sample"])
        values, _ = host(row)
        array[sample] = values()
    location.commit(place)
    return store.open(place)


def _residuals(pipe: Any, bridge: TransformerBridge, ds: xr.Dataset, sample: int) -> Tensor:
    """The residual stream of one sample's prompt, (encoder_layer, prompt_token, encoder_width)."""
    anatomy, length, prompt = find(pipe), ds.sizes["prompt_token"], str(ds.prompt.values[sample])
    if anatomy.tokens(pipe, prompt, length)[0] != ds.token.values[sample].tolist():
        raise SiteError(
            f"sample {sample}: the tokens of the prompt stream are not those of {prompt!r}; it was made of embeddings, "
            "or of a text of its own for another encoder (prompt_2, prompt_3)"
        )
    start = anatomy.planned_prompt_tokens(pipe, 0)
    call = _encoder_call(pipe, prompt, length - start)
    mask = call.get("attention_mask")
    _, seen = bridge.run_with_cache(call["input_ids"], attention_mask=mask, return_type=None)
    layers = [seen[f"encoder_blocks.{layer}.hook_resid_pre"] for layer in range(bridge.cfg.n_layers)]
    found = torch.cat([*layers, seen["encoder_ln_final.hook_out"]])
    if not found.isfinite().all():
        raise StoreError(
            f"sample {sample}: the text encoder's residual stream is not finite (overflow in {found.dtype}?)"
        )
    row = found.new_full((len(found), length, found.shape[-1]), torch.nan)
    row[:, start:] = found
    return row


def _encoder_call(pipe: Any, prompt: str, limit: int) -> Mapping[str, Any]:
    """Arguments with which the pipeline calls its encoder on a prompt."""
    anatomy = find(pipe)
    encoder, calls = getattr(pipe, anatomy.encoder[1]), []
    handle = encoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(arguments_of(module, args, kwargs)), with_kwargs=True
    )
    try:
        anatomy.encode_text(pipe, [prompt], limit)
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ModelError(f"{type(pipe).__name__} called {anatomy.encoder[1]} {len(calls)} times for a prompt, not once")
    return calls[0]
