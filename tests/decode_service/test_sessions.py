"""Who gets the tokens, with plain data: one outbox per client, which outlives a broken stream for a while."""

import asyncio

import pytest

from decode_service.service import Sessions
from kvtransfer.errors import FencedError, LostError, ProtocolError
from kvtransfer.tokens import Attachment
from prad.core.sampling import TokenEvent


class Gone(list[str]):
    """The sessions that have ended."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()

    def __call__(self, session: str) -> None:
        self.append(session)
        self.changed.set()


@pytest.fixture
async def gone() -> Gone:
    return Gone()


@pytest.fixture
async def sessions(gone: Gone) -> Sessions:
    return Sessions(max_frames=3, detach_s=60, on_gone=gone)


def event(name: str, index: int = 0) -> TokenEvent:
    return TokenEvent(name, 1, 0, index)


async def names(attachment: Attachment, count: int) -> list[list[str]]:
    frames = [await attachment.next() for _ in range(count)]
    return [[e.request_id for e in frame.events] for frame in frames if frame is not None]


async def test_each_client_gets_its_own_events_in_one_frame_per_step(sessions: Sessions) -> None:
    a, ours = sessions.attach("same name", "", 0)
    b, theirs = sessions.attach("same name", "", 0)
    sessions.deliver({a: [event("x"), event("y")], b: [event("z")], "nobody": [event("w")]})
    sessions.deliver({a: [event("v")]})
    assert not sessions.flushed
    assert await names(ours, 2) == [["x", "y"], ["v"]]
    assert await names(theirs, 1) == [["z"]]
    assert sessions.flushed


async def test_who_is_started_anew_frees_what_it_left_at_once(sessions: Sessions, gone: Gone) -> None:
    """But for what has a stream: whoever takes another's name ends nothing of it."""
    left, stream = sessions.attach("c", "", 0)
    sessions.detach(left, stream)
    alive, _ = sessions.attach("other", "", 0)
    assert gone == []
    anew, _ = sessions.attach("c", "", 0)
    assert gone == [left]
    sessions.attach("c", "", 0)
    sessions.attach("other", "", 0)
    assert gone == [left]
    assert sessions.knows(anew)
    assert sessions.knows(alive)


async def test_a_session_without_a_stream_still_ends_if_somebody_attaches_wrongly(gone: Gone) -> None:
    sessions = Sessions(max_frames=3, detach_s=0.05, on_gone=gone)
    left, stream = sessions.attach("c", "", 0)
    sessions.detach(left, stream)
    with pytest.raises(ProtocolError):
        sessions.attach("c", left, 7)  # it never had so many frames
    async with asyncio.timeout(20):
        await gone.changed.wait()
    assert gone == [left]


async def test_a_session_goes_on_where_its_client_stopped(sessions: Sessions, gone: Gone) -> None:
    a, first = sessions.attach("c", "", 0)
    for i in range(3):
        sessions.deliver({a: [event(str(i))]})
    await first.next()
    sessions.detach(a, first)
    assert sessions.knows(a)
    again, second = sessions.attach("c", a, 1)
    assert again == a
    assert await names(second, 2) == [["1"], ["2"]]
    assert gone == []


async def test_a_newer_stream_takes_over_and_the_older_detaches_nothing(sessions: Sessions) -> None:
    a, older = sessions.attach("c", "", 0)
    _, newer = sessions.attach("c", a, 0)
    with pytest.raises(FencedError):
        await older.next()
    sessions.detach(a, older)
    sessions.deliver({a: [event("x")]})
    assert await names(newer, 1) == [["x"]]


async def test_who_stays_away_too_long_is_gone(gone: Gone) -> None:
    sessions = Sessions(max_frames=3, detach_s=0, on_gone=gone)
    a, stream = sessions.attach("c", "", 0)
    sessions.detach(a, stream)
    await gone.changed.wait()
    assert (gone, sessions.knows(a)) == ([a], False)
    again, _ = sessions.attach("c", a, 7)  # its old count is from another session: from the start
    assert again != a


async def test_who_takes_no_frames_is_gone(sessions: Sessions, gone: Gone) -> None:
    a, stream = sessions.attach("c", "", 0)
    for _ in range(4):
        sessions.deliver({a: [event("x")]})
    assert gone == [a]
    with pytest.raises(LostError, match="too slowly"):
        await stream.next()


async def test_acknowledged_frames_make_room(sessions: Sessions, gone: Gone) -> None:
    a, _ = sessions.attach("c", "", 0)
    for number in range(1, 9):
        sessions.deliver({a: [event("x")]})
        sessions.acknowledge(a, number)
    assert gone == []
    with pytest.raises(ProtocolError):
        sessions.acknowledge(a, 9)
    sessions.acknowledge("nobody", 1)


async def test_events_cross_from_the_engines_thread(sessions: Sessions) -> None:
    a, stream = sessions.attach("c", "", 0)
    await asyncio.to_thread(sessions.deliver_from_thread, {a: [event("x")]})
    assert await names(stream, 1) == [["x"]]


async def test_closing_lets_streams_end_behind_their_frames(sessions: Sessions) -> None:
    a, stream = sessions.attach("c", "", 0)
    sessions.deliver({a: [event("x")]})
    sessions.close()
    assert await names(stream, 1) == [["x"]]
    assert await stream.next() is None


async def test_nobody_comes_to_a_service_that_ends_and_who_comes_again_hears_the_rest(
    sessions: Sessions,
) -> None:
    """Or its client took the service that goes for the one that comes, and lost its answers a second time."""
    session, _ = sessions.attach("a", "", 0)
    sessions.deliver({session: [event("x")]})
    sessions.close()
    with pytest.raises(LostError, match="shutting down"):
        sessions.attach("a", "", 0)
    _, again = sessions.attach("a", session, 0)
    frames = [await again.next(), await again.next()]
    assert [frame and frame.number for frame in frames] == [1, None]
