"""Who may reach the API, and what its log says of it."""

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prefill_service.api import ApiAccess, ModelInfo, create_app
from prefill_service.errors import DecodeUnavailableError
from prefill_service.settings import PrefillSettings

URL = "/v1/completions"
SECRET = "my secret prompt"
ORIGIN = {"origin": "http://localhost:5173"}
Open = Callable[..., httpx.AsyncClient]


@pytest.fixture
def open_to(engine: Any, tokenizer: Any, language_model: Any, catalogue: Any) -> Open:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())

    def opened(**access: Any) -> httpx.AsyncClient:
        app: FastAPI = create_app(engine, catalogue, tokenizer, info, access=ApiAccess(**access))
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    return opened


async def test_a_name_of_a_web_page_is_refused(open_to: Open) -> None:
    async with open_to(hosts=("API.example.com", "*.svc.example")) as client:
        for host in ("localhost:80", "10.1.2.3", "prefill", "api.example.com:80", "a.svc.example"):
            assert (await client.get("/health", headers={"host": host})).status_code == 200
        for path in ("/health", "/v1/models", "/metrics"):
            refused = await client.get(path, headers={"host": "evil.example:80"})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (403, "host_not_allowed", "host")
            assert "allowed_hosts" in error["message"]
        long = await client.get("/health", headers={"host": "e" * 9000 + ".example"})
        assert (long.status_code, len(long.content) < 500) == (403, True)


async def test_pages_of_listed_origins_are_let_in(open_to: Open) -> None:
    asks = {
        **ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    async with open_to(cors_origins=(ORIGIN["origin"],)) as client:
        preflight = await client.options(URL, headers=asks)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (
            200,
            ORIGIN["origin"],
        )
        answers = [
            await client.post(URL, json={"prompt": "x", "max_tokens": 1}, headers=ORIGIN),
            await client.post(URL, json={"prompt": 5}, headers=ORIGIN),
            await client.get("/nothing", headers=ORIGIN),
        ]
        assert [answer.status_code for answer in answers] == [200, 400, 404]
        assert all(a.headers["access-control-allow-origin"] == ORIGIN["origin"] for a in answers)
        assert "x-request-id" in answers[0].headers["access-control-expose-headers"]
        other = await client.options(URL, headers={**asks, "origin": "http://evil.example"})
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)
    async with open_to() as client:
        assert (await client.options(URL, headers=asks)).status_code == 405
        assert "access-control-allow-origin" not in (await client.get("/health", headers=ORIGIN)).headers


def test_settings_are_lists_of_names() -> None:
    settings = PrefillSettings(allowed_hosts="a.example, *.b.example ,", cors_origins="*")
    assert settings.hosts == ("127.0.0.1", "a.example", "*.b.example")
    assert settings.origins == ("*",)
    assert PrefillSettings().origins == ()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": SECRET, "task": "nope"}, 'task=- status=404 code=model_not_found param="task"'),
        ({"prompt": {"a": SECRET}}, 'task=- status=400 code=None param="prompt": wrong value'),
        (
            {"prompt": SECRET, "task": "e2e", "max_tokens": 500},
            "task=e2e version=2 digest=e2e-2-digest routing=41 status=400 code=context_length_exceeded",
        ),
        ({"prompt": SECRET, "task": "e2e", "what\nelse": 1}, 'param="what\\nelse": wrong value'),
    ],
)
async def test_a_request_that_fails_is_one_line_in_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, body: Any, told: str
) -> None:
    response = await client.post(URL, json=body, headers={"x-request-id": "mine-1"})
    assert response.status_code in (400, 404)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f'request mine-1 "POST" "{URL}" ')
    assert told in line
    assert "secret" not in line
    assert "\n" not in line


async def test_a_stream_that_breaks_off_is_one_line_too(
    client: httpx.AsyncClient, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error, engine.fail_at = DecodeUnavailableError("gone"), 3
    body = {"prompt": SECRET, "stream": True, "ignore_eos": True, "logprobs": 0, "max_tokens": 8}
    assert (await client.post(URL, json=body)).status_code == 200
    (line,) = (record.getMessage() for record in caplog.records)
    assert 'status=503 code=decode_unavailable param=-: "gone"' in line


async def test_every_request_is_logged_by_choice(open_to: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="prefill_service")
    async with open_to(log=True) as client:
        answer = await client.post(URL, json={"prompt": SECRET, "task": "e2e", "max_tokens": 2})
        await client.get("/nothing%0Ahere")
    served, missed = (record.getMessage() for record in caplog.records)
    assert f"{answer.headers['x-request-id']} " in served
    assert "task=e2e version=2 digest=e2e-2-digest routing=41 status=200" in served
    assert f"prompt={answer.json()['usage']['prompt_tokens']} cached=0 completion=" in served
    assert "secret" not in served
    assert 'status=404 code=not_found param=-: "there is no /nothing' in missed
    assert "\n" not in missed
    caplog.clear()
    async with open_to() as client:
        await client.get("/health")
    assert not caplog.records


@pytest.mark.parametrize("path", [URL, "/v1/chat/completions"])
async def test_what_guidellm_sends_is_served(client: httpx.AsyncClient, path: str) -> None:
    """Its text and chat requests of 0.8."""
    chat = path != URL
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "e2e", "stream": True, "stream_options": options, "stop": None, "ignore_eos": True}
    parts = [{"type": "text", "text": "the food"}]
    body |= (
        {"max_completion_tokens": 3, "messages": [{"role": "user", "content": parts}]}
        if chat
        else {"max_tokens": 3, "prompt": "the food"}
    )
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    *chunks, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(chunks[-1].removeprefix("data: "))["usage"]["completion_tokens"] == 3
