"""What the attention operation saw: a tap on the call, open only while an attention module runs.

Families either call ``F.scaled_dot_product_attention`` themselves or go through diffusers' attention backends, whose
kernels need not call it at all. Both doors are watched; what is reported is the outermost call.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_probe.errors import TraceError


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention operation, eqs. (1)-(5).

    Attributes:
        q, k, v: (row, token, head, head_dim), after projection, qk-norm and rotary embedding.
        o: (row, token, head, head_dim), before the output projection.
        mask: as given to the call (broadcastable to (row, head, query, key)), or None.
        scale: factor on the logits.
        kernel: makes the call anew on other q, k and v, (row, token, head, head_dim), with the function and whatever
            else it was given; None of a call that is put together from several.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mask: Tensor | None
    scale: float
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def again(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """O of the same call on other vectors, as many as its own: by the kernel that made it, for kernels differ.

        PyTorch's flash attention on a CPU approximates exp to 20 bits; on a trained model in float32 it is up to 1.4e-5
        of the largest value away from others.
        """
        if self.kernel is None:
            return attend(q, k, v, scale=self.scale, mask=self.mask)
        with _unheard():
            return self.kernel(q, k, v)


class Changes(Protocol):
    """What changes an attention call while it is made."""

    def joint(self, letter: str, tensor: Tensor) -> Tensor:
        """q, k, v or o in place of the one given, (row, token, head, head_dim)."""
        ...

    def mask(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """The mask in place of the one given."""
        ...


class AttentionTap:
    """Collects the attention calls that the thread makes between `open` and `close`; taps may be nested.

    Attributes:
        calls: as they were made, changes included.
        unchanged: the calls over all tokens as they would have been made, where that was asked for.
        changed: how many calls were changed.
    """

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.unchanged: list[AttentionCall] = []
        self.changed = 0
        self._changes: Changes | None = None
        self._shape: tuple[int, int] | None = None
        self._both = False
        self._depth = 0
        self._mode: TorchFunctionMode | None = None

    def open(self, changes: Changes | None = None, shape: tuple[int, int] | None = None, *, both: bool = False) -> None:
        """Start listening.

        Args:
            changes: made to calls in which all tokens of all rows attend to each other.
            shape: so many (rows, tokens).
            both: make these calls unchanged as well.
        """
        self.forget()
        self.changed = 0
        self._changes, self._shape, self._both = changes, shape, both
        self._depth = 0
        self._mode = _FunctionMode(self)
        self._mode.__enter__()
        _open_taps().append(self)
        _BACKENDS.watch()

    def forget(self) -> None:
        """Let go of the calls, whose tensors the model itself no longer has."""
        self.calls.clear()
        self.unchanged.clear()

    def close(self) -> None:
        """Stop listening and put everything back."""
        if self._mode is None:
            return
        _BACKENDS.release()
        _open_taps().remove(self)
        self._mode.__exit__(None, None, None)
        self._mode = None

    def observe(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, heads_first: bool
    ) -> Any:
        """Make an attention call and keep it, unless it is made inside another one."""
        if self._mode is None:  # closed since: the kernel that another tap kept leads through this one
            return function(*args, **kwargs)
        outermost = self._depth == 0
        changes = self._changes if outermost and _shape(args, kwargs, heads_first) == self._shape else None
        self._depth += 1
        try:
            if changes is not None:
                if self._both:
                    with torch.no_grad():  # looked at and left: checkpointing counts what is kept for gradients
                        self.unchanged.append(_call(function, args, kwargs, function(*args, **kwargs), heads_first))
                args, kwargs = _changed(changes, args, kwargs, heads_first)
            result = function(*args, **kwargs)
        finally:
            self._depth -= 1
        if changes is not None:
            self.changed += 1
            o, *rest = result if isinstance(result, tuple) else (result,)
            o = _turned(changes.joint("o", _turned(o, heads_first)), heads_first)
            result = (o, *rest) if isinstance(result, tuple) else o
        if outermost:
            self.calls.append(_call(function, args, kwargs, result, heads_first))
        return result


class _Backends:
    """diffusers' table of attention kernels, wrapped while any tap of any thread is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._replaced: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def watch(self) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1:
                table = _table()
                self._replaced = {name: (function, _listening(function)) for name, function in table.items()}
                table.update({name: wrapped for name, (_, wrapped) in self._replaced.items()})

    def release(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                table = _table()
                table.update({n: original for n, (original, ours) in self._replaced.items() if table.get(n) is ours})
                self._replaced = {}


_BACKENDS = _Backends()
_LOCAL = threading.local()


def _open_taps() -> list[AttentionTap]:
    return _LOCAL.__dict__.setdefault("taps", [])


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What is computed beside the model is no call of the model's, to the tap of another trace neither."""
    taps = [*_open_taps()]
    for tap in taps:
        tap._depth += 1
    try:
        yield
    finally:
        for tap in taps:
            tap._depth -= 1


def _table() -> dict[Any, Callable[..., Any]]:
    # The dispatcher's own name for its table of kernels; nothing public lies on the path of every backend.
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry._backends


def _listening(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that tells the taps of the thread that calls it."""

    def backend(*args: Any, **kwargs: Any) -> Any:
        call = function
        for tap in _open_taps():
            call = functools.partial(_told, tap, call)
        return call(*args, **kwargs)

    return backend


def _told(tap: AttentionTap, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tap.observe(function, args, kwargs, heads_first=False)


def joint_call(calls: Sequence[AttentionCall], tokens: int, where: str) -> AttentionCall:
    """The one call in which all `tokens` attend to each other.

    Raises:
        TraceError: there was none, or more than one.
    """
    found = [call for call in calls if call.q.shape[1] == call.k.shape[1] == tokens]
    if len(found) == 1:
        return found[0]
    shapes = ", ".join(f"{call.q.shape[1]} queries on {call.k.shape[1]} keys" for call in calls) or "none"
    raise TraceError(
        f"{where}: expected one attention call over {tokens} tokens, saw {shapes}. The attention backend "
        "bypasses both F.scaled_dot_product_attention and diffusers' dispatcher, or splits or caches the sequence; "
        "choose another one (transformer.set_attention_backend('native'))"
    )


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale) v, eqs. (4) and (5), for (row, token, head, head_dim)."""
    heads_first = (part.transpose(1, 2) for part in (q, k, v))
    with _unheard():
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)


class _FunctionMode(TorchFunctionMode):
    def __init__(self, tap: AttentionTap) -> None:
        super().__init__()
        self._tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._tap.observe(func, args, kwargs, heads_first=True)
        return func(*args, **kwargs)


_NAMES = ("query", "key", "value", "attn_mask")


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an attention call by name; torch and all backends agree about the first four."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def _turned(tensor: Tensor, heads_first: bool) -> Tensor:
    """Between the call's own order and (row, token, head, head_dim)."""
    return tensor.transpose(1, 2) if heads_first else tensor


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any], heads_first: bool) -> tuple[int, int] | None:
    """Rows, and tokens that attend to each other; None where queries and keys are not of the same tokens."""
    given = _named(args, kwargs)
    q, k = (_turned(given[name], heads_first).shape[:2] for name in _NAMES[:2])
    return (q[0], q[1]) if q == k else None


def _changed(changes: Changes, args: tuple[Any, ...], kwargs: dict[str, Any], heads_first: bool) -> Any:
    """Arguments of an attention call with q, k, v and mask changed."""
    given = _named(args, kwargs)
    for letter, name in zip("qkv", _NAMES, strict=False):
        given[name] = _turned(changes.joint(letter, _turned(given[name], heads_first)), heads_first)
    given["attn_mask"] = changes.mask(given.get("attn_mask"), _turned(given["query"], heads_first))
    return _packed(given, args, kwargs)


def _packed(given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of `_named` as a call had them, by position or by name."""
    by_name = {name: given[name] for name in _NAMES[len(args) :] if given.get(name) is not None}
    return (*(given[name] for name in _NAMES[: len(args)]), *args[4:]), {**kwargs, **by_name}


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, heads_first: bool
) -> AttentionCall:
    given = _named(args, kwargs)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        others = dict(zip(_NAMES, (_turned(vector, heads_first) for vector in (q, k, v)), strict=False))
        mine, named = _packed(given | others, args, kwargs)
        again = function(*mine, **named)
        return _turned(again[0] if isinstance(again, tuple) else again, heads_first)

    o = result[0] if isinstance(result, tuple) else result
    q, k, v, o = (_turned(tensor, heads_first) for tensor in (given["query"], given["key"], given["value"], o))
    scale = given.get("scale")
    if k.shape[2] != q.shape[2]:  # grouped-query attention: every key head serves several query heads
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], dim=2) for part in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return AttentionCall(q, k, v, o, given.get("attn_mask"), scale, kernel)


def attention_weights(call: AttentionCall, rows: slice, head: int) -> Tensor:
    """softmax(q k^T scale + mask) of one head of a call, float32 (row, query, key): what the operation itself gave.

    A query that the mask hides from every key has no weights, as torch has it: zeros.
    """
    q, k = (part[rows, :, head].float() for part in (call.q, call.k))
    logits = q @ k.transpose(1, 2) * call.scale
    if call.mask is not None:
        mask = call.mask[(None,) * (4 - call.mask.ndim)]
        mask = mask[rows] if mask.shape[0] > 1 else mask
        mask = mask[:, head if mask.shape[1] > 1 else 0]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0.0)
