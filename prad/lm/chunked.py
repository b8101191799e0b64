"""A prompt pass over parts of sequences: earlier KV lies in blocks, new KV may be stored there.

Chunks of long prompts and prompts that begin with cached blocks run beside prompts that begin here; all that
makes a sequence's place in the pass is its `Chunk`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prad.core.chunk import Chunk
from prad.lm.attention import CausalAttention
from prad.lm.batch import PackedBatch
from prad.lm.kv import LayerDone
from prad.lm.paged import Pools
from prad.lm.prompt_attention import causal_attention


def chunked_batch(
    chunks: Sequence[Chunk[Any]],
    ids: Sequence[Sequence[int]],
    pools: Pools,
    *,
    logit_rows: Sequence[int],
    layer_done: LayerDone | None = None,
) -> PackedBatch:
    """The chunks packed end to end, each with its own ids; as `PackedBatch.of_sequences` if none of them
    touches a block."""
    if not any(chunk.table for chunk in chunks):
        return PackedBatch.of_sequences(
            ids,
            device=pools.device,
            logit_rows=logit_rows,
            layer_done=layer_done,
            kernels=pools.kernels,
        )
    device = pools.device
    return PackedBatch(
        ids=torch.tensor([i for own in ids for i in own], device=device),
        positions=torch.cat([torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks]),
        kv=ChunkedKV.of(chunks, pools, layer_done),
        logit_rows=torch.tensor(logit_rows, device=device, dtype=torch.long),
    )


@dataclass(frozen=True, slots=True)
class ChunkedKV:
    """The KVTarget of such a pass. rows [S] of the pass are stored at slots [S] of the pools.

    `layer_done` gets the new tokens only, as that of `PromptKV`.
    """

    pools: Pools
    attention: CausalAttention
    rows: Tensor
    slots: Tensor
    layer_done: LayerDone | None

    @classmethod
    def of(cls, chunks: Sequence[Chunk[Any]], pools: Pools, layer_done: LayerDone | None) -> "ChunkedKV":
        lengths = [len(chunk) for chunk in chunks]
        contexts, rows, slots = {}, [], []
        for i, (chunk, row) in enumerate(zip(chunks, accumulate(lengths[:-1], initial=0), strict=True)):
            end = chunk.start + chunk.stored
            known = pools.slots(chunk.table, end) if end else torch.empty(0, dtype=torch.long)
            if chunk.start:
                contexts[i] = known[: chunk.start]
            rows.append(torch.arange(row, row + chunk.stored, device=pools.device))
            slots.append(known[chunk.start :].to(pools.device))
        attention = causal_attention(lengths, device=pools.device, contexts=contexts, kernels=pools.kernels)
        return cls(pools, attention, torch.cat(rows), torch.cat(slots), layer_done)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        if self.layer_done is not None:
            self.layer_done(layer, key, value)
        stored = self.pools.keys[layer].flatten(0, 1), self.pools.values[layer].flatten(0, 1)
        if len(self.rows):
            for pool, new in zip(stored, (key, value), strict=True):
                pool.index_copy_(0, self.slots, new.index_select(0, self.rows))
        return self.attention.attend(query, key, value, scale, window, stored)
