"""Attention of a training step on a CPU, with a backward of its own.

Prompts are short, so whole score matrices are cheap; what costs is everything around them. Here the queries
that share a key stay together (nothing is repeated), packed rows are padded and unpadded without autograd,
and the backward computes the scores again instead of keeping them for every layer. float32 throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prad.lm import Ragged


@dataclass(frozen=True, slots=True)
class TrainingKV:
    """A KVTarget of whole sequences, as `PromptKV`. `masks` [groups * L, L] are shared by all layers."""

    ragged: Ragged
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        out: Tensor = _CausalAttention.apply(query, key, value, self, scale, window)  # type: ignore[no-untyped-call]
        return out

    def mask(self, length: int, groups: int, window: int | None) -> Tensor:
        """0 where a query sees a key, else -inf."""
        name = (length, groups, window)
        if name not in self.masks:
            at = torch.arange(length, device=self.ragged.restore.device)
            distance = at[:, None] - at
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            hidden = torch.zeros(length, length, device=at.device).masked_fill_(~seen, -torch.inf)
            self.masks[name] = hidden.repeat(groups, 1)
        return self.masks[name]


class _Padded(NamedTuple):
    """A bucket of n sequences: q [n * kv_heads, groups * L, dim], k and v [n * kv_heads, L, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    """Softmax of the scores [n * kv_heads, groups * L, L]."""


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: TrainingKV,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """query [T, heads, dim], key and value [T, kv_heads, dim]; returns [T, heads, value_dim]."""
        context.save_for_backward(query, key, value)
        context.kv, context.scale, context.window = kv, scale, window
        heads, kv_heads = query.shape[1], key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            places = [
                _by_place(p.weights @ p.v, heads, kv_heads)
                for p in _buckets(query, key, value, kv, scale, window)
            ]
            return torch.cat(places).index_select(0, kv.ragged.restore).to(query.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = context.saved_tensors
        kv, scale, heads, kv_heads = context.kv, context.scale, query.shape[1], key.shape[1]
        restore = kv.ragged.restore
        places = sum(bucket.rows.numel() for bucket in kv.ragged.buckets)
        # padding lies behind what is restored: its gradient is zero, and so is all that follows from it
        outer = gradient.new_zeros(places, *gradient.shape[1:], dtype=torch.float32)
        outer.index_copy_(0, restore, gradient.float())
        grads: tuple[list[Tensor], ...] = ([], [], [])
        start = 0
        for p, bucket in zip(
            _buckets(query, key, value, kv, scale, context.window), kv.ragged.buckets, strict=True
        ):
            stop = start + bucket.rows.numel()
            g = _by_head(outer[start:stop].view(*bucket.rows.shape, heads, -1), kv_heads)
            start = stop
            inner = g @ p.v.mT
            inner -= torch.linalg.vecdot(inner, p.weights).unsqueeze(-1)
            inner *= p.weights
            inner *= scale
            grads[0].append(_by_place(inner @ p.k, heads, kv_heads))
            grads[1].append(_by_place(inner.mT @ p.q, kv_heads, kv_heads))
            grads[2].append(_by_place(p.weights.mT @ g, kv_heads, kv_heads))
        packed = (torch.cat(each).index_select(0, restore).to(query.dtype) for each in grads)
        return (*packed, None, None, None)


def _buckets(
    query: Tensor, key: Tensor, value: Tensor, kv: TrainingKV, scale: float, window: int | None
) -> Iterator[_Padded]:
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    for bucket in kv.ragged.buckets:
        q, k, v = (
            _by_head(
                x.index_select(0, bucket.rows.flatten()).float().view(*bucket.rows.shape, *x.shape[1:]),
                kv_heads,
            )
            for x in (query, key, value)
        )
        mask = kv.mask(bucket.rows.shape[1], groups, window)
        yield _Padded(q, k, v, torch.baddbmm(mask, q, k.mT, alpha=scale).softmax(dim=-1))


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[n, L, heads, dim] to [n * kv_heads, groups * L, dim], groups = heads / kv_heads."""
    n, length, heads, dim = x.shape
    split = x.view(n, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return split.reshape(n * kv_heads, -1, dim)


def _by_place(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """[n * kv_heads, groups * L, dim] to [n * L, heads, dim]."""
    groups = heads // kv_heads
    split = x.view(-1, kv_heads, groups, x.shape[1] // groups, x.shape[2]).permute(0, 3, 1, 2, 4)
    return split.reshape(-1, heads, x.shape[2])
