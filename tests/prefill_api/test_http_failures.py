"""Whatever goes wrong, the client reads OpenAI's error object, and nothing keeps running."""

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    OverloadedError,
    ServingError,
)

BODY = {"prompt": "the food", "max_tokens": 8, "seed": 1, "ignore_eos": True}
URL = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", JSON, 400, "invalid_json"),
        (b"\xff\xfe", JSON, 400, "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', JSON, 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', JSON, 400, "invalid_json"),
        (b"[" * 10_000, JSON, 400, "invalid_json"),
        (b'{"prompt": "x", "seed": ' + b"1" * 9_000 + b"}", JSON, 400, "invalid_json"),
        (b"[]", JSON, 400, None),
        (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b" " * 20_001, JSON, 413, "request_too_large"),
        (b'{"prompt": ["a", "b", "c", "d", "e"]}', JSON, 400, None),
        (b'{"prompt": ["a", "b", "c"], "n": 3}', JSON, 400, None),
        (b'{"prompt": ""}', JSON, 400, None),
        (b'{"prompt": [1, 99999]}', JSON, 400, None),
        (b'{"prompt": "x", "min_tokens": 5, "max_tokens": 4}', JSON, 400, None),
    ],
)
async def test_bad_requests(
    client: httpx.AsyncClient, content: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    response = await client.post(URL, content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_body_of_unknown_length_is_bounded_too(client: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 1000

    response = await client.post(URL, content=endless(), headers=JSON)
    assert response.status_code == 413


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    missing = await client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await client.get(URL)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (OverloadedError("the queue is full", retry_after=2.5), "3"),
        (DecodeUnavailableError("no decode service"), "1"),
        (DeadlineError("too late"), None),
    ],
)
async def test_errors_before_the_first_token_have_their_status(
    client: httpx.AsyncClient, engine: Any, error: ServingError, retry_after: str | None, stream: bool
) -> None:
    engine.error, engine.fail_at = error, 0
    response = await client.post(URL, json={**BODY, "stream": stream})
    assert response.status_code == error.status
    assert response.json() == error.body()
    assert response.headers.get("retry-after") == retry_after
    assert not engine.open


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
async def test_an_error_in_mid_stream_is_the_last_event(
    client: httpx.AsyncClient, engine: Any, prompts: list[str]
) -> None:
    """No [DONE] behind it: that would call a broken answer whole."""
    engine.error, engine.fail_at = DecodeUnavailableError("gone"), 6
    response = await client.post(URL, json={**BODY, "prompt": prompts, "stream": True, "logprobs": 0})
    *chunks, error, _ = response.text.split("\n\n")
    assert response.status_code == 200
    assert chunks
    assert json.loads(error.removeprefix("data: ")) == engine.error.body()
    assert "[DONE]" not in response.text
    assert not engine.open
    assert 'status="503"' in (await client.get("/metrics")).text


@pytest.mark.parametrize("fail_at", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_unexpected_errors_stay_in_the_log(
    client: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture, stream: bool, fail_at: int
) -> None:
    engine.error, engine.fail_at = ZeroDivisionError("secret"), fail_at
    response = await client.post(URL, json={**BODY, "stream": stream, "logprobs": 0})
    assert response.status_code == (200 if stream and fail_at else 500)
    assert "internal_error" in response.text
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert response.headers["x-request-id"] in response.text
    assert response.headers["x-request-id"] in caplog.text


async def test_nothing_is_served_before_ready(client: httpx.AsyncClient, engine: Any) -> None:
    engine.trouble = "the model is loading"
    response = await client.post(URL, json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert "the model is loading" in response.json()["error"]["message"]


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_at", [0, 4])
async def test_a_client_that_leaves_frees_everything(
    app_of: Any, engine: Any, drive: Any, prompts: list[str], stream: bool, pause_at: int
) -> None:
    """The app is driven by hand: the connection closes while the engine is waiting."""
    engine.pause_at = pause_at
    body = json.dumps({**BODY, "prompt": prompts, "stream": stream, "logprobs": 0}).encode()
    leave = asyncio.Event()
    app = app_of(engine)
    driven = drive(app, URL, [{"type": "http.request", "body": body, "more_body": False}], leave)
    for _ in prompts:
        await engine.paused.acquire()
    assert len(engine.open) == len(prompts)
    leave.set()
    await driven.serving
    assert not engine.open
    assert bool(driven.sent) == (stream and pause_at > 0)
    assert all(message.get("more_body", True) for message in driven.sent)
    assert await statuses(app) == {"499"}


async def test_a_client_that_leaves_in_its_own_body_is_no_error(
    app_of: Any, engine: Any, drive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    leave = asyncio.Event()
    leave.set()
    app = app_of(engine)
    driven = drive(app, URL, [{"type": "http.request", "body": b"{", "more_body": True}], leave)
    await driven.serving
    assert not driven.sent
    assert not caplog.records
    assert await statuses(app) == {"499"}


async def test_a_cancelled_server_task_stays_cancelled(app_of: Any, engine: Any, drive: Any) -> None:
    engine.pause_at = 2
    body = json.dumps(BODY).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    driven = drive(app_of(engine), URL, messages, asyncio.Event())
    await engine.paused.acquire()
    driven.serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driven.serving
    assert not engine.open


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_ends_too_early_is_an_error(
    client: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine.end_at = 3
    response = await client.post(URL, json={**BODY, "stream": stream, "logprobs": 0})
    assert response.status_code == (200 if stream else 500)
    assert '"code":"internal_error"' in response.text
    assert response.headers["x-request-id"] in caplog.text


async def statuses(app: FastAPI) -> set[str]:
    """The statuses that the metrics have counted."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return set(re.findall(r'requests_total{.*status="(\d+)"', (await client.get("/metrics")).text))
