"""The way back: streams that break, clients that vanish, services that stop."""

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from grpc.aio import AioRpcError, insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from handing_over import (
    Prefill,
    Proxy,
    all_free,
    decode_settings,
    llama,
    prefilling,
    prompt,
    prompt_pass,
    quick,
)

from decode_service.engine import _MISSING
from decode_service.server import BindError, CacheTooSmallError, DecodeServer, UnprotectedError, serving
from decode_service.service import Sessions
from kvtransfer.errors import FencedError, LostError, RejectedError, RejectReason
from kvtransfer.messages import Ask, Cancel, encode
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from prad.core.sampling import SamplingParams, Token
from prad.lm import LanguageModel

LONG = SamplingParams(max_tokens=120)


@pytest.fixture
async def wire(server: DecodeServer) -> AsyncIterator[Proxy]:
    async with Proxy().to(server.port) as proxy:
        yield proxy


@pytest.mark.parametrize("each", [1, 2])
async def test_reattaching_loses_and_repeats_nothing(
    model: LanguageModel, server: DecodeServer, wire: Proxy, each: int
) -> None:
    async with prefilling(model, wire.port) as prefill:
        requests = [
            (await prefill.hand_over(prompt(9 + i), LONG, tokens_per_event=each))[0] for i in range(3)
        ]
        for count in (5, 20, 50):
            await prefill.got.until(requests[0].request_id, count=count)
            wire.cut()
        for request in requests:
            events = await prefill.got.until(request.request_id)
            assert [e.index + i for e in events for i in range(len(e.tokens))] == list(range(1, 120))
        assert prefill.got.numbers == list(range(1, len(prefill.got.numbers) + 1))
        await all_free(server)


async def test_a_shutdown_waits_for_the_client_to_go(model: LanguageModel) -> None:
    """What the client still writes would otherwise meet a closed stream, and gRPC gives up what is unread."""
    service = serving(decode_settings(), model)
    server = await service.__aenter__()
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = DecodeStub(channel).Tokens()  # type: ignore[no-untyped-call]
        await call.write(pb.TokenControl(attach=pb.Attach(client_id="c")))
        assert (await call.read()).WhichOneof("reply") == "attached"
        stopping = asyncio.create_task(service.__aexit__(None, None, None))
        assert (await call.read()).WhichOneof("reply") == "ended"
        for _ in range(20):
            await call.write(pb.TokenControl(acknowledge=pb.Acknowledge(frame=0)))
            await asyncio.sleep(0.01)
        assert not stopping.done()
        call.cancel()
        await stopping


async def test_a_cancel_survives_a_broken_connection(
    model: LanguageModel, server: DecodeServer, wire: Proxy
) -> None:
    async with prefilling(model, wire.port) as prefill:
        request, _ = await prefill.hand_over(prompt(9), LONG)
        await prefill.got.until(request.request_id, count=2)
        wire.cut()
        prefill.stream.cancel(request.request_id, request.attempt)
        await all_free(server)


async def test_a_hand_off_on_a_broken_connection_is_lost(
    model: LanguageModel, server: DecodeServer, wire: Proxy
) -> None:
    async with prefilling(model, wire.port) as prefill:
        hand_off = await prefill.client.open(prefill.request(9, LONG))
        wire.cut()
        with pytest.raises(LostError):
            await hand_off.commit([Token(1)])
        await all_free(server)


async def test_who_asks_hears_what_decode_has_lost(
    model: LanguageModel, server: DecodeServer, prefill: Prefill
) -> None:
    """Behind the last tokens of a sequence, and never before them."""
    lost, _ = await prefill.hand_over(prompt(9), LONG, choices=2)
    kept, _ = await prefill.hand_over(prompt(12), LONG)
    await prefill.got.until(lost.request_id, count=3)
    server.engine.cancel(prefill.stream.session, Cancel(lost.request_id, 1, choice=1))  # it drops one
    names = ((lost.request_id, 1, 0), (lost.request_id, 1, 1), (kept.request_id, 1, 0), ("never", 1, 0))
    for _ in range(50):
        prefill.stream.ask(Ask(names))
        await asyncio.sleep(0.002)
    assert (await prefill.got.until(lost.request_id, 1))[-1].error == _MISSING
    assert (await prefill.got.until("never"))[0].error == _MISSING
    for request in (lost, kept):
        ended = [e for e in await prefill.got.until(request.request_id) if e.finish_reason]
        assert ended[0].finish_reason == "length"
    await all_free(server)


async def test_who_asks_after_a_strangers_sequence_ends_nothing_of_it(
    model: LanguageModel, server: DecodeServer
) -> None:
    async with prefilling(model, server.port) as ours, prefilling(model, server.port) as theirs:
        await ours.hand_over(prompt(9), LONG, request_id="x")
        theirs.stream.ask(Ask((("x", 1, 0),)))
        assert (await theirs.got.until("x"))[0].error == _MISSING
        assert len(await ours.got.until("x")) == 119


async def test_a_service_that_lives_and_does_not_answer_is_noticed(
    model: LanguageModel, server: DecodeServer, wire: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gRPC answers every ping. The connection is made anew, and what still runs goes on."""
    async with prefilling(model, wire.port, settings=quick(answer_timeout_s=0.05)) as prefill:
        await prefill.hand_over(prompt(9), LONG)
        with monkeypatch.context() as silent:
            silent.setattr(Sessions, "deliver", lambda *_: None)
            kept = prefill.stream.session
            prefill.stream.ask(Ask(()))
            while prefill.stream.connected:
                await asyncio.sleep(0.01)
                prefill.stream.ask(Ask(()))
        while not prefill.stream.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert prefill.stream.session == kept
        request, _ = await prefill.hand_over(prompt(9), LONG)
        assert len(await prefill.got.until(request.request_id)) == 119


async def test_closing_a_stream_tells_its_reader(prefill: Prefill) -> None:
    stream = await prefill.client.attach("other")
    reader = asyncio.create_task(anext(aiter(stream)))
    await asyncio.sleep(0)
    await stream.close()
    with pytest.raises(LostError, match="closed"):
        await reader


async def test_a_client_that_vanishes_frees_its_sequences(model: LanguageModel) -> None:
    async with (
        serving(decode_settings(detach_s=0.05), model) as server,
        prefilling(model, server.port, "staying") as staying,
    ):
        async with prefilling(model, server.port, "vanishing") as vanishing:
            await vanishing.hand_over(prompt(9), LONG)
            await vanishing.client.open(vanishing.request(9, LONG))
            request, _ = await staying.hand_over(prompt(9), LONG)
        assert len(await staying.got.until(request.request_id)) == 119
        await all_free(server)


async def test_a_client_that_takes_no_frames_is_given_up(model: LanguageModel) -> None:
    async with (
        serving(decode_settings(outbox_frames=10), model) as server,
        prefilling(model, server.port, settings=quick(acknowledge_every=1000)) as client,
    ):
        request, _ = await client.hand_over(prompt(9), LONG)
        await all_free(server)
        assert len(client.got.events[request.request_id, 0]) <= 10


async def test_a_newer_stream_of_a_session_takes_over(model: LanguageModel, server: DecodeServer) -> None:
    """As after a connection that only one of its ends knows to be broken."""
    async with prefilling(model, server.port, "same") as first:
        attach = pb.Attach(client_id="same", session=first.stream.session)
        async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
            newer = DecodeStub(channel).Tokens()  # type: ignore[no-untyped-call]
            await newer.write(pb.TokenControl(attach=attach))
            assert (await newer.read()).attached.session == first.stream.session
            with pytest.raises(FencedError):
                await anext(aiter(first.stream))
            newer.cancel()


async def test_a_clients_name_is_no_key(model: LanguageModel, server: DecodeServer) -> None:
    """Who knows a client's name and its request ids takes over, fences and cancels nothing of it."""
    short = SamplingParams(max_tokens=9)
    async with (
        prefilling(model, server.port, "same") as ours,
        prefilling(model, server.port, "same") as theirs,
    ):
        assert ours.stream.session != theirs.stream.session
        await ours.hand_over(prompt(9), LONG, request_id="x")
        theirs.stream.cancel("x", 1)
        await theirs.hand_over(prompt(12), short, request_id="x", attempt=2)
        assert len(await theirs.got.until("x")) == 8
        assert len(await ours.got.until("x")) == 119
        await ours.hand_over(prompt(9), short, request_id="x", attempt=2)
        await all_free(server)


async def raw_hand_offs(server: DecodeServer, *frames: pb.HandOffFrame) -> pb.HandOffReplies:
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = DecodeStub(channel).HandOffs()  # type: ignore[no-untyped-call]
        await call.write(pb.HandOffFrames(frames=frames))
        replies: pb.HandOffReplies = await call.read()
        call.cancel()
        return replies


async def test_a_session_that_is_guessed_hands_nothing_over(prefill: Prefill, server: DecodeServer) -> None:
    request = encode(prefill.request(5, LONG))
    request.hand_off = 1
    for guess in ("", prefill.stream.client_id, prefill.stream.session[:-1]):
        begin = pb.HandOffFrame(begin=pb.Begin(session=guess))
        (reply,) = (await raw_hand_offs(server, begin, pb.HandOffFrame(open=request))).replies
        assert reply.rejected.reason == RejectReason.NOT_ATTACHED
    await all_free(server)


@pytest.mark.parametrize("kind", ["commit", "abort"])
async def test_a_second_client_ends_no_hand_off_of_the_first(
    model: LanguageModel, server: DecodeServer, kind: str
) -> None:
    """Nor does it get the first one's tokens by a guess at its session."""
    async with (
        prefilling(model, server.port, "same") as ours,
        prefilling(model, server.port, "same") as other,
    ):
        async with await ours.client.open(ours.request(9, LONG, request_id="x")) as hand_off:
            frame = pb.HandOffFrame(**{kind: {"hand_off": hand_off.number}})  # type: ignore[arg-type]
            begin = pb.HandOffFrame(begin=pb.Begin(session=other.stream.session))
            with pytest.raises(AioRpcError, match="never opened"):
                await raw_hand_offs(server, begin, frame)
            async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
                call = DecodeStub(channel).Tokens()  # type: ignore[no-untyped-call]
                guess = ours.stream.session[:-1]
                await call.write(pb.TokenControl(attach=pb.Attach(client_id="same", session=guess)))
                assert (await call.read()).attached.session not in (guess, ours.stream.session)
                call.cancel()
            assert not hand_off.over
            prompted = prompt_pass(model, prompt(9))
            await ours.send(hand_off, prompted)
            await hand_off.commit([Token(int(prompted.logits.argmax()))])
        assert len(await ours.got.until("x")) == 119


@pytest.mark.parametrize("begins", [0, 2])
async def test_a_stream_of_hand_offs_begins_with_its_session(
    prefill: Prefill, server: DecodeServer, begins: int
) -> None:
    begin = pb.HandOffFrame(begin=pb.Begin(session=prefill.stream.session))
    with pytest.raises(AioRpcError, match="begins with Begin"):
        await raw_hand_offs(server, *[begin] * begins, pb.HandOffFrame(abort=pb.Abort(hand_off=1)))


async def test_attaching_anew_ends_the_session_before(prefill: Prefill, server: DecodeServer) -> None:
    before = await prefill.client.open(prefill.request(5, LONG))
    async with await prefill.client.attach("again"):
        await (await prefill.client.open(prefill.request(5, LONG))).abort("enough")
        with pytest.raises(LostError, match="attached anew"):
            await before.commit([Token(1)])
        await all_free(server)


async def test_clocks_of_two_hosts_may_differ(
    model: LanguageModel, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode's clocks are hours ahead of prefill's, or behind: what is left of a request is the same."""
    for ahead_s in (7200, -7200):
        skewed = SimpleNamespace(
            time_ns=lambda s=ahead_s: time.time_ns() + s * 10**9,
            time=lambda s=ahead_s: time.time() + s,
            monotonic=lambda s=ahead_s: time.monotonic() + s,
            perf_counter=time.perf_counter,
        )
        monkeypatch.setattr("decode_service.engine.time", skewed)
        async with prefilling(model, server.port) as client:
            in_time, _ = await client.hand_over(prompt(9), LONG, timeout_ms=600_000)
            assert (await client.got.until(in_time.request_id))[-1].finish_reason == "length"
            late, _ = await client.hand_over(prompt(9), LONG, timeout_ms=0)
            assert (await client.got.until(late.request_id))[-1].finish_reason == "deadline"


async def test_a_frozen_service_is_noticed(model: LanguageModel, server: DecodeServer, wire: Proxy) -> None:
    """Its host takes whatever is sent, and nothing comes back: only the pings tell."""
    quickly = quick(silence_s=3.0)
    async with prefilling(model, wire.port, settings=quickly) as prefill:
        assert prefill.stream.connected
        wire.freeze()
        while prefill.stream.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        wire.cut()
        while not prefill.stream.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        request, _ = await prefill.hand_over(prompt(9), SamplingParams(max_tokens=9))
        assert len(await prefill.got.until(request.request_id)) == 8


async def test_a_restarted_service_is_noticed(model: LanguageModel) -> None:
    async with serving(decode_settings(), model) as server:
        port = server.port
        client = prefilling(model, port)
        prefill = await client.__aenter__()
    with pytest.raises(LostError):
        async for _ in prefill.stream:
            pass
    async with serving(decode_settings(port=port), model):
        with pytest.raises(LostError, match="given up"):
            await prefill.stream.attach()
    await client.__aexit__(None, None, None)


async def test_shutdown_ends_who_still_runs_as_a_kill_does(model: LanguageModel) -> None:
    async with serving(decode_settings(), model) as server:
        client = prefilling(model, server.port)
        prefill = await client.__aenter__()
        request, _ = await prefill.hand_over(prompt(9), LONG)
    with pytest.raises(LostError, match="shut down"):
        await prefill.got.until(request.request_id)
    assert all(e.finish_reason is None for e in prefill.got.events.get((request.request_id, 0), []))
    await client.__aexit__(None, None, None)


async def test_drain_admits_nothing_and_finishes_the_rest(model: LanguageModel) -> None:
    async with serving(decode_settings(drain_s=60), model) as server:
        client = prefilling(model, server.port)
        prefill = await client.__aenter__()
        request, _ = await prefill.hand_over(prompt(9), LONG)
        stopping = asyncio.create_task(server.stop())
        assert await until_rejected(prefill) is RejectReason.DRAINING
        events = await prefill.got.until(request.request_id)
        assert len(events) == 119
        assert events[-1].finish_reason == "length"
        await stopping
        await client.__aexit__(None, None, None)


async def until_rejected(prefill: Prefill) -> RejectReason:
    try:
        while True:
            await (await prefill.client.open(prefill.request(9, LONG))).abort("not yet draining")
    except RejectedError as rejected:
        return rejected.reason


async def test_health_is_serving(server: DecodeServer) -> None:
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "prad.kvtransfer.v1.Decode"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_port_is_a_clear_error(server: DecodeServer, model: LanguageModel) -> None:
    with pytest.raises(BindError, match=f"{server.port}; choose another --port"):
        async with serving(decode_settings(port=server.port), model):
            pass


async def test_beyond_loopback_it_does_not_start_unless_told(model: LanguageModel) -> None:
    with pytest.raises(UnprotectedError, match=r"asks nobody for a key: .* or say --unprotected"):
        async with serving(decode_settings(host="0.0.0.0"), model):
            pass
    async with serving(decode_settings(host="0.0.0.0", unprotected=True), model) as server:
        assert server.port


async def test_a_cache_without_room_is_a_clear_error() -> None:
    with pytest.raises(CacheTooSmallError, match=r"1 MiB hold no block .*--kv-cache-mib .* [0-9]+ or more"):
        async with serving(decode_settings(block_size=1 << 16), llama()):
            pass


async def test_metrics(model: LanguageModel, unused_tcp_port: int) -> None:
    port = unused_tcp_port
    async with (
        serving(decode_settings(metrics_port=port), model) as server,
        prefilling(model, server.port) as client,
    ):
        await client.generate(prompt(9), SamplingParams(max_tokens=9))
        await all_free(server)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    assert "prad_decode_tokens_total 8.0" in text
    assert "prad_decode_running_sequences 0.0" in text
    assert "prad_decode_step_seconds_bucket" in text
