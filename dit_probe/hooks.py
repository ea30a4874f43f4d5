"""The hooks on a transformer and its blocks: they gather activations and run the concept stream beside the model.

The concept stream runs in the attention module's forward hook: there the block's weights are still on the device
under every offloading scheme, while in the block's own hook they may have left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_probe import schema, stream
from dit_probe.anatomy import Anatomy, Block
from dit_probe.anatomy.block import arguments_of
from dit_probe.anatomy.obstacles import cached, obstacle
from dit_probe.anatomy.structural import Structural
from dit_probe.attention import AttentionTap, attention_weights
from dit_probe.errors import ModelError, ProbeError, TraceError
from dit_probe.forward import Forward
from dit_probe.probe import Combination, Observation, Probe
from dit_probe.rehearsal import clamped_calls, settle
from dit_probe.transfer import score

Write = Callable[[str, Tensor, int, int, str], None]


class Hooks:
    """Every hook of one trace on one transformer, from `attach` to `detach`.

    Args:
        anatomy: the model's family.
        model: the transformer.
        probes: what is recorded.
        start: called with the transformer's arguments by name; what to record of this call, or None.
        write: takes (variable, tensor (row, …), step, layer, branch).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        model: nn.Module,
        probes: Combination,
        start: Callable[[dict[str, Any]], Forward | None],
        write: Write,
    ) -> None:
        self._anatomy, self._model, self._probes = anatomy, model, probes
        self._start, self._write = start, write
        self._handles: list[Any] = []
        self._tap = AttentionTap()
        self._busy = self._settled = False
        self._reset()

    def _reset(self) -> None:
        self._forward: Forward | None = None
        self._arguments: dict[str, Any] = {}
        self._unrotated: dict[str, Tensor] = {}
        self._norm_handles: list[Any] = []
        self._replayed: tuple[stream.BlockCall, stream.Step] | None = None
        self._observed: stream.BlockCall | None = None
        self._waiting: list[tuple[stream.BlockCall, dict[str, Tensor]]] = []

    def attach(self) -> None:
        """Register every hook."""
        anatomy, model, keep = self._anatomy, self._model, self._handles.append
        keep(model.register_forward_pre_hook(_eager(self._before_model), with_kwargs=True))
        keep(model.register_forward_hook(_eager(self._after_model)))
        for block in anatomy.blocks(model):
            keep(block.module.register_forward_pre_hook(_eager(self._before_block(block)), with_kwargs=True))
            keep(block.attention.register_forward_pre_hook(_eager(self._before_attention(block))))
            keep(block.attention.register_forward_hook(_eager(self._after_attention(block)), always_call=True))
            keep(block.module.register_forward_hook(_eager(self._after_block(block))))
        if not isinstance(anatomy, Structural):
            self._attach_stream()

    def _attach_stream(self) -> None:
        settings, anatomy, model, keep = self._probes.stream, self._anatomy, self._model, self._handles.append
        if settings is None or not anatomy.fast:
            return
        keep(anatomy.entry(model).register_forward_hook(_eager(self._after_entry)))
        conditioner = anatomy.conditioner(model)
        if conditioner is not None and settings.pooled != "prompt":
            keep(conditioner.register_forward_hook(_eager(self._after_conditioner), with_kwargs=True))

    def settle(self, arguments: Mapping[str, Any]) -> Anatomy:
        """Find out what a model of no known family is, once, by the arguments of its call."""
        if isinstance(self._anatomy, Structural) and not self._settled:
            with self._quietly():
                if not self._anatomy.settled:
                    self._anatomy = settle(self._anatomy, self._model, arguments)
            self._settled = True
            self._attach_stream()
            settings = self._probes.stream
            if settings is not None and settings.attends != "both" and not self._anatomy.fast:
                raise ProbeError(
                    f"attends={settings.attends!r}: {type(self._model).__name__} is of no known family, and what the "
                    "model itself makes of concepts attends to both. Use attends='both'"
                )
        return self._anatomy

    def detach(self) -> None:
        """Remove every hook and close the tap, whatever state an exception left them in."""
        self._tap.close()
        for handle in [*self._handles, *self._norm_handles]:
            handle.remove()
        self._handles.clear()
        self._reset()

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
        self._reset()
        self._forward = self._start(arguments_of(module, args, kwargs))
        # Asked again: an adapter or a cache may have come after the trace was opened.
        if self._forward is not None and (reason := obstacle(self._anatomy, module)) is not None:
            raise ModelError(f"{type(module).__name__} cannot be traced: {reason}.")

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, waiting = self._forward, self._waiting
        if self._busy or forward is None:
            return
        if waiting:
            with self._quietly():
                self._run_clamped(forward, waiting)
        self._reset()
        # Every block counts, recorded or not: FirstBlockCache puts what it skips into the output of the block before.
        missed = [block.path for block in self._anatomy.blocks(module) if block.layer not in forward.seen]
        if missed:
            raise TraceError(
                f"step {forward.step}: {len(missed)} block(s) did not run their attention "
                f"({', '.join(missed[:4])}{', …' if len(missed) > 4 else ''}). A cache (FirstBlockCache, TeaCache …) "
                "or layer skipping left them out, or their code was compiled before the trace; switch it off to trace"
            )

    def _after_conditioner(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        forward = self._forward
        if self._busy or forward is None or forward.embeddings is None:
            return
        at = self._anatomy.pooled_argument
        concepts = forward.embeddings.shape[1]
        with self._quietly():
            for branch, rows in forward.branches.items():
                mine = [arg[rows] if isinstance(arg, Tensor) else arg for arg in args]
                if forward.pooled is None:
                    mine[at] = torch.zeros_like(mine[at])
                else:
                    pooled = forward.pooled.to(mine[at]).repeat(len(mine[at]), 1)
                    mine = [arg.repeat_interleave(concepts, 0) if isinstance(arg, Tensor) else arg for arg in mine]
                    mine[at] = pooled
                made = module(*mine)
                forward.temb[branch] = made[0] if isinstance(made, tuple) else made

    def _after_entry(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forward
        if self._busy or forward is None or forward.embeddings is None:
            return
        like = output if isinstance(output, Tensor) else output[0]
        with self._quietly():
            for branch, rows in forward.branches.items():
                count = len(range(self._anatomy.rows(forward.arguments))[rows])
                embeddings = forward.embeddings.to(like).expand(count, -1, -1)
                forward.c[branch] = self._anatomy.embed(self._model, embeddings, forward.arguments, rows)

    def _before_block(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = self._forward
            if forward is None or self._idle(block):
                return
            # Whatever an earlier block left is stale: a block whose attention is skipped must not reuse it.
            self._unrotated, self._replayed, self._observed = {}, None, None
            self._arguments = block.bind(args, kwargs)
            found = len(self._anatomy.streams(block, self._arguments, forward.places)[0])
            if found != (rows := self._anatomy.rows(forward.arguments)):
                raise TraceError(
                    f"{block.path}: ran on {found} rows of the {rows} that the transformer was called on. A cache "
                    "(FasterCache …) left a branch of guidance out; switch it off to trace"
                )
            wanted = self._wanted(block)
            needed = wanted.union(*(probe.needs for probe in self._probes if wanted & probe.observes.keys()))
            if any(name.endswith("_unrotated") for name in needed):
                for name, norm in self._anatomy.unrotated(block, self._arguments).items():
                    self._norm_handles.append(norm.register_forward_hook(_eager(self._after_norm(name))))

        return hook

    def _after_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not self._busy:
                heads = self._anatomy.heads(self._model)[0]
                apart = output if output.ndim == 4 else output.unflatten(-1, (heads, -1))
                apart = apart.transpose(1, 2) if self._anatomy.heads_first else apart
                # Grouped-query attention: every key head serves several query heads, as in the attention call.
                # It is a copy in any case, since some attention processors go on to rotate the norm's output in place.
                self._unrotated[name] = apart.repeat_interleave(heads // apart.shape[2], dim=2)

        return hook

    def _before_attention(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not self._idle(block):
                forward = self._forward
                assert forward is not None
                edits = forward.edits.get(block.layer)
                changes = edits if edits is not None and edits.on_attention else None
                shape = self._anatomy.rows(forward.arguments), forward.places.total
                self._tap.open(changes, shape, both=block.layer in forward.verify)
            elif self._forward is not None and not self._busy:
                self._forward.seen.add(block.layer)

        return hook

    def _after_attention(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._idle(block):
                return
            self._tap.close()
            for handle in self._norm_handles:
                handle.remove()
            self._norm_handles.clear()
            if output is None:  # the attention raised: its own error is on its way
                return
            with self._quietly():
                self._record(block)
            self._tap.forget()

        return hook

    def _after_block(self, block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            forward = self._forward
            if forward is None or self._idle(block):
                return
            with self._quietly():  # gradients off: checkpointing counts what is kept for them
                x, p = self._anatomy.outputs(block, output, forward.places)
                if self._replayed is not None:
                    stream.check_replay(self._anatomy, *self._replayed, p)
            if (edits := forward.edits.get(block.layer)) is not None:
                edits.residuals({"x": x, "p": p}, output)
            with self._quietly():
                residuals = {"x": x, "p": p}
                for branch, rows in forward.branches.items():
                    for name in self._wanted(block) & residuals.keys():
                        self._write(name, residuals[name][rows], forward.step, block.layer, branch)
                    if (call := self._observed) is not None:
                        seen = self._image_and_prompt(call) | {"x": x} | ({} if p is None else {"p": p})
                        self._observe(call, forward, branch, {name: tensor[rows] for name, tensor in seen.items()})

        return hook

    def _record(self, block: Block) -> None:
        forward, anatomy = self._forward, self._anatomy
        assert forward is not None
        if not self._tap.calls and cached(block.attention):  # it answered from its cache, and counts as not run
            return
        call = stream.BlockCall.read(anatomy, block, self._arguments, self._tap.calls, forward.places)
        forward.seen.add(block.layer)
        edits = forward.edits.get(block.layer)
        edited = edits is not None and edits.on_attention
        if edits is not None and edited:
            edits.check_attention(self._tap.changed)
        if block.layer in forward.verify:
            before = self._tap.unchanged if edited else self._tap.calls
            original = stream.BlockCall.read(anatomy, block, self._arguments, before, forward.places)
            step = stream.replay(anatomy, original)
            # What the block hands on follows from the edited attention, which the replay does not know.
            self._replayed = original, replace(step, c=None) if edited else step
        self._observed = call if any(map(_after, self._probes)) else None
        whole = self._image_and_prompt(call)
        if forward.embeddings is not None and not anatomy.fast:
            self._waiting.append((call, whole))
            return
        for branch, rows in forward.branches.items():
            seen = {name: tensor[rows] for name, tensor in whole.items()}
            self._keep(call, branch, seen | self._advance(call, branch, rows))

    def _advance(self, call: stream.BlockCall, branch: str, rows: slice) -> dict[str, Tensor]:
        """Take the concepts of a branch through the block."""
        forward, settings = self._forward, self._probes.stream
        assert forward is not None
        if settings is None or branch not in forward.c or call.block.layer > forward.through:
            return {}
        c, temb = self._feed(call.block, branch), forward.temb.get(branch)
        step = stream.advance(self._anatomy, call, c, rows=rows, temb=temb, attends=settings.attends)
        seen = {"q_c": step.projection.q, "k_c": step.projection.k, "v_c": step.projection.v, "o_c": step.o}
        seen |= {"q_c_unrotated": step.projection.q_unrotated, "k_c_unrotated": step.projection.k_unrotated}
        if step.c is not None:
            seen["c"] = forward.c[branch] = step.c
        return seen

    def _run_clamped(self, forward: Forward, waiting: list[tuple[stream.BlockCall, dict[str, Tensor]]]) -> None:
        """The concepts of all blocks at once, by the model itself, where the text side is not described."""
        assert forward.embeddings is not None
        rows = self._anatomy.rows(forward.arguments)
        concepts = forward.embeddings.to(waiting[0][0].p).expand(rows, -1, -1)
        found = clamped_calls(self._anatomy, self._model, forward.arguments, concepts)
        for call, whole in waiting:
            made, c = found[call.block.layer]
            whole |= {f"{letter}_c": made.places.split(getattr(made.attention, letter))[1] for letter in "qkvo"}
            whole |= {} if c is None else {"c": c}
            for branch, mine in forward.branches.items():
                self._keep(call, branch, {name: tensor[mine] for name, tensor in whole.items()})

    def _keep(self, call: stream.BlockCall, branch: str, seen: dict[str, Tensor]) -> None:
        forward, wanted = self._forward, self._wanted(call.block)
        assert forward is not None
        for name in wanted & seen.keys():
            self._write(name, seen[name], forward.step, call.block.layer, branch)
        for name in wanted & schema.SCORE_SOURCES.keys():
            self._write(name, score(name, seen), forward.step, call.block.layer, branch)
        self._observe(call, forward, branch, seen)

    def _feed(self, block: Block, branch: str) -> Tensor:
        forward = self._forward
        assert forward is not None and forward.embeddings is not None
        c = forward.c[branch]
        return self._anatomy.feed(self._model, block, c, forward.embeddings.to(c).expand(len(c), -1, -1))

    def _image_and_prompt(self, call: stream.BlockCall) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        places = call.places
        parts = {"x": (places.image, places.prompt), "p": (places.prompt, places.image)}
        for letter in "qkvo":
            found[f"{letter}_x"], found[f"{letter}_p"] = call.places.split(getattr(call.attention, letter))
        # Some norms compute in float32; like what is rotated, it is kept in the precision that attention reads.
        unrotated = {name: tensor.to(call.attention.q.dtype) for name, tensor in self._unrotated.items()}
        for letter in "qk":
            if letter in unrotated:
                x, p = call.places.split(unrotated[letter])
                found[f"{letter}_x_unrotated"], found[f"{letter}_p_unrotated"] = x, p
            for token, (part, other) in parts.items():
                name = f"{letter}_{token}"
                if (whole := unrotated.get(name)) is not None:
                    # The stream may hold more than these tokens; it begins or ends the joint sequence.
                    start = part.start - (0 if part.start < other.start else places.total - whole.shape[1])
                    found[f"{name}_unrotated"] = whole[:, start : start + part.stop - part.start]
                elif not self._anatomy.unrotated(call.block, call.arguments):
                    found[f"{name}_unrotated"] = found[name]
        return found

    def _observe(self, call: stream.BlockCall, forward: Forward, branch: str, seen: Mapping[str, Tensor]) -> None:
        block, attention, places = call.block, call.attention, call.places
        pads, weights = forward.pads.get(branch), partial(attention_weights, attention, forward.branches[branch])
        at = (block.layer, block.kind, forward.step, branch, attention.scale, pads)
        where = Observation(*at, attention.q.shape[2], places.image, places.prompt, weights)
        for probe in self._probes:
            names = self._wanted(block) & probe.observes.keys()
            if not names or _after(probe) != ("x" in seen):
                continue
            observed = probe.observe(where, {name: seen[name] for name in probe.needs})
            if missing := names - observed.keys():
                raise TraceError(f"{type(probe).__name__}.observe did not return {', '.join(sorted(missing))}")
            for name in names:
                self._write(name, observed[name].float(), forward.step, block.layer, branch)

    def _idle(self, block: Block) -> bool:
        return self._busy or self._forward is None or not self._forward.active(block)

    def _wanted(self, block: Block) -> set[str]:
        assert self._forward is not None
        return {name for name, layers in self._forward.wanted.items() if block.layer in layers}

    def _quietly(self) -> _Quiet:
        return _Quiet(self)


def _after(probe: Probe) -> bool:
    """Does a probe observe residual streams, which are there when the block has run?"""
    return not {"x", "p"}.isdisjoint(probe.needs)


# Compiled code breaks off at a hook, which goes on to files and threads.
def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that torch.compile leaves out of its graphs."""
    left_out: Any = torch.compiler.disable(hook)
    return left_out


class _Quiet:
    """No gradients, and no reaction of our own hooks to the modules we call."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks, self._no_grad = hooks, torch.no_grad()

    def __enter__(self) -> None:
        self._hooks._busy = True
        self._no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        self._hooks._busy = False
