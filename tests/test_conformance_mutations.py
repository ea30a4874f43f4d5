"""An oracle that cannot fail proves nothing: anatomies with something wrong in them, which must be noticed."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from conformance_cases import CASES, SIZES, WITH_CONCEPTS, Subject, limit, numpy, subject_of

from dit_probe import anatomy, stream, testing
from dit_probe.anatomy import Anatomy, TextSide
from dit_probe.errors import ReplayError


class Mutant(TextSide):
    """A text side with something wrong in it."""

    def __init__(self, text):
        self.text = text

    def project(self, c, context):
        return self.text.project(c, context)

    def update(self, c, o, projection, context):
        return self.text.update(c, o, projection, context)


class SwappedGates(Mutant):
    def project(self, c, context):
        projection = super().project(c, context)
        return dataclasses.replace(projection, modulation=projection.modulation[::-1])

    def update(self, c, o, projection, context):
        if len(projection.modulation) > 1:
            return super().update(c, o, projection, context)
        # This text side carries one gate and makes the others anew: it gets another row's of features.
        wrong = tuple(part.roll(1, dims=-1) for part in projection.modulation)
        return super().update(c, o, dataclasses.replace(projection, modulation=wrong), context)


class NoTextRotary(Mutant):
    def project(self, c, context):
        return super().project(c, dataclasses.replace(context, rotary=None))


class NoNorm(Mutant):
    """The first of the norms of q and k that runs lets its input through."""

    def project(self, c, context):
        ran = []

        def let_through(module, args, output):
            ran.append(module)
            return args[0] if len(ran) == 1 else output

        handles = [norm.register_forward_hook(let_through) for norm in norms(context.block)]
        try:
            return super().project(c, context)
        finally:
            for handle in handles:
                handle.remove()


class NoOutputProjection(Mutant):
    def update(self, c, o, projection, context):
        return super().update(c, torch.zeros_like(o), projection, context)


def norms(block) -> list[torch.nn.Module]:
    return [
        module
        for name, module in block.attention.named_modules()
        if "norm" in f"{name} {type(module).__name__}".lower() and name
    ]


def mutate(monkeypatch, subject, change) -> None:
    """Give the family's blocks a wrong text side for the rest of the test."""
    family = type(subject.family)
    blocks = family.blocks

    def mutants(self, model):
        return tuple(dataclasses.replace(block, text=change(block.text)) for block in blocks(self, model))

    monkeypatch.setattr(family, "blocks", mutants)


def swap_streams(monkeypatch, subject) -> None:
    """Let the family take text for image and image for text in the joint sequence."""
    family = type(subject.family)
    right = family.places

    def places(self, *call):
        found = right(self, *call)
        image, prompt = (part.stop - part.start for part in (found.image, found.prompt))
        first = min(found.image.start, found.prompt.start)
        wrong = anatomy.Places.of(image, prompt, text_first=found.image.start < found.prompt.start, before=first)
        return dataclasses.replace(wrong, total=found.total)

    monkeypatch.setattr(family, "places", places)


MUTATIONS = [SwappedGates, NoTextRotary, NoNorm, NoOutputProjection]


def applicable(subject) -> set[type[Mutant]]:
    """Mutations of parts that the model has."""
    call, _ = subject.calls[0]
    parts = {
        SwappedGates: bool(stream.replay(subject.family, call).projection.modulation),
        NoTextRotary: subject.family.text_rotary(call.block, call.arguments, call.places, slice(0, 1)) is not None,
        NoNorm: bool(norms(call.block)),
        NoOutputProjection: True,
    }
    return {change for change, there in parts.items() if there}


def denied(subject) -> set[type[Mutant]]:
    """Mutations of parts that the family's text side never has, as its description says."""
    family, (call, _) = subject.family, subject.calls[0]
    modulation = family.modulation(call.block, call.arguments)
    unrotated = set(family.unrotated(call.block, call.arguments).values())
    never_rotated = inspect.signature(family.text_rotary).return_annotation == "None"
    says = {
        SwappedGates: isinstance(modulation, tuple) and not modulation,
        NoTextRotary: type(family).text_rotary is Anatomy.text_rotary or never_rotated,
        NoNorm: bool(unrotated) and not unrotated & set(norms(call.block)),
    }
    return {change for change, none in says.items() if none}


def representatives() -> list[tuple[str, str]]:
    """The first case of every kind of text side."""
    found = {}
    for case in CASES:
        family = anatomy.families()[case[0]]
        for side in ("text", "single_text"):
            found.setdefault(type(getattr(family, side, None)), case)
    return sorted(set(found.values()))


def on(cases):
    """Runs a test on these models, and on one of every kind in the precision whose tolerance might hide a mistake."""
    half = [case for case in representatives() if case in cases]
    params = [*((case, "two") for case in cases), *((case, "two in bfloat16") for case in half)]
    names = ["-".join([*case, size]) for case, size in params]
    return pytest.mark.parametrize("subject", params, ids=names, indirect=True)


@pytest.fixture(scope="module")
def subject(request):
    return subject_of(*request.param)


@pytest.fixture(params=MUTATIONS, ids=lambda change: change.__name__)
def change(request, subject):
    if request.param not in applicable(subject):
        pytest.skip("the model has no such part")
    return request.param


@pytest.mark.parametrize("family", sorted({family for family, _ in CASES}))
def test_every_mutation_applies_to_every_family_that_does_not_say_otherwise(family):
    subjects = [Subject(case, *SIZES["one"]) for case in CASES if case[0] == family]
    found = set().union(*map(applicable, subjects))
    assert set(MUTATIONS) - found == set.intersection(*map(denied, subjects))


@on(CASES)
def test_a_wrong_text_side_is_refused(subject, change, monkeypatch):
    mutate(monkeypatch, subject, change)
    with pytest.raises(ReplayError, match="does not describe this model"):
        testing.replay_differences(subject.model, subject.predict)


@on(CASES)
def test_swapped_streams_are_noticed(subject, monkeypatch):
    swap_streams(monkeypatch, subject)
    if subject.blocks[0].kind == "joint":
        with pytest.raises(ReplayError, match="does not describe this model"):
            testing.replay_differences(subject.model, subject.predict)
    else:  # with one set of weights, an image token replays like any other
        (_, p), (_, p_changed) = subject.entering(), subject.entering(1.0)
        assert not torch.equal(p, p_changed)


def differs_from_the_clamped_model(subject, mutated) -> bool:
    """In ``c`` of the second layer; where the tolerance is wide, anywhere."""
    single = subject.dtype == torch.float32
    expected = {1: {"c": subject.clamped[1]["c"]}} if single else subject.clamped
    mutated()
    _, ds = subject.trace(subject.probe(record=["o_c", "c"]), verify=None)
    off = [
        np.abs(ds[name].sel(layer=layer).isel(step=0).values - numpy(value)).max() / value.abs().max().item()
        for layer, values in expected.items()
        for name, value in values.items()
    ]
    return max(off) > max(limit(subject.dtype), 100 * limit(torch.float32))


@on(WITH_CONCEPTS)
def test_a_wrong_text_side_differs_from_the_clamped_model(subject, change, monkeypatch):
    assert differs_from_the_clamped_model(subject, lambda: mutate(monkeypatch, subject, change))


@on(WITH_CONCEPTS)
def test_swapped_streams_differ_from_the_clamped_model(subject, monkeypatch):
    assert differs_from_the_clamped_model(subject, lambda: swap_streams(monkeypatch, subject))


@on(WITH_CONCEPTS)
def test_trace_refuses_a_model_that_its_anatomy_does_not_describe(subject, monkeypatch):
    mutate(monkeypatch, subject, NoOutputProjection)
    with pytest.raises(ReplayError, match="does not describe this model"):
        subject.trace(subject.probe(record=["o_c"]))
    assert testing.leftovers(subject.model) == []
