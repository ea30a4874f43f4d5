"""What to record: a `Probe` is a declaration, several of them combine with ``|``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dit_probe import schema
from dit_probe.errors import ProbeError, SiteError
from dit_probe.tabular import Table

if TYPE_CHECKING:
    from torch import Tensor

    from dit_probe.anatomy import Block
    from dit_probe.planning import Plan

_CHOICES = {
    "attends": ("both", "image", "concepts", "none"),
    "embed": ("first_token", "mean_tokens", "in_prompt"),
    "pooled": ("prompt", "zero", "concepts"),
    "through": ("joint", "all"),
}
_KINDS = ("joint", "single", "all")


@dataclass(frozen=True)
class Observation:
    """Where in the model `Probe.observe` was called.

    Attributes:
        layer, kind, step, branch: labels.
        scale: factor on the attention logits.
        prompt_pads: (row, prompt_token) bool, True on padding; None when the prompt is not known as text.
        heads: number of attention heads.
        image, prompt: where their tokens stand in the joint sequence.
        weights: of one head, the joint attention as the model computed it, masks and all, (row, query, key).
    """

    layer: int
    kind: str
    step: int
    branch: str
    scale: float
    prompt_pads: Tensor | None
    heads: int
    image: slice
    prompt: slice
    weights: Callable[[int], Tensor]


@dataclass(frozen=True)
class Probe:
    """A declaration of what to record.

    Attributes:
        concepts: words carried through the blocks as a concept stream.
        record: activation names to keep (`dit_probe.schema.ACTIVATIONS`).
        scores: spaces to reduce to scores while the model runs: "output", "value", "cross".
        layers: None or "joint": every joint block; "single"; "all"; or layer indices, negative ones counted
            from the last joint block.
        steps: step indices, or None for every step.
        attends: what concepts attend to (Table 5): "both", "image", "concepts", "none".
        embed: how a word becomes an embedding: "first_token" (the paper), "mean_tokens", "in_prompt".
        pooled: pooled text vector that modulates concepts: the "prompt"'s, "zero", or the "concepts"' own.
        through: blocks that concepts run through: "joint" (the paper), or "all", single-stream ones included: an
            extension beyond the paper, which the store says. There a concept is one more text token that image and
            prompt do not see.
        source: where the definition comes from; kept in the store.

    Raises:
        ProbeError: a field has a value that does not exist.
        ConceptError: the concepts cannot be told apart.

    Example:
        >>> probe = Probe(["sun", "sky"], record=("o_x", "o_c"), layers=[0, 1])
        >>> (probe | Probe(record=["x"], layers="all")).names
        ('o_x', 'o_c', 'x')
    """

    concepts: Sequence[str] = ()
    record: Sequence[str] = ()
    scores: Sequence[str] = ()
    layers: Sequence[int] | str | None = None
    steps: Sequence[int] | None = None
    attends: str = "both"
    embed: str = "first_token"
    pooled: str = "prompt"
    through: str = "joint"
    source: str = ""

    observes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Variables that `observe` returns, with their dims."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Activations that `observe` reads; with ``x`` or ``p`` among them it is called when the block has run."""
    sizes: ClassVar[Mapping[str, int]] = {}
    """Lengths of the dims in `observes` that no other variable has."""

    def __post_init__(self) -> None:
        from dit_probe.concepts import check_words

        for name in ("record", "scores"):
            if isinstance(getattr(self, name), str):
                raise ProbeError(f"{name} must be a list of names, found {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if isinstance(value, int):
                value = (value,)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "concepts", check_words(self.concepts))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ProbeError(f"{name}={getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if isinstance(self.layers, str) and self.layers not in _KINDS:
            raise ProbeError(f"layers={self.layers!r}; give layer indices or one of {', '.join(_KINDS)}")
        if isinstance(self.steps, str):
            raise ProbeError(f"steps={self.steps!r}; give step indices, or None for all")
        unknown = [space for space in self.scores if space not in schema.SPACES]
        if unknown:
            raise ProbeError(f"scores has {unknown[0]!r}; spaces are {', '.join(schema.SPACES)}")
        for name in self.record:
            schema.stream(name)

    def observe(self, block: Observation, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reduce activations of one block while the model runs; overridden where a declaration cannot say it.

        Args:
            block: where this is.
            activations: the tensors named in `needs`, (row, token, head, head_dim); of ``x`` and ``p`` (row, token,
                width).

        Returns:
            One tensor (row, *dims) for every name in `observes`.
        """
        return {}

    def _repr_html_(self) -> str:
        fields = [(field.name, str(getattr(self, field.name))) for field in dataclasses.fields(self)]
        return Table([("", type(self).__name__), *fields]).html()

    def __or__(self, other: Probe | Combination) -> Combination:
        return Combination(self) | other

    def plan(self, pipe: Any, **size: Any) -> Plan:
        """What this probe would record; see `plan`."""
        from dit_probe.planning import plan

        return plan(pipe, Combination(self), **size)

    @property
    def variables(self) -> dict[str, tuple[str, ...]]:
        """Names of the variables it makes, with the activations that each needs."""
        scored = {name: schema.SCORE_SOURCES[name] for space in self.scores for name in schema.SCORES[space]}
        return {**{name: (name,) for name in self.record}, **scored, **dict.fromkeys(self.observes, self.needs)}


class Combination(tuple[Probe, ...]):
    """Several probes that share one pass, made with ``|``."""

    def __new__(cls, *probes: Probe | Combination) -> Combination:
        flat: list[Probe] = []
        for probe in probes:
            if not isinstance(probe, (Probe, Combination)):
                raise ProbeError(f"expected a Probe, found {type(probe).__name__}")
            flat.extend([probe] if isinstance(probe, Probe) else probe)
        return super().__new__(cls, flat)

    def __getnewargs__(self) -> Any:
        return tuple(self)  # to be pickled: a tuple gives itself as one argument

    def _repr_html_(self) -> str:
        return "".join(probe._repr_html_() for probe in self)

    def __or__(self, other: Probe | Combination) -> Combination:
        return Combination(self, other)

    def plan(self, pipe: Any, **size: Any) -> Plan:
        """What these probes would record; see `plan`."""
        from dit_probe.planning import plan

        return plan(pipe, self, **size)

    @property
    def names(self) -> tuple[str, ...]:
        """Every variable that is asked for, once."""
        return tuple(dict.fromkeys(name for probe in self for name in probe.variables))

    @functools.cached_property
    def stream(self) -> Probe | None:
        """The probe that says how the one concept stream runs; None when no variable needs concepts.

        Raises:
            ProbeError: two probes ask for different streams, or one needs concepts and has none.
        """
        users = [probe for probe in self if any(_concepts(needs) for needs in probe.variables.values())]
        if not users:
            return None
        settings = {name: sorted({str(getattr(probe, name)) for probe in users}) for name in _CHOICES}
        settings["concepts"] = sorted({str(list(probe.concepts)) for probe in users if probe.concepts})
        for name, values in settings.items():
            if len(values) > 1:
                raise ProbeError(
                    f"one pass carries one concept stream, but the probes ask for {name} = {' and '.join(values)}. "
                    "Run them in two passes (trace(..., mode='a') is not it: use two stores)"
                )
        return next((probe for probe in users if probe.concepts), users[0])

    def reach(self, blocks: Sequence[Block]) -> int:
        """The last layer that the concept stream runs through."""
        stream = self.stream
        kinds = ("joint", "single") if stream is not None and stream.through == "all" else ("joint",)
        return max((block.layer for block in blocks if block.kind in kinds), default=-1)

    def json(self) -> list[dict[str, Any]]:
        """The probes as plain data, for the store's attrs; concepts are kept by sample instead."""
        kept = []
        for probe in self:
            fields = {field.name: getattr(probe, field.name) for field in dataclasses.fields(probe)}
            fields.pop("concepts")
            kept.append({"probe": type(probe).__name__, **fields})
        return json.loads(json.dumps(kept, default=lambda value: type(value).__name__))

    def layers(self, blocks: Sequence[Block], model: str) -> dict[str, tuple[int, ...]]:
        """Layers at which each variable is recorded.

        Raises:
            SiteError: a layer does not exist, or a variable does not exist there.
        """
        chosen: dict[str, set[int]] = {}
        for probe in self:
            wanted = layers_of(probe.layers, blocks, model)
            for name, needs in probe.variables.items():
                have = {block.layer for block in blocks if not any(_missing(n, block, probe.through) for n in needs)}
                if probe.layers is not None and not isinstance(probe.layers, str):
                    _check_sites(name, needs, wanted, have, blocks, model, probe.through)
                chosen.setdefault(name, set()).update(wanted & have)
        return {name: tuple(sorted(layers)) for name, layers in chosen.items()}

    def steps(self, count: int) -> dict[str, tuple[int, ...]]:
        """Steps at which each variable is recorded, of a run that has `count`.

        Raises:
            SiteError: a step is never reached.
        """
        chosen: dict[str, set[int]] = {}
        for probe in self:
            wanted = range(count) if probe.steps is None else probe.steps
            never = [step for step in wanted if not -count <= step < count]
            if never:
                raise SiteError(
                    f"step {never[0]} is never reached: this run has {count} steps (0-{count - 1}). "
                    "Raise num_inference_steps or drop it from steps"
                )
            for name in probe.variables:
                chosen.setdefault(name, set()).update(step % count for step in wanted)
        return {name: tuple(sorted(steps)) for name, steps in chosen.items()}


def layers_of(wanted: Sequence[int] | str | None, blocks: Sequence[Block], model: str) -> set[int]:
    """Layers that a probe or an edit names: None or "joint", "single", "all", or indices.

    Raises:
        SiteError: a layer, or a kind of block, that the model does not have.
    """
    if wanted is None or isinstance(wanted, str):
        kinds = {"all": ("joint", "single")}.get(wanted or "joint", (wanted or "joint",))
        found = {block.layer for block in blocks if block.kind in kinds}
        if not found:
            more = "; give layers='single', and through='all' for concepts (an extension beyond the paper)"
            raise SiteError(f"{model} has no {wanted or 'joint'} blocks{'' if wanted else more}")
        return found
    joint = sum(block.kind == "joint" for block in blocks)
    outside = [layer for layer in wanted if not -joint <= layer < len(blocks)]
    if outside:
        single = f", single ones {joint}-{len(blocks) - 1}" if len(blocks) > joint else ""
        raise SiteError(f"no layer {outside[0]} in {model}: joint layers are 0-{joint - 1}{single}")
    return {layer if layer >= 0 else joint + layer for layer in wanted}


def _check_sites(
    name: str, needs: Iterable[str], wanted: set[int], have: set[int], blocks: Sequence[Block], model: str, through: str
) -> None:
    lacking = sorted(wanted - have)
    if not lacking:
        return
    block = blocks[lacking[0]]
    reason = next(reason for need in needs if (reason := _missing(need, block, through)) is not None)
    place = f"{name!r} exists after layers {schema.ranges(sorted(have))}" if have else f"{name!r} exists nowhere in it"
    instead = f"Record 'o_{name}' there instead, or drop" if name in ("c", "p") and block.kind == "joint" else "Drop"
    raise SiteError(
        f"no {name!r} after layer {block.layer} ({block.path}) of {model}: {reason}. {place}. "
        f"{instead} layer {block.layer}."
    )


def _missing(name: str, block: Block, through: str) -> str | None:
    """Why an activation does not exist at a block, or None."""
    if schema.stream(name) == "c" and block.kind != "joint" and through == "joint":
        return "the concept stream runs in joint blocks only, as in the paper (through='all' extends it)"
    if name in ("c", "p") and not block.text_output:
        return "the last block has no text output (context_pre_only)"
    return None


def _concepts(needs: Iterable[str]) -> bool:
    return any(schema.stream(need) == "c" for need in needs)
