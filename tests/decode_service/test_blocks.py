"""The pure parts: the block allocator and the scheduler, with plain data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_service.scheduler import Scheduler
from decode_service.sequences import FinishReason, Reserved, Running, SequenceId
from kvtransfer import Open, RejectedError, RejectReason
from prad.core.blocks import BlockPool
from prad.core.layout import KVLayout, LayerKV, ModelSpec
from prad.core.sampling import SamplingParams

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


def request(
    name: str = "r", attempt: int = 1, choices: int = 1, client: str = "c", deadline: int = 0
) -> Open:
    return Open(
        request_id=name,
        client_id=client,
        model=MODEL,
        kv_len=16,
        prompt_len=16,
        next_position=16,
        sampling=SamplingParams(max_tokens=17),
        attempt=attempt,
        choices=choices,
        deadline_unix_ms=deadline,
    )


def running(reserved: Reserved, choice: int = 0) -> Running:
    return Running(SequenceId(reserved.id, choice), reserved.request, reserved.blocks[choice], 1, 0, 16, 16)


@pytest.fixture
def blocks() -> BlockPool:
    return BlockPool(8, 16)


@pytest.fixture
def scheduler(blocks: BlockPool) -> Scheduler:
    return Scheduler(blocks, max_sequences=3, retry_after_s=0.5)


def test_a_reservation_is_a_whole_life(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve(request(choices=2))
    assert [len(table) for table in reserved.blocks] == [2, 2]  # 16 + 17 - 1 tokens each
    assert blocks.free_count == 4
    scheduler.release(reserved)
    scheduler.release(reserved)
    assert blocks.free_count == 8


def test_full_and_too_large(scheduler: Scheduler) -> None:
    scheduler.reserve(request("a", choices=3))
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve(request("b"))
    assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.FULL, 0.5)
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve(request("c", choices=4))
    assert caught.value.reason is RejectReason.TOO_LARGE


def test_a_refused_attempt_may_be_tried_again(scheduler: Scheduler) -> None:
    first = scheduler.reserve(request("a", choices=3))
    with pytest.raises(RejectedError):
        scheduler.reserve(request("b"))
    scheduler.release(first)
    scheduler.reserve(request("b"))


def test_cancelled_blocks_are_free_only_between_steps(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve(request())
    sequence = running(reserved)
    scheduler.start(reserved, [sequence])
    assert scheduler.schedule(0).batch == (sequence,)
    scheduler.cancel(reserved.id)
    assert not scheduler.runs(sequence)
    assert (blocks.free_count, scheduler.has_work) == (6, True)
    assert scheduler.schedule(0).batch == ()
    assert (blocks.free_count, scheduler.has_work) == (8, False)


def test_choices_leave_one_by_one(scheduler: Scheduler, blocks: BlockPool) -> None:
    reserved = scheduler.reserve(request(choices=3))
    sequences = [running(reserved, c) for c in (0, 2)]
    scheduler.start(reserved, sequences)  # choice 1 has ended with its first token
    assert (blocks.free_count, scheduler.running_count) == (4, 2)
    scheduler.finish(sequences[0])
    assert (blocks.free_count, scheduler.schedule(0).batch) == (6, (sequences[1],))
    scheduler.cancel(reserved.id, 2)
    scheduler.schedule(0)
    assert (blocks.free_count, scheduler.has_work) == (8, False)


def test_a_deadline_is_told(scheduler: Scheduler) -> None:
    reserved = scheduler.reserve(request(deadline=100))
    sequence = running(reserved)
    scheduler.start(reserved, [sequence])
    assert scheduler.schedule(99).batch == (sequence,)
    plan = scheduler.schedule(100)
    assert plan.batch == ()
    assert [(e.sequence, e.reason) for e in plan.ended] == [(sequence, FinishReason.DEADLINE)]


def test_a_higher_attempt_fences(scheduler: Scheduler, blocks: BlockPool) -> None:
    low = scheduler.reserve(request(attempt=1))
    scheduler.start(low, [running(low)])
    middle = scheduler.reserve(request(attempt=2))
    assert [e.reason for e in scheduler.schedule(0).ended] == [FinishReason.ERROR]
    high = scheduler.reserve(request(attempt=5))
    assert not scheduler.holds(middle)
    assert blocks.free_count == 6
    with pytest.raises(RejectedError) as caught:
        scheduler.reserve(request(attempt=5))
    assert caught.value.reason is RejectReason.FENCED
    assert scheduler.holds(high)


def test_a_client_that_is_gone_leaves_nothing(scheduler: Scheduler, blocks: BlockPool) -> None:
    ours, theirs = scheduler.reserve(request("a")), scheduler.reserve(request("b", client="d"))
    scheduler.reserve(request("c"))
    scheduler.start(ours, [running(ours)])
    scheduler.cancel_client("c")
    scheduler.schedule(0)
    assert scheduler.holds(theirs)
    assert (blocks.free_count, scheduler.sequence_count) == (6, 1)
