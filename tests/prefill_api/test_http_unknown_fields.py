"""Fields that nobody knows: refused, or named in a header of the answer, as a setting says."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app
from prefill_service.api.app import SHOWN_HEADERS
from prefill_service.settings import PrefillSettings

HEADER = "x-prad-ignored-fields"
USER = {"role": "user", "content": "x"}


@pytest.fixture
async def warned(engine: Any, catalogue: Any, tokenizer: Tokenizer) -> AsyncIterator[httpx.AsyncClient]:
    info = ModelInfo("0123456789abcdef", 128, len(tokenizer), frozenset())
    app = create_app(engine, catalogue, tokenizer, info, ApiLimits(unknown_fields="warn"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_they_are_refused_unless_the_operator_says_otherwise(client: httpx.AsyncClient) -> None:
    assert PrefillSettings().unknown_fields == ApiLimits().unknown_fields == "strict"
    response = await client.post("/v1/completions", json={"prompt": "x", "foo": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "foo")
    assert HEADER not in response.headers


async def test_the_answer_names_them(warned: httpx.AsyncClient, engine: Any) -> None:
    chat = {"messages": [{**USER, "id": "m1"}, {**USER, "id": "m2"}], "max_tokens": 1, "foo": 1, "bar": None}
    for body in ({"stream": True, "stream_options": {"x": 1}}, {}):
        response = await warned.post("/v1/chat/completions", json={**chat, **body})
        assert response.status_code == 200, response.text
        more = ", stream_options.x" if body else ""
        assert response.headers[HEADER] == f"bar, foo, messages.id{more}"
    response = await warned.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert HEADER not in response.headers
    response = await warned.post("/tokenize", json={"prompt": "x", "temperature": 1})
    assert (response.status_code, response.headers[HEADER]) == (200, "temperature")
    assert len(engine.requests) == 3


async def test_what_is_known_and_not_supported_is_refused_all_the_same(warned: httpx.AsyncClient) -> None:
    for field, value in (("suffix", "x"), ("modalities", ["audio"]), ("n", 0), ("functions", [{}])):
        body = {"messages": [USER]} if field in ("modalities", "functions") else {"prompt": "x"}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await warned.post(path, json={**body, field: value, "foo": 1})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
        assert response.headers[HEADER] == "foo", "also beside an error"


async def test_names_in_the_header_are_names_and_few(warned: httpx.AsyncClient) -> None:
    odd = {"a b\r\nx: y": 1, "ü": 1, "z" * 300: 1}
    response = await warned.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **odd})
    assert response.headers[HEADER] == "(no name), (no name), (no name)"
    many = {f"f{i:02}": 1 for i in range(50)}
    response = await warned.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, **many})
    assert response.headers[HEADER].endswith("f19, and 30 more")
    response = await warned.post("/v1/completions", json={"prompt": "x", **{f"f{i}": 1 for i in range(200)}})
    assert response.status_code == 400, "however they are taken, a hundred fields are enough"


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("/v1/messages", {"messages": [USER], "max_tokens": 2}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
    ],
)
async def test_other_protocols_keep_the_fields_of_a_chat(
    warned: httpx.AsyncClient, engine: Any, path: str, own: dict[str, Any]
) -> None:
    body = {"model": "talk", **own, "seed": 7, "temperature": 0.5, "n": 2, "foo": 1}
    answer = await warned.post(path, json=body)
    assert (answer.status_code, answer.headers[HEADER]) == (200, "foo, n"), answer.text
    (request,) = engine.requests
    assert (request.sampling.seed, request.sampling.temperature, request.choices) == (7, 0.5, 1)
    refused = await warned.post(path, json=body | {"temperature": "hot"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_pages_of_other_origins_see_the_header() -> None:
    assert HEADER in SHOWN_HEADERS
