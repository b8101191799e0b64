"""KV blocks of rows that share what they have in common: the beams of a prompt keep one copy of its KV."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prad.lm import SiteVectors
from prad.lm.paged import Pools


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
        self._size = pools.block_size
        self._free = list(range(total))
        self._users = [0] * total

    def new(self, tokens: int) -> Row:
        """A row with room for `tokens` tokens, which a prompt pass will fill."""
        return Row([self._take() for _ in range(-(-tokens // self._size))], tokens, position=tokens - 1)

    def grow(self, row: Row) -> None:
        """Makes room for the row's next token."""
        if row.kv_len // self._size == len(row.blocks):
            row.blocks.append(self._take())

    def fork(self, row: Row, copies: list[tuple[int, int]]) -> Row:
        """A second row with the same past: full blocks are shared, one in the making goes to `copies`."""
        full = row.kv_len // self._size
        shared = row.blocks[:full]
        for block in shared:
            self._users[block] += 1
        rest = []
        if row.kv_len % self._size:
            rest = [self._take()]
            copies.append((row.blocks[full], rest[0]))
        return Row(shared + rest, row.kv_len, state=row.state)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Carries out what `fork` asked for: (from, to) of blocks, in all layers."""
        if not copies:
            return
        old, new = torch.tensor(copies, device=self._pools.device).unbind(1)
        for pool in (*self._pools.keys, *self._pools.values):
            pool.index_copy_(0, new, pool.index_select(0, old))

    def free(self, row: Row) -> None:
        for block in row.blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free.append(block)

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block
