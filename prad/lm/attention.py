"""Attention over packed sequences, and its registration with transformers.

Every model runs with the implementation registered here. transformers builds no mask for it, so nothing
but the sequence lengths decides who sees whom: packed prompts of different tenants cannot attend to each
other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from prad.lm.errors import UnsupportedModelError

NAME = "prad_packed"

_PLAIN_ARGUMENTS = frozenset(
    {"dropout", "position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float, window: int | None
) -> Tensor:
    """Causal attention within each of several packed sequences.

    query [T, heads, key_dim], key [T, kv_heads, key_dim], value [T, kv_heads, value_dim], sum(lengths) = T.
    Returns [T, heads, value_dim].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # expanding first lets the CPU take its flash kernel, which knows no grouped heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    start = 0
    for length in lengths:
        q, k, v = (x[start : start + length].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=query.device)
            distance = at[:, None] - at[None, :]
            mask = (distance >= 0) & (distance < window)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        outputs.append(out.squeeze(0).transpose(0, 1))
        start += length
    return torch.cat(outputs)


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
    """transformers' attention interface: query [1, heads, T, key_dim], key and value [1, kv_heads, T, dim]."""
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
