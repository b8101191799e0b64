"""Which KV blocks are whose: a pure allocator, without torch and without gRPC."""

from collections.abc import Sequence


class BlockAllocator:
    """Hands out the numbers of `total` blocks of `block_size` tokens each."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))
        self._is_free = [True] * total

    @property
    def free_count(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks, or None (and nothing changes) if there are not as many."""
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._is_free[block] = False
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Takes blocks back. Freeing a free block is a bug of ours."""
        for block in blocks:
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
            self._free.append(block)
