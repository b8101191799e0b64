"""The KV cache as both services see it: where a forward pass puts it.

A forward pass computes queries, keys and values for its new tokens and hands them to a `KVTarget`, which
stores the keys and values and returns the attention output. `PromptKV` is the target of a prompt pass:
every sequence attends to itself only. The decode service's paged target lives with its blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prad.core.layout import KVLayout
from prad.lm.attention import CausalAttention


def torch_dtype(layout: KVLayout) -> torch.dtype:
    """The dtype of its keys and values."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As a `KVLayout` names it."""
    return str(dtype).removeprefix("torch.")


class KVTarget(Protocol):
    """Where a pass puts its keys and values, and what its queries see."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Store `key`, `value` of the pass's new tokens and attend.

        query [T, heads, key_dim], key [T, kv_heads, key_dim], value [T, kv_heads, value_dim] (keys after
        RoPE); `window`: how many latest positions a query sees, itself included. Returns
        [T, heads, value_dim].
        """
        ...


LayerDone = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class PromptKV:
    """Target of a packed pass over whole sequences: block-diagonal causal attention by construction.

    `layer_done` is called with (layer, key [T, kv_heads, key_dim], value [T, kv_heads, value_dim]) while
    later layers are still to come; the hand-off takes them from there.
    """

    attention: CausalAttention
    layer_done: LayerDone | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if self.layer_done is not None:
            self.layer_done(layer, key, value)
        return self.attention.attend(query, key, value, scale, window)
