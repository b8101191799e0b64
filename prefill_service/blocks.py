"""Which blocks of prompt KV are whose: of prompts under way, or kept for later ones. Pure.

A block is in one of three states: free; in use, by as many prompts as it has pins; or kept, which nobody
uses, but the next prompt that begins with the same tokens under the same adapter will find.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PromptBlocks:
    """`working + kept` blocks. At most `kept` of them stay behind for later prompts; prompts under way may
    use all, and take the kept ones that were used longest ago."""

    def __init__(self, *, working: int, kept: int, block_size: int) -> None:
        self.total = working + kept
        self.block_size = block_size
        self._most_kept = kept
        self._free = list(range(self.total - 1, -1, -1))
        self._pins = [0] * self.total
        self._key_of: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the one used longest ago is the first

    @property
    def caching(self) -> bool:
        return self._most_kept > 0

    @property
    def known(self) -> int:
        """Blocks that later prompts would find."""
        return len(self._found)

    @property
    def in_use(self) -> int:
        return self.total - len(self._free) - len(self._kept)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of as many leading keys as are known."""
        found = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def take(self, found: Sequence[int], fresh: int) -> tuple[int, ...] | None:
        """Pins `found` and `fresh` more blocks behind them; None (and nothing changes) if too few."""
        obtainable = len(self._free) + len(self._kept) - sum(block in self._kept for block in found)
        if fresh > obtainable:
            return None
        self.pin(found)
        for _ in range(fresh - len(self._free)):
            self._forget(next(iter(self._kept)))
        table = (*found, *(self._free.pop() for _ in range(fresh)))
        for block in table[len(found) :]:
            self._pins[block] = 1
        return table

    def pin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._pins[block] += 1
            self._kept.pop(block, None)

    def unpin(self, blocks: Sequence[int]) -> None:
        """Those that nobody else uses are kept if they have a key, or free."""
        for block in reversed(blocks):  # a prefix's end is useless without its beginning: it leaves first
            assert self._pins[block] > 0, f"block {block} is not pinned"
            self._pins[block] -= 1
            if self._pins[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._free.append(block)
        while len(self._kept) > self._most_kept:
            self._forget(next(iter(self._kept)))

    def publish(self, block: int, key: bytes) -> None:
        """The block's tokens are all computed: from now on it is found. The first block of a key stays it."""
        if key not in self._found and block not in self._key_of:
            self._found[key] = block
            self._key_of[block] = key

    def _forget(self, block: int) -> None:
        del self._kept[block]
        del self._found[self._key_of.pop(block)]
        self._free.append(block)


def block_keys(
    digest: str | None,
    virtual_tokens: int,
    ids: Sequence[int],
    block_size: int,
    adapted: int | None = None,
) -> tuple[bytes, ...]:
    """A key for each full block of `ids`: of all that its KV depends on, from the adapter's digest (None: the
    plain model) and the virtual prefix to its last token. adapted: how many are the adapter's; None: all.

    Cryptographic, because a collision would show one tenant's prompt to another.
    """
    key = hashlib.sha256(repr((digest, virtual_tokens)).encode()).digest()
    keys = []
    for end in range(block_size, len(ids) + 1, block_size):
        own = array("q", ids[end - block_size : end])
        if adapted is not None and adapted < end:  # a continuation's KV is not a prompt's
            own.append(max(0, adapted - end + block_size))
        key = hashlib.sha256(key + own.tobytes()).digest()
        keys.append(key)
    return tuple(keys)
