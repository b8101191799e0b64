"""Attention over packed sequences, and its registration with transformers.

Every model that transformers computes runs with the implementation registered here. transformers builds no
mask for it, so nothing but the sequence lengths decides who sees whom: packed prompts of different tenants
cannot attend to each other. A prompt pass asks `causal_attention` for the kernels' or torch's, whichever is
the faster way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prad.lm.errors import UnsupportedModelError
from prad.lm.kernels import Kernels, PromptSpan

NAME = "prad_packed"

_BUCKET = 32  # tokens; sequences whose lengths round up to the same multiple share an attention call

_PLAIN_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
)


class CausalAttention(Protocol):
    """Causal attention within each of several packed sequences: made once per pass, used by every layer."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """query [T, heads, key_dim], key [T, kv_heads, key_dim], value [T, kv_heads, value_dim]; returns
        [T, heads, value_dim].

        `stored`: keys and values [slots, kv_heads, dim], where the tokens lie that sequences go on from.
        """
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What sequences of one attention call have stored before this pass.

    slots [sequences, longest context]: where among the stored tokens theirs lie (padding repeats a
    sequence's last one); lengths [sequences] are never 0. `masks` keeps, per window, the mask that all
    layers share.
    """

    slots: Tensor
    lengths: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Sequence[Tensor], device: torch.device | str) -> "Context":
        longest = max(len(s) for s in slots)
        padded = [torch.cat([s, s[-1:].expand(longest - len(s))]) for s in slots]
        return cls(torch.stack(padded), torch.tensor([len(s) for s in slots], device=device))

    def mask(self, new: int, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive, [sequences, 1, new * groups, longest context + new]: for each of `new` queries, times
        the heads that share a key, what it sees of the context and of the new tokens."""
        if window not in self.masks:
            at = torch.arange(new, device=self.slots.device)
            before = torch.arange(self.slots.shape[1], device=self.slots.device)
            lengths = self.lengths[:, None, None]
            key_at = torch.cat([before.expand(len(lengths), 1, -1), lengths + at], dim=-1)
            query_at = lengths + at[:, None]
            seen = key_at <= query_at
            seen[:, :, : len(before)] &= before < lengths  # behind a shorter context lies padding
            if window is not None:
                seen &= key_at > query_at - window
            hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self.masks[window] = hidden.repeat_interleave(groups, dim=1).unsqueeze(1)
        return self.masks[window]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, which share one padded attention call.

    rows [sequences, longest]: the packed row of every padded place (padding repeats a sequence's last row);
    `context` is None if they begin in this pass.
    """

    rows: Tensor
    context: Context | None


@dataclass(frozen=True, slots=True)
class Ragged:
    """Attention on torch: sequences of similar length share a call.

    restore [T]: where each packed row lies among all padded places of all buckets.
    """

    buckets: tuple[Bucket, ...]
    restore: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        contexts: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> "Ragged":
        """`contexts`: of the sequences that go on from stored tokens, the slots of these, in order."""
        starts = list(accumulate(lengths, initial=0))
        alike: dict[tuple[int, int], list[int]] = {}
        for sequence, length in enumerate(lengths):
            stored = len(contexts[sequence]) if sequence in contexts else 0
            # a context may be padded to its double: what lies behind its end is cheap
            alike.setdefault((-(-length // _BUCKET), stored.bit_length()), []).append(sequence)
        buckets, restore, place = [], [0] * starts[-1], 0
        for (_, stored), sequences in alike.items():
            longest = max(lengths[s] for s in sequences)
            rows = [[starts[s] + min(i, lengths[s] - 1) for i in range(longest)] for s in sequences]
            context = Context.of([contexts[s] for s in sequences], device) if stored else None
            buckets.append(Bucket(torch.tensor(rows, device=device), context))
            for s in sequences:
                restore[starts[s] : starts[s + 1]] = range(place, place + lengths[s])
                place += longest
        return cls(tuple(buckets), torch.tensor(restore, device=device))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """On torch. Padding lies behind a sequence's tokens, where causality hides it."""
        dtype = query.dtype
        if query.requires_grad and query.device.type == "cpu":
            # torch's backward of CPU attention is several times slower in bf16 than in float32
            query, key, value = query.float(), key.float(), value.float()
        groups = query.shape[1] // key.shape[1]
        outputs = []
        for bucket in self.buckets:
            q, k, v = (
                x.index_select(0, bucket.rows.flatten()).view(*bucket.rows.shape, *x.shape[1:])
                for x in (query, key, value)
            )
            if bucket.context is None:
                out = _from_the_start(q, k, v, groups, scale, window)
            else:
                assert stored is not None
                out = _going_on(q, k, v, groups, scale, window, bucket.context, stored)
            outputs.append(out.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.restore).to(dtype)


def _from_the_start(q: Tensor, k: Tensor, v: Tensor, groups: int, scale: float, window: int | None) -> Tensor:
    """q [n, L, heads, key_dim], k [n, L, kv_heads, key_dim], v likewise -> [n, L, heads, value_dim]."""
    if groups > 1:  # expanding first lets the CPU take its flash kernel, which knows no grouped heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    length = q.shape[1]
    mask = None
    if window is not None and length > window:
        at = torch.arange(length, device=q.device)
        distance = at[:, None] - at[None, :]
        mask = (distance >= 0) & (distance < window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def _going_on(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: int,
    scale: float,
    window: int | None,
    context: Context,
    stored: tuple[Tensor, Tensor],
) -> Tensor:
    """As `_from_the_start`, of sequences whose earlier tokens are stored."""
    sequences, new, heads, dim = q.shape
    slots = context.slots
    k, v = (
        torch.cat([pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:]), x], dim=1)
        for pool, x in zip(stored, (k, v), strict=True)
    )
    # the queries of one KV head share its keys: a long context is not copied for each of them
    by_key = q.view(sequences, new, heads // groups, groups, dim).transpose(1, 2)
    out = scaled_dot_product_attention(
        by_key.reshape(sequences, heads // groups, new * groups, dim),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=context.mask(new, groups, window, q.dtype),
        scale=scale,
    )
    by_query = out.reshape(sequences, heads // groups, new, groups, -1).transpose(1, 2)
    return by_query.reshape(sequences, new, heads, -1)


def causal_attention(
    lengths: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    contexts: Mapping[int, Tensor] = MappingProxyType({}),
    kernels: Kernels | None = None,
    answered: Sequence[int] = (),
) -> CausalAttention:
    """Over sequences of these lengths, packed end to end; by `kernels` where they are the faster way.

    `contexts`: of the sequences that go on from stored tokens, the slots of these, in order. `answered`: how
    many of each one's tokens, from the last one back, a decode step has computed before, which the kernels
    compute as it did, to the bit; empty: none.
    """
    if kernels is None:
        return Ragged.of(lengths, device, contexts)
    return _KernelAttention(kernels, lengths, contexts, answered)


class _KernelAttention:
    """Nothing is padded or gathered. On torch where a gradient is wanted."""

    def __init__(
        self,
        kernels: Kernels,
        lengths: Sequence[int],
        contexts: Mapping[int, Tensor],
        answered: Sequence[int],
    ) -> None:
        self._kernels = kernels
        self._lengths = lengths
        self._contexts = contexts
        self._answered = answered

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if torch.is_grad_enabled() and query.requires_grad:
            return self._on_torch.attend(query, key, value, scale, window, stored)
        return self._kernels.prompt_attention(query, key, value, self._spans, stored, scale, window)

    @cached_property
    def _spans(self) -> Any:
        return prompt_spans(self._lengths, self._contexts, self._answered)

    @cached_property
    def _on_torch(self) -> Ragged:
        return Ragged.of(self._lengths, contexts=self._contexts)


def prompt_spans(lengths: Sequence[int], contexts: Mapping[int, Tensor], answered: Sequence[int] = ()) -> Any:
    """The array of `PromptSpan` that the kernel reads; the contexts must outlive it."""
    starts = accumulate(lengths[:-1], initial=0)
    slots = [contexts.get(i) for i in range(len(lengths))]
    spans = [
        PromptSpan(start=start, rows=rows, slots=s, stored=0 if s is None else len(s), answered=last)
        for start, rows, s, last in zip(starts, lengths, slots, answered or [0] * len(lengths), strict=True)
    ]
    return (PromptSpan * len(spans))(*spans)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float, window: int | None
) -> Tensor:
    """One query per sequence against its own padded context.

    query [B, heads, key_dim], key [B, L, kv_heads, key_dim], value [B, L, kv_heads, value_dim],
    lengths [B] valid context tokens, the query's own included. Returns [B, heads, value_dim].
    """
    at = torch.arange(key.shape[1], device=query.device)
    seen = at < lengths[:, None]
    if window is not None:
        seen &= at >= lengths[:, None] - window
    batch, heads, dim = query.shape
    kv_heads = key.shape[2]
    # the queries of one KV head share its keys: [B, kv_heads, groups, dim] x [B, kv_heads, L, dim]
    out = scaled_dot_product_attention(
        query.view(batch, kv_heads, heads // kv_heads, dim),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=seen[:, None, None, :],
        scale=scale,
    )
    return out.reshape(batch, heads, value.shape[-1])


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv_target: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query [1, heads, T, key_dim], key and value [1, kv_heads, T, dim]."""
    unknown = sorted(k for k, v in extra.items() if v is not None and k not in _PLAIN_ARGUMENTS)
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "a mask of its own"
        raise UnsupportedModelError(
            f"{type(module).__name__} wants {what} in its attention; only plain and sliding-window "
            "attention over stored K and V can be served"
        )
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(
            f"{type(module).__name__} lets tokens attend to later ones; KV that is handed over cannot change"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out: Tensor = kv_target.attend(module.layer_idx, q, k, v, scale, sliding_window)
    return out.unsqueeze(0), None


def register() -> None:
    """Makes transformers know the implementation; imports it, which takes seconds."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
