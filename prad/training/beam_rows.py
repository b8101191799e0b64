"""KV blocks of rows that share what they have in common: the beams of a prompt keep one copy of its KV."""

from collections.abc import Sequence
from dataclasses import dataclass

from prad.core.kv import BlockPool
from prad.lm import SiteVectors
from prad.lm.kv import Pools

_TOO_FEW = "the pools were made with too few blocks"


@dataclass(slots=True)
class Row:
    """One row of a decode step: its block table, how many tokens have KV there, its newest token, and the
    request state that its prompt made, if any."""

    blocks: list[int]
    kv_len: int
    token: int = -1
    position: int = -1
    state: SiteVectors | None = None


class SharedBlocks:
    """Who uses which block of `pools`. A block that is still written to belongs to one row."""

    def __init__(self, pools: Pools, total: int) -> None:
        self._pools = pools
        self._blocks = BlockPool(total, pools.block_size)

    @property
    def in_use(self) -> int:
        return self._blocks.in_use

    def new(self, tokens: int) -> Row:
        """A row with room for `tokens` tokens, which a prompt pass will fill."""
        return Row(self._allocate(self._blocks.blocks_for(tokens)), tokens, position=tokens - 1)

    def grow(self, row: Row) -> None:
        """Makes room for the row's next token."""
        row.blocks += self._allocate(self._blocks.blocks_for(row.kv_len + 1) - len(row.blocks))

    def fork(self, row: Row, copies: list[tuple[int, int]]) -> Row:
        """A second row with the same past: full blocks are shared, one in the making goes to `copies`."""
        forked = self._blocks.fork(row.blocks, row.kv_len)
        assert forked is not None, _TOO_FEW
        table, copy = forked
        copies += [] if copy is None else [copy]
        return Row(list(table), row.kv_len, state=row.state)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Carries out what `fork` asked for."""
        if copies:
            self._pools.copy(copies)

    def free(self, row: Row) -> None:
        self._blocks.free(row.blocks)

    def _allocate(self, count: int) -> list[int]:
        taken = self._blocks.allocate(count)
        assert taken is not None, _TOO_FEW
        return list(taken)
