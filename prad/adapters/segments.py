"""Batch geometry of low-rank methods: many adapters in one matrix product, with nothing gathered or padded.

The prompts of a pass lie end to end, so a few neighbours and their adapters are one segment: a slice of
rows and the adapters' matrices joined along the rank. A row meets the columns of all adapters of its segment
and keeps those of its own. At rank 16 that is four times the work of the adapters alone, which is nothing
beside the model's, and in return rows are read and written in place. A GPU waits for each call and not for
its work: there as many neighbours are joined as have 1,024 ranks, with 64 times the work at rank 16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_RANKS = 64  # joined in a segment; more columns cost more work, fewer cost more calls
_RANKS_OF_GPU = 1024
_GAP = 64  # rows of nobody that a segment may cross; touching them in vain costs less than another call


class Span(NamedTuple):
    """Rows [start, stop) of the pass, a prompt under the group's adapter number `adapter`; the `after` rows
    behind them are the same request's generated tokens.

    `position`: which token of its sequence the first row is; a sequence begins with its virtual tokens.
    """

    start: int
    stop: int
    adapter: int
    position: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows of a pass and the adapters of some of them.

    foreign [rows, ranks]: the columns that are not of a row's own adapter; None if there are none.
    factor: that of the adapters, or one for each column [ranks] if they differ.
    """

    rows: slice
    adapters: tuple[int, ...]
    foreign: Tensor | None
    factor: float | Tensor

    def keep_own(self, hidden: Tensor) -> Tensor:
        """hidden [rows, ranks] with zeros in foreign columns, whatever a neighbour's adapter made there."""
        return hidden if self.foreign is None else hidden.masked_fill_(self.foreign, 0.0)

    def add_product(self, value: Tensor, hidden: Tensor, up: Tensor) -> None:
        """value [T, width] += factor · hidden up in the segment's rows.

        hidden [rows, ranks], up [ranks, width].
        """
        own = value[self.rows]
        if isinstance(self.factor, float):
            own.addmm_(hidden, up, alpha=self.factor)
        else:
            own.addmm_(hidden * self.factor.to(hidden.dtype), up)


def cut(
    spans: Sequence[Span], ranks: Sequence[int], factors: Sequence[float], device: torch.device | str
) -> tuple[Segment, ...]:
    """spans in the order of rows; ranks and factors of the group's adapters."""
    most = _RANKS if torch.device(device).type == "cpu" else _RANKS_OF_GPU
    segments: list[list[Span]] = []
    members: set[int] = set()
    for span in spans:
        joined = members | {span.adapter}
        near = bool(segments) and span.start - segments[-1][-1].stop <= _GAP
        if near and (joined == members or sum(ranks[a] for a in joined) <= most):
            segments[-1].append(span)
            members = joined
        else:
            segments.append([span])
            members = {span.adapter}
    return tuple(_segment(own, ranks, factors, device) for own in segments)


def _segment(
    spans: Sequence[Span], ranks: Sequence[int], factors: Sequence[float], device: torch.device | str
) -> Segment:
    start, stop = spans[0].start, spans[-1].stop
    adapters = tuple(dict.fromkeys(span.adapter for span in spans))
    columns = torch.tensor([a for a in adapters for _ in range(ranks[a])], device=device)
    owners = torch.full((stop - start, 1), -1)
    for span in spans:
        owners[span.start - start : span.stop - start] = span.adapter
    foreign = owners.to(device) != columns
    alone = len(adapters) == 1 and bool((owners >= 0).all())
    distinct = {factors[a] for a in adapters}
    return Segment(
        slice(start, stop),
        adapters,
        None if alone else foreign,
        distinct.pop() if len(distinct) == 1 else torch.tensor(factors, device=device)[columns],
    )
