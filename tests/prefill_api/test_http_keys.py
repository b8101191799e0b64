"""API keys at the HTTP face: who needs one, what it is for, how much it may use; and what is told without."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from adapter_registry.keys import NewKey, StoredKey, hashed, issued, revoked
from prefill_service.api import ApiAccess, ModelInfo, create_app
from prefill_service.api.intake import PUBLIC, STATIC
from prefill_service.catalogue import KeyRing
from tests.routes import routes_added

URL = "/v1/completions"
BODY = {"model": "e2e", "prompt": "food", "max_tokens": 2, "ignore_eos": True}
NEEDS_A_KEY = {
    "GET /v1/models",
    "HEAD /v1/models",
    "GET /v1/models/{name:path}",
    "HEAD /v1/models/{name:path}",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/embeddings",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
    "GET /v1/responses/{name}",
    "DELETE /v1/responses/{name}",
    "POST /v1/files",
    "GET /v1/files",
    "GET /v1/files/{name}",
    "GET /v1/files/{name}/content",
    "DELETE /v1/files/{name}",
    "POST /v1/batches",
    "GET /v1/batches",
    "GET /v1/batches/{name}",
    "POST /v1/batches/{name}/cancel",
    "GET /metrics",
    "GET /docs/oauth2-redirect",
    "GET /nothing",
}
"""Among them what there is not, or nobody needs."""
NEEDS_NONE = {
    "GET /",
    "HEAD /",
    "GET /health",
    "HEAD /health",
    "GET /ready",
    "HEAD /ready",
    "GET /version",
    "GET /docs",
    "GET /openapi.json",
}

AppOf = Callable[..., FastAPI]


def key(name: str, **wanted: Any) -> StoredKey:
    """One whose token is its name."""
    return issued(None, NewKey(name=name, **wanted), hashed(name), 1, "2026-01-01T00:00:00.000+00:00", "")


def shown(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.fixture
def app_with(engine: Any, tokenizer: Any, language_model: Any, catalogue: Any) -> AppOf:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())

    def make(*keys: StoredKey, ring: KeyRing | None = None) -> FastAPI:
        ring = ring or KeyRing()
        ring.replace(keys)
        return create_app(engine, catalogue, tokenizer, info, access=ApiAccess(keys=ring))

    return make


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def error(client: httpx.AsyncClient, token: str | None, **body: Any) -> tuple[int, str | None]:
    answer = await client.post(URL, json=BODY | body, headers={} if token is None else shown(token))
    return answer.status_code, answer.json()["error"]["code"] if answer.is_error else None


async def test_every_route_needs_a_key_or_is_for_everybody(
    app_with: AppOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = routes_added(monkeypatch)
    app = app_with(key("alice"))
    known = {route.replace(" /v1/", " /") for route in NEEDS_A_KEY | NEEDS_NONE}
    assert found == known - {"GET /nothing", "GET /openapi.json"}
    assert {route.partition(" ")[2] for route in NEEDS_NONE} == set(PUBLIC)
    async with client_of(app) as client:
        for route in sorted(NEEDS_A_KEY | NEEDS_NONE):
            method, _, path = route.partition(" ")
            path = path.replace("{name:path}", "e2e")
            assert ((await client.request(method, path)).status_code == 401) == (route in NEEDS_A_KEY), route
            assert (await client.request(method, path, headers=shown("alice"))).status_code != 401, route
        page = (await client.get("/docs")).text
        (script,) = {part for part in page.split('"') if part.startswith(STATIC) and part.endswith(".js")}
        assert (await client.get(script)).status_code == 200


@pytest.mark.parametrize(
    "sent", [{}, shown("bob"), shown("gone"), shown(""), {"authorization": "alice"}, {"x-api-key": "bob"}]
)
async def test_without_a_key_that_is_in_force_nothing_is_told(app_with: AppOf, sent: dict[str, str]) -> None:
    gone = revoked(key("gone"), "gone", 2, "2026-01-01T00:00:00.000+00:00", "")
    async with client_of(app_with(key("alice"), gone)) as client:
        for path in ("/v1/models", "/v1/models/e2e", "/metrics"):
            assert (await client.get(path, headers=sent)).status_code == 401
        refused = await client.post(URL, json=BODY, headers=sent)
        said = refused.json()["error"]
        assert (refused.status_code, said["code"], said["type"]) == (
            401,
            "invalid_api_key",
            "invalid_request_error",
        )
        assert "prad keys create" in said["message"]
        assert refused.headers["www-authenticate"] == "Bearer"
        assert (await client.post(URL, json=BODY, headers=shown("alice"))).status_code == 200


async def test_a_key_takes_its_own_turns_of_a_task(app_with: AppOf, engine: Any) -> None:
    async with client_of(app_with(key("alice"), key("bob"))) as client:
        for name in ("alice", "bob"):
            assert await error(client, name) == (200, None)
    assert [request.flow for request in engine.requests] == [("e2e", "alice"), ("e2e", "bob")]


async def test_a_body_without_a_key_is_not_read(app_with: AppOf, drive: Any) -> None:
    driven = drive(app_with(key("alice")), URL, [], asyncio.Event())
    await driven.serving
    assert driven.sent[0]["status"] == 401


async def test_nobody_needs_a_key_while_there_is_none(app_with: AppOf) -> None:
    async with client_of(app_with()) as client:
        assert await error(client, None) == (200, None)
        assert await error(client, "none") == (200, None)
    gone = revoked(key("gone"), "gone", 2, "2026-01-01T00:00:00.000+00:00", "")
    async with client_of(app_with(gone)) as client:
        assert await error(client, None) == (401, "invalid_api_key"), "a revoked one opens nothing"
    async with client_of(app_with(ring=KeyRing(required=True))) as client:
        assert await error(client, None) == (401, "invalid_api_key"), "beyond loopback, from the start"


async def test_a_key_is_for_its_tasks(app_with: AppOf) -> None:
    async with client_of(app_with(key("alice", tasks=("e2e", "later")), key("bob"))) as client:
        for model in ("e2e", "e2e@1", "e2e@canary"):
            assert await error(client, "alice", model=model) == (200, None)
        for model in ("plain", "plain@1", "nothing", "tiny/model"):
            assert await error(client, "alice", model=model) == (403, "task_not_allowed")
        assert await error(client, "alice", model="tiny/model", task="talk") == (403, "task_not_allowed")
        assert await error(client, "alice", model=None) == (403, "task_not_allowed"), "the plain model"
        assert await error(client, "bob", model=None) == (200, None)
        listed = (await client.get("/v1/models", headers=shown("alice"))).json()["data"]
        assert [model["id"] for model in listed] == ["e2e"]
        assert len((await client.get("/v1/models", headers=shown("bob"))).json()["data"]) == 6
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": []})):
            for task, status in (("e2e", 200), ("plain", 403)):
                asked = await client.post(path, headers=shown("alice"), json={"task": task, **body})
                assert asked.status_code == status
        for name, status in (("e2e@2", 200), ("plain", 403), ("nothing", 403), ("tiny/model", 403)):
            assert (await client.get(f"/v1/models/{name}", headers=shown("alice"))).status_code == status
        missing = await client.post(URL, json=BODY | {"model": "later"}, headers=shown("alice"))
        assert (missing.status_code, "(tasks: e2e;" in missing.json()["error"]["message"]) == (404, True)
        assert (await client.get("/metrics", headers=shown("alice"))).status_code == 403
        assert (await client.get("/metrics", headers=shown("bob"))).status_code == 200


async def test_the_plain_model_is_named_like_a_task(app_with: AppOf) -> None:
    async with client_of(app_with(key("alice", tasks=("tiny/model",)))) as client:
        assert await error(client, "alice", model="tiny/model") == (200, None)
        assert await error(client, "alice") == (403, "task_not_allowed")
        listed = (await client.get("/v1/models", headers=shown("alice"))).json()["data"]
        assert [model["id"] for model in listed] == ["tiny/model"]


async def test_a_revoked_key_ends_with_the_next_request(app_with: AppOf) -> None:
    ring = KeyRing()
    async with client_of(app_with(key("alice"), ring=ring)) as client:
        assert await error(client, "alice") == (200, None)
        ring.replace([revoked(key("alice"), "alice", 2, "2026-01-01T00:00:00.000+00:00", "")])
        assert await error(client, "alice") == (401, "invalid_api_key")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that windows and Retry-After go by: its last element."""
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[-1])
    return now


async def test_requests_a_minute(app_with: AppOf, clock: list[float]) -> None:
    ring = KeyRing()
    alice, bob = (key(name, limits={"requests_per_minute": 2}) for name in ("alice", "bob"))
    async with client_of(app_with(alice, bob, ring=ring)) as client:
        assert await error(client, "alice") == (200, None)
        clock.append(1010.5)
        assert await error(client, "alice", prompt=5) == (400, None), "what fails counts as well"
        refused = await client.post(URL, json=BODY, headers=shown("alice"))
        said = refused.json()["error"]
        assert (refused.status_code, said["code"], said["type"]) == (
            429,
            "rate_limit_exceeded",
            "rate_limit_error",
        )
        assert refused.headers["retry-after"] == "50"
        assert "may use 2 requests a minute, of which 0 are left" in said["message"]
        ring.replace([alice, bob, key("carol")])
        assert await error(client, "alice") == (429, "rate_limit_exceeded"), "another key changes nothing"
        assert await error(client, "bob") == (200, None)
        assert (await client.get("/v1/models", headers=shown("alice"))).status_code == 200
        clock.append(1010.5 + 50)
        assert await error(client, "alice") == (200, None), "when it was told to come again"


async def test_tokens_a_minute_are_counted_before_they_are_computed(
    app_with: AppOf, clock: list[float], engine: Any
) -> None:
    async with client_of(app_with(key("alice", limits={"tokens_per_minute": 40}))) as client:
        asked = {"model": "plain", "prompt": [5] * 6, "raw_prompt": True, "max_tokens": 8, "n": 2}
        assert await error(client, "alice", **asked) == (200, None)
        begun = len(engine.requests)
        refused = await client.post(URL, json=BODY | asked, headers=shown("alice"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        assert "40 tokens a minute, of which 18 are left" in refused.json()["error"]["message"]
        assert len(engine.requests) == begun
        assert await error(client, "alice", **asked | {"n": 1, "max_tokens": 12}) == (200, None)
        assert await error(client, "alice", **asked | {"n": 1, "max_tokens": 1}) == (
            429,
            "rate_limit_exceeded",
        )
        never = await client.post(URL, json=BODY | asked | {"max_tokens": 30}, headers=shown("alice"))
        assert (never.status_code, never.json()["error"]["param"]) == (400, "max_tokens")
        assert "retry-after" not in never.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_at_once_count_to_their_last_byte(app_with: AppOf, engine: Any, stream: bool) -> None:
    async with client_of(app_with(key("alice", limits={"concurrent": 1}), key("bob"))) as client:
        engine.pause_at = 1
        first = asyncio.create_task(error(client, "alice", stream=stream)) if not stream else None
        if first is None:
            first = asyncio.create_task(_read(client))
        await engine.paused.acquire()
        refused = await client.post(URL, json=BODY, headers=shown("alice"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "1 requests under way" in refused.json()["error"]["message"]
        engine.pause_at = None
        assert await error(client, "bob") == (200, None)
        engine.resume.set()
        await first
        assert await error(client, "alice") == (200, None)


async def _read(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json=BODY | {"stream": True}, headers=shown("alice"))
    assert answer.text.endswith("[DONE]\n\n")


async def test_who_hangs_up_leaves_its_place(app_with: AppOf, engine: Any, drive: Any) -> None:
    app = app_with(key("alice", limits={"concurrent": 1}))
    engine.pause_at = 0
    async with client_of(app) as client:
        waiting = asyncio.create_task(client.post(URL, json=BODY, headers=shown("alice")))
        await engine.paused.acquire()
        assert await error(client, "alice") == (429, "rate_limit_exceeded")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        engine.pause_at = None
        assert await error(client, "alice") == (200, None)


async def test_openais_client_shows_its_key_and_understands(app_with: AppOf) -> None:
    app = app_with(key("alice", tasks=("e2e",), limits={"requests_per_minute": 2}))
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="alice", http_client=client_of(app), max_retries=0
    ) as client:
        listed = await client.models.list()
        assert [model.id for model in listed.data] == ["e2e"]
        assert (await client.completions.create(model="e2e", prompt="food")).choices
        with pytest.raises(openai.PermissionDeniedError, match="is not for 'plain'"):
            await client.completions.create(model="plain", prompt="food")
        with pytest.raises(openai.RateLimitError, match="2 requests a minute"):
            await client.completions.create(model="e2e", prompt="food")
        with pytest.raises(openai.AuthenticationError, match="not known, or was revoked"):
            await client.with_options(api_key="bob").models.list()


async def test_the_log_names_the_key_and_never_the_token(
    app_with: AppOf, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(app_with(key("alice", tasks=("e2e",)))) as client:
        await error(client, "alice", model="plain")
        await error(client, "s3cret")
    named, unknown = (record.getMessage() for record in caplog.records)
    assert " key=alice task=- status=403 code=task_not_allowed" in named
    assert (" key=" in unknown, "s3cret" in unknown) == (False, False)
