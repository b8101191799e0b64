"""Numbered frames: each is kept until acknowledged, and a stream that comes again misses none."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.errors import FencedError, LostError, ProtocolError
from kvtransfer.tokens import Outbox
from prad.core.sampling import TokenEvent

EVENT = TokenEvent("r", 1, 0, 1)


def filled(frames: int, most: int = 10) -> Outbox:
    outbox = Outbox(most)
    for _ in range(frames):
        outbox.append([EVENT])
    return outbox


async def test_numbers_count_from_1() -> None:
    attachment = filled(3).attach(0)
    assert [(await attachment.next()).number for _ in range(3)] == [1, 2, 3]  # type: ignore[union-attr]


async def test_a_new_attachment_goes_on_after_what_arrived() -> None:
    outbox = filled(5)
    first = outbox.attach(0)
    await first.next()
    again = outbox.attach(2)
    assert (await again.next()).number == 3  # type: ignore[union-attr]
    with pytest.raises(FencedError):
        await first.next()
    assert not outbox.detach(first)
    assert outbox.detach(again)


async def test_it_waits_for_the_next_frame() -> None:
    outbox = filled(0)
    waiting = asyncio.create_task(outbox.attach(0).next())
    await asyncio.sleep(0)
    outbox.append([EVENT])
    assert (await waiting).number == 1  # type: ignore[union-attr]
    assert outbox.flushed


async def test_an_early_acknowledgement_skips_nothing_new() -> None:
    outbox = filled(4)
    attachment = outbox.attach(0)
    outbox.acknowledge(3)
    assert (await attachment.next()).number == 4  # type: ignore[union-attr]


async def test_the_end() -> None:
    outbox = filled(1)
    attachment = outbox.attach(0)
    outbox.close()
    assert await attachment.next() is not None
    assert await attachment.next() is None
    outbox.fail(LostError("gone"))
    with pytest.raises(LostError, match="gone"):
        await attachment.next()


def test_it_is_bounded() -> None:
    outbox = filled(9)
    assert not outbox.full
    outbox.append([EVENT])
    assert outbox.full
    outbox.acknowledge(1)
    assert not outbox.full


def test_frames_that_never_were() -> None:
    with pytest.raises(ProtocolError, match="frame 4 is acknowledged, 3 is the last"):
        filled(3).acknowledge(4)
    with pytest.raises(ProtocolError):
        filled(3).attach(4)


@given(st.integers(0, 10), st.integers(0, 10))
def test_what_is_kept(frames: int, acknowledged: int) -> None:
    acknowledged = min(acknowledged, frames)
    outbox = filled(frames)
    outbox.acknowledge(acknowledged)
    for received in range(acknowledged, frames):
        frame = outbox.after(received)
        assert frame is not None
        assert frame.number == received + 1
    assert outbox.after(frames) is None
