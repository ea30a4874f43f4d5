"""`trace`: follow a model call by call and step by step, and hand what the probes asked for to the store."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dit_probe import guidance, pipelines, planning, schema, store
from dit_probe.anatomy import Places, find, transformer_of
from dit_probe.concepts import check_embeddings, check_tokens, embed_words
from dit_probe.edit import Edit, Edits
from dit_probe.errors import ConceptError, ModelError, ProbeError, TraceError
from dit_probe.forward import Forward
from dit_probe.hooks import Hooks
from dit_probe.pipelines import Generation
from dit_probe.probe import Combination, Probe
from dit_probe.tabular import Table, Tabular
from dit_probe.transfer import host

if TYPE_CHECKING:
    import xarray as xr

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


def trace(
    model: Any,
    *probes: Probe | Combination,
    store: Any = None,
    mode: str | None = None,
    concepts: Tensor | None = None,
    edits: Sequence[Edit] = (),
    branch: str = "cond",
    verify: str | None = "first",
    progress: bool = True,
) -> Run:
    """Record what the probes ask for while a pipeline or transformer runs; only `edits` change what it computes.

    Args:
        model: a diffusers pipeline (Flux, SD3, CogVideoX), or its bare transformer.
        probes: what to record; several share one pass.
        store: where to (a path or URL, or any store zarr accepts). None keeps it in memory.
        mode: None creates a store or completes one that was cut short; "a" appends samples; "w" overwrites.
        concepts: concept embeddings (concept, text width) or (sample, concept, text width) instead of encoding the
            probe's words; required with a bare transformer and concepts.
        edits: changes of activations, made in this order where they meet; probes record the changed ones. With edits
            alone nothing is recorded.
        branch: which is recorded: "cond", "uncond" or "both" halves of classifier-free guidance.
        verify: "first" replays the first step of the first block and refuses a model that its anatomy does not
            describe (`dit_probe.stream.replay`); None trusts it.
        progress: show steps and bytes written.

    Returns:
        A context manager; inside it, call the pipeline as usual. Afterwards ``run.dataset`` is the result. With a
        bare transformer every forward is a step, and as many make one sample as the probes' `steps` say (one unless
        they say more); guidance is not told apart there.

    Raises:
        ModelError: not a pipeline or transformer, an unknown family, or a model that cannot be traced truthfully.
        ProbeError: the probes contradict each other, or there are none.
        SiteError: a layer, step or activation that does not exist.
        ConceptError: the concepts or their embeddings cannot be used.
        EditError: an edit that cannot be made, or that was not when the trace ends.
        StoreError: the store exists, or belongs to another model or grid.
        TraceError: hooks that did not fire, or steps that were never reached.

    Example:
        >>> import dit_probe as dp
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> with dp.trace(pipe, dp.Probe(["sun", "sky"], record=["o_x", "o_c"]), progress=False) as run:
        ...     image = pipe("a sun in the sky", height=16, width=16, num_inference_steps=2).images[0]
        >>> dict(run.dataset.o_x.sizes)
        {'sample': 1, 'step': 2, 'layer': 3, 'image_token': 16, 'head': 2, 'head_dim': 16}
    """
    return Run(model, Combination(*probes), store, mode, concepts, edits, branch, verify, progress)


class Run(Tabular):
    """What `trace` returns; see there."""

    def __init__(
        self,
        model: Any,
        probes: Combination,
        target: Any,
        mode: str | None,
        concepts: Tensor | None,
        edits: Sequence[Edit],
        branch: str,
        verify: str | None,
        progress: bool,
    ) -> None:
        self._anatomy, self._model = find(model), transformer_of(model)
        self._pipe = None if self._model is model else model
        self._probes, self._target, self._mode = probes, target, mode
        self._branch, self._verify, self._progress = branch, verify, progress
        self._concepts = None if concepts is None else concepts.detach()
        self._edits = Edits(edits, self._anatomy.blocks(self._model), type(self._model).__name__)
        self._writer: store.Writer | None = None
        self._generation: Generation | None = None
        self._bar: Any = None
        self._verified = verify is None
        self._hooks = Hooks(self._anatomy, self._model, probes, self._start_forward, self._write)
        self._undo = contextlib.ExitStack()
        self._check()

    def _check(self) -> None:
        if not self._probes.names and (self._probes or not self._edits):
            raise ProbeError("nothing to record: give a probe with record=…, scores=… or observations of its own")
        if self._branch not in (*schema.BRANCHES, "both"):
            raise ProbeError(f"branch={self._branch!r}; choose cond, uncond or both")
        if self._verify not in ("first", None):
            raise ProbeError(f"verify={self._verify!r}; choose 'first' or None")
        self._probes.layers(self._anatomy.blocks(self._model), type(self._model).__name__)
        stream = self._probes.stream
        if stream is None:
            return
        if self._anatomy.no_concepts:
            raise ProbeError(
                f"no concept stream in {type(self._model).__name__}: {self._anatomy.no_concepts}. "
                "Record image and prompt alone: x, p, and q, k, v, o of each"
            )
        if stream.pooled != "prompt" and not self._anatomy.pooled:
            raise ProbeError(f"pooled={stream.pooled!r}: {self._anatomy.family} has no pooled text vector")
        if self._concepts is None:
            if not stream.concepts:
                raise ConceptError(f"{type(stream).__name__} needs concepts; give it a list of words")
            if self._pipe is None:
                raise ConceptError(
                    f"a bare {type(self._model).__name__} cannot encode words; give embeddings "
                    "(trace(..., concepts=tensor of (concept, text width))) or pass the pipeline"
                )
            check_tokens(self._anatomy, self._pipe, stream.concepts, stream.embed, self._anatomy.text_limit(self._pipe))
            return
        check_embeddings(self._concepts, stream.concepts)
        if stream.pooled == "concepts" and self._pipe is None:
            raise ConceptError("pooled='concepts' encodes words with CLIP and needs the pipeline")

    @property
    def dataset(self) -> xr.Dataset:
        """The labelled result, read lazily.

        Raises:
            TraceError: nothing was recorded yet.
        """
        if self._writer is None:
            raise TraceError("nothing was recorded: call the pipeline inside the `with` block")
        return self._writer.dataset()

    @property
    def bytes_written(self) -> int:
        """Uncompressed bytes handed to the store so far."""
        return 0 if self._writer is None else self._writer.bytes_written

    def _table(self) -> Table:
        return planning.described(type(self._model), self._probes, self._target, self.bytes_written)

    def __enter__(self) -> Self:
        if self._model in _ACTIVE:
            raise ModelError("this model is being traced already; combine probes in one trace with |")
        _ACTIVE[self._model] = self
        self._undo.callback(_ACTIVE.pop, self._model, None)
        self._undo.callback(self._hooks.detach)
        self._hooks.attach()
        if self._pipe is not None:
            self._undo.enter_context(pipelines.followed(self._pipe, self._called, self._stepped))
        self._context: list[str] = []
        self._undo.enter_context(pipelines.context_names(self._model, self._context))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        with self._undo:
            # The writer closes first, then everything is undone: an error in one does not spare the others.
            if self._writer is not None:
                self._undo.push(contextlib.closing(self._writer))
            generation, self._generation = self._generation, None
            if kind is None:
                if generation is not None:
                    self._finish(generation, None)
                self._edits.check_made()

    @contextlib.contextmanager
    def generation(self, generation: Generation, limit: int | None = None) -> Iterator[Generation]:
        """Record the transformer calls inside as one generation; a pipeline call enters this by itself."""
        stream = self._probes.stream
        if stream is not None:
            generation.embeddings = self._embed(generation, limit)
            if stream.pooled == "concepts":
                generation.pooled = self._anatomy.pooled_vectors(self._pipe, stream.concepts)
        self._generation = generation
        try:
            yield generation
        finally:
            self._generation = None

    @contextlib.contextmanager
    def recorded(self, generation: Generation, pictures: Sequence[np.ndarray], limit: int | None) -> Iterator[None]:
        """As `generation`, for pictures that are known beforehand; completes the samples."""
        with self.generation(generation, limit):
            yield
            self._finish(generation, pictures)

    def _embed(self, generation: Generation, limit: int | None) -> Tensor:
        stream = self._probes.stream
        assert stream is not None
        if self._concepts is None:
            pipe, words = self._pipe, stream.concepts
            prompts = generation.texts["cond"]
            limit = limit or self._anatomy.text_limit(pipe)
            embeddings = embed_words(self._anatomy, pipe, words, prompts, embed=stream.embed, limit=limit)
        else:
            embeddings = self._concepts if self._concepts.ndim == 3 else self._concepts[None]
        if len(embeddings) not in (1, generation.rows):
            raise ConceptError(f"concept embeddings for {len(embeddings)} samples, but the call has {generation.rows}")
        if not embeddings.isfinite().all():
            raise ConceptError("the concept embeddings are not finite (NaN or overflow in the text encoder)")
        return embeddings

    def _called(self, call: pipelines.Call) -> Any:
        """One call of the pipeline."""
        generation = Generation(call.rows, call.texts, call.labels, call.seeds)
        with self.generation(generation, call.max_sequence_length):
            result = call.run()
            self._finish(generation, pipelines.pictures(result))
        return result

    def _stepped(self) -> None:
        if self._generation is not None:
            self._generation.step += 1
            if self._bar is not None:
                self._bar.update()
                self._bar.set_postfix_str(f"{self.bytes_written / 2**20:.1f} MiB")

    def _finish(self, generation: Generation, pictures: Sequence[np.ndarray] | None) -> None:
        if self._writer is None or not generation.slots:
            if self._writer is None and self._probes:
                raise TraceError("the pipeline ran, but its transformer was never called: nothing was recorded")
            return
        if pictures is not None and len(pictures) == len(generation.slots):
            self._writer.write_images(generation.slots, pictures)
        self._writer.finish(generation.slots)

    def _start_forward(self, arguments: dict[str, Any]) -> Forward | None:
        if self._anatomy.aside(arguments):
            return None
        self._anatomy = self._hooks.settle(arguments)
        rows = self._anatomy.rows(arguments)
        generation = self._generation
        if generation is None:
            generation = self._bare(rows)
        elif self._pipe is None:
            generation = self._next_step(generation, rows)
        calls = self._anatomy.unlabelled_calls
        # Perturbed-attention guidance doubles rows too.
        guided = getattr(self._pipe, "do_classifier_free_guidance", True) is not False
        branches = guidance.branches(generation, rows, self._context, calls, self._anatomy.halves, guided)
        guidance.check(self._branch, generation, branches, self._context, calls)
        places = self._anatomy.places(self._model, arguments)
        if not generation.timesteps:
            self._schedule(generation, arguments)
        blocks = self._anatomy.blocks(self._model)
        edits = self._edits.of(blocks, places, generation.step, len(generation.timesteps), branches)
        edited = Forward(generation.step, {}, {}, arguments, places, edits=edits) if edits else None
        for name in branches:
            if (generation.step, name) in generation.ran:
                raise TraceError(
                    f"the transformer ran twice on the {name} branch in step {generation.step}, and nothing tells the "
                    "calls apart (no cache_context). Trace without this kind of guidance"
                )
            generation.ran.add((generation.step, name))
        if not self._probes:
            return edited
        if not generation.slots:
            self._open(generation, arguments, places)
        elif self._pipe is None and self._writer is not None:
            self._writer.set_timestep(generation.step, self._anatomy.time(arguments))
        writer = self._writer
        assert writer is not None
        if all(writer.skipped(slot) for slot in generation.slots):
            return edited
        chosen = {name: where for name, where in branches.items() if self._branch in (name, "both")}
        wanted = {
            variable.name: variable.layers
            for variable in writer.layout.variables
            if variable.layers is not None and generation.step in (variable.steps or ())
        }
        if not chosen or not (wanted or not self._verified):
            return edited
        known = self._anatomy.fast and not self._verified
        verify = planning.to_verify(writer.layout, blocks) if known else frozenset()
        self._verified = True
        embeddings = generation.embeddings if self._needs_stream(wanted) else None
        return Forward(
            step=generation.step,
            branches=chosen,
            wanted=wanted,
            arguments=arguments,
            places=places,
            embeddings=embeddings,
            pooled=generation.pooled,
            pads=generation.pads,
            through=-1 if embeddings is None else self._probes.reach(blocks),
            verify=verify,
            edits=edits,
        )

    def _needs_stream(self, wanted: Mapping[str, Any]) -> bool:
        needs = {need for probe in self._probes for name, need in probe.variables.items() if name in wanted}
        return any(schema.stream(name) == "c" for need in needs for name in need)

    def _bare(self, rows: int) -> Generation:
        if self._pipe is not None:
            raise TraceError("the pipeline's transformer was called outside of a pipeline call; trace it instead")
        generation = self._generation = Generation(rows, {"cond": [None] * rows}, [""] * rows)
        if self._probes.stream is not None:
            generation.embeddings = self._embed(generation, None)
        return generation

    def _next_step(self, generation: Generation, rows: int) -> Generation:
        """The step after this one, or the first one of the next samples when the probes' steps are through."""
        if generation.step + 1 == len(generation.timesteps):
            self._finish(generation, None)
            return self._bare(rows)
        generation.step += 1
        return generation

    def _schedule(self, generation: Generation, arguments: Mapping[str, Any]) -> None:
        """The steps of a run; of a bare transformer, as many as probes and edits name."""
        if self._pipe is None:
            named = (step for probe in self._probes for step in probe.steps or ())
            unknown = [float("nan")] * (1 + max(self._edits.last_step, *named, 0))
            generation.timesteps, generation.sigmas = [self._anatomy.time(arguments), *unknown[1:]], unknown
        else:
            generation.timesteps, generation.sigmas = pipelines.schedule(self._pipe)
        self._edits.check_steps(len(generation.timesteps))

    def _open(self, generation: Generation, arguments: Mapping[str, Any], places: Places) -> None:
        """Lay out the store at the first call, when all sizes are known, and claim slots for the samples."""
        prompt_tokens = places.prompt_tokens
        stream = self._probes.stream
        layout = planning.layout(
            self._anatomy,
            self._model,
            self._probes,
            grid=self._anatomy.grid(self._model, arguments),
            prompt_tokens=prompt_tokens,
            concepts=0 if stream is None else len(stream.concepts),
            timesteps=generation.timesteps,
            sigmas=generation.sigmas,
            branch=self._branch,
        )
        if self._writer is None:
            self._writer = store.create(self._target, layout, mode=self._mode)
        else:
            self._writer.require(layout)
        samples = []
        for row in range(generation.rows):
            prompt, text = generation.labels[row], generation.texts["cond"][row]
            tokens = [""] * prompt_tokens if text is None else self._tokens(text, prompt_tokens)[0]
            seed = generation.seeds[row] if row < len(generation.seeds) else -1
            samples.append(schema.Sample(prompt, seed, tuple(tokens), () if stream is None else tuple(stream.concepts)))
        if any(probe.observes for probe in self._probes):
            generation.pads = {
                branch: torch.tensor([self._tokens(text, prompt_tokens)[1] for text in texts if text is not None])
                for branch, texts in generation.texts.items()
                if None not in texts
            }
        generation.slots = self._writer.claim(samples)
        if self._progress and self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(desc="trace", unit="step", disable=None)
            self._undo.callback(self._bar.close)
        if self._bar is not None:
            self._bar.total = (self._bar.total or 0) + len(generation.timesteps)

    def _tokens(self, text: str, length: int) -> tuple[list[str], list[bool]]:
        return self._anatomy.tokens(self._pipe, text, length)

    def _write(self, name: str, tensor: Tensor, step: int, layer: int, branch: str) -> None:
        generation, writer = self._generation, self._writer
        assert generation is not None and writer is not None
        label = branch if self._branch == "both" else None
        for slot, row in zip(generation.slots, tensor, strict=True):
            values, nbytes = host(row)
            writer.write(name, values, sample=slot, step=step, layer=layer, branch=label, nbytes=nbytes)


def active(model: nn.Module) -> Run | None:
    """The run that traces a transformer now, if any."""
    return _ACTIVE.get(model)
