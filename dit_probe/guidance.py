"""Classifier-free guidance: which rows of a transformer call belong to which branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dit_probe import schema
from dit_probe.errors import TraceError
from dit_probe.pipelines import Generation


def branches(
    generation: Generation,
    rows: int,
    context: Sequence[str],
    unlabelled_calls: Sequence[str],
    halves: Sequence[str] = ("uncond", "cond"),
    guided: bool = True,
) -> dict[str, slice]:
    """Branch to rows, for one transformer call.

    Args:
        generation: the pipeline call.
        rows: rows of the transformer call.
        context: names of the ``cache_context`` that are open, the innermost last.
        unlabelled_calls: branches of the calls of a step, in order, where the pipeline does not name them.
        halves: branches of the two halves of a call whose rows are doubled, in order.
        guided: False where the pipeline says that it runs without classifier-free guidance.

    Raises:
        TraceError: neither one row a sample nor two.
    """
    name = context[-1] if context else None
    if name in schema.BRANCHES and rows == generation.rows:
        return {name: slice(0, rows)}
    if rows == generation.rows:
        earlier = sum(step == generation.step for step, _ in generation.ran)
        return {unlabelled_calls[min(earlier, len(unlabelled_calls) - 1)]: slice(0, rows)}
    if rows == 2 * generation.rows and guided:
        return dict(zip(halves, (slice(0, rows // 2), slice(rows // 2, rows)), strict=True))
    raise TraceError(
        f"the transformer was called on {rows} rows for {generation.rows} samples; only classifier-free guidance that "
        "doubles the batch, or calls twice, is understood, not perturbed-attention guidance and its like. Switch it off"
    )


def check(
    wanted: str,
    generation: Generation,
    found: Mapping[str, slice],
    context: Sequence[str],
    unlabelled_calls: Sequence[str],
) -> None:
    """Refuse early to wait for an unconditional half that will not come.

    Raises:
        TraceError: `wanted` is not "cond", and guidance is off or not understood.
    """
    if wanted == "cond" or "uncond" in found:
        return
    two_calls = (bool(context) and context[-1] in schema.BRANCHES) or len(unlabelled_calls) > 1
    # Where guidance is two calls, the second of the step before must have come.
    late = generation.step > 0 and (generation.step - 1, "uncond") not in generation.ran
    if late or not two_calls:
        raise TraceError(
            f"branch={wanted!r}, but this call runs without classifier-free guidance (or tells its halves "
            "apart in no way that is understood). Raise guidance_scale, give Flux a negative_prompt and "
            "true_cfg_scale, or record branch='cond'"
        )
