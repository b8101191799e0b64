"""The pure parts: the block allocator and the scheduler, with plain data."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_service.reservations import HandOffId, Reservation
from decode_service.scheduler import Running, Scheduler, SequenceId
from kvtransfer.errors import RejectedError, RejectReason
from kvtransfer.messages import Open
from prad.core.kv import BlockPool, KVLayout, LayerKV, ModelSpec
from prad.core.sampling import FinishReason, SamplingParams, Written

MODEL = ModelSpec("f", KVLayout((LayerKV(1, 2, 2),), "float32"))


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_blocks_for_is_exactly_enough(tokens: int, size: int) -> None:
    blocks = BlockPool(1, size).blocks_for(tokens)
    assert (blocks - 1) * size < tokens <= blocks * size or tokens == blocks == 0


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockPool(20, 16)
        self.taken: list[tuple[int, ...]] = []

    @rule(count=st.integers(0, 25))
    def allocate(self, count: int) -> None:
        free = self.blocks.free_count
        taken = self.blocks.allocate(count)
        assert (taken is None) == (count > free)
        if taken is not None:
            assert len(taken) == count
            self.taken.append(taken)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.blocks.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        used = [block for taken in self.taken for block in taken]
        assert len(set(used)) == len(used)
        assert self.blocks.free_count + len(used) == self.blocks.total


TestAllocator = AllocatorMachine.TestCase


def test_a_double_free_is_our_bug() -> None:
    blocks = BlockPool(2, 16)
    taken = blocks.allocate(1)
    assert taken is not None
    blocks.free(taken)
    with pytest.raises(AssertionError, match="twice"):
        blocks.free(taken)


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.randoms())
def test_branches_share_their_trunk_and_leave_in_any_order(
    count: int, shared: int, own: int, random: Random
) -> None:
    blocks = BlockPool(16, 16)
    needed = shared + count * own
    tables = blocks.branch(count, shared, own)
    if needed > 16:
        assert tables is None
        assert blocks.free_count == 16
        return
    assert tables is not None
    assert blocks.free_count == 16 - needed
    assert {table[:shared] for table in tables} == {tables[0][:shared]}
    rest = [block for table in tables for block in table[shared:]]
    assert len({*tables[0][:shared], *rest}) == needed
    assert all(blocks.exclusive(table[shared:]) for table in tables)
    assert blocks.exclusive(tables[0][:shared]) == (count == 1 or shared == 0)
    for left, table in enumerate(random.sample(tables, count), 1):
        blocks.free(table)
        assert blocks.in_use == (0 if left == count else needed - left * own)


def request(
    name: str = "r",
    attempt: int = 1,
    choices: int = 1,
    kv_len: int = 16,
    max_tokens: int = 17,
) -> Open:
    return Open(
        request_id=name,
        model=MODEL,
        kv_len=kv_len,
        prompt_len=kv_len,
        next_position=kv_len,
        sampling=SamplingParams(max_tokens=max_tokens),
        attempt=attempt,
        choices=choices,
    )


def running(reserved: Reservation, choice: int = 0) -> Running:
    kv_len = reserved.request.kv_len
    table = reserved.blocks[choice]
    at = 1, 0, kv_len, kv_len
    names = SequenceId(reserved.id, choice), reserved.request, table
    return Running(*names, *at, Written.of((), 0, 0), deadline=reserved.deadline)


@pytest.fixture
def blocks() -> BlockPool:
    return BlockPool(8, 16)


@pytest.fixture
def scheduler(blocks: BlockPool) -> Scheduler:
    return Scheduler(blocks, max_sequences=3, retry_after_s=0.5)


def test_a_reservation_is_a_whole_life(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve("c", request(choices=2))
    assert [len(table) for table in reserved.blocks] == [2, 2]  # 16 + 17 - 1 tokens each
    assert reserved.blocks[0][0] == reserved.blocks[1][0]
    assert blocks.free_count == 5  # the prompt's block is one
    scheduler.release(reserved)
    scheduler.release(reserved)
    assert blocks.free_count == 8


def test_full_and_too_large(scheduler: Scheduler) -> None:
    scheduler.reserve("c", request("a", choices=3))
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve("c", request("b"))
    assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.FULL, 0.5)
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve("c", request("c", choices=4))
    assert caught.value.reason is RejectReason.TOO_LARGE


def test_a_refused_attempt_may_be_tried_again(scheduler: Scheduler) -> None:
    first = scheduler.reserve("c", request("a", choices=3))
    with pytest.raises(RejectedError):
        scheduler.reserve("c", request("b"))
    scheduler.release(first)
    scheduler.reserve("c", request("b"))


def test_cancelled_blocks_are_free_only_between_steps(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve("c", request())
    sequence = running(reserved)
    scheduler.start(reserved, [sequence])
    assert scheduler.schedule(0) == [sequence]
    scheduler.cancel(reserved.id)
    assert not scheduler.runs(sequence)
    assert (blocks.free_count, scheduler.has_work) == (6, True)
    assert scheduler.schedule(0) == []
    assert (blocks.free_count, scheduler.has_work) == (8, False)


def test_choices_leave_one_by_one(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve("c", request(choices=3))
    sequences = [running(reserved, c) for c in (0, 2)]
    scheduler.start(reserved, sequences)  # choice 1 has ended with its first token
    assert (blocks.free_count, scheduler.running_count) == (5, 2)
    scheduler.finish(sequences[0])
    assert (blocks.free_count, scheduler.schedule(0)) == (6, [sequences[1]])
    scheduler.cancel(reserved.id, 2)
    scheduler.schedule(0)
    assert (blocks.free_count, scheduler.has_work) == (8, False)


def test_a_deadline_is_told(scheduler: Scheduler) -> None:
    reserved = scheduler.reserve("c", request(), deadline=100.0)
    sequence = running(reserved)
    scheduler.start(reserved, [sequence])
    assert scheduler.schedule(99.9) == [sequence]
    assert scheduler.schedule(100.0) == []
    assert [(e.sequence, e.reason) for e in scheduler.take_ended()] == [(sequence, FinishReason.DEADLINE)]


def test_a_higher_attempt_fences(scheduler: Scheduler, blocks: BlockPool) -> None:
    low = scheduler.reserve("c", request(attempt=1))
    scheduler.start(low, [running(low)])
    middle = scheduler.reserve("c", request(attempt=2))
    scheduler.schedule(0)
    assert [e.reason for e in scheduler.take_ended()] == [FinishReason.ERROR]
    high = scheduler.reserve("c", request(attempt=5))
    assert not scheduler.holds(middle)
    assert blocks.free_count == 6
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve("c", request(attempt=5))
    assert caught.value.reason is RejectReason.FENCED
    assert scheduler.holds(high)


def test_a_client_that_is_gone_leaves_nothing(scheduler: Scheduler, blocks: BlockPool) -> None:
    ours, theirs = scheduler.reserve("c", request("a")), scheduler.reserve("d", request("b"))
    scheduler.reserve("c", request("c"))
    scheduler.start(ours, [running(ours)])
    scheduler.cancel_session("c")
    scheduler.schedule(0)
    assert scheduler.holds(theirs)
    assert (blocks.free_count, scheduler.sequence_count) == (6, 1)


@pytest.mark.parametrize(
    ("kv_len", "shared", "own"), [(1, 0, 1), (15, 0, 2), (16, 1, 1), (17, 1, 1), (31, 1, 2), (32, 2, 1)]
)
def test_choices_share_what_the_prompt_fills_and_never_write_there(
    kv_len: int, shared: int, own: int
) -> None:
    """8 steps follow, each of which writes a token at kv_len."""
    blocks = BlockPool(20, 16)
    scheduler = Scheduler(blocks, max_sequences=4)
    reserved = scheduler.reserve("c", request(choices=4, kv_len=kv_len, max_tokens=9))
    assert (reserved.shared, blocks.in_use) == (shared, shared + 4 * own)
    sequences = [running(reserved, c) for c in range(4)]
    written = [[(s.kv_len + i) // 16 for i in range(8)] for s in sequences]
    targets = [{s.blocks[i] for i in places} for s, places in zip(sequences, written, strict=True)]
    assert sum(map(len, targets)) == len(set().union(*targets)), "two choices write to one block"
    assert not set().union(*targets) & set(reserved.blocks[0][:shared])
    scheduler.start(reserved, sequences)
    for left, sequence in zip((3, 2, 1, 0), sequences, strict=True):
        scheduler.finish(sequence)
        assert blocks.in_use == (shared + left * own if left else 0)


def test_a_shared_block_that_would_be_written_is_our_bug(scheduler: Scheduler) -> None:
    reserved = scheduler.reserve("c", request(choices=2))
    wrong = replace(running(reserved, 1), kv_len=15)  # its next token would go into the prompt's block
    with pytest.raises(AssertionError, match="another one reads"):
        scheduler.start(reserved, [running(reserved, 0), wrong])


def test_what_does_not_fit_twice_fits_when_shared() -> None:
    blocks = BlockPool(9, 16)
    scheduler = Scheduler(blocks, max_sequences=4)
    reserved = scheduler.reserve("c", request(choices=4, kv_len=80, max_tokens=9))  # 4 tables of 6 blocks
    assert (len(reserved.blocks), blocks.free_count) == (4, 0)
    with pytest.raises(RejectedError, match="5 blocks and 1 sequences") as caught:
        scheduler.reserve("c", request("other", choices=1, kv_len=64))
    assert caught.value.reason is RejectReason.FULL


def test_clients_of_equal_request_ids_do_not_meet(scheduler: Scheduler, blocks: BlockPool) -> None:
    """Clients choose their request ids: no attempt fences, and no cancel ends, what is another's."""
    ours = scheduler.reserve("c", request(attempt=1))
    sequence = running(ours)
    scheduler.start(ours, [sequence])
    theirs = scheduler.reserve("d", request(attempt=7))
    assert scheduler.take_ended() == []
    scheduler.cancel(HandOffId("d", "r", 1))
    assert scheduler.runs(sequence)
    again = scheduler.reserve("c", request(attempt=2))  # 2 is higher than our own 1: not fenced by 7
    assert [e.sequence for e in scheduler.take_ended()] == [sequence]
    assert scheduler.holds(theirs)
    assert scheduler.holds(again)
    scheduler.schedule(0)
    assert blocks.free_count == 4


def test_cancelling_all_frees_everything_and_says_nothing(scheduler: Scheduler) -> None:
    first, second = scheduler.reserve("c", request("a")), scheduler.reserve("c", request("b"))
    sequence = running(first)
    scheduler.start(first, [sequence])
    scheduler.cancel_all()
    assert (scheduler.take_ended(), scheduler.runs(sequence)) == ([], False)
    assert not scheduler.holds(second)
    assert scheduler.sequence_count == 0
