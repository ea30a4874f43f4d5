"""`verify`: the oracles on the user's own weights, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_probe import stream, testing
from dit_probe.anatomy import Anatomy, find, transformer_of
from dit_probe.anatomy.block import arguments_of
from dit_probe.anatomy.structural import Structural
from dit_probe.errors import ModelError
from dit_probe.probe import Probe
from dit_probe.rehearsal import settle
from dit_probe.tabular import Table, Tabular
from dit_probe.tracing import trace

CHECKS = {
    "replay_o": "self-replay of o_p",
    "replay_p": "self-replay of p",
    "clamped_o": "o_c against the model itself run on the concepts",
    "clamped_c": "c against the model itself run on the concepts",
    "equation": "eq. (4) in float64 on the recorded q, k and v",
}
"""What is compared in every layer. Each figure is the largest difference relative to the largest value."""

_SIDE, _FRAMES = 256, 9


@dataclass(frozen=True)
class Layer:
    """Differences in one layer, by the names of `CHECKS`; one that the layer does not have is missing."""

    layer: int
    kind: str
    path: str
    differences: Mapping[str, float]


@dataclass(frozen=True)
class Verification(Tabular):
    """What `verify` found; printing it shows the table.

    Attributes:
        family: the anatomy that was checked.
        model: class of the transformer.
        dtype: precision of its weights.
        limit: what a difference may be, relative to the stream's largest value.
        output_equal: whether the transformer's output is the same, bit for bit, with and without tracing.
        layers: one per block.
    """

    family: str
    model: str
    dtype: str
    limit: float
    output_equal: bool
    layers: tuple[Layer, ...] = field(repr=False)

    @property
    def failures(self) -> list[str]:
        """What is wrong, in words; empty when nothing is."""
        found = [] if self.output_equal else ["the output differs when it is traced"]
        for layer in self.layers:
            # Written so that NaN fails.
            wrong = [name for name, value in layer.differences.items() if not value <= self.limit]
            found += [f"{layer.path}: {CHECKS[name]} differs by {layer.differences[name]:.2g}" for name in wrong]
        return found

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return not self.failures

    @property
    def maxima(self) -> dict[str, float]:
        """The largest difference of every check over all layers."""
        found: dict[str, float] = {}
        for layer in self.layers:
            for name, value in layer.differences.items():
                found[name] = float(np.maximum(value, found.get(name, 0.0)))
        return {name: found[name] for name in CHECKS if name in found}

    def _table(self) -> Table:
        rows = [["layer", "kind", "path", *CHECKS, ""]]
        for layer in self.layers:
            cells = [f"{layer.differences[name]:.1e}" if name in layer.differences else "-" for name in CHECKS]
            good = all(value <= self.limit for value in layer.differences.values())
            rows.append([str(layer.layer), layer.kind, layer.path, *cells, "ok" if good else "WRONG"])
        verdict = "every check holds" if self.ok else f"{len(self.failures)} checks fail"
        return Table(
            rows,
            above=f"{self.model} as {self.family}, {self.dtype}, at most {self.limit:.1e} of the largest value",
            below=(f"output {'untouched' if self.output_equal else 'CHANGED'} by tracing; {verdict}",),
        )


@torch.no_grad()
def verify(
    model: Any,
    *,
    inputs: Mapping[str, Any] | None = None,
    concepts: Tensor | None = None,
    tolerance: float | None = None,
    prompt: str = "a red boat on the water",
    **call: Any,
) -> Verification:
    """Check on the model's own weights that what is traced is what the model computes.

    In every layer: the concept code on the prompt's own tokens gives the model's ``o_p`` and ``p`` (self-replay); the
    concept stream on other tokens gives what the model itself makes of them as its prompt, with the image stream put
    back (clamped); ``o_c`` is eq. (4) of the recorded q, k and v. And the output is the same with and without tracing.

    Args:
        model: a pipeline, of whose call the first transformer forward is checked; or a transformer, with `inputs`.
        inputs: arguments of one forward of a bare transformer.
        concepts: embeddings to check with (concept, text width); by default the prompt's first tokens.
        tolerance: largest difference that passes, relative to the stream's largest value; by default what the
            precision of the weights explains. Quantised weights may need more (see the page on limits).
        prompt: what the pipeline is asked for.
        **call: further arguments of the pipeline's call. Sizes default to 256 pixels and 9 frames: differences do not
            depend on them, time and memory do.

    Returns:
        The figures by layer; `Verification.ok` sums them up and printing it shows a table.

    Raises:
        ModelError: an unknown family, or no inputs for a bare transformer.

    Example:
        >>> import dit_probe as dp
        >>> from dit_probe.testing import tiny_model
        >>> tiny = tiny_model("flux")
        >>> found = dp.verify(tiny.transformer, inputs=tiny.inputs)
        >>> found.ok, len(found.layers)
        (True, 5)
    """
    anatomy = find(model)
    transformer: Any = transformer_of(model)
    if inputs is None:
        if transformer is model:
            raise ModelError("verify needs the pipeline, or the inputs of one forward: verify(transformer, inputs={…})")
        inputs = _first_forward(model, prompt, call)
    if isinstance(anatomy, Structural):
        anatomy = anatomy if anatomy.settled else settle(anatomy, transformer, inputs)
        if not anatomy.fast:
            raise ModelError(
                f"{type(transformer).__name__} is of no known family, and concepts are found by running the model "
                "itself on them: there is no concept code of ours to verify"
            )
    if concepts is None:
        prompt_embeddings = anatomy.prompt_embeddings(inputs)
        concepts = prompt_embeddings[:, : anatomy.clamped_concepts(transformer)]
    else:
        concepts = concepts.expand(anatomy.rows(inputs), -1, -1)
    dtype = transformer.dtype
    has_concepts = not anatomy.no_concepts
    before = _tensors(transformer(**inputs))
    replayed, calls = _replay(anatomy, transformer, inputs, concepts.shape[1] if has_concepts else 0)
    after, ds = _traced(transformer, inputs, concepts if has_concepts else None)
    compared = _of_concepts(transformer, inputs, concepts, calls, ds) if has_concepts else {}
    layers = [
        Layer(block.layer, block.kind, block.path, replayed[block.layer] | compared.get(block.layer, {}))
        for block in anatomy.blocks(transformer)
    ]
    return Verification(
        anatomy.family,
        type(transformer).__name__,
        str(dtype).removeprefix("torch."),
        stream.tolerance(dtype, transformer) if tolerance is None else tolerance,
        all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
        tuple(layers),
    )


class _Caught(Exception):
    """The transformer's arguments are known; the pipeline need not go on."""


def _first_forward(pipe: Any, prompt: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the first transformer call that a pipeline makes."""
    takes = inspect.signature(type(pipe).__call__).parameters
    own = getattr(pipe, "default_sample_size", None)
    # Positions of a table, as SD3's, end where the model's own pictures do.
    side = min(_SIDE, own * pipe.vae_scale_factor) if isinstance(own, int) else _SIDE
    sizes = {"height": side, "width": side, "num_frames": _FRAMES, "num_inference_steps": 2}
    arguments = {name: value for name, value in sizes.items() if name in takes} | {"prompt": prompt} | dict(call)
    found: dict[str, Any] = {}

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of(module, args, kwargs)
        if find(module).aside(arguments):
            return
        found.update(arguments)
        raise _Caught

    handle = transformer_of(pipe).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        pipe(**arguments)
    except _Caught:
        return found
    finally:
        handle.remove()
    raise ModelError(f"{type(pipe).__name__} made no call of its transformer; there is nothing to verify")


def _replay(
    anatomy: Anatomy, transformer: Any, inputs: Mapping[str, Any], concepts: int
) -> tuple[dict[int, dict[str, float]], dict[int, tuple[np.ndarray | None, float]]]:
    """Self-replay by layer; and what masks concepts, if there are any, in each, with the scale of its logits."""
    differences: dict[int, dict[str, float]] = {}
    calls: dict[int, tuple[np.ndarray | None, float]] = {}

    def see(call: stream.BlockCall, output: Any) -> None:
        after = anatomy.outputs(call.block, output, call.places)[1]
        found = stream.replay_differences(call, stream.replay(anatomy, call), after)
        differences[call.block.layer] = {f"replay_{name[0]}": value for name, value in found.items()}
        mask = stream.concept_mask(call, slice(0, len(call.x)), concepts, "both") if concepts else None
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask.cpu(), -torch.inf)
        calls[call.block.layer] = None if mask is None else mask.double().cpu().numpy(), call.attention.scale

    with testing.watched(transformer, see):
        transformer(**inputs)
    return differences, calls


def _of_concepts(
    transformer: Any,
    inputs: Mapping[str, Any],
    concepts: Tensor,
    calls: Mapping[int, tuple[np.ndarray | None, float]],
    ds: Any,
) -> dict[int, dict[str, float]]:
    """The concept stream by layer, against the model itself and against eq. (4)."""
    streams = {
        int(layer): torch.as_tensor(ds.c.sel(layer=layer).isel(step=0).values).to(concepts) for layer in ds.layer.values
    }
    differences: dict[int, dict[str, float]] = {}
    for layer, values in testing.clamped(transformer, inputs, concepts, c=streams).items():
        at = ds.sel(layer=layer).isel(step=0)
        found = differences[layer] = {
            f"clamped_{name[0]}": _difference(at[name].values, value.double().cpu().numpy())
            for name, value in values.items()
        }
        bias, scale = calls[layer]
        k, v = (np.concatenate([at[f"{letter}_c"], at[f"{letter}_x"]], axis=1) for letter in "kv")
        found["equation"] = _difference(at.o_c.values, testing.attention_from_store(at.q_c, k, v, bias, scale))
    return differences


def _traced(transformer: Any, inputs: Mapping[str, Any], concepts: Tensor | None) -> tuple[list[Tensor], Any]:
    names = [] if concepts is None else [f"concept {index}" for index in range(concepts.shape[1])]
    record = ("o_x", "o_p") if concepts is None else ("o_c", "q_c", "k_c", "v_c", "k_x", "v_x", "c")
    probe = Probe(names, record=record, layers="all", through="all")
    with trace(transformer, probe, concepts=concepts, verify=None, progress=False) as run:
        output = transformer(**inputs)
    return _tensors(output), run.dataset.load()


def _tensors(output: Any) -> list[Tensor]:
    first = output[0]
    return list(first) if isinstance(first, (list, tuple)) else [first]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
