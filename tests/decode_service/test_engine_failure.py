"""A fault in the engine's thread, anywhere but in a step's own pass: everything ends, the process as well."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from grpc.aio import insecure_channel
from grpc_health.v1 import health_pb2, health_pb2_grpc
from handing_over import Prefill, decode_settings, llama, prefilling, prompt, prompt_pass
from test_decode_process import listening

from decode_service.engine import PagedEngine
from decode_service.reservations import Limits
from decode_service.runner import ModelRunner
from decode_service.scheduler import Scheduler
from decode_service.server import DecodeServer, serving
from decode_service.service import Sessions
from kvtransfer.errors import FencedError, LostError, RejectedError, RejectReason
from kvtransfer.messages import Ask, Open
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, Token, TokenEvent
from prad.lm import LanguageModel

LONG = SamplingParams(max_tokens=120)
HEALTH = health_pb2.HealthCheckResponse


def broken(*_: object) -> Any:
    raise RuntimeError("a fault of ours")


async def test_every_sequence_ends_with_the_stream_and_health_says_so(
    prefill: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [(await prefill.hand_over(prompt(9 + i), LONG, choices=2))[0] for i in range(2)]
    reserved = await prefill.client.open(prefill.request(9, LONG))
    await prefill.got.until(requests[0].request_id, count=2)
    monkeypatch.setattr(Scheduler, "schedule", broken)
    await server.failed.wait()
    assert await reported_health(server) == HEALTH.NOT_SERVING
    with pytest.raises(RejectedError) as caught:
        await prefill.client.open(prefill.request(9, LONG))
    assert caught.value.reason is RejectReason.DRAINING
    status = server.engine.status()
    assert (status.sequences, server.failure) == (0, "the decode engine failed: a fault of ours")
    assert not reserved.over, "it hears of it when it goes on"
    await prefill.send(reserved, prompt_pass(prefill.model, prompt(9)))
    with pytest.raises(FencedError):
        await reserved.commit([Token(1)])
    prefill.stream.ask(Ask(tuple((r.request_id, 1, choice) for r in requests for choice in range(2))))
    stopping = asyncio.create_task(server.stop())
    for request in requests:
        for choice in range(2):
            with pytest.raises(LostError, match="shut down"):
                await prefill.got.until(request.request_id, choice)
    assert {e.finish_reason for events in prefill.got.events.values() for e in events} == {None}
    await stopping


async def test_who_could_not_be_reached_hears_it_from_the_end_of_the_stream(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sessions, "deliver_from_thread", broken)
    async with serving(decode_settings(), model) as server, prefilling(model, server.port) as prefill:
        request, _ = await prefill.hand_over(prompt(9), LONG)
        await server.failed.wait()
        stopping = asyncio.create_task(server.stop())
        with pytest.raises(LostError):
            await prefill.got.until(request.request_id)
        await stopping


async def test_a_device_without_room_for_a_hand_off_keeps_none(
    prefill: Prefill, server: DecodeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = server.engine.status().free_blocks
    monkeypatch.setattr(ModelRunner, "room", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        server.engine.admit("session", prefill.request(9, LONG))
    assert server.engine.status().free_blocks == free


async def reported_health(server: DecodeServer) -> int:
    async with insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while (status := (await stub.Check(health_pb2.HealthCheckRequest())).status) == HEALTH.SERVING:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return int(status)


DIES = """
from decode_service.scheduler import Scheduler
from decode_service.server import run
from decode_service.settings import DecodeSettings

def broken(*_):
    raise RuntimeError("a fault of ours")

Scheduler.finish = broken
run(DecodeSettings())
"""


async def test_the_process_exits(tmp_path: Path, unused_tcp_port: int) -> None:
    """With a status that a supervisor restarts on."""
    llama().module.save_pretrained(tmp_path)  # type: ignore[operator]
    environment = {
        "PRAD_DECODE_MODEL": str(tmp_path),
        "PRAD_DECODE_PORT": str(unused_tcp_port),
        "PRAD_DECODE_DTYPE": "float32",
        "PRAD_DECODE_KV_CACHE_MIB": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DIES, env={**os.environ, **environment}, stderr=asyncio.subprocess.PIPE
    )
    model = LanguageModel.load(tmp_path, dtype=llama().dtype)
    await listening(model, unused_tcp_port)
    async with prefilling(model, unused_tcp_port) as prefill:
        request, _ = await prefill.hand_over(prompt(9), SamplingParams(max_tokens=9))
        with pytest.raises(LostError):
            await prefill.got.until(request.request_id)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"EngineFailedError: the decode engine failed: a fault of ours" in said


class FakeRunner:
    """Draws token 1 for everybody, without a model."""

    def __init__(self) -> None:
        self.limits = Limits(100, 10, {})

    def room(self, reserved: object) -> Any:
        return None

    def run(self, batch: Sequence[object], drafts: Sequence[object]) -> list[list[Token]]:
        return [[Token(1)]] * len(batch)


@pytest.mark.parametrize("fault", ["observe", "deliver"])
def test_a_fault_outside_the_pass_is_reported_by_the_thread(model: LanguageModel, fault: str) -> None:
    """The engine alone, with nothing real around it: `stop` returns although the thread is gone."""
    events: list[TokenEvent] = []
    failures: list[str] = []
    engine = PagedEngine(
        FakeRunner(),
        Scheduler(BlockPool(20, 16), 4),
        deliver=broken if fault == "deliver" else lambda by_client: events.extend(by_client["c"]),
        observe=broken if fault == "observe" else lambda *_: None,
        on_failure=failures.append,
    )
    engine.start()
    reservation = engine.admit("c", Open("r", model.spec, 5, 5, 5, SamplingParams(max_tokens=9)))
    engine.commit(reservation, [Token(2)])
    engine.stop()
    assert failures == ["the decode engine failed: a fault of ours"]
    assert events == []
    with pytest.raises(RejectedError, match="failed: a fault of ours"):
        engine.admit("c", Open("other", model.spec, 5, 5, 5, SamplingParams(max_tokens=9)))
