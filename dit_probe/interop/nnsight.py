"""nnsight's traces with this package's names: `wrap` a pipeline, then read and write ``model.site("o_x", layer=3)``.

A site is the same tensor as a probe's of that name, in all rows of the call; writing one is what an `Edit` of
``branch="both"`` does. It is resolved to nnsight's own locations (a block's output, the attention call in ``.source``),
so that batching by invokes, ``tracer.iter``, sessions and remote execution stay as they are. As everywhere in nnsight,
values are asked for in the order in which the model makes them: blocks in order; in one block q, k and v, then o, then
the residual streams x and p.

`SiteModel` and `Site` go to a server by value and use nothing of this package there but plain data: none is needed on
the other side.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_probe.anatomy import Anatomy, Block, find, transformer_of
from dit_probe.anatomy.block import arguments_of
from dit_probe.anatomy.structural import Structural
from dit_probe.edit import ATTENTION_SITES, RESIDUAL_SITES
from dit_probe.errors import DitProbeError, ModelError, SiteError
from dit_probe.probe import Combination, Probe

try:
    import nnsight
    from nnsight.intervention.interleaver import Interleaver, Mediator
    from nnsight.modeling.diffusion import DiffusionModel, _PipelineModule
    from nnsight.modeling.tp import TPFragments
except ImportError as error:
    raise DitProbeError('this needs nnsight 0.8, which is an extra: pip install "dit-probe[nnsight]"') from error

SITES = (*ATTENTION_SITES, *RESIDUAL_SITES)
_ATTENTION = re.compile(r"(?:\w+_)?(dispatch_attention_fn|scaled_dot_product_attention)_\d+")
_ARGUMENTS = {"q": (0, "query"), "k": (1, "key"), "v": (2, "value")}

nnsight.register(__name__)
nnsight.register(SiteError.__module__)


def wrap(pipe: Any) -> SiteModel:
    """An nnsight model of a pipeline, in which the names of sites resolve.

    Args:
        pipe: a diffusers pipeline; or the repository or folder of one, whose weights are loaded when a trace first
            runs here, and never if all run remotely.

    Returns:
        nnsight's `DiffusionModel` with one method more, `SiteModel.site`.

    Raises:
        ModelError: not a pipeline, or one of no known family.

    Example:
        >>> from dit_probe.testing import tiny_pipeline
        >>> model = wrap(tiny_pipeline("flux"))
        >>> with model.trace("a sun in the sky", height=16, width=16):
        ...     o_x = model.site("o_x", layer=1).output.save()
        ...     model.site("v_p", layer=2).output[:] = 0
        >>> tuple(o_x.shape)
        (1, 16, 2, 16)
    """
    interleaver = _Interleaver(fragments=TPFragments())
    if isinstance(pipe, str):
        model = SiteModel(pipe, interleaver=interleaver)
    else:
        if transformer_of(pipe) is pipe:
            raise ModelError(f"wrap takes the pipeline; of a bare {type(pipe).__name__}, nnsight.NNsight makes a model")
        find(pipe)  # refuses a model before nnsight leaves its mark on the modules
        model = SiteModel(_PipelineModule(pipe), interleaver=interleaver)
        model.pipeline, model.repo_id = pipe, pipe.name_or_path
    transformer = model.transformer._module
    anatomy = find(transformer)
    if isinstance(anatomy, Structural):
        raise ModelError(
            f"{type(transformer).__name__} is of no known family, and what is guessed of it is settled by a trace of "
            "dit_probe's. In nnsight, use the paths of its modules"
        )
    interleaver.watch(anatomy, model.transformer)
    blocks = anatomy.blocks(transformer)
    names = {id(module): f"transformer.{name}" for name, module in transformer.named_modules()}
    model.site_modules = [(names[id(block.module)], names[id(block.attention)]) for block in blocks]
    model.joint_blocks = sum(block.kind == "joint" for block in blocks)
    model.returns_text_first = anatomy.returns_text_first
    model.text_first = None if "places" in _overridden(anatomy) else anatomy.text_first
    model.absent_sites = _absent(anatomy, blocks, type(transformer).__name__)
    return model


def _absent(anatomy: Anatomy, blocks: Sequence[Block], model: str) -> dict[tuple[str, int], str]:
    """Why a site does not exist, by name and layer."""
    # What these two make of a block's output and attention calls is code that only a trace of ours runs.
    special = {"outputs": RESIDUAL_SITES, "joint_call": ATTENTION_SITES}
    hidden = {name for method in _overridden(anatomy) for name in special.get(method, ())}
    found = {}
    for name in SITES:
        for block in blocks:
            try:
                Combination(Probe(record=[name], layers=[block.layer])).layers(blocks, model)
            except SiteError as error:
                found[name, block.layer] = str(error)
            else:
                if name in hidden:
                    found[name, block.layer] = (
                        f"{name!r} of {model} is put together from several values of the model's, and is no location "
                        "of nnsight's. Record or edit it with dit_probe.trace"
                    )
    return found


def _overridden(anatomy: Anatomy) -> set[str]:
    names = ("outputs", "joint_call", "places")
    return {name for name in names if getattr(type(anatomy), name) is not getattr(Anatomy, name)}


class SiteModel(DiffusionModel):
    """nnsight's model of a diffusers pipeline, with `site`; made by `wrap`."""

    site_modules: list[tuple[str, str]]
    joint_blocks: int
    text_first: bool | None
    returns_text_first: bool
    absent_sites: dict[tuple[str, int], str]

    def site(self, name: str, *, layer: int) -> Site:
        """An activation by this package's name, to be read and written in a trace.

        Args:
            name: ``q_x k_x v_x o_x q_p k_p v_p o_p x p``, as in `dit_probe.Edit`.
            layer: index among the blocks, joint ones first; a negative one counts from the last joint block.

        Raises:
            SiteError: no such site, layer, or site at this layer.
        """
        if name not in SITES:
            raise SiteError(f"no site is called {name!r}; those that exist: {', '.join(SITES)}")
        joint, count = self.joint_blocks, len(self.site_modules)
        if not -joint <= layer < count:
            single = f", single ones {joint}-{count - 1}" if count > joint else ""
            raise SiteError(f"no layer {layer}: joint layers are 0-{joint - 1}{single}")
        layer = layer if layer >= 0 else joint + layer
        if (name, layer) in self.absent_sites:
            raise SiteError(self.absent_sites[name, layer])
        return Site(self, name, *self.site_modules[layer])

    def _remoteable_class(self) -> type:
        return DiffusionModel


class Site:
    """One activation of one block; made by `SiteModel.site`.

    q, k, v and o are (row, token, head, head_dim), x and p (row, token, width). Rows are those of the transformer's
    call: under guidance that doubles the batch, one half after the other.
    """

    def __init__(self, model: SiteModel, name: str, block: str, attention: str) -> None:
        self._model, self._name = model, name
        self._letter, _, self._stream = name.rpartition("_")
        self._block, self._attention = model.get(block), model.get(attention)

    @property
    def output(self) -> Tensor:
        """The activation: a view of what the model works on, so that a change in place changes the model's.

        Assigning does too.

        Raises:
            SiteError: the block's attention is no one call over all tokens; or a value of another shape is assigned.
        """
        whole, at = self._read()
        return whole[:, at]

    @output.setter
    def output(self, value: Tensor) -> None:
        whole, at = self._read()
        expected = whole[:, at].shape
        if value.shape != expected:
            raise SiteError(f"{self._name} at {self._block.path} is {tuple(expected)}, assigned {tuple(value.shape)}")
        changed = whole.clone()
        changed[:, at] = value.to(whole)
        self._write(changed)

    def _read(self) -> tuple[Tensor, slice]:
        """The tensor (row, token, …) that holds the activation, and where in it."""
        Mediator.current(f"site({self._name!r}).output")  # nnsight's own error, where nothing is traced
        interleaver: Any = self._model.interleaver
        # A server's interleaver takes no notes: there the first site of a trace looks at what enters its block.
        measured = None if hasattr(interleaver, "places") else self._measured()
        if self._letter:
            call, heads_first = self._call()
            if self._letter == "o":
                whole = call.output
                whole = whole[0] if isinstance(whole, tuple) else whole
            else:
                (args, kwargs), (index, name) = call.inputs, _ARGUMENTS[self._letter]
                whole = args[index] if index < len(args) else kwargs[name]
            whole = whole.transpose(1, 2) if heads_first else whole
        else:
            whole = self._block.output
            if isinstance(whole, tuple):
                return whole[self._returned()], slice(None)
        places = measured or interleaver.places
        if places is None:
            raise SiteError(
                f"{self._block.path} ran outside of {self._model.transformer.path}; trace that, or the pipeline"
            )
        streams, total = places
        if whole.shape[1] != total:
            raise SiteError(
                f"{self._block.path}: {self._name} is part of {whole.shape[1]} tokens here, not of all {total}: this "
                "model attends row by row or in stretches. Read its residual streams, 'x' or 'p'"
            )
        return whole, streams[self._stream]

    def _write(self, whole: Tensor) -> None:
        if not self._letter:
            self._block.output = _with(self._block.output, self._returned(), whole)
            return
        call, heads_first = self._call()
        whole = whole.transpose(1, 2) if heads_first else whole
        if self._letter == "o":
            call.output = _with(call.output, 0, whole)
            return
        (args, kwargs), (index, name) = call.inputs, _ARGUMENTS[self._letter]
        call.inputs = (_with(args, index, whole), kwargs) if index < len(args) else (args, {**kwargs, name: whole})

    def _returned(self) -> int:
        """Which part of the block's output is the stream."""
        return int((self._stream == "x") == self._model.returns_text_first)

    def _call(self) -> tuple[Any, bool]:
        """The attention call in the source of the block's attention, and whether heads precede tokens in it."""
        source = self._attention.source
        processors = [name for name in source.names if re.fullmatch(r"self_processor_\d+", name)]
        if len(processors) == 1:
            source = getattr(source, processors[0]).source
        found = [(name, match[1]) for name in source.names if (match := _ATTENTION.fullmatch(name))]
        if len(found) != 1:
            raise SiteError(
                f"{self._attention.path}: {self._name} is read at the one call of attention in its source, which has "
                f"{len(found)}: {', '.join(source.names)}. Record or edit it with dit_probe.trace"
            )
        name, function = found[0]
        return getattr(source, name), function == "scaled_dot_product_attention"

    def _measured(self) -> tuple[dict[str, slice], int]:
        """Where image and prompt stand in the joint sequence, and its length, by the streams that enter the block."""
        known = vars(Mediator.current(self._name))
        if "dit_probe_places" not in known:
            args, kwargs = self._block.inputs
            given = {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs}
            x, p = (given.get(name) for name in ("hidden_states", "encoder_hidden_states"))
            if x is None or p is None or self._model.text_first is None:
                raise SiteError(
                    f"nothing that enters {self._block.path} tells a server where image and prompt stand. Read a site "
                    "of a joint block first; where there is none, trace the model here"
                )
            image, prompt = x.shape[1], p.shape[1]
            start = {"x": prompt, "p": 0} if self._model.text_first else {"x": 0, "p": image}
            streams = {name: slice(start[name], start[name] + size) for name, size in (("x", image), ("p", prompt))}
            known["dit_probe_places"] = streams, image + prompt
        return known["dit_probe_places"]


def _with(parts: Any, index: int, value: Tensor) -> Any:
    """A tuple with one part replaced; of a tensor, the value itself."""
    return (*parts[:index], value, *parts[index + 1 :]) if isinstance(parts, tuple) else value


class _Interleaver(Interleaver):
    """nnsight's interleaver, which notes at every call of the transformer where image and prompt stand."""

    places: tuple[dict[str, slice], int] | None = None
    _location = ""

    def watch(self, anatomy: Anatomy, transformer: Any) -> None:
        self._anatomy, self._transformer = anatomy, weakref.ref(transformer)
        self._location = f"{transformer.path}.input"

    def __enter__(self) -> Interleaver:
        self.places = None
        return super().__enter__()

    def handle(self, provider: str, value: Any) -> Any:
        value = super().handle(provider, value)
        if provider == self._location:
            envoy: Any = self._transformer()
            found = self._anatomy.places(envoy._module, arguments_of(envoy._module, *value))
            self.places = {"x": found.image, "p": found.prompt}, found.total
        return value
