"""Batch geometry: which rows of a packed pass belong to which adapter.

Every adapter's rows are cut into chunks, and the chunks padded to the same length, so that one batched matrix
product serves all adapters, however ragged the prompts and however uneven the traffic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 64  # rows; at most so many are padded per adapter


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """rows [N]: adapted rows of the pass, adapter after adapter; chunks: the adapter of each chunk.

    padded [chunks, longest]: for every place which of `rows` it takes (padding repeats the chunk's last
    one); slots [N]: where each of `rows` lies among all places. Both are None with a single adapter, whose
    rows are one chunk.
    """

    rows: Tensor
    chunks: tuple[int, ...]
    padded: Tensor | None
    slots: Tensor | None

    @classmethod
    def of_spans(
        cls, spans: Sequence[Sequence[tuple[int, int]]], device: torch.device | str
    ) -> "AdaptedRows":
        """For each adapter the (start, length) spans of the pass that it adapts."""
        per_adapter = [[row for start, n in own for row in range(start, start + n)] for own in spans]
        rows = torch.tensor([r for own in per_adapter for r in own], dtype=torch.long, device=device)
        if len(per_adapter) == 1:
            return cls(rows, (0,), None, None)
        longest = min(_CHUNK, max(len(own) for own in per_adapter))
        chunks: list[int] = []
        padded: list[list[int]] = []
        slots: list[int] = []
        start = 0
        for adapter, own in enumerate(per_adapter):
            for first in range(0, len(own), longest):
                count = min(longest, len(own) - first)
                slots.extend(len(padded) * longest + i for i in range(count))
                padded.append([start + first + min(i, count - 1) for i in range(longest)])
                chunks.append(adapter)
            start += len(own)
        return cls(
            rows,
            tuple(chunks),
            torch.tensor(padded, device=device),
            torch.tensor(slots, device=device),
        )

    def pack(self, source: Tensor) -> Tensor:
        """source [T, d] -> [chunks, longest, d]."""
        own = source.index_select(0, self.rows)
        return own.unsqueeze(0) if self.padded is None else own[self.padded]

    def unpack(self, packed: Tensor) -> Tensor:
        """[chunks, longest, d] -> [N, d], padding left out."""
        flat = packed.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)
