"""Whatever is sent to the port: who sends it is told, in one line of the log, and nobody else notices."""

import asyncio
from collections import Counter
from typing import ClassVar

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from handing_over import Prefill, prompt

from decode_service.hand_offs import HandOffs
from decode_service.server import DecodeServer
from decode_service.service import Refusals
from kvtransfer.errors import ProtocolError
from kvtransfer.messages import Frame, encode
from kvtransfer.proto import handoff_pb2 as pb
from kvtransfer.proto.handoff_pb2_grpc import DecodeStub
from prad.core.sampling import SamplingParams


@pytest.mark.parametrize(
    "method",
    [
        "prad.kvtransfer.v1.Decode/HandOffs",
        "prad.kvtransfer.v1.Decode/Tokens",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_garbage_is_refused_in_one_line(
    server: DecodeServer, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    caplog.set_level("INFO")
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(f"/{method}")()
        await call.write(b"\xff\xff garbage")
        with pytest.raises(AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text
    assert [r.message.split(":")[:2] for r in caplog.records] == [["a call ends", " not a message"]]


async def test_garbage_within_a_token_stream_ends_it(
    server: DecodeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else would be heard on it: no cancel, no acknowledgement."""
    caplog.set_level("INFO")
    attach = pb.TokenControl(attach=pb.Attach(client_id="c")).SerializeToString()
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream("/prad.kvtransfer.v1.Decode/Tokens")()
        await call.write(attach)
        await call.read()
        await call.write(b"\xff\xff garbage")
        with pytest.raises(AioRpcError, match="not a message") as caught:
            await call.read()
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text


async def test_many_ranges_of_rows_are_refused_unread(prefill: Prefill) -> None:
    hand_off = await prefill.client.open(prefill.request(5, SamplingParams(max_tokens=3)))
    rows = [pb.Rows(hand_off=hand_off.number)] * 20_000
    hand_off.stream.put(pb.HandOffFrame(kv=pb.KV(rows=rows)))
    with pytest.raises(ProtocolError, match="names 20000 ranges of rows, 16384 at most"):
        await asyncio.wait_for(asyncio.shield(hand_off.ended), 10)


async def test_a_long_message_lets_others_have_their_turn(
    prefill: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, received = 0, Counter[int]()
    receive = HandOffs.receive

    def counted(hand_offs: HandOffs, frame: Frame) -> object:
        received[turns] += 1
        return receive(hand_offs, frame)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    opened = encode(prefill.request(5, SamplingParams(max_tokens=3)))
    opened.hand_off = 1
    begin = pb.HandOffFrame(begin=pb.Begin(session=prefill.stream.session))
    abort = pb.HandOffFrame(abort=pb.Abort(hand_off=1))
    message = pb.HandOffFrames(frames=[begin, pb.HandOffFrame(open=opened), *[abort] * 5_000])
    monkeypatch.setattr(HandOffs, "receive", counted)
    waiting = asyncio.create_task(others())
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = DecodeStub(channel).HandOffs()  # type: ignore[no-untyped-call]
        await call.write(message)
        replies = (await call.read()).replies
    waiting.cancel()
    assert [reply.WhichOneof("reply") for reply in replies] == ["accepted", "aborted"]
    assert sum(received.values()) == 5_002
    assert max(received.values()) <= 256


async def test_much_garbage_is_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    class Context:
        ended: ClassVar[list[StatusCode]] = []

        async def abort(self, code: StatusCode, _: str) -> None:
            self.ended.append(code)

    caplog.set_level("INFO")
    now, refusals = [100.0], Refusals(every_s=5.0, clock=lambda: now[0])
    for _ in range(30):
        async with refusals.as_status(Context()):
            raise ProtocolError("garbage")
        now[0] += 1.0
    assert len(Context.ended) == 30
    first, *later = [record.message for record in caplog.records]
    assert first == "a call ends: garbage"
    assert later == ["a call ends: garbage (4 more ended since the last such line)"] * 5


@pytest.mark.parametrize("method", ["prad.kvtransfer.v1.Decode/Describe", "grpc.health.v1.Health/Check"])
async def test_garbage_in_a_single_message_is_refused_in_one_line(
    server: DecodeServer, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    caplog.set_level("INFO")
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(AioRpcError, match="not a message") as caught:
            await channel.unary_unary(f"/{method}")(b"\xff\xff garbage")
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text
    assert [r.message.split(":")[:2] for r in caplog.records] == [["a call ends", " not a message"]]


async def test_garbage_to_a_call_that_answers_with_a_stream_is_refused_in_one_line(
    server: DecodeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(AioRpcError, match="not a message") as caught:
            await channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff\xff garbage").read()
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in caplog.text
    assert [r.message.split(":")[:2] for r in caplog.records] == [["a call ends", " not a message"]]


async def test_health_is_watched_and_the_contract_is_told(server: DecodeServer) -> None:
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
        asking = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        for _ in range(2):
            await asking.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = [s.name for s in (await asking.read()).list_services_response.service]
            assert "prad.kvtransfer.v1.Decode" in names
        asking.cancel()


async def test_bytes_that_are_no_grpc_leave_the_service_alone(
    prefill: Prefill, server: DecodeServer, caplog: pytest.LogCaptureFixture
) -> None:
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 9,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(garbage)
        writer.write_eof()
        await reader.read()
        writer.close()
    assert len(await prefill.generate(prompt(9), SamplingParams(max_tokens=9))) == 9
    assert "Traceback" not in caplog.text
