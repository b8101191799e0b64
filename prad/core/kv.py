"""The KV cache without its tensors: what a model's looks like, which blocks are whose, what a pass adds.

A `KVLayout` is what prefill and decode agree on before any byte moves. A `BlockPool` is each one's book over
its own blocks, for running sequences, prompts under way, and what is kept for later. A `Chunk` is the part of
a prompt that one pass computes and puts there.

A block is in one of three states: free; in use, by as many holders as took it; or kept, which nobody uses,
but whoever begins with the same tokens under the same adapter will find. Holders that share a beginning
share its full blocks; a block that is still written to belongs to one holder (copy on write: `fork`).
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, Protocol, TypeVar

P = TypeVar("P")

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer stores per token: `heads` keys of `key_dim` and as many values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The adapter-independent KV layout of a model: one `LayerKV` per layer, one dtype, by its name.

    Raises ValueError for a dtype that no KV cache has here, or no layers.
    """

    layers: tuple[LayerKV, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV of dtype {self.dtype!r} is not known (known: {', '.join(ITEM_BYTES)})")
        if not self.layers:
            raise ValueError("a model without layers has no KV cache")

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def key_bytes(self, layer: int) -> int:
        """Bytes of one token's keys in `layer`."""
        return self.layers[layer].heads * self.layers[layer].key_dim * self.item_bytes

    def value_bytes(self, layer: int) -> int:
        """Bytes of one token's values in `layer`."""
        return self.layers[layer].heads * self.layers[layer].value_dim * self.item_bytes

    @property
    def bytes_per_token(self) -> int:
        return sum(self.key_bytes(layer) + self.value_bytes(layer) for layer in range(len(self.layers)))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which frozen model, and its layout; equal fingerprints mean interchangeable KV caches."""

    fingerprint: str
    layout: KVLayout

    def difference(self, other: "ModelSpec", own_name: str, other_name: str) -> str | None:
        """What of `other` is not this model's, with both sides' values; None if it is this model."""
        for what, own, theirs in (
            ("dtype", self.layout.dtype, other.layout.dtype),
            ("layers", len(self.layout.layers), len(other.layout.layers)),
            ("KV layout", self.layout.layers, other.layout.layers),
            ("fingerprint", self.fingerprint, other.fingerprint),
        ):
            if own != theirs:
                return f"{own_name} has {what} {own}, {other_name} has {theirs}"
        return None


@dataclass(frozen=True, slots=True)
class Chunk(Generic[P]):
    """Tokens start .. end of a prompt: from the scheduler through the pass, one value.

    `table`: its blocks, with the KV of all tokens before `start`; that of the first `stored` tokens of the
    chunk goes there as well.
    """

    prompt: P
    start: int
    end: int
    table: tuple[int, ...] = ()
    stored: int = 0

    def __len__(self) -> int:
        """Tokens to compute."""
        return self.end - self.start


@dataclass(slots=True)
class PrefixLookups:
    """Since the start: prompts looked up, their tokens, and what of both was found."""

    prompts: int = 0
    tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0

    def count(self, tokens: int, cached: int) -> None:
        self.prompts += 1
        self.tokens += tokens
        self.hits += cached > 0
        self.hit_tokens += cached


class BlockPool:
    """`total` blocks of `block_size` tokens. At most `keep` of them stay behind with a key when nobody uses
    them; those used longest ago make room first."""

    def __init__(self, total: int, block_size: int, keep: int = 0) -> None:
        self.total = total
        self.block_size = block_size
        self.keep = keep
        self._free = list(range(total - 1, -1, -1))
        self._users = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the one used longest ago is the first

    @property
    def caching(self) -> bool:
        return self.keep > 0

    @property
    def free_count(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._kept)

    @property
    def in_use(self) -> int:
        return self.total - self.free_count

    @property
    def cached(self) -> int:
        """Blocks that have a key, in use or kept."""
        return len(self._found)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks for one holder, or None (and nothing changes) if there are not as many."""
        if count > self.free_count:
            return None
        for _ in range(count - len(self._free)):
            self._evict()
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._users[block] = 1
        return taken

    def branch(self, count: int, shared: int, own: int) -> tuple[tuple[int, ...], ...] | None:
        """`count` block tables that begin with the same `shared` blocks, each with `own` of its own behind
        them; None (and nothing changes) if there are not as many."""
        taken = self.allocate(shared + count * own)
        if taken is None:
            return None
        trunk, rest = taken[:shared], taken[shared:]
        for _ in range(count - 1):
            self.share(trunk)
        return tuple((*trunk, *rest[i * own : (i + 1) * own]) for i in range(count))

    def exclusive(self, blocks: Sequence[int]) -> bool:
        """Whether each of them is in use by one holder alone: only such a block may be written to."""
        return all(self._users[block] == 1 for block in blocks)

    def find(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks of as many leading keys as are cached."""
        found = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def extend(self, found: Sequence[int], count: int) -> tuple[int, ...] | None:
        """A block table: `found`, shared, and `count` blocks of its own behind them; None (and nothing
        changes) if there are not as many."""
        if count > self.free_count - sum(block in self._kept for block in found):
            return None
        self.share(found)
        own = self.allocate(count)
        assert own is not None
        return (*found, *own)

    def fork(
        self, table: Sequence[int], tokens: int
    ) -> tuple[tuple[int, ...], tuple[int, int] | None] | None:
        """A table for another holder with the same first `tokens` tokens: full blocks are shared, one that is
        still written to gets a copy, given as (from, to). None (and nothing changes) if there is no room."""
        full, rest = divmod(tokens, self.block_size)
        forked = self.extend(table[:full], 1 if rest else 0)
        if forked is None:
            return None
        return forked, (table[full], forked[full]) if rest else None

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder of each."""
        for block in blocks:
            assert self._users[block] > 0 or block in self._kept, f"block {block} is free"
            self._users[block] += 1
            self._kept.pop(block, None)

    def free(self, blocks: Sequence[int]) -> None:
        """A holder gives blocks back; those that nobody else uses are kept if they have a key. Freeing a free
        block is a bug of ours."""
        for block in reversed(blocks):  # a prefix's end is useless without its beginning: it leaves first
            assert self._users[block] > 0, f"block {block} is freed twice"
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._free.append(block)
        while len(self._kept) > self.keep:
            self._evict()

    def publish(self, block: int, key: bytes) -> None:
        """The block's tokens are all computed: from now on it is found. The first block of a key stays it."""
        if key not in self._found and block not in self._key_of:
            self._found[key] = block
            self._key_of[block] = key

    def _evict(self) -> None:
        block, _ = self._kept.popitem(last=False)
        del self._found[self._key_of.pop(block)]
        self._free.append(block)


class Keyed(Protocol):
    """A prompt as its blocks are concerned: its `block_keys`, and how many tokens it has."""

    @property
    def keys(self) -> Sequence[bytes]: ...
    @property
    def tokens(self) -> int: ...


K = TypeVar("K", bound=Keyed)

_WORTH_WAITING = 32
"""Tokens that take about as long as a pass takes beyond its tokens."""


def better_later(
    chunks: Sequence[Chunk[K]],
    begun: Collection[K],
    waiting: Iterable[K],
    blocks: BlockPool,
    chunk_tokens: int,
    most_found: Callable[[K], int],
) -> set[K]:
    """Who of those that these chunks begin, and of those that wait, had better wait for the blocks that the
    chunks before theirs leave, and begin with them, than compute the same.

    They wait for one pass; for a prompt that is computed in several only if that has no more left than they
    have, or, of prompts longer than a chunk, which share one, if they are not done later than both would be
    side by side. Nobody waits for what may not be kept, nor for more than the first tokens of a prompt,
    `most_found`, that need not be computed.
    """
    if sum(len(chunk.table) for chunk in chunks) > blocks.keep:
        return set()
    size = blocks.block_size
    left_by: dict[bytes, int] = {}  # blocks that are left, and how many tokens behind this pass

    def waits(prompt: K, found: int) -> bool:
        its = prompt.keys[found : most_found(prompt) // size]
        shared = list(takewhile(left_by.__contains__, its))
        saved, left = len(shared) * size, prompt.tokens - found * size
        longest = left if left <= chunk_tokens else left + saved
        return saved >= _WORTH_WAITING and left_by[shared[-1]] <= longest

    later = set[K]()
    for chunk in chunks:
        prompt = chunk.prompt
        if prompt in begun and waits(prompt, chunk.start // size):
            later.add(prompt)
            continue
        ends = chunk.end == prompt.tokens
        keys = prompt.keys[: (chunk.start + chunk.stored) // size] if ends else prompt.keys
        behind = 0 if ends else prompt.tokens - chunk.start
        left_by |= {key: min(behind, left_by.get(key, behind)) for key in keys}
    return later | {prompt for prompt in waiting if waits(prompt, len(blocks.find(prompt.keys)))}


def block_keys(
    digest: str | None,
    virtual_tokens: int,
    ids: Sequence[int],
    block_size: int,
    adapted: int | None = None,
    salt: str | None = None,
) -> tuple[bytes, ...]:
    """A key for each full block of `ids`: of all that its KV depends on, from the adapter's digest (None: the
    plain model) and the virtual prefix to its last token. adapted: how many are the adapter's; None: all.
    salt: those with another one find nothing of this one's.

    Cryptographic, because a collision would show one tenant's prompt to another.
    """
    named = (digest, virtual_tokens) if salt is None else (digest, virtual_tokens, salt)
    key = hashlib.sha256(repr(named).encode()).digest()
    keys = []
    for end in range(block_size, len(ids) + 1, block_size):
        own = array("q", ids[end - block_size : end])
        if adapted is not None and adapted < end:  # a continuation's KV is not a prompt's
            own.append(max(0, adapted - end + block_size))
        key = hashlib.sha256(key + own.tobytes()).digest()
        keys.append(key)
    return tuple(keys)
