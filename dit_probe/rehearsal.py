"""Forwards of the model beside the one that is traced: watching every block, and running it on concepts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe import stream
from dit_probe.anatomy import Anatomy, Block, Places, remember
from dit_probe.anatomy.block import arguments_of
from dit_probe.anatomy.structural import Structural
from dit_probe.attention import AttentionTap
from dit_probe.errors import ModelError, ModelWarning


class _Stop(Exception):
    """Nothing after this block matters."""


@contextlib.contextmanager
def watched(
    anatomy: Anatomy,
    model: Any,
    see: Callable[[stream.BlockCall, Any], object],
    change: Callable[[Block, Mapping[str, Any], Places], dict[str, Any]] | None = None,
) -> Iterator[None]:
    """Call `see` with every block's call and output while inside; hooks of its own, apart from `trace`'s.

    Args:
        anatomy: the model's family.
        model: the transformer.
        see: called after every block.
        change: replaces the arguments of a block's call; the text stream then holds nothing but the prompt's tokens.
    """
    blocks = anatomy.blocks(model)
    tap = AttentionTap()
    now: dict[str, Any] = {}
    handles: list[Any] = []

    def start(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of(module, args, kwargs)
        now["places"] = anatomy.places(model, arguments)
        if change is not None and blocks[0].kind == "joint":
            now["places"] = anatomy.clamped_places(model, arguments)

    def hooks(block: Block) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now["arguments"] = block.bind(args, kwargs)
            if change is None:
                return None
            now["arguments"] = change(block, now["arguments"], now["places"])
            return (), now["arguments"]

        def after(module: nn.Module, args: Any, output: Any) -> None:
            see(stream.BlockCall.read(anatomy, block, now["arguments"], tap.calls, now["places"]), output)

        handles.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.attention.register_forward_pre_hook(lambda module, args: tap.open()))
        handles.append(block.attention.register_forward_hook(lambda module, args, out: tap.close(), always_call=True))
        handles.append(block.module.register_forward_hook(after))

    handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
    for block in blocks:
        hooks(block)
    try:
        yield
    finally:
        tap.close()
        for handle in handles:
            handle.remove()


@torch.no_grad()
def clamped_calls(
    anatomy: Anatomy,
    model: Any,
    inputs: Mapping[str, Any],
    concepts: Tensor,
    c: Mapping[int, Tensor] | None = None,
    **changed: Any,
) -> dict[int, tuple[stream.BlockCall, Tensor | None]]:
    """The model itself, run on concepts as its prompt while every block is given the image stream of the real prompt.

    Every concept enters the first block as the model itself makes it of a prompt that is nothing but this concept.

    Args:
        anatomy: the model's family; of it only where things are is used, not its text side.
        model: the transformer.
        inputs: arguments of one call, by name.
        concepts: (row, concept, text width).
        c: layer to the concepts after it (row, concept, width), put back before the next layer, so that every layer
            is compared by itself and no rounding adds up; None lets the model's own go on.
        **changed: arguments that differ in the run on concepts, such as ``pooled_projections``.

    Returns:
        Layer to its call, in which the prompt's places are the concepts', and the text stream after it, if any.
    """
    count, blocks = concepts.shape[1], anatomy.blocks(model)
    recorded: dict[int, tuple[Tensor, Mapping[str, Any]]] = {}
    with watched(anatomy, model, lambda call, _: recorded.setdefault(call.block.layer, (call.x, call.arguments))):
        model(**inputs)

    def run(text: Tensor, see: Callable[[stream.BlockCall, Any], None], **options: Any) -> None:
        with contextlib.suppress(_Stop), watched(anatomy, model, see, **options):
            model(**{**anatomy.with_prompt(inputs, text), **changed})

    first: list[Tensor] = []

    def enter(call: stream.BlockCall, output: Any) -> None:
        first.append(call.p[:, :1])
        raise _Stop

    for index in range(count):
        run(concepts[:, index : index + 1].expand(-1, count, -1), enter)

    def put_back(block: Block, arguments: Mapping[str, Any], places: Places) -> dict[str, Any]:
        x, arguments_before = recorded[block.layer]
        before = None if c is None else c.get(block.layer - 1)
        if block.layer == 0:
            p = torch.cat(first, dim=1)
        elif before is None:
            p = anatomy.streams(block, arguments, places)[1]
        else:
            p = anatomy.feed(model, block, before, concepts)
        return anatomy.clamp(block, anatomy.with_streams(block, arguments, x, p, places), arguments_before)

    layers: dict[int, tuple[stream.BlockCall, Tensor | None]] = {}

    def keep(call: stream.BlockCall, output: Any) -> None:
        after = anatomy.outputs(call.block, output, call.places)[1] if call.block.text_output else None
        layers[call.block.layer] = call, after
        if call.block is blocks[-1]:
            raise _Stop

    run(concepts, keep, change=put_back)
    return layers


@torch.no_grad()
def settle(guess: Structural, model: Any, inputs: Mapping[str, Any]) -> Structural:
    """The guess that describes a model of no known family, tried on one call; warns of what it rests on.

    A guess of the text side is believed if self-replay holds in every block, and if the module that makes the prompt
    stream is found. Otherwise the model itself has to be run on concepts, which is believed if its image keys are then
    those of the real run in every block.

    Raises:
        ModelError: not even that holds.
    """
    name, reasons = type(model).__name__, []
    for candidate in guess.candidates():
        try:
            settled = _replayed(candidate, model, inputs) if candidate.fast else _held(candidate, model, inputs)
        except Exception as error:  # a wrong guess may fail in any way; which ways is said if all of them do
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        warnings.warn(_WARNINGS[settled.fast].format(name=name), ModelWarning, stacklevel=2)
        return remember(model, settled)
    raise ModelError(
        f"no anatomy for {name}, and none can be guessed: its blocks ({guess.joint}) replay under no order of text and "
        f"image, nor does the model hold its image stream when it is run on other text. Last reason: {reasons[-1]}. "
        "Describe the family in a file: see CONTRIBUTING.md"
    )


_WARNINGS = {
    True: "no anatomy for {name}: it was guessed from the names of its parts. Self-replay holds in every block; where "
    "concepts stand among text positions, and what masks them, no check has seen",
    False: "no anatomy for {name}, and no guess of its text side replays. Concepts are found by running the model "
    "itself on them with the image stream put back: every recorded step costs two more forwards",
}


def _replayed(guess: Structural, model: Any, inputs: Mapping[str, Any]) -> Structural:
    outputs: dict[str, Any] = {}
    first: list[stream.BlockCall] = []

    def see(call: stream.BlockCall, output: Any) -> None:
        first.append(call) if not first else None
        after = guess.outputs(call.block, output, call.places)[1]
        stream.check_replay(guess, call, stream.replay(guess, call), after)

    def note(path: str) -> Any:
        return lambda module, args, output: outputs.setdefault(path, output)

    handles = [child.register_forward_hook(note(path)) for path, child in model.named_children()]
    try:
        with watched(guess, model, see):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    (call,) = first
    entries = [path for path, output in outputs.items() if isinstance(output, Tensor) and _same(output, call.p)]
    settled = replace(_sized(guess, call), entry_name=entries[-1])
    embedded = settled.embed(model, guess.prompt_embeddings(inputs), inputs, slice(None))
    if not _same(embedded[:, :1], call.p[:, :1]):
        raise ModelError(f"{entries[-1]} does not make the prompt stream of lone tokens")
    return settled


def _held(guess: Structural, model: Any, inputs: Mapping[str, Any]) -> Structural:
    keys: dict[int, Tensor] = {}
    first: list[stream.BlockCall] = []

    def see(call: stream.BlockCall, output: Any) -> None:
        first.append(call) if not first else None
        keys[call.block.layer] = guess.places(model, inputs).split(call.attention.k)[0]

    with watched(guess, model, see):
        model(**inputs)
    # Other text, and less of it: only the image's part of the keys can be the same.
    text = guess.prompt_embeddings(inputs)[:, :2].flip(1)
    for layer, (call, after) in clamped_calls(guess, model, inputs, text).items():
        found = call.places.split(call.attention.k)[0]
        if not _same(found, keys[layer]) or (after is not None and after.shape[1] != 2):
            raise ModelError(f"{call.block.path}: the image stream is not held")
    return _sized(guess, first[0])


def _sized(guess: Structural, call: stream.BlockCall) -> Structural:
    return replace(guess, size=(*call.attention.q.shape[2:], call.p.shape[-1]))


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    limit = stream.tolerance(expected.dtype) * expected.abs().max()
    return bool((found - expected).abs().max() <= limit)
