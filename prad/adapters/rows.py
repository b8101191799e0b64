"""Batch geometry: which rows of a packed pass belong to which adapter.

Every adapter's rows are padded to the longest one's count, so that one batched matrix product serves all
adapters, however ragged the prompts are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """rows [N]: adapted rows of the pass, adapter after adapter. With several adapters, padded
    [adapters, longest] holds for every place which of `rows` it takes, and slots [N] where each of `rows`
    lies among the padded places.
    """

    rows: Tensor
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
            return cls(rows, None, None)
        longest = max(len(own) for own in per_adapter)
        padded: list[list[int]] = []
        slots: list[int] = []
        start = 0
        for adapter, own in enumerate(per_adapter):
            padded.append([start + min(i, len(own) - 1) for i in range(longest)])
            slots.extend(adapter * longest + i for i in range(len(own)))
            start += len(own)
        return cls(rows, torch.tensor(padded, device=device), torch.tensor(slots, device=device))

    def pack(self, source: Tensor) -> Tensor:
        """source [T, d] -> [adapters, longest, d]; padding repeats a row of the same adapter."""
        own = source.index_select(0, self.rows)
        return own.unsqueeze(0) if self.padded is None else own[self.padded]

    def unpack(self, packed: Tensor) -> Tensor:
        """[adapters, longest, d] -> [N, d], padding left out."""
        flat = packed.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)
