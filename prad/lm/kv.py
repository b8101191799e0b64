"""The input of a forward pass: packed tokens, and where their keys and values go.

A pass computes queries, keys and values for its new tokens and hands them to the `KVTarget` of its
`PackedBatch`, which stores the keys and values and returns the attention output:

PromptKV     whole prompts, which leave nothing here: every sequence attends to itself only
ChunkedKV    parts of prompts beside whole ones: earlier KV lies in blocks (`Pools`), new KV may go there
PagedStep    a decode step: one new token per sequence, whose KV is all in blocks
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prad.core.kv import Chunk, KVLayout
from prad.lm.attention import CausalAttention, causal_attention, decode_attention
from prad.lm.kernels import Calls, HugePages, Kernels, PagedView, view_of
from prad.lm.scoring import GivenTokens


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


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Immutable input of one pass.

    ids [T] and positions [T] (int64) of all new tokens, `kv` where their keys and values go and what their
    queries see, logit_rows [R] the rows whose logits are wanted; of a decode step all, in order.
    given: further rows, whose next tokens are to be scored.
    """

    ids: Tensor
    positions: Tensor
    kv: KVTarget
    logit_rows: Tensor
    given: GivenTokens | None = None

    @classmethod
    def of_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        device: torch.device | str = "cpu",
        logit_rows: Sequence[int] | None = None,
        layer_done: LayerDone | None = None,
        kernels: Kernels | None = None,
        answered: Sequence[int] = (),
    ) -> "PackedBatch":
        """Whole sequences from position 0; logits of each one's last token unless `logit_rows` says else.

        `kernels`: may compute its attention, on the CPU. `answered`: as for `causal_attention`.
        """
        lengths = tuple(len(s) for s in sequences)
        attention = causal_attention(lengths, device=device, kernels=kernels, answered=answered)
        rows = [end - 1 for end in accumulate(lengths)] if logit_rows is None else logit_rows
        return cls(
            ids=torch.tensor([i for s in sequences for i in s], device=device),
            positions=torch.cat([torch.arange(n, device=device) for n in lengths]),
            kv=PromptKV(attention, layer_done),
            logit_rows=torch.tensor(rows, device=device, dtype=torch.long),
        )


class PagedSequence(Protocol):
    """What a decode step must know of a sequence: its block table, and how many tokens it has stored."""

    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def kv_len(self) -> int: ...


class Pools:
    """Per layer one pool of keys [blocks, block_size, kv_heads, key_dim] and one of values.
    A CPU's take memory as they fill, in huge pages, since each step reads every sequence's keys end to end.

    Behind a sequence's end a block holds whatever was left there, by another sequence or by a wrong draft:
    no step may compute with it, since even with attention weight 0 a NaN stays NaN.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        block_size: int,
        device: str,
        kernels: Kernels | None = None,
    ) -> None:
        self.layout = layout
        self.kernels = kernels
        self.block_size = block_size
        self.device = device
        self.recorded: dict[Any, Any] = {}  # steps over these pools, kept by whoever computes them
        self.dtype = dtype = torch_dtype(layout)
        zeros = HugePages().zeros if device == "cpu" else partial(torch.zeros, device=device)
        shape = (num_blocks, block_size)
        self.keys = [zeros(*shape, la.heads, la.key_dim, dtype=dtype) for la in layout.layers]
        self.values = [zeros(*shape, la.heads, la.value_dim, dtype=dtype) for la in layout.layers]

    def step(self, batch: Sequence[PagedSequence], *, drafted: bool = False) -> KVTarget:
        """The KV target of one decode step: one new token per sequence, in the order of the batch. drafted:
        some have a draft, whose tokens are in the batch as the same sequence, one token longer each."""
        if self.kernels is not None:
            return PagedStep.of(self, self.kernels, batch, drafted)
        return _TorchStep(self, batch)

    def slots(self, blocks: Sequence[int], tokens: int) -> Tensor:
        """Where a block table's first `tokens` tokens lie among all slots of a pool; [tokens]."""
        table = torch.tensor(blocks, device=self.device)
        at = torch.arange(tokens, device=self.device)
        return table[at // self.block_size] * self.block_size + at % self.block_size

    def write(self, layer: int, slots: Tensor, key: memoryview, value: memoryview) -> None:
        """Stores raw keys [tokens, kv_heads, key_dim] and values at `slots` [tokens]."""
        for pool, data in ((self.keys[layer], key), (self.values[layer], value)):
            tokens = pool.flatten(0, 1).flatten(1)
            if pool.is_cpu:  # numpy moves whole rows of bytes: several times faster than torch's index_copy_
                raw = tokens.view(torch.uint8).numpy()
                raw[slots.numpy()] = np.frombuffer(data, np.uint8).reshape(len(slots), -1)
            else:
                rows = torch.frombuffer(bytearray(data), dtype=pool.dtype).view(len(slots), -1)
                tokens.index_copy_(0, slots, rows.to(pool.device))

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies blocks, each (from, to), in all layers; none of them is both."""
        old, new = torch.tensor(copies, device=self.device).unbind(1)
        for pool in (*self.keys, *self.values):
            pool.index_copy_(0, new, pool.index_select(0, old))


def blocks_in(layout: KVLayout, block_size: int, mib: int) -> int:
    """How many blocks of `block_size` tokens fit into `mib` MiB."""
    return (mib << 20) // (layout.bytes_per_token * block_size)


def chunked_batch(
    chunks: Sequence[Chunk[Any]],
    ids: Sequence[Sequence[int]],
    pools: Pools,
    *,
    logit_rows: Sequence[int],
    layer_done: LayerDone | None = None,
    answered: Sequence[int] = (),
) -> PackedBatch:
    """The chunks packed end to end, each with its own ids; as `PackedBatch.of_sequences` if none of them
    touches a block. `answered`: as for `causal_attention`."""
    if not any(chunk.table for chunk in chunks):
        return PackedBatch.of_sequences(
            ids,
            device=pools.device,
            logit_rows=logit_rows,
            layer_done=layer_done,
            kernels=pools.kernels,
            answered=answered,
        )
    device = pools.device
    return PackedBatch(
        ids=torch.tensor([i for own in ids for i in own], device=device),
        positions=torch.cat([torch.arange(chunk.start, chunk.end, device=device) for chunk in chunks]),
        kv=ChunkedKV.of(chunks, pools, layer_done, answered),
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
    def of(
        cls,
        chunks: Sequence[Chunk[Any]],
        pools: Pools,
        layer_done: LayerDone | None,
        answered: Sequence[int],
    ) -> "ChunkedKV":
        lengths = [len(chunk) for chunk in chunks]
        contexts, rows, slots = {}, [], []
        for i, (chunk, row) in enumerate(zip(chunks, accumulate(lengths[:-1], initial=0), strict=True)):
            end = chunk.start + chunk.stored
            known = pools.slots(chunk.table, end) if end else torch.empty(0, dtype=torch.long)
            if chunk.start:
                contexts[i] = known[: chunk.start]
            rows.append(torch.arange(row, row + chunk.stored, device=pools.device))
            slots.append(known[chunk.start :].to(pools.device))
        attention = causal_attention(
            lengths, device=pools.device, contexts=contexts, kernels=pools.kernels, answered=answered
        )
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


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of similar length, which share one padded context: rows [n] of the batch (None: all of it),
    block table [n, blocks], context lengths [n], and which places of the flattened context lie `behind` an
    end."""

    rows: Tensor | None
    table: Tensor
    lengths: Tensor
    behind: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PagedStep:
    """Attention over the blocks where they lie; nothing is copied.

    table int64 [B, width], lengths int64 [B] with the new token; `view` is both for the kernels.
    """

    pools: Pools
    calls: Calls
    table: Tensor
    lengths: Tensor
    view: PagedView

    @classmethod
    def of(cls, pools: Pools, calls: Calls, batch: Sequence[PagedSequence], drafted: bool) -> "PagedStep":
        used = [s.kv_len // pools.block_size + 1 for s in batch]
        table = np.zeros((len(batch), max(used)), dtype=np.int64)
        for row, sequence, count in zip(table, batch, used, strict=True):
            assert len(sequence.blocks) >= count, "a sequence is longer than its blocks"
            row[:count] = sequence.blocks[:count]
        tables = torch.from_numpy(table), torch.tensor([s.kv_len + 1 for s in batch])
        return cls(pools, calls, *tables, view_of(*tables, drafted=drafted))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query [B, heads, key_dim], key and value [B, kv_heads, dim]; returns [B, heads, value_dim]."""
        pools = self.pools.keys[layer], self.pools.values[layer]
        return self.calls.paged_attention(query, key, value, pools, self.view, scale, window)


class _TorchStep:
    """The same on any device: every group of sequences gathers its context.

    All index tensors are made here, once per step, not per layer.
    """

    def __init__(self, pools: Pools, batch: Sequence[PagedSequence]) -> None:
        self._pools = pools
        size, device = pools.block_size, pools.device
        tails = [(s.blocks[s.kv_len // size], s.kv_len % size) for s in batch]
        self._slots = torch.tensor([block * size + at for block, at in tails], device=device)
        self._groups = [self._group(batch, rows) for rows in _alike([s.kv_len // size + 1 for s in batch])]

    def _group(self, batch: Sequence[PagedSequence], rows: Sequence[int]) -> _Group:
        size, device = self._pools.block_size, self._pools.device
        width = max(batch[r].kv_len for r in rows) // size + 1
        table = []
        for row in rows:
            used = list(batch[row].blocks[: batch[row].kv_len // size + 1])
            table.append(used + used[-1:] * (width - len(used)))
        lengths = torch.tensor([batch[r].kv_len + 1 for r in rows])
        behind = (torch.arange(width * size) >= lengths[:, None]).flatten().nonzero().flatten()
        return _Group(
            rows=None if len(rows) == len(batch) else torch.tensor(rows, device=device),
            table=torch.tensor(table, device=device),
            lengths=lengths.to(device),
            behind=behind.to(device),
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """query [B, heads, key_dim], key and value [B, kv_heads, dim]; returns [B, heads, value_dim]."""
        pools = self._pools.keys[layer], self._pools.values[layer]
        for pool, new in zip(pools, (key, value), strict=True):
            pool.flatten(0, 1).index_copy_(0, self._slots, new)
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return _attend(self._groups[0], query, *pools, scale, window)
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for group in self._groups:
            assert group.rows is not None
            part = _attend(group, query.index_select(0, group.rows), *pools, scale, window)
            out.index_copy_(0, group.rows, part)
        return out


def _attend(
    group: _Group, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    key, value = (_gather(pool, group.table) for pool in (keys, values))
    for gathered in (key, value):  # NaN stay NaN with weight 0
        gathered.flatten(0, 1).index_fill_(0, group.behind, 0)
    return decode_attention(query, key, value, group.lengths, scale, window)


def _gather(pool: Tensor, table: Tensor) -> Tensor:
    """pool [blocks, block_size, heads, dim] by table [n, m] -> [n, m * block_size, heads, dim]."""
    return pool.index_select(0, table.flatten()).view(table.shape[0], -1, *pool.shape[2:])


def _alike(widths: Sequence[int]) -> list[list[int]]:
    """Rows grouped so that padding to the widest of a group at most doubles any row; in batch order within.

    Without this one long sequence would make everybody's gather as long as its own.
    """
    groups: list[list[int]] = []
    widest = 0
    for row in sorted(range(len(widths)), key=lambda r: -widths[r]):
        if groups and 2 * widths[row] >= widest:
            groups[-1].append(row)
        else:
            groups.append([row])
            widest = widths[row]
    return [sorted(group) for group in groups] if len(groups) > 1 else [list(range(len(widths)))]
