"""A server and sockets that misbehave: bodies that stall, connections too many, heads that never come."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from prefill_service.api import ApiLimits, ModelInfo, bounded_protocol, create_app

Connect = Callable[[], Any]
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: here\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
BODY = b'{"prompt": "the food", "max_tokens": 2}'
HEALTH = b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: here\r\n"
    b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)


@asynccontextmanager
async def serving(app: FastAPI, **bounds: Any) -> AsyncIterator[Connect]:
    config = uvicorn.Config(
        app, port=0, log_level="warning", lifespan="off", ws="none", http=bounded_protocol(**bounds)
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        opened.append(writer)
        return reader, writer

    yield connect
    for writer in opened:
        writer.close()
    server.should_exit = True
    await task


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, json.loads(body)


@pytest.fixture
def impatient(tokenizer: Any, language_model: Any, catalogue: Any, engine: Any) -> FastAPI:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    limits = ApiLimits(body_timeout_s=1)
    return create_app(engine, catalogue, tokenizer, info, limits)


@pytest.mark.parametrize("sent", [b"", BODY[:10]])
async def test_a_body_that_stalls_is_refused(impatient: FastAPI, engine: Any, sent: bytes) -> None:
    async with serving(impatient, connections=9, head_timeout_s=60) as connect:
        reader, writer = await connect()
        writer.write(HEAD % len(BODY) + sent)
        status, headers, body = await answer(reader)
        assert (status, body["error"]["code"], headers["connection"]) == (408, "body_timeout", "close")
        assert f"{len(sent)} bytes are here" in body["error"]["message"]
        assert await reader.read() == b"", "the connection is closed"
        assert not engine.requests


async def test_a_body_that_keeps_coming_is_taken(impatient: FastAPI) -> None:
    """Longer than the time-out, but as fast as is asked for."""
    padding = b" " * 2**16
    async with serving(impatient, connections=9, head_timeout_s=60) as connect:
        reader, writer = await connect()
        writer.write(HEAD % (len(BODY) + 4 * len(padding)))
        for _ in range(4):
            writer.write(padding)
            await asyncio.sleep(0.4)
        writer.write(BODY)
        assert (await answer(reader))[0] == 200


async def test_a_connection_too_many_is_refused_in_our_words(app_of: Any, engine: Any) -> None:
    async with serving(app_of(engine), connections=2, head_timeout_s=60) as connect:
        waiting = [await connect() for _ in range(2)]
        for reader, writer in waiting:
            writer.write(HEALTH)
            assert (await answer(reader))[0] == 200
        reader, writer = await connect()
        writer.write(HEALTH)
        assert (await answer(reader))[0] == 200, "operators are served"
        writer.write(HEAD % len(BODY) + BODY)
        status, headers, body = await answer(reader)
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert (headers["connection"], headers["retry-after"]) == ("close", "1")
        assert await reader.read() == b""

        reader, writer = waiting[0]
        writer.write(HEAD % len(BODY) + BODY)
        assert (await answer(reader))[0] == 200, "who is in is served"
        waiting[1][1].close()
        await waiting[1][1].wait_closed()
        reader, writer = await connect()
        writer.write(HEAD % len(BODY) + BODY)
        assert (await answer(reader))[0] == 200, "a place is free again"


async def test_a_head_that_never_comes_closes_the_connection(app_of: Any, engine: Any) -> None:
    async with serving(app_of(engine), connections=9, head_timeout_s=0.1) as connect:
        reader, writer = await connect()
        writer.write(b"POST /v1/comp")
        assert await reader.read() == b""


@pytest.mark.parametrize("begun", [HEALTH[:-2], CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)])
@pytest.mark.parametrize("fields", [b"x: %s\r\n" % (b"a" * 2**16), b"x: a\r\n" * 2**13], ids=["long", "many"])
async def test_a_head_that_does_not_end_is_refused(
    app_of: Any, engine: Any, begun: bytes, fields: bytes
) -> None:
    """Nor what follows a body: nothing bounds either in uvicorn's parser (vllm #23267)."""
    told = b""
    async with serving(app_of(engine), connections=9, head_timeout_s=60) as connect:
        reader, writer = await connect()
        with suppress(ConnectionError):  # closed with much of it unread
            writer.write(begun)
            for _ in range(64):
                writer.write(fields)
                await writer.drain()
            writer.write(b"\r\n")
            told = await reader.read(100)
    assert told == b"" or told.startswith(b"HTTP/1.1 400 ")


async def test_a_body_in_small_pieces_is_taken(app_of: Any, engine: Any) -> None:
    async with serving(app_of(engine), connections=9, head_timeout_s=60) as connect:
        reader, writer = await connect()
        sent = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY + b" " * 18_000)
        for _ in range(3):  # what one request took does not count against the next
            writer.write(CHUNKED + sent + b"0\r\n\r\n")
            assert (await answer(reader))[0] == 200


async def test_millions_of_lists_are_refused_before_they_are_made(impatient: FastAPI) -> None:
    transport = httpx.ASGITransport(impatient)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for item in (b"[]", b"{}", b"[{}]"):
            body = b'{"prompt": [' + b",".join([item] * 100_000) + b"]}"
            headers = {"content-type": "application/json"}
            response = await client.post("/v1/completions", content=body, headers=headers)
            assert response.status_code == 400
            assert "too many of [ and {" in response.json()["error"]["message"]
