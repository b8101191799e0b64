"""The gRPC face over an engine that is not real: no model, no tensors."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import signature

import grpc
import pytest
from fake_engine import FakeEngine, FakeReservation
from handing_over import quick

from decode_service.engine import PagedEngine
from decode_service.service import DecodeService, Sessions
from kvtransfer.errors import FencedError, LostError, ProtocolError, RejectedError, RejectReason
from kvtransfer.messages import Cancel, Open
from kvtransfer.rpc import add_decode
from kvtransfer.sender import DecodeClient, HandOff, send_layer
from kvtransfer.tokens import TokenStream
from prad.core.kv import KVLayout, LayerKV, ModelSpec
from prad.core.sampling import SamplingParams, Token, TokenEvent

MODEL = ModelSpec("f", KVLayout((LayerKV(1, 2, 2), LayerKV(1, 2, 2)), "float32"))
TOKEN = 8  # bytes of a token's keys, and of its values


@dataclass
class Served:
    engine: FakeEngine
    service: DecodeService
    sessions: Sessions
    port: int

    @property
    def last(self) -> FakeReservation:
        return self.engine.reservations[-1]


@asynccontextmanager
async def serving_fake(idle_s: float = 60.0) -> AsyncIterator[Served]:
    engine = FakeEngine()
    sessions = Sessions(max_frames=9, detach_s=60, on_gone=engine.cancel_session)
    service = DecodeService(engine, sessions, MODEL, idle_s=idle_s, shared_memory=False)
    server = grpc.aio.server()
    add_decode(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Served(engine, service, sessions, port)
    finally:
        sessions.close()
        service.stop()
        await server.stop(None)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_fake() as running:
        yield running


@asynccontextmanager
async def attached(served: Served, name: str = "c") -> AsyncIterator[tuple[DecodeClient, TokenStream]]:
    async with (
        DecodeClient(f"127.0.0.1:{served.port}", quick(shared_bytes=0)) as client,
        await client.attach(name) as stream,
    ):
        yield client, stream


def request(name: str = "r", tokens: int = 3, attempt: int = 1) -> Open:
    sampling = SamplingParams(max_tokens=9)
    return Open(name, MODEL, tokens, tokens, tokens, sampling, attempt=attempt)


async def send(hand_off: HandOff, layer: int, data: bytes, first_token: int = 0) -> None:
    """`data` as keys and as values."""
    await send_layer(layer, [data, data], [hand_off.rows(0, first_token, len(data) // TOKEN)])


@pytest.mark.parametrize("name", [name for name in vars(FakeEngine) if not name.startswith("_")])
def test_the_fake_is_asked_as_the_real_engine(name: str) -> None:
    fake, real = (signature(getattr(kind, name)).parameters.values() for kind in (FakeEngine, PagedEngine))
    assert [p.kind for p in fake] == [p.kind for p in real]


async def test_it_describes_what_the_engine_says(served: Served) -> None:
    async with attached(served) as (client, _):
        described = await client.describe()
    assert (described.model, described.total_blocks, described.free_blocks) == (MODEL, 100, 60)


async def test_a_hand_off_is_admitted_written_and_committed(served: Served) -> None:
    async with attached(served) as (client, _):
        async with await client.open(request()) as hand_off:
            for layer in range(2):
                for first, count in ((0, 2), (2, 1)):
                    data = bytes([10 * layer + first]) * count * TOKEN
                    await send(hand_off, layer, data, first)
            await hand_off.commit([Token(4)])
        assert served.last.written == [
            (layer, first, bytes([10 * layer + first]) * count * TOKEN)
            for layer in range(2)
            for first, count in ((0, 2), (2, 1))
        ]
        assert served.last.first_tokens == (Token(4),)
        assert served.last.calls == ["commit", "release"]


async def test_what_admit_refuses_is_answered(served: Served) -> None:
    served.engine.refusal = RejectedError(RejectReason.FULL, "no room", 0.5)
    async with attached(served) as (client, _):
        with pytest.raises(RejectedError, match="no room") as caught:
            await client.open(request())
    assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.FULL, 0.5)


async def test_nothing_is_admitted_for_who_is_not_attached_or_while_draining(served: Served) -> None:
    async with attached(served) as (client, _), DecodeClient(f"127.0.0.1:{served.port}") as stranger:
        with pytest.raises(RejectedError) as caught:
            await stranger.open(request())
        assert caught.value.reason is RejectReason.NOT_ATTACHED
        served.service.drain(0.25)
        with pytest.raises(RejectedError) as caught:
            await client.open(request())
        assert (caught.value.reason, caught.value.retry_after_s) == (RejectReason.DRAINING, 0.25)
    assert served.engine.reservations == []


async def test_a_stream_of_hand_offs_is_one_clients(served: Served) -> None:
    """Else one prefill service could fence, by its own Open, what runs for another."""
    async with attached(served) as (client, ours), attached(served) as (other, theirs):
        first = await client.open(request())
        await (await client.open(request("another"))).abort("enough")
        await (await other.open(request(attempt=9))).abort("enough")
        await first.abort("enough")
    mine = ours.session
    assert [r.session for r in served.engine.reservations] == [mine, mine, theirs.session]


async def test_a_cancel_reaches_only_its_own_client(served: Served) -> None:
    async with attached(served, "ours") as (_, ours), attached(served, "theirs") as (_, theirs):
        ours.cancel("r", 1)
        theirs.cancel("r", 2, 0)
        while len(served.engine.cancelled) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert dict(served.engine.cancelled) == {
        ours.session: Cancel("r", 1),
        theirs.session: Cancel("r", 2, 0),
    }


async def test_room_that_was_taken_away_fails_the_hand_off_alone(served: Served) -> None:
    async with attached(served) as (client, _):
        lost, kept = await client.open(request("lost")), await client.open(request("kept"))
        served.engine.reservations[0].held = False
        data = bytes(3 * TOKEN)
        await send(lost, 0, data)
        with pytest.raises(FencedError, match="taken over"):
            await lost.commit([Token(1)])
        for layer in range(2):
            await send(kept, layer, data)
        await kept.commit([Token(1)])
    assert served.engine.reservations[0].written == []
    assert [r.calls for r in served.engine.reservations] == [["release"], ["commit", "release"]]


async def test_what_a_client_leaves_open_is_released(served: Served) -> None:
    async with attached(served) as (client, _):
        await client.open(request())
    while served.last.calls != ["release"]:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_a_silent_hand_off_is_released_and_failed() -> None:
    async with serving_fake(idle_s=0.01) as served, attached(served) as (client, _):
        hand_off = await client.open(request())
        with pytest.raises(LostError, match="silent"):
            await asyncio.shield(hand_off.ended)
        assert served.last.calls == ["release"]


async def test_events_go_to_their_client_until_the_service_ends(served: Served) -> None:
    async with attached(served) as (_, stream):
        served.sessions.deliver({stream.session: [TokenEvent("r", 1, 0, 1, (Token(5),))]})
        frames = aiter(stream)
        frame = await anext(frames)
        assert (frame.number, [e.request_id for e in frame.events]) == (1, ["r"])
        served.sessions.close()
        with pytest.raises(LostError, match="shut down"):
            await anext(frames)


async def test_a_token_stream_begins_with_its_clients_name(served: Served) -> None:
    async with DecodeClient(f"127.0.0.1:{served.port}", quick()) as client:
        for name in ("", "x" * 257, "two\nlines"):  # the log repeats it
            with pytest.raises(ProtocolError, match="no client_id"):
                await client.attach(name)
