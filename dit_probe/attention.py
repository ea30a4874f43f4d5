"""What the attention operation saw: a tap on the call, open only while an attention module runs.

Families either call ``F.scaled_dot_product_attention`` themselves or go through diffusers' attention backends, whose
kernels need not call it at all. Both doors are watched; what is reported is the outermost call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mask: Tensor | None
    scale: float


class AttentionTap:
    """Collects the attention calls that the thread makes between `open` and `close`; taps may be nested."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self._depth = 0
        self._mode: TorchFunctionMode | None = None

    def open(self) -> None:
        """Start listening."""
        self.calls.clear()
        self._depth = 0
        self._mode = _FunctionMode(self)
        self._mode.__enter__()
        _open_taps().append(self)
        _BACKENDS.watch()

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
        outermost = self._depth == 0
        self._depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._depth -= 1
        if outermost:
            self.calls.append(_call(args, kwargs, result, heads_first))
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


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, heads_first: bool) -> AttentionCall:
    names = ("query", "key", "value", "attn_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    o = result[0] if isinstance(result, tuple) else result
    tensors = [given["query"], given["key"], given["value"], o]
    if heads_first:
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    scale = given.get("scale")
    q, k, v, o = tensors
    if k.shape[2] != q.shape[2]:  # grouped-query attention: every key head serves several query heads
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], dim=2) for part in (k, v))
    tensors = [q, k, v, o]
    return AttentionCall(*tensors, mask=given.get("attn_mask"), scale=q.shape[-1] ** -0.5 if scale is None else scale)


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
