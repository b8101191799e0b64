"""Blocks of prompt KV: pinned while in use, found by key, least recently used out, never two owners."""

import random

import pytest

from prad.core.kv import BlockPool, block_keys


def compute(blocks: BlockPool, *keys: bytes) -> tuple[int, ...]:
    """A prompt of the blocks of these keys comes and goes; returns those that it found."""
    found = blocks.find(keys)
    table = blocks.extend(found, len(keys) - len(found))
    assert table is not None
    for block, key in zip(table, keys, strict=True):
        blocks.publish(block, key)
    blocks.free(table)
    return found


def test_what_was_used_longest_ago_leaves_first_and_a_prefix_from_its_end() -> None:
    blocks = BlockPool(4, 16, keep=4)
    compute(blocks, b"a1", b"a2")
    compute(blocks, b"b1")
    assert len(compute(blocks, b"a1", b"a2")) == 2
    compute(blocks, b"c1", b"c2", b"c3")
    assert blocks.find([b"b1"]) == ()
    assert len(blocks.find([b"a1", b"a2"])) == 1


def test_pinned_blocks_stay() -> None:
    blocks = BlockPool(2, 16, keep=2)
    compute(blocks, b"a1", b"a2")
    pinned = blocks.extend(blocks.find([b"a1", b"a2"]), 0)
    assert pinned is not None
    assert blocks.extend((), 1) is None
    blocks.free(pinned)
    assert blocks.extend((), 1) is not None
    assert len(blocks.find([b"a1", b"a2"])) == 1


def test_a_found_block_does_not_count_as_room() -> None:
    blocks = BlockPool(3, 16, keep=2)
    compute(blocks, b"a1", b"a2")
    found = blocks.find([b"a1", b"a2"])
    assert blocks.extend(found, 2) is None
    assert blocks.extend(found, 1) is not None


def test_no_more_than_its_share_is_kept() -> None:
    blocks = BlockPool(11, 16, keep=3)
    compute(blocks, *(b"%d" % i for i in range(8)))
    assert (blocks.cached, blocks.in_use) == (3, 0)
    off = BlockPool(8, 16, keep=0)
    compute(off, b"a")
    assert (off.cached, off.caching) == (0, False)


def test_unpinning_what_is_not_pinned_is_a_bug() -> None:
    blocks = BlockPool(2, 16, keep=0)
    with pytest.raises(AssertionError):
        blocks.free([0])


def test_a_fork_shares_full_blocks_and_copies_the_one_that_is_written_to() -> None:
    blocks = BlockPool(5, 16, keep=0)
    table = blocks.extend((), 3)
    assert table is not None
    forked = blocks.fork(table, 40)
    assert forked is not None
    copy, moved = forked
    assert moved is not None
    source, target = moved
    assert copy[:2] == table[:2]
    assert (source, target) == (table[2], copy[2])
    assert target not in table
    blocks.free(table)
    assert blocks.in_use == 3, "the copy's holder has the shared ones still"
    blocks.free(copy)
    assert blocks.in_use == 0


def test_a_fork_at_a_blocks_end_copies_nothing_and_one_without_room_changes_nothing() -> None:
    blocks = BlockPool(3, 16, keep=0)
    table = blocks.extend((), 3)
    assert table is not None
    assert blocks.fork(table, 40) is None
    assert blocks.in_use == 3
    assert blocks.fork(table, 32) == (table[:2], None)
    blocks.free(table)
    assert blocks.in_use == 2
    blocks.free(table[:2])
    assert blocks.in_use == 0


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes_no_block_has_two_owners(seed: int) -> None:
    choice = random.Random(seed)
    blocks = BlockPool(12, 16, keep=6)
    holds: dict[int, bytes] = {}  # what was last written to a block
    live: list[tuple[tuple[int, ...], list[bytes]]] = []
    for _ in range(2000):
        if live and choice.random() < 0.5:
            table, keys = live.pop(choice.randrange(len(live)))
            for block, key in zip(table, keys, strict=True):
                if choice.random() < 0.7:
                    blocks.publish(block, key)
            blocks.free(table)
            continue
        first = choice.randrange(4)
        keys = [b"%d.%d" % (first, i) for i in range(choice.randrange(1, 5))]
        found = blocks.find(keys)
        assert [holds[b] for b in found] == keys[: len(found)]
        taken = blocks.extend(found, len(keys) - len(found))
        if taken is None:
            continue
        fresh = set(taken[len(found) :])
        assert len(fresh) == len(keys) - len(found)
        assert not any(fresh & set(table) for table, _ in live)
        holds |= dict(zip(taken, keys, strict=True))
        live.append((taken, keys))
    for table, _ in live:
        blocks.free(table)
    assert blocks.in_use == 0
    assert blocks.cached <= 6


def test_a_key_stands_for_adapter_virtual_prefix_and_all_tokens_so_far() -> None:
    ids = list(range(40))
    keys = block_keys("d", 0, ids, 16)
    assert len(keys) == len(set(keys)) == 2
    assert block_keys("d", 0, ids[:32], 16) == keys
    assert block_keys("d", 0, ids[:31], 16) == keys[:1]
    assert block_keys("d", 0, [*ids[:20], 0, *ids[21:]], 16)[0] == keys[0]
    for other in (
        block_keys("e", 0, ids, 16),
        block_keys(None, 0, ids, 16),
        block_keys("None", 0, ids, 16),
        block_keys("d", 1, ids, 16),
        block_keys("d", 0, [7, *ids[1:]], 16),
        block_keys("d", 0, ids, 16, adapted=15),
    ):
        assert not set(other) & set(keys)


def test_a_key_stands_for_how_much_is_adapted() -> None:
    """Blocks of a continuation are those of no prompt, and of no continuation that begins elsewhere."""
    ids = list(range(48))
    whole = block_keys("d", 0, ids, 16)
    assert block_keys("d", 0, ids, 16, adapted=48) == whole
    cut = {adapted: block_keys("d", 0, ids, 16, adapted=adapted) for adapted in (16, 17, 31, 32)}
    assert all(keys[0] == whole[0] for keys in cut.values())
    assert cut[32][1] == whole[1]
    behind = [keys[2] for keys in (whole, *cut.values())]
    assert len(set(behind)) == len(behind)
