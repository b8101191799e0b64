"""Attention over packed sequences, and its registration with transformers.

Every model runs with the implementation registered here. transformers builds no mask for it, so nothing
but the sequence lengths decides who sees whom: packed prompts of different tenants cannot attend to each
other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from prad.lm.errors import UnsupportedModelError

NAME = "prad_packed"

_BUCKET = 32  # tokens; sequences whose lengths round up to the same multiple share an attention call

_PLAIN_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Geometry of packed sequences, computed once per pass and used by every layer.

    Sequences of similar length share one padded attention call. buckets: for each call the packed row of
    every padded place [sequences, longest] (padding repeats a sequence's last row); restore [T]: where each
    packed row lies among all padded places.
    """

    buckets: tuple[Tensor, ...]
    restore: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Ragged":
        starts = list(accumulate(lengths, initial=0))
        alike: dict[int, list[int]] = {}
        for sequence, length in enumerate(lengths):
            alike.setdefault(-(-length // _BUCKET), []).append(sequence)
        buckets, restore, place = [], [0] * starts[-1], 0
        for sequences in alike.values():
            longest = max(lengths[s] for s in sequences)
            buckets.append([[starts[s] + min(i, lengths[s] - 1) for i in range(longest)] for s in sequences])
            for s in sequences:
                restore[starts[s] : starts[s + 1]] = range(place, place + lengths[s])
                place += longest
        return cls(
            tuple(torch.tensor(b, device=device) for b in buckets), torch.tensor(restore, device=device)
        )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, ragged: Ragged, scale: float, window: int | None
) -> Tensor:
    """Causal attention within each of several packed sequences.

    query [T, heads, key_dim], key [T, kv_heads, key_dim], value [T, kv_heads, value_dim]. Returns
    [T, heads, value_dim]. Padding lies behind a sequence's tokens, where causality hides it.
    """
    dtype = query.dtype
    if query.requires_grad and query.device.type == "cpu":
        # torch's backward of CPU attention is several times slower in bf16 than in float32
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # expanding first lets the CPU take its flash kernel, which knows no grouped heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for rows in ragged.buckets:
        length = rows.shape[1]
        flat = rows.flatten()
        q, k, v = (
            x.index_select(0, flat).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=query.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < window)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, ragged.restore).to(dtype)


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
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out: Tensor = kv_target.attend(module.layer_idx, q, k, v, scale, sliding_window)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, _attention)
