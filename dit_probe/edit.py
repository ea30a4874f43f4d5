"""Edits: change an activation while the model runs.

A map says what goes together with a concept; an edit says what depends on it. The model goes on with the edited
activation, and what a probe records at the same place is the edited one: what the model consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_probe import schema
from dit_probe.anatomy import Block, Places
from dit_probe.errors import EditError
from dit_probe.probe import layers_of

ATTENTION_SITES = tuple(f"{letter}_{stream}" for letter in "qkvo" for stream in "xp")
"""What the attention operation consumes and produces, (row, token, head, head_dim)."""
RESIDUAL_SITES = ("x", "p")
"""Residual streams as a block hands them on, (row, token, width)."""
SITES = (*ATTENTION_SITES, *RESIDUAL_SITES, "attends")


@dataclass(frozen=True)
class Point:
    """Where an edit is applied.

    Attributes:
        site: of `SITES`.
        layer, kind, step, branch: labels, as a probe's are.
        image, prompt: where their tokens stand in the joint sequence.
    """

    site: str
    layer: int
    kind: str
    step: int
    branch: str
    image: slice
    prompt: slice


@dataclass(frozen=True)
class Edit:
    """A change of one activation.

    Attributes:
        site: ``q_x k_x v_x o_x q_p k_p v_p o_p`` (row, token, head, head_dim), as the attention operation consumes and
            produces them; ``x p`` (row, token, width), as a block hands them on; or ``attends``, (row, 1, query, key)
            bool over the joint sequence: True where a query may look, which the model's own mask can only narrow.
        function: takes the activation of the branch's rows and a `Point`, and returns one of the same shape. Where key
            heads serve several query heads each, ``k`` and ``v`` have the former.
        layers: as a probe's: None or "joint", "single", "all", or indices, negative ones from the last joint block.
        steps: step indices, negative ones from the last; None: every step.
        branch: "cond", "uncond" or "both" halves of classifier-free guidance.

    Raises:
        EditError: a site or branch that does not exist, or a function that cannot be called.

    Example:
        >>> import dit_probe as dp
        >>> from dit_probe.testing import tiny_pipeline
        >>> pipe = tiny_pipeline("flux")
        >>> silence = dp.Edit("v_p", lambda v, point: torch.zeros_like(v), layers=[1])
        >>> with dp.trace(pipe, edits=[silence], progress=False):
        ...     image = pipe("a sun in the sky", height=16, width=16, num_inference_steps=2).images[0]
    """

    site: str
    function: Callable[[Tensor, Point], Tensor]
    layers: Sequence[int] | str | None = None
    steps: Sequence[int] | None = None
    branch: str = "cond"

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise EditError(f"site={self.site!r}; edits are made at {', '.join(SITES)}")
        if self.branch not in (*schema.BRANCHES, "both"):
            raise EditError(f"branch={self.branch!r}; choose cond, uncond or both")
        if not callable(self.function):
            raise EditError(f"function={self.function!r}; give one that takes an activation and a Point")
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if isinstance(value, int):
                object.__setattr__(self, name, (value,))

    def apply(self, activation: Tensor, rows: slice, point: Point) -> Tensor:
        """The activation of all rows with these ones edited; the one that was given is left alone.

        Raises:
            EditError: the function returns another shape.
        """
        before = activation[rows]
        after = self.function(before, point)
        if not isinstance(after, Tensor) or after.shape != before.shape:
            found = tuple(after.shape) if isinstance(after, Tensor) else type(after).__name__
            raise EditError(
                f"the edit of {self.site} at layer {point.layer}, step {point.step} returned {found}; "
                f"expected a tensor {tuple(before.shape)}"
            )
        changed = activation.clone()
        changed[rows] = after.to(activation)
        return changed


class Edits:
    """All edits of a trace.

    Args:
        edits: in the order in which they are made where they meet.
        blocks: of the model.
        model: its class.

    Raises:
        EditError: something else than an edit.
        SiteError: a layer that does not exist.
    """

    def __init__(self, edits: Sequence[Edit], blocks: Sequence[Block], model: str) -> None:
        if wrong := [edit for edit in edits if not isinstance(edit, Edit)]:
            raise EditError(f"edits holds {wrong[0]!r}; give a list of dit_probe.Edit")
        self._edits = [(edit, layers_of(edit.layers, blocks, model)) for edit in edits]
        self._made: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._edits)

    @property
    def last_step(self) -> int:
        """The last step that is named, for runs that do not say how many there are."""
        return max((step for edit, _ in self._edits for step in edit.steps or ()), default=0)

    def check_steps(self, count: int) -> None:
        """Refuse steps that a run does not have.

        Raises:
            EditError: a step is never reached.
        """
        for edit, _ in self._edits:
            if never := [step for step in edit.steps or () if not -count <= step < count]:
                raise EditError(
                    f"the edit of {edit.site}: step {never[0]} is never reached; this run has {count} steps "
                    f"(0-{count - 1}). Raise num_inference_steps or drop it from steps"
                )

    def of(
        self, blocks: Sequence[Block], places: Places, step: int, steps: int, branches: Mapping[str, slice]
    ) -> dict[int, BlockEdits]:
        """Edits of one call of the transformer, by layer."""
        found: dict[int, BlockEdits] = {}
        for block in blocks:
            mine = [
                (edit, name, rows)
                for edit, layers in self._edits
                if block.layer in layers and (edit.steps is None or step in {label % steps for label in edit.steps})
                for name, rows in branches.items()
                if edit.branch in (name, "both")
            ]
            if mine:
                found[block.layer] = BlockEdits(block, places, step, mine, self._made)
        return found

    def check_made(self) -> None:
        """Refuse to end a run in which an edit was never made.

        Raises:
            EditError: one was not.
        """
        for edit, layers in self._edits:
            if id(edit) not in self._made:
                raise EditError(
                    f"the edit of {edit.site} at layers {schema.ranges(sorted(layers))} (branch={edit.branch!r}) was "
                    "never made: nothing ran there. Without classifier-free guidance there is no uncond branch"
                )


@dataclass(frozen=True)
class BlockEdits:
    """The edits of one block in one call of the transformer.

    Attributes:
        block: the block.
        places: of image and prompt in the joint sequence.
        step: label.
        edits: each with the name and the rows of its branch.
        made: of those that were, their id.
    """

    block: Block
    places: Places
    step: int
    edits: Sequence[tuple[Edit, str, slice]]
    made: set[int]

    def on(self, *sites: str) -> bool:
        """Is there an edit of one of these sites?"""
        return any(edit.site in sites for edit, _, _ in self.edits)

    @property
    def on_attention(self) -> bool:
        """Does any of them change the attention call?"""
        return self.on(*ATTENTION_SITES, "attends")

    def check_attention(self, changed: int) -> None:
        """Refuse a block whose attention was not one call over all of its tokens.

        Raises:
            EditError: so many calls were changed, and not one.
        """
        if changed != 1:
            raise EditError(
                f"{self.block.path}: {changed} attention calls over all {self.places.total} tokens, where an edit "
                "changes one: this model attends row by row or in stretches. Edit its residual streams, 'x' or 'p'"
            )

    def joint(self, letter: str, tensor: Tensor) -> Tensor:
        """q, k, v or o of the joint sequence, image and prompt edited, (row, token, head, head_dim)."""
        for stream, at in (("x", self.places.image), ("p", self.places.prompt)):
            if self.on(site := f"{letter}_{stream}"):
                after = self._edited(site, tensor[:, at])
                tensor = tensor.clone()
                tensor[:, at] = after
        return tensor

    def mask(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """The attention call's mask, narrowed to where queries may look.

        Raises:
            EditError: a query is left without a key.
        """
        if not self.on("attends"):
            return mask
        total = self.places.total
        keep = torch.ones(q.shape[0], 1, total, total, dtype=torch.bool, device=q.device)
        keep = self._edited("attends", keep)
        if not keep.any(-1).all():
            raise EditError(
                f"{self.block.path}: after the edit a query may look at no key, and its attention would be NaN. "
                "Leave every token at least itself"
            )
        if mask is None:
            return keep
        return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)

    def residuals(self, streams: Mapping[str, Tensor | None], output: Any) -> None:
        """Edit the residual streams of a block's output where they lie.

        Raises:
            EditError: the block hands on no such stream, or one that is no part of its output.
        """
        for site, tensor in streams.items():
            if not self.on(site):
                continue
            if tensor is None:
                raise EditError(
                    f"no {site!r} after layer {self.block.layer} ({self.block.path}): the last block has no text "
                    "output (context_pre_only). Edit 'o_p' or 'v_p' there, or drop the layer"
                )
            parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
            storage = tensor.untyped_storage().data_ptr()
            shared = [part for part in parts if part.untyped_storage().data_ptr() == storage]
            if not shared:
                raise EditError(f"{self.block.path}: {site!r} is no part of what the block hands on; edit 'o_{site}'")
            if not any(part is tensor for part in shared):  # the same view, made where gradients are on if they are
                tensor = shared[0].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            # In place, for this is how the next block gets it; gradients need what the function saw.
            tensor.copy_(self._edited(site, tensor.clone() if torch.is_grad_enabled() else tensor))

    def _edited(self, site: str, activation: Tensor) -> Tensor:
        block, image, prompt = self.block, self.places.image, self.places.prompt
        for edit, branch, rows in self.edits:
            if edit.site == site:
                point = Point(site, block.layer, block.kind, self.step, branch, image, prompt)
                activation = edit.apply(activation, rows, point)
                self.made.add(id(edit))
        return activation
